"""Released ReLA checkpoints (GRES, Liu et al. 2023) into our model folders.

Every key of the checkpoint is mapped by one rule, ignored by one named rule, or listed in the one error; every key of our model is
filled. Sizes of R50, Swin-T and Swin-B are recognised from the shapes; other sizes come as YAML, because the numbers of heads cannot be
seen in shapes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from grex_mllm.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PixelDecoderConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
    load_config,
)
from grex_mllm.convert.folder import write_model_folder
from grex_mllm.convert.reader import read_checkpoint
from grex_mllm.errors import GrexError, fault
from grex_mllm.models import build_grounding
from grex_mllm.models.decoders.rela import Config as RelaConfig
from grex_mllm.models.decoders.rela.config import RelaLossConfig

SEVERAL = 6

# released name -> ours; the first rule that matches the whole key counts
RULES: tuple[tuple[str, str], ...] = (
    # Swin with language fusion
    (r"backbone\.patch_embed\.(.+)", r"vision.patch_embed.\1"),
    (r"backbone\.layers\.(\d+)\.fusion\.vis_project\.0\.(weight|bias)", r"vision.stages.\1.fusion.visual.\2"),
    (r"backbone\.layers\.(\d+)\.fusion\.project_mm\.0\.(weight|bias)", r"vision.stages.\1.fusion.mix.\2"),
    (r"backbone\.layers\.(\d+)\.fusion\.image_lang_att\.f_(query|key|value)\.0\.(weight|bias)", r"vision.stages.\1.fusion.\2.\3"),
    (r"backbone\.layers\.(\d+)\.fusion\.image_lang_att\.W\.0\.(weight|bias)", r"vision.stages.\1.fusion.output.\2"),
    (r"backbone\.layers\.(\d+)\.res_gate\.([02])\.weight", r"vision.stages.\1.gate.\2.weight"),
    (r"backbone\.layers\.(\d+)\.((?:blocks|downsample)\..+)", r"vision.stages.\1.\2"),
    (r"backbone\.norm(\d)\.(weight|bias)", r"vision.norms.\1.\2"),
    # ResNet
    (r"backbone\.stem\.conv1\.norm\.(.+)", r"vision.stem.norm.\1"),
    (r"backbone\.stem\.conv1\.weight", r"vision.stem.conv.weight"),
    (r"backbone\.res([2-5])\.(\d+)\.conv(\d)\.norm\.(.+)", r"vision.stages.<\1>.\2.norm\3.\4"),
    (r"backbone\.res([2-5])\.(\d+)\.conv(\d)\.weight", r"vision.stages.<\1>.\2.conv\3.weight"),
    (r"backbone\.res([2-5])\.(\d+)\.shortcut\.norm\.(.+)", r"vision.stages.<\1>.\2.shortcut.norm.\3"),
    (r"backbone\.res([2-5])\.(\d+)\.shortcut\.weight", r"vision.stages.<\1>.\2.shortcut.conv.weight"),
    # pixel decoder
    (r"sem_seg_head\.pixel_decoder\.input_proj\.(\d)\.([01])\.(weight|bias)", r"pixel_decoder.inputs.\1.\2.\3"),
    (r"sem_seg_head\.pixel_decoder\.transformer\.level_embed", r"pixel_decoder.level_embed"),
    (r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)", r"pixel_decoder.layers.\1.attention.\2"),
    (r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.((?:norm|linear)[12]\..+)", r"pixel_decoder.layers.\1.\2"),
    (r"sem_seg_head\.pixel_decoder\.adapter_1\.weight", r"pixel_decoder.lateral.0.weight"),
    (r"sem_seg_head\.pixel_decoder\.adapter_1\.norm\.(weight|bias)", r"pixel_decoder.lateral.1.\1"),
    (r"sem_seg_head\.pixel_decoder\.layer_1\.weight", r"pixel_decoder.smooth.0.weight"),
    (r"sem_seg_head\.pixel_decoder\.layer_1\.norm\.(weight|bias)", r"pixel_decoder.smooth.1.\1"),
    (r"sem_seg_head\.pixel_decoder\.mask_features\.(weight|bias)", r"pixel_decoder.mask_features.\1"),
    # decoder
    (r"sem_seg_head\.predictor\.query_feat\.weight", r"decoder.language_part.region_features.weight"),
    (r"sem_seg_head\.predictor\.query_embed\.weight", r"decoder.language_part.region_positions.weight"),
    (r"sem_seg_head\.predictor\.level_embed\.weight", r"decoder.image_part.level_embed.weight"),
    (r"sem_seg_head\.predictor\.RIA_layers\.(\d+)\.multihead_attn\.(.+)", r"decoder.language_part.region_image.\1.attention.\2"),
    (r"sem_seg_head\.predictor\.RIA_layers\.(\d+)\.norm\.(weight|bias)", r"decoder.language_part.region_image.\1.norm.\2"),
    (r"sem_seg_head\.predictor\.RLA_vision\.(\d+)\.self_attn\.(.+)", r"decoder.language_part.region_region.\1.attention.\2"),
    (r"sem_seg_head\.predictor\.RLA_vision\.(\d+)\.norm\.(weight|bias)", r"decoder.language_part.region_region.\1.norm.\2"),
    (r"sem_seg_head\.predictor\.RLA_lang_att\.multihead_attn\.(.+)", r"decoder.language_part.region_language.0.attention.\1"),
    (r"sem_seg_head\.predictor\.RLA_lang_att\.norm\.(weight|bias)", r"decoder.language_part.region_language.0.norm.\1"),
    (r"sem_seg_head\.predictor\.lang_proj\.weight", r"decoder.language_part.language_projection.weight"),
    (r"sem_seg_head\.predictor\.lang_weight", r"decoder.language_part.language_weight"),
    (r"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.(.+)", r"decoder.language_part.feedforward.\1.\2"),
    (r"sem_seg_head\.predictor\.decoder_norm\.(weight|bias)", r"decoder.language_part.norm.\1"),
    (r"sem_seg_head\.predictor\.mask_embed\.(layers\.\d\..+)", r"decoder.language_part.heads.mask.\1"),
    (r"sem_seg_head\.predictor\.minimap_embed\.(weight|bias)", r"decoder.language_part.heads.minimap.\1"),
    (r"sem_seg_head\.predictor\.nt_embed\.(layers\.\d\..+)", r"decoder.language_part.heads.no_target.\1"),
    # text
    (r"text_encoder\.(.+)", r"text.bert.\1"),
)

# name of the rule, keys it covers, why nothing is lost
IGNORED: tuple[tuple[str, str], ...] = (
    ("position ids (a constant 0, 1, 2, ... of transformers before 4.31)", r"text_encoder\.embeddings\.position_ids"),
    ("relative position index (a constant of the window size)", r"backbone\.layers\.\d+\.blocks\.\d+\.attn\.relative_position_index"),
)

# what the released attention keeps in one matrix: keys and values of the region-image attention need no language
PROJECTIONS = ("query", "key", "value")
PACKED = re.compile(r"decoder\.language_part\.(?P<kind>region_\w+)\.(?P<layer>\d+)\.attention\.in_proj_(?P<part>weight|bias)")

RELEASED_LOSS = RelaLossConfig(
    mask=5.0, minimap=0.5, no_target=0.5, box_l1=0, box_giou=0, box_score=0, count=0, class_weights=[0.9, 1.1], minimap_target="truncated"
)
SWIN_TINY = VisionConfig(name="swin", embed_width=96, swin_depths=[2, 2, 6, 2], swin_heads=[3, 6, 12, 24], window=7, fusion="pwam")
SWIN_BASE = VisionConfig(name="swin", embed_width=128, swin_depths=[2, 2, 18, 2], swin_heads=[4, 8, 16, 32], window=12, fusion="pwam")
SWIN_BLOCKS, RESNET_BLOCKS = r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight", r"backbone\.res([2-5])\.(\d+)\.conv1\.weight"
BACKBONES = {"swin_tiny": SWIN_TINY, "swin_base": SWIN_BASE, "r50": VisionConfig(name="resnet")}


@dataclass
class Conversion:
    """What became of a checkpoint.

    kind: which released model it is, or "given sizes".  mapped: number of tensors taken over.  ignored: rule -> number of keys, or of
    entries beside the weights.  folder: the model folder.  notes: what the user still has to do.
    """

    kind: str
    mapped: int
    ignored: dict[str, int]
    folder: Path
    notes: list[str]

    def lines(self) -> list[str]:
        """Say it in a few lines."""
        skipped = [f"ignored {number}: {rule}" for rule, number in self.ignored.items()]
        return [f"{self.kind}: {self.mapped} tensors -> {self.folder}", *skipped, *self.notes]


def convert_rela(path: str | Path, out: str | Path, config: str | Path | None = None, vocab: str | Path | None = None) -> Conversion:
    """Turn an authors' checkpoint into a model folder; nothing is written unless everything fits.

    path: .pth with {"model": state dict} or a bare state dict.  config: YAML with the sizes under `model`, for none of R50, Swin-T, Swin-B.
    vocab: BERT's vocab.txt; without it, one in the local cache of the hub is taken, else the folder needs one later.

    Raises:
        GrexError: unreadable or unsafe file, foreign architecture, missing, unknown or misshapen keys, numbers that
            are not finite, or an output folder that is in use.
    """
    state, beside = read_checkpoint(path)
    kind, settings = recognise(state, str(path)) if config is None else ("given sizes", released_sizes(config))
    mapped, ignored = map_keys(state, str(path))
    fill(mapped, shapes_of(lambda: build_grounding(settings.model)), str(path))
    broken = [name for name, tensor in mapped.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise fault(f"{path} has NaN or infinity in {len(broken)} tensors: {_some(broken)}", "finite weights", "take an earlier checkpoint")
    for entry in beside:
        ignored[f"training state: {entry}"] = 1
    tensors = {f"grounding.{name}": tensor for name, tensor in mapped.items()}
    notes = write_model_folder(Path(out), settings, tensors, vocab)
    return Conversion(kind, len(mapped), ignored, Path(out), notes)


def released_config(vision: VisionConfig) -> Config:
    """Return the configuration under which our model computes and trains as the released one, with the given image encoder."""
    model = ModelConfig(
        vision=replace(vision),
        text=TextConfig(),
        pixel_decoder=PixelDecoderConfig(),
        decoder=RelaConfig(boxes=False, count=False, loss=replace(RELEASED_LOSS)),
    )
    optim = OptimConfig(groups="released", text="released", lr=1e-5, schedule="multistep", clip=0.01)
    train = TrainConfig(steps=150_000, batch_images=48, optim=optim)
    return Config(model=model, data=DataConfig(expressions_per_image=1, sampling="released"), train=train)


def released_sizes(path: str | Path) -> Config:
    """Read a YAML of sizes: its `model` section, in the released configuration; heads that the released model lacks are off.

    Raises:
        GrexError: as `load_config`.
    """
    model = load_config(path).model
    if not isinstance(model.decoder, RelaConfig):
        raise fault(
            f"{path}: model.decoder.name {model.decoder.name}", "rela, which the checkpoint is", "give the sizes of a released ReLA"
        )
    model.decoder.boxes = model.decoder.count = False
    return replace(released_config(model.vision), model=model)


def recognise(state: Mapping[str, Tensor], source: str) -> tuple[str, Config]:
    """Tell R50, Swin-T and Swin-B from the shapes of a released state dict.

    Raises:
        GrexError: no ReLA checkpoint, or one of other sizes.
    """
    if not any(key.startswith("sem_seg_head.predictor.RIA_layers.") for key in state):
        some = ", ".join(list(state)[:3])
        raise fault(
            f"{source} has no RIA layers (first keys: {some})", "a released ReLA checkpoint", "see `grex convert swin` for a bare Swin"
        )
    stem, patch = state.get("backbone.stem.conv1.weight"), state.get("backbone.patch_embed.proj.weight")
    for kind, vision in BACKBONES.items():
        if vision.name == "swin":
            fits = patch is not None and patch.shape[0] == vision.embed_width and _counts(state, SWIN_BLOCKS) == vision.swin_depths
        else:
            fits = stem is not None and stem.shape[0] == vision.stem_width and _counts(state, RESNET_BLOCKS) == vision.depths
        queries = state.get("sem_seg_head.predictor.query_feat.weight")
        config = released_config(vision)
        if fits and queries is not None and tuple(queries.shape) == (config.model.decoder.minimap_side**2, config.model.decoder.width):
            return kind, config
    raise fault(
        f"{source} is a ReLA of other sizes than R50, Swin-T and Swin-B",
        "one of them, or its sizes",
        "give them with --config sizes.yaml (see tests/data/rela_nano_swin.yaml)",
    )


def map_keys(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Rename every key by RULES, or count it under the name of the rule that ignores it.

    Convolutions of width 1 that are linear layers here lose that axis; a lone number becomes a vector of one.

    Raises:
        GrexError: lists the keys that no rule knows.
    """
    named, ignored, unknown = sort_keys(state, IGNORED, new_name)
    if unknown:
        raise fault(
            f"{source} has {len(unknown)} unknown keys: {_some(unknown)}", "the keys of a released ReLA", "give the authors' checkpoint"
        )
    mapped: dict[str, Tensor] = {}
    for name, tensor in named.items():
        value = tensor.squeeze(-1) if tensor.ndim == 3 else tensor.reshape(1) if tensor.ndim == 0 else tensor
        names = unpacked_names(name)
        mapped |= zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True)
    return mapped, ignored


def unpacked_names(name: str) -> list[str]:
    """Name the tensors that a renamed tensor is cut into: queries, keys and values of a matrix for all three; itself for any other."""
    found = PACKED.fullmatch(name)
    if found is None:
        return [name]
    layer, part = found["layer"], found["part"]
    names = [f"decoder.language_part.{found['kind']}.{layer}.attention.{projection}.{part}" for projection in PROJECTIONS]
    if found["kind"] == "region_image":
        names[1:] = [f"decoder.image_part.keys.{layer}.{part}", f"decoder.image_part.values.{layer}.{part}"]
    return names


def sort_keys(
    state: Mapping[str, Tensor], ignored_rules: Iterable[tuple[str, str]], new_name: Callable[[str], str | None]
) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """Return the tensors under the names that `new_name` gives, how many keys each rule (name, pattern) ignores, and the unknown keys."""
    named: dict[str, Tensor] = {}
    ignored: Counter[str] = Counter()
    unknown = []
    for key, tensor in state.items():
        rule = next((name for name, pattern in ignored_rules if re.fullmatch(pattern, key)), None)
        if rule is not None:
            ignored[rule] += 1
        elif (name := new_name(key)) is not None:
            named[name] = tensor
        else:
            unknown.append(key)
    return named, dict(ignored), unknown


def new_name(key: str, rules: Iterable[tuple[str, str]] = RULES) -> str | None:
    """Rename one released key, or return None. In a rule, <n> stands for stage n - 2 (detectron2 counts from 2) and [n] for n - 1."""
    for pattern, replacement in rules:
        if re.fullmatch(pattern, key):
            name = re.sub(pattern, replacement, key)
            name = re.sub(r"<(\d)>", lambda stage: str(int(stage.group(1)) - 2), name)
            return re.sub(r"\[(\d)\]", lambda stage: str(int(stage.group(1)) - 1), name)
    return None


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that the module saves, without allocating its parameters."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def fill(mapped: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that the renamed tensors are exactly those that the model has.

    Raises:
        GrexError: one message with all missing, superfluous and misshapen tensors.
    """
    wrong = [f"{len(names)} {word}: {_some(names)}" for word, names in differences(mapped, expected).items() if names]
    if wrong:
        raise GrexError(
            f"{source} does not fit the model ({'; '.join(wrong)}); expected every tensor once, in its shape; "
            "give a whole checkpoint, and the right sizes with --config where they are not R50, Swin-T or Swin-B"
        )


def differences(mapped: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Return the names that are missing, superfluous, and of another shape (with both shapes)."""
    both = [(name, tuple(mapped[name].shape), shape) for name, shape in expected.items() if name in mapped]
    return {
        "missing": [name for name in expected if name not in mapped],
        "superfluous": [name for name in mapped if name not in expected],
        "of another shape": [f"{name} {given} for {shape}" for name, given, shape in both if given != shape],
    }


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:SEVERAL]) + (f" and {len(listed) - SEVERAL} more" if len(listed) > SEVERAL else "")


def _counts(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """Count the blocks of each stage whose keys match (stage, block)."""
    found = [match.group(1) for key in state if (match := re.fullmatch(pattern, key))]
    return [found.count(stage) for stage in sorted(set(found))]
