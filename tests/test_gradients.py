"""Losses reach every weight with a gradient that is not zero, for every decoder; the exceptions are listed with their reasons."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_models_rela import VARIANTS
from tiny import WORDS, tiny_config
from torch import nn

from grex_mllm.data.collate import collate
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.entries import DECODERS, entry
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer

# what no loss can reach, whatever the weights
SHIFTED_SOFTMAX = (
    r"text\.bert\.encoder\.layer\.\d+\.attention\.self\.key\.bias",  # adds the same number to all logits of a softmax
    r"vision\.(net\.)?stages\.\d\.fusion\.key\.bias",
    r"decoder\.(language_part\.rela\.)?(image_part\.keys\.\d+|language_part\.region_\w+\.\d+\.attention\.key)\.bias",
)
SHIFTED_WORDS = (r"text\.bert\.encoder\.layer\.0\.output\.LayerNorm\.bias",)  # where only a fusion reads the words
NORMALISED_AWAY = (r"vision\.(net\.)?stages\.\d\.fusion\.(query|value|output)\.bias",)  # a constant shift before an instance norm
UNREACHABLE = SHIFTED_SOFTMAX + NORMALISED_AWAY
# what the losses cannot reach at the first step, because the weight after it starts at zero
STARTS_CLOSED = (
    r"decoder\.language_part\.heads\.box\.layers\.[01]\.(weight|bias)",  # boxes start in the middles of their cells
    r"pixel_decoder\.level_embed",  # offsets and weights of deformable attention start as constants
    r"vision\.(net\.)?stages\.\d\.gate\.[02]\.weight",  # as released: both layers start at zero with a ReLU between
)
LEAST = 1e-10  # of the largest gradient of the model; in float64 a true zero is below 1e-14

DEFORMABLE = {
    "model__pixel_decoder__name": "deformable", "model__pixel_decoder__width": 64, "model__pixel_decoder__num_layers": 1,
    "model__pixel_decoder__num_heads": 4, "model__pixel_decoder__num_points": 2, "model__pixel_decoder__feedforward": 16,
}  # fmt: skip
SWIN = {
    "model__vision__name": "swin", "model__vision__embed_width": 8, "model__vision__swin_depths": [1, 1, 1, 1],
    "model__vision__swin_heads": [1, 1, 2, 2], "model__vision__window": 3, "model__vision__drop_path": 0.0,
}  # fmt: skip
PWAM = SWIN | {"model__vision__fusion": "pwam"}
ISFP = {
    "model__decoder__name": "isfp", "model__decoder__minimap_side": 4, "model__decoder__segmentation_width": 16,
    "model__decoder__refinement_width": 8, "model__decoder__aspp_rates": "[1, 2]", "model__decoder__loss__least_iou": -1.0,
    "model__pixel_decoder__name": "fpn_levels",
}  # fmt: skip
LAVT = PWAM | {"model__decoder__name": "lavt", "model__decoder__heads__minimap_side": 4, "model__pixel_decoder__name": "top_down"}
RELA = {"model__decoder__name": "rela", "model__decoder__num_layers": 3, "model__decoder__minimap_side": 4}
VLT = {
    "model__decoder__name": "vlt", "model__decoder__grid_side": 4, "model__decoder__mask_widths": "[8, 8, 8]",
    "model__decoder__least_words": 1, "model__decoder__heads__minimap_side": 4,
}  # fmt: skip
M3ATT = {
    "model__decoder__name": "m3att", "model__decoder__grid_side": 4, "model__decoder__mask_widths": "[8, 8, 8]",
    "model__decoder__heads__minimap_side": 4,
}  # fmt: skip
CASES = {
    "instances_fpn": {},
    "instances_deformable": DEFORMABLE,
    "instances_swin": SWIN,
    "vlt_fpn": VLT,
    "vlt_swin": VLT | SWIN | {"model__vision__fusion": "pwam"},
    "m3att_fpn": M3ATT,
    "m3att_independent": M3ATT | DEFORMABLE | {"model__decoder__attention": "independent", "model__decoder__width": 64},
    "instances_attributes": {"model__decoder__attribute_classes": "{shape: 7}"},
    "rela_fpn": RELA,
    "rela_deformable": RELA | DEFORMABLE | {"model__decoder__width": 64},
    "rela_pwam": RELA | DEFORMABLE | SWIN | {"model__decoder__width": 64, "model__vision__fusion": "pwam"},
    "isfp": ISFP,
    "isfp_swin": ISFP | SWIN,
    "isfp_pwam": ISFP | PWAM,
    "isfp_argmax": ISFP | {"model__decoder__selection": "argmax", "model__decoder__coordinates": "true"},
    "isfp_convolution": ISFP | {"model__decoder__identification": "convolution", "model__decoder__refinement": "false"},
    "isfp_none": ISFP | {"model__decoder__identification": "none", "model__decoder__refinement": "false"},
    "lavt": LAVT,
    "lavt_open": LAVT | {"model__vision__fusion_start": "open"},
    "vlt_rela": RELA | {"model__decoder__name": "vlt_rela", "model__decoder__grid_side": 4, "model__decoder__encoder_layers": 1},
    "rela_top_down": RELA | {"model__pixel_decoder__name": "top_down"},
    "rela_words": RELA | {"model__text__name": "bigru", "model__text__word_width": 8},
    **{
        f"rela_{name}": RELA
        | {f"model__{'vision' if field == 'patches' else 'decoder'}__{field}": value for field, value in changes.items()}
        for name, changes in VARIANTS.items()
        if changes and "minimap_side" not in changes
    },
}


def built(case: str) -> Any:
    """The tiny model of a case in float64; language matters though the released projection starts at zero."""
    torch.manual_seed(0)
    config = tiny_config(**CASES[case])
    tokenizer = train_text_tokenizer(WORDS, config.model.text.vocab_size)
    config.model.text.vocab_size = tokenizer.vocab_size
    model: Any = GrexModel(config, tokenizer).double().train()
    if config.model.decoder.name == "rela":
        nn.init.normal_(model.grounding.decoder.language_part.language_projection.weight, std=0.2)
    if config.model.decoder.name == "vlt_rela":
        nn.init.normal_(model.grounding.decoder.language_part.rela.language_part.language_projection.weight, std=0.2)
    return model


def gradients(model: Any) -> dict[str, float]:
    """Largest gradient of every parameter of the grounding model, relative to the largest of all, for one synthetic batch."""
    data = SyntheticDataset(SyntheticConfig(image_size=64), "train", 100, 4)
    batch = collate([data[i] for i in range(3)], model.encode_text, image_size=64)
    features = model.grounding.encode_image(batch.image)
    output = model.grounding.ground(features, batch.image_index, batch.text_ids, batch.text_mask)
    criterion = entry("model.decoder", model.config.model.decoder.name).Criterion(model.config.model.decoder)
    criterion(output, batch)["total"].backward()
    found = {n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in model.grounding.named_parameters()}
    return {name: value / max(found.values()) for name, value in found.items()}


def matching(names: Any, patterns: tuple[str, ...]) -> list[str]:
    return sorted(n for n in names if any(re.fullmatch(pattern, n) for pattern in patterns))


def test_every_decoder_has_a_case() -> None:
    assert {tiny_config(**changes).model.decoder.name for changes in CASES.values()} == set(DECODERS)


@pytest.mark.parametrize("case", list(CASES))
def test_losses_reach_every_weight(case: str) -> None:
    """Once no weight is exactly zero, a gradient arrives at each, and the exceptions are exactly the listed ones."""
    model = built(case)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.grounding.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    found = gradients(model)
    assert len(found) > 100
    words = SHIFTED_WORDS if case.startswith("lavt") else ()
    assert sorted(n for n, value in found.items() if value < LEAST) == matching(found, UNREACHABLE + words)


@pytest.mark.parametrize("case", ["rela_deformable", "rela_pwam", "instances_deformable", "instances_fpn"])
def test_at_the_start_only_what_lies_before_a_closed_gate_gets_no_gradient(case: str) -> None:
    found = gradients(built(case))
    assert sorted(n for n, value in found.items() if value < LEAST) == matching(found, UNREACHABLE + STARTS_CLOSED)
