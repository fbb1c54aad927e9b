"""Watch a released-architecture model at work: every intermediate under the name and in the layout of the recorded comparisons.

Names: `swin.{s}.blocks_out | pwam_lang | pwam | res_gate | downsample`, `pixel_encoder.{i}`,
`decoder.{i}.RIA | attn_mask_head0 | RLA_vision | ffn` (queries first: [Q, B, C]; the mask is True where a region may not look), `head_out`,
`processed`, and so on. Works for `rela` with one expression per image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.models.grounding import GroundingModel, upsample_logits


@torch.no_grad()
def record_forward(model: GroundingModel, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> dict[str, Any]:
    """Run the model on B images with one expression each and return what it computed on the way.

    image: uint8 [B, 3, H, W].  text_ids, text_mask: int64 [B, L].
    """
    record: dict[str, Any] = {}
    handles = [*_watch_vision(model, record), *_watch_decoders(model, record)]
    index = torch.arange(len(image), device=image.device)
    try:
        features = model.encode_image(image)
        output = model.ground(features, index, text_ids, text_mask)
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            module.__dict__.pop("attend", None)
    record["normalized_image"] = features.image
    masks = record.pop("regions")
    record["head_out"] = {
        "pred_logits": output.minimap_logits,
        "pred_masks": output.mask_logits,
        "all_masks": model.decoder.region_masks(output, masks, index),
        "nt_label": output.no_target_logits,
    }
    probabilities = upsample_logits(output.mask_logits, features.padded_size).sigmoid()
    answers = zip(probabilities, output.no_target_logits.sigmoid(), strict=True)
    record["processed"] = [{"ref_seg": mask, "nt_label": no_target} for mask, no_target in answers]
    return record


def _keep(record: dict[str, Any], name: str, change: Callable[[Any], Any] = lambda x: x) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        record[name] = change(output)

    return hook


def _watch_vision(model: GroundingModel, record: dict[str, Any]) -> list[Any]:
    vision = model.vision
    handles = [model.text.register_forward_hook(_keep(record, "text_features", lambda text: text.tokens))]
    names = ("res2", "res3", "res4", "res5")

    def maps(_module: nn.Module, args: Any) -> None:
        record["backbone"] = dict(zip(names, args[0], strict=True))

    handles.append(model.pixel_decoder.register_forward_pre_hook(maps))
    if not hasattr(vision, "patch_embed"):
        handles.append(vision.stem.register_forward_hook(_keep(record, "resnet.stem")))
        return handles
    handles.append(vision.patch_embed.register_forward_hook(_keep(record, "swin.patch_embed")))
    for i, stage in enumerate(vision.stages):
        if stage.fusion is not None:
            handles.append(stage.fusion.register_forward_pre_hook(_keep_input(record, f"swin.{i}.blocks_out")))
            handles.append(stage.fusion.register_forward_hook(_keep(record, f"swin.{i}.pwam")))
            stage.fusion.attend = _keep_result(record, f"swin.{i}.pwam_lang", stage.fusion.attend)
        if stage.gate is not None:
            handles.append(stage.gate.register_forward_hook(_keep(record, f"swin.{i}.res_gate")))
        if stage.downsample is not None:
            handles.append(stage.downsample.register_forward_hook(_keep(record, f"swin.{i}.downsample")))
    return handles


def _keep_input(record: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any) -> None:
        record[name] = args[0]

    return hook


def _keep_result(record: dict[str, Any], name: str, method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        record[name] = method(*args)
        return record[name]

    return call


def _watch_decoders(model: GroundingModel, record: dict[str, Any]) -> list[Any]:
    def pixels(_module: nn.Module, _args: Any, output: Any) -> None:
        record.update(mask_features=output.mask_features, multi_scale_features=output.levels)

    def regions(_module: nn.Module, args: Any) -> None:
        record["regions"] = args[0]

    decoder = model.decoder
    handles = [model.pixel_decoder.register_forward_hook(pixels), decoder.register_forward_pre_hook(regions)]
    for i, layer in enumerate(model.pixel_decoder.layers):
        handles.append(layer.register_forward_hook(_keep(record, f"pixel_encoder.{i}")))
    handles.append(decoder.language_projection.register_forward_hook(_keep(record, "decoder.lang_proj")))
    handles.append(decoder.region_language[0].register_forward_hook(_keep(record, "decoder.RLA_lang_att", _queries_first)))
    for i, (ria, rla, ffn) in enumerate(zip(decoder.region_image, decoder.region_region, decoder.feedforward, strict=True)):
        handles.append(ria.register_forward_pre_hook(_keep_blocked(record, f"decoder.{i}.attn_mask_head0")))
        handles.append(ria.register_forward_hook(_keep(record, f"decoder.{i}.RIA", _queries_first)))
        handles.append(rla.register_forward_hook(_keep(record, f"decoder.{i}.RLA_vision", _queries_first)))
        handles.append(ffn.register_forward_hook(_keep(record, f"decoder.{i}.ffn", _queries_first)))
    return handles


def _queries_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _keep_blocked(record: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: Any) -> None:
        record[name] = ~args[-1][:, 0]

    return hook
