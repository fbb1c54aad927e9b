"""gRefCOCO as published to a dataset folder.

python data_prep/grefcoco.py --refs 'grefs(unc).json' --instances instances.json --images train2014 --out data/grefcoco
"""

from __future__ import annotations

import sys

from grex_mllm.data.refs_program import build_parser, run

LICENCE = "expressions: gRefCOCO, CC BY-NC-SA 4.0; instances: MS COCO, CC BY 4.0; every photograph keeps its own Flickr licence"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    return run(build_parser(__doc__, "grefcoco", LICENCE), "data_prep/grefcoco.py", arguments)


if __name__ == "__main__":
    sys.exit(main())
