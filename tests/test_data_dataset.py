"""Orders that are pure functions of (seed, position), and batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_folder import expression, gradient, instance, rectangle_mask, tiny_folder, tiny_records, write_folder

from grex_mllm.data.collate import collate
from grex_mllm.data.dataset import MIXTURE_BLOCK, FolderDataset, Mixture
from grex_mllm.errors import GrexError
from grex_mllm.types import Batch, ExpressionRecord, ImageRecord, Instance, Sample


def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Length of each text as its only token."""
    ids = torch.tensor([[len(text), 0] for text in texts])
    return ids, (ids > 0).long()


def many_expressions(folder: Path, num_images: int = 5, per_image: int = 7) -> Path:
    images, _ = tiny_records()
    images = [{**images[0], "image_id": str(number)} for number in range(num_images)]
    expressions = [
        expression(f"{image}.{n}", str(image), f"expression {n}", ["11"]) for image in range(num_images) for n in range(per_image)
    ]
    return write_folder(folder, images, expressions)


def ids(sample: Sample) -> list[str]:
    return [record.expression_id for record in sample.expressions]


def test_evaluation_reads_every_expression_once_in_file_order(tmp_path: Path) -> None:
    dataset = FolderDataset(many_expressions(tmp_path), "train", 3)
    assert len(dataset) == 5 * 3
    assert [name for sample in dataset for name in ids(sample)] == [f"{image}.{n}" for image in range(5) for n in range(7)]
    assert max(len(sample.expressions) for sample in dataset) == 3
    with pytest.raises(IndexError):
        dataset[15]


def test_training_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    folder = many_expressions(tmp_path)
    first, second = (FolderDataset(folder, "train", 3, training=True, seed=7) for _ in range(2))
    forwards = [ids(first[position]) for position in range(20)]
    backwards = [ids(second[position]) for position in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [ids(FolderDataset(folder, "train", 3, training=True, seed=8)[position]) for position in range(20)]


def test_loader_workers_change_nothing(tmp_path: Path) -> None:
    dataset = FolderDataset(many_expressions(tmp_path), "train", 3, training=True)
    batches = [[3 * step + n for n in range(3)] for step in range(4)]
    runs = []
    for workers in (0, 2):
        loader: Any = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)  # type: ignore[arg-type]
        runs.append([[ids(sample) for sample in batch] for batch in loader])
    assert runs[0] == runs[1] and len(runs[0]) == 4


def test_only_targeted_and_only_the_first_images(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    dataset = FolderDataset(folder, "train", 8, targeted_only=True)
    assert [ids(sample) for sample in dataset] == [["e1", "e2"]]
    assert len(FolderDataset(many_expressions(tmp_path / "many"), "train", 8, num_images=2)) == 2
    images, expressions = tiny_records()
    with pytest.raises(GrexError, match="without any target"):
        FolderDataset(write_folder(tmp_path / "none", images, expressions[2:3]), "train", targeted_only=True)
    with pytest.raises(GrexError, match="at least 1"):
        FolderDataset(folder, "train", 0)


class Numbers:
    """A source that gives its positions back."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 10

    def __getitem__(self, position: int) -> Any:
        return self.name, position


def test_a_mixture_keeps_its_ratio_and_leaves_no_position_out() -> None:
    mixture = Mixture([Numbers("a"), Numbers("b"), Numbers("c")], [5, 3, 1], seed=3)
    drawn: list[Any] = [mixture[position] for position in range(2 * MIXTURE_BLOCK)]
    counts = Counter(name for name, _ in drawn)
    for name, share in (("a", 5 / 9), ("b", 3 / 9), ("c", 1 / 9)):
        assert counts[name] == pytest.approx(2 * MIXTURE_BLOCK * share, abs=2)
        assert [position for owner, position in drawn if owner == name] == list(range(counts[name]))
    assert [name for name, _ in drawn[:50]] != sorted(name for name, _ in drawn[:50])
    again: Any = Mixture([Numbers("a"), Numbers("b"), Numbers("c")], [5, 3, 1], seed=3)[777]
    assert again == drawn[777] and len(mixture) == 30
    for weights in ([1], [1, 0, 1]):
        with pytest.raises(GrexError, match="weight"):
            Mixture([Numbers("a"), Numbers("b"), Numbers("c")], weights)


@pytest.mark.parametrize(("target", "words"), [("99", "none of its image's"), ("13", "crowd region"), ("21", "none of its image's")])
def test_targets_that_do_not_exist(tmp_path: Path, target: str, words: str) -> None:
    images, expressions = tiny_records()
    expressions[0]["targets"] = [target]
    dataset = FolderDataset(write_folder(tmp_path, images, expressions), "train")
    with pytest.raises(GrexError, match=words) as caught:
        dataset[0]
    assert "e1" in str(caught.value) and f'"{target}"' in str(caught.value)


def test_image_faults_name_file_and_line(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    dataset = FolderDataset(folder, "val")
    (folder / "images" / "b.png").unlink()
    with pytest.raises(GrexError, match=r"images.jsonl line 2.*b.png does not exist"):
        dataset[0]
    images, expressions = tiny_records()
    images[1]["height"], images[1]["width"] = 30, 40
    dataset = FolderDataset(write_folder(tmp_path, images, expressions), "val")
    with pytest.raises(GrexError, match=r"line 2.*30x40.*40x30.*height/width order"):
        dataset[0]


def make_batch(tmp_path: Path, **options: Any) -> Batch:
    folder = tiny_folder(tmp_path)
    samples = [FolderDataset(folder, "train")[0], FolderDataset(folder, "val")[0]]
    return collate(samples, encode, keep_items, **{"image_size": 32, "resize": "squash", **options})


def keep_items(images: Any, items: Any) -> tuple[Any, list[str]]:
    """What a generator's collate gets."""
    return (images, items), []


def test_a_batch_by_hand(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, resize="pad", image_size=40)
    assert batch.image.shape == (2, 3, 40, 40) and batch.image.dtype == torch.uint8 and batch.image.is_contiguous()
    assert torch.equal(batch.image[0, :, :30], torch.from_numpy(gradient()).permute(2, 0, 1)) and not batch.image[0, :, 30:].any()
    assert batch.image_index.tolist() == [0, 0, 0, 1, 1]
    assert batch.expression_ids == ["e1", "e2", "e3", "e4", "e5"] and batch.image_ids == ["1", "2"]
    assert batch.text_ids[:, 0].tolist() == [len(t) for t in ("the dog", "the dog and the cat", "the bird", "the cat", "the horse")]
    assert batch.gt_count.tolist() == [1, 2, 0, 1, 0] and batch.no_target.tolist() == [False, False, True, False, True]
    assert [index.tolist() for index in batch.target_index] == [[0], [0, 1], [], [0], []]
    assert [len(masks) for masks in batch.instance_masks] == [2, 2]  # the crowd region is none
    dog = torch.zeros(40, 40, dtype=torch.bool)
    dog[3:13, 2:12] = True
    both = dog.clone()
    both[5:15, 20:30] = True
    assert batch.gt_masks is not None and batch.gt_masks.dtype == torch.bool
    assert torch.equal(batch.gt_masks[0], dog) and torch.equal(batch.gt_masks[1], both) and not batch.gt_masks[2].any()
    assert torch.allclose(batch.gt_boxes_norm[1], torch.tensor([[7, 8, 10, 10], [25, 10, 10, 10]]) / 40)
    assert batch.gt_boxes_norm[2].shape == (0, 4) and batch.gt_boxes_norm[2].dtype == torch.float32
    assert batch.instance_attributes is None
    images, items = batch.generation  # the generator learns from expressions with a target
    assert [(item.image, item.expression_id, item.targets.tolist()) for item in items] == [
        (0, "e1", [0]),
        (0, "e2", [0, 1]),
        (1, "e4", [0]),
    ]
    assert np.array_equal(images[0].original, gradient()) and images[0].instance_masks.shape == (2, 40, 40)
    assert (batch.geometries[1].height, batch.geometries[1].width) == (40, 30)


def test_generation_takes_some_targeted_expressions_maybe_none(tmp_path: Path) -> None:
    _, items = make_batch(tmp_path, num_generation_targets=1).generation
    assert [item.expression_id for item in items] == ["e1", "e4"]
    horse = FolderDataset(tiny_folder(tmp_path), "val", 1)[1]
    assert collate([horse], encode, keep_items, image_size=32).generation[1] == []
    assert collate([horse], encode, image_size=32).generation is None
    horse.expressions.clear()
    with pytest.raises(GrexError, match="without any expression"):
        collate([horse], encode, image_size=32)


def test_a_batch_equals_its_samples_one_by_one(tmp_path: Path) -> None:
    together = make_batch(tmp_path)
    folder = tiny_folder(tmp_path)
    row = 0
    for number, split in enumerate(("train", "val")):
        alone = collate([FolderDataset(folder, split)[0]], encode, image_size=32)
        assert torch.equal(together.image[number : number + 1], alone.image)
        assert alone.gt_masks is not None and together.gt_masks is not None
        assert torch.equal(together.gt_masks[row : row + len(alone.gt_masks)], alone.gt_masks)
        row += len(alone.gt_masks)


def test_box_only_targets_give_no_masks(tmp_path: Path) -> None:
    images, expressions = tiny_records()
    images[0]["instances"] = [instance("11", [4, 6, 20, 30], None)]
    dataset = FolderDataset(write_folder(tmp_path, images, expressions[:1]), "train")
    batch = collate([dataset[0]], encode, image_size=40, resize="pad")
    assert batch.gt_masks is None
    assert batch.instance_masks[0].sum() == 16 * 24 and batch.instance_masks[0][0, 6:30, 4:20].all()


def test_scene_metadata_and_pixel_masks() -> None:
    masks = [rectangle_mask(0, 0, 20, 15), rectangle_mask(20, 15, 40, 30)]
    boxes = [[0.0, 0.0, 20.0, 15.0], [20.0, 15.0, 40.0, 30.0]]
    instances = [Instance(str(n), "square", boxes[n], mask=masks[n], attributes=[{"colour": 4}, None][n]) for n in range(2)]
    record = ImageRecord("s", "", 30, 40, instances)
    text = ExpressionRecord("e", "e", "s", "the square", "the square", ["1"], "train", "synthetic")
    batch = collate([Sample(gradient(), record, [text])], encode, image_size=20)
    assert batch.gt_masks is not None and batch.gt_masks[0, 10:, 10:].all() and batch.gt_masks.sum() == 100
    assert batch.instance_attributes is not None and batch.instance_attributes["colour"][0].tolist() == [4, -100]
    text.raw = " "
    with pytest.raises(GrexError, match="e is empty"):
        collate([Sample(gradient(), record, [text])], encode, image_size=20)
    text.raw, text.targets = "x", ["7"]
    with pytest.raises(GrexError, match="no instances of image s"):
        collate([Sample(gradient(), record, [text])], encode, image_size=20)
    instances[0].mask = np.zeros((3, 3), bool)
    with pytest.raises(GrexError, match=r"annotation 0.*shape"):
        collate([Sample(gradient(), record, [text])], encode, image_size=20)


def test_targets_alone_give_the_same_masks_and_boxes(tmp_path: Path) -> None:
    whole, alone = make_batch(tmp_path / "a"), make_batch(tmp_path / "b", targets_only=True)
    assert sum(map(len, alone.instance_masks)) < sum(map(len, whole.instance_masks))
    assert torch.equal(alone.gt_count, whole.gt_count) and alone.gt_masks is not None and torch.equal(alone.gt_masks, whole.gt_masks)  # type: ignore[arg-type]
    for few, all_boxes in zip(alone.gt_boxes_norm, whole.gt_boxes_norm, strict=True):
        assert torch.equal(few, all_boxes)


def test_an_unchanged_folder_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "data")
    first = FolderDataset(folder, "val", training=True)
    assert FolderDataset(folder, "val").dataset is first.dataset
    lines = (folder / "expressions.jsonl").read_text().splitlines(keepends=True)
    (folder / "expressions.jsonl").write_text("".join(lines[:-1]))
    assert len(FolderDataset(folder, "val").dataset.expressions) == len(first.dataset.expressions) - 1
    monkeypatch.chdir(tmp_path)
    assert FolderDataset("data", "val").dataset.folder == Path("data")  # messages name a folder as it was given
