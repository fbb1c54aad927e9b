"""The backend for OpenAI-compatible servers: what is sent, what comes back, and every fault between: each question ends exactly once."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_server import FAULTS, FakeServer, completion, failure, faulty, last_text
from PIL import Image

from grex_mllm.errors import GrexError
from grex_mllm.predictors.protocol import Answer
from grex_mllm.zeroshot.base import Conversation, Picture, RawAnswer, Request, Turn
from grex_mllm.zeroshot.server.server import Server
from grex_mllm.zeroshot.server.settings import ServerSettings

QUICK = {"backoff_s": 0.01, "backoff_cap_s": 0.05, "read_timeout_s": 0.5, "total_timeout_s": 1.0, "unreachable_s": 10.0, "progress_s": 0.0}
PICTURE = Picture(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


def request_of(text: str, key: str = "", **fields: Any) -> Request:
    turns = (Turn("system", ("You find things.",)), Turn("user", (PICTURE, text)))
    return Request(**({"key": key or text, "turns": turns, "max_tokens": 50} | fields))


def once(text: str, **fields: Any) -> Conversation:
    (raw,) = yield [request_of(text, **fields)]
    return Answer(text, fields={"raw": raw}, status="error" if raw.finish == "error" else "ok", reason=raw.error or "")


def ask(server: Server, conversations: list[Conversation]) -> dict[str, RawAnswer]:
    """Return key -> raw answer; every conversation must end exactly once."""
    answers = list(server.hold(iter(conversations)))
    assert len({answer.key for answer in answers}) == len(answers)
    return {answer.key: answer.fields["raw"] for answer in answers}


def server_at(url: str, **settings: Any) -> Server:
    return Server("m", url, ServerSettings(**(QUICK | settings)))


def echo(body: dict[str, Any]) -> Any:
    return completion(f"you said {last_text(body)}")


def test_what_is_sent_and_what_comes_back():
    with FakeServer(echo) as fake:
        server = server_at(fake.url, detail="high", body={"top_k": 1})
        schema = {"type": "object", "properties": {"boxes": {"type": "array"}}}
        raw = ask(server, [once("the left dog", temperature=0.5, top_p=0.9, seed=7, schema=schema)])["the left dog"]
    assert (raw.text, raw.finish, raw.usage) == (
        "you said the left dog",
        "stop",
        {"prompt_tokens": 100, "completion_tokens": 10, "cached_tokens": 0},
    )
    assert raw.seconds > 0 and not raw.cached and raw.error is None
    (body,) = fake.seen
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": "You find things."}
    picture, text = user["content"]
    assert text == {"type": "text", "text": "the left dog"} and picture["image_url"]["detail"] == "high"
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), PICTURE.pixels)
    strict = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    assert body == {"model": "m", "max_tokens": 50, "temperature": 0.5, "top_p": 0.9, "seed": 7, "response_format": strict, "top_k": 1}


@pytest.mark.parametrize(("structured", "field"), [("structured_outputs", {"json": {"type": "object"}}), ("off", None)])
def test_other_ways_of_structured_output_and_fields_left_out(structured, field):
    with FakeServer(echo) as fake:
        ask(server_at(fake.url, structured=structured, omit=("seed",)), [once("x", schema={"type": "object"})])
    assert fake.seen[0].get("structured_outputs") == field
    assert not {"seed", "response_format"} & fake.seen[0].keys()


def test_probabilities_of_words():
    listed = [(" Yes", 0.5), ("yes", 0.1), ("No", 0.2), ("maybe", 0.1)]
    top = [{"token": token, "logprob": float(np.log(prob)), "bytes": None} for token, prob in listed]
    with FakeServer(
        lambda body: completion("Yes", logprobs={"content": [{"token": " Yes", "logprob": -0.7, "top_logprobs": top}]})
    ) as fake:
        raw = ask(server_at(fake.url, top_logprobs=4), [once("x", choices=("yes", "no"))])["x"]
    assert raw.choice_probs == pytest.approx({"yes": 0.6, "no": 0.2})
    assert fake.seen[0]["logprobs"] is True and fake.seen[0]["top_logprobs"] == 4
    with FakeServer(echo) as fake:
        assert ask(server_at(fake.url), [once("x", choices=("yes", "no"))])["x"].choice_probs is None


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion("a", "length"), {"text": "a", "finish": "length"}),
        (completion("", "stop"), {"text": "", "finish": "stop"}),
        (completion(None, "content_filter"), {"text": None, "finish": "content_filter"}),
        (completion(None, refusal="I will not."), {"text": None, "finish": "refusal", "refusal": "I will not."}),
        (completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), {"text": "ab"}),  # type: ignore[arg-type]
        (completion("half \ud800 a pair"), {"text": "half \ufffd a pair"}),
        (completion("a", usage=None), {"text": "a", "usage": {}}),
        (failure(400, "blocked", code="content_filter"), {"text": None, "finish": "content_filter", "refusal": "blocked"}),
        (failure(413, "too large"), {"text": None, "finish": "error", "error": "status 413: too large"}),
        (failure(400, "context length exceeded"), {"finish": "error", "error": "status 400: context length exceeded"}),
        ((422, {}, b'{"detail": "no"}'), {"finish": "error", "error": "status 422: no"}),
        (failure(503, "no", {"x-should-retry": "false"}), {"finish": "error", "error": "status 503: no (the server says: do not retry)"}),
    ],
)
def test_answers_and_errors_that_are_not_tried_again(reply, expected):
    with FakeServer(lambda body: reply) as fake:
        raw = ask(server_at(fake.url), [once("x")])["x"]
    assert len(fake.seen) == 1 and {name: getattr(raw, name) for name in expected} == expected


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_tried_again(fault):
    with faulty(echo, lambda n: fault if n < 2 else "") as (_, proxy):
        server = server_at(proxy.url)
        start = time.monotonic()
        raw = ask(server, [once("x")])["x"]
    assert raw.text == "you said x" and proxy.done == [fault, fault, ""] and server.tally.counts.retries == 2
    assert time.monotonic() - start >= {"429": 0.4, "429 date": 2.0}.get(fault, 0.0)


@pytest.mark.parametrize("fault", [name for name in FAULTS if "429" not in name])
def test_a_fault_that_stays_ends_with_an_error_that_names_it(fault):
    with faulty(echo, lambda n: fault, stall_s=1.5) as (_, proxy):
        raw = ask(server_at(proxy.url, tries=2, read_timeout_s=0.2, total_timeout_s=0.3), [once("x")])["x"]
    json_said = dict.fromkeys(("malformed", "truncated", "wrong type"), "no whole JSON") | {
        "null": "no object",
        "no choices": "without choices",
    }
    said = {
        "500": "busy",
        "503": "loading",
        "529": "Overloaded",
        "408": "408",
        "empty": "empty body",
        "html": "HTML page",
        "html 502": "502",
    }
    said |= json_said | {"error in 200": "busy", "stall": "no answer within 0.2 s", "trickle": "not complete"}
    assert raw.finish == "error" and said.get(fault, "broke off") in raw.error and len(proxy.done) == 2


def test_every_question_ends_once_however_faults_fall():
    rng = np.random.default_rng(1)
    script = [str(rng.choice(FAULTS)) if rng.random() < 0.3 and n else "" for n in range(2000)]
    script = ["" if fault in ("429 date", "trickle", "stall") else fault for fault in script]
    with faulty(echo, lambda n: script[n]) as (_, proxy):
        server = server_at(proxy.url, tries=20, concurrency=6)
        answers = ask(server, [once(f"t{n}") for n in range(150)])
    assert answers.keys() == {f"t{n}" for n in range(150)} and all(raw.text == f"you said {key}" for key, raw in answers.items())
    counts = server.tally.counts
    assert counts.answers == 150 and counts.failed == 0 and counts.retries == len(proxy.done) - 150 > 20


def test_a_server_that_dies_and_comes_back_is_waited_for(capsys):
    fake = FakeServer(echo, delay_s=0.01)

    def kill() -> None:
        while len(fake.seen) < 20:
            time.sleep(0.005)
        fake.die()
        time.sleep(1.0)
        fake.start()

    killer = threading.Thread(target=kill)
    killer.start()
    server = server_at(fake.url, tries=2, concurrency=4)
    answers = ask(server, [once(f"t{n}") for n in range(60)])
    killer.join()
    fake.close()
    assert len(answers) == 60 and all(raw.text == f"you said {key}" for key, raw in answers.items())
    assert "takes no connection" in capsys.readouterr().err and server.tally.counts.calls <= 60 + 4


def test_a_server_that_is_not_there_stops_the_run():
    with FakeServer(echo) as fake:
        url = fake.url
    with pytest.raises(GrexError, match=r"took no connection .* expected a running server; start it or fix --base-url"):
        ask(server_at(url, unreachable_s=0.2), [once("x")])


def rounds(key: str, num: int, width: int) -> Conversation:
    said = []
    for n in range(num):
        said += [raw.text for raw in (yield [request_of(f"{key}.{n}.{i}") for i in range(width)])]
    return Answer(key, fields={"raw": said})


def test_rounds_come_back_in_their_order_and_no_more_are_open_than_there_is_room_for():
    begun, ended, most = 0, 0, 0

    def feed() -> Iterator[Conversation]:
        nonlocal begun
        for n in range(30):
            begun += 1
            yield rounds(f"c{n}", 1 + n % 3, 1 + n % 4)

    with FakeServer(echo, delay_s=0.002) as fake:
        for answer in server_at(fake.url, concurrency=3).hold(feed()):
            number = int(answer.key[1:])
            expected = [f"you said {answer.key}.{n}.{i}" for n in range(1 + number % 3) for i in range(1 + number % 4)]
            assert answer.fields["raw"] == expected
            ended += 1
            most = max(most, begun - ended)
    assert ended == 30 and most <= 3


def test_no_more_calls_are_under_way_than_allowed_over_two_holds_at_once():
    now = most = 0
    lock = threading.Lock()

    def script(body: dict[str, Any]) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return echo(body)

    with FakeServer(script) as fake:
        server = server_at(fake.url, concurrency=3)
        first, second = (server.hold(iter([once(f"{name}{n}") for n in range(20)])) for name in "ab")
        assert len([answer for pair in zip(first, second) for answer in pair]) == 40
    assert 2 <= most <= 3


def test_closing_stops_at_once_whatever_is_under_way():
    with FakeServer(lambda body: echo(body) if last_text(body) == "t0" else (time.sleep(3), echo(body))[1]) as fake:
        answers = server_at(fake.url, concurrency=2, read_timeout_s=20.0).hold(iter([once(f"t{n}") for n in range(9)]))
        assert next(answers).key == "t0"
        start = time.monotonic()
        answers.close()
        assert time.monotonic() - start < 0.5 and len(fake.seen) <= 3


def test_what_the_feed_raises_comes_after_the_answers_under_way():
    def feed() -> Iterator[Conversation]:
        yield from [once("a"), once("b")]
        raise GrexError("image 7 is broken")

    with FakeServer(echo) as fake:
        answers, holding = [], server_at(fake.url).hold(feed())
        with pytest.raises(GrexError, match="image 7 is broken"):
            answers += holding
        assert len(fake.seen) == 2
