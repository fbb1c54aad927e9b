"""Augmented samples of real photographs with templated expressions: the judge finds everything that is said of them exactly true."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tiny_folder import tiny_folder

from grex_mllm.augmentation import AugmentConfig
from grex_mllm.data.augment.source import Augmented
from grex_mllm.data.augment.truth import TemplateScene
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.judges import find_judge
from grex_mllm.data.templates.judge import TemplateJudge, judge_text
from grex_mllm.ops.masks import mask_to_box_xyxy, segmentation_to_mask
from grex_mllm.types import ExpressionRecord

EVERYTHING = AugmentConfig(flip=0.5, crop=0.6, colour=0.5, paste=0.4, scale=[0.5, 2.0])


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traffic, with many categories and sizes, and expressions of every kind."""
    out, source = tmp_path_factory.mktemp("photographs") / "traffic", shared / "data" / "more_photos" / "traffic"
    command = [sys.executable, "data_prep/coco_templates.py", "--source", f"traffic={source}/instances.json.gz:{source}/images", "--out"]
    subprocess.run([*command, str(out), "--splits", "train=1", "--expressions-per-image", "8"], cwd=ROOT, check=True, capture_output=True)
    return out


def augmented(folder: Path, config: AugmentConfig, seed: int = 0) -> Augmented:
    return Augmented(FolderDataset(folder, "train", 6, training=True, seed=seed), config, seed, 320)


def test_everything_said_is_true_and_everything_lies_where_it_is_seen(folder: Path) -> None:
    varied = augmented(folder, EVERYTHING)
    dataset = varied.source.dataset
    judge = find_judge(folder, dataset.info)
    assert isinstance(judge, TemplateJudge)
    owners = {i.annotation_id: record.image_id for record in dataset.images.values() for i in record.instances}
    seen: Counter[str] = Counter()
    for position in range(0, len(varied), 2):
        plain, sample = varied.source[position], varied[position]
        names = {i.annotation_id: i.annotation_id.rstrip("+") for i in sample.record.instances}
        scene = TemplateScene(judge, sample.record, {name: (owners[there], there) for name, there in names.items()})
        seen["undecided"] += num_undecided(scene, sample.expressions)
        assert sample.image.shape == (sample.record.height, sample.record.width, 3) and names.keys() >= targets_of(sample.expressions)
        for instance in sample.record.instances:
            if not instance.iscrowd:
                mask = segmentation_to_mask(instance.segmentation, sample.record.height, sample.record.width)
                near = np.abs(np.subtract(instance.box_xyxy, mask_to_box_xyxy(mask))).max()
                assert mask.any() and near <= 4, "published boxes, too, lie a few pixels beside what thin polygons fill"
        seen["cropped"] += sample.image.shape != plain.image.shape
        seen["pasted"] += not names.keys() <= {i.annotation_id for i in plain.record.instances}
        seen["drawn"] += any("/drawn." in e.expression_id for e in sample.expressions)
        seen["kept"] += len(sample.expressions)
        seen["all"] += len(plain.expressions)
    assert min(seen[name] for name in ("cropped", "pasted", "drawn")) >= 3, seen
    assert seen["kept"] >= 0.9 * seen["all"] and seen["undecided"] <= 0.05 * seen["kept"], seen


def num_undecided(scene: TemplateScene, expressions: list[ExpressionRecord]) -> int:
    """Count expressions that a flip brings into a margin, as a mirrored polygon is rounded to the other side; none may be wrong."""
    verdicts = [judge_text(text, scene.scene, e.targets, scene.categories) for e in expressions for text in {e.raw, e.expression}]
    assert verdicts and set(verdicts) <= {"exact", "ambiguous"}
    return verdicts.count("ambiguous")


def targets_of(expressions: list[ExpressionRecord]) -> set[str]:
    return {target for expression in expressions for target in expression.targets}


def test_flipped_photographs_keep_every_expression_and_its_truth(folder: Path) -> None:
    varied = augmented(folder, AugmentConfig(flip=1.0))
    judge = find_judge(folder, varied.source.dataset.info)
    assert isinstance(judge, TemplateJudge)
    num_flipped, num, undecided = 0, 0, 0
    for position in range(0, len(varied), 2):
        plain, sample = varied.source[position], varied[position]
        assert [(e.expression_id, e.targets) for e in sample.expressions] == [(e.expression_id, e.targets) for e in plain.expressions]
        image = plain.record.image_id
        scene = TemplateScene(judge, sample.record, {i.annotation_id: (image, i.annotation_id) for i in plain.record.instances})
        num += len(sample.expressions)
        undecided += num_undecided(scene, sample.expressions)
        num_flipped += np.array_equal(sample.image, plain.image[:, ::-1])
    assert num_flipped >= 0.9 * len(range(0, len(varied), 2)) and undecided <= 0.05 * num


def test_positions_give_the_same_photographs_in_any_order(folder: Path) -> None:
    first, second = (augmented(folder, EVERYTHING) for _ in range(2))
    for position in (17, 3, 40, 3):
        one, two = first[position], second[position]
        assert np.array_equal(one.image, two.image) and one.record == two.record and one.expressions == two.expressions
        assert one.scale == two.scale


def test_folders_without_templates_are_not_judged(folder: Path, tmp_path: Path) -> None:
    config = replace(EVERYTHING, paste=1.0)
    tiny = augmented(tiny_folder(tmp_path / "d"), config)
    assert tiny.around.scene is None and tiny.describe().endswith("no paste (nothing judges expressions here)")
    known = {i.annotation_id for record in tiny.source.dataset.images.values() for i in record.instances}
    assert all({i.annotation_id for i in tiny[p].record.instances} <= known for p in range(20))
    assert ", crop (what is no longer true is left out), colour, size down to 0.5, paste" in augmented(folder, config).describe()
