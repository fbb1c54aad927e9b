"""`grex serve --segmenter`: clicks and boxes find objects in front of a decoder that proposes none. SAM is a tiny random one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_segmenters import write_sam, write_sam2
from tiny import WORDS, tiny_config, tiny_speaker

from grex_mllm.cli import main
from grex_mllm.dialogue import Dialogue
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import train_sentencepiece
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.ops.masks import decode_rle
from grex_mllm.zeroshot.base import Picture
from grex_mllm.zeroshot.segmenters import Prompted

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")

from starlette.testclient import TestClient
from test_serve import HERE, opened, pixels

from grex_mllm.serve.app import make_app


def blind_speaker(work: Path) -> GrexModel:
    """A random model with a generator whose decoder proposes no objects; its tokenizer is written into the folder `work`."""
    torch.manual_seed(0)
    speaker = {"lm": "tiny", "hidden_size": 16, "num_heads": 2, "num_layers": 1, "intermediate_size": 32, "projector_width": 16}
    config = tiny_config(model__decoder__name="rela", model__decoder__minimap_side=4, model__decoder__feedforward=16,
                         model__generator__max_new_tokens=6, **{f"model__generator__{k}": v for k, v in speaker.items()})  # fmt: skip
    text = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = text.vocab_size
    return GrexModel(config, text, train_sentencepiece(WORDS * 5, work, 300)).eval()


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> GrexModel:
    return blind_speaker(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=[write_sam, write_sam2], ids=["sam", "sam2"])
def segmenter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prompted:
    return Prompted(str(request.param(tmp_path_factory.mktemp("sam"))), "cpu")


@pytest.fixture
def client(blind: GrexModel, segmenter: Prompted) -> Iterator[TestClient]:
    with TestClient(make_app(blind, "blind", segmenter=segmenter), base_url=HERE) as made:
        yield made


def described(client: TestClient, **chosen: Any) -> Any:
    return client.post("/describe", json={"image": opened(client)["image"], "candidates": 2, **chosen})


def found(segmenter: Prompted, prompts: list[tuple[float, ...]]) -> list[np.ndarray]:
    """Return the segmenter's own masks in `pixels()`."""
    return list(segmenter.masks(Picture(pixels()), np.asarray(prompts, np.float64)))


def clicks(segmenter: Prompted, number: int) -> list[tuple[float, float]]:
    """Return points on which the segmenter finds something; a random one does almost everywhere."""
    points = [(float(x), float(y)) for x in range(3, 56, 7) for y in range(2, 40, 7)]
    some = [point for point, mask in zip(points, found(segmenter, points), strict=True) if mask.any()]
    assert len(some) >= number
    return some[:number]


def test_a_click_becomes_an_object_of_the_set(client: TestClient, blind: GrexModel, segmenter: Prompted) -> None:
    image = opened(client)
    assert client.get("/status").json()["segments"] and not image["proposes"] and image["objects"] == []
    points = clicks(segmenter, 2)
    answer = described(client, points_xy=[*points, points[0]]).json()
    masks = [decode_rle(code) for code in answer["masks_rle"]]
    wanted = found(segmenter, points)
    assert len(masks) == 2 and all((mask == own).all() for mask, own in zip(masks, wanted, strict=True))
    assert answer["candidates"] and answer["expression"] == answer["candidates"][0]["expression"]
    alone = described(client, points_xy=points, candidates=1).json()["expression"]
    assert alone == blind.describe(pixels(), masks=wanted)


def test_a_box_becomes_the_object_in_it(client: TestClient, segmenter: Prompted) -> None:
    box, point = (5.0, 4.0, 41.0, 33.0), clicks(segmenter, 1)[0]
    masks = [decode_rle(code) for code in described(client, boxes_xyxy=[box], points_xy=[point]).json()["masks_rle"]]
    wanted = found(segmenter, [box])[0]
    assert len(masks) == 2 and (masks[0] == wanted).all() and (masks[1] == found(segmenter, [point])[0]).all()


def test_a_follow_up_refers_to_clicks_and_boxes(client: TestClient, blind: GrexModel, segmenter: Prompted) -> None:
    image, points, box = opened(client)["image"], clicks(segmenter, 2), (5.0, 4.0, 41.0, 33.0)
    body = {"image": image, "expressions": ["the others"], "selected": {"points_xy": points, "boxes_xyxy": [box]}}
    answer = client.post("/ground", json=body).json()["results"][0]
    said = Dialogue(blind, pixels())
    said.select(masks=[*found(segmenter, [box]), *found(segmenter, points)])
    assert (decode_rle(answer["mask_rle"]) == said.say("the others").mask).all()
    assert answer["operation"] == said.operation == "complement" and answer["objects"] == []


@pytest.mark.parametrize(("point", "told"), [([56.0, 3.0], "click into the picture"), ([-0.1, 3.0], "click into"), ([1.0], "points_xy")])
def test_a_point_outside_is_told(client: TestClient, point: list[float], told: str) -> None:
    answer = described(client, points_xy=[point])
    assert answer.status_code == 422 and told in answer.json()["error"]


def test_a_point_on_nothing_is_told(client: TestClient, segmenter: Prompted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenter, "masks", lambda picture, prompts: np.zeros((len(prompts), *picture.pixels.shape[:2]), bool))
    answer = described(client, points_xy=[[3.0, 3.0]])
    assert answer.status_code == 422 and "the segmenter finds nothing" in answer.json()["error"]
    boxed = described(client, boxes_xyxy=[[5.0, 4.0, 15.0, 9.0]]).json()
    assert decode_rle(boxed["masks_rle"][0]).sum() == 50  # the box itself


def test_without_a_segmenter_only_proposals_can_be_clicked(blind: GrexModel, tmp_path: Path) -> None:
    with TestClient(make_app(blind, "blind"), base_url=HERE) as client:
        assert client.get("/status").json()["segments"] is False
        answer = described(client, points_xy=[[3.0, 3.0]])
        assert answer.status_code == 422 and "--segmenter" in answer.json()["error"]
    with TestClient(make_app(tiny_speaker(tmp_path), "tiny"), base_url=HERE) as client:
        masks = [decode_rle(item["mask_rle"]) for item in opened(client)["objects"]]
        assert masks, "the tiny model proposes something"
        y, x = (int(axis[0]) for axis in np.nonzero(masks[0]))
        smallest = min((mask for mask in masks if mask[y, x]), key=lambda mask: int(mask.sum()))
        code = described(client, points_xy=[[x + 0.5, y + 0.5]]).json()["masks_rle"][0]
        assert (decode_rle(code) == smallest).all()


def test_the_command_reads_a_segmenter(
    blind: GrexModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`grex serve` up to the moment at which it would wait for visitors: then one is sent to its application."""
    import uvicorn

    blind.save_pretrained(tmp_path / "model")
    write_sam(tmp_path / "sam")
    told: list[dict[str, Any]] = []

    def run(server: Any, sockets: list[Any]) -> None:
        with TestClient(server.config.app, base_url=HERE) as client:
            told.append(client.get("/status").json())

    monkeypatch.setattr(uvicorn.Server, "run", run)
    words = ["serve", "--model", str(tmp_path / "model"), "--port", "0", "--device", "cpu", "--segmenter"]
    assert main([*words, str(tmp_path / "sam")]) == 0 and told[0]["segments"] is True
    assert main([*words, str(tmp_path / "nothing")]) == 2 and "SAM or SAM 2" in capsys.readouterr().err
