"""One step, one graph: one process and several have the same losses and gradients, and no weight is ever without a gradient.

Run as a program it is one of several processes: `python test_step.py RANK WORLD PORT OUT`; it does all cases, one after the other.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny import WORDS, tiny_config
from torch import Tensor

from grex_mllm.data.sources import training_samples
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import train_sentencepiece
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.batches import BatchStream
from grex_mllm.training.run import batch_stream
from grex_mllm.training.step import Step, tasks_of
from grex_mllm.types import Sample

SWIN = {"name": "swin", "embed_width": 8, "swin_depths": [1, 1, 1, 1], "swin_heads": [1, 1, 2, 2], "window": 4, "fusion": "pwam"}
LAVT: dict[str, Any] = {f"model__vision__{name}": value for name, value in SWIN.items()} | {"model__pixel_decoder__name": "top_down"}
ATTRIBUTES = "{shape: 7, colour: 6}"
CASES: dict[str, dict[str, object]] = {
    "instance_selection": {"model__decoder__attribute_classes": ATTRIBUTES, "model__generator__attribute_classes": ATTRIBUTES},
    "rela": {"model__decoder__name": "rela", "model__decoder__num_layers": 2, "model__decoder__minimap_side": 4},
    "generate": {"train__tasks": "generate"},
    "contrast": {"loss__contrast": 0.5},
    "words": {"model__decoder__words": 250, "model__generator__words": 280},
    "found": {"model__generator__found_share": 1.0},
    "round trip": {"loss__round_trip": 2.0},
    # every option that compares the processes' masks or regions, and a teacher
    "options": {"model__decoder__name": "rela", "model__decoder__num_layers": 2, "model__decoder__minimap_side": 4,
                "model__decoder__region_sides": [2, 4], "model__decoder__complexity": [0.1], "model__decoder__loss__hard__pixels": 0.5,
                "model__decoder__loss__hard__masks": 0.5, "model__decoder__loss__hard__focal_gamma": 2.0, "loss__distill": 0.5},
    "hard objects": {"model__decoder__loss__hard__masks": 0.5},
    "batch norm": {"model__decoder__name": "m3att", "model__map_norm": "batch", "model__decoder__width": 16, "model__decoder__num_heads": 2,
                   "model__decoder__feedforward": 32, "model__decoder__grid_side": 4, "model__decoder__mask_widths": [8, 8, 8],
                   "model__decoder__heads__minimap_side": 4},
}  # fmt: skip
IMAGES, WORLD = 4, 2


def built(case: str, work: Path, **changes: object) -> tuple[GrexModel, BatchStream]:
    """The real model at tiny size with its batches; all images of rank 1 have no target at all."""
    config = tiny_config(model__generator__lm="tiny", model__generator__hidden_size=16, model__generator__num_heads=2,
                         model__generator__num_layers=1, model__generator__intermediate_size=32, model__generator__projector_width=16,
                         model__generator__lora_rank=2, data__expressions_per_image=4, data__sources__synthetic__image_size=64,
                         train__batch_images=IMAGES, **CASES[case], **changes)  # fmt: skip
    text = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = text.vocab_size
    if config.loss.distill:
        config.train.teacher = str(work / "teacher")
        torch.manual_seed(1)
        GrexModel(tiny_config(model__decoder__name="lavt", **LAVT), text).save_pretrained(work / "teacher")
    torch.manual_seed(0)
    model = GrexModel(config, text, train_sentencepiece(WORDS * 5, work, 300))
    with torch.no_grad():  # what starts at zero would hide what lies before it
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    samples = training_samples(config.data, 0, 100, generates=True)
    return model, batch_stream(config, _NoTargets(samples), text, model.generator.tokenizer)


class _NoTargets:
    """Samples of which every second image has only expressions without a target: those that rank 1 of 2 gets."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 100

    def __getitem__(self, position: int) -> Sample:
        sample = self.samples[position]
        return replace(sample, expressions=[replace(e, targets=[]) for e in sample.expressions]) if position % 2 else sample


def gradients(model: Any) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, p in trained.items() if p.grad is None]
    assert not missing, missing
    return {name: p.grad.clone() for name, p in trained.items()}


def statistics(model: Any) -> dict[str, Tensor]:
    """Return the running statistics of batch normalisation, by name."""
    return {name: value.clone() for name, value in model.named_buffers() if "running_" in name}


def one_of_several(rank: int, world: int, port: str, out: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    for case in CASES:
        found = share_of(case, rank, world, out)
        if rank == 0:
            torch.save(found, out / f"{case}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def share_of(case: str, rank: int, world: int, out: Path) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return the losses of all processes together, and the gradients, of two steps."""
    model, batches = built(case, out / f"{case}_lm{rank}")
    wrapped = torch.nn.parallel.DistributedDataParallel(Step(model, model.config).train())  # without find_unused_parameters
    found = []
    for progress in (0.0, 1.0):
        batch = batches.share(rank, world).at(0)
        assert batch.generation.weight.sum() > 0 if rank == 0 else batch.generation.weight.tolist() == [0]
        wrapped.zero_grad()
        terms = wrapped(batch, progress)
        terms["total"].backward()
        values = {name: value.detach().clone() / world for name, value in (terms | statistics(model)).items()}
        for value in values.values():
            torch.distributed.all_reduce(value)
        found.append((values, gradients(model)))
    return found


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do all cases in two processes and return the folder of what they found."""
    out = tmp_path_factory.mktemp("several")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, __file__, str(r), str(WORLD), port, str(out)], env=environment) for r in range(WORLD)]
    assert [process.wait(timeout=300) for process in running] == [0] * WORLD
    return out


@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_have_the_loss_and_the_gradients_of_one(case: str, several: Path, tmp_path: Path) -> None:
    model, batches = built(case, tmp_path / "lm")
    step = Step(model, model.config).train()
    for progress, (terms, theirs) in zip((0.0, 1.0), torch.load(several / f"{case}.pt", weights_only=True), strict=True):
        model.zero_grad()
        ours = step(batches.at(0), progress)
        ours["total"].backward()
        ours |= statistics(model)
        assert ours.keys() == terms.keys() and "total" in ours and ("running" in str(ours.keys())) == (case == "batch norm")
        for name, value in ours.items():
            torch.testing.assert_close(terms[name], value.detach(), rtol=2e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        mine = gradients(model)
        largest = max(float(value.abs().max()) for value in mine.values())
        assert mine.keys() == theirs.keys() and largest > 0
        for name, value in mine.items():
            assert (theirs[name] - value).abs().max() <= 2e-5 * largest, name


def test_what_is_not_learned_has_no_gradient(tmp_path: Path) -> None:
    model, batches = built("generate", tmp_path)
    Step(model, model.config)(batches.at(0), 1.0)["total"].backward()
    assert all(p.grad is None for p in model.grounding.decoder.parameters()) and all(
        p.grad is None for p in model.grounding.text.parameters()
    )
    assert all(p.grad is not None for p in model.grounding.vision.parameters())
    model.config.train.tasks = "ground"
    assert tasks_of(model.config) == ("ground",)
    model.config.train.tasks, model.config.model.generator = "generate", None
    with pytest.raises(GrexError, match=r"model\.generator is null"):
        tasks_of(model.config)
    model.config.train.tasks, model.config.loss.contrast = "ground", 0.5
    with pytest.raises(GrexError, match=r"loss\.contrast is 0\.5 with train\.tasks ground"):
        tasks_of(model.config)


if __name__ == "__main__":
    one_of_several(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
