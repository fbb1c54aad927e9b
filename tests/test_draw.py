"""Pictures: every mark lies on the pixels that it is about, at every size."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grex_mllm import draw
from grex_mllm.errors import GrexError


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def block(height: int, width: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(("height", "width"), [(96, 96), (60, 128), (427, 640), (640, 427)])
def test_mask_changes_exactly_its_own_pixels(height: int, width: int) -> None:
    mask = block(height, width, 10, 31, 20, 47)
    mask[12:14, 30:40] = False  # a hole
    picture = np.asarray(draw.overlay(grey(height, width), mask))
    factor = picture.shape[0] // height
    assert picture.shape == (height * factor, width * factor, 3)
    changed = (picture != 90).any(axis=2)
    assert (changed == mask.repeat(factor, axis=0).repeat(factor, axis=1)).all()


def test_spotlight_keeps_the_colours_of_the_objects() -> None:
    mask = block(96, 96, 20, 60, 20, 60)
    picture = np.asarray(draw.overlay(grey(96, 96), mask, spotlight=True))
    assert (picture[160, 160] == 90).all() and (picture[10, 10] < 50).all()
    nothing = np.asarray(draw.overlay(grey(96, 96), np.zeros((96, 96), bool), spotlight=True))
    assert (nothing == 90).all(), "an empty mask darkens nothing"


def test_small_images_grow_by_an_integer_and_large_ones_stay() -> None:
    assert draw.enlarge_factor(96, 96) == 4
    assert draw.enlarge_factor(480, 640) == 1
    assert draw.overlay(grey(96, 80)).size == (320, 384)
    assert draw.overlay(grey(480, 640)).size == (640, 480)


@pytest.mark.parametrize("height", [96, 480])
def test_box_lies_on_its_edges(height: int) -> None:
    picture = np.asarray(draw.overlay(grey(height, height), boxes=[[10, 20, 50, 60]]))
    factor = len(picture) // height
    rows, columns = np.nonzero((picture != 90).any(axis=2))
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (10 * factor, 50 * factor, 20 * factor, 60 * factor)
    assert (picture[40 * factor, 30 * factor] == 90).all(), "a box is a frame, not a plate"


@pytest.mark.parametrize("box", [[-5, -5, 200, 200], [5, 5, 5, 5], [9, 9, 3, 3], [95, 95, 96, 96]])
def test_degenerate_and_outside_boxes_do_not_fail(box: list[float]) -> None:
    assert draw.overlay(grey(96, 96), boxes=np.array([box]), box_scores=[0.5]).size == (384, 384)


def test_caption_is_a_strip_below_and_leaves_the_picture() -> None:
    mask = block(96, 96, 5, 20, 5, 20)
    plain = draw.overlay(grey(96, 96), mask, count=1)
    captioned = draw.overlay(
        grey(96, 96), mask, count=1, text="<b>the two red circles on the far left of the long green bar</b> 左边的人 " * 9
    )
    assert captioned.width == plain.width and captioned.height > plain.height
    assert (np.asarray(captioned)[: plain.height] == np.asarray(plain)).all()
    assert (np.asarray(captioned)[plain.height :] < 100).any(), "no ink in the caption"


def test_count_and_no_target_are_written_in_the_corner() -> None:
    bare = np.asarray(draw.overlay(grey(96, 96)))
    three = np.asarray(draw.overlay(grey(96, 96), count=3))
    many = np.asarray(draw.overlay(grey(96, 96), count=6))
    none = np.asarray(draw.overlay(grey(96, 96), count=0, no_target=True))
    for picture in (three, many, none):
        assert (picture[:192, 192:] != bare[:192, 192:]).any()
        assert (picture[192:] == bare[192:]).all()
    assert (three != many).any() and (many != none).any()
    assert [draw.count_name(count) for count in (0, 5, 6, 9)] == ["0", "5", ">5", ">5"]


def test_lines_grow_with_the_picture_and_large_ones_take_seconds_at_most() -> None:
    assert draw.line_width((384, 384)) == 2
    assert draw.line_width((4000, 3000)) >= 10
    start = time.process_time()
    picture = draw.overlay(grey(3000, 4000), block(3000, 4000, 100, 2900, 100, 3900), [[100, 100, 3900, 2900]], 1, "a wall")
    assert time.process_time() - start < 10, "seconds for twelve megapixels"
    assert picture.width == 4000
    white = (np.asarray(picture)[1500, 100:130] == 255).all(axis=1)
    assert white.sum() >= 4, "the light edge of a large picture must be visible"


def test_objects_have_their_own_colours() -> None:
    masks = [block(96, 96, 5, 30, 5, 30), None, block(96, 96, 60, 90, 60, 90)]
    boxes = [[5, 5, 30, 30], [40, 40, 55, 55], [60, 60, 90, 90]]
    picture = np.asarray(draw.draw_objects(grey(96, 96), masks, boxes, "these"))
    first, third = picture[17 * 4, 17 * 4], picture[75 * 4, 75 * 4]
    assert (first != third).any() and (first != 90).any() and (third != 90).any()
    assert (picture[47 * 4, 47 * 4] == 90).all(), "the object without a mask is framed only"
    lit = np.asarray(draw.draw_objects(grey(96, 96), masks, boxes, spotlight=True))
    assert (lit[17 * 4, 17 * 4] == 90).all() and (lit[75 * 4, 75 * 4] == 90).all() and (lit[47 * 4, 47 * 4] < 50).all()


def test_minimap_places_its_cells_and_survives_bad_numbers() -> None:
    minimap = np.zeros((4, 4))
    minimap[0, 3] = 1
    minimap[3, 0] = np.nan
    picture = np.asarray(draw.minimap_image(minimap, (80, 40)))
    assert picture.shape == (40, 80, 3)
    assert tuple(picture[0, 79]) == tuple(draw.HEAT[-1].astype(int)) and tuple(picture[0, 0]) == tuple(draw.HEAT[0].astype(int))
    assert (picture[39, 0] == picture[0, 0]).all()
    assert draw.minimap_image(minimap, (96, 96), grey(96, 96)).size == (96, 96)
    with pytest.raises(GrexError, match="minimap of shape"):
        draw.minimap_image(np.zeros((2, 3, 3)), (9, 9))


def test_mask_png_has_the_size_and_values_of_the_mask(tmp_path: Path) -> None:
    mask = block(61, 97, 3, 30, 40, 90)
    path = draw.save_mask_png(mask, tmp_path / "deeper" / "mask.png")
    with Image.open(path) as file:
        assert file.size == (97, 61)
        assert (np.asarray(file) == mask * 255).all()
    assert [file.name for file in path.parent.iterdir()] == ["mask.png"]


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        draw.save_mask_png(np.ones((4, 4), bool), tmp_path / "mask.png")
    assert list(tmp_path.iterdir()) == []


def test_wrong_shapes_name_what_was_expected() -> None:
    with pytest.raises(GrexError, match=r"mask of shape \(96, 60\); expected 60x96"):
        draw.overlay(grey(60, 96), np.zeros((96, 60), bool))
    with pytest.raises(GrexError, match=r"uint8 \[height, width, 3\]"):
        draw.overlay(np.zeros((5, 5), np.uint8))
    with pytest.raises(GrexError, match="one mask at a time"):
        draw.save_mask_png(np.zeros((2, 5, 5), bool), "never.png")


def test_sheet_holds_every_picture() -> None:
    pictures = [Image.new("RGB", (20, 10 + index), (index * 20, 0, 0)) for index in range(5)]
    sheet = np.asarray(draw.contact_sheet(pictures, columns=3, gap=2))
    assert sheet.shape == (2 + 12 + 2 + 14 + 2, 3 * 20 + 4 * 2, 3)
    for index in range(5):
        assert (sheet == (index * 20, 0, 0)).all(axis=2).sum() >= 20 * (10 + index)
    assert draw.contact_sheet([]).width > 0
