"""GrexModel: answers at the original size, any kind of image, save and load, faults in what the user gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from grex_mllm import GrexModel
from grex_mllm.config import PredictConfig
from grex_mllm.data.transforms import fit
from grex_mllm.errors import GrexError
from grex_mllm.models import describe
from grex_mllm.models.answer import above_threshold, answers
from grex_mllm.types import Geometry, GroundingOutput


def photo(height=90, width=140, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def output(mask, no_target=-3.0, boxes=None, scores=None, count=1) -> GroundingOutput:
    count_logits = torch.full((1, 7), -5.0)
    count_logits[0, count] = 5.0
    logit = torch.as_tensor(mask).float() * 8 - 4
    return GroundingOutput(
        mask_logits=torch.stack([torch.zeros_like(logit), logit])[None],
        minimap_logits=torch.zeros(1, 2, 2),
        no_target_logits=torch.tensor([[0.0, no_target]]),
        boxes_norm=None if boxes is None else torch.tensor([boxes]),
        box_logits=None if scores is None else torch.tensor([scores]).logit(),
        count_logits=count_logits,
    )


@pytest.mark.parametrize("resize", ["squash", "pad", "letterbox"])
@pytest.mark.parametrize("size", [(60, 120), (120, 60), (64, 64), (31, 333)])
def test_mask_and_box_lie_on_the_right_pixels_at_original_size(resize, size):
    """A mask that is drawn on the network input comes back onto the pixels that it was drawn from."""
    height, width = size
    truth = np.zeros(size, bool)
    truth[height // 4 : height // 2, width // 2 : width * 3 // 4] = True
    side = 64
    geometry = fit(height, width, side, resize)
    at_input = np.zeros((side, side), bool)
    rows = ((np.arange(geometry.input_height) + 0.5) / geometry.input_height * height).astype(int)
    columns = ((np.arange(geometry.input_width) + 0.5) / geometry.input_width * width).astype(int)
    at_input[geometry.inner] = truth[rows][:, columns]
    box = np.array([width / 2, height / 4, width * 3 / 4, height / 2])
    margin = np.array([geometry.left, geometry.top] * 2)
    x1, y1, x2, y2 = (box * ([geometry.input_width / width, geometry.input_height / height] * 2) + margin) / side
    norm = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    result = answers(output(at_input, boxes=[norm], scores=[0.9]), ["x"], [geometry], (side, side), PredictConfig())[0]
    assert result.mask.shape == size
    overlap = (result.mask & truth).sum() / (result.mask | truth).sum()
    assert overlap > (0.85 if min(geometry.input_height, geometry.input_width) > 20 else 0.4)
    np.testing.assert_allclose(result.boxes_xyxy[0], box, atol=max(height, width) / 64)
    assert result.mask_input.shape == (geometry.input_height, geometry.input_width)


def test_box_rules():
    boxes = [[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]
    full = np.ones((8, 8), bool)
    geometry = Geometry(80, 80, 8, 8)

    def number(rule, count, scores):
        config = PredictConfig(boxes=rule, box_threshold=0.7)
        return len(answers(output(full, boxes=boxes, scores=scores, count=count), ["x"], [geometry], (8, 8), config)[0].boxes_xyxy)

    scores = [0.9, 0.8, 0.3]
    assert [number("count", n, scores) for n in (1, 2, 3)] == [1, 2, 3]
    assert number("threshold", 3, scores) == 2
    assert number("both", 1, scores) == 1 and number("both", 3, scores) == 2
    assert number("count", 6, scores) == 3  # more than five: all that there are


def test_no_target_empties_the_answer_and_keeps_what_the_official_protocol_reads():
    full = np.ones((8, 8), bool)
    result = answers(
        output(full, no_target=3.0, boxes=[[0.5, 0.5, 1, 1]], scores=[0.9]), ["x"], [Geometry(8, 8, 8, 8)], (8, 8), PredictConfig()
    )[0]
    assert result.no_target and result.head_no_target and not result.mask.any() and len(result.boxes_xyxy) == 0 and result.count == 0
    assert result.mask_input.all() and result.no_target_prob > 0.9
    empty = answers(output(~full, boxes=[[0.5, 0.5, 1, 1]], scores=[0.9]), ["x"], [Geometry(8, 8, 8, 8)], (8, 8), PredictConfig())[0]
    assert empty.no_target and not empty.head_no_target


def test_a_model_of_boxes_alone_is_not_emptied_by_its_untrained_mask():
    nothing, geometry = np.zeros((8, 8), bool), [Geometry(40, 60, 8, 8)]
    boxes, scores = [[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.1, 0.1]], [0.9, 0.8]
    found = output(nothing, boxes=boxes, scores=scores, count=2)
    assert answers(found, ["x"], geometry, (8, 8), PredictConfig())[0].no_target
    result = answers(found, ["x"], geometry, (8, 8), PredictConfig(masks=False))[0]
    assert not result.no_target and len(result.boxes_xyxy) == 2 and result.count == 2
    full = answers(output(~nothing, boxes=boxes, scores=scores), ["x"], geometry, (8, 8), PredictConfig(masks=False))[0]
    assert full.mask.shape == (40, 60) and not full.mask.any() and not full.mask_input.any() and not full.no_target
    none = answers(output(nothing, no_target=3.0, boxes=boxes, scores=scores), ["x"], geometry, (8, 8), PredictConfig(masks=False))[0]
    assert none.no_target and len(none.boxes_xyxy) == 0 and none.count == 0
    with pytest.raises(GrexError, match=r"predict\.masks"):
        answers(found, ["x"], geometry, (8, 8), PredictConfig(masks=False, no_target="pixels"))


def test_no_target_by_pixels():
    mask = np.zeros((20, 20), bool)
    mask[:7, :7] = True
    config = PredictConfig(no_target="pixels", min_mask_pixels=50)
    assert answers(output(mask, no_target=3.0), ["x"], [Geometry(20, 20, 20, 20)], (20, 20), config)[0].no_target
    mask[:8, :8] = True
    assert not answers(output(mask, no_target=3.0), ["x"], [Geometry(20, 20, 20, 20)], (20, 20), config)[0].no_target
    with pytest.raises(GrexError, match=r"predict\.no_target"):
        answers(output(mask), ["x"], [Geometry(20, 20, 20, 20)], (20, 20), PredictConfig(no_target="guess"))


def test_the_default_threshold_decides_as_the_larger_logit() -> None:
    """Also where both are so near that their probabilities round to the same number, and in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 2, generator=draw) * 8
    ties = torch.tensor([[3.0, 3.0], [1.0, 1.0 + 2**-23], [1.0 + 2**-23, 1.0], [-40.0, 40.0], [40.0, -40.0], [1e-38, 2e-38]])
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.cat([logits, ties]).to(dtype)
        assert torch.equal(above_threshold(given, PredictConfig().no_target_threshold), given[:, 1] > given[:, 0])
    assert not above_threshold(ties, 0.5)[0] and above_threshold(ties, 0.5)[1]


def test_thresholds_of_no_target() -> None:
    prob = torch.tensor([0.0, 0.001, 0.2, 0.5, 0.7, 0.999, 1.0])
    logits = torch.stack([(1 - prob).log(), prob.log()], 1)
    assert above_threshold(logits, 0.0).all() and not above_threshold(logits, 1.0).any()
    said = [int(above_threshold(logits, t).sum()) for t in (0.0, 0.0005, 0.1, 0.3, 0.6, 0.9, 0.9995, 1.0)]
    assert said == [7, 6, 5, 4, 3, 2, 1, 0]
    full, geometry = np.ones((8, 8), bool), [Geometry(8, 8, 8, 8)]
    for threshold, none in ((0.04, True), (0.05, False)):  # the head says 0.047
        result = answers(output(full), ["x"], geometry, (8, 8), PredictConfig(no_target_threshold=threshold))[0]
        assert (result.no_target, result.head_no_target, bool(result.mask.any())) == (none, none, not none)
    for wrong in (1.01, -0.1, float("nan")):
        with pytest.raises(GrexError, match=r"no_target_threshold.*from 0 to 1"):
            answers(output(full), ["x"], geometry, (8, 8), PredictConfig(no_target_threshold=wrong))
    with pytest.raises(GrexError, match="no_target: pixels"):
        answers(output(full), ["x"], geometry, (8, 8), PredictConfig(no_target="pixels", no_target_threshold=0.4))


def test_one_image_many_expressions():
    model = tiny_model()
    image = photo()
    results = model.ground(image, ["the red circle", "two stars", "全部の円", "🟥"])
    assert [r.mask.shape for r in results] == [(90, 140)] * 4
    assert all(r.boxes_xyxy.shape[1] == 4 for r in results)
    one = model.ground(image, "two stars")
    np.testing.assert_array_equal(one.mask, results[1].mask)
    np.testing.assert_allclose(one.box_scores, results[1].box_scores, atol=1e-5)
    chunked = model.ground(image, ["the red circle", "two stars", "x"], chunk=1)
    np.testing.assert_array_equal(chunked[1].mask, results[1].mask)
    for r in results:
        assert (r.boxes_xyxy >= 0).all() and (r.boxes_xyxy <= [140, 90, 140, 90]).all()


def test_every_kind_of_image_is_taken_and_gives_the_same_answer(tmp_path):
    model = tiny_model()
    pixels = photo(50, 70)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = model.ground(pixels, "the red circle")
    for image in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)):
        np.testing.assert_array_equal(model.ground(image, "the red circle").mask, expected.mask)
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=Image.Exif(), quality=100, subsampling=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(pixels).rotate(90, expand=True).save(tmp_path / "exif.jpg", exif=exif, quality=100, subsampling=0)
    assert model.ground(tmp_path / "turned.jpg", "x").mask.shape == (70, 50)
    turned = model.ground(tmp_path / "exif.jpg", "the red circle")
    assert turned.mask.shape == (50, 70)
    for mode in ("L", "CMYK", "P"):
        name = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.fromarray(pixels).convert(mode).save(name)
        assert model.ground(name, "x").mask.shape == (50, 70)


def test_save_and_load_give_the_same_answers(tmp_path):
    model = tiny_model(seed=3)
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.yaml", "model.safetensors", "text_tokenizer"]
    again = GrexModel.from_pretrained(tmp_path / "m")
    image = photo()
    for text in ("the red circle", "two blue squares"):
        np.testing.assert_array_equal(again.ground(image, text).mask, model.ground(image, text).mask)
    model.save_pretrained(tmp_path / "m")  # over an existing one


@pytest.mark.parametrize("missing", ["config.yaml", "model.safetensors", "text_tokenizer"])
def test_model_folder_with_a_part_missing(tmp_path, missing):
    import shutil

    tiny_model().save_pretrained(tmp_path / "m")
    target = tmp_path / "m" / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(GrexError, match=missing):
        GrexModel.from_pretrained(tmp_path / "m")


def test_damaged_and_foreign_weights(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:2000])
    with pytest.raises(GrexError, match="cannot be read"):
        GrexModel.from_pretrained(tmp_path / "m")
    weights.write_bytes(whole)
    text = (tmp_path / "m" / "config.yaml").read_text().replace("language_layers: 3", "language_layers: 2")
    (tmp_path / "m" / "config.yaml").write_text(text)
    with pytest.raises(GrexError, match="unknown"):
        GrexModel.from_pretrained(tmp_path / "m")
    with pytest.raises(GrexError, match="does not exist"):
        GrexModel.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(("text", "words"), [("", "empty"), ("   ", "empty"), ("x" * 5000, "5,000"), (7, "int")])
def test_expressions_that_cannot_be_answered(text, words):
    with pytest.raises(GrexError, match=words):
        tiny_model().ground(photo(), [text])


def test_image_size_must_fit_the_encoder_where_boxes_are_answered():
    with pytest.raises(GrexError, match=r"data\.image_size"):
        tiny_model(data__image_size=70)


def test_describe_without_generator():
    with pytest.raises(GrexError, match="generator"):
        tiny_model().describe(photo(), boxes_xyxy=[[1, 1, 5, 5]])


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, grex_mllm; from grex_mllm import load_config; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_of_an_earlier_version_says_what_it_is(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("\nloss:\n", "\nloss:\n  mask: 2.0\n", 1), encoding="utf-8")
    with pytest.raises(GrexError, match=r'unknown key "loss\.mask".*of another version does not load: train or convert it again'):
        GrexModel.from_pretrained(tmp_path / "m")


def test_a_box_stands_for_the_object_found_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full box would look like a square to the generator; where nothing found fits the box, the box itself is selected."""
    disc = np.hypot(*np.mgrid[-10:30, -20:40]) < 8  # rows 3 to 17, columns 13 to 27
    far = np.zeros_like(disc)
    far[30:, 50:] = True
    monkeypatch.setattr(describe, "found_objects", lambda model, encoded, least: [far, disc])
    boxes = np.zeros((3, 40, 60), bool)
    boxes[0, 3:18, 13:28] = boxes[1, 3:18, 40:55] = boxes[2, 3:8, 13:18] = True
    found = describe.masks_in_boxes(None, None, boxes)
    assert np.array_equal(found[0], disc & boxes[0]) and found[0].sum() < 0.95 * boxes[0].sum()
    assert np.array_equal(found[1], boxes[1]) and np.array_equal(found[2], boxes[2])  # nothing there; a part of something larger
    monkeypatch.setattr(describe, "found_objects", lambda model, encoded, least: [])
    assert np.array_equal(describe.masks_in_boxes(None, None, boxes), boxes)
