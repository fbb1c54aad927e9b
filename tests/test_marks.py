"""Objects shown to a model: numbers, outlines, crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grex_mllm.data.coco import load_instances
from grex_mllm.data.images import load_image
from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import mask_to_box_xyxy, segmentation_to_mask
from grex_mllm.predictors.protocol import Item
from grex_mllm.types import ImageRecord, Instance
from grex_mllm.zeroshot.marks import COLOURS, Shown, crops, line_width, mark_colours, mark_picture, mark_words, parse_ways, shown_objects

HEIGHT, WIDTH = 480, 640


def shown(left: int, top: int, right: int, bottom: int) -> Shown:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return Shown(mask, (float(left), float(top), float(right), float(bottom)))


def grey() -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), 128, np.uint8)


def painted(drawn: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    found: np.ndarray = (drawn == np.array(colour)).all(-1)
    return found


def test_ways_are_read_in_one_order_and_unknown_ones_are_refused() -> None:
    assert parse_ways("coordinates+numbers") == ("numbers", "coordinates")
    for wrong in ("", "arrows", "numbers+numbers", "numbers coordinates"):
        with pytest.raises(GrexError, match="marking"):
            parse_ways(wrong)


def test_an_outline_lies_around_the_object_and_hides_nothing_of_it() -> None:
    one = shown(100, 100, 200, 180)
    drawn = mark_picture(grey(), [one], ["outlines"])
    assert (drawn[one.mask] == 128).all()
    line = painted(drawn, COLOURS[0])
    assert line_width(WIDTH, HEIGHT) == 3
    assert [int(v) for v in np.flatnonzero(line[140])] == [97, 98, 99, 200, 201, 202]
    assert (drawn[140, [96, 203]] < 30).all() and (drawn[140, [95, 204]] == 128).all()  # a dark edge behind the line


def test_an_object_that_fills_the_picture_is_outlined_within_it() -> None:
    whole = shown(0, 0, WIDTH, HEIGHT)
    line = painted(mark_picture(grey(), [whole], ["outlines"]), COLOURS[0])
    assert line[:3].all() and line[:, -3:].all() and not line[10:-10, 10:-10].any()


def test_numbers_lie_in_their_objects_and_do_not_meet() -> None:
    objects = [shown(50, 50, 250, 250), shown(300, 100, 420, 400), shown(100, 100, 160, 170)]
    drawn = mark_picture(grey(), objects, ["numbers"])
    for n, one in enumerate(objects):
        plate = painted(drawn, COLOURS[n]) & one.mask
        inside = plate & ~_near_edges(one, 6)
        rows, columns = np.nonzero(inside)
        assert inside.sum() > 100, n  # its plate
        assert one.mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        for other, away in enumerate(objects):
            assert other == n or not (inside & away.mask & ~one.mask).any()
    assert (mark_picture(grey(), objects, ["numbers"]) == drawn).all()


def _near_edges(one: Shown, width: int) -> np.ndarray:
    left, top, right, bottom = (int(edge) for edge in one.box_xyxy)
    inner = np.zeros_like(one.mask)
    inner[top + width : bottom - width, left + width : right - width] = True
    return ~inner


def test_a_number_that_would_hide_its_object_lies_beside_it() -> None:
    small = shown(300, 200, 312, 212)
    drawn = mark_picture(grey(), [small, shown(10, 10, 200, 300)], ["numbers"])
    assert (drawn[small.mask] == 128).all()
    assert painted(drawn, COLOURS[0]).sum() > 250
    corner = shown(0, 0, 8, 8)
    drawn = mark_picture(grey(), [corner], ["numbers"])
    assert painted(drawn, COLOURS[0]).sum() > 150  # still within the picture


def test_many_objects_have_many_colours() -> None:
    colours = mark_colours(40)
    assert len(set(colours)) == 40 and tuple(colours[: len(COLOURS)]) == COLOURS
    near = min(np.abs(np.array(a) - np.array(b)).sum() for i, a in enumerate(colours[:10]) for b in colours[:i])
    assert near > 80


def test_words_for_marks() -> None:
    assert mark_words(3, ["numbers"]) == {"numbers": "1, 2 and 3", "colours": "red, green and blue"}
    assert mark_words(1, ["numbers"]) == {"numbers": "1", "colours": "red"}
    assert mark_words(3, ["outlines"])["colours"] == "red"


def test_crops_have_a_margin_and_a_least_size() -> None:
    pixels = grey()
    pixels[100:180, 100:200] = 7
    first, second = crops(pixels, [shown(100, 100, 200, 180), shown(600, 2, 603, 4)])
    assert first.shape == (80 + 2 * 12, 100 + 2 * 15, 3) and (first[12:-12, 15:-15] == 7).all()
    assert second.shape[0] >= 16 and 32 <= second.shape[1] <= 34


def test_objects_of_an_item_come_with_masks_or_boxes_alone() -> None:
    record = ImageRecord("1", "x.jpg", 20, 30, [
        Instance("a", "cat", [1, 1, 9, 9], [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]]),
        Instance("c", "cats", [0, 0, 9, 9], None, iscrowd=True),
        Instance("b", "dog", [10.0, 10.0, 40.0, 15.0]),
    ])  # fmt: skip
    item = Item(record, Path("x.jpg"), lambda: np.zeros((20, 30, 3), np.uint8))
    first, second = shown_objects(item, ("b", "a"))
    assert not first.has_mask and first.box_xyxy == (10.0, 10.0, 30.0, 15.0) and first.mask[12, 29]
    assert second.has_mask and second.box_xyxy == (2.0, 2.0, 8.0, 8.0)
    with pytest.raises(GrexError, match="object set with c"):
        shown_objects(item, ("a", "c"))


def test_every_object_of_a_photograph_gets_a_number_that_shows(shared: Path) -> None:
    """Four photographs, all their objects: each colour is there, twice the same picture, and no number hides more than two fifths."""
    instances = load_instances(shared / "data" / "photos" / "instances.json")
    crowded = [i for i, found in sorted(instances.by_image.items()) if 3 <= sum(not a["iscrowd"] for a in found) <= 10][:4]
    assert len(crowded) == 4
    for image_id in crowded:
        image = load_image(shared / "data" / "photos" / "images" / instances.images[image_id]["file_name"])
        masks = [segmentation_to_mask(a["segmentation"], *image.shape[:2]) for a in instances.by_image[image_id] if not a["iscrowd"]]
        objects = [Shown(mask, tuple(mask_to_box_xyxy(mask))) for mask in masks if mask.any()]  # type: ignore[arg-type]
        drawn = mark_picture(image, objects, ["numbers"])
        assert (drawn == mark_picture(image, objects, ["numbers"])).all()
        for n, one in enumerate(objects):
            assert painted(drawn, mark_colours(len(objects))[n]).sum() >= 60, (image_id, n)
            alone = (mark_picture(image, [one], ["numbers"]) != mark_picture(image, [one], ["outlines"])).any(-1) & one.mask
            assert alone.sum() <= 0.4 * one.mask.sum(), (image_id, n)
