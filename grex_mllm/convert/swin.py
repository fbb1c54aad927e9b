"""ImageNet weights of Swin (Liu et al. 2021) for our encoder: original names, detectron2's conversion of them, or timm's names.

The released ReLA starts from Swin trained on ImageNet-22k. Language fusion, gates and the norms of the stages' outputs have no
counterpart there: they start as built (the gates at zero).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from grex_mllm.config import VisionConfig
from grex_mllm.convert.folder import write_weights
from grex_mllm.convert.reader import read_checkpoint
from grex_mllm.convert.rela import Conversion, fill, shapes_of, sort_keys
from grex_mllm.errors import fault
from grex_mllm.models.swin import SwinTransformer

# name of the rule, keys it covers
IGNORED: tuple[tuple[str, str], ...] = (
    ("relative position index (a constant of the window size)", r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_index"),
    ("attention mask (a constant of the training size)", r"layers\.\d+\.blocks\.\d+\.attn_mask"),
    ("classifier and the norm before it", r"(norm|head|head\.fc)\.(weight|bias)"),
)
PREFIXES = ("module.", "model.", "backbone.", "encoder.")
KEPT = r"patch_embed\..+|layers\.(\d+)\.(blocks|downsample)\..+|norm([0-3])\.(weight|bias)"


def convert_swin(path: str | Path, out: str | Path) -> Conversion:
    """Write a safetensors file for `model.vision.weights`; nothing is written unless everything fits.

    The note in the result holds the settings of `model.vision` that belong to the weights, all read from the shapes.

    Raises:
        GrexError: unreadable or unsafe file, no Swin, unknown, missing or misshapen keys, or an output that exists.
    """
    target = Path(out)
    state, beside = read_checkpoint(path)
    named, ignored = rename(state, str(path))
    vision = sizes(named, str(path))
    own = shapes_of(lambda: SwinTransformer(vision, text_width=1))
    # the outputs' norms only where the file has them
    fill(named, {name: shape for name, shape in own.items() if name in named or not name.startswith("norms.")}, str(path))
    for entry in beside:
        ignored[f"beside the weights: {entry}"] = 1
    write_weights(target, {name: tensor.float() for name, tensor in named.items()})
    settings = f"name: swin, embed_width: {vision.embed_width}, swin_depths: {vision.swin_depths}, swin_heads: {vision.swin_heads}"
    note = f"set under model.vision: {{{settings}, window: {vision.window}, weights: {target}}}"
    return Conversion("swin", len(named), ignored, target, [note])


def rename(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rename every key to ours, or count it under the rule that ignores it.

    timm (0.9 and later) keeps the halving at the start of a stage, the original at the end of the stage before.

    Raises:
        GrexError: lists the keys that no rule knows.
    """
    plain = {_plain(key): tensor for key, tensor in state.items()}
    stages = {int(match.group(1)) for key in plain if (match := re.match(r"layers\.(\d+)\.blocks\.", key))}
    moved = any(key.startswith(f"layers.{max(stages, default=0)}.downsample.") for key in plain)
    named, ignored, unknown = sort_keys(plain, IGNORED, lambda key: _ours(key, moved) if re.fullmatch(KEPT, key) else None)
    if unknown or not stages:
        some = ", ".join((unknown or list(plain))[:6])
        raise fault(
            f"{source} has keys that no Swin has ({some})",
            "Swin weights, original names or timm's",
            "give a Swin (first version) checkpoint",
        )
    return named, ignored


def sizes(named: Mapping[str, Tensor], source: str) -> VisionConfig:
    """Read width, depths, heads and window from the shapes.

    Raises:
        GrexError: the tensors that tell them are missing.
    """
    tables = {
        (int(match.group(1)), int(match.group(2))): tensor
        for key, tensor in named.items()
        if (match := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", key))
    }
    first = named.get("patch_embed.proj.weight")
    stages = sorted({stage for stage, _ in tables})
    if first is None or not stages:
        raise fault(f"{source} lacks the patch embedding or the position tables", "a whole Swin", "download it again")
    return VisionConfig(
        name="swin",
        embed_width=int(first.shape[0]),
        swin_depths=[sum(1 for stage, _ in tables if stage == s) for s in stages],
        swin_heads=[int(tables[(s, 0)].shape[1]) if (s, 0) in tables else 1 for s in stages],
        window=(math.isqrt(int(tables[min(tables)].shape[0])) + 1) // 2,
        fusion="none",
    )


def _plain(key: str) -> str:
    """Drop wrappers' prefixes and timm's flattened `layers_0`."""
    for prefix in PREFIXES:
        key = key.removeprefix(prefix)
    return re.sub(r"^layers_(\d+)\.", r"layers.\1.", key)


def _ours(key: str, moved: bool) -> str:
    if moved and (match := re.fullmatch(r"layers\.(\d+)\.downsample\.(.+)", key)):
        return f"stages.{int(match.group(1)) - 1}.downsample.{match.group(2)}"
    key = re.sub(r"^layers\.", "stages.", key)
    return re.sub(r"^norm(\d)\.", r"norms.\1.", key)
