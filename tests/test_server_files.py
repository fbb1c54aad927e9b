"""Files of the server backend: the store of answers, requests and results of batch APIs, and what is told before anything is sent."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from fake_server import FakeServer, completion, failure, last_text
from test_server import PICTURE, QUICK, ask, echo, once, request_of, rounds, server_at

from grex_mllm.errors import GrexError
from grex_mllm.predictors.protocol import Answer
from grex_mllm.zeroshot.base import Conversation, Picture, RawAnswer, Turn
from grex_mllm.zeroshot.server.estimates import describe_request, estimate, text_tokens
from grex_mllm.zeroshot.server.server import Server
from grex_mllm.zeroshot.server.settings import ServerSettings
from grex_mllm.zeroshot.server.store import Store


def test_the_same_request_is_never_paid_twice(tmp_path):
    cache = str(tmp_path / "deep" / "answers.sqlite")
    with FakeServer(echo) as fake:
        first = ask(server_at(fake.url, cache=cache), [once("a"), once("b")])
        server = server_at(fake.url, cache=cache)
        again = ask(server, [once("a"), once("b"), once("c")])
        assert len(fake.seen) == 3 and [raw.cached for raw in again.values()].count(True) == 2
        assert server.tally.counts.cached == 2 and server.tally.counts.calls == 1 and server.tally.counts.prompt_tokens == 100
        assert {key: replace(again[key], cached=False) for key in first} == first
        ask(server_at(fake.url, cache=cache, revision="2"), [once("a")])
        ask(server_at(fake.url, cache=cache, body={"top_k": 1}), [once("a")])
        other = Picture(PICTURE.pixels[::-1].copy())
        variants: list[dict[str, Any]] = [
            {"temperature": 1.0}, {"top_p": 0.5}, {"seed": 1}, {"sample": 1}, {"max_tokens": 9}, {"schema": {"type": "object"}},
            {"choices": ("yes",)}, {"turns": (Turn("user", (other, "a")),)},
        ]  # fmt: skip
        for variant in variants:
            ask(server_at(fake.url, cache=cache), [once("a", **variant)])
        assert len(fake.seen) == 5 + len(variants)
        ask(server_at(fake.url, cache=cache), [once("a", key="another question about the same")])
        assert len(fake.seen) == 5 + len(variants)
    content = b"".join(path.read_bytes() for path in (tmp_path / "deep").iterdir())
    assert b"you said b" in content and b"PNG" not in content and b"base64" not in content


def test_errors_are_not_kept(tmp_path):
    cache = str(tmp_path / "answers.sqlite")
    with FakeServer(lambda body: failure(400, "no")) as fake:
        ask(server_at(fake.url, cache=cache), [once("a")])
        fake.script = echo
        assert ask(server_at(fake.url, cache=cache), [once("a")])["a"].text == "you said a"


def test_every_field_of_an_answer_comes_back(tmp_path):
    store = Store(tmp_path / "s")
    given = RawAnswer("a\u2028b", "length", "no", {"prompt_tokens": 3}, (4, 5), {"yes": 0.25}, None, 1.5, 0.25)
    store.put("k", "m", given)
    store.put("k", "m", RawAnswer("later"))
    store.put("n", "m", RawAnswer(None, "refusal"))
    assert store.get("k") == replace(given, cost=0.0, cached=True) and store.get("x") is None
    assert store.get("n") == RawAnswer(None, "refusal", cached=True) and len(store) == 2


def test_damaged_and_foreign_files_are_told_apart(tmp_path):
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(GrexError, match=r"cache .*text is damaged .* expected a SQLite file of answers; move it away"):
        Store(tmp_path / "text")
    foreign = sqlite3.connect(tmp_path / "foreign")
    foreign.execute("CREATE TABLE t (x)")
    foreign.commit()
    foreign.close()
    with pytest.raises(GrexError, match="of another program or version"):
        Store(tmp_path / "foreign")
    store = Store(tmp_path / "torn")
    for n in range(2000):
        store.put(f"{n:064d}", "m", RawAnswer("x" * 100))
    store.close()
    content = bytearray((tmp_path / "torn").read_bytes())
    content[4096 : len(content) - 4096] = os.urandom(len(content) - 8192)
    (tmp_path / "torn").write_bytes(content)
    with pytest.raises(GrexError, match="is damaged"):
        for n in range(2000):
            Store(tmp_path / "torn").get(f"{n:064d}")
    with pytest.raises(GrexError, match="cannot be used"):
        Store(tmp_path / "text" / "below a file")
    ill = Store(tmp_path / "ill")
    ill._file.execute("INSERT INTO answers VALUES ('k', 'm', '{\"finish\": \"error\"')")
    with pytest.raises(GrexError, match="an answer that cannot be read"):
        ill.get("k")


WRITER = """
import sys
from grex_mllm.zeroshot.base import RawAnswer
from grex_mllm.zeroshot.server.store import Store
store = Store(sys.argv[1])
for n in range(int(sys.argv[3])):
    key = f"{sys.argv[2]}{n}"
    store.put(key, "m", RawAnswer(key * 50))
    print(key, flush=True)
"""


def writer(path: Path, name: str, num: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(num)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_several_processes_share_a_store_and_a_kill_loses_nothing(tmp_path):
    path = tmp_path / "answers.sqlite"
    others = [writer(path, name, 300) for name in "abc"]
    killed = writer(path, "k", 10**6)
    assert killed.stdout is not None
    said = [killed.stdout.readline().strip() for _ in range(200)]
    killed.send_signal(signal.SIGKILL)
    said += killed.stdout.read().split()
    assert all(other.wait() == 0 for other in others) and killed.wait() != 0
    for other in others:
        assert other.stdout is not None
        said += other.stdout.read().split()
    store = Store(path)
    assert len(said) >= 1100 and all((answer := store.get(key)) is not None and answer.text == key * 50 for key in said)


def collected(folder: Path, script: Any, drop: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield what a batch API makes of the files of the last round, in another order; `drop`: every so manieth line is missing."""
    lines = [json.loads(line) for file in sorted(max(folder.glob("round_*")).glob("*")) for line in file.read_text().splitlines()]
    for number, line in reversed(list(enumerate(lines))):
        assert line["method"] == "POST" and line["url"] == "/v1/chat/completions"
        if drop is None or number % drop:
            status, _, content = script(line["body"])
            yield {
                "id": "r",
                "custom_id": line["custom_id"],
                "response": {"status_code": status, "body": json.loads(content)},
                "error": None,
            }


def put(folder: Path, name: str, entries: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def batch(folder: Path, conversations: list[Conversation], **settings: Any) -> Server:
    """Write a round and return the message."""
    server = Server("m", "https://host.example/v1", ServerSettings(batch_write=str(folder), **settings))
    assert list(server.hold(iter(conversations))) == []
    return server


def read(folder: Path, conversations: list[Conversation], **settings: Any) -> dict[str, Answer]:
    server = Server("m", "https://host.example/v1", ServerSettings(batch_read=str(folder), **settings))
    answers = {answer.key: answer for answer in server.hold(iter(conversations))}
    server.close()
    return answers


def test_batch_files_of_several_rounds_give_the_answers_of_the_live_server(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    talks = lambda: [rounds(f"c{n}", 1 + n % 3, 1 + n % 2) for n in range(10)]  # noqa: E731
    with FakeServer(echo) as fake:
        live = {answer.key: answer.fields["raw"] for answer in server_at(fake.url).hold(iter(talks()))}
    for number, num in ((1, 15), (2, 9), (3, 4)):
        server = batch(tmp_path, talks(), batch_max_lines=4)
        said = rf"{num} requests are written to {-(-num // 4)} files? of .*round_00{number}; {[0, 4, 7][number - 1]} questions"
        with pytest.raises(GrexError, match=said):
            server.close()
        with pytest.raises(GrexError, match=f"round_00{number}, of which nothing has come back; expected its results"):
            batch(tmp_path, talks())
        put(tmp_path, f"out{number}.jsonl", list(collected(tmp_path, echo)))
    with pytest.raises(GrexError, match="nothing left to write: all 10 questions have their answers"):
        batch(tmp_path, talks()).close()
    assert {key: answer.fields["raw"] for key, answer in read(tmp_path, talks()).items()} == live
    assert not any("sk-secret" in file.read_text() for file in tmp_path.rglob("*.jsonl"))


def test_what_failed_or_expired_is_asked_again_or_ends_with_an_error(tmp_path):
    talks = lambda: [once(f"t{n}") for n in range(9)]  # noqa: E731
    with pytest.raises(GrexError, match="9 requests are written to 1 file of"):
        batch(tmp_path, talks()).close()
    back = list(collected(tmp_path, lambda body: failure(500, "broke") if last_text(body) == "t4" else echo(body), drop=3))
    put(tmp_path, "out.jsonl", [entry for entry in back if entry["response"]["status_code"] == 200])
    failed = [entry for entry in back if entry["response"]["status_code"] != 200]
    put(
        tmp_path,
        "failed.jsonl",
        [*failed, {"custom_id": "f" * 64, "response": None, "error": {"code": "batch_expired", "message": "late"}}],
    )
    answers = read(tmp_path, talks())
    assert {key: answer.fields["raw"].error for key, answer in answers.items() if answer.status == "error"} == {
        "t0": "no result: expired, or not fetched", "t3": "no result: expired, or not fetched", "t4": "status 500: broke",
        "t6": "no result: expired, or not fetched",
    }  # fmt: skip
    with pytest.raises(GrexError, match=r"4 requests are written to 1 file of .*round_002; 5 questions"):
        batch(tmp_path, talks()).close()
    put(tmp_path, "more.jsonl", list(collected(tmp_path, echo)))
    assert all(answer.fields["raw"].text == f"you said {key}" for key, answer in read(tmp_path, talks()).items())
    assert read(tmp_path, [once("t0", max_tokens=7)])["t0"].fields["raw"].error == "no result: it was never written into this folder"


def test_files_of_a_batch_keep_their_limits_and_are_whole(tmp_path):
    with pytest.raises(GrexError, match="30 requests are written"):
        batch(tmp_path, [once(f"t{n}") for n in range(30)], batch_max_bytes=20_000).close()
    files = sorted((tmp_path / "round_001").iterdir())
    assert len(files) > 1 and all(file.stat().st_size <= 20_000 for file in files)
    assert files[0].stat().st_size + len(files[1].read_bytes().splitlines(keepends=True)[0]) > 20_000
    with pytest.raises(GrexError, match=r"a request of [\d,]+ bytes; expected at most batch_max_bytes, 100"):
        batch(tmp_path, [once("x")], batch_max_bytes=100)
    server = Server("m", "https://host.example/v1", ServerSettings(batch_write=str(tmp_path)))
    with pytest.raises(ZeroDivisionError):
        list(server.hold(once("x") if n else 1 / 0 for n in (1, 0)))  # type: ignore[misc]
    server.close()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["round_001"]
    (tmp_path / "cut.jsonl").write_text('{"custom_id": "a"}\n{"custom')
    with pytest.raises(GrexError, match=r"cut.jsonl line 2 cannot be read"):
        read(tmp_path, [])


def test_a_batch_is_one_process_and_uses_the_store(tmp_path, monkeypatch):
    cache = str(tmp_path / "answers.sqlite")
    with pytest.raises(GrexError, match="is no folder"):
        read(tmp_path / "b", [])
    with pytest.raises(GrexError, match="2 requests"):
        batch(tmp_path / "b", [once("a"), once("b")], cache=cache).close()
    put(tmp_path / "b", "out.jsonl", list(collected(tmp_path / "b", echo)))
    read(tmp_path / "b", [once("a"), once("b")], cache=cache)
    with pytest.raises(GrexError, match="nothing left to write: all 2"):
        batch(tmp_path / "elsewhere", [once("a"), once("b")], cache=cache).close()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GrexError, match="expected one process"):
        batch(tmp_path / "b", [])


def test_a_dry_run_shows_the_request_and_sends_nothing(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    with FakeServer(echo) as fake:
        server = server_at(fake.url)
        shown = describe_request(request_of("the dog"), server)
        assert fake.seen == []
        ask(server, [once("the dog")])
    text = json.dumps(shown)
    assert shown["url"] == f"{fake.url}/chat/completions" and shown["headers"]["Authorization"] == "Bearer [key]"
    assert "sk-secret" not in text and len(text) < 1500
    picture = shown["body"]["messages"][1]["content"][0]["image_url"]["url"]
    assert picture.startswith("data:image/png;base64,<") and "sha256" in picture
    (sent,) = fake.seen
    sent["messages"][1]["content"][0]["image_url"]["url"] = picture
    assert shown["body"] == sent


def test_an_estimate_counts_pictures_by_the_given_rule():
    settings = ServerSettings(**QUICK, price_in=10.0, price_out=100.0)
    asked = [request_of("12345678"), request_of("两只狗")]
    known = estimate(asked, settings, lambda width, height: width * height)
    system = text_tokens("You find things.")
    assert (known.calls, known.tokens_out) == (2, 100) and known.tokens_in == 2 * (1200 + system + 10) + 2 + 3 and system == 4
    assert known.cost == pytest.approx((known.tokens_in * 10 + 100 * 100) / 1e6)
    assert known.lines() == [f"2 calls, about {known.tokens_in:,} tokens in, at most 100 out, cost at most 0.03"]


def test_a_picture_is_encoded_once_for_many_expressions(monkeypatch):
    from grex_mllm.zeroshot.server import bodies

    seen, encode = [], bodies.png_bytes
    monkeypatch.setattr(bodies, "png_bytes", lambda picture: (seen.append(1), encode(picture))[1])
    with FakeServer(lambda body: (time.sleep(0.01), completion("a"))[1]) as fake:
        ask(server_at(fake.url, concurrency=1), [once(f"t{n}") for n in range(20)])
    assert len(seen) == 1 and np.asarray(PICTURE.pixels).shape == (30, 40, 3)
