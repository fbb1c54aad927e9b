"""The server backend against `transformers serve`: a tiny random multimodal model in its own process, asked by HTTP."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from score_case import read_lines
from test_server import QUICK, ask, once
from tiny_mllms import write_mllm

from grex_mllm.cli import main
from grex_mllm.data.records import load_dataset
from grex_mllm.shipped import PROMPT_FOLDER
from grex_mllm.zeroshot.base import Turn
from grex_mllm.zeroshot.server.server import Server
from grex_mllm.zeroshot.server.settings import ServerSettings

NEEDED = ("fastapi", "uvicorn", "openai")
LINES = ["the two people on the left", "where is the dog? give its box", "there is no such object in the image"]

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason=f"needs {', '.join(NEEDED)}: pip install 'grex-mllm[serve]'"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL and model name of a server that is up."""
    folder = write_mllm("llava", tmp_path_factory.mktemp("served") / "llava-tiny", LINES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    told = (folder.parent / "told").open("w")
    run = subprocess.Popen(command, stdout=told, stderr=told, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/health", run, folder.parent / "told")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        run.terminate()
        run.wait(timeout=30)


def wait_for(url: str, run: subprocess.Popen[bytes], told: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert run.poll() is None, told.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(told.read_text())


def server_of(served: tuple[str, str], **settings: Any) -> Server:
    url, model = served
    return Server(model, url, ServerSettings(**(QUICK | {"read_timeout_s": 60.0, "total_timeout_s": 60.0, "concurrency": 2} | settings)))


@pytest.mark.slow
def test_a_real_server_answers_and_counts(served):
    server = server_of(served)
    answers = ask(server, [once(f"where is the dog? {n}", max_tokens=8) for n in range(3)])
    assert all(raw.error is None and raw.text is not None and raw.finish in ("stop", "length") for raw in answers.values())
    assert all(1 <= raw.usage["completion_tokens"] <= 8 for raw in answers.values()) and not server.caller.notes
    again = ask(server, [once("where is the dog? 1", max_tokens=8)])
    assert again["where is the dog? 1"].text == answers["where is the dog? 1"].text
    turns = (Turn("user", ("where is the dog? 1",)),)
    blind = ask(server, [once("where is the dog? 1", max_tokens=8, turns=turns)])["where is the dog? 1"]
    assert answers["where is the dog? 1"].usage["prompt_tokens"] >= blind.usage["prompt_tokens"] + 9  # the picture's tokens


def test_a_real_server_refuses_fields_and_the_client_adapts(served, capsys):
    server = server_of(served, structured="structured_outputs")
    raw = ask(server, [once("where?", max_tokens=4, schema={"type": "object"})])["where?"]
    assert raw.finish in ("stop", "length") and "refuses the field structured_outputs: it is left out" in capsys.readouterr().err
    refused = ask(server_of(served, body={"top_k": 1}), [once("where?", max_tokens=4)])["where?"]
    assert refused.error == "status 422: Unexpected fields in the request: {'top_k'}"


@pytest.mark.long
def test_forty_photographs_through_a_real_server(served, shared, tmp_path, capsys):
    """GREC, GRES (box masks) and GREG of a model that babbles: every question ends once, raw answers and shares are kept."""
    spec = importlib.util.spec_from_file_location("coco_templates", ROOT / "data_prep" / "coco_templates.py")
    assert spec is not None and spec.loader is not None
    coco_templates = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(coco_templates)
    photos, data = shared / "data" / "photos", tmp_path / "data"
    words = ["--source", f"photos={photos / 'instances.json'}:{photos / 'images'}", "--out", str(data), "--splits", "test=1.0"]
    assert coco_templates.main([*words, "--expressions-per-image", "3"]) == 0
    prompts = []
    for task, name in (("grec", "native_llava"), ("greg", "uniform")):
        text = (PROMPT_FOLDER / task / f"{name}.yaml").read_text(encoding="utf-8")
        prompts.append(tmp_path / f"{task}.yaml")
        prompts[-1].write_text(re.sub(r"(?m)^max_tokens: \d+", "max_tokens: 24", text), encoding="utf-8")
    url, model = served
    given = ["--model", f"openai:{model}", "--base-url", url, "--data", str(data), "--split", "test", "--limit", "40"]
    given += ["--ask.family=llava", f"--ask.prompt={prompts[0]}", f"--ask.describe={prompts[1]}", "--server.concurrency=4"]
    assert main(["predict", *given, "--out", str(tmp_path / "first.jsonl")]) == 0
    lines = read_lines(tmp_path / "first.jsonl")
    ground, sets = ([line for line in lines if ("expression_id" in line) == wanted] for wanted in (True, False))
    split = load_dataset(data).expressions_of("test")
    images = list(dict.fromkeys(record.image_id for record in split))[:40]
    wanted = [record for record in split if record.image_id in images]
    assert len(images) == 40 and sorted(line["expression_id"] for line in ground) == sorted(record.expression_id for record in wanted)
    assert len(sets) == len({(r.image_id, *sorted(r.targets)) for r in wanted if r.targets}) >= 30
    assert all(line["raw"] and "text" in line["raw"][0] and line["status"] in ("ok", "unparsable", "refused") for line in lines)
    score = ["score", str(tmp_path / "first.jsonl"), "--data", str(data), "--split", "test", "--allow_missing"]
    assert main([*score, "--out", str(tmp_path / "first.json")]) == 0
    asked = json.loads((tmp_path / "first.json").read_text())["provenance"]["predictions"]["asked"]
    assert asked["ground"]["num_samples"] == len(wanted) and sum(asked["ground"]["shares"].values()) == pytest.approx(1)
    assert asked["ground"]["shares"]["unparsable"] > 0.5 and "asked (ground," in capsys.readouterr().out
    assert main(["predict", *given, "--out", str(tmp_path / "again.jsonl")]) == 0  # out of the store: no call, the same file
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()
    spent = [json.loads(line) for line in (tmp_path / "again.costs.jsonl").read_text().splitlines()]
    assert sum(line["cached"] for line in spent) == sum(line["calls"] for line in spent) == len(lines)
