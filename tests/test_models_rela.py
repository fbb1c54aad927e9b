"""The grounding model with the rela decoder: every option changes what it should, contracts hold, gradients arrive."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grex_mllm.config import ModelConfig, PixelDecoderConfig, TextConfig, VisionConfig
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.models.decoders.rela.config import RelaConfig, RelaLossConfig
from grex_mllm.models.decoders.rela.grouping import group
from grex_mllm.models.grounding import GroundingModel, upsample_logits
from grex_mllm.types import GroundingOutput

RESNET = VisionConfig(block="basic", norm="group", stem="conv3", stem_width=8, widths=[8, 16, 16, 16], depths=[1, 1, 1, 1])
SWIN = VisionConfig(name="swin", embed_width=8, swin_depths=[1, 1, 1, 1], swin_heads=[1, 1, 2, 2], window=3, fusion="pwam", drop_path=0.0)
DECODER = RelaConfig(width=32, num_heads=4, num_layers=3, feedforward=16, minimap_side=4)
VARIANTS = {
    "released": {},
    "pooled": {"ria": "pooled"},
    "hard_split": {"ria": "pooled", "patches": 4},
    "region_only": {"rla": "region"},
    "language_only": {"rla": "language"},
    "product_only": {"rla": "none"},
    "every_layer": {"language_every_layer": True},
    "masked_padding": {"mask_language_padding": True},
    "side_8": {"minimap_side": 8},
    "side_12": {"minimap_side": 12},
}


def build(vision: VisionConfig = RESNET, pixel: str = "deformable", patches: int = 0, **decoder: object) -> GroundingModel:
    torch.manual_seed(0)
    config = ModelConfig(
        vision=replace(vision, patches=patches),
        text=TextConfig(vocab_size=30, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_positions=16, dropout=0.0),
        pixel_decoder=PixelDecoderConfig(name=pixel, width=32, mask_width=16, num_layers=1, num_heads=4, num_points=2, feedforward=16),
        decoder=replace(DECODER, **decoder),  # type: ignore[arg-type]
    )
    model = build_grounding(config)
    with torch.no_grad():  # language must matter though it starts as nothing
        model.decoder.language_part.language_projection.weight.normal_(std=0.2)
    return model.eval()


def inputs(height: int = 48, width: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    ids = torch.randint(1, 30, (3, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    return image, torch.tensor([0, 1, 1]), ids, mask


@pytest.mark.parametrize("vision", [RESNET, SWIN], ids=["resnet", "swin_pwam"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variant_shapes_and_gradients(variant: str, vision: VisionConfig) -> None:
    model = build(vision, **VARIANTS[variant]).train()
    out = model(*inputs())
    regions = model.decoder.language_part.config.minimap_side**2
    assert out.mask_logits.shape[:2] == (3, 2)
    assert out.minimap_logits.shape == (3, regions, 2)
    assert out.no_target_logits.shape == (3, 2)
    assert out.boxes_norm is not None and out.boxes_norm.shape == (3, regions, 4)
    assert out.box_logits is not None and out.box_logits.shape == (3, regions)
    assert out.count_logits is not None and out.count_logits.shape == (3, 7)
    assert out.minimap_prob is not None and out.minimap_prob.shape == (
        3,
        model.decoder.language_part.config.minimap_side,
        model.decoder.language_part.config.minimap_side,
    )
    total(out).backward()  # whether the gradients are zero: test_gradients.py
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert not without, sorted(without)


def total(out: GroundingOutput) -> Tensor:
    tensors = (out.mask_logits, out.minimap_logits, out.no_target_logits, out.boxes_norm, out.box_logits, out.count_logits)
    return sum(t.square().mean() for t in tensors if t is not None)  # type: ignore[return-value]


def test_variants_differ_from_released() -> None:
    seen = []
    for variant in ("released", "pooled", "hard_split", "region_only", "language_only", "product_only", "every_layer", "masked_padding"):
        with torch.no_grad():
            seen.append(build(**VARIANTS[variant])(*inputs()).no_target_logits)
    for i, a in enumerate(seen):
        for b in seen[i + 1 :]:
            assert not torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_words_matter_only_without_the_mask(masked: bool) -> None:
    model = build(mask_language_padding=masked)
    image, index, ids, mask = inputs()
    other = torch.where(mask == 0, 7, ids)
    with torch.no_grad():
        same = torch.allclose(model(image, index, ids, mask).mask_logits, model(image, index, other, mask).mask_logits, atol=1e-6)
    assert same is masked


@pytest.mark.parametrize("vision", [RESNET, SWIN], ids=["resnet", "swin_pwam"])
@pytest.mark.parametrize("variant", ["released", "hard_split"])
def test_batch_equals_single(vision: VisionConfig, variant: str) -> None:
    model = build(vision, **VARIANTS[variant]).double()
    image, index, ids, mask = inputs(41, 55)
    with torch.no_grad():
        together = model(image, index, ids, mask)
        for e in range(3):
            alone = model(image[index[e]][None], torch.tensor([0]), ids[e : e + 1], mask[e : e + 1])
            for name in ("mask_logits", "minimap_logits", "no_target_logits", "boxes_norm", "box_logits", "count_logits"):
                assert torch.allclose(getattr(alone, name)[0], getattr(together, name)[e], rtol=0, atol=1e-9), name


@pytest.mark.parametrize("index", [[0], [0, 0, 0], [0, 1], [1, 0], [2, 0, 1], [1, 1, 0, 2, 1], [2, 2, 2, 2]])
def test_grouping_gives_back_rows_beside_their_image(index: list[int]) -> None:
    images = max(*index, 0) + 1
    groups = group(torch.tensor(index), images)
    rows = torch.randn(len(index), 2, 3, requires_grad=True)
    own = torch.arange(images).float().view(-1, 1, 1).expand(-1, 3, 1)
    folded = groups.fold(rows)
    assert torch.equal(groups.unfold(folded), rows)
    read = groups.unfold(folded * 0 + groups.of_image(own)[:, :1])
    assert read[:, 0, 0].tolist() == [float(i) for i in index]
    groups.unfold(folded).sum().backward()
    assert rows.grad is not None and bool((rows.grad == 1).all())


def test_heads_are_absent_when_switched_off() -> None:
    full, bare = build(), build(boxes=False, count=False)
    out = bare(*inputs())
    assert out.boxes_norm is None and out.box_logits is None and out.count_logits is None
    extra = set(full.state_dict()) - set(bare.state_dict())
    assert extra and all(k.startswith(("decoder.language_part.heads.box", "decoder.language_part.heads.count")) for k in extra)
    assert set(bare.state_dict()) <= set(full.state_dict())


def test_boxes_start_in_their_own_cells() -> None:
    out = build()(*inputs())
    assert out.boxes_norm is not None
    assert torch.allclose(out.boxes_norm[0, 4 * 1 + 2, :2], torch.tensor([2.5 / 4, 1.5 / 4]), atol=1e-4)


def test_deep_supervision_gives_earlier_answers_in_training_only() -> None:
    model = build(loss=RelaLossConfig(deep_supervision=1.0)).train()
    layers = model(*inputs()).extra.layers
    assert len(layers) == 2 and layers[0].mask_logits.shape[:2] == (3, 2)
    assert model.eval()(*inputs()).extra.layers == []


def test_late_fusion_does_the_image_work_once() -> None:
    model = build()
    calls = []
    model.pixel_decoder.register_forward_hook(lambda *_: calls.append(1))
    image, _, ids, mask = inputs()
    features = model.encode_image(image[:1])
    for e in range(3):
        model.ground(features, torch.tensor([0]), ids[e : e + 1], mask[e : e + 1])
    assert len(calls) == 1


@pytest.mark.parametrize("pixel", ["deformable", "fpn"])
@pytest.mark.parametrize("vision", [RESNET, SWIN], ids=["resnet", "swin_pwam"])
def test_bf16_autocast_follows_float32(vision: VisionConfig, pixel: str) -> None:
    model = build(vision, pixel)
    with torch.no_grad():
        exact = model(*inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(*inputs())
    assert (exact.no_target_logits - rough.no_target_logits.float()).abs().max() < 0.1
    assert torch.isfinite(rough.mask_logits).all()


def test_valid_sizes_hide_the_canvas() -> None:
    model = build()
    image, index, ids, mask = inputs()
    other = image.clone()
    other[1, :, 30:] = 255
    other[1, :, :, 40:] = 255
    sizes = [(48, 64), (30, 40)]
    with torch.no_grad():
        a, b = (model(x, index, ids, mask, sizes) for x in (image, other))
    assert torch.equal(a.mask_logits, b.mask_logits)


def test_upsample_logits_sizes() -> None:
    logits = torch.randn(1, 2, 6, 8)
    assert upsample_logits(logits, (48, 64)).shape == (1, 2, 48, 64)
    assert upsample_logits(logits, (48, 64), (41, 55)).shape == (1, 2, 41, 55)


@pytest.mark.parametrize("change", [{"ria": "soft"}, {"rla": "all"}, {"width": 16}, {"num_heads": 5}])
def test_bad_decoder_settings_name_field_and_remedy(change: dict[str, object]) -> None:
    with pytest.raises(GrexError, match=r"expected .*;"):
        build(**change)


@pytest.mark.parametrize("vision", [RESNET, SWIN], ids=["resnet", "swin_pwam"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_compiles_into_one_graph(vision: VisionConfig) -> None:
    """After one run at this size nothing leaves the graph (traced only: no compiler is needed)."""
    model = build(vision)
    image, _, ids, mask = inputs()
    given = (image[:1], torch.tensor([0, 0, 0]), ids, mask)
    with torch.no_grad():
        plain = model(*given)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(*given)
    # a plain run takes fused expressions in chunks, which rounds otherwise (1.5e-5 of values up to 7.7, float32)
    assert torch.allclose(plain.mask_logits, compiled.mask_logits, atol=1e-4)
