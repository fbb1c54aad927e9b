"""Follow-ups over HTTP and in the page of `grex serve`: a history equals a session, and people of one picture do not mix."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tiny import tiny_model

from grex_mllm.dialogue import Dialogue
from grex_mllm.dialogue.follow_ups import COMPLEMENT, NEW
from grex_mllm.ops.masks import decode_rle

pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")

from starlette.testclient import TestClient
from test_serve import HERE, opened

from grex_mllm.serve.app import make_app
from grex_mllm.serve.engine import DIALOGUES
from grex_mllm.serve.limits import MAX_TURNS


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
