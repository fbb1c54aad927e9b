"""`grex predict --model openai:...` against servers on loopback: killed, shared, with faults: each question once, the same file, no key."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from fake_server import FAULTS, FakeServer, FaultyProxy, completion, faulty, last_text
from PIL import Image
from test_server_files import collected, put

from grex_mllm.errors import GrexError
from grex_mllm.predict import predict_split
from grex_mllm.zeroshot.settings import read_settings

KEY = "sk-secret/9+key=0123456789"
SLOW = {"429 date", "trickle", "stall"}


def script(body: dict[str, Any]) -> Any:
    """Answer by what was asked, its picture included: boxes, nothing, a refusal, words, an answer that was cut, an echo of the key."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    box = sorted(digest[1:3]) + sorted(digest[3:5])
    found = json.dumps({"boxes": [{"bbox": [box[0] // 8, box[2] // 8, box[1] // 8 + 1, box[3] // 8 + 1]}] * (digest[5] % 3)})
    if "bounding box" not in last_text(body):
        return completion(f"the thing number {digest[6]}")
    plain = {0: completion(None, refusal="I will not."), 1: completion("It is on the left."), 2: completion(found[:20], "length"),
             3: completion(f"Authorization: Bearer {KEY}")}  # fmt: skip
    return plain.get(digest[0] % 16, completion(f"```json\n{found}\n```", usage=(digest[7], 9, 0)))


def dataset(folder: Path, images: int, expressions: int) -> Path:
    """Write pictures of 32 pixels, no two alike, with one object and many expressions each."""
    (folder / "images").mkdir(parents=True)
    records, asked = [], []
    for n in range(images):
        Image.fromarray(np.random.default_rng(n).integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "images" / f"{n}.png")
        thing = {"annotation_id": f"{n}:0", "category": "dog", "box_xyxy": [2, 3, 12, 13], "segmentation": [[2, 3, 12, 3, 12, 13, 2, 13]]}
        records.append(
            {"image_id": f"{n}", "file": f"images/{n}.png", "height": 32, "width": 32, "instances": [{**thing, "iscrowd": False}]}
        )
        for k in range(expressions):
            text = f"the dog number {k}"
            asked.append({"expression_id": f"{n}#{k}", "ref_id": f"{n}#{k}", "image_id": f"{n}", "expression": text, "raw": text}
                         | {"targets": [f"{n}:0"] if k % 3 else [], "split": "test", "source": "made", "tags": []})  # fmt: skip
    (folder / "images.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "expressions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    info = {"name": "made", "tool": "a test", "sources": [], "licence": "MIT", "image_root": ".", "skipped": {}}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def predict(data: Path, out: Path, url: str, *flags: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `grex predict`; what it says goes to a file beside its output."""
    command = [sys.executable, "-m", "grex_mllm", "predict", "--model", "openai:gpt-4o-mini", "--base-url", url, "--data", str(data)]
    command += ["--split", "test", "--out", str(out), "--server.backoff_s=0.01", "--server.backoff_cap_s=0.1", "--server.tries=8", *flags]
    out.parent.mkdir(parents=True, exist_ok=True)
    told = (out.parent / f"{out.name}.told{(env or {}).get('RANK', '')}").open("a")
    known = {**os.environ, "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1", **(env or {})}
    # a shell starts what runs in the background, and so its children, deaf to the keyboard
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, cwd=ROOT, env=known, stdout=told, stderr=told, text=True, preexec_fn=hear)


def done(run: subprocess.Popen[str], out: Path) -> bytes:
    told = out.parent / f"{out.name}.told"
    assert run.wait(timeout=600) == 0, told.read_text() if told.exists() else ""
    return out.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes, int]]:
    """A dataset, the file of an undisturbed run on it, and the number of its requests."""
    root = tmp_path_factory.mktemp("small")
    data = dataset(root / "data", 4, 12)
    with FakeServer(script) as fake:
        yield (
            root,
            done(predict(data, root / "plain" / "p.jsonl", fake.url, "--tasks=ground,generate"), root / "plain" / "p.jsonl"),
            len(fake.seen),
        )


def test_every_question_has_a_line_and_the_key_is_nowhere(small):
    root, expected, num = small
    lines = [json.loads(line) for line in expected.splitlines()]
    assert len(lines) == num == 4 * 12 + 4 and [line["expression_id"] for line in lines if "targets" not in line][:3] == [
        "0#0",
        "0#1",
        "0#2",
    ]
    assert {line["status"] for line in lines} == {"ok", "refused", "unparsable"}
    assert any("[key]" in json.dumps(line["raw"]) for line in lines)
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if KEY.encode() in path.read_bytes() or b"9+key" in path.read_bytes()]


def test_a_killed_client_goes_on_and_pays_nothing_twice(small, tmp_path):
    root, expected, num = small
    out = tmp_path / "p.jsonl"
    with FakeServer(script, delay_s=0.05) as fake:
        flags = ("--tasks=ground,generate", "--server.concurrency=4")
        run = predict(root / "data", out, fake.url, *flags)
        while len(fake.seen) < num // 2:
            time.sleep(0.01)
            assert run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not out.exists()
        assert done(predict(root / "data", out, fake.url, *flags, "--server.concurrency=8"), out) == expected
        assert num <= len(fake.seen) <= num + 4


def test_an_interrupt_from_the_keyboard_ends_the_run_at_once(small, tmp_path):
    root, expected, _ = small
    out = tmp_path / "p.jsonl"
    slow = threading.Event()
    with FakeServer(lambda body: (len(fake.seen) > 9 and slow.wait(30), script(body))[1]) as fake:
        run = predict(root / "data", out, fake.url, "--tasks=ground,generate", "--server.concurrency=3")
        while len(fake.seen) <= 9:
            time.sleep(0.01)
        start = time.monotonic()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) != 0 and time.monotonic() - start < 5.0
        slow.set()
        assert len((tmp_path / "p.jsonl.part").read_text().splitlines()) >= 5  # of ten, three are under way, one or two not yet written
        assert done(predict(root / "data", out, fake.url, "--tasks=ground,generate"), out) == expected


def test_batch_files_give_the_file_of_a_live_run(small, tmp_path, monkeypatch):
    root, expected, num = small
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(**settings: Path) -> Path:
        flags = [f"--server.{name}={value}" for name, value in settings.items()]
        where = ("openai:gpt-4o-mini", str(root / "data"), tmp_path / "p.jsonl", "test", ["ground", "generate"])
        return predict_split(*where, asked={"base_url": "https://host.example/v1"}, overrides=flags)

    with pytest.raises(GrexError, match=f"{num} requests are written to 1 file"):
        run(batch_write=tmp_path / "b")
    assert not list(tmp_path.glob("p.jsonl*.part"))
    put(tmp_path / "b", "out.jsonl", list(collected(tmp_path / "b", script)))
    with pytest.raises(GrexError, match=f"nothing left to write: all {num} questions"):
        run(batch_write=tmp_path / "b")
    assert run(batch_read=tmp_path / "b").read_bytes() == expected


@pytest.mark.long
def test_a_client_that_is_killed_again_and_again_comes_to_the_same_file(small, tmp_path):
    root, expected, _ = small
    out = tmp_path / "p.jsonl"
    faults = [str(np.random.default_rng(n).choice(FAULTS)) if n % 5 == 2 else "" for n in range(10_000)]
    kills = 0
    with faulty(lambda body: (time.sleep(0.05), script(body))[1], lambda n: faults[n], stall_s=0.3) as (_, proxy):
        while not out.exists():
            run = predict(root / "data", out, proxy.url, "--tasks=ground,generate", "--server.read_timeout_s=2", "--server.concurrency=2")
            goal = len(proxy.done) + 9
            while run.poll() is None and (len(proxy.done) < goal or kills >= 6):
                time.sleep(0.01)
            run.send_signal(signal.SIGKILL)
            kills += run.wait() != 0
    assert out.read_bytes() == expected and kills >= 5


@pytest.mark.long
def test_two_processes_that_share_a_run_give_the_file_of_one(small, tmp_path):
    root, expected, num = small
    out = tmp_path / "p.jsonl"
    with FakeServer(script) as fake:
        ranks = [
            predict(root / "data", out, fake.url, "--tasks=ground,generate", env={"RANK": str(r), "WORLD_SIZE": "2"}) for r in range(2)
        ]
        assert [run.wait(timeout=300) for run in ranks] == [0, 0]
        assert len(fake.seen) == num
    assert out.read_bytes() == expected


@pytest.mark.long
def test_ten_thousand_requests_with_faults_give_the_file_of_none(tmp_path):
    data = dataset(tmp_path / "data", 200, 50)
    rng = np.random.default_rng(3)
    names = [name for name in FAULTS if name not in SLOW]
    faults = [str(rng.choice(names)) if rng.random() < 0.02 else "" for _ in range(20_000)]
    for n in range(50, 10_000, 1000):  # the slow ones, less often
        faults[n : n + 3] = sorted(SLOW)
    with faulty(script, lambda n: faults[n], stall_s=1.0) as (fake, proxy):
        flags = ("--tasks=ground", "--server.concurrency=16", "--server.read_timeout_s=5", "--server.total_timeout_s=5")
        plain = done(predict(data, tmp_path / "plain" / "p.jsonl", fake.url, *flags), tmp_path / "plain" / "p.jsonl")
        assert len(fake.seen) == 10_000
        broken = done(predict(data, tmp_path / "broken" / "p.jsonl", proxy.url, *flags), tmp_path / "broken" / "p.jsonl")
        assert sum(fault != "" for fault in proxy.done) >= 150 and len(proxy.done) == 10_000 + sum(fault != "" for fault in proxy.done)
    assert plain == broken and len(plain.splitlines()) == 10_000
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.long
def test_a_server_that_stalls_for_half_a_minute_dies_and_comes_back(small, tmp_path):
    root, expected, _ = small
    out = tmp_path / "p.jsonl"
    with FakeServer(script, delay_s=0.05) as fake, FaultyProxy(fake.port, lambda n: "stall" if n in (3, 9) else "", stall_s=30.0) as proxy:
        run = predict(root / "data", out, proxy.url, "--tasks=ground,generate", "--server.read_timeout_s=10", "--server.concurrency=2")
        while len(proxy.done) < 20:
            time.sleep(0.05)
        proxy.die()
        time.sleep(15.0)
        proxy.start()
        assert done(run, out) == expected
    assert "takes no connection" in (tmp_path / "p.jsonl.told").read_text()
    with FakeServer(script) as fake, FaultyProxy(fake.port, lambda n: "stall" if n == 3 else "", stall_s=30.0) as proxy:
        start = time.monotonic()
        raw = predict(root / "data", tmp_path / "patient" / "p.jsonl", proxy.url, "--tasks=ground,generate")
        assert done(raw, tmp_path / "patient" / "p.jsonl") == expected and time.monotonic() - start >= 30.0


def test_every_setting_of_the_document_exists():
    flags = re.findall(r"--(?:server|ask)\.\w+=(?:'[^']+'|[\w./]+)", (ROOT / "docs" / "servers.md").read_text(encoding="utf-8"))
    assert len(flags) > 15
    for flag in flags:
        (word,) = shlex.split(flag)
        read_settings([word.replace("=FILE", "=x.sqlite")])
