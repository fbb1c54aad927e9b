"""Self-consistency: what samples with boxes, outlines and points agree on, by hand and through a whole conversation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from score_case import make_dataset
from test_asking import hold, prompt

from grex_mllm.data.dataset import FolderDataset
from grex_mllm.predict import _items  # type: ignore[attr-defined]
from grex_mllm.predictors.protocol import Item
from grex_mllm.zeroshot.asking import Asking
from grex_mllm.zeroshot.base import Picture
from grex_mllm.zeroshot.families import find_family
from grex_mllm.zeroshot.parsing import Parsed
from grex_mllm.zeroshot.rejection import Rejection
from grex_mllm.zeroshot.segmenters import Polygons, Segmented, box_mask
from grex_mllm.zeroshot.voting import agreed, area_iou

QWEN3 = find_family("qwen3-vl")


def square(x: float, y: float, side: float = 10) -> np.ndarray:
    return np.array([[x, y], [x + side, y], [x + side, y + side], [x, y + side]], float)


def test_what_samples_agree_on() -> None:
    def some(*boxes: tuple[float, ...]) -> Parsed:
        return Parsed("ok", boxes_xyxy=np.array(boxes, float).reshape(-1, 4))

    nothing, lost = Parsed("ok", no_target=True), Parsed("unparsable", "why")
    a, b, c = (0, 0, 10, 10), (20, 0, 30, 10), (0, 50, 10, 60)
    assert agreed([lost, lost]) is lost
    assert (
        agreed([nothing, nothing, some(a)]).no_target and not agreed([some(a), nothing]).no_target and agreed([nothing, some(a)]).no_target
    )
    assert agreed([lost, nothing, lost]).no_target
    assert agreed([some(a, b), some(b, a), some(c)]).boxes_xyxy.tolist() == [list(a), list(b)]
    assert agreed([some(a), some(b)]).boxes_xyxy.tolist() == [list(a), list(b)]  # no majority: what most have
    same = agreed([some(a, a), some(a)])
    assert same.boxes_xyxy.tolist() == [list(a)]  # one sample has one vote for an object
    assert agreed([some((0, 0, 10, 10)), some((0, 0, 12, 10)), some((2, 0, 10, 10))]).boxes_xyxy.tolist() == [[0, 0, 10, 10]]


def test_what_outlines_agree_on() -> None:
    def some(*outlines: np.ndarray) -> Parsed:
        boxes = np.array([[*o.min(axis=0), *o.max(axis=0)] for o in outlines]).reshape(-1, 4)
        return Parsed("ok", polygons=list(outlines), boxes_xyxy=boxes)

    a, b, c = square(0, 0), square(40, 0), square(0, 40)
    found = agreed([some(a, b), some(b, a + 1), some(c, a + 0.5)], "polygons")
    assert [o.tolist() for o in found.polygons] == [(a + 0.5).tolist(), b.tolist()]  # the middle one of the versions of the first
    assert found.boxes_xyxy.tolist() == [[0.5, 0.5, 10.5, 10.5], [40, 0, 50, 10]]
    assert agreed([some(a), Parsed("ok", no_target=True), Parsed("ok", no_target=True)], "polygons").no_target
    # two L-shapes within one square are two objects, though their boxes are one
    lower = np.array([[0, 0], [2, 0], [2, 8], [10, 8], [10, 10], [0, 10]], float)
    upper = np.array([[3, 0], [10, 0], [10, 7], [8, 7], [8, 2], [3, 2]], float)
    assert area_iou(lower, upper) == 0 and area_iou(lower, lower) == 1
    assert len(agreed([some(lower, upper), some(upper, lower)], "polygons").polygons) == 2
    assert area_iou(square(0, 0), square(5, 0)) == pytest.approx(1 / 3, abs=0.02) and area_iou(square(0, 0), square(10, 0)) == 0


def test_what_points_agree_on() -> None:
    def some(*points: tuple[float, float]) -> Parsed:
        return Parsed("ok", points=np.array(points, float).reshape(-1, 2))

    samples = [some((10, 10), (300, 10)), some((14, 10), (500, 400)), some((12, 16), (302, 12))]
    assert agreed(samples, "points", 800.0).points.tolist() == [[12, 10], [301, 11]]  # within 40 pixels of each other
    assert len(agreed(samples, "points", 20.0).points) == 6  # within one pixel nothing is: every point has one vote
    assert len(agreed([some((0, 0), (3, 0)), some((1, 0))], "points", 800.0).points) == 1  # one sample has one vote for an object


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Item:
    source = FolderDataset(make_dataset(tmp_path_factory.mktemp("vote")), "val", 10**9)
    return next(iter(_items(source, list(range(len(source))), ["ground", "generate"], frozenset(), None)))


class Discs:
    """Stands for a segmenter that points point to."""

    name = "discs"
    answers = ("points",)

    def fingerprint(self) -> str:
        return self.name

    def segment(self, picture: Picture, parsed: Parsed) -> Segmented:
        boxes = np.concatenate([parsed.points - 1, parsed.points + 1], axis=1)
        return Segmented(box_mask(boxes, *picture.pixels.shape[:2]), boxes)


@pytest.mark.parametrize("answer", ["polygons", "points"])
def test_samples_of_any_kind_vote_in_a_conversation(answer: str, item: Item) -> None:
    height, width = item.image.shape[:2]
    segmenter: Any = Polygons() if answer == "polygons" else Discs()
    ask = prompt("gres", "{expression}", answer=answer)
    asking = Asking(QWEN3, ask, segmenter=segmenter, rejection=Rejection("consistency", 3, 1.0))
    view, write = asking.view_of(width, height), {"polygons": QWEN3.write_polygons, "points": QWEN3.write_points}[answer]
    assert write is not None
    near, far = square(0.1 * width, 0.1 * height, 0.3 * height), square(0.6 * width, 0.6 * height, 0.2 * height)
    said = [[near], [near + 0.5, far], [near]]
    texts = [write(shapes if answer == "polygons" else np.stack([s.mean(axis=0) for s in shapes]), view, "x") for shapes in said]
    answer_, rounds = hold(asking.ground(item, item.expressions[0]), lambda request: texts[request.sample])
    assert len(rounds) == 1 and len(rounds[0]) == 3 and answer_.status == "ok"
    assert answer_.grounding is not None and answer_.grounding.count == 1 and answer_.grounding.mask.any()
    low, high = near.min(axis=0), near.max(axis=0)
    rows, columns = np.nonzero(answer_.grounding.mask)
    assert columns.min() >= low[0] - 1 and columns.max() <= high[0] + 1 and rows.min() >= low[1] - 1 and rows.max() <= high[1] + 1
