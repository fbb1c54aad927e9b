"""Masks as PNGs in an answer (Gemini 2.5): there and back, placed over their boxes, and hostile ones."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from test_asking import hold
from test_voting import item  # noqa: F401 (a fixture)

from grex_mllm.errors import GrexError
from grex_mllm.predictors.protocol import Item
from grex_mllm.zeroshot.asking import Asking
from grex_mllm.zeroshot.base import Picture, RawAnswer
from grex_mllm.zeroshot.families import find_family
from grex_mllm.zeroshot.parsing import Parsed, parse_grounding
from grex_mllm.zeroshot.parsing.pictures import MAX_PICTURES, MAX_SIDE, MaskPicture, number_of, read_mask, take_out, write_mask
from grex_mllm.zeroshot.prompts import find_prompt
from grex_mllm.zeroshot.rejection import Rejection
from grex_mllm.zeroshot.segmenters import Boxes, Masks, Polygons, box_mask, check_segmenter
from grex_mllm.zeroshot.voting import agreed

GEMINI = find_family("gemini")
VIEW = GEMINI.view(640, 480)


def parsed(text: str, finish: str = "stop") -> Parsed:
    return parse_grounding(RawAnswer(text, finish), frame="k1000", order="yxyx", answer="masks", view=VIEW)


def placed(found: Parsed) -> np.ndarray:
    return Masks().segment(Picture(np.zeros((480, 640, 3), np.uint8)), found).mask


def discs() -> list[np.ndarray]:
    """Two discs, of which the boxes overlap, at places of no grid."""
    y, x = np.mgrid[:480, :640]
    return [(x - 151) ** 2 + (y - 203) ** 2 < 97**2, (x - 300) ** 2 / 2 + (y - 260) ** 2 < 80**2]


def test_masks_come_back() -> None:
    wanted = discs()
    assert GEMINI.write_masks is not None
    found = parsed(GEMINI.write_masks(wanted, "disc"))
    assert found.status == "ok" and found.flags == () and len(found.boxes_xyxy) == len(found.masks) == 2
    for one, mask in zip(found.masks, wanted, strict=True):
        assert one is not None
        got = one.placed(480, 640)
        assert (got & mask).sum() / (got | mask).sum() > 0.985  # corners are thousandths: a pixel at each edge
    union = np.logical_or(*wanted)
    assert (placed(found) & union).sum() / (placed(found) | union).sum() > 0.985
    assert placed(found).sum() < 0.85 * box_mask(found.boxes_xyxy, 480, 640).sum()
    nothing = parsed("```json\n[]\n```")
    assert nothing.status == "ok" and nothing.no_target and nothing.masks == []


def test_a_mask_lies_where_its_box_is() -> None:
    half = np.zeros((4, 4), np.uint8)
    half[:, 2:] = 255
    assert MaskPicture(np.array([10.0, 20, 18, 28]), half).placed(40, 40).nonzero()[1].min() == 14
    over = MaskPicture(np.array([-4.0, 0, 4, 8]), half).placed(40, 40)  # what is over the edge is cut, the rest stays in its place
    assert over.sum() == 4 * 8 and over[:8, :4].all()
    assert not MaskPicture(np.array([50.0, 50, 60, 60]), half).placed(40, 40).any()
    grey = np.full((2, 2), 127, np.uint8)
    assert not MaskPicture(np.array([0.0, 0, 9, 9]), grey).placed(40, 40).any()
    assert MaskPicture(np.array([0.0, 0, 9, 9]), grey + 1).placed(40, 40).sum() == 81
    start = time.perf_counter()
    assert MaskPicture(np.array([-1e7, -1e7, 1e7, 1e7]), half).placed(480, 640).shape == (480, 640)  # a box of any size costs no more
    assert time.perf_counter() - start < 1


def answer(mask: str, box: str = "[100, 100, 500, 500]") -> str:
    return json.dumps([{"box_2d": json.loads(box), "mask": mask, "label": "x"}])


def png(width: int, height: int, data: bytes = b"") -> str:
    """A PNG whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(whole).decode()}"


def encoded(kind: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 255, 255)).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


HOSTILE = {
    "huge": png(60_000, 60_000, zlib.compress(b"\x00" * 100)),
    "bomb": png(1024, 1024, zlib.compress(b"\x00" * 50_000_000)),
    "short": png(64, 64, zlib.compress(b"\x00" * 10)),
    "no picture": "data:image/png;base64,AAAA",
    "no base64": "data:image/png;base64,A",
    "jpeg": f"data:image/png;base64,{encoded('JPEG')}",
    "gif": f"data:image/png;base64,{encoded('GIF')}",
    "cut": f"data:image/png;base64,{encoded('PNG')[:60]}",
    "long": "data:image/png;base64," + "A" * 500_000,
    "words": "a mask of the man",
    "tokens": "<start_of_mask><seg_4><seg_20>",
    "number": "data:image/png;base64,#0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_mask_is_a_filled_box(name: str) -> None:
    start = time.perf_counter()
    found = parsed(answer(HOSTILE[name]))
    assert found.status == "ok" and found.boxes_xyxy.tolist() == [[64, 48, 320, 240]]
    if name not in ("bomb",):  # a picture of a legal size with too much data behind it is read as far as it goes
        assert found.masks == [None] and found.flags == ("no_mask",)
        made = Masks().segment(Picture(np.zeros((480, 640, 3), np.uint8)), found)
        assert made.flags == ("filled_box",) and made.mask.sum() == 256 * 192
    assert time.perf_counter() - start < 2


def test_many_pictures_and_their_places() -> None:
    white = write_mask(np.ones((2, 2), bool))
    text, letters = take_out(f"{white} and {white}")
    assert len(letters) == 2 and "base64,#0 and data:image/png;base64,#1" in text and number_of(" data:image/png;base64,#1 ") == 1
    assert number_of("data:image/png;base64,") is None and number_of(3) is None and number_of("data:image/jpeg;base64,#1") is None
    items = [{"box_2d": [n, n, n + 5, n + 5], "mask": white, "label": "x"} for n in range(0, 900, 6)]
    found = parsed(json.dumps(items))
    assert len(found.boxes_xyxy) == len(found.masks) == MAX_PICTURES and "many" in found.flags and None not in found.masks
    black = write_mask(np.zeros((2, 2), bool))
    mixed = parsed(json.dumps([{"mask": black, "box_2d": [0, 0, 100, 100]}, {"box_2d": [0, 0, 100, 100]}, {"box_2d": [500, 500, 900, 900]},
                               {"mask": white, "box_2d": [200, 0, 300, 100]}]))  # fmt: skip
    assert "duplicates" in mixed.flags and [one is not None for one in mixed.masks] == [True, False, True]
    rows = placed(mixed).nonzero()[0]
    assert rows.min() == 96 and not placed(mixed)[:48].any()  # the black mask of the first box is empty
    cut = parsed(json.dumps(items[:3])[:-40], "length")
    assert cut.status == "ok" and len(cut.boxes_xyxy) == 3 and set(cut.flags) == {"truncated", "no_mask"}
    assert [one is not None for one in cut.masks] == [True, True, False]  # the box stood before its mask was cut off
    assert read_mask(white.partition(",")[2]).tolist() == [[255, 255], [255, 255]]  # type: ignore[union-attr]


def test_masks_through_a_conversation_and_by_votes(item: Item) -> None:  # noqa: F811
    prompt = find_prompt("gres", "gemini", "native_gemini_masks")
    height, width = item.image.shape[:2]
    y, x = np.mgrid[:height, :width]
    shape = (x + y < 0.6 * min(width, height)) & (x > 2) & (y > 2)
    assert GEMINI.write_masks is not None
    said = GEMINI.write_masks([shape], "x")
    got, rounds = hold(Asking(GEMINI, prompt, segmenter=Masks()).ground(item, item.expressions[0]), lambda _: said)
    assert got.grounding is not None and (got.grounding.mask & shape).sum() / (got.grounding.mask | shape).sum() > 0.9
    assert got.grounding.count == 1 and len(rounds) == 1 and got.fields["raw"][0]["text"] == said
    voted = Asking(GEMINI, prompt, segmenter=Masks(), rejection=Rejection("consistency", 3, 1.0))
    texts = [said, "[]", said]
    again, _ = hold(voted.ground(item, item.expressions[0]), lambda request: texts[request.sample])
    assert again.grounding is not None and np.array_equal(again.grounding.mask, got.grounding.mask)
    assert len(agreed([parsed(said), parsed(said)], "masks").masks) == 1
    for segmenter in (Polygons(), None, Boxes()):
        if isinstance(segmenter, Polygons):
            with pytest.raises(GrexError, match="mask for masks"):
                check_segmenter(segmenter, "masks")
        else:
            check_segmenter(segmenter, "masks")


def test_a_mask_larger_than_the_bound_is_not_read() -> None:
    """A line of pixels is small in bytes; its side alone decides."""
    for side, read in ((MAX_SIDE, True), (MAX_SIDE + 1, False)):
        letters = write_mask(np.ones((1, side), bool)).partition(",")[2]
        assert (read_mask(letters) is not None) == read
