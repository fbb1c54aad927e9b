"""To the network's input and back: bit for bit where the released code was recorded, pixel for pixel on non-square images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_folder import gradient
from torch.nn.functional import interpolate

from grex_mllm.data.images import load_image
from grex_mllm.data.transforms import boxes_to_original, fit, instance_mask, mask_to_original, prepare, resize_image, values_to_original
from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import encode_rle, mask_to_box_xyxy
from grex_mllm.types import Geometry, ImageRecord, Instance, Sample


def test_squash_is_pil_bilinear_on_bytes() -> None:
    image, geometry = resize_image(gradient(), 24, "squash")
    expected = np.asarray(Image.fromarray(gradient()).resize((24, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(image, expected) and (geometry.scale_x, geometry.scale_y) == (24 / 40, 24 / 30)


def test_pad_keeps_the_aspect_and_fills_with_zeros() -> None:
    image, geometry = resize_image(gradient(), 20, "pad")
    assert (geometry.input_height, geometry.input_width) == (15, 20) and image.shape == (20, 20, 3)
    assert not image[15:].any() and image[:15].any()
    assert fit(1, 400, 20, "pad") == Geometry(1, 400, 1, 20)
    with pytest.raises(GrexError, match="squash, pad or letterbox"):
        fit(4, 4, 20, "crop")


def test_letterbox_centres_the_image_on_grey_that_the_network_sees() -> None:
    image, geometry = resize_image(gradient(), 20, "letterbox")
    assert geometry == Geometry(30, 40, 15, 20, 2, 0, 3, 0) and geometry.seen_size == (20, 20)
    assert (image[:2] == 128).all() and (image[17:] == 128).all()
    assert np.array_equal(image[2:17], resize_image(gradient(), 20, "pad")[0][:15])
    assert fit(400, 1, 20, "letterbox") == Geometry(400, 1, 20, 1, 0, 9, 0, 10)
    assert fit(40, 40, 20, "letterbox", 0.5) == Geometry(40, 40, 10, 10, 5, 5, 5, 5)


def test_masks_and_boxes_move_with_the_image() -> None:
    polygon = [[10.0, 6.0, 30.0, 6.0, 30.0, 24.0, 10.0, 24.0]]
    drawn = np.zeros((30, 40), bool)
    drawn[6:24, 10:30] = True
    instances = [Instance("p", "a", [10, 6, 30, 24], polygon), Instance("r", "a", [10, 6, 30, 24], encode_rle(drawn))]
    instances += [Instance("c", "a", [0, 0, 40, 30], encode_rle(drawn), iscrowd=True), Instance("m", "a", [10, 6, 30, 24], mask=drawn)]
    sample = Sample(gradient(), ImageRecord("i", "", 30, 40, instances), [])
    for resize, height in (("squash", 80), ("pad", 60), ("letterbox", 60)):
        ready = prepare(sample, 80, resize)
        assert [instance.annotation_id for instance in ready.instances] == ["p", "r", "m"] and ready.has_mask.all()
        top = ready.geometry.top
        assert top == (10 if resize == "letterbox" else 0)
        expected = [20, top + 6 * height / 30, 60, top + 24 * height / 30]
        for mask in ready.instance_masks:
            assert mask_to_box_xyxy(mask) == expected
        cx, cy, w, h = ready.instance_boxes_norm[0] * 80
        assert [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2] == pytest.approx(expected, abs=1e-4)


def test_upsampling_without_padding_equals_interpolate() -> None:
    values = torch.randn(3, 6, 6, dtype=torch.float64)
    geometry = Geometry(37, 53, 24, 24)
    expected = interpolate(values[None], size=(37, 53), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(values_to_original(values, geometry, (24, 24)), expected, atol=1e-12)


def test_upsampling_with_padding_equals_cropping_first() -> None:
    values = torch.randn(8, 12, dtype=torch.float64)
    geometry = Geometry(33, 97, 16, 48)  # of an input of 32 x 48 the image fills 16 x 48: the upper 4 of 8 rows
    expected = interpolate(values[None, None, :4], size=(33, 97), mode="bilinear", align_corners=False)[0, 0]
    assert torch.allclose(values_to_original(values, geometry, (32, 48)), expected, atol=1e-12)
    values[4:] = float("nan")  # padding is never read
    assert torch.isfinite(values_to_original(values, geometry, (32, 48))).all()


def test_upsampling_with_margins_equals_cropping_first() -> None:
    values = torch.randn(8, 12, dtype=torch.float64)
    geometry = Geometry(33, 97, 16, 48, top=8, bottom=8)  # of 32 x 48 the image fills the middle 16 rows: 4 of 8 cells
    expected = interpolate(values[None, None, 2:6], size=(33, 97), mode="bilinear", align_corners=False)[0, 0]
    assert torch.allclose(values_to_original(values, geometry, (32, 48)), expected, atol=1e-12)
    values[:2] = values[6:] = float("nan")
    assert torch.isfinite(values_to_original(values, geometry, (32, 48))).all()


@pytest.mark.parametrize(("height", "width"), [(30, 40), (40, 30), (17, 64), (123, 45), (8, 8)])
@pytest.mark.parametrize("resize", ["squash", "pad", "letterbox"])
def test_the_way_back_hits_the_same_pixels(height: int, width: int, resize: str) -> None:
    """Draw a mask at original size, carry it to a fine input, and back: it must come out where it was."""
    y, x = np.mgrid[:height, :width]
    original = ((x - width * 0.6) / (width * 0.25)) ** 2 + ((y - height * 0.35) / (height * 0.25)) ** 2 < 1
    box = mask_to_box_xyxy(original)
    instance = Instance("e", "a", box, mask=original)
    sample = Sample(gradient(height, width), ImageRecord("i", "", height, width, [instance]), [])
    ready = prepare(sample, 512, resize)
    soft = torch.from_numpy(ready.instance_masks[0]).float()
    back = mask_to_original(soft - 0.5, ready.geometry, (512, 512)).numpy()
    assert back.shape == original.shape
    assert (back != original).mean() < 0.004
    boxes = boxes_to_original(torch.from_numpy(ready.instance_boxes_norm), ready.geometry, (512, 512))
    assert boxes[0].tolist() == pytest.approx(box, abs=1e-3)
    assert np.allclose(boxes_to_original(ready.instance_boxes_norm, ready.geometry, (512, 512)), boxes.numpy())  # type: ignore[arg-type]


def test_boxes_are_clipped_and_the_input_is_left_alone() -> None:
    boxes = torch.tensor([[0.5, 0.5, 2.0, 2.0]])
    assert boxes_to_original(boxes, Geometry(30, 40, 20, 20)).tolist() == [[0, 0, 40, 30]]
    assert boxes.tolist() == [[0.5, 0.5, 2.0, 2.0]]


def test_two_channel_logits_give_their_argmax() -> None:
    logits = torch.randn(2, 9, 9, dtype=torch.float64)
    up = interpolate(logits[None], size=(31, 20), mode="bilinear", align_corners=False)[0]
    assert torch.equal(mask_to_original(logits[1] - logits[0], Geometry(31, 20, 9, 9)), up.argmax(dim=0).bool())


def test_one_cell_and_one_pixel() -> None:
    assert mask_to_original(torch.ones(1, 1), Geometry(3, 5, 8, 8), (32, 32)).all()
    assert mask_to_original(torch.ones(4, 4), Geometry(1, 1, 8, 8)).shape == (1, 1)


def test_a_box_without_mask_is_its_own_mask() -> None:
    mask = instance_mask(Instance("b", "a", [10, 5, 20, 15]), Geometry(30, 40, 60, 80))
    assert mask_to_box_xyxy(mask) == [20, 10, 40, 30]


def test_against_the_released_preprocessing(shared: Path) -> None:
    folder = shared / "oracle" / "preprocess"
    expected = json.loads((folder / "expected.json").read_text())
    recorded = np.load(folder / "expected.npz")
    refs = json.loads((folder / "grefcoco" / "grefs(unc).json").read_text())
    annotations = {a["id"]: a for a in json.loads((folder / "grefcoco" / "instances.json").read_text())["annotations"]}
    images = {path.name: load_image(path) for path in (folder / "images" / "train2014").iterdir()}
    number = 0
    for split in ("train", "val"):
        targets = [ref["ann_id"] for ref in refs if ref["split"] == split for _ in ref["sentences"]]
        assert len(targets) == len(expected[split]) == 36
        for index, (names, entry) in enumerate(zip(targets, expected[split], strict=True)):
            image = images[entry["file_name"]]
            height, width = image.shape[:2]
            wanted = [annotations[name] for name in names if name != -1]
            instances = [Instance(str(a["id"]), "x", a["bbox"], a["segmentation"]) for a in wanted]
            ready = prepare(Sample(image, ImageRecord("i", "", height, width, instances), []), 480, "squash")
            truth = np.unpackbits(recorded[f"{split}_{index:02d}_mask"])[: 480 * 480].reshape(480, 480).astype(bool)
            assert np.array_equal(ready.instance_masks.any(axis=0), truth)
            if index < 6:
                assert np.array_equal(ready.image.transpose(2, 0, 1), recorded[f"{split}_{index:02d}_image"])
            number += 1
    assert number == 72
