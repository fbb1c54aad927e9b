"""Rules of the server backend: what it adapts to, what stops a run, budgets, pauses, addresses, and the key, which appears nowhere."""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import sys
import threading
import time
from typing import Any

import pytest
from fake_server import FakeServer, completion, failure
from test_server import ask, echo, once, request_of, server_at

from grex_mllm.errors import GrexError
from grex_mllm.zeroshot.server import open_server
from grex_mllm.zeroshot.server.address import Key, check_address
from grex_mllm.zeroshot.server.faults import duration, judge, rate_limit_pause, retry_after
from grex_mllm.zeroshot.server.settings import ServerSettings

SECRET = "sk-test/9+secret=key0123456789"


def refusing(*fields: str, **renamed: str) -> Any:
    """Return a script that refuses fields: those with another name as OpenAI does, the others as `transformers serve` does."""

    def script(body: dict[str, Any]) -> Any:
        bad = [name for name in (*fields, *renamed) if name in body]
        if not bad:
            return echo(body)
        if bad[0] in renamed:
            said = f"Unsupported parameter: '{bad[0]}' is not supported with this model. Use '{renamed[bad[0]]}' instead."
            return failure(400, said, param=bad[0], code="unsupported_parameter")
        return 422, {}, json.dumps({"detail": f"Unexpected fields in the request: {set(bad)}"}).encode()

    return script


def test_refused_fields_are_left_out_once_and_loudly(capsys):
    with FakeServer(refusing("seed", "top_p", max_tokens="max_completion_tokens"), delay_s=0.01) as fake:
        server = server_at(fake.url, concurrency=4)
        answers = ask(server, [once(f"t{n}") for n in range(12)])
        assert all(raw.finish == "stop" for raw in answers.values()) and server.tally.counts.retries == 0
        assert fake.seen[-1]["max_completion_tokens"] == 50 and not {"seed", "top_p", "max_tokens"} & fake.seen[-1].keys()
        assert len(fake.seen) <= 12 + 3 * 4  # those under way meet the same
    told = capsys.readouterr().err.splitlines()
    assert sorted(line.split("field ")[1].split(":")[0] for line in told) == ["max_tokens", "seed", "top_p"]
    assert [line for line in server.remarks() if "refuses the field" in line] == told


@pytest.mark.parametrize(
    ("name", "reply", "extra"),
    [
        (
            "temperature",
            failure(400, "Unsupported value: 'temperature' does not support 0.", param="temperature", code="unsupported_value"),
            {},
        ),
        ("response_format", failure(400, "response_format json_schema is not supported by this model"), {"schema": {"type": "object"}}),
        ("logprobs", failure(400, "This model does not support logprobs."), {"choices": ("yes", "no")}),
        ("top_p", (422, {}, json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", "top_p"], "msg": "Extra"}]}).encode()), {}),
    ],
)
def test_shapes_in_which_servers_refuse_a_field(name, reply, extra):
    with FakeServer(lambda body: reply if name in body else echo(body)) as fake:
        assert ask(server_at(fake.url), [once("x", **extra)])["x"].finish == "stop"
    assert len(fake.seen) == 2 and "top_logprobs" not in fake.seen[1]


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 50. This model supports at most 8",
        "Invalid schema for response_format 'answer': 'minItems' is not permitted.",
    ],
)
def test_a_refused_value_is_an_error_and_drops_nothing(message):
    with FakeServer(lambda body: failure(400, message, param="response_format")) as fake:
        raw = ask(server_at(fake.url), [once("x", schema={"type": "object"})])["x"]
    assert raw.error == f"status 400: {message}" and len(fake.seen) == 1


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (failure(401, "Incorrect API key provided: sk-tes***789"), r"status 401: Incorrect API key provided: \[key\]"),
        (failure(403, "not for you"), "status 403: not for you"),
        (failure(404, "The model `m` does not exist"), "status 404: The model `m` does not exist"),
        (failure(402, "pay"), "status 402"),
        (failure(429, "You exceeded your quota", code="insufficient_quota"), "quota or balance"),
        (failure(429, "Your credit balance is too low"), "quota or balance"),
        (failure(429, "busy", {"Retry-After": "90000"}), "it asks for a pause of 90,000 s"),
        (
            (307, {"Location": f"https://evil.example/?k={SECRET}"}, b""),
            r"a redirect to https://evil.example/\?k=\[key\], which is not followed",
        ),
    ],
)
def test_what_stops_a_run_says_how_to_go_on(reply, said, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with FakeServer(lambda body: reply) as fake, pytest.raises(GrexError, match=said) as caught:
        ask(server_at(fake.url, concurrency=1), [once(f"t{n}") for n in range(9)])
    assert len(fake.seen) == 1 and "then run again: what is answered is kept" in str(caught.value) and "sk-" not in str(caught.value)


def test_without_a_key_a_refusal_says_so(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with (
        FakeServer(lambda body: failure(401, "no key")) as fake,
        pytest.raises(GrexError, match="OPENAI_API_KEY is not set: no key"),
    ):
        ask(server_at(fake.url), [once("x")])
    assert "authorization" not in fake.headers[0]


def test_a_refusal_after_answers_is_of_one_request():
    with FakeServer(lambda body: failure(403, "flagged") if "bad" in json.dumps(body) else echo(body)) as fake:
        answers = ask(server_at(fake.url, concurrency=1), [once("good"), once("bad"), once("fine")])
    assert [raw.finish for raw in answers.values()] == ["stop", "error", "stop"]


def test_errors_in_a_row_stop_the_run_and_others_do_not():
    with (
        FakeServer(lambda body: failure(400, "no")) as fake,
        pytest.raises(GrexError, match=r"the last 5 requests .* 400: no"),
    ):
        ask(server_at(fake.url, stop_after_errors=5, concurrency=1), [once(f"t{n}") for n in range(9)])
    with FakeServer(lambda body: failure(400, "no")) as fake:
        assert len(ask(server_at(fake.url, stop_after_errors=0), [once(f"t{n}") for n in range(9)])) == 9


@pytest.mark.parametrize(
    ("limits", "most", "said"),
    [
        ({"budget_calls": 5}, 5, r"budget_calls 5 is spent \(5 calls, 500 tokens in \(150 cached\), 50 out\)"),
        ({"budget_tokens": 1000}, 10, "budget_tokens 1000 is spent"),
        ({"budget_cost": 0.01, "price_in": 10.0, "price_cached": 5.0, "price_out": 100.0}, 6, "budget_cost 0.01 is spent .*, cost 0.0111"),
    ],
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_budgets_stop_the_run_and_keep_what_is_answered(limits, most, said, concurrency):
    with FakeServer(lambda body: completion("a", usage=(100, 10, 30)), delay_s=0.01) as fake:
        server, answers = server_at(fake.url, concurrency=concurrency, **limits), []
        with pytest.raises(GrexError, match=said if concurrency == 1 else "is spent"):
            for answer in server.hold(once(f"t{n}") for n in range(40)):
                answers.append(answer)
        assert len(answers) == len(fake.seen) and most - concurrency < len(answers) <= most + concurrency - 1
    cost = len(answers) * (70 * 10.0 + 30 * 5.0 + 10 * 100.0) / 1e6
    assert server.tally.counts.cost == pytest.approx(cost if "budget_cost" in limits else 0.0)


def test_each_of_several_processes_has_its_part_of_a_budget(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with FakeServer(echo) as fake, pytest.raises(GrexError, match=r"budget_calls 3 \(this process's part\) is spent"):
        ask(server_at(fake.url, budget_calls=6), [once(f"t{n}") for n in range(9)])
    assert len(fake.seen) == 3


def test_a_budget_of_tokens_needs_a_server_that_counts_them():
    with FakeServer(lambda body: completion("a", usage=None)) as fake, pytest.raises(GrexError, match="expected a budget of calls"):
        ask(server_at(fake.url, budget_tokens=100, concurrency=1), [once("a"), once("b")])


def test_remarks_tell_calls_tokens_cost_rate_and_budgets(capsys):
    with FakeServer(lambda body: completion("a", usage=(1000, 10, 400)), delay_s=0.01) as fake:
        server = server_at(fake.url, price_in=1.0, price_out=2.0, progress_s=0.001, budget_calls=8)
        ask(server, [once("a"), once("b")])
    first, left = server.remarks()
    assert "2 calls, 2,000 tokens in (800 cached), 20 out, cost 0.0020; 0 from the cache, 0 tries again, 0 failed" in first
    assert (
        "answers a second" in first
        and "budget_calls: 25% of 8 spent, the rest lasts about" in left
        and "2 calls" in capsys.readouterr().err
    )


def test_a_limit_of_the_rate_makes_every_thread_wait():
    times: list[float] = []
    lock = threading.Lock()

    def script(body: dict[str, Any]) -> Any:
        with lock:
            times.append(time.monotonic())
            return failure(429, "slow down", {"retry-after-ms": "400"}) if len(times) == 1 else echo(body)

    with FakeServer(script) as fake:
        assert all(raw.text for raw in ask(server_at(fake.url, concurrency=1), [once(f"t{n}") for n in range(3)]).values())
        assert times[1] - times[0] >= 0.4
        times.clear()
        ask(server_at(fake.url, concurrency=4), [once(f"t{n}") for n in range(20)])
    late = [when - times[0] for when in times if when - times[0] > 0.05]  # but for those that were under way already
    assert len(late) >= 10 and min(late) >= 0.39


def test_the_longest_pause_is_a_setting():
    with FakeServer(lambda body: failure(429, "slow", {"retry-after": "2"})) as fake, pytest.raises(GrexError, match=r"max_wait_s \(1\)"):
        ask(server_at(fake.url, max_wait_s=1.0), [once("x")])


@pytest.mark.skipif(sys.platform != "linux", reason="how a full queue of connections behaves is told for Linux alone")
def test_a_place_that_takes_no_connection_in_time_is_unreachable():
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        start = time.monotonic()
        with pytest.raises(GrexError, match=r"took no connection"):
            ask(server_at(f"http://127.0.0.1:{full.getsockname()[1]}/v1", connect_timeout_s=0.2, unreachable_s=0.3), [once("x")])
        assert 0.3 <= time.monotonic() - start < 3.0


def test_messages_of_servers_are_one_plain_line():
    with FakeServer(lambda body: failure(400, "a\x1b[31mb\nc\u2028d")) as fake:
        assert ask(server_at(fake.url), [once("x")])["x"].error == "status 400: a [31mb c d"


def test_pauses_that_servers_ask_for():
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after({"retry-after": "2.5"}) == 2.5 and retry_after({"retry-after": "-1"}) == 0.0
    assert retry_after({"retry-after": "soon"}) == 0.0 and retry_after({"retry-after": "nan"}) == 0.0 and retry_after({}) == 0.0
    dates = {"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert retry_after(dates) == 30.0 and retry_after({"retry-after": dates["retry-after"]}) == 0.0
    assert [duration(text) for text in ("1s", "6m0s", "20ms", "1h2m3.5s", "7", "x", "")] == [1.0, 360.0, 0.02, 3723.5, 7.0, 0.0, 0.0]
    assert duration(str(time.time() + 60)) == pytest.approx(60, abs=2)
    used_up = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2s", "x-ratelimit-remaining-tokens": "-1"}
    assert rate_limit_pause(used_up) == 2.0 and rate_limit_pause({"x-ratelimit-remaining-tokens": "-1"}) == 0.0
    verdict = judge(429, used_up, b"", request_of("x"), {})
    assert (verdict.kind, verdict.wait_s, verdict.pause_s) == ("retry", 2.0, 2.0)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"error": {"message": "m", "code": 429}}', "retry"),
        (b'{"error": {"message": "m", "code": "insufficient_quota"}}', "stop"),
        (b'{"error": {"message": "m", "code": 401}}', "stop"),
        (b'{"error": "text"}', "retry"),
        (b'{"message": "m", "type": "t", "code": 400, "object": "error"}', "fail"),
        (b'[{"error": {"code": 400, "message": "m", "status": "INVALID_ARGUMENT"}}]', "fail"),
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "error"}]}', "retry"),
        (b'{"choices": [{"message": {"content": 5}}]}', "retry"),
        (b"[" * 100_000, "retry"),
        (b"\xff\xfe", "retry"),
        (b'{"choices": [{"message": {"content": "a"}}]}', "answer"),
    ],
)
def test_errors_within_a_good_status(content, kind):
    assert judge(200, {}, content, request_of("x"), {}).kind == kind


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("localhost:8000", "without http"),
        ("ftp://localhost", "base URL ftp://localhost"),
        ("http://10.0.0.7:8000/v1", "expected https to another machine; set allow_http"),
        ("http://localhost.evil.example/v1", "expected https"),
        (f"https://user:{SECRET.replace('/', '')}@host.example/v1", "base URL https://host.example/v1 with a user, password"),
        (f"https://host.example/v1?key={SECRET}", "base URL https://host.example/v1 with a user, password"),
        ("http://[::1", "cannot be read"),
    ],
)
def test_addresses_that_are_refused_without_showing_what_they_hold(address, said):
    with pytest.raises(GrexError, match=said) as caught:
        check_address(address, False)
    assert "secret" not in str(caught.value)


def test_addresses_that_are_taken():
    for address in ("http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:80/v1", "https://host.example"):
        assert check_address(address + "/", False) == address
    assert check_address("http://10.0.0.7:8000/v1", True) == "http://10.0.0.7:8000/v1"
    with pytest.raises(GrexError, match="set allow_http"):
        server_at("http://10.0.0.7:8000/v1")
    assert server_at("http://10.0.0.7:8000/v1", allow_http=True).base_url == "http://10.0.0.7:8000/v1"
    with FakeServer(echo) as fake:
        assert open_server("m", fake.url, ServerSettings()).fingerprint() != open_server("n", fake.url, ServerSettings()).fingerprint()


@pytest.mark.parametrize("echoed", [SECRET, SECRET.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D")])
def test_the_key_goes_out_in_one_header_and_is_written_nowhere(echoed, monkeypatch, tmp_path, capsys, caplog):
    monkeypatch.setenv("MY_KEY", SECRET)
    caplog.set_level(logging.DEBUG)

    def script(body: dict[str, Any]) -> Any:
        text = json.dumps(body)
        if "error" in text:
            return failure(400, f"bad header Authorization: Bearer {echoed}", {"X-Echo": f"Bearer {echoed}"})
        if "page" in text:
            return 500, {"Content-Type": "text/html"}, f"<html>Bearer {echoed}</html>".encode()
        if "refused field" in text and "seed" in body:
            return failure(400, f"seed is not supported (Bearer {echoed})", {})
        if "refusal" in text:
            return completion(None, refusal=f"I saw {echoed}")
        return completion(f"you sent Bearer {echoed}")

    with FakeServer(script) as fake:
        server = server_at(fake.url, key_env="MY_KEY", cache=str(tmp_path / "c.sqlite"), tries=2)
        answers = ask(server, [once(f"{name} {n}") for name in ("answer", "error", "page", "refusal", "refused field") for n in range(2)])
        assert {head["authorization"] for head in fake.headers} == {f"Bearer {SECRET}"}
        assert SECRET not in json.dumps(fake.seen)
    assert answers["answer 0"].text == "you sent Bearer [key]" and answers["refusal 0"].refusal == "I saw [key]"
    assert answers["error 0"].error == "status 400: bad header Authorization: Bearer [key]" and "[key]" in answers["page 0"].error
    shown = [repr(server), repr(server.key), repr(vars(server.caller)), str(pickle.dumps(server.key)), server.fingerprint()]
    shown += [
        repr(answers),
        *server.remarks(),
        *capsys.readouterr(),
        caplog.text,
        *(path.read_text("latin-1") for path in tmp_path.iterdir()),
    ]
    assert all(form not in text for text in shown for form in {SECRET, echoed}) and "left out" in "".join(shown)


def test_keys_that_cannot_be_sent_and_placeholders(monkeypatch):
    monkeypatch.setenv("MY_KEY", "two words")
    with pytest.raises(GrexError, match="MY_KEY holds blanks"):
        Key("MY_KEY")
    monkeypatch.setenv("MY_KEY", "none")
    assert Key("MY_KEY").hide_in_answer("none of them") == "none of them"
    assert os.environ["MY_KEY"] not in Key("MY_KEY").hide("the key none is wrong")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"concurrency": 0}, "concurrency 0"),
        ({"tries": 0}, "tries 0"),
        ({"read_timeout_s": 0.0}, "read_timeout_s 0.0"),
        ({"backoff_s": float("nan")}, "backoff_s nan"),
        ({"price_in": -1.0}, "price_in -1.0"),
        ({"structured": "grammar"}, 'structured "grammar"'),
        ({"detail": "fine"}, 'detail "fine"'),
        ({"top_logprobs": 40}, "top_logprobs 40"),
        ({"budget_cost": 1.0}, "without prices"),
        ({"batch_write": "a", "batch_read": "b"}, "one of them at a time"),
    ],
)
def test_settings_that_cannot_be_meant(wrong, said):
    with pytest.raises(GrexError, match=said):
        ServerSettings(**wrong).check()
