"""The HTTP API of `grex serve`, with a tiny random model: answers, pictures, the line, and what happens when people ask at once."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageCms
from tiny import tiny_model, tiny_speaker

from grex_mllm.data.images import load_image
from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import decode_rle

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")

from starlette.testclient import TestClient

from grex_mllm.serve import worker
from grex_mllm.serve.app import make_app
from grex_mllm.serve.gallery import PHOTOGRAPHS
from grex_mllm.serve.held import Held, Pictures
from grex_mllm.serve.limits import MAX_SIDE
from grex_mllm.serve.pictures import read_picture
from grex_mllm.serve.worker import LineFull, Worker

HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> GrexModel:
    return tiny_speaker(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def client(speaker: GrexModel) -> Iterator[TestClient]:
    with TestClient(make_app(speaker, "tiny", num_pictures=3), base_url=HERE) as made:
        yield made


def pixels(seed: int = 0, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(data, format=kind, **options)
    return data.getvalue()


def upload(client: TestClient, data: bytes, kind: str = "image/png") -> Any:
    return client.post("/images", content=data, headers={"content-type": kind})


def opened(client: TestClient, seed: int = 0) -> dict[str, Any]:
    answer = upload(client, encoded(pixels(seed)))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_grounding_equals_the_model(client: TestClient, speaker: GrexModel) -> None:
    image = opened(client)
    assert (image["width"], image["height"], image["scaled_from"]) == (56, 40, None)
    texts = ["the red circle", "people in white", "the red circle"]
    answer = client.post("/ground", json={"image": image["image"], "expressions": texts, "threshold": 0.9}).json()
    expected = speaker.ground(pixels(), texts, threshold=0.9)
    assert [result["expression"] for result in answer["results"]] == texts
    for shown, grounding in zip(answer["results"], expected, strict=True):
        assert (decode_rle(shown["mask_rle"]) == grounding.mask).all() and shown["mask_pixels"] == grounding.mask.sum()
        assert shown["no_target"] == grounding.no_target and shown["no_target_prob"] == pytest.approx(grounding.no_target_prob, abs=1e-4)
        assert np.allclose(shown["boxes_xyxy"], grounding.boxes_xyxy, atol=0.06)
    always = client.post("/ground", json={"image": image["image"], "expressions": texts[:1], "threshold": 0}).json()["results"][0]
    assert always["no_target"] and always["count"] == 0 and always["mask_pixels"] == 0


def test_described_sets_come_with_candidates_that_lead_back(client: TestClient, speaker: GrexModel) -> None:
    image = opened(client)
    chosen = {"image": image["image"], "boxes_xyxy": [[2, 3, 20, 30], [30, 5, 50, 20]], "objects": [0] if image["objects"] else []}
    answer = client.post("/describe", json={**chosen, "candidates": 4}).json()
    assert len(answer["masks_rle"]) == 2 + len(chosen["objects"])
    union = np.any([decode_rle(code) for code in answer["masks_rle"]], axis=0)
    assert answer["candidates"], "a random generator still says something"
    for candidate in answer["candidates"]:
        mask = speaker.ground(pixels(), candidate["expression"]).mask
        assert candidate["iou"] == pytest.approx((mask & union).sum() / max(1, (mask | union).sum()), abs=1e-3)
    assert answer["expression"] == answer["candidates"][0]["expression"]
    assert len(client.post("/describe", json={**chosen, "candidates": 1}).json()["candidates"]) <= 1


def test_candidates_are_ranked_as_the_model_folder_says(client: TestClient, speaker: GrexModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    own = type(speaker).describe
    monkeypatch.setattr(type(speaker), "describe", lambda *given, **options: asked.append(options.get("rerank")) or own(*given, **options))
    image = opened(client)
    chosen = {"image": image["image"], "boxes_xyxy": [[2, 3, 20, 30], [30, 5, 50, 20]], "objects": [0] if image["objects"] else []}
    for way in ("objects", "listener"):
        monkeypatch.setattr(speaker.config.predict, "rerank", way)
        assert client.post("/describe", json={**chosen, "candidates": 3}).json()["candidates"]
    assert asked == ["objects", "listener"]


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({}, "no object"),
        ({"objects": [99]}, "object 99"),
        ({"objects": [-1]}, "object -1"),
        ({"boxes_xyxy": [[30, 3, 20, 30]]}, "box"),
        ({"boxes_xyxy": [[900, 900, 990, 990]]}, "box"),
        ({"boxes_xyxy": [[1, 2, 3]]}, "boxes_xyxy"),
        ({"candidates": 1000, "objects": [0]}, "candidates"),
    ],
)
def test_a_wrong_selection_is_told(client: TestClient, chosen: dict[str, Any], told: str) -> None:
    answer = client.post("/describe", json={"image": opened(client)["image"], **chosen})
    assert answer.status_code == 422 and told in answer.json()["error"] and "expected" in answer.json()["error"]


def test_a_model_without_generator_only_grounds() -> None:
    with TestClient(make_app(tiny_model(), "tiny"), base_url=HERE) as client:
        assert client.get("/status").json()["describes"] is False
        answer = client.post("/describe", json={"image": opened(client)["image"], "boxes_xyxy": [[1, 1, 9, 9]]})
        assert answer.status_code == 422 and "without a generator" in answer.json()["error"]


def test_pictures_are_forgotten_and_scenes_come_back(client: TestClient) -> None:
    scene = client.post("/gallery/2", json={}).json()
    assert scene["image"] == "scene-2" and scene["examples"]
    names = [opened(client, seed)["image"] for seed in range(4)]
    assert len(set(names)) == 4 and all(len(name) >= 20 for name in names)
    assert [client.get(f"/images/{name}").status_code for name in names] == [404, 200, 200, 200]
    gone = client.post("/ground", json={"image": names[0], "expressions": ["x"]})
    assert gone.status_code == 404 and "open it" in gone.json()["error"]
    assert client.post("/ground", json={"image": "scene-2", "expressions": ["the star"]}).status_code == 200
    shown = Image.open(io.BytesIO(client.get("/gallery/2/pixels").content))
    assert shown.size == (scene["width"], scene["height"])
    assert client.post("/gallery/99", json={}).status_code == 422


def test_the_gallery_ends_with_readmes_photographs(client: TestClient) -> None:
    """Each with what README's picture asked, its link and its licence, as docs/photographs.md has them."""
    status, told = client.get("/status").json(), (ROOT / "docs" / "photographs.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in told if line.startswith("- ")]
    assert status["photographs"] == len(lines) == 6
    pixels: set[bytes] = set()
    for number, line in enumerate(lines, start=status["scenes"]):
        opened = client.post(f"/gallery/{number}", json={}).json()
        assert opened["image"] == f"scene-{number}" and len(opened["examples"]) == 4
        assert line.startswith(f'- "{opened["examples"][0]}"') and line.endswith(
            f"({opened['credit']['link']}), {opened['credit']['licence']}"
        )
        shown = Image.open(io.BytesIO(client.get(f"/gallery/{number}/pixels").content))
        assert shown.size == (opened["width"], opened["height"]) and min(shown.size) > 200
        own = load_image(PHOTOGRAPHS / f"{number - status['scenes']}.jpg")
        np.testing.assert_array_equal(np.asarray(shown), own)
        pixels.add(own.tobytes())
    assert len(pixels) == 6
    assert client.post("/gallery/2", json={}).json()["credit"] is None
    assert client.post(f"/gallery/{status['scenes'] + 6}", json={}).status_code == 422


def test_unused_pictures_are_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    held, now = Pictures(5, idle_s=10), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for name in ("a", "b"):
        held.add(Held(name, None, None, pixels(), np.zeros((0, 40, 56), bool), [], (56, 40), True, used=now[0]))  # type: ignore[arg-type]
    now[0] = 108.0
    assert held.find("a") is not None
    now[0] = 115.0
    assert held.find("b") is None and held.find("a") is not None and len(held) == 1


def test_pictures_are_upright_scaled_and_in_srgb(client: TestClient) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = upload(client, encoded(pixels(height=40, width=56), "JPEG", exif=exif), "image/jpeg").json()
    assert (turned["width"], turned["height"], turned["scaled_from"]) == (40, 56, None)
    large = upload(client, encoded(np.zeros((3000, 4000, 3), np.uint8), "JPEG"), "image/jpeg").json()
    assert (large["width"], large["height"]) == (MAX_SIDE, MAX_SIDE * 3 // 4)
    assert large["scaled_from"] == {"width": 4000, "height": 3000}
    shown = Image.open(io.BytesIO(client.get(f"/images/{large['image']}/pixels").content))
    assert shown.size == (large["width"], large["height"])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    same = read_picture(encoded(pixels(), icc_profile=profile.tobytes())).pixels
    assert np.abs(same.astype(int) - pixels()).max() <= 2
    assert (read_picture(encoded(pixels(), icc_profile=b"no profile")).pixels == pixels()).all()


def test_requests_for_one_picture_are_answered_together(client: TestClient, speaker: GrexModel) -> None:
    """While the model is busy, ten people ask about one picture: one pass answers all, each gets its own."""
    rooms = client.app.app.state.rooms  # type: ignore[attr-defined]
    image, busy = opened(client)["image"], threading.Event()
    blocker = rooms.worker.submit(None, lambda jobs: [busy.wait(30)], None)
    texts = [f"{word} circle {n}" for n in range(5) for word in ("the red", "a blue")]

    def ask(n: int) -> Any:
        return client.post("/ground", json={"image": image, "expressions": [texts[n]], "ticket": f"t{n}"}).json()

    while rooms.worker.waiting:  # until the model is busy
        time.sleep(0.005)
    before = rooms.worker.passes
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(ask, n) for n in range(10)]
        deadline = time.monotonic() + 20
        while rooms.worker.waiting < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        places = sorted(client.get("/queue", params={"ticket": f"t{n}"}).json()["before"] for n in range(10))
        assert places == list(range(1, 11)) and client.get("/queue", params={"ticket": "other"}).json()["before"] is None
        busy.set()
        answers = [one.result()["results"] for one in asked]
    assert blocker.result() and rooms.worker.passes == before + 1
    for n, answer in enumerate(answers):
        assert [result["expression"] for result in answer] == [texts[n]]
        assert (decode_rle(answer[0]["mask_rle"]) == speaker.ground(pixels(), texts[n]).mask).all()


def test_two_people_do_not_mix(client: TestClient, speaker: GrexModel) -> None:
    names = [opened(client, seed)["image"] for seed in range(2)]

    def ask(n: int) -> Any:
        return client.post("/ground", json={"image": names[n % 2], "expressions": ["green"]}).json()["results"][0]["mask_rle"]

    with ThreadPoolExecutor(4) as pool:
        masks = [decode_rle(code) for code in pool.map(ask, range(12))]
    for n, mask in enumerate(masks):
        assert (mask == speaker.ground(pixels(n % 2), "green").mask).all()


def test_a_late_request_is_dropped_and_a_full_line_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    line, busy = Worker(timeout_s=0.05, limit=1), threading.Event()
    first = line.submit(None, lambda jobs: [busy.wait(30)], None)
    while line.place("") is None or line.waiting:
        time.sleep(0.005)
    late = line.submit(None, lambda jobs: ["answered"], None, "late")
    with pytest.raises(LineFull):
        line.submit(None, lambda jobs: [None], None)
    time.sleep(0.1)
    busy.set()
    with pytest.raises(TimeoutError):
        late.result(timeout=10)
    assert first.result()
    broken = line.submit(None, lambda jobs: [1 / 0], None)
    with pytest.raises(ZeroDivisionError):
        broken.result(timeout=10)
    assert line.submit(None, lambda jobs: ["lives on"], None).result(timeout=10) == "lives on"
    line.stop()
    assert worker.MAX_TOGETHER > 1


def test_time_out_and_full_line_are_told(speaker: GrexModel) -> None:
    with TestClient(make_app(speaker, "tiny", timeout_s=0.3), base_url=HERE) as client:
        rooms, busy = client.app.app.state.rooms, threading.Event()  # type: ignore[attr-defined]
        rooms.worker.submit(None, lambda jobs: [busy.wait(30)], None)
        answer = upload(client, encoded(pixels()))
        assert answer.status_code == 504 and "try again" in answer.json()["error"]
        rooms.worker._limit = 0
        answer = upload(client, encoded(pixels()))
        assert answer.status_code == 503 and "in line" in answer.json()["error"]
        busy.set()


def test_an_error_of_the_server_names_no_secret(speaker: GrexModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(make_app(speaker, "tiny"), base_url=HERE, raise_server_exceptions=False) as client:
        image = opened(client)["image"]
        monkeypatch.setattr(type(speaker), "ground", lambda *given, **more: 1 / 0)
        answer = client.post("/ground", json={"image": image, "expressions": ["x"]})
        assert answer.status_code == 500 and "ZeroDivisionError" in answer.json()["error"] and "Traceback" not in answer.text
        assert client.get("/status").status_code == 200


def test_the_page_and_its_description_are_whole(client: TestClient) -> None:
    page = client.get("/").text
    for file in ("page.css", "page.js"):
        assert f"/page/{file}" in page and client.get(f"/page/{file}").status_code == 200
    assert client.get("/docs").status_code == 200 and client.get("/page/masks.js").headers["content-type"].startswith("text/javascript")
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/ground", "/describe", "/images", "/images/{name}", "/gallery/{number}", "/queue", "/status"} <= set(paths)
    assert all(route.get("description") for methods in paths.values() for route in methods.values())


def test_nothing_is_written(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    image = opened(client)["image"]
    client.post("/ground", json={"image": image, "expressions": ["the red circle"]})
    client.post("/describe", json={"image": image, "boxes_xyxy": [[2, 3, 20, 30]]})
    assert list(tmp_path.iterdir()) == []
