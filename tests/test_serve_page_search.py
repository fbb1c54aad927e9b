"""The search bar of the page of `grex serve`: tiles with masks, a click opens an image, and no bar without a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model

from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import decode_rle

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")
pytest.importorskip("playwright", reason="needs the extra dev (playwright)")

from browsing import LIMIT_MS, Running, quiet, visit
from playwright.sync_api import Browser, Page, expect
from test_search import scenes
from test_serve_page import SECRET

from grex_mllm.search import SearchIndex, open_index
from grex_mllm.serve.app import make_app
from grex_mllm.serve.folder import Folder, id_of

pytestmark = pytest.mark.long
TEXT = "the red circle on the left"
PHONE = {"viewport": {"width": 375, "height": 700}, "color_scheme": "dark", "has_touch": True, "device_scale_factor": 2}


@pytest.fixture(scope="module")
def model() -> GrexModel:
    return tiny_model()


@pytest.fixture(scope="module")
def index(model: GrexModel, tmp_path_factory: pytest.TempPathFactory) -> SearchIndex:
    return open_index(model, scenes(tmp_path_factory.mktemp("searched") / "images", 14))


@pytest.fixture(scope="module")
def served(model: GrexModel, index: SearchIndex) -> Iterator[Running]:
    with Running(make_app(model, "tiny", folder=Folder(index))) as running:
        yield running


def search(page: Page, text: str) -> list[dict[str, Any]]:
    """Search, wait until all masks are drawn, and return what the server answered."""
    with page.expect_response(lambda answer: answer.url.endswith("/search") and "masks" not in answer.request.post_data_json) as seen:
        page.fill("#query", text)
        page.press("#query", "Enter")
    results = seen.value.json()["results"]
    expect(page.locator(".tile")).to_have_count(len(results))
    expect(page.locator(".tile").last.locator(".how")).not_to_be_empty()
    return results


def wait_for_pixels(page: Page) -> None:
    """Wait until every tile shows pixels."""
    program = """canvases => canvases.every((canvas) => canvas.width > 8
        && canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some((value, i) => i % 4 < 3 && value))"""
    deadline = time.monotonic() + LIMIT_MS / 1000
    while not page.locator(".tile canvas").evaluate_all(program):
        assert time.monotonic() < deadline, "a tile stays empty"
        page.wait_for_timeout(50)


def test_a_search_and_a_click_on_what_it_found(browser: Browser, served: Running, index: SearchIndex, model: GrexModel, keep: Any) -> None:
    page = visit(browser, served.url)
    assert "14 images" in str(page.locator("#query").get_attribute("placeholder"))
    keep(page, "search_empty")
    results = search(page, TEXT)
    expected = index.search(TEXT, top=12)
    assert [line["file"] for line in results] == [hit.file for hit in expected]
    tiles = page.locator(".tile")
    assert [tile.locator(".name").inner_text() for tile in tiles.all()] == [hit.file for hit in expected]
    assert [tile.locator(".score").inner_text() for tile in tiles.all()] == [f"{hit.score:.2f}" for hit in expected]
    wait_for_pixels(page)
    expect(page.locator("#stage")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollHeight") <= 800, "one screen"
    keep(page, "search")
    with page.expect_response(lambda answer: answer.url.endswith("/ground")) as seen:
        tiles.nth(1).click()
    expect(page.locator("#found")).to_be_hidden()
    expect(page.locator("#rows .verdict").first).not_to_be_empty()
    assert page.locator("#rows input").first.input_value() == TEXT
    answer = seen.value.json()["results"][0]
    assert answer["mask_rle"] == results[1]["mask_rle"], "the mask is that of the tile"
    assert np.array_equal(decode_rle(answer["mask_rle"]), model.ground(index.read(expected[1].file), TEXT).mask)
    keep(page, "search_opened")
    page.click("#back-to-results")
    expect(tiles.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(tiles.nth(1)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#stage")).to_be_visible()
    page.keyboard.press("s")
    expect(page.locator("#query")).to_be_focused()
    assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_a_found_image_comes_back_by_its_link(browser: Browser, model: GrexModel, index: SearchIndex) -> None:
    """Also from a server that does not hold it any more."""
    with Running(make_app(model, "tiny", folder=Folder(index))) as running:
        page = visit(browser, running.url)
        results = search(page, TEXT)
        assert page.url.endswith(f"#q={TEXT.replace(' ', '%20')}")
        again = visit(browser, page.url)
        expect(again.locator(".tile")).to_have_count(len(results))
        page.locator(".tile").first.click()
        expect(page.locator("#rows .verdict").first).not_to_be_empty()
        link = page.url.split("#")[1]
        assert f"from={results[0]['id']}" in link and "q=" not in link
    with Running(make_app(model, "tiny", folder=Folder(index))) as running:
        other = visit(browser, f"{running.url}#{link}")
        expect(other.locator("#rows .verdict").first).not_to_be_empty()
        assert other.locator("#rows input").first.input_value() == TEXT and quiet(other)
        odd = visit(browser, f"{running.url}#image=nothing&from=nothing")
        expect(odd.locator(".note").last).to_contain_text("Search again")
        assert quiet(page) and quiet(other) and quiet(again) and quiet(odd)


def test_a_phone_in_the_dark(browser: Browser, served: Running, keep: Any) -> None:
    page = visit(browser, served.url, **PHONE)
    search(page, TEXT)
    wait_for_pixels(page)
    keep(page, "search_phone_dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    first, second, third = (page.locator(".tile").nth(n).bounding_box() for n in range(3))
    assert first["y"] == second["y"] < third["y"] and first["width"] > 150, "two in a row"  # type: ignore[index]
    page.locator(".tile").first.tap()
    expect(page.locator("#rows .verdict").first).not_to_be_empty()
    assert page.locator("#picture").bounding_box()["height"] > 100  # type: ignore[index]
    keep(page, "search_opened_phone_dark")
    wide = visit(browser, served.url, color_scheme="dark")
    search(wide, TEXT)
    wait_for_pixels(wide)
    keep(wide, "search_dark")
    assert quiet(page) and quiet(wide)


def test_what_cannot_be_found_is_told(browser: Browser, model: GrexModel, tmp_path: Path, keep: Any) -> None:
    index = open_index(model, scenes(tmp_path / "images", 4))
    with Running(make_app(model, "tiny", folder=Folder(index))) as running:
        page = visit(browser, running.url)
        page.fill("#query", "   ")
        page.press("#query", "Enter")
        expect(page.locator(".note").last).to_contain_text("Type what the images shall contain")
        usual, model.config.predict.no_target_threshold = model.config.predict.no_target_threshold, 0.0
        script = "<script>alert(1)</script><img src=x onerror=alert(2)>"
        page.fill("#query", script)
        page.press("#query", "Enter")
        expect(page.locator("#told")).to_contain_text(f"In no image of 4 found “{script}”", use_inner_text=True)
        model.config.predict.no_target_threshold = usual
        assert page.locator("#found script, #found img").count() == 0
        gone = index.search(TEXT, top=3)[0].file
        (index.images / gone).unlink()
        page.fill("#query", TEXT)
        page.press("#query", "Enter")
        broken = page.locator(f'.tile[data-id="{id_of(gone)}"]')
        expect(broken).to_have_class("tile broken")
        expect(broken.locator(".how")).not_to_be_empty()
        expect(page.locator(".tile").nth(1).locator(".how")).to_contain_text("object")
        broken.click()
        expect(page.locator(".note").last).to_be_visible()
        assert str(index.images) not in page.locator("body").inner_text()
        keep(page, "search_broken")
        page.route("**/search", lambda route: route.fulfill(status=504, body=json.dumps({"error": "no answer; expected one; try again"})))
        page.fill("#query", "green")
        page.press("#query", "Enter")
        expect(page.locator(".note").last).to_contain_text("Try again")
        expect(page.locator("#found")).to_be_hidden()
        assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_without_a_folder_there_is_no_field(browser: Browser, model: GrexModel) -> None:
    with Running(make_app(model, "tiny")) as running:
        page = visit(browser, f"{running.url}#q=the%20red%20circle")
        expect(page.locator("#search")).to_be_hidden()
        page.keyboard.press("s")
        assert page.evaluate("document.activeElement === document.body") and quiet(page)


def test_the_token_covers_the_search(browser: Browser, model: GrexModel, index: SearchIndex) -> None:
    with Running(make_app(model, "tiny", token=SECRET, folder=Folder(index))) as running:
        page = browser.new_context().new_page()
        assert page.request.get(f"{running.url}search/{id_of(index.files[0])}/pixels").status == 401
        page.goto(running.url)
        page.fill("#token", SECRET)
        page.click("#login .main")
        page.wait_for_selector("#search:not([hidden])")
        search(page, TEXT)
        wait_for_pixels(page)
