"""`POST /search` of `grex serve`: the ranking of `grex search` with masks over HTTP, by ids, never by paths."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import decode_rle

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")

from starlette.testclient import TestClient
from test_search import scenes
from test_serve import HERE, opened

from grex_mllm.search import SearchIndex, open_index
from grex_mllm.serve.app import make_app
from grex_mllm.serve.command import serve
from grex_mllm.serve.folder import Folder, id_of
from grex_mllm.serve.limits import MAX_FOUND, MAX_SIDE

TEXT = "the red circle on the left"


@pytest.fixture(scope="module")
def model() -> GrexModel:
    return tiny_model()


@pytest.fixture(scope="module")
def index(model: GrexModel, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    return open_index(model, scenes(tmp_path_factory.mktemp("searched") / "images", 7))


@pytest.fixture(scope="module")
def client(model: GrexModel, index: SearchIndex) -> Iterator[TestClient]:
    with TestClient(make_app(model, "tiny", folder=Folder(index)), base_url=HERE) as made:
        yield made


def asked(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/search", json={"expression": TEXT, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_ranking_is_that_of_the_index_and_masks_those_of_the_model(client: TestClient, index: SearchIndex) -> None:
    found = asked(client, top=5)
    expected = index.search(TEXT, top=5)
    assert [line["file"] for line in found["results"]] == [hit.file for hit in expected] and len(expected) == 5
    assert [line["rank"] for line in found["results"]] == [1, 2, 3, 4, 5] and found["num_images"] == len(index) == 7
    assert found["num_found"] == len(index.search(TEXT, top=100))
    for line, hit in zip(found["results"], expected, strict=True):
        own = index.ground(hit.file, TEXT)
        assert line["score"] == pytest.approx(hit.score, abs=1e-4) and line["id"] == id_of(hit.file)
        assert (decode_rle(line["mask_rle"]) == own.mask).all() and line["mask_pixels"] == own.mask.sum()
        shown = Image.open(io.BytesIO(client.get(f"/search/{line['id']}/pixels").content))
        assert (np.asarray(shown) == index.read(hit.file)).all() and shown.size == (line["width"], line["height"])
    assert any(line["mask_pixels"] for line in found["results"])
    assert client.get("/search").json() == {"num_images": 7}


@pytest.mark.parametrize(("side", "size"), [("", (64, 64)), ("?side=32", (32, 32)), ("?side=1000", (64, 64))])
def test_pixels_come_at_the_size_that_a_tile_needs(client: TestClient, index: SearchIndex, side: str, size: tuple[int, int]) -> None:
    assert Image.open(io.BytesIO(client.get(f"/search/{id_of(index.files[0])}/pixels{side}").content)).size == size


@pytest.mark.parametrize("side", ["0", "15", str(MAX_SIDE + 1), "-5", "x", "1e9", "nan", ""])
def test_a_wrong_size_is_told(client: TestClient, index: SearchIndex, side: str) -> None:
    answer = client.get(f"/search/{id_of(index.files[0])}/pixels?side={side}")
    assert answer.status_code == 422 and "side" in answer.json()["error"]


def test_the_token_covers_the_search_and_a_page_of_elsewhere_gets_nothing(model: GrexModel, index: SearchIndex) -> None:
    name, secret = id_of(index.files[0]), "0123456789abcdef-a-long-token"
    asks = [("GET", "/search", None), ("POST", "/search", {"expression": TEXT}), ("GET", f"/search/{name}/pixels?side=64", None),
            ("POST", f"/search/{name}", {})]  # fmt: skip
    with TestClient(make_app(model, "tiny", folder=Folder(index), token=secret, loopback=False), base_url="http://m.example") as client:
        for given, status in (({}, 401), ({"authorization": f"Bearer {secret}"}, 200)):
            assert [client.request(how, path, json=body, headers=given).status_code for how, path, body in asks] == [status] * 4
        foreign = {"authorization": f"Bearer {secret}", "origin": "http://evil.example"}
        assert [client.request(how, path, json=body, headers=foreign).status_code for how, path, body in asks] == [403] * 4


def test_the_page_is_told_whether_there_is_a_search(client: TestClient, model: GrexModel) -> None:
    assert client.get("/status").json()["searches"] == 7 and client.get("/page/search.js").status_code == 200
    with TestClient(make_app(model, "tiny"), base_url=HERE) as other:
        assert other.get("/status").json()["searches"] is None


def test_scores_alone_cost_no_mask(client: TestClient, index: SearchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    with_masks = asked(client, top=3)["results"]
    monkeypatch.setattr(GrexModel, "ground", lambda *_: pytest.fail("an image was grounded"))
    lines = asked(client, top=3, masks=False)["results"]
    assert lines == [{name: line[name] for name in lines[0]} for line in with_masks] and "mask_rle" not in lines[0]


def test_a_found_image_is_opened_like_an_upload(client: TestClient, model: GrexModel, index: SearchIndex) -> None:
    line = asked(client, top=1)["results"][0]
    held = client.post(f"/search/{line['id']}", json={}).json()
    assert len(held["image"]) >= 20 and held["image"] != line["id"] and {"objects", "proposes"} <= set(held)
    answer = client.post("/ground", json={"image": held["image"], "expressions": [TEXT]}).json()["results"][0]
    assert answer["mask_rle"] == line["mask_rle"]
    assert opened(client)["image"] != held["image"]


@pytest.mark.parametrize(
    "name", ["0", "..%2F..%2Fsecret.png", "below%2F0.png", "..", "below/0.png", "%00", "x" * 5000, "scene-0", "*", "1.png"]
)
def test_images_have_ids_and_no_paths(client: TestClient, index: SearchIndex, name: str) -> None:
    (index.images.parent / "secret.png").write_bytes((index.images / "1.png").read_bytes())
    for answer in (client.get(f"/search/{name}/pixels"), client.post(f"/search/{name}", json={})):
        assert answer.status_code in (404, 405) and b"PNG" not in answer.content


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"top": 0}, "top"),
        ({"top": MAX_FOUND + 1}, "top"),
        ({"expression": ""}, "expression"),
        ({"expression": "x" * 10_001}, "expression"),
        ({"expression": "a\x00b"}, "control"),
        ({"expression": ["a"]}, "expression"),
        ({"images": "/etc"}, "images"),
        ({"index": "elsewhere"}, "index"),
    ],
)
def test_wrong_questions_are_told(client: TestClient, fields: dict[str, Any], told: str) -> None:
    answer = client.post("/search", json={"expression": TEXT, **fields})
    assert answer.status_code == 422 and told in answer.json()["error"]


def test_an_image_that_changed_meanwhile_is_told_and_the_rest_goes_on(model: GrexModel, tmp_path: Path) -> None:
    index = open_index(model, scenes(tmp_path / "images", 4))
    files = [hit.file for hit in index.search(TEXT, top=3)]
    (index.images / files[0]).write_bytes(b"no image")
    (index.images / files[1]).unlink()
    with TestClient(make_app(model, "tiny", folder=Folder(index)), base_url=HERE) as client:
        first, second, third = asked(client, top=3)["results"]
        assert "error" in first and "error" in second and "mask_rle" in third
        assert [client.get(f"/search/{line['id']}/pixels").status_code for line in (first, second, third)] == [422, 422, 200]
    assert str(index.images) not in str([first, second])


def test_large_images_are_scaled_as_uploads_are(model: GrexModel, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    Image.new("RGB", (2000, 1000), (90, 120, 60)).save(tmp_path / "large" / "a.png")
    folder = Folder(open_index(model, tmp_path / "large"))
    line = folder.ground(id_of("a.png"), TEXT)
    assert (line["width"], line["height"]) == (MAX_SIDE, MAX_SIDE // 2) and line["mask_rle"]["size"] == [MAX_SIDE // 2, MAX_SIDE]


def test_without_a_folder_nothing_is_searched(model: GrexModel, tmp_path: Path) -> None:
    with TestClient(make_app(model, "tiny"), base_url=HERE) as client:
        answers = [client.get("/search"), client.post("/search", json={"expression": TEXT}), client.get("/search/0/pixels")]
        assert [answer.status_code for answer in answers] == [404] * 3 and "--images" in answers[0].json()["error"]
        assert {"/search", "/search/{name}"} <= set(client.get("/openapi.json").json()["paths"])
    with pytest.raises(GrexError, match="without --images"):
        serve("none", index=str(tmp_path))
    with pytest.raises(GrexError, match="no folder"):
        serve("none", images=str(tmp_path / "none"))
