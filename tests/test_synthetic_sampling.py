"""What is asked about the scenes: balance of kinds, provable and deceptive no-target expressions, references, export."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grex_mllm.data.records import load_dataset
from grex_mllm.data.synthetic import (
    KINDS,
    SyntheticDataset,
    check_expression,
    corpus,
    evaluate,
    export,
    parse,
    references_for,
    scene_from_record,
)
from grex_mllm.data.synthetic.grammar import descriptions
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.types import Sample

CONFIG = SyntheticConfig()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    dataset = SyntheticDataset(CONFIG, "train", 2000, 8)
    return [dataset[index] for index in range(2000)]


def test_kinds_and_no_target_shares_are_balanced(samples: list[Sample]) -> None:
    kinds: Counter[str] = Counter()
    empty: Counter[str] = Counter()
    multi = words = 0
    for sample in samples:
        for record in sample.expressions:
            kind = record.tags[0]
            kinds[kind] += 1
            empty[kind] += not record.targets
            assert ("no_target" in record.tags) == (not record.targets)
            multi += len(record.targets) > 1
            words += len(record.expression.split()) <= 14
            assert len(record.expression.split()) <= 20
    total = sum(kinds.values())
    assert set(kinds) == set(KINDS)
    for kind in KINDS:
        assert 0.05 <= kinds[kind] / total <= 0.12, kind
        assert 0.12 <= empty[kind] / kinds[kind] <= 0.35, kind
    assert multi / total >= 0.4
    assert words / total >= 0.95
    assert 0.2 <= sum(empty.values()) / total <= 0.25


def test_every_expression_is_provably_right(samples: list[Sample]) -> None:
    """From the text and the record alone: parse, rebuild the scene, evaluate."""
    assert sum(len(sample.expressions) for sample in samples[:600]) > 600
    for sample in samples[:600]:
        scene = scene_from_record(sample.record)
        for record in sample.expressions:
            tree = parse(record.expression)
            assert tree is not None
            found = evaluate(tree, scene)
            assert found is not None
            assert {f"{record.image_id}:{k}" for k in found} == set(record.targets), record.expression


def test_no_target_expressions_are_deceptive(samples: list[Sample]) -> None:
    """Whatever they name is there, in some other combination; but for the shapes of "category" and one shape of "shared_attribute"."""
    checked = 0
    for sample in samples:
        scene = scene_from_record(sample.record)
        for record in sample.expressions:
            tree = parse(record.expression)
            if record.targets or record.tags[0] == "category" or tree is None:
                continue
            named = [(k, value) for found in descriptions(tree) for k, value in enumerate(found.values) if value is not None]
            absent = {(k, value) for k, value in named if not scene.masks[k][value]}
            assert len(absent) <= (record.tags[0] == "shared_attribute"), record.expression
            checked += 1
    assert checked > 2500


def test_expressions_of_a_scene_differ(samples: list[Sample]) -> None:
    repeated = sum(8 - len({record.expression for record in sample.expressions}) for sample in samples)
    assert repeated < 0.002 * 8 * len(samples)


def test_kind_weights_favour_and_exclude() -> None:
    dataset = SyntheticDataset(CONFIG, "train", 150, 8, {"category": 3.0, "attribute": 1.0, "ordinal": 0.0})
    kinds = Counter(record.tags[0] for index in range(150) for record in dataset[index].expressions)
    assert kinds["category"] > 1.8 * kinds["attribute"] > 0
    assert sum(kinds.values()) - kinds["category"] - kinds["attribute"] < 0.08 * sum(kinds.values())  # only where a scene is too poor


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_alone_ends(kind: str) -> None:
    """Scenes of two objects cannot host every kind: the sampler must go on with another, not hang."""
    dataset = SyntheticDataset(replace(CONFIG, max_objects=2, no_target_share=0.0), "train", 12, 4, {kind: 1.0})
    for index in range(12):
        expressions = dataset[index].expressions
        assert len(expressions) == 4 and all(record.targets for record in expressions)


def test_no_target_share_is_a_setting() -> None:
    for share in (0.0, 0.5):
        dataset = SyntheticDataset(replace(CONFIG, no_target_share=share), "train", 150, 8)
        empty = np.mean([not record.targets for index in range(150) for record in dataset[index].expressions])
        assert abs(empty - share) < 0.06
        assert share or empty == 0


def test_corpus_is_the_text_of_train_scenes() -> None:
    lines = list(corpus(CONFIG, 100))
    dataset = SyntheticDataset(CONFIG, "train", 20, 8)
    assert lines == [record.expression for index in range(20) for record in dataset[index].expressions][:100]


def test_references_denote_exactly_the_set() -> None:
    rng = random.Random(0)
    dataset = SyntheticDataset(CONFIG, "val", 40, 3)
    answered = asked = 0
    for index in range(40):
        sample = dataset[index]
        names = [instance.annotation_id for instance in sample.record.instances]
        wishes = [record.targets for record in sample.expressions if record.targets]
        wishes.append(rng.sample(names, rng.randint(1, min(3, len(names)))))
        for targets in wishes:
            texts = references_for(sample, targets, rng, 4)
            asked += 1
            answered += bool(texts)
            assert len(set(texts)) == len(texts) <= 4
            for text in texts:
                assert check_expression(text, sample, targets) == "exact", text
    assert answered >= 0.97 * asked
    assert references_for(sample, [], rng, 1) == []
    one = references_for(scene_from_record(sample.record), [0], random.Random(4), 1)
    assert len(one) == 1 and one == references_for(sample, [names[0]], random.Random(4), 1)


def test_export_equals_the_samples_and_repeats(tmp_path: Path) -> None:
    from PIL import Image
    from pycocotools import mask as coco_mask

    info = export(CONFIG, "compositional", 6, tmp_path / "one", expressions_per_image=4)
    assert info["num_expressions"] == 24 and info["counts"]["compositional"]["images"] == 6
    folder = load_dataset(tmp_path / "one")
    dataset = SyntheticDataset(CONFIG, "compositional", 6, 4)
    assert folder.expressions == [record for index in range(6) for record in dataset[index].expressions]
    for index in range(6):
        sample = dataset[index]
        record = folder.images[sample.record.image_id]
        assert (np.asarray(Image.open(folder.image_root / record.file)) == sample.image).all()
        for read, drawn in zip(record.instances, sample.record.instances, strict=True):
            assert (coco_mask.decode(read.segmentation).astype(bool) == drawn.mask).all()
            assert (read.annotation_id, read.box_xyxy, read.attributes) == (drawn.annotation_id, drawn.box_xyxy, drawn.attributes)
        for expression in sample.expressions:
            assert check_expression(expression.expression, record, expression.targets) == "exact"
    export(CONFIG, "compositional", 6, tmp_path / "two", expressions_per_image=4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_export_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GrexError, match="testB"):
        export(CONFIG, "testB", 2, tmp_path / "out")
    original = SyntheticDataset.__getitem__

    def failing(self: SyntheticDataset, index: int) -> Sample:
        if index == 1:
            raise RuntimeError("power cut")
        return original(self, index)

    monkeypatch.setattr(SyntheticDataset, "__getitem__", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        export(CONFIG, "test", 2, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
