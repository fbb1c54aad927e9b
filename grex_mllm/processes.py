"""Prediction of a split by several processes of this machine, where one with several threads would be slower.

On a CPU a language model writes a text token by token, in products too small to be worth a second thread; images are independent. The
processes share the images as under torchrun, by RANK and WORLD_SIZE, and each goes on where it was cut off.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from grex_mllm.config import load_config
from grex_mllm.errors import GrexError
from grex_mllm.precision import resolve_precision

MOST = 8
BYTES_EACH = 4 << 30  # of memory that a process may want: one with a language model of 135 million parameters in float32 takes half of it
POLL_S = 0.2
GRACE_S = 10.0


def num_processes(threads: int | None = None) -> int:
    """Return how many processes should predict here: one a thread as far as memory goes, one alone beside a CUDA GPU.

    threads: at most so many; default: those of torch.
    """
    if torch.cuda.is_available():
        return 1
    room = psutil.virtual_memory().available // BYTES_EACH
    return max(1, min(threads or torch.get_num_threads(), room, MOST))


def predict_in_processes(model: Path, data: Path, split: str, out: Path, *, tasks: Sequence[str], listener: int, number: int) -> None:
    """Write `out` as `predict_split` does, by `number` processes on the CPU; what they print appears here.

    Raises:
        GrexError: one of them failed; the others are ended, and what is answered stays for another run.
    """
    # measured once: they must not come to different ends
    precision = resolve_precision(load_config(model / "config.yaml", trusted=False).predict.precision, "cpu").precision
    words = [sys.executable, "-m", "grex_mllm", "predict", "--model", str(model), "--data", str(data), "--split", split, "--out", str(out)]
    words += ["--tasks", ",".join(tasks), "--listener", str(listener), "--device", "cpu", f"--predict.precision={precision}"]
    shared = {"WORLD_SIZE": str(number), "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // number))}
    with _ending_together() as started:
        for rank in range(number):
            started.append(subprocess.Popen(words, env={**os.environ, **shared, "RANK": str(rank)}))
        while any(process.poll() is None for process in started):
            _check(started)
            time.sleep(POLL_S)
        _check(started)


def _check(started: Sequence[subprocess.Popen[Any]]) -> None:
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        raise GrexError(
            f"prediction: one of {len(started)} processes ended with status {failed[0]}; expected 0; see its message above, then give the "
            "same command again: what is answered stays"
        )


@contextmanager
def _ending_together() -> Iterator[list[subprocess.Popen[Any]]]:
    """Yield a list of processes, none of which outlives the block, also where SIGTERM ends this one."""
    started: list[subprocess.Popen[Any]] = []
    handles = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _as_exit) if handles else None
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _as_exit(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
