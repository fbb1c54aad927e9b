"""Objects that the grounding model finds by itself: order, threshold, doubles, and which object a box stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from grex_mllm.models.decoders.instance_selection.network import InstanceSelection
from grex_mllm.models.decoders.instance_selection.regions import Regions
from grex_mllm.models.describe import SURE, UNSURE, found_objects, masks_in_boxes, other_objects
from grex_mllm.models.grex import EncodedImage
from grex_mllm.models.grounding import GroundingModel
from grex_mllm.types import Geometry

HEIGHT, WIDTH = 24, 32


def knowing(decoder: Any) -> Any:
    """A model of which only the decoder counts."""
    grounding = SimpleNamespace(decoder=decoder)
    grounding.proposals = lambda features: GroundingModel.proposals(grounding, features)
    return SimpleNamespace(grounding=grounding)


MODEL = knowing(SimpleNamespace(proposals=lambda regions: InstanceSelection.proposals(MODEL, regions)))


def square(x: int, y: int, width: int, height: int | None = None) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + (height or width), x : x + width] = True
    return mask


def image(masks: list[np.ndarray], objectness: list[float], geometry: Geometry | None = None) -> EncodedImage:
    """An image in which the decoder found these masks; an earlier layer of it thought the opposite of every one."""
    planes = torch.from_numpy(np.stack(masks)).float() * 8 - 4
    num = len(masks)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(1, num, 4)
    scores = torch.tensor([objectness], dtype=torch.float64).logit(eps=1e-9).float()
    regions = Regions(
        heat_logits=torch.zeros(1, 1),
        cell_boxes_norm=boxes[:, :1],
        heat_size=(1, 1),
        kept=torch.zeros(1, num, dtype=torch.int64),
        objectness=[-scores, scores],
        boxes_norm=[boxes * 0.1, boxes],
        mask_embeddings=[-torch.eye(num)[None], torch.eye(num)[None]],
        mask_map=planes[None],
        features=torch.zeros(1, num, 4),
        geometry=torch.zeros(1, num, num, 10),
        attribute_logits={},
    )
    size = (int(planes.shape[1]), int(planes.shape[2]))
    features: Any = SimpleNamespace(decoded=regions)
    return EncodedImage(features, geometry or Geometry(*size, *size), size)


def which(found: Any, masks: list[np.ndarray]) -> list[int]:
    """Position of every found mask among `masks`."""
    return [next(i for i, mask in enumerate(masks) if np.array_equal(mask, one)) for one in found]


FIVE = [square(0, 0, 4), square(8, 0, 5), square(16, 0, 6), square(0, 10, 7), square(10, 10, 8)]


def test_found_objects_are_the_sure_ones_surest_first() -> None:
    seen = image(FIVE, [0.6, 0.95, 0.1, 0.3, 0.8])
    assert which(found_objects(MODEL, seen, 0.5), FIVE) == [1, 4, 0]
    assert which(found_objects(MODEL, seen, 0.2), FIVE) == [1, 4, 0, 3]
    assert which(found_objects(MODEL, seen, 0.7), FIVE) == [1, 4]
    assert found_objects(MODEL, seen, 0.96) == []
    assert found_objects(MODEL, image(FIVE[:1], [0.5]), 0.5)  # at least
    one = found_objects(MODEL, seen, 0.9)[0]
    assert one.dtype == bool and one.shape == (HEIGHT, WIDTH)


def test_regions_without_a_pixel_are_no_objects() -> None:
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    masks = [FIVE[0], nothing, FIVE[1]]
    assert which(found_objects(MODEL, image(masks, [0.8, 0.99, 0.9]), 0.5), masks) == [2, 0]
    assert found_objects(MODEL, image([nothing], [0.99]), 0.5) == []


def test_decoders_that_know_no_instances_find_none() -> None:
    features: Any = SimpleNamespace(decoded=object())
    seen = EncodedImage(features, Geometry(HEIGHT, WIDTH, HEIGHT, WIDTH), (HEIGHT, WIDTH))
    assert found_objects(knowing(object()), seen, 0.0) == []
    assert other_objects(knowing(object()), seen, FIVE[0][None]).shape == (0, HEIGHT, WIDTH)
    boxes = np.stack(FIVE[:2])
    assert np.array_equal(masks_in_boxes(knowing(object()), seen, boxes), boxes)


def test_found_masks_come_back_to_the_original_size_without_the_padding() -> None:
    """A 24x32 input of which 24x16 holds an image of 48x32: twice the size, the right half is padding."""
    masks = [square(4, 6, 8) | square(20, 0, 12), square(18, 2, 10)]
    found = found_objects(MODEL, image(masks, [0.9, 0.9], Geometry(48, 32, 24, 16)), 0.5)
    assert len(found) == 1 and found[0].shape == (48, 32)
    expected = np.zeros((48, 32), bool)
    expected[12:28, 8:24] = True
    assert (found[0] ^ expected).sum() == 0


def test_other_objects_leave_out_the_selected_ones_and_their_parts() -> None:
    selected = np.stack([square(0, 0, 6), square(20, 0, 2)])
    part, larger, touching = square(1, 1, 2), square(16, 0, 10), square(5, 0, 6)
    masks = [square(0, 0, 6), part, larger, touching, square(0, 12, 5)]
    others = other_objects(MODEL, image(masks, [0.99, 0.98, 0.97, 0.8, 0.9]), selected)
    assert others.dtype == bool and which(others, masks) == [4, 3]


def test_other_objects_are_named_once_and_the_surest_stays() -> None:
    masks = [square(0, 0, 10), square(0, 0, 9), square(20, 0, 8), square(21, 1, 8), square(6, 6, 8)]
    others = other_objects(MODEL, image(masks, [0.7, 0.9, 0.95, 0.6, 0.55]), np.zeros((0, HEIGHT, WIDTH), bool))
    assert which(others, masks) == [2, 1, 4]  # the last one shares a corner only


@pytest.mark.parametrize(("width", "taken"), [(9, 1), (10, 0), (11, 0)])
def test_half_of_the_smaller_area_makes_two_masks_one_object(width: int, taken: int) -> None:
    """A mask of 20 x 4 pixels, of which `width` columns lie on the selected object."""
    selected = square(0, 0, 12, 24)
    other = square(12 - width, 4, 20, 4)
    assert len(other_objects(MODEL, image([other], [0.9]), selected[None])) == taken


def test_others_must_be_surer_than_what_a_user_points_at() -> None:
    assert SURE > 0.4 > UNSURE
    seen = image([FIVE[3]], [0.4])
    assert len(other_objects(MODEL, seen, FIVE[0][None])) == 0
    ring = FIVE[3] & ~square(2, 12, 3)
    pointed = masks_in_boxes(MODEL, image([ring], [0.4]), FIVE[3][None])
    assert np.array_equal(pointed[0], ring)
    assert np.array_equal(masks_in_boxes(MODEL, image([ring], [0.1]), FIVE[3][None])[0], FIVE[3])


def holed(x: int, y: int, side: int) -> np.ndarray:
    """An object that fills its box but for a hole at a place that tells objects apart."""
    return square(x, y, side) & ~square(x + 1 + side % 3, y + 2, 1)


def test_every_box_stands_for_the_object_that_fits_it_best() -> None:
    """Boxes in another order than the objects' sureness; near objects, one inside the other, and one box with nothing in it."""
    objects = [holed(0, 0, 8), holed(2, 1, 7), holed(14, 2, 9), holed(16, 4, 6)]
    seen = image(objects, [0.5, 0.95, 0.9, 0.3])
    boxes = np.stack([square(16, 4, 6), square(0, 0, 8), square(2, 16, 6), square(14, 2, 9), square(2, 1, 7)])
    chosen = masks_in_boxes(MODEL, seen, boxes)
    expected = [objects[3], objects[0], boxes[2], objects[2], objects[1]]
    assert len(chosen) == 5 and all(np.array_equal(a, b) for a, b in zip(chosen, expected, strict=True))
    assert not np.shares_memory(chosen, boxes) and boxes[0].all() == square(16, 4, 6).all()


def test_a_box_keeps_only_what_of_the_object_lies_in_it() -> None:
    thing = holed(4, 4, 10)
    box = square(5, 3, 10)  # IoU with the object's extent 81 / 119
    assert np.array_equal(masks_in_boxes(MODEL, image([thing], [0.9]), box[None])[0], thing & box)


@pytest.mark.parametrize(("width", "fits"), [(4, False), (5, True)])
def test_a_box_must_cover_half_of_the_object_s_extent(width: int, fits: bool) -> None:
    thing = square(2, 2, 10) & ~square(2, 2, 2)
    box = square(2, 2, width, 10)
    result = masks_in_boxes(MODEL, image([thing], [0.9]), box[None])[0]
    assert np.array_equal(result, thing & box if fits else box)


def test_no_boxes_and_no_objects() -> None:
    none = np.zeros((0, HEIGHT, WIDTH), bool)
    assert masks_in_boxes(MODEL, image([FIVE[0]], [0.9]), none).shape == (0, HEIGHT, WIDTH)
    assert np.array_equal(masks_in_boxes(MODEL, image([FIVE[0]], [0.01]), FIVE[1][None]), FIVE[1][None])
    assert other_objects(MODEL, image([FIVE[0]], [0.9]), none).shape == (1, HEIGHT, WIDTH)
