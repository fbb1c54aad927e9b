"""Gradient checkpointing and torch.compile by part change no loss and no gradient; checkpointing keeps less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import built
from torch.autograd.graph import saved_tensors_hooks

from grex_mllm.config import VisionConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.vision import build_vision
from grex_mllm.training.compiling import compile_parts
from grex_mllm.training.profiling import parts_of
from grex_mllm.training.step import Step

SWIN: dict[str, object] = {
    "model__vision__name": "swin", "model__vision__fusion": "pwam", "model__vision__embed_width": 16,
    "model__vision__swin_depths": [2, 2, 2, 2], "model__vision__swin_heads": [1, 2, 2, 2], "model__vision__window": 4,
    "model__vision__drop_path": 0.2, "model__text__dropout": 0.1,
}  # fmt: skip
BOTH: dict[str, object] = {"model__vision__gradient_checkpointing": True, "model__text__gradient_checkpointing": True}


def run(folder: Path, changes: dict[str, object], *, compiled: list[str] | None = None) -> tuple[dict[str, Any], int]:
    """Do one forward and backward pass of the joint step. Returns losses and gradients by name, and the bytes that autograd kept."""
    model, batches = built("rela", folder, **changes)
    step, batch = Step(model, model.config).train(), batches.at(0)
    if compiled is not None:
        step(batch)  # layouts of windows are made once per size
        compile_parts(parts_of(step), compiled, None)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = step(batch)
    losses["total"].backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{name: value.detach() for name, value in losses.items()}, **found}, sum(kept.values())


@pytest.mark.parametrize("changes", [{}, SWIN], ids=["resnet", "swin with fusion and drop path"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(tmp_path: Path, changes: dict[str, object]) -> None:
    plain, kept = run(tmp_path / "plain", changes)
    again, less = run(tmp_path / "again", changes | BOTH)
    assert plain.keys() == again.keys() and len(plain) > 50
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert less < 0.9 * kept


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, SWIN | {"model__vision__drop_path": 0.0, "model__text__dropout": 0.0}], ids=["resnet", "swin"])
def test_compiled_parts_give_the_same_gradients(tmp_path: Path, changes: dict[str, object]) -> None:
    plain, _ = run(tmp_path / "plain", changes)
    compiled, _ = run(tmp_path / "compiled", changes, compiled=["vision", "text", "pixel_decoder", "decoder", "lm"])
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_part_that_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    model, _ = built("rela", tmp_path)
    parts = parts_of(Step(model, model.config))
    assert {"vision", "text", "pixel_decoder", "decoder", "lm", "region_tokens"} == parts.keys()
    with pytest.raises(GrexError, match=r"train\.compile names wision.*vision"):
        compile_parts(parts, ["wision"], None)
    with pytest.raises(GrexError, match="ZeRO-3"):
        compile_parts(parts, ["vision"], 3)


def test_an_encoder_of_a_library_recomputes_too(tmp_path: Path) -> None:
    from transformers import SwinConfig

    SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64).save_pretrained(tmp_path)
    net = build_vision(VisionConfig(name=f"hf:{tmp_path}", gradient_checkpointing=True), 16)
    assert net.net.is_gradient_checkpointing  # type: ignore[union-attr]
