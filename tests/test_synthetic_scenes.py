"""The drawn scenes: exact masks, held-out pairs, and equal bytes in any order and process."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grex_mllm.data.synthetic import ATTRIBUTES, SPLITS, SyntheticDataset, draw_scene, parse, scenes
from grex_mllm.data.synthetic.grammar import descriptions
from grex_mllm.data.synthetic.scenes import held_out_pairs
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.data.synthetic.shapes import COLOUR, SHAPE, TEXTURE
from grex_mllm.errors import GrexError
from grex_mllm.types import Sample

CONFIG = SyntheticConfig()


def digest(sample: Sample) -> str:
    seen = hashlib.sha256(sample.image.tobytes())
    for instance in sample.record.instances:
        assert instance.mask is not None
        seen.update(instance.mask.tobytes() + repr((instance.annotation_id, instance.box_xyxy, instance.attributes)).encode())
    for record in sample.expressions:
        seen.update(repr(record).encode())
    return seen.hexdigest()


@pytest.mark.parametrize("size", [96, 128])
def test_samples_have_the_stated_form(size: int) -> None:
    dataset = SyntheticDataset(replace(CONFIG, image_size=size), "train", 60, 8)
    assert len(dataset) == 60
    numbers = set()
    for index in range(60):
        sample = dataset[index]
        instances = sample.record.instances
        numbers.add(len(instances))
        assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8 and sample.image.flags["C_CONTIGUOUS"]
        assert 2 <= len(instances) <= 12 and (sample.record.height, sample.record.width) == (size, size)
        total = np.zeros((size, size), dtype=int)
        for position, instance in enumerate(instances):
            mask = instance.mask
            assert mask is not None and mask.shape == (size, size) and mask.dtype == bool
            total += mask
            assert mask.sum() >= scenes.MIN_VISIBLE_PIXELS
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert instance.box_xyxy == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert instance.annotation_id == f"train-{index}:{position}"
            assert instance.attributes is not None and set(instance.attributes) == set(ATTRIBUTES)
            assert all(0 <= value < len(ATTRIBUTES[name]) for name, value in instance.attributes.items())
            assert instance.category == ATTRIBUTES["shape"][instance.attributes["shape"]]
        assert total.max() == 1  # disjoint
        assert len({record.expression_id for record in sample.expressions}) == 8
        known = {instance.annotation_id for instance in instances}
        assert all(set(record.targets) <= known for record in sample.expressions)
    assert len(numbers) >= 9


def test_masks_are_the_visible_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a black background without noise, the union of the masks is what is not black, and each mask holds one object's three colours."""
    monkeypatch.setattr(scenes, "_background", lambda r, size: np.zeros((3, size, size), dtype=np.uint8))
    for index in range(60):
        drawn = draw_scene(replace(CONFIG, noise=0), "train", index)
        assert (drawn.image.any(axis=2) == drawn.masks.any(axis=0)).all()
        for item, mask in zip(drawn.scene.objects, drawn.masks, strict=True):
            colours = np.unique(drawn.image[mask], axis=0)
            assert len(colours) <= (2 if item.values[TEXTURE] == 0 else 3)


def test_objects_keep_their_visible_share(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = []
    original = scenes.shapes.template

    def watched(*arguments: int) -> object:
        whole.append(original(*arguments))
        return whole[-1]

    monkeypatch.setattr(scenes.shapes, "template", watched)
    occluded = 0
    for index in range(80):
        whole.clear()
        drawn = draw_scene(CONFIG, "test", index)
        if len(whole) != len(drawn.masks):
            continue  # some object found no place
        for form, mask in zip(whole, drawn.masks, strict=True):
            share = mask.sum() / form.num_pixels
            assert CONFIG.min_visible <= share <= 1
            occluded += share < 1
    assert occluded > 50


def test_colours_look_like_their_names() -> None:
    """The mean colour of the plain objects lies nearest to its own colour's mean for nearly all objects."""
    found: dict[int, list[np.ndarray]] = {}
    for index in range(150):
        drawn = draw_scene(CONFIG, "train", index)
        for item, mask in zip(drawn.scene.objects, drawn.masks, strict=True):
            if item.values[TEXTURE] == 0:
                colour = drawn.image[mask].mean(axis=0)
                found.setdefault(item.values[COLOUR], []).append(colour / np.linalg.norm(colour))
    means = np.array([np.mean(found[k], axis=0) for k in range(len(ATTRIBUTES["colour"]))])
    right = [np.argmin(((means - colour) ** 2).sum(1)) == k for k, colours in found.items() for colour in colours]
    assert np.mean(right) > 0.99


def test_order_and_pickling_change_nothing() -> None:
    dataset = SyntheticDataset(CONFIG, "val", 20, 6)
    forward = [digest(dataset[index]) for index in range(20)]
    copy = deepcopy(dataset)  # by the same protocol as pickling
    assert [digest(copy[index]) for index in reversed(range(20))] == forward[::-1]
    assert len(set(forward)) == 20
    assert len(pickle.dumps(dataset)) < 2000


def test_fewer_expressions_are_a_prefix() -> None:
    few, many = SyntheticDataset(CONFIG, "train", 10, 3), SyntheticDataset(CONFIG, "train", 10, 9)
    for index in range(10):
        assert few[index].expressions == many[index].expressions[:3]


def test_seed_and_split_change_everything() -> None:
    digests = {digest(SyntheticDataset(CONFIG, split, 1, 2)[0]) for split in SPLITS}
    digests.add(digest(SyntheticDataset(replace(CONFIG, seed=1), "train", 1, 2)[0]))
    images = {draw_scene(CONFIG, split, 0).image.tobytes() for split in SPLITS}
    assert len(digests) == 5 and len(images) == 4


def test_the_bytes_of_this_version() -> None:
    """Every machine draws these. Who changes the drawing or the sampling on purpose renews the digest and says so in CHANGELOG.md."""
    samples = [SyntheticDataset(replace(CONFIG, image_size=size), split, 20, 8)[19] for size in (96, 128) for split in SPLITS]
    assert hashlib.sha256("".join(map(digest, samples)).encode()).hexdigest()[:16] == "00dc326c00eb0e70"


def test_another_process_draws_the_same_bytes() -> None:
    """A fresh interpreter with another hash seed and another order."""
    code = (
        "from grex_mllm.data.synthetic.settings import SyntheticConfig\n"
        "from grex_mllm.data.synthetic import SyntheticDataset\n"
        "from tests.test_synthetic_scenes import digest\n"
        "d = SyntheticDataset(SyntheticConfig(), 'compositional', 6, 8)\n"
        "print(' '.join([digest(d[i]) for i in (5, 3, 1, 0, 2, 4)]))\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=root)
    dataset = SyntheticDataset(CONFIG, "compositional", 6, 8)
    assert done.stdout.split() == [digest(dataset[index]) for index in (5, 3, 1, 0, 2, 4)]


def test_held_out_pairs_are_absent_from_the_other_splits() -> None:
    held = held_out_pairs(CONFIG)
    assert len(held.colours) == 6 and len(held.textures) == 1
    for split in ("train", "val", "test"):
        dataset = SyntheticDataset(CONFIG, split, 250, 8)
        for index in range(250):
            sample = dataset[index]
            for instance in sample.record.instances:
                given = instance.attributes or {}
                assert not held.contains((given["shape"], given["colour"], given["size"], given["texture"]))
            for record in sample.expressions:
                tree = parse(record.expression)
                assert tree is not None
                for found in descriptions(tree):
                    shape, colour, _, texture = found.values
                    assert (shape, colour) not in held.colours and (shape, texture) not in held.textures, record.expression


def test_compositional_split_shows_and_targets_the_held_out_pairs() -> None:
    held = held_out_pairs(CONFIG)
    dataset = SyntheticDataset(CONFIG, "compositional", 150, 8)
    shown: set[tuple[int, ...]] = set()
    mentioned = targeted = 0
    for index in range(150):
        sample = dataset[index]
        values = [
            tuple((instance.attributes or {})[name] for name in ("shape", "colour", "size", "texture"))
            for instance in sample.record.instances
        ]
        special = {f"compositional-{index}:{k}" for k, value in enumerate(values) if held.contains(value)}
        shown.update((value[SHAPE], value[COLOUR]) for value in values)
        assert special
        for record in sample.expressions:
            if record.targets:
                assert special & set(record.targets), record.expression
                targeted += 1
            tree = parse(record.expression)
            assert tree is not None
            mentioned += any((found.values[SHAPE], found.values[COLOUR]) in held.colours for found in descriptions(tree))
    assert held.colours <= shown and targeted > 600 and mentioned > 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 40}, "image_size is 40"),
        ({"max_objects": 13}, "max_objects is 13"),
        ({"min_objects": 1}, "min_objects is 1"),
        ({"noise": 60}, "noise is 60"),
        ({"no_target_share": 1.0}, "no_target_share is 1.0"),
        ({"held_out": ["pink star"]}, '"pink star"'),
        ({"held_out": ["red starfish"]}, '"red starfish"'),
        ({"held_out": [f"{c} {s}" for c in ATTRIBUTES["colour"] for s in ATTRIBUTES["shape"]]}, "42 pairs"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(GrexError, match=message):
        SyntheticDataset(replace(CONFIG, **change), "train", 5, 2)  # type: ignore[arg-type]


def test_wrong_split_kind_and_index() -> None:
    with pytest.raises(GrexError, match='split "testA"'):
        SyntheticDataset(CONFIG, "testA", 5, 2)
    with pytest.raises(GrexError, match="categories"):
        SyntheticDataset(CONFIG, "train", 5, 2, {"categories": 1.0})
    with pytest.raises(GrexError, match="at least 1 scene"):
        SyntheticDataset(CONFIG, "train", 0, 2)
    with pytest.raises(IndexError):
        SyntheticDataset(CONFIG, "train", 5, 2)[5]
