"""What a run tells: log.jsonl, TensorBoard, and a progress bar (plain lines where there is no terminal).

A line of log.jsonl covers the steps since the line before: the mean of every loss term ("loss/ground/mask", "loss/total"), learning
rates, gradient norm, speed and memory. A resumed run cuts off what came after its checkpoint, so no step stands there twice.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grex_mllm.types import Batch
from grex_mllm.writing import whole_file

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import Progress

LOG, BOARD = "log.jsonl", "tensorboard"
PLAIN_LINE_EVERY_S = 5.0


class Window:
    """Sums over the steps of one log line, on this process."""

    def __init__(self) -> None:
        self.all_too_long: Counter[str] = Counter()  # over all lines and processes
        self.reset()

    def reset(self) -> None:
        """Begin the next line."""
        self.sums: dict[str, Tensor] = {}
        self.norms: list[Tensor | float] = []
        self.counts: Counter[str] = Counter()
        self.too_long: Counter[str] = Counter()  # expression id -> times
        self.since = time.perf_counter()

    def add(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Take in one batch; nothing waits for the device here."""
        for name, value in losses.items():
            key = f"loss/{name}"
            self.sums[key] = self.sums[key] + value.detach() if key in self.sums else value.detach().clone()
            self.counts[key] += 1
        self.counts["images"] += len(batch.image_ids)
        self.counts["expressions"] += len(batch.expression_ids)
        self.counts["tokens"] += batch.text_mask.numel()
        self.too_long.update(batch.too_long)

    def close(self, accelerator: Accelerator) -> dict[str, Any]:
        """Join the processes' sums into the fields of one line and start anew; all processes call it."""
        mine: dict[str, dict[str, Any]] = {"sums": {key: float(value) for key, value in self.sums.items()}, "counts": dict(self.counts)}
        mine["too_long"] = dict(self.too_long)
        parts = [mine]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object([mine])
        counts: Counter[str] = Counter()
        sums: dict[str, float] = defaultdict(float)
        too_long: Counter[str] = Counter()
        for part in parts:
            counts.update(part["counts"])
            too_long.update(part["too_long"])
            for key, value in part["sums"].items():
                sums[key] += value
        seconds = max(time.perf_counter() - self.since, 1e-9)
        line: dict[str, Any] = {key: sums[key] / counts[key] for key in sorted(sums)}
        if self.norms:
            line["grad_norm"] = float(torch.stack([torch.as_tensor(norm, dtype=torch.float32).cpu() for norm in self.norms]).mean())
        line |= {f"{name}_per_s": round(counts[name] / seconds, 3) for name in ("images", "expressions", "tokens")}
        line["peak_memory_bytes"] = peak_memory(accelerator.device)
        if too_long:
            line["too_long"] = sum(too_long.values())
            self.all_too_long.update(too_long)
        self.reset()
        return line


class RunLog:
    """Write the lines of one run and show its progress; only the main process writes or shows anything.

    start: finished steps at the beginning (0 for a new run).
    """

    def __init__(self, out: str | Path, start: int, stop: int, active: bool) -> None:
        self.active, self.start, self.stop = active, start, stop
        self.began = self.last_plain = time.perf_counter()
        if not active:
            return
        from rich.console import Console
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        cut_log(folder / LOG, start)
        self.file = (folder / LOG).open("a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / BOARD), purge_step=start + 1)
        self.console = Console()
        self.progress = self._bar() if self.console.is_terminal else None

    def _bar(self) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
        bar.start()
        bar.add_task("train", total=self.stop, completed=self.start, text="")
        return bar

    def step(self, step: int) -> None:
        """Move the bar."""
        if self.active and self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step)

    def write(self, step: int, line: dict[str, Any], learning_rates: list[float]) -> dict[str, Any]:
        """Write one line everywhere and return it."""
        line = {
            "step": step,
            **line,
            **{f"lr/{index}": lr for index, lr in enumerate(learning_rates)},
            "elapsed_s": round(time.perf_counter() - self.began, 3),
        }
        if self.active:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for key, value in line.items():
                if isinstance(value, int | float) and key != "step":
                    self.board.add_scalar(key, value, step)
            self._show(step, line)
        return line

    def sync(self) -> None:
        """Bring the lines to the disk; called before a checkpoint, which must not be ahead of its log."""
        if self.active:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.board.flush()

    def say(self, text: str) -> None:
        """Print a line beside the bar."""
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self.active:
            if self.progress is not None:
                self.progress.stop()
            self.file.close()
            self.board.close()

    def _show(self, step: int, line: dict[str, Any]) -> None:
        text = f"loss {line['loss/total']:.3f}"
        speed = f"{line['expressions_per_s']:.0f} expressions/s"
        if self.progress is not None:
            parts = "  ".join(
                f"{key.split('/')[2]} {value:.3f}" for key, value in line.items() if key.count("/") == 2 and not key.endswith("/total")
            )
            self.progress.update(self.progress.task_ids[0], completed=step, text=f"{speed}  {text}  {parts}")
            return
        now = time.perf_counter()
        if now - self.last_plain >= PLAIN_LINE_EVERY_S or step == self.stop:
            self.last_plain = now
            left = (now - self.began) / max(step - self.start, 1) * (self.stop - step)
            self.say(f"step {step}/{self.stop}  {text}  {speed}  {left / 60:.1f} min left")


def cut_log(file: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, and a line that was being written when the run was killed."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    with whole_file(file) as work:
        work.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def peak_memory(device: torch.device) -> int:
    """Return the most memory in bytes that this process has used: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import sys

    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
