"""The experiments on causes: what is given is given, and what is not is the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from score_case import make_dataset, object_box, object_mask
from tiny import WORDS, tiny_config, tiny_model

from grex_mllm.data.dataset import FolderDataset
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.instance_selection.regions import pair_geometry
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.types import Grounding


@pytest.fixture
def causes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import photo_causes as module

    return module


def three_squares(causes: ModuleType, found: dict[int, int]) -> Any:
    """Regions 0 and 1 lie a pixel beside the objects 0 and 1, region 2 and all others (the tiny model has 8) nowhere near one."""
    true = np.stack([object_mask(n) for n in range(3)])
    boxes = np.asarray([object_box(n) for n in range(3)], np.float32)
    masks = np.stack([np.roll(true[0], 1, 1), np.roll(true[1], 1, 1), *[np.roll(true[2], -8, 0)] * 6])
    return causes.Seen(masks, boxes[[0, 1, *[2] * 6]] + 1, true, boxes, found)


def test_what_is_given_replaces_what_the_model_found(causes: ModuleType) -> None:
    seen = three_squares(causes, {0: 0, 1: 1})
    own = causes.assembled("x", seen, [0, 2], [0, 2], 2, none=False, true=False)
    assert (own.mask == (seen.masks[0] | seen.masks[2])).all() and (own.boxes_xyxy == seen.boxes[[0, 2]]).all()
    true = causes.assembled("x", seen, [0, 2], [0, 2], 2, none=False, true=True)
    assert (true.mask == (seen.true_masks[0] | seen.masks[2])).all(), "a region that has found nothing stays"
    assert true.boxes_xyxy.tolist() == [object_box(0), seen.boxes[2].tolist()]
    none = causes.assembled("x", seen, [0], [0], 1, none=True, true=True)
    assert not none.mask.any() and len(none.boxes_xyxy) == none.count == 0 and none.no_target and none.head_no_target
    lost = causes.assembled("x", seen, [], [], 0, none=False, true=False)
    assert lost.no_target and not lost.head_no_target, "targets that no region has found are lost by the masks, not by the head"


def test_a_region_and_an_object_are_paired_once(causes: ModuleType, tmp_path: Path) -> None:
    net = tiny_model()
    sample = FolderDataset(make_dataset(tmp_path / "data"), "val", 9)[0]
    encoded = net.encode(sample.image)
    item = causes.Item(sample.record, Path("0.png"), lambda: sample.image, sample.expressions)
    regions = encoded.features.decoded
    with torch.inference_mode():
        seen = causes.look(encoded, item)
        on_true = causes.regions_on(net, encoded, seen.true_boxes)
        again = net.grounding.decoder.image_part(encoded.features.maps, encoded.features.pixels)
    assert len(set(seen.pairs.values())) == len(seen.pairs)
    for k, n in seen.pairs.items():
        both = (seen.masks[k] & seen.true_masks[n]).sum() / (seen.masks[k] | seen.true_masks[n]).sum()
        assert both >= causes.OVERLAP
    boxes = causes.boxes_to_original(on_true.boxes_norm[-1][0].clone(), encoded.geometry, encoded.canvas)
    np.testing.assert_allclose(boxes.numpy(), [object_box(n) for n in range(3)], atol=1e-3)
    assert on_true.features.shape[1] == 3 and on_true.kept[0].unique().numel() == 3
    assert torch.equal(on_true.geometry, pair_geometry(on_true.boxes_norm[-1]))
    assert torch.equal(again.kept, regions.kept) and torch.equal(again.features, regions.features), "nothing stays changed"


def test_every_row_of_the_table(causes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    data = make_dataset(tmp_path / "data")
    found = three_squares(causes, {0: 0, 1: 1, 2: 2})
    monkeypatch.setattr(causes, "look", lambda encoded, item: found)
    text = causes.run(str(tmp_path / "model"), data, "val", tmp_path / "out")
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")}
    assert set(causes.ROWS) < set(rows) and rows["true selection and masks"] == ["100.0"] * 5
    assert rows["true selection"][1:4] == ["100.0"] * 3 and rows["true selection"][0] != "100.0"
    assert "15 of 15 objects (100.0 %)" in text
    lines = [json.loads(line) for line in (tmp_path / "out" / "as_it_is.jsonl").read_text().splitlines()]
    assert len(lines) == 20 and {"mask_rle", "boxes_xyxy", "count", "no_target_prob"} <= set(lines[0])


@pytest.mark.parametrize("answer", ["threshold", "count", "overlap"])
def test_the_models_own_choices_put_together_are_its_own_answers(causes: ModuleType, tmp_path: Path, answer: str) -> None:
    net, source, alike = tiny_model(model__decoder__answer=answer), FolderDataset(make_dataset(tmp_path / "data"), "val", 9), []
    for position in range(len(source)):
        sample = source[position]
        encoded = net.encode(sample.image)
        item = causes.Item(sample.record, Path("0.png"), lambda sample=sample: sample.image, sample.expressions)
        with torch.inference_mode():
            seen, output = causes.look(encoded, item), causes.read(net, encoded.features.decoded, sample)
        for e, record in enumerate(sample.expressions):
            own: Grounding = net.ground(encoded, record.raw)
            made = causes.selected(net, output, e, seen, record.raw, true=False)
            assert (made.no_target, made.count) == (own.no_target, own.count)
            np.testing.assert_allclose(made.boxes_xyxy, own.boxes_xyxy, atol=1e-3)
            alike.append((made.mask == own.mask).mean())
    assert answer == "overlap" or min(alike) > 0.97  # up to the order of resizing and uniting


def test_other_decoders_are_refused(causes: ModuleType, tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(WORDS, 300)
    GrexModel(tiny_config(model__decoder__name="rela"), tokenizer).save_pretrained(tmp_path / "model")
    with pytest.raises(GrexError, match="with the decoder rela"):
        causes.run(str(tmp_path / "model"), tmp_path, "val", tmp_path / "out")
