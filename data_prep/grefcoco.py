"""gRefCOCO as published to a dataset folder.

python data_prep/grefcoco.py --refs 'grefs(unc).json' --instances instances.json --images train2014 --out data/grefcoco
"""

from __future__ import annotations

import sys

from grex_mllm.data.refs_program import build_parser, run

LICENCE = "expressions: gRefCOCO, CC BY-NC-SA 4.0; instances: MS COCO, CC BY 4.0; every photograph keeps its own Flickr licence"

if __name__ == "__main__":
    sys.exit(run(build_parser(__doc__, "grefcoco", LICENCE), "data_prep/grefcoco.py"))
