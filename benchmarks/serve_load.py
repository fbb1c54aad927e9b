"""Load on `grex serve`: clients at once against the real server process, each with pictures of its own.

python benchmarks/serve_load.py --model runs/demo

Every client uploads its picture, asks one expression (the first answer), then further ones of the same picture, describes a box where the
model describes, and begins anew, without a pause. All pictures are drawn scenes of different sizes. What each client must be told was
computed by the model in this process before: masks and pixels of another client's picture are noticed. Printed: latencies of the
clients, the model's own time for the same work in one thread, and the resident memory of the server along the way. Status 1: an error, an
answer that belongs to somebody else, or memory that grows by more than MAX_GROWTH once the server holds all pictures that it may (the last
third of the time since then against the first; null: too few pictures came to tell).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import psutil
import torch
from PIL import Image

from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import encode_rle
from grex_mllm.serve.engine import Engine, Selection
from grex_mllm.serve.held import Pictures

FURTHER = 4  # expressions after the first, one request each
BOX = (8.0, 8.0, 40.0, 40.0)
FIRST, MORE, DESCRIBED = "first answer (upload and one expression)", "further expression of the same picture", "description of a box"
MAX_GROWTH = 1.05
SAMPLED_S = 0.5
MIN_SAMPLES = 6  # of the memory


@dataclass
class Case:
    """A client's picture (PNG), its expressions, and what the model itself answers: run-length codes of masks."""

    png: bytes
    pixels: np.ndarray
    expressions: list[str]
    answers: list[dict[str, Any]]


@dataclass
class Found:
    """seconds: of each kind of request.  errors, mixed: texts, empty where all is well.  uploads: pictures that the server has taken.

    memory_mib: (uploads by then, MiB of the server).
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    uploads: int = 0
    memory_mib: list[tuple[int, float]] = field(default_factory=list)

    def growth(self, held: int) -> float | None:
        """Return the server's memory in the last third of the time in which it held all the pictures that it may, divided by that in the
        first third (medians); None where that time is too short."""
        full = [mib for uploads, mib in self.memory_mib if uploads > held]
        third = len(full) // 3
        return statistics.median(full[-third:]) / statistics.median(full[:third]) if len(full) >= MIN_SAMPLES else None


def make_cases(model: GrexModel, number: int) -> list[Case]:
    """Draw a scene for each client, cut to a size that no other has, and ask the model itself."""
    scenes = SyntheticDataset(model.config.data.sources.get("synthetic") or SyntheticConfig(), "test", number, 1 + FURTHER)
    cases = []
    for n in range(number):
        sample = scenes[n]
        height, width = sample.image.shape[:2]
        pixels = np.ascontiguousarray(sample.image[: height - n % 8, : width - n // 8])
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="PNG")
        texts = [record.expression for record in sample.expressions]
        texts = (texts * (1 + FURTHER))[: 1 + FURTHER]
        encoded = model.encode(pixels)
        cases.append(Case(file.getvalue(), pixels, texts, [encode_rle(model.ground(encoded, text).mask) for text in texts]))
    return cases


def own_time(model: GrexModel, cases: list[Case]) -> dict[str, float]:
    """Return the median seconds of the model for each kind of request, without a server, one after another."""
    engine, taken = Engine(model, Pictures(2)), defaultdict(list)
    for case in cases[:20]:
        start = time.perf_counter()
        held = engine.open_upload(case.png)
        engine.ground(held, [case.expressions[:1]], None)
        taken[FIRST].append(time.perf_counter() - start)
        for text in case.expressions[1:]:
            start = time.perf_counter()
            engine.ground(held, [[text]], None)
            taken[MORE].append(time.perf_counter() - start)
        if engine.describes:
            start = time.perf_counter()
            engine.describe(held, Selection((), (BOX,)), 1)
            taken[DESCRIBED].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


@contextmanager
def server(model: str, pictures: int, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Start `grex serve` at a free port; give its address and its process."""
    words = [sys.executable, "-m", "grex_mllm", "serve", "--model", model, "--port", "0", "--pictures", str(pictures)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as program:
        try:
            assert program.stdout is not None
            line = program.stdout.readline()
            address = re.search(r"http://\S+/", line)
            if address is None:
                raise SystemExit(f"no server: {line}")
            yield address[0], psutil.Process(program.pid)
        finally:
            program.terminate()


def client(address: str, case: Case, describes: bool, until: float, found: Found, lock: threading.Lock) -> None:
    """Ask until the time is over, at least one round; note how long each answer took, and whether it is this client's own."""
    with httpx2.Client(base_url=address, timeout=120) as http:

        def ask(path: str, **given: Any) -> Any:
            answer = http.post(path, **given)
            if answer.status_code != 200:
                raise ValueError(f"{path}: {answer.status_code} {answer.text[:200]}")
            return answer.json()

        def ground(name: str, n: int) -> None:
            result = ask("/ground", json={"image": name, "expressions": [case.expressions[n]]})["results"][0]
            if (result["expression"], result["mask_rle"]) != (case.expressions[n], case.answers[n]):
                found.mixed.append(f"{name}: mask of {result['mask_rle']['size']} for {case.pixels.shape[:2]}: {result['expression']}")

        over = False
        while not over:
            taken = []
            try:
                start = time.perf_counter()
                opened = ask("/images", content=case.png, headers={"content-type": "image/png"})
                with lock:
                    found.uploads += 1
                ground(opened["image"], 0)
                taken.append((FIRST, time.perf_counter() - start))
                if (opened["height"], opened["width"]) != case.pixels.shape[:2]:
                    found.mixed.append(f"{opened['image']}: {opened['height']}x{opened['width']} for {case.pixels.shape[:2]}")
                for n in range(1, 1 + FURTHER):
                    start = time.perf_counter()
                    ground(opened["image"], n)
                    taken.append((MORE, time.perf_counter() - start))
                if describes:
                    start = time.perf_counter()
                    said = ask("/describe", json={"image": opened["image"], "boxes_xyxy": [BOX], "candidates": 1})
                    taken.append((DESCRIBED, time.perf_counter() - start))
                    if said["masks_rle"][0]["size"] != list(case.pixels.shape[:2]):
                        found.mixed.append(f"{opened['image']}: described at {said['masks_rle'][0]['size']}")
                shown = http.get(f"/images/{opened['image']}/pixels").content
                if not np.array_equal(np.asarray(Image.open(io.BytesIO(shown))), case.pixels):
                    found.mixed.append(f"{opened['image']}: pixels of another picture")
            except (ValueError, OSError, KeyError, httpx2.HTTPError) as error:
                found.errors.append(f"{type(error).__name__}: {error}")
            with lock:
                for kind, seconds in taken:
                    found.seconds[kind].append(seconds)
            over = time.monotonic() >= until


def load(address: str, process: psutil.Process, cases: list[Case], describes: bool, seconds: float) -> Found:
    """Let all clients ask at once for so many seconds, and look at the server's memory meanwhile."""
    found, lock, start = Found(), threading.Lock(), time.monotonic()
    with ThreadPoolExecutor(len(cases)) as pool:
        asked = [pool.submit(client, address, case, describes, start + seconds, found, lock) for case in cases]
        while time.monotonic() < start + seconds:
            found.memory_mib.append((found.uploads, process.memory_info().rss / 2**20))
            time.sleep(min(SAMPLED_S, seconds / 20))
        for one in asked:
            one.result()
    return found


def table(found: Found, own: dict[str, float]) -> str:
    """Return the latencies as a Markdown table, in milliseconds."""
    lines = ["| what | answers | median | 95 % | slowest | the model alone |", "|---|---|---|---|---|---|"]
    for kind, values in found.seconds.items():
        ordered = sorted(1000 * value for value in values)
        numbers = (statistics.median(ordered), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1], 1000 * own[kind])
        lines.append(f"| {kind} | {len(ordered):,} | " + " | ".join(f"{number:,.0f}" for number in numbers) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--clients", type=int, default=50, help="at once, at most 64 (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1, help="of the server's torch, and of the model alone (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = GrexModel.from_pretrained(options.model, device="cpu")
    describes = model.generator is not None
    cases = make_cases(model, options.clients)
    own = own_time(model, cases)
    held = 2 * options.clients
    with server(options.model, held, options.threads) as (address, process):
        found = load(address, process, cases, describes, options.seconds)
    growth = found.growth(held)
    print(table(found, own))
    first, last = found.memory_mib[0][1], found.memory_mib[-1][1]
    told = {
        "errors": len(found.errors),
        "mixed": len(found.mixed),
        "answers": sum(map(len, found.seconds.values())),
        "pictures": found.uploads,
    }
    told |= {"memory_mib": [round(first), round(last)], "memory_growth": None if growth is None else round(growth, 3)}
    print(json.dumps(told))
    for text in [*found.errors[:5], *found.mixed[:5]]:
        print(text, file=sys.stderr)
    return int(bool(found.errors or found.mixed) or (growth is not None and growth > MAX_GROWTH))


if __name__ == "__main__":
    sys.exit(main())
