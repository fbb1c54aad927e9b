"""The selected set in the page of `grex serve`: what was clicked, drawn or answered is what a follow-up refers to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_model, tiny_speaker

from grex_mllm.dialogue import Dialogue
from grex_mllm.ops.masks import decode_rle

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")
pytest.importorskip("playwright", reason="needs the extra dev (playwright)")

from browsing import Running, at, clickable, find, open_picture, quiet, visit
from playwright.sync_api import Browser, Page, expect
from test_serve import encoded, pixels

from grex_mllm.serve.app import make_app

pytestmark = pytest.mark.long
SIZE = (64, 48)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(make_app(tiny_speaker(tmp_path_factory.mktemp("tokenizer")), "tiny")) as running:
        yield running


def with_picture(browser: Browser, served: Running, **options: Any) -> tuple[Page, list[Any], list[tuple[int, tuple[int, int]]]]:
    """Open the page with a picture; return it, the bodies that it sends to /ground from then on, and objects with a pixel of each."""
    page, sent = visit(browser, served.url, **options), []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.url.endswith("/ground") else None)
    image = open_picture(page, encoded(pixels(3, SIZE[1], SIZE[0])))
    objects = page.request.get(f"{served.url}images/{image}").json()["objects"]
    return page, sent, list(clickable(objects).items())


def pressed(page: Page) -> list[int]:
    buttons = '#objects button[aria-pressed="true"][aria-label^="Object "]'
    return page.locator(buttons).evaluate_all("buttons => buttons.map((button) => Number(button.textContent) - 1)")


def say(page: Page, text: str) -> dict[str, Any]:
    """Type an expression and return the server's answer to it."""
    with page.expect_response(lambda answer: answer.url.endswith("/ground")) as seen:
        page.fill("#new", text)
        page.press("#new", "Enter")
    expect(page.locator("#rows li:not(.new) .verdict").last).not_to_be_empty()
    return seen.value.json()["results"][0]


def test_a_follow_up_refers_to_what_was_clicked(browser: Browser, served: Running, keep: Any) -> None:
    page, sent, places = with_picture(browser, served)
    (first, one), (second, other) = places[:2]
    for place in (one, other):
        page.mouse.click(*at(page, *place, *SIZE))
    expect(page.locator("#selected")).to_contain_text(f"2 selected objects {first + 1}, {second + 1}", use_inner_text=True)
    keep(page, "clicked_set")
    answer = say(page, "the others")
    assert sent[-1]["selected"] == {"objects": [first, second], "boxes_xyxy": [], "points_xy": []} and "history" not in sent[-1]
    assert answer["operation"] == "complement" and not {first, second} & set(answer["objects"]) and answer["objects"]
    expect(page.locator("#rows .verdict").first).to_contain_text(f"other than objects {first + 1}, {second + 1}")
    assert pressed(page) == answer["objects"], "the objects of the answer are the selection now"
    expect(page.locator("#selected")).to_contain_text(f"{len(answer['objects'])} selected", use_inner_text=True)
    expect(page.locator("#selected")).to_contain_text("› the others")
    say(page, "only the biggest one")
    assert sent[-1]["history"] == ["the others"] and sent[-1]["selected"]["objects"] == [first, second]
    keep(page, "answered_set")
    clicked_again = (pressed(page) or [first])[0]
    page.locator("#objects button").nth(clicked_again).click()
    rest = pressed(page)
    assert clicked_again not in rest or rest == [clicked_again]
    page.keyboard.press("Escape")
    expect(page.locator("#selected")).to_be_hidden()
    assert pressed(page) == []
    say(page, "the others")
    assert "history" not in sent[-1] and "selected" not in sent[-1], "nothing is selected: as before"
    assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_an_answer_is_the_selection_and_a_click_changes_it(browser: Browser, served: Running) -> None:
    page, sent, places = with_picture(browser, served)
    answer = say(page, "the red circle on the left")
    assert "selected" not in sent[-1] and "history" not in sent[-1] and answer["objects"]
    expect(page.get_by_role("button", name="describe them")).to_be_visible()
    assert pressed(page) == answer["objects"]
    added = next(n for n, _ in places if n not in answer["objects"])
    page.locator("#objects button").nth(added).click()
    say(page, "not the biggest one")
    assert sorted(sent[-1]["selected"]["objects"]) == sorted([*answer["objects"], added])
    new = say(page, "people in white")
    assert new["operation"] == "new" and new["mask_rle"] == answer_of(page, served, sent[-1]["image"], "people in white")["mask_rle"]
    assert quiet(page), page.faults  # type: ignore[attr-defined]


def answer_of(page: Page, served: Running, image: str, text: str) -> Any:
    answer = page.request.post(f"{served.url}ground", data={"image": image, "expressions": [text]})
    return answer.json()["results"][0]


def test_a_link_restores_what_refers_to_what(browser: Browser, served: Running) -> None:
    page, _, places = with_picture(browser, served)
    for _, place in places[:2]:
        page.mouse.click(*at(page, *place, *SIZE))
    say(page, "the others")
    expect(page.locator("#rows .verdict").first).to_contain_text("other than")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.mouse.move(*at(page, 5, 6, *SIZE))
    page.mouse.down()
    page.mouse.move(*at(page, 20, 20, *SIZE), steps=3)
    page.mouse.move(*at(page, 40, 30, *SIZE))
    page.mouse.up()
    expect(page.locator("#selected")).to_contain_text("a box")
    say(page, "and the star too")
    verdicts = page.locator("#rows .verdict")
    expect(verdicts.nth(1)).to_contain_text("added to a box")
    told, marked = [verdicts.nth(n).inner_text() for n in (0, 1)], pressed(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy-json")
    results = json.loads(page.evaluate("navigator.clipboard.readText()"))["results"]
    assert results[0]["selected"]["objects"] == [n for n, _ in places[:2]] and len(results[1]["selected"]["boxes_xyxy"]) == 1
    other = visit(browser, page.url)
    expect(other.locator("#rows .verdict").nth(1)).to_contain_text("added to a box")
    assert [other.locator("#rows .verdict").nth(n).inner_text() for n in (0, 1)] == told and pressed(other) == marked
    expect(other.locator("#selected")).to_contain_text("a box › and the star too")
    assert other.url == page.url
    other.click("#forget")
    cleared = visit(browser, other.url)
    expect(cleared.locator("#rows .verdict").nth(1)).to_contain_text("added to a box")
    expect(cleared.locator("#selected")).to_be_hidden()
    odd = visit(
        browser, page.url.split("#")[0] + "#" + page.url.split("#")[1].split("&")[0] + "&s=99,x;b1,2;p;q&f=the%20others&o=77&b=nan,1,2,3"
    )
    expect(odd.locator("#rows .verdict").first).not_to_be_empty()
    for one in (page, other, cleared, odd):
        assert quiet(one), one.faults  # type: ignore[attr-defined]


def test_a_model_that_writes_nothing_takes_clicks_for_follow_ups(browser: Browser, tmp_path: Path, keep: Any) -> None:
    model = tiny_model()
    with Running(make_app(model, "tiny")) as running:
        options = {"viewport": {"width": 375, "height": 700}, "color_scheme": "dark", "has_touch": True, "device_scale_factor": 2}
        page, sent, places = with_picture(browser, running, **options)
        for _, place in places[:2]:
            page.touchscreen.tap(*at(page, *place, *SIZE))
        assert pressed(page) == [n for n, _ in places[:2]] and page.locator("#answer").is_hidden()
        answer = say(page, "the others")
        said = Dialogue(model, pixels(3, SIZE[1], SIZE[0]))
        masks = [decode_rle(item["mask_rle"]) for item in page.request.get(f"{running.url}images/{sent[-1]['image']}").json()["objects"]]
        said.select(masks=[masks[n] for n, _ in places[:2]])
        assert np.array_equal(decode_rle(answer["mask_rle"]), said.say("the others").mask)
        page.locator("#selected").scroll_into_view_if_needed()
        keep(page, "clicked_set_phone_dark")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        assert quiet(page), page.faults  # type: ignore[attr-defined]


def test_a_wrong_set_is_told_in_the_page(browser: Browser, served: Running) -> None:
    """What a server refuses stands beside the expression, with what to do."""
    page, _, places = with_picture(browser, served)
    page.route(
        "**/ground", lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, "selected": {"objects": [99]}}))
    )
    page.mouse.click(*at(page, *places[0][1], *SIZE))
    page.fill("#new", "the others")
    page.press("#new", "Enter")
    expect(page.locator(".note").last).to_contain_text("Choose from the picture's objects")
    expect(page.locator("#rows .verdict").first).to_contain_text("Object 99")
    page.unroute("**/ground")
    assert "object" in find(page, "green")
