"""The demo's test split is what it always was: easier scenes would make its figures mean less."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from grex_mllm import demo
from grex_mllm.config import load_config
from grex_mllm.data.synthetic.export import export

# of images.jsonl, expressions.jsonl and the pixels of every image, as commit b8d97eb drew them
SHA256 = "f660c21df1e4736ca90b96224522a46abdc3cbe35fb37ec7d4083c5e1f9cf220"
NUM_SCENES, NUM_EXPRESSIONS, NUM_SETS = 250, 2000, 1279


def test_the_test_split_is_byte_for_byte_that_of_the_first_figures(tmp_path: Path) -> None:
    for name in ("demo.yaml", "demo_long.yaml", "demo_words.yaml"):
        synthetic = load_config(demo.DEMO_CONFIG.with_name(name)).data.sources["synthetic"]
        assert synthetic == load_config(demo.DEMO_CONFIG).data.sources["synthetic"] and synthetic.image_size == 96
    assert (demo.TEST_SCENES, demo.EXPRESSIONS_PER_SCENE) == (NUM_SCENES, NUM_EXPRESSIONS // NUM_SCENES)
    folder = tmp_path / "data"
    info = export(synthetic, "test", demo.TEST_SCENES, folder, demo.EXPRESSIONS_PER_SCENE)
    assert info["num_expressions"] == NUM_EXPRESSIONS
    assert digest(folder) == SHA256


def test_the_object_sets_are_counted_as_reported(tmp_path: Path) -> None:
    from grex_mllm.data.dataset import FolderDataset
    from grex_mllm.predictors.protocol import object_sets

    export(load_config(demo.DEMO_CONFIG).data.sources["synthetic"], "test", demo.TEST_SCENES, tmp_path / "data", demo.EXPRESSIONS_PER_SCENE)
    source = FolderDataset(tmp_path / "data", "test", 10**9)
    assert sum(len(object_sets(group)) for group in source.groups) == NUM_SETS


def digest(folder: Path) -> str:
    """Return the SHA-256 of records and pixels; how Pillow packs a PNG does not matter."""
    sha = hashlib.sha256()
    for name in ("images.jsonl", "expressions.jsonl"):
        sha.update((folder / name).read_bytes())
    for file in sorted((folder / "images").iterdir()):
        sha.update(file.name.encode())
        sha.update(np.ascontiguousarray(Image.open(file).convert("RGB")).tobytes())
    return sha.hexdigest()
