"""Compare a converted model with tensors that the authors' code gave for the same weights and inputs.

A recorded folder holds `oracle.pt` with `inputs` (samples), `eval` (every intermediate, float32) and, if wanted, `eval64` (float64), and
`meta.json` with `fp32_vs_fp64`: how far the recorded float32 lies from float64, which is the error to expect of any float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grex_mllm.config import load_config
from grex_mllm.convert.folder import CONFIG, WEIGHTS
from grex_mllm.errors import GrexError, fault
from grex_mllm.models import build_grounding
from grex_mllm.models.decoders.rela import Decoder as Rela
from grex_mllm.models.grounding import GroundingModel, upsample_logits
from grex_mllm.types import GroundingOutput

TIMES_RECORDED = 5  # float32 may be this many times the recorded float32 error away
SCALE64 = 1e-8  # float64 may be this far away, in units of the tensor's largest value
FLOOR = 6e-7  # five roundings of a float32 near 1, where the recorded error happens to be smaller
NO_TARGET = 1e-5
FLIPS = 1e-4  # share of the pixels of a mask, or of the places of an attention mask, that may differ


@dataclass
class Line:
    """One compared tensor. error: largest absolute difference, or share of differing places for masks.  allowed: the bound on it."""

    name: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{'ok  ' if self.agrees else 'FAIL'} {self.name:44} error {self.error:9.2e}  allowed {self.allowed:9.2e}"


def convert_check(model_dir: str | Path, recorded_dir: str | Path, say: Callable[[str], None] = print) -> bool:
    """Compare every recorded tensor, say one line for each, and tell whether all agree.

    Raises:
        GrexError: a folder without its files, or a recording that cannot be read.
    """
    model = load_grounding(Path(model_dir))
    if not isinstance(model.decoder, Rela) or not model.decoder.language_part.region_language:
        raise fault(f"{model_dir} is no released ReLA", "a model that `grex convert rela` made", "give its folder")
    recorded, errors = read_recording(Path(recorded_dir))
    lines = list(compare32(run(model, recorded["inputs"]), recorded["eval"], errors))
    if "eval64" in recorded:
        lines += compare64(run(model.double(), recorded["inputs"]), recorded["eval64"])
    for line in lines:
        say(str(line))
    failed = sum(not line.agrees for line in lines)
    say(f"{len(lines) - failed} of {len(lines)} tensors agree" + (f", {failed} do not" if failed else ""))
    return not failed


def load_grounding(folder: Path) -> GroundingModel:
    """Load the grounding part of a model folder for evaluation, without any tokenizer.

    Raises:
        GrexError: not a model folder, or weights that do not fit its configuration.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise fault(f"model folder {folder} has no {name}", "a folder that `grex convert rela` wrote", "fix the path")
    model = build_grounding(load_config(folder / CONFIG, trusted=False).model)
    try:
        state = load_file(str(folder / WEIGHTS))
        model.load_state_dict({name.removeprefix("grounding."): value for name, value in state.items() if name.startswith("grounding.")})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise GrexError(f"{folder / WEIGHTS} does not fit ({str(error)[:200]}); expected the model's own weights; convert again") from None
    return model.eval()


def read_recording(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `oracle.pt` holds, and the recorded float32 errors: path -> {"max": ...} or {"flips": ...}.

    Raises:
        GrexError: a file is missing or cannot be read.
    """
    try:
        recorded = torch.load(folder / "oracle.pt", weights_only=True)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        noted = _flat(meta["fp32_vs_fp64"], lambda tree: isinstance(tree, Mapping) and ("max" in tree or "flips" in tree))
        return recorded, dict(noted)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise fault(f"recording {folder} cannot be read ({str(error)[:120]})", "oracle.pt and meta.json", "fix the path") from None


@torch.no_grad()
def run(model: GroundingModel, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Run the recorded samples as one batch and return path -> tensor, under the recording's names and in its layouts."""
    size = [max(sample["image"].shape[axis] for sample in samples) for axis in (1, 2)]
    image = torch.zeros(len(samples), 3, size[0], size[1], dtype=torch.uint8)
    valid = []
    for canvas, sample in zip(image, samples, strict=True):
        height, width = sample["image"].shape[1:]
        canvas[:, :height, :width] = sample["image"]
        valid.append((int(height), int(width)))
    ids, mask = (torch.cat([sample[name] for sample in samples]) for name in ("lang_tokens", "lang_mask"))
    found: dict[str, Tensor] = {}
    with watched(model, found):
        features = model.encode_image(image, valid)
        index = torch.arange(len(samples))
        output = model.ground(features, index, ids, mask)
    found["normalized_image"] = features.image
    found.update(_answers(model, output, features.padded_size, found))
    return found


@contextmanager
def watched(model: GroundingModel, found: dict[str, Tensor]) -> Iterator[None]:
    """Note the intermediate tensors of a forward pass in `found` while the block runs."""
    handles = [module.register_forward_hook(_note(found, name)) for name, module in _watch_list(model)]
    for stage, layer in enumerate(model.decoder.language_part.region_image):
        handles.append(layer.register_forward_pre_hook(_note_mask(found, f"decoder.{stage}.attn_mask_head0")))
    for s, stage in enumerate(getattr(model.vision, "stages", ())):
        if getattr(stage, "fusion", None) is not None:
            handles.append(stage.fusion.register_forward_hook(_note(found, f"swin.{s}.pwam_lang")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare32(found: Mapping[str, Tensor], recorded: Any, errors: Mapping[str, Any]) -> Iterator[Line]:
    """Compare float32 tensors with the recorded ones, each within its own bound."""
    for name, expected in _flat(recorded):
        if name not in found:
            yield Line(f"{name} (not computed)", float("inf"), 0.0)
            continue
        ours = found[name]
        if expected.dtype == torch.bool:
            yield Line(name, _share(ours != expected), FLIPS)
            continue
        note = errors.get(name, {})
        allowed = max(TIMES_RECORDED * float(note.get("max", 0.0)), FLOOR)
        if name == "head_out/pred_masks":
            allowed = 1e-3 * float(expected.std()) + 1e-3
        elif name == "head_out/nt_label":
            allowed = NO_TARGET
        yield Line(name, _distance(ours, expected), allowed)
        if name.endswith("ref_seg"):
            yield Line(f"{name} (argmax)", _share(ours.argmax(0) != expected.argmax(0)), FLIPS)
        elif name.startswith("processed") and name.endswith("nt_label"):
            yield Line(f"{name} (decision)", _share(ours.argmax(-1) != expected.argmax(-1)), 0.0)


def compare64(found: Mapping[str, Tensor], recorded: Any) -> Iterator[Line]:
    """Compare float64 tensors with the recorded ones, within SCALE64 of their largest value."""
    for name, expected in _flat(recorded):
        error = _distance(found[name], expected) if name in found else float("inf")
        yield Line(f"{name} (float64)", error, SCALE64 * float(expected.abs().max()))


def _watch_list(model: GroundingModel) -> Iterator[tuple[str, Any]]:
    """Yield the recorded name and our module whose output it is."""
    yield "text_features", model.text
    if hasattr(model.vision, "stem"):
        yield "resnet.stem", model.vision.stem
    if hasattr(model.vision, "patch_embed"):
        yield "swin.patch_embed", model.vision.patch_embed
        for s, stage in enumerate(model.vision.stages):
            parts = (("blocks_out", stage.blocks[-1]), ("pwam", stage.fusion), ("res_gate", stage.gate), ("downsample", stage.downsample))
            yield from ((f"swin.{s}.{name}", module) for name, module in parts if module is not None)
        yield from ((f"backbone/res{s + 2}/tokens", norm) for s, norm in enumerate(model.vision.norms))
    else:
        yield from ((f"backbone/res{s + 2}", stage) for s, stage in enumerate(model.vision.stages))
    yield from ((f"pixel_encoder.{i}", layer) for i, layer in enumerate(model.pixel_decoder.layers))
    yield "pixels", model.pixel_decoder
    decoder = model.decoder.language_part
    yield "decoder.lang_proj", decoder.language_projection
    yield "decoder.RLA_lang_att", decoder.region_language[0]
    for name, layers in (("RIA", decoder.region_image), ("RLA_vision", decoder.region_region), ("ffn", decoder.feedforward)):
        yield from ((f"decoder.{i}.{name}", layer) for i, layer in enumerate(layers))


def _note(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Make a hook that keeps a module's output in the recording's layout."""

    def hook(module: Any, args: Any, output: Any) -> None:
        if name == "text_features":
            found[name] = output.tokens
        elif name == "pixels":
            found["mask_features"] = output.mask_features
            found.update({f"multi_scale_features/{i}": level for i, level in enumerate(output.levels)})
        elif name.endswith("pwam_lang"):
            found[name] = module.attend(*args)
        elif name.startswith("decoder.") and name != "decoder.lang_proj":
            found[name] = output.transpose(0, 1)  # recorded as [Q, B, C]
        else:
            found[name] = output

    return hook


def _note_mask(found: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        found[name] = ~args[-1][:, 0]  # ours tells what is allowed, theirs what is blocked

    return hook


def _answers(model: GroundingModel, output: GroundingOutput, padded: tuple[int, int], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the heads' outputs and the released inference's two maps per sample, and bring the image maps into [B, C, h, w]."""
    embeddings = output.extra.mask_embeddings
    assert output.minimap_logits is not None and output.no_target_logits is not None
    made = {
        "head_out/pred_logits": output.minimap_logits,
        "head_out/pred_masks": output.mask_logits,
        "head_out/all_masks": torch.einsum("bqc,bchw->bqhw", embeddings, found["mask_features"]),
        "head_out/nt_label": output.no_target_logits,
    }
    prob = upsample_logits(output.mask_logits, padded).sigmoid()
    for i, no_target in enumerate(output.no_target_logits.sigmoid()):
        made[f"processed/{i}/ref_seg"], made[f"processed/{i}/nt_label"] = prob[i], no_target
    for s in range(4):
        tokens = found.get(f"backbone/res{s + 2}/tokens")
        if tokens is not None:
            height, width = padded[0] // (4 * 2**s), padded[1] // (4 * 2**s)
            made[f"backbone/res{s + 2}"] = tokens.transpose(1, 2).unflatten(2, (height, width))
    return made


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _flat(tree: Any, is_leaf: Callable[[Any], bool] = _is_tensor, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk nested dicts and lists down to the leaves; a path joins the keys with slashes."""
    if is_leaf(tree):
        yield path, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _flat(value, is_leaf, f"{path}/{key}" if path else str(key))


def _distance(ours: Tensor, expected: Tensor) -> float:
    if ours.shape != expected.shape:
        return float("inf")
    error = (ours.double() - expected.double()).abs().max()
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def _share(differs: Tensor) -> float:
    return float(differs.double().mean())
