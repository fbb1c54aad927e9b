"""The page of `grex serve` in a headless browser, in front of a tiny random model: what a visitor does, from a picture to a link."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_speaker

from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import decode_rle

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")
pytest.importorskip("playwright", reason="needs the extra dev (playwright)")

from browsing import Running, at, clickable, find, give, open_picture, quiet, visit
from playwright.sync_api import Browser, Page, expect
from test_segmenters import write_sam
from test_serve import encoded, pixels
from test_serve_segmenter import blind_speaker, clicks

from grex_mllm.serve.app import make_app
from grex_mllm.zeroshot.segmenters import Prompted

pytestmark = pytest.mark.long
SECRET = "0123456789abcdef-a-long-token"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> GrexModel:
    return tiny_speaker(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def served(speaker: GrexModel) -> Iterator[Running]:
    with Running(make_app(speaker, "tiny")) as running:
        yield running


def test_a_visit(browser: Browser, served: Running, speaker: GrexModel, tmp_path: Path, keep: Any) -> None:
    page = visit(browser, served.url)
    keep(page, "empty")
    image = open_picture(page, encoded(pixels(3, 48, 64)))
    assert "object" in find(page, "the red circle on the left")
    speaker.config.predict.no_target_threshold, usual = 0.0, speaker.config.predict.no_target_threshold
    assert "Nothing here" in find(page, "a green star") and "%" in page.locator("#rows .verdict").nth(1).inner_text()
    speaker.config.predict.no_target_threshold = usual
    objects = page.request.get(f"{served.url}images/{image}").json()["objects"]
    places = list(clickable(objects).items())
    assert len(places) >= 2
    for n, place in places[:2]:
        page.mouse.move(*at(page, *place, 64, 48))
        assert page.locator("#objects button").nth(n).get_attribute("class") == "lit"
        page.mouse.click(*at(page, *place, 64, 48))
        expect(page.locator("#objects button").nth(n)).to_have_attribute("aria-pressed", "true")
    page.mouse.move(*at(page, 5, 6, 64, 48))
    page.mouse.down()
    page.mouse.move(*at(page, 20, 20, 64, 48), steps=3)
    page.mouse.move(*at(page, 40, 30, 64, 48))
    page.mouse.up()
    expect(page.get_by_role("button", name="Remove box 1")).to_be_visible()
    page.wait_for_selector("#candidates button")
    expect(page.locator("#back")).to_contain_text("Leads")
    keep(page, "described")
    page.fill("#said", "two blue squares and a star")
    with page.expect_response(lambda answer: answer.url.endswith("/ground")) as again:
        page.wait_for_timeout(600)
    assert again.value.json()["results"][0]["expression"] == "two blue squares and a star"
    expect(page.locator("#back")).to_contain_text("Leads")
    _take_along(page, tmp_path, places, image)
    page.keyboard.press("Escape")  # leaves the field
    page.keyboard.press("Escape")
    expect(page.locator("#answer")).to_be_hidden()
    assert quiet(page), page.faults  # type: ignore[attr-defined]


def _take_along(page: Page, tmp_path: Path, places: list[Any], image: str) -> None:
    """Download PNG and COCO, copy JSON and the link, and look at what is in them."""
    from pycocotools.coco import COCO

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for button, name in (("#save-png", "a.png"), ("#save-coco", "a.json")):
        with page.expect_download() as given:
            page.click(button)
        given.value.save_as(tmp_path / name)
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (64 * 12, 48 * 12)
    coco = COCO(tmp_path / "a.json")
    assert [entry["name"] for entry in coco.loadCats(coco.getCatIds())] == [
        "the red circle on the left", "a green star", "two blue squares and a star",
    ]  # fmt: skip
    annotations = coco.loadAnns(coco.getAnnIds())
    assert [entry["category_id"] for entry in annotations] == [1, 3]
    for entry in annotations:
        mask = coco.annToMask(entry)
        rows, columns = np.nonzero(mask)
        assert mask.sum() == entry["area"] and entry["bbox"][:2] == [columns.min(), rows.min()]
    page.click("#copy-json")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert [result["expression"] for result in copied["results"]] == ["the red circle on the left", "a green star"]
    assert sorted(copied["described"]["objects"]) == sorted(n for n, _ in places[:2]) and len(copied["described"]["boxes_xyxy"]) == 1
    page.click("#copy-link")
    link = page.evaluate("navigator.clipboard.readText()")
    assert f"image={image}" in link and "e=a%20green%20star" in link


def test_a_conversation(browser: Browser, served: Running, keep: Any) -> None:
    """A follow-up refers to the selected set, which is shown; editing, removing, clearing and a link keep what refers to what."""
    page, sent = visit(browser, served.url), []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url.endswith("/ground") else None)
    open_picture(page, encoded(pixels(3, 48, 64)))
    expect(page.locator("#selected")).to_be_hidden()
    find(page, "the red circle on the left")
    expect(page.locator("#selected")).to_contain_text("the red circle on the left")
    find(page, "and the star too")
    verdicts = page.locator("#rows .verdict")
    expect(verdicts.nth(1)).to_contain_text("added to “the red circle on the left”")
    expect(page.locator("#selected")).to_contain_text("the red circle on the left › and the star too")
    assert [body.get("history") for body in sent] == [None, ["the red circle on the left"]]
    page.get_by_role("button", name="the others", exact=True).click()
    expect(verdicts.nth(2)).to_contain_text("other than “and the star too”")
    assert sent[-1]["history"] == ["the red circle on the left", "and the star too"]
    assert page.locator("#panel").evaluate("panel => panel.scrollWidth <= panel.clientWidth"), "nothing is cut off"
    keep(page, "conversation")
    page.locator("#rows input").first.fill("green")
    page.locator("#rows input").first.press("Enter")
    expect(verdicts.nth(1)).to_contain_text("added to “green”")
    assert [body.get("history") for body in sent[3:]] == [None, ["green"], ["green", "and the star too"]]
    assert "e=green&f=and%20the%20star%20too&f=the%20others" in page.url
    page.locator("#rows .remove").nth(2).click()
    page.reload()
    expect(page.locator("#selected")).to_contain_text("green › and the star too")
    page.click("#forget")
    expect(page.locator("#selected")).to_be_hidden()
    find(page, "the others")
    assert "history" not in sent[-1] and page.url.endswith("&e=the%20others"), "after clearing it refers to nothing"
    assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_two_users_of_one_scene_have_a_conversation_each(browser: Browser, served: Running) -> None:
    pages = [visit(browser, f"{served.url}#image=scene-2&e={text}") for text in ("the%20red%20circle", "green")]
    for page in pages:
        expect(page.locator("#selected")).to_be_visible()
    for page, before in zip(pages, ("the red circle", "green"), strict=True):
        find(page, "and the star too")
        expect(page.locator("#selected")).to_contain_text(f"{before} › and the star too")
        assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_a_link_restores_the_state(browser: Browser, served: Running, keep: Any) -> None:
    page = visit(browser, served.url)
    image = open_picture(page, encoded(pixels(5, 40, 40)))
    find(page, "green & blue #1?")
    page.locator("#objects button").first.click()
    page.wait_for_selector("#candidates button")
    link = page.url
    page.reload()
    page.wait_for_selector("#candidates button")
    other = visit(browser, link)
    other.wait_for_selector("#candidates button")
    for one in (page, other):
        assert one.locator("#rows li:not(.new) input").first.input_value() == "green & blue #1?"
        assert one.locator("#objects button").first.get_attribute("aria-pressed") == "true"
        assert quiet(one), one.faults  # type: ignore[attr-defined]
    gone = visit(browser, link.replace(image, "x" * len(image)))
    expect(gone.locator(".note")).to_contain_text("Open it again")
    scene = visit(browser, f"{served.url}#image=scene-4&e=people%20in%20white")
    expect(scene.locator("#rows .verdict").first).not_to_be_empty()
    assert scene.locator("#gallery button").nth(4).get_attribute("aria-pressed") == "true"
    expect(scene.locator("#credit")).to_be_hidden()
    scene.get_by_role("button", name="Photograph 5").click()
    expect(scene.locator("#credit a")).to_have_attribute("href", re.compile(r"^http://farm\d\.staticflickr\.com/"))
    expect(scene.locator("#credit")).to_contain_text("CC BY 2.0")
    scene.get_by_role("button", name="the cat").click()
    expect(scene.locator("#rows .verdict").first).not_to_be_empty()
    keep(scene, "photograph")
    assert quiet(scene), scene.faults  # type: ignore[attr-defined]


def test_clicks_where_the_model_proposes_nothing(browser: Browser, tmp_path: Path, keep: Any) -> None:
    """A segmenter makes objects of two clicks; one is taken back, and a link brings the other again."""
    from grex_mllm.zeroshot.base import Picture

    segmenter = Prompted(str(write_sam(tmp_path / "sam")), "cpu")
    points = clicks(segmenter, 2)
    with Running(make_app(blind_speaker(tmp_path), "blind", segmenter=segmenter)) as running:
        page = visit(browser, running.url)
        open_picture(page, encoded(pixels()))
        expect(page.locator("#hint")).to_contain_text("Click objects")
        for n, (x, y) in enumerate(points, start=1):
            page.mouse.click(*at(page, x - 0.5, y - 0.5, 56, 40))
            expect(page.get_by_role("button", name=f"Remove click {n}")).to_be_visible()
        page.wait_for_selector("#candidates button")
        keep(page, "clicked")
        with page.expect_response(lambda answer: answer.url.endswith("/describe")) as again:
            page.get_by_role("button", name="Remove click 2").click()
        masks = [decode_rle(code) for code in again.value.json()["masks_rle"]]
        sent = again.value.request.post_data_json["points_xy"]
        assert len(masks) == len(sent) == 1 and np.abs(np.subtract(sent[0], points[0])).max() < 0.5
        assert (masks[0] == segmenter.masks(Picture(pixels()), np.asarray(sent))[0]).all()
        other = visit(browser, page.url)
        other.wait_for_selector("#candidates button")
        expect(other.get_by_role("button", name="Remove click 1")).to_be_visible()
        assert quiet(page) and quiet(other), page.faults + other.faults  # type: ignore[attr-defined]


def test_wrong_files_are_told_and_the_page_goes_on(browser: Browser, served: Running, keep: Any) -> None:
    page = visit(browser, served.url)
    for data, name, kind, told in (
        (b"some text", "notes.txt", "text/plain", "PNG, JPEG or WebP"),
        (b"<svg></svg>", "drawing.svg", "image/svg+xml", "PNG, JPEG or WebP"),
        (b"<svg></svg>", "drawing.png", "image/png", "SVG"),
        (encoded(pixels())[:500], "half.png", "image/png", "no whole picture"),
        (b"x" * 25_000_000, "large.png", "image/png", "25 MB"),
    ):
        give(page, data, name, kind)
        expect(page.locator(".note").last).to_contain_text(told)
    keep(page, "wrong_file")
    open_picture(page, encoded(np.zeros((3000, 4000, 3), np.uint8), "JPEG"), "photo.jpg", "image/jpeg")
    expect(page.locator(".note").last).to_contain_text("Scaled from 4000 × 3000")
    page.fill("#new", "x" * 10_000)
    page.press("#new", "Enter")
    expect(page.locator(".note").last).to_contain_text("Shorten it")
    assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_script_is_shown_as_text(browser: Browser, served: Running) -> None:
    text = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    page = visit(browser, served.url)
    open_picture(page, encoded(pixels(2)))
    find(page, text)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.locator("#rows input").first.input_value() == text and page.locator("main script, #rows img").count() == 0
    assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_two_users_at_once(browser: Browser, served: Running) -> None:
    pages = [visit(browser, served.url) for _ in range(2)]
    names = [open_picture(page, encoded(pixels(n + 7, 40 + 8 * n, 64))) for n, page in enumerate(pages)]
    for n, page in enumerate(pages):
        page.fill("#new", f"the circle of user {n}")
    for page in pages:
        page.press("#new", "Enter")
    for n, page in enumerate(pages):
        expect(page.locator("#rows .verdict").first).not_to_be_empty()
        assert names[n] in page.url and page.locator("#picture").evaluate("canvas => canvas.height") == 40 + 8 * n
        assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_a_phone_the_dark_and_the_keyboard(browser: Browser, served: Running, keep: Any) -> None:
    options = {"viewport": {"width": 375, "height": 700}, "color_scheme": "dark", "has_touch": True, "device_scale_factor": 2}
    page = visit(browser, f"{served.url}#image=scene-1&e=the%20red%20circle&e=green&o=0,1", **options)
    page.wait_for_selector("#candidates button")
    expect(page.locator("#back")).to_contain_text("Leads")
    keep(page, "phone")
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    page.evaluate("window.scrollTo(0, 9999)")
    page.wait_for_timeout(200)
    assert page.locator("#picture").bounding_box()["y"] >= 0, "the picture stays in sight"  # type: ignore[index]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in background[4:-1].split(",")) < 150
    wide = visit(browser, f"{served.url}#image=scene-1")
    wide.locator("#stage").focus()
    wide.keyboard.press("ArrowRight")
    wide.keyboard.press("ArrowRight")
    wide.keyboard.press("Enter")
    assert wide.locator("#objects button").nth(1).get_attribute("aria-pressed") == "true"
    wide.keyboard.press("Escape")
    assert wide.locator("#objects button[aria-pressed=true]").count() == 0
    wide.keyboard.press("/")
    wide.keyboard.type("green")
    wide.keyboard.press("Enter")
    expect(wide.locator("#rows .verdict").first).not_to_be_empty()
    assert wide.evaluate("document.documentElement.scrollHeight") <= 800
    assert quiet(page) and quiet(wide)


def test_the_page_asks_for_the_token(browser: Browser, speaker: GrexModel) -> None:
    with Running(make_app(speaker, "tiny", token=SECRET)) as running:
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.url)
        page.fill("#token", SECRET)
        page.click("#login .main")
        page.wait_for_selector("#gallery img[src^=blob]")
        page.locator("#gallery button").first.click()
        page.wait_for_selector("#stage.full")
        page.goto(f"{running.url}docs")
        expect(page.locator("#routes")).to_contain_text("/ground")
        expect(page.locator("#routes")).to_contain_text("selected.objects")
