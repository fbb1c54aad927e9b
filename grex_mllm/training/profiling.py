"""`train.profile`: a trace of some steps, and a table of the time by part of the model.

Forward operations belong to the innermost part whose `forward` they ran in; backward operations to the part of the forward operation that
made them, which torch's profiler tells by sequence number. What runs again for gradient checkpointing counts as backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from grex_mllm.writing import whole_folder

FOLDER, TRACE, TABLE = "profile", "trace.json", "parts.txt"
MARK, OPTIMIZER, OTHER = "part: ", "optimizer", "other (losses, data, copies)"
SKIPPED = 2  # steps before the first one that is recorded: kernels are chosen, memory is allocated
DEPTH = 3  # dots in the names of the modules of a part that are marked: a part may be run by other methods than its forward
BACKWARD = "autograd::engine::evaluate_function"


class StepProfile:
    """Record `steps` steps of a training after the first SKIPPED ones; then write the folder `profile` of the run.

    parts: name -> module.  Call `step` after every step; nothing is recorded, and nothing slowed, before and after.
    """

    def __init__(self, parts: dict[str, nn.Module], out: str | Path, steps: int, say: Callable[[str], None]) -> None:
        self.parts, self.folder, self.steps, self.say = parts, Path(out) / FOLDER, steps, say
        self.finished, self.hooks = 0, list[Any]()
        self.profiler: Any = None

    def step(self) -> None:
        """Count a finished step; begin after the first ones, and write when all are recorded."""
        self.finished += 1
        if self.steps and self.finished == SKIPPED:
            self._begin()
        elif self.profiler is not None and self.finished == SKIPPED + self.steps:
            self.close()

    def close(self) -> None:
        """Stop recording and write what there is; for a run that ends early, too."""
        if self.profiler is None:
            return
        self.profiler.stop()
        for hook in self.hooks:
            hook.remove()
        steps, text = self.finished - SKIPPED, ""
        if steps > 0:
            text = table_of(time_by_part(self.profiler.events()), steps)
            with whole_folder(self.folder) as work:
                self.profiler.export_chrome_trace(str(work / TRACE))
                (work / TABLE).write_text(text, encoding="utf-8")
            self.say(f"profile of {steps} steps in {self.folder} ({TRACE} for a trace viewer)\n{text}")
        self.profiler = None

    def _begin(self) -> None:
        for part, whole in self.parts.items():
            for name, module in whole.named_modules():
                if name.count(".") <= DEPTH:
                    self._mark(module, part)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=activities)
        self.profiler.start()

    def _mark(self, module: nn.Module, part: str) -> None:
        open_marks: list[Any] = []

        def enter(*_: Any) -> None:
            open_marks.append(record_function(MARK + part))
            open_marks[-1].__enter__()

        def leave(*_: Any) -> None:
            open_marks.pop().__exit__(None, None, None)

        self.hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def parts_of(step: nn.Module) -> dict[str, nn.Module]:
    """Name the parts of a step whose time is told apart: those of the model's own parts, and the criterion."""
    model: Any = step.model
    parts = {name: module for part in model.children() for name, module in part.named_children()}
    return parts | {name: module for name, module in step.named_children() if module is not model}


def time_by_part(events: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Return {part: {"forward" | "backward": microseconds}} of the events of torch's profiler; on a GPU the time of its kernels."""
    placed = by_part(events)
    on_device = any(event.self_device_time_total for event, _, _ in placed)
    times: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event, part, direction in placed:
        times[part][direction] += event.self_device_time_total if on_device else event.self_cpu_time_total
    return {part: row for part, row in times.items() if sum(row.values())}


def by_part(events: Iterable[Any]) -> list[tuple[Any, str, str]]:
    """Return (event, part, "forward" | "backward") of the events of torch's profiler, in the order of time."""
    makers: dict[tuple[int, int], str] = {}  # (thread, sequence number) -> the part whose operation made that node of the backward graph
    places: dict[int, tuple[str, str]] = {}  # of an event -> (part, direction)
    found = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        part, direction = places[id(event)] = _place(event, places, makers)
        if event.sequence_nr >= 0 and not _is_node(event):
            makers[event.thread, event.sequence_nr] = part  # the last operation with a number is the one that made the node
        found.append((event, part, direction))
    return found


def table_of(times: dict[str, dict[str, float]], steps: int) -> str:
    """Return a table: milliseconds a step, forward and backward, and share of the whole, largest first."""
    whole = sum(sum(row.values()) for row in times.values()) or 1.0
    lines = [f"{'part':44s} {'forward ms':>11s} {'backward ms':>12s} {'share':>7s}"]
    for name, row in sorted(times.items(), key=lambda item: -sum(item[1].values())):
        forward, backward = (row[way] / 1000 / steps for way in ("forward", "backward"))
        lines.append(f"{name:44s} {forward:11.1f} {backward:12.1f} {sum(row.values()) / whole:7.1%}")
    return "\n".join([*lines, f"{'sum':44s} {whole / 1000 / steps:24.1f} {'':7s}".rstrip(), ""])


def _is_node(event: Any) -> bool:
    return str(event.name).startswith(BACKWARD)


def _place(event: Any, places: dict[int, tuple[str, str]], makers: dict[tuple[int, int], str]) -> tuple[str, str]:
    """Return (part, direction) of an event, whose parent has been placed."""
    around = places.get(id(event.cpu_parent), (OTHER, "forward"))
    if event.name.startswith(MARK):
        return event.name.removeprefix(MARK), around[1]
    if event.name.startswith("Optimizer.step"):
        return OPTIMIZER, "forward"
    if _is_node(event):
        return makers.get((event.fwd_thread or event.thread, event.sequence_nr), OTHER), "backward"
    return around
