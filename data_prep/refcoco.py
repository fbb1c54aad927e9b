"""RefCOCO, RefCOCO+ and RefCOCOg as published (pickled refs) to a dataset folder. The pickle is read without running anything in it.

python data_prep/refcoco.py --name refcoco --refs 'refs(unc).p' --instances instances.json --images train2014 --out data/refcoco

RefCOCOg has two splits: `refs(umd).p` (train, val, test) and `refs(google).p` (train, val). Training images of one of these datasets are
test images of another: prove a mixture with `grex data check A B`.
"""

from __future__ import annotations

import sys

from grex_mllm.data.refs_program import build_parser, run

LICENCE = "expressions: RefCOCO/RefCOCO+/RefCOCOg (refer toolkit), research use; instances: MS COCO, CC BY 4.0; photographs: Flickr"

if __name__ == "__main__":
    sys.exit(run(build_parser(__doc__, "refcoco", LICENCE), "data_prep/refcoco.py"))
