"""Equality with the released ReLA where no shared folder is: one Swin stage, one layer of each decoder, losses and gradients.

The numbers in `tests/data/rela_parts.npz` were recorded from the authors' code; `repack_oracle.py` says what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import repack_oracle
import torch
from made_batch import RELEASED, make_batch
from repack_oracle import DECODER, EVERY, FILE, PIXEL_DECODER, STAGE
from torch import Tensor, nn

from grex_mllm.config import PixelDecoderConfig, VisionConfig
from grex_mllm.models.decoders.rela.config import RelaConfig
from grex_mllm.models.decoders.rela.criterion import RelaCriterion
from grex_mllm.models.decoders.rela.heads import RegionHeads
from grex_mllm.models.decoders.rela.network import Rela
from grex_mllm.models.deformable import DeformablePixelDecoder, SamplingOffsets
from grex_mllm.models.swin import SwinTransformer
from grex_mllm.types import DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures

WIDTH, TEXT_WIDTH, NUM_REGIONS = 64, 768, 100
# largest difference allowed: three to five times what float32 and the rounded weights give; tensors have a spread of about 1, gates 0.1
ALLOWED = {
    "swin.0.blocks_out": 4e-5, "swin.0.pwam_lang": 3e-4, "swin.0.pwam": 1e-4, "swin.0.res_gate": 5e-5, "swin.0.downsample": 4e-5,
    "backbone/res2": 2e-4, "pixel_encoder.0": 4e-4,
    "decoder.0.RIA": 2e-4, "decoder.RLA_lang_att": 2e-4, "decoder.0.RLA_vision": 2e-4, "decoder.0.ffn": 2e-4,
}  # fmt: skip


@dataclass
class Parts:
    weights: dict[str, Tensor]
    recorded: dict[str, Tensor]
    gt_masks: Tensor
    no_target: Tensor

    def fill(self, module: nn.Module, prefix: str, kept: tuple[str, ...], left: tuple[str, ...]) -> None:
        """Load what starts with `kept`; only names that start with `left` may stay as they are."""
        state = {n.removeprefix(prefix): v for n, v in self.weights.items() if n.startswith(prefix) and n.startswith(kept)}
        missing, unexpected = module.load_state_dict(state, strict=False)
        assert len(state) > 0 and not unexpected
        assert [name for name in missing if not name.startswith(left)] == []

    def compare(self, found: dict[str, Tensor]) -> None:
        """Compare every n-th row of the tensors [S, C], as kept."""
        assert found
        for name, ours in found.items():
            expected = self.recorded[name]
            kept = ours[:: EVERY[name]]
            assert kept.shape == expected.shape and len(expected) > 5, name
            error = (kept - expected).abs().max().item()
            assert error <= ALLOWED[name] < 0.01 * expected.std(), f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts(*repack_oracle.read())


def answered(found: dict[str, Tensor], name: str, module: Any) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: found.__setitem__(name, output[0].detach()))


def test_file_is_small_and_whole(parts: Parts) -> None:
    assert FILE.stat().st_size < 1_000_000
    assert set(EVERY) == set(ALLOWED) and set(EVERY) <= set(parts.recorded)
    for value in (*parts.weights.values(), *parts.recorded.values()):
        assert value.dtype == torch.float32 and bool(value.isfinite().all()) and value.numel() > 0
    assert parts.gt_masks.shape == (2, 96, 128) and parts.no_target.tolist() == [False, True]
    assert parts.gt_masks[0].any() and not parts.gt_masks[1].any()


def test_repacking_gives_the_same_file(parts: Parts, shared: Path, tmp_path: Path) -> None:
    arrays = repack_oracle.pack(shared / "oracle" / "rela_nano_swin")
    for name in ("a.npz", "b.npz"):
        repack_oracle.write(arrays, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(FILE) as stored:
        assert sorted(stored.files) == sorted(arrays)
        for name, value in arrays.items():
            assert stored[name].dtype == value.dtype and np.array_equal(stored[name], value), name


def test_planes_keep_floats_and_round_weights() -> None:
    values = torch.tensor([[1.0, -2.5e-12, 3.1415927], [0.0, 7e8, -1.1754944e-38]])
    assert torch.equal(repack_oracle.floats(repack_oracle.planes(values)), values)
    rounded = repack_oracle.floats(repack_oracle.planes(torch.randn(1000), 8))
    assert not (rounded.numpy().view(np.uint32) & 0xFF).any()
    values = torch.randn(1000)
    assert ((repack_oracle.floats(repack_oracle.planes(values, 8)) - values) / values).abs().max() <= 2.0**-16
    assert repack_oracle.floats(repack_oracle.planes(torch.tensor(0.25))).item() == 0.25


def swin(parts: Parts) -> SwinTransformer:
    config = VisionConfig(name="swin", embed_width=16, swin_depths=[1, 2, 2, 1], swin_heads=[1, 2, 4, 8], window=7, fusion="pwam")
    model = SwinTransformer(config, TEXT_WIDTH).eval()
    parts.fill(model, "vision.", STAGE, ("patch_embed.", "stages.1", "stages.2", "stages.3", "norms.1", "norms.2", "norms.3"))
    return model


@pytest.mark.parametrize("padding", [0, 13])
def test_swin_stage_with_pixel_word_fusion(parts: Parts, padding: int) -> None:
    """Sample 0 has seven words; the recorded run padded them to twenty, and what stands in the padding is not read."""
    model, found = swin(parts), {}
    stage: Any = model.stages[0]
    for name, module in (("pwam", stage.fusion), ("res_gate", stage.gate), ("downsample", stage.downsample)):
        answered(found, f"swin.0.{name}", module)
    words = parts.recorded["text_features"]
    tokens = torch.cat([words, torch.full((padding, TEXT_WIDTH), 3.0)])[None]
    text = TextFeatures(tokens, torch.tensor([[1] * len(words) + [0] * padding]))
    patches = parts.recorded["swin.patch_embed"][None]
    with torch.no_grad():
        blocks = stage.run_blocks(patches.flatten(2).transpose(1, 2), 24, 32)
        maps = model.finish(blocks.transpose(1, 2).unflatten(2, (24, 32)), None, text)
        found |= {"swin.0.blocks_out": blocks[0], "swin.0.pwam_lang": stage.fusion.attend(blocks, text)[0]}
    found["backbone/res2"] = maps[0][0].flatten(1).T
    assert set(found) == {name for name in EVERY if name.startswith(("swin", "backbone"))}
    parts.compare(found)


def test_every_weight_of_the_pixel_decoder_is_read_by_its_own_module() -> None:
    """ZeRO-3 gathers weights in hooks of `forward`: one that another module reads past it would be empty there."""
    decoder = DeformablePixelDecoder(PixelDecoderConfig(name="deformable", width=32, num_layers=1, num_heads=4), (16, 32, 64, 128))
    called: set[str] = set()
    owners = {name for name, module in decoder.named_modules() if next(module.parameters(recurse=False), None) is not None}
    for name in owners:
        decoder.get_submodule(name).register_forward_pre_hook(lambda module, inputs, name=name: called.add(name))
    decoder([torch.randn(1, c, 32 // 2**k, 32 // 2**k) for k, c in enumerate((16, 32, 64, 128))])
    assert called == owners and "layers.0.attention.sampling_offsets" in owners


def test_sampling_offsets_are_all_x_then_all_y() -> None:
    layer, x = SamplingOffsets(8, 12), torch.randn(2, 3, 8)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), torch.cat([plain[..., 0::2], plain[..., 1::2]], dim=-1))


def test_pixel_decoder_layer(parts: Parts) -> None:
    config = PixelDecoderConfig(width=WIDTH, mask_width=WIDTH, num_layers=1)
    model = DeformablePixelDecoder(config, (16, 32, 64, 128)).eval()
    parts.fill(model, "pixel_decoder.", PIXEL_DECODER, ("lateral.", "smooth.", "mask_features."))
    maps = [torch.zeros(1, 16, 24, 32), *(parts.recorded[f"backbone/{name}"][None] for name in ("res3", "res4", "res5"))]
    with torch.no_grad():
        levels = model(maps).levels
    assert [tuple(level.shape[-2:]) for level in levels] == [(3, 4), (6, 8), (12, 16)]
    parts.compare({"pixel_encoder.0": torch.cat([level[0].flatten(1).T for level in levels])})


def test_region_decoder_layer(parts: Parts) -> None:
    config = RelaConfig(width=WIDTH, feedforward=WIDTH, num_layers=1, boxes=False, count=False)
    model = Rela(config, DecoderInputs((), WIDTH, WIDTH, WIDTH)).eval()
    parts.fill(model, "decoder.", DECODER, ("language_part.heads.minimap", "language_part.language_projection"))
    part, found = model.language_part, dict[str, Tensor]()
    layers = {
        "0.RIA": part.region_image,
        "RLA_lang_att": part.region_language,
        "0.RLA_vision": part.region_region,
        "0.ffn": part.feedforward,
    }
    for name, layer in layers.items():
        answered(found, f"decoder.{name}", layer[0])
    blocked = []
    part.region_image[0].register_forward_pre_hook(lambda _module, inputs: blocked.append(~inputs[-1][0, 0]))
    # the recorded words are projected already; the layer reads the coarsest level alone
    levels = [parts.recorded["multi_scale_features/0"][None], torch.zeros(1, WIDTH, 6, 8), torch.zeros(1, WIDTH, 12, 16)]
    words = parts.recorded["decoder.lang_proj"][None]
    with torch.no_grad():
        part.language_projection.weight.copy_(torch.eye(WIDTH))
        images = model.image_part([], PixelFeatures(parts.recorded["mask_features"][None], levels))
        part(images, torch.tensor([0]), TextFeatures(words, torch.tensor([[1] * 7 + [0] * 13])))
    [mask] = blocked
    expected = parts.recorded["decoder.0.attn_mask_head0"].bool()
    assert mask.shape == expected.shape == (NUM_REGIONS, 12) and (mask != expected).sum() <= 1
    assert expected.any(1).sum() > 20  # some regions do not see everything
    parts.compare(found)


def answer(parts: Parts) -> tuple[RegionHeads, nn.LayerNorm, GroundingOutput]:
    """The recorded answer of both samples, the no-target logits computed by our head from the recorded region features."""
    heads, norm = RegionHeads(WIDTH, WIDTH, 10, False, False), nn.LayerNorm(WIDTH)
    parts.fill(heads, "decoder.language_part.heads.", ("decoder.language_part.heads.",), ("minimap.",))
    parts.fill(norm, "decoder.language_part.norm.", ("decoder.language_part.norm.",), ())
    no_target = heads.predict_no_target(norm(parts.recorded["decoder.8.ffn"]))
    return heads, norm, GroundingOutput(parts.recorded["head_out/pred_masks"], parts.recorded["head_out/pred_logits"], no_target)


def test_no_target_head_losses_and_gradients(parts: Parts) -> None:
    heads, _, output = answer(parts)
    expected = parts.recorded["head_out/nt_label"]
    assert expected.shape == (2, 2) and (output.no_target_logits - expected).abs().max() <= 2e-5 < 1e-3 * expected.abs().max()
    batch = make_batch(parts.gt_masks, [torch.zeros(0, 4)] * 2)
    batch.no_target = parts.no_target
    terms = RelaCriterion(RELEASED)(output, batch)
    for name, recorded in (("mask", "mask"), ("minimap", "minimap"), ("no_target", "nt"), ("total", "total")):
        assert terms[name].item() == pytest.approx(parts.recorded[f"loss/{recorded}"].item(), rel=1e-5), name
    terms["total"].backward()
    compared = dict(gradients(parts, heads))
    assert len(compared) == 4 and max(compared.values()) < 2e-4, compared


def gradients(parts: Parts, heads: RegionHeads) -> Iterator[tuple[str, float]]:
    """Yield each parameter of the head with its gradient's relative distance from the recorded norm and first 16 numbers."""
    for name, parameter in heads.no_target.named_parameters():
        assert parameter.grad is not None
        norm, first = parts.recorded[f"grad_norm/{name}"], parts.recorded[f"grad_first16/{name}"]
        assert norm > 0 and len(first) == min(16, parameter.numel())
        distance = (parameter.grad.flatten()[: len(first)] - first).abs().max() / first.abs().max()
        yield name, max(abs(parameter.grad.norm() / norm - 1).item(), distance.item())
