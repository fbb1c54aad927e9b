"""Equality with the released ReLA: recorded tensors of two small random models, and the full-size models' keys and shapes."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grex_mllm.config import ModelConfig, PixelDecoderConfig, TextConfig, VisionConfig
from grex_mllm.convert.check import run
from grex_mllm.convert.rela import BACKBONES, map_keys
from grex_mllm.models import build_grounding
from grex_mllm.models.decoders.rela.config import RelaConfig
from grex_mllm.models.grounding import GroundingModel

NANO_VISION = {
    "rela_nano_swin": VisionConfig(name="swin", embed_width=16, swin_depths=[1, 2, 2, 1], swin_heads=[1, 2, 4, 8], window=7, fusion="pwam"),
    "rela_nano_r50": VisionConfig(stem_width=16, widths=[32, 64, 128, 256], bottleneck_widths=[8, 16, 32, 64]),
}
SCALE_TOLERANCE_64 = 1e-8
FACTOR_32 = 5


@dataclass
class Case:
    """A nano model with recorded inputs and outputs."""

    name: str
    model: GroundingModel
    recorded: dict[str, Any]
    errors_32: dict[str, Any]

    def run(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return run(self.model.to(dtype), self.recorded["inputs"])


def nano_config(name: str) -> ModelConfig:
    return ModelConfig(
        vision=NANO_VISION[name],
        text=TextConfig(vocab_size=400, intermediate_size=64, max_positions=64),
        pixel_decoder=PixelDecoderConfig(width=64, mask_width=64, num_layers=2),
        decoder=RelaConfig(width=64, feedforward=64, boxes=False, count=False),
    )


@pytest.fixture(scope="module", params=list(NANO_VISION))
def case(request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = shared / "oracle" / request.param
    file = tmp_path_factory.mktemp("oracle") / "checkpoint.pth"
    file.write_bytes(lzma.decompress((folder / "checkpoint.pth.xz").read_bytes()))
    state = torch.load(file, weights_only=True)["model"]
    file.unlink()
    model = build_grounding(nano_config(request.param)).eval()
    model.load_state_dict(map_keys(state, str(file))[0])
    recorded = torch.load(folder / "oracle.pt", weights_only=True)
    errors = json.loads((folder / "meta.json").read_text())["fp32_vs_fp64"]
    yield Case(request.param, model, recorded, errors)


def flatten(tree: Any, name: str = "") -> dict[str, Tensor]:
    """Name every tensor of nested dicts and lists: keys joined by slashes."""
    if isinstance(tree, Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in items for k, v in flatten(value, f"{name}/{key}".lstrip("/")).items()}


def test_float64_equals_recorded(case: Case) -> None:
    ours, theirs = case.run(torch.float64), flatten(case.recorded["eval64"])
    assert len(theirs) >= 10
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error < SCALE_TOLERANCE_64, f"{name}: {error:.1e}"


def test_float32_intermediates_within_recorded_error(case: Case) -> None:
    ours, theirs = case.run(torch.float32), flatten(case.recorded["eval"])
    errors = recorded_errors(case.errors_32)
    assert len(theirs) >= 50
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        if expected.dtype == torch.bool:
            assert (ours[name] != expected).sum() <= 1, name
            continue
        allowed = FACTOR_32 * errors[name]
        error = (ours[name] - expected).abs().max().item()
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"


def recorded_errors(tree: Any, name: str = "") -> dict[str, float]:
    """Name every recorded float32 error as `flatten` names its tensor."""
    if isinstance(tree, dict) and "max" in tree:
        return {name: tree["max"]}
    if not isinstance(tree, dict | list):
        return {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, value in items for k, v in recorded_errors(value, f"{name}/{key}".lstrip("/")).items()}


def test_decisions_equal_recorded(case: Case) -> None:
    ours, theirs = case.run(torch.float32), flatten(case.recorded["eval"])
    for i in range(len(case.recorded["inputs"])):
        mask, no_target = f"processed/{i}/ref_seg", f"processed/{i}/nt_label"
        assert (ours[mask].argmax(0) != theirs[mask].argmax(0)).float().mean() <= 1e-4
        assert ours[no_target].argmax() == theirs[no_target].argmax()
    masks, expected = ours["head_out/pred_masks"], theirs["head_out/pred_masks"]
    assert (masks - expected).abs().max() <= 1e-3 * expected.std() + 1e-3
    assert (ours["head_out/nt_label"] - theirs["head_out/nt_label"]).abs().max() <= 1e-5


def test_batch_equals_single_and_any_size(case: Case) -> None:
    """Odd sizes, batch 3, and several expressions of one image give what single calls give."""
    model = case.model.double()
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (2, 3, 75, 101), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 400, (3, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 6 + [0] * 3])
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        together = model(image, index, ids, mask)
        for e in range(3):
            alone = model(image[index[e]][None], torch.tensor([0]), ids[e : e + 1], mask[e : e + 1])
            assert torch.allclose(alone.mask_logits, together.mask_logits[e : e + 1], rtol=0, atol=1e-9)
            assert torch.allclose(alone.no_target_logits, together.no_target_logits[e : e + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["swin_base", "swin_tiny", "r50"])
def test_full_size_keys_and_shapes(name: str, shared: Path) -> None:
    released = json.loads((shared / "oracle" / f"keys_{name}.json").read_text())
    state = {key: torch.empty(shape, device="meta", dtype=getattr(torch, dtype)) for key, shape, dtype in released}
    mapped, _ = map_keys(state, name)
    config = ModelConfig(vision=BACKBONES[name], decoder=RelaConfig(boxes=False, count=False))
    with torch.device("meta"):
        own = build_grounding(config).state_dict()
    assert {k: tuple(v.shape) for k, v in mapped.items()} == {k: tuple(v.shape) for k, v in own.items()}
