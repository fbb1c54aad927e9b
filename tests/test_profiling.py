"""The profile of a training: which part an operation belongs to, forward and backward; what is written, and when."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_validation import few_lines_and_one_thread, validating
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from grex_mllm.training.profiling import MARK, OTHER, StepProfile, by_part, table_of, time_by_part
from grex_mllm.training.run import train_from_config

__all__ = ["few_lines_and_one_thread"]


class Two(nn.Module):
    """A large and a small part."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Linear(400, 1200), nn.ReLU(), nn.Linear(1200, 400))
        self.small = nn.Linear(400, 40)

    def forward(self, x: torch.Tensor, again: bool) -> torch.Tensor:
        with record_function(f"{MARK}large"):
            x = checkpoint(self.large, x, use_reentrant=False) if again else self.large(x)
        with record_function(f"{MARK}small"):
            return self.small(x)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_backward_work_belongs_to_the_part_that_made_it(again: bool) -> None:
    model, x = Two(), torch.randn(600, 400)
    model(x, again).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(x, again).sum().backward()
    events = recorded.events()
    products = Counter((part, way) for event, part, way in by_part(events) if event.name in ("aten::mm", "aten::addmm"))
    # the large part has two products, and three for gradients: of two weights and of what lies between
    expected = {("large", "forward"): 2, ("large", "backward"): 3 + 2 * again, ("small", "forward"): 1, ("small", "backward"): 2}
    assert products == expected
    times = time_by_part(events)
    assert sum(sum(row.values()) for row in times.values()) == pytest.approx(sum(event.self_cpu_time_total for event in events))


def test_the_table_adds_up() -> None:
    text = table_of({"vision": {"forward": 2000.0, "backward": 4000.0}, OTHER: {"forward": 2000.0, "backward": 0.0}}, 2)
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["vision", "1.0", "2.0", "75.0%"] and rows[2] == [*OTHER.split(), "1.0", "0.0", "25.0%"] and rows[3][-1] == "4.0"


def test_a_training_writes_its_profile(tmp_path: Path) -> None:
    config = validating(tmp_path / "run", train__profile=1, train__validation__every=0)
    plain = train_from_config(validating(tmp_path / "plain", train__validation__every=0))
    assert train_from_config(config).lines[-1]["loss/total"] == plain.lines[-1]["loss/total"]
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    table = (tmp_path / "run" / "profile" / "parts.txt").read_text()
    for part in ("vision", "text", "pixel_decoder", "decoder", "lm", "region_tokens"):
        assert f"{MARK}{part}" in names
        row = re.search(rf"^{part} +(\S+) +(\S+) +(\S+)%$", table, re.MULTILINE)
        assert row is not None and float(row[1]) > 0, table
    assert re.search(r"^optimizer ", table, re.MULTILINE)
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_run_that_ends_early_writes_what_it_has(tmp_path: Path) -> None:
    said: list[str] = []
    recording = StepProfile({"all": nn.Linear(2, 2)}, tmp_path, 100, said.append)
    for _ in range(4):
        recording.step()
    recording.close()
    assert (tmp_path / "profile" / "trace.json").is_file() and "profile of 2 steps" in said[0]
    nothing = StepProfile({}, tmp_path / "none", 100, said.append)
    nothing.step()
    nothing.close()
    assert not (tmp_path / "none").exists()
