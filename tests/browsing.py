"""A visitor with a headless browser before a running server, for the tests of the page of `grex serve`."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import uvicorn
from playwright.sync_api import Browser, Page, expect

from grex_mllm.ops.masks import decode_rle
from grex_mllm.serve.app import App
from grex_mllm.serve.command import bind

LIMIT_MS = 30_000


class Running:
    """An application behind a port of this machine, in a thread."""

    def __init__(self, app: App) -> None:
        self.listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *of: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)


def visit(browser: Browser, url: str, **options: Any) -> Page:
    """Open the page as a new visitor. A script error, or a request beyond the origin, fails the test at its end (`quiet`)."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "accept_downloads": True, **options})
    context.set_default_timeout(LIMIT_MS)
    page = context.new_page()
    page.faults = []  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.faults.append(f"{error}"))  # type: ignore[attr-defined]
    page.on("dialog", lambda dialog: page.faults.append(f"dialog {dialog.message}"))  # type: ignore[attr-defined]
    origin = "/".join(url.split("/")[:3])
    inside = (origin, "blob:", "data:")
    page.on("request", lambda request: request.url.startswith(inside) or page.faults.append(request.url))  # type: ignore[attr-defined]
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    return page


def quiet(page: Page) -> bool:
    return page.faults == []  # type: ignore[attr-defined]


def give(page: Page, data: bytes, name: str = "own.png", kind: str = "image/png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def open_picture(page: Page, data: bytes, name: str = "own.png", kind: str = "image/png") -> str:
    """Upload a picture and return its id."""
    with page.expect_response(lambda answer: answer.url.endswith("/pixels") and "/images/" in answer.url) as seen:
        give(page, data, name, kind)
    page.wait_for_selector("#stage.full")
    return seen.value.url.split("/")[-2]


def find(page: Page, text: str) -> str:
    """Type an expression and return what the page says of it."""
    page.fill("#new", text)
    page.press("#new", "Enter")
    said = page.locator("#rows li:not(.new) .verdict").last
    expect(said).not_to_be_empty(timeout=LIMIT_MS)
    return said.inner_text()


def at(page: Page, x: float, y: float, width: int, height: int) -> tuple[float, float]:
    """Return where a pixel of the picture is shown."""
    box = page.locator("#picture").bounding_box()
    assert box is not None
    return box["x"] + (x + 0.5) / width * box["width"], box["y"] + (y + 0.5) / height * box["height"]


def clickable(objects: list[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """Return a pixel (x, y) of every object that shows somewhere: the smallest object of a pixel is hit."""
    masks = [decode_rle(item["mask_rle"]) for item in objects]
    order = sorted(range(len(masks)), key=lambda n: -masks[n].sum())
    top = np.full(masks[0].shape, -1)
    for n in order:
        top[masks[n]] = n
    return {n: (int(x[0]), int(y[0])) for n in range(len(masks)) for y, x in [np.nonzero(top == n)] if len(x)}
