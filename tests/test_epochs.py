"""Every expression exactly once an epoch: whatever the sizes, the processes, the accumulation, and where a run was stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config
from tiny_folder import expression, tiny_records, write_folder

from grex_mllm.config import Config, DataConfig, WeightedSource, load_config
from grex_mllm.data.collate import collate
from grex_mllm.data.dataset import SAME_ORIENTATION, Epochs, Mixture, rows_of_one_orientation
from grex_mllm.data.sources import PRETRAINING, describe_epochs, training_samples
from grex_mllm.errors import GrexError
from grex_mllm.training import run
from grex_mllm.training.batches import stream
from grex_mllm.types import Batch, Sample

SIZES = (1, 19, 7, 2, 8, 1, 3)  # expressions of the images of `odd_folder`


def odd_folder(folder: Path, sizes: Iterable[int] = SIZES) -> Path:
    """Write images "0", "1", ..., every second one upright, with so many expressions each; of the last image none has a target.

    Every third expression of the others has none either; a val expression stands between those of the first images.
    """
    wide, upright = tiny_records()[0]
    images, expressions, sizes = [], [], tuple(sizes)
    for number, size in enumerate(sizes):
        images.append({**(upright if number % 2 else wide), "image_id": str(number)})
        target = images[-1]["instances"][0]["annotation_id"]
        for n in range(size):
            targets = [] if number == len(sizes) - 1 or n % 3 == 2 else [target]
            expressions.append(expression(f"{number}.{n}", str(number), f"the thing number {n}", targets))
        expressions.append(expression(f"{number}.val", str(number), "the thing", [target], "val"))
    return write_folder(folder, images, expressions)


def names(sizes: Iterable[int] = SIZES) -> list[str]:
    return sorted(f"{number}.{n}" for number, size in enumerate(sizes) for n in range(size))


def ids(sample: Sample) -> list[str]:
    return [record.expression_id for record in sample.expressions]


def tiny_run(folder: Path, out: Path, **changes: object) -> Config:
    fields: dict[str, object] = {"data__train": folder, "train__out": out, "train__batch_images": 6, "data__image_size": 32}
    fields |= {"train__precision": "fp32", "train__num_threads": 1, "train__seed": 5}
    return tiny_config(**{**fields, **changes})


@pytest.mark.parametrize("most", [1, 2, 8, 30])
@pytest.mark.parametrize("upright", [False, True], ids=["any order", "orientations"])
def test_every_place_once_whatever_the_sizes(most: int, upright: bool) -> None:
    draw = np.random.default_rng(most)
    sizes = draw.integers(1, 25, 40).tolist()
    epochs = Epochs(sizes, most, 3, (draw.random(40) < 0.7).tolist() if upright else None)
    assert len(epochs) == sum(-(-size // most) for size in sizes)
    wanted = sorted((image, place) for image, size in enumerate(sizes) for place in range(size))
    orders = []
    for epoch in range(3):
        samples = [epochs.at(epoch * len(epochs) + place) for place in range(len(epochs))]
        assert sorted((image, place) for image, chosen in samples for place in chosen) == wanted
        orders.append(samples)
        for image, size in enumerate(sizes):
            parts = sorted(len(chosen) for owner, chosen in samples if owner == image)
            assert len(parts) == -(-size // most) and parts[-1] <= most and parts[-1] - parts[0] <= 1
    assert orders[0] != orders[1] and orders[1] != orders[2]
    again = Epochs(sizes, most, 3, epochs.wide[epochs.first].tolist() if epochs.wide is not None else None)
    backwards = [again.at(position) for position in reversed(range(3 * len(epochs)))]
    assert backwards[::-1] == [sample for order in orders for sample in order]


def test_companions_are_drawn_anew() -> None:
    epochs = Epochs([19], 8)
    parts = [[frozenset(epochs.at(3 * epoch + n)[1]) for n in range(3)] for epoch in range(20)]
    assert all(sorted(map(len, part)) == [6, 6, 7] for part in parts)
    assert len({frozenset(part) for part in parts}) == 20


def test_rows_of_one_orientation_by_hand() -> None:
    """Six upright ones (odd places from 1 to 11) are complete at place 11, six wide ones at place 12 (0, 2, 4, 6, 8, 12); rests last."""
    wide = np.array([n % 2 == 0 and n != 10 for n in range(13)])
    wide = np.append(wide, [True, False])
    assert SAME_ORIENTATION == 6
    assert rows_of_one_orientation(wide).tolist() == [1, 3, 5, 7, 9, 10, 0, 2, 4, 6, 8, 12, 11, 14, 13]
    assert rows_of_one_orientation(np.array([True, False, True])).tolist() == [1, 0, 2]


def test_released_order_shares_no_image_and_groups_orientations(tmp_path: Path) -> None:
    sizes = (20, 15, 9, 13)
    data = DataConfig(train=str(odd_folder(tmp_path, sizes)), expressions_per_image=1, sampling="released")
    samples = training_samples(data, seed=3, positions=0)
    for epoch in range(2):
        drawn = [samples[epoch * len(samples) + place] for place in range(len(samples))]
        assert sorted(name for sample in drawn for name in ids(sample)) == names(sizes) and len(samples) == 57
        upright = [sample.record.height > sample.record.width for sample in drawn]
        rows = [set(upright[start : start + SAME_ORIENTATION]) for start in range(0, 48, SAME_ORIENTATION)]
        assert all(len(row) == 1 for row in rows) and len(set.union(*rows)) == 2
    exact = training_samples(DataConfig(train=data.train, expressions_per_image=1), seed=3, positions=0)
    assert [ids(exact[p]) for p in range(57)] != [ids(samples[p]) for p in range(57)]


def test_samplings_that_do_not_exist_or_fit(tmp_path: Path) -> None:
    folder = str(odd_folder(tmp_path))
    with pytest.raises(GrexError, match=r'data\.sampling is "exactly"; expected one of exact, released'):
        training_samples(load_config(None, [f"--data.train={folder}", "--data.sampling=exactly"]).data, 0, 0)
    data = DataConfig(train=folder, sampling="released")
    with pytest.raises(GrexError, match=r"expressions_per_image is 8 with data\.sampling released; expected 1"):
        training_samples(data, 0, 0)
    samples = training_samples(data, 0, 0, PRETRAINING)  # it has a number of its own
    seen = [name for position in range(len(samples)) for name in ids(samples[position])]
    assert sorted(seen) == sorted(f"{i}.{n}" for i, size in enumerate(SIZES[:-1]) for n in range(size) if n % 3 != 2)


@pytest.mark.parametrize("sampling", ["exact", "released"])
def test_one_two_and_three_processes_read_every_id_once_an_epoch(tmp_path: Path, sampling: str) -> None:
    """Through the batches of the run, over three epochs that end within batches; from a batch on, with workers, comes the rest."""
    most = 1 if sampling == "released" else 4
    config = tiny_run(odd_folder(tmp_path / "d"), tmp_path / "run", data__sampling=sampling, data__expressions_per_image=most)
    samples = training_samples(config.data, config.train.seed, 0)
    whole = run.batch_stream(config, samples, *run.make_tokenizers(config), generates=False)
    length = len(samples)
    assert length % 6 and length == sum(-(-size // most) for size in SIZES)
    number = -(-3 * length // 6)
    alone = [whole.at(index) for index in range(number)]
    for processes in (1, 2, 3):
        shares = [whole.share(rank, processes) for rank in range(processes)]
        drawn: list[list[str]] = []  # expressions of each sample, in the order of the positions
        for index in range(number):
            batches = [by_sample(share.at(index)) for share in shares]
            drawn += [sample for turn in zip(*batches, strict=True) for sample in turn]
        assert drawn == [sample for batch in alone for sample in by_sample(batch)]
        for epoch in range(3):
            assert sorted(name for sample in drawn[epoch * length : (epoch + 1) * length] for name in sample) == names()
    rest = list(stream(whole.share(1, 2), 3, number, 2, seed=5, rank=1))
    assert [batch.expression_ids for batch in rest] == [whole.share(1, 2).at(index).expression_ids for index in range(3, number)]


def by_sample(batch: Batch) -> list[list[str]]:
    owners = batch.image_index.tolist()
    return [[name for name, owner in zip(batch.expression_ids, owners, strict=True) if owner == n] for n in range(len(batch.image_ids))]


class Stopped(Exception):
    pass


def test_a_resumed_training_sees_the_rest_of_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four steps of two batches of two samples are an epoch of sixteen; the run is stopped after step three, with a checkpoint of two."""
    seen: list[list[str]] = []

    def watched(samples: list[Sample], *given: Any, **options: Any) -> Batch:
        seen.append([name for sample in samples for name in ids(sample)])
        return collate(samples, *given, **options)

    monkeypatch.setattr(run, "collate", watched)
    folder = odd_folder(tmp_path / "d", (9, 1, 12, 3, 5, 6))

    def training(**changes: object) -> Config:
        sizes = {"train__batch_images": 2, "train__accumulation": 2, "train__steps": 5, "train__save_every": 2}
        return tiny_run(folder, tmp_path / "run", data__expressions_per_image=3, **sizes, **changes)

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run.train_from_config(training(), stop)
    shown = capsys.readouterr().out
    assert f"one epoch of {folder} (train) = 36 expressions of 6 images in 13 samples = 3.2 steps; this run: 1.54 epochs" in shown
    before = seen[:4]
    seen.clear()
    run.train_from_config(training(train__resume=True))
    drawn = before + seen
    config = training()
    samples = training_samples(config.data, config.train.seed, 0)
    assert drawn == [[name for p in (2 * n, 2 * n + 1) for name in ids(samples[p])] for n in range(10)]
    flat = [ids(samples[p]) for p in range(13)]
    assert sorted(name for sample in flat for name in sample) == names((9, 1, 12, 3, 5, 6))


class Watched:
    """A source that keeps the ids that are read from it."""

    def __init__(self, source: Any) -> None:
        self.source, self.read = source, list[list[str]]()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Sample:
        sample: Sample = self.source[position]
        self.read.append(ids(sample))
        return sample


def test_a_mixture_passes_through_the_epochs_of_each_source(tmp_path: Path) -> None:
    """Two folders with the same ids, the first also with its val split, which has the same images."""
    first, second = str(odd_folder(tmp_path / "a")), str(odd_folder(tmp_path / "b", (5, 3)))
    parts = [WeightedSource(first, 2.0), WeightedSource(second), WeightedSource(first, 0.5, "val"), WeightedSource("synthetic")]
    samples = training_samples(DataConfig(train=parts, expressions_per_image=3), seed=1, positions=0)
    assert isinstance(samples, Mixture)
    lines = describe_epochs(samples, 4, 100)
    shown = ("41 expressions of 7 images in 17", "8 expressions of 2 images in 3", "7 expressions of 7 images in 7")
    assert len(lines) == 3 and all(words in line for words, line in zip(shown, lines, strict=True))
    watched = [Watched(source) for source in samples.sources]
    samples.sources = list(watched)
    for position in range(300):
        samples[position]
    wanted = (names(), names((5, 3)), sorted(f"{n}.val" for n in range(len(SIZES))))
    for source, expected, line in zip(watched[:3], wanted, lines, strict=True):
        epochs = [source.read[start : start + len(source)] for start in range(0, len(source.read) - len(source) + 1, len(source))]
        assert len(epochs) >= 3
        assert all(sorted(name for sample in epoch for name in sample) == expected for epoch in epochs)
        assert len(source.read) / len(source) == pytest.approx(300 / 4 / 100 * float(line.split("run: ")[1].split()[0]), rel=0.2)


def test_the_generator_learns_from_every_targeted_expression_once_an_epoch(tmp_path: Path) -> None:
    """With room for all of a sample; with less, another part of it each time. Samples without any target have no part in it."""
    samples = training_samples(DataConfig(train=str(odd_folder(tmp_path)), expressions_per_image=4), seed=0, positions=0)
    targeted = sorted(f"{number}.{n}" for number, size in enumerate(SIZES[:-1]) for n in range(size) if n % 3 != 2)
    drawn = [samples[position] for position in range(8 * len(samples))]
    assert [learned(drawn[start : start + len(samples)], 4) for start in range(0, len(drawn), len(samples))] == [targeted] * 8
    assert len(learned(drawn[: len(samples)], 1)) < len(targeted)
    counts = Counter(learned(drawn, 1))
    assert sorted(counts) == targeted and max(counts.values()) <= 8


def learned(samples: list[Sample], most: int) -> list[str]:
    """Return the ids that the generator's collate gets of the batch of all samples."""

    def keep_items(images: Any, items: Any) -> tuple[Any, list[str]]:
        return items, []

    def encode(texts: list[str]) -> Any:
        return torch.ones(len(texts), 1, dtype=torch.int64), torch.ones(len(texts), 1, dtype=torch.int64)

    items = collate(samples, encode, keep_items, image_size=16, num_generation_targets=most).generation
    return sorted(item.expression_id for item in items)
