"""What `grex serve` refuses, each tried: hostile files, foreign pages, wrong types, oversized and malformed bodies, missing tokens."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_model

from grex_mllm.errors import GrexError

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")

from starlette.testclient import TestClient
from test_serve import HERE, encoded, opened, pixels, upload

from grex_mllm.serve import guard
from grex_mllm.serve.app import make_app
from grex_mllm.serve.command import bind, checked_token, is_loopback, serve
from grex_mllm.serve.limits import MAX_JSON_BYTES, MAX_UPLOAD_BYTES, TOKEN_VARIABLE

SECRET = "0123456789abcdef-a-long-token"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app(tiny_model(), "tiny"), base_url=HERE) as made:
        yield made


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(pixels(seed)) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
FILES = {
    "svg": (SVG, "SVG"),
    "svg after white space": (b"\xef\xbb\xbf\n  <svg></svg>", "SVG"),
    "html": (b"<html><script>alert(1)</script>", "SVG"),
    "gif": (animated("GIF"), "GIF"),
    "animated png": (animated("PNG"), "animation"),
    "animated webp": (animated("WEBP"), "animation"),
    "bomb": (bomb(60_000, 60_000), "pixels"),
    "large": (bomb(6_000, 5_000), "6000x5000"),
    "cut off": (encoded(pixels())[:900], "no whole picture"),
    "tiff": (encoded(pixels(), "TIFF"), "no whole picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no whole picture"),
    "zeros": (b"\0" * 5000, "no whole picture"),
    "nothing": (b"", "no whole picture"),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_files_are_refused(client: TestClient, name: str) -> None:
    data, told = FILES[name]
    answer = upload(client, data)
    assert answer.status_code == 422 and told in answer.json()["error"] and "expected" in answer.json()["error"]


def test_a_photograph_with_a_second_view_is_no_animation(client: TestClient) -> None:
    data = io.BytesIO()
    views = [Image.fromarray(pixels(seed)) for seed in range(2)]
    views[0].save(data, format="MPO", save_all=True, append_images=views[1:])
    assert upload(client, data.getvalue(), "image/jpeg").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:8000"}, 421),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "image/svg+xml"}, 415),
        ({"content-type": "image/png"}, 422),
        ({"origin": HERE, "sec-fetch-site": "same-origin"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
    ],
)
def test_only_the_own_page_may_ask(client: TestClient, headers: dict[str, str], status: int) -> None:
    name = opened(client)["image"]
    body = json.dumps({"image": name, "expressions": ["x"]})
    answer = client.post("/ground", content=body, headers={"content-type": "application/json", **headers})
    assert answer.status_code == status and (status == 200 or "expected" in answer.json()["error"])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 30_000, 400),
        (b"\xff\xfe", 400),
        (b'{"image": "' + b"x" * MAX_JSON_BYTES + b'"}', 413),
        (b"[]", 422),
        (b'{"image": "scene-0", "expressions": []}', 422),
        (b'{"image": "scene-0", "expressions": ["x"], "more": 1}', 422),
        (json.dumps({"image": "scene-0", "expressions": ["x" * 10_000]}).encode(), 422),
        (json.dumps({"image": "scene-0", "expressions": ["x"] * 33}).encode(), 422),
        (json.dumps({"image": "scene-0", "expressions": ["  "]}).encode(), 422),
        (json.dumps({"image": "scene-0", "expressions": ["a\x00b"]}).encode(), 422),
        (b'{"image": "scene-0", "expressions": ["\\ud800"]}', 422),
        (b'{"image": "scene-0", "expressions": ["x"], "threshold": NaN}', 422),
        (b'{"image": "../../etc/passwd", "expressions": ["x"]}', 404),
        (b'{"image": "scene-99", "expressions": ["x"]}', 422),
        (b'{"image": "scene-0", "expressions": ["x"], "threshold": 2}', 422),
    ],
)
def test_malformed_bodies_are_refused(client: TestClient, body: bytes, status: int) -> None:
    answer = client.post("/ground", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and "expected" in answer.json()["error"] and len(answer.text) < 600, answer.text


def test_long_expressions_are_refused_politely(client: TestClient) -> None:
    answer = client.post("/ground", json={"image": "scene-0", "expressions": ["x" * 10_000]})
    assert "10,000 characters; expected at most 1,000; shorten it" in answer.json()["error"]


def test_letters_of_all_scripts_are_taken(client: TestClient) -> None:
    text = "le chien\u00a0noir, می\u200cخواهم, 两个红圈, 👩\u200d🚀"
    answer = client.post("/ground", json={"image": "scene-0", "expressions": [text]})
    assert answer.json()["results"][0]["expression"] == text


def test_script_is_text(client: TestClient) -> None:
    """JSON alone carries an expression back, and no browser takes it for a page (the page itself: tests/test_serve_page.py)."""
    text = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    answer = client.post("/ground", json={"image": "scene-0", "expressions": [text]})
    assert answer.json()["results"][0]["expression"] == text
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-content-type-options"] == "nosniff"
    page = client.get("/")
    rules = dict(rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'none'" and rules["script-src"] == "'self'" and rules["frame-ancestors"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"] and page.headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in answer.headers and answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page/%2fetc%2fpasswd", "/page/app.py", "/images/..%2f..%2fx", "/x"],
)
def test_no_path_leads_out(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404 and "import" not in answer.text and "root:" not in answer.text


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client: TestClient, method: str) -> None:
    assert client.request(method, "/ground").status_code == 405


def test_large_uploads_are_refused_before_they_are_read(client: TestClient) -> None:
    answer = upload(client, b"x" * (MAX_UPLOAD_BYTES + 1))
    assert answer.status_code == 413 and "smaller picture" in answer.json()["error"]

    def parts() -> Iterator[bytes]:
        for _ in range(MAX_UPLOAD_BYTES // 1_000_000 + 2):
            yield b"x" * 1_000_000

    answer = client.post("/images", content=parts(), headers={"content-type": "image/png"})  # of no announced length
    assert answer.status_code == 413


def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.05)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost:8000"), (b"content-type", b"image/png")]
    scope = {"type": "http", "method": "POST", "path": "/images", "headers": headers}
    asyncio.run(guard.Guard(lambda *given: pytest.fail("it must not get there"), None, True)(scope, receive, send))
    assert sent[0]["status"] == 408


def test_beyond_loopback_a_token_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert checked_token("127.0.0.1") is None and checked_token("::1") is None and checked_token("localhost") is None
    for host in ("0.0.0.0", "192.168.1.7", "example.org", "::"):
        assert not is_loopback(host)
        with pytest.raises(GrexError, match="token"):
            checked_token(host)
    with pytest.raises(GrexError, match="set GREX_SERVE_TOKEN"):
        serve("nowhere", host="0.0.0.0", port=0)
    for poor in ("short", "with spaces in it and long", "ü" * 20):
        monkeypatch.setenv(TOKEN_VARIABLE, poor)
        with pytest.raises(GrexError, match="at least 16"):
            checked_token("127.0.0.1")
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    assert checked_token("0.0.0.0") == SECRET


def test_the_token_opens_everything_and_its_lack_only_the_page() -> None:
    with TestClient(make_app(tiny_model(), "tiny", token=SECRET, loopback=False), base_url="http://models.example") as client:
        assert [client.get(path).status_code for path in ("/", "/docs", "/page/page.js")] == [200, 200, 200]
        for path in ("/status", "/openapi.json", "/gallery/0/pixels", "/images/scene-0"):
            assert client.get(path).status_code == 401
            for wrong in (SECRET[:-1], "", "ü"):
                assert client.get(path, headers={"authorization": f"Bearer {wrong}".encode("latin-1")}).status_code == 401
            assert client.get(path, headers={"authorization": f"Bearer {SECRET}"}).status_code == 200
        assert client.post("/gallery/0", json={}).status_code == 401


def test_what_cannot_work_is_told_before_a_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(GrexError, match="a free port"):
            serve("nowhere", port=taken.getsockname()[1])
    for wrong in ({"pictures": 0}, {"timeout_s": -1.0}, {"port": 99_999_999}):
        with pytest.raises(GrexError, match="expected"):
            serve("nowhere", **wrong)  # type: ignore[arg-type]
    with pytest.raises(GrexError, match="model folder"):
        serve("./nowhere", port=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GrexError, match=r"pip install 'grex-mllm\[serve\]'"):
        serve("nowhere")
