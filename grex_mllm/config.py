"""Every knob, as typed dataclasses that are the YAML and the command-line flags at once.

A field exists only if code reads it. Sizes are for the real models; the demo's YAML makes them tiny.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from grex_mllm.errors import GrexError


@dataclass
class VisionConfig:
    """Image encoder. name: resnet | swin | timm:<model> | hf:<path or hub id>; weights: a safetensors file for the backbone, or None."""

    name: str = "resnet"
    weights: str | None = None
    # resnet
    block: str = "bottleneck"  # bottleneck | basic
    stem: str = "conv7"  # conv7 (stride 2, max pool) | conv3 (one 3x3 convolution of stride 2)
    norm: str = "frozen_batch"  # frozen_batch | group
    stem_width: int = 64
    widths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    bottleneck_widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    depths: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    coordinates: bool = False  # feed x and y positions as two more input channels
    # swin
    embed_width: int = 128
    swin_depths: list[int] = field(default_factory=lambda: [2, 2, 18, 2])
    swin_heads: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    window: int = 12
    drop_path: float = 0.3
    fusion: str = "none"  # none | pwam (language fused after every stage)


@dataclass
class TextConfig:
    """Text encoder (BERT). path: a folder with weights to start from; else random weights of the given sizes."""

    path: str | None = None
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    max_tokens: int = 20
    dropout: float = 0.1


@dataclass
class PixelDecoderConfig:
    """name: deformable (multi-scale deformable attention) | fpn (plain feature pyramid)."""

    name: str = "deformable"
    width: int = 256
    mask_width: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    feedforward: int = 1024


@dataclass
class DecoderConfig:
    """name: an entry of DECODERS."""

    name: str = "rela"
    width: int = 256
    num_heads: int = 8
    num_layers: int = 9
    feedforward: int = 2048
    minimap_side: int = 10
    boxes: bool = True
    count: bool = True


@dataclass
class GeneratorConfig:
    """LLM that writes group expressions. lm: none | tiny | <folder or hub id>."""

    lm: str = "none"


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


@dataclass
class DataConfig:
    """train, val: a dataset folder, or "synthetic"."""

    train: str = "synthetic"
    train_split: str = "train"
    val: str = "synthetic"
    val_split: str = "val"
    image_size: int = 480
    resize: str = "squash"  # squash (aspect ignored, as released) | pad (longest side, padded right and bottom)
    expressions_per_image: int = 8
    num_workers: int = 0


@dataclass
class LossConfig:
    """Weights of the named loss terms; 0 switches a term off."""


@dataclass
class TrainConfig:
    """The training loop."""

    seed: int = 0
    out: str = "runs/train"


@dataclass
class PredictConfig:
    """From logits to answers."""

    boxes: str = "count"  # count (the N_O best) | threshold | both (the N_O best above the threshold)
    box_threshold: float = 0.7
    min_mask_pixels: int = 0


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)


def check_keys(given: dict[str, Any], kind: type, where: str, source: str) -> None:
    """Raise on a key that `kind` does not have, with the nearest name that it has.

    Raises:
        GrexError: names the file, the full key and the suggestion.
    """
    known = {f.name: f for f in fields(kind)}
    defaults = kind()
    for key, value in given.items():
        full = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(sorted(known))}"
            raise GrexError(f'{source}: unknown key "{full}"; expected one that the configuration has; {hint}')
        nested = getattr(defaults, key)
        if is_dataclass(nested) and isinstance(value, dict):
            check_keys(value, type(nested), full, source)


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `--a.b=c` overrides, and return a checked Config.

    Raises:
        GrexError: file missing, unknown key (with a suggestion), or a value of the wrong type.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=False)
    data: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.is_file():
            raise GrexError(f"config {file} does not exist; expected a YAML file; give one of configs/*.yaml")
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise GrexError(f"config {file} is not valid YAML ({error}); expected key: value lines; mend the file") from None
        if not isinstance(data, dict):
            raise GrexError(f"config {file} holds a {type(data).__name__}; expected a mapping of sections; see configs/")
        check_keys(data, Config, "", str(file))
    for item in overrides or []:
        name, _, _value = item.removeprefix("--").partition("=")
        check_keys(_nest(name), Config, "", "command line")
    try:
        parsed = parser.parse_object(data)
        if overrides:
            parsed = parser.parse_args([item if item.startswith("--") else f"--{item}" for item in overrides], namespace=parsed)
        config = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        raise GrexError(f"{path or 'command line'}: {error}; expected a value of the field's type; mend the value") from None
    return Config(**{f.name: config[f.name] for f in fields(Config)})


def _nest(dotted: str) -> dict[str, Any]:
    head, _, rest = dotted.partition(".")
    return {head: _nest(rest) if rest else None}


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested plain dictionaries, as they stand in `config.yaml`."""
    return asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Write the whole configuration as YAML."""
    import yaml

    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
