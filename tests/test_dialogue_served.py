"""Follow-ups over HTTP and in the page of `grex serve`: a history equals a session, and people of one picture do not mix."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tiny import tiny_model

from grex_mllm.dialogue import Dialogue
from grex_mllm.dialogue.follow_ups import COMPLEMENT, DIFFERENCE, NEW, UNION
from grex_mllm.models.describe import masks_in_boxes
from grex_mllm.ops.masks import decode_rle
from grex_mllm.ops.selection import selection_masks

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")

from starlette.testclient import TestClient
from test_serve import HERE, opened

from grex_mllm.serve.app import make_app
from grex_mllm.serve.engine import DIALOGUES
from grex_mllm.serve.limits import MAX_DRAWN, MAX_OBJECTS, MAX_TURNS


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(make_app(tiny_model(), "tiny"), base_url=HERE) as made:
        yield made


def ask(client: TestClient, image: str, history: list[str] | None, *texts: str) -> Any:
    return client.post("/ground", json={"image": image, "expressions": list(texts), **({} if history is None else {"history": history})})


def test_a_history_over_http_equals_a_session(client: TestClient) -> None:
    rooms = client.app.app.state.rooms  # type: ignore[attr-defined]
    image = opened(client)["image"]
    said = Dialogue(rooms.engine.model, rooms.held.get(image).encoded)
    turns = ["the red circle", "and the star too", "not the biggest one", "the others", "people in white"]
    for n, text in enumerate(turns):
        answer, expected = ask(client, image, turns[:n], text, "everything else").json()["results"], said.say(text)
        assert (decode_rle(answer[0]["mask_rle"]) == expected.mask).all() and answer[0]["operation"] == said.operation
        assert answer[1]["operation"] == (COMPLEMENT if n else NEW), "the expressions of a request do not follow each other"
    assert "operation" not in ask(client, image, None, "the others").json()["results"][0], "without a history nothing is a follow-up"
    assert len(rooms.held.get(image).dialogues) <= DIALOGUES
    for history, told_what in (([""], "empty"), (["x"] * (MAX_TURNS + 1), "history"), (["a\nb"], "control"), (["x" * 2000], "shorten")):
        refused = ask(client, image, history, "the others")
        assert refused.status_code == 422 and told_what in refused.json()["error"]


def test_users_of_one_picture_do_not_share_what_they_selected(client: TestClient) -> None:
    """Six people talk about the same scene at once; each hears what it would hear alone."""
    client.post("/gallery/1", json={})
    firsts = ["the red circle", "a blue square", "green", "people in white", "two blue squares", "all shapes except the largest one"]

    def talk(first: str) -> list[Any]:
        return [ask(client, "scene-1", [first, "and the star too"][:n], "the others").json()["results"][0] for n in (1, 2, 1)]

    alone = [talk(first) for first in firsts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(talk, firsts))
    assert together == alone


def chosen(client: TestClient, image: str, selected: Any, *texts: str, **more: Any) -> Any:
    return client.post("/ground", json={"image": image, "expressions": list(texts), "selected": selected, **more})


def test_a_follow_up_refers_to_the_selected_objects(client: TestClient) -> None:
    """Objects and boxes that were selected before anything was said, as `Dialogue.select` takes them."""
    rooms = client.app.app.state.rooms  # type: ignore[attr-defined]
    image = opened(client)["image"]
    held = rooms.held.get(image)
    assert len(held.objects) >= 3, "the tiny model proposes several objects"
    box = [2.0, 3.0, 20.0, 30.0]
    for selected in ({"objects": [0, 1]}, {"objects": [2, 1, 2]}, {"objects": [0], "boxes_xyxy": [box]}):
        said = Dialogue(rooms.engine.model, held.encoded)
        boxes = masks_in_boxes(rooms.engine.model, held.encoded, selection_masks(40, 56, None, [box]).numpy())
        said.select(masks=[*held.objects[selected["objects"]], *(boxes if "boxes_xyxy" in selected else ())])
        turns = ["the others", "not the biggest one", "and the star too", "the red circle"]
        for n, text in enumerate(turns):
            answer = chosen(client, image, selected, text, **({"history": turns[:n]} if n else {})).json()["results"][0]
            expected = said.say(text)
            assert (decode_rle(answer["mask_rle"]) == expected.mask).all() and answer["operation"] == said.operation
            assert answer["operation"] == ([COMPLEMENT, DIFFERENCE, UNION, NEW][n])
            assert set(answer["objects"]) <= set(range(len(held.objects)))
        assert not set(selected["objects"]) & set(chosen(client, image, selected, "the others").json()["results"][0]["objects"])
    alone = ask(client, image, None, "the red circle").json()["results"][0]
    assert {**alone, "operation": NEW} == chosen(client, image, {"objects": [0, 1]}, "the red circle").json()["results"][0]


def test_an_answer_tells_the_objects_that_a_follow_up_would_refer_to(client: TestClient) -> None:
    image = opened(client)["image"]
    for text in ("the red circle on the left", "green", "people in white"):
        objects = ask(client, image, None, text).json()["results"][0]["objects"]
        assert objects == ask(client, image, [], text).json()["results"][0]["objects"]
        if objects:
            for follow_up in ("the others", "not the biggest one", "the one next to them"):
                after = ask(client, image, [text], follow_up).json()["results"][0]
                assert after == chosen(client, image, {"objects": objects}, follow_up).json()["results"][0]


@pytest.mark.parametrize(
    ("selected", "told"),
    [
        ({}, "no object"),
        ({"objects": [99]}, "object 99"),
        ({"objects": [-1]}, "object -1"),
        ({"objects": [0] * (MAX_OBJECTS + 1)}, "selected.objects"),
        ({"objects": ["x"]}, "selected.objects"),
        ({"boxes_xyxy": [[30, 3, 20, 30]]}, "no area"),
        ({"boxes_xyxy": [[1, 2, 57, 30]]}, "outside the image"),
        ({"boxes_xyxy": [[1, 2, 3]]}, "boxes_xyxy"),
        ({"boxes_xyxy": [[1, 2, 3, 4]] * (MAX_DRAWN + 1)}, "boxes_xyxy"),
        ({"points_xy": [[1, 2]] * (MAX_DRAWN + 1)}, "points_xy"),
        ({"points_xy": [[56, 3]]}, "click into the picture"),
        ({"masks_rle": []}, "masks_rle"),
        ([0, 1], "selected"),
    ],
)
def test_a_wrong_set_is_told(client: TestClient, selected: Any, told: str) -> None:
    answer = chosen(client, opened(client)["image"], selected, "the others")
    assert answer.status_code == 422 and told in answer.json()["error"] and "expected" in answer.json()["error"]


def test_a_wrong_set_spoils_no_other_request(client: TestClient) -> None:
    """Requests of one picture are answered in one pass; the fault of one is told to nobody else."""
    client.post("/gallery/3", json={})
    sets = [{"objects": [0]}, {"objects": [77]}, {"objects": [1]}, {"objects": [78]}] * 3
    alone = [chosen(client, "scene-3", selected, "the others") for selected in sets[:4]]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda selected: chosen(client, "scene-3", selected, "the others"), sets))
    assert [answer.status_code for answer in together] == [200, 422, 200, 422] * 3
    assert [answer.json() for answer in together] == [answer.json() for answer in alone] * 3


def test_the_description_of_the_api_names_the_set(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["Selected"]["properties"]) == {"objects", "boxes_xyxy", "points_xy"}
    assert schemas["Asked"]["properties"]["selected"]["description"]
    limits = {"objects": MAX_OBJECTS, "boxes_xyxy": MAX_DRAWN, "points_xy": MAX_DRAWN}
    assert {name: field["maxItems"] for name, field in schemas["Selected"]["properties"].items()} == limits


def test_sessions_of_drawn_sets_do_not_pile_up(client: TestClient) -> None:
    """Each holds masks of its own, as large as the picture: a picture keeps those of one drawn set."""
    image = opened(client)["image"]
    answers = [chosen(client, image, {"boxes_xyxy": [[n, 2, 20 + n, 30]]}, "the others").json()["results"] for n in (1, 2, 3, 1)]
    assert answers[0] == answers[3]
    held = client.app.app.state.rooms.held.get(image).dialogues  # type: ignore[attr-defined]
    assert [selected.boxes_xyxy for _, selected, _ in held if selected is not None] == [((1.0, 2.0, 21.0, 30.0),)]
