"""Every knob, as typed dataclasses that are the YAML and the command-line flags at once.

A field exists only if code reads it. Sizes are for the real models; the demo's YAML makes them tiny.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from grex_mllm.errors import GrexError
from grex_mllm.shipped import CONFIG_FOLDER as CONFIG_FOLDER
from grex_mllm.shipped import PROTOCOL_FOLDER as PROTOCOL_FOLDER
from grex_mllm.shipped import find_file


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
    """Text encoder (BERT). path: a folder with weights to start from; else random weights of the given sizes.

    tokenizer: a folder with tokenizer.json or vocab.txt (default: that of `path`), or "train" to make one from the training expressions.
    """

    path: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    max_tokens: int = 20
    pad: str = "max"  # max (as released: the decoder reads padding rows, too) | longest (of the batch: less work)
    dropout: float = 0.1
    attention: str = "sdpa"  # sdpa | eager (training tiny sizes on a CPU is faster with it) | flash_attention_2


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
    mixed_precision: bool = False  # follow autocast (deformable); the released one stays in float32


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
    # rela only
    ria: str = "attention"  # attention | pooled (hard split in the decoder) | hard_split (of the input image)
    rla: str = "both"  # both | region | language | none (point-wise product with the mean language feature)
    language_every_layer: bool = False  # as in the paper; the released code has language in the first layer only
    mask_language_padding: bool = False  # the released code attends to padding tokens
    language_scale: float = 0.1
    deep_supervision: bool = False  # give the loss every layer's answer
    # instance_selection only
    image_layers: int = 2
    language_layers: int = 3
    kept_regions: int = 20
    heat_width: int = 96
    roi_size: int = 5
    roi_channels: int = 32
    num_levels: int = 2
    mask_upsample: int = 2
    attribute_classes: dict[str, int] = field(default_factory=dict)  # scene metadata: name -> number of classes; {} = none used


@dataclass
class GeneratorConfig:
    """LLM that writes group expressions. lm: none | tiny | <folder or hub id>."""

    lm: str = "none"
    # sizes of the tiny Llama (lm: tiny)
    vocab_size: int = 1000  # of the sentencepiece tokenizer trained for it
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    intermediate_size: int = 384
    max_positions: int = 512
    # how a folder or hub LLM is loaded
    dtype: str = "float32"  # float32 | bfloat16 | float16 | auto
    quantisation: str = "none"  # none | nf4 | int8 (bitsandbytes)
    attn_implementation: str = "sdpa"  # sdpa | eager | flash_attention_2
    gradient_checkpointing: bool = False
    # adapters; rank 0 = none
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    # region tokens
    projector_width: int = 256
    image_grid: int = 2  # image tokens = image_grid squared; 0 = none
    distractors: bool = True  # tokens for the objects that are not selected
    max_distractors: int = 16  # the largest ones
    distractor_dropout: float = 0.0  # share of training sets that hide them: in use, the other objects may be unknown
    shape_side: int = 8  # the mask inside its box as a shape_side x shape_side picture; 0 = none
    context_layers: int = 0  # self-attention among the tokens of an object set before the LM
    attribute_classes: dict[str, int] = field(
        default_factory=dict
    )  # heads and embeddings for attributes of the objects: name -> classes; {} = none
    box_share: float = 0.0  # share of training images whose objects are given as boxes instead of masks
    # text
    prompt: str = ""  # instruction around the region tokens, for example "{regions} Name exactly these objects: "; empty = none
    max_expression_tokens: int = 64
    max_new_tokens: int = 40
    max_rows: int = 512  # sequences decoded at once


@dataclass
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)


@dataclass
class SyntheticConfig:
    """Synthetic scenes. held_out: pairs "colour shape" or "texture shape" that only the split `compositional` shows.

    min_visible: least visible share of every object.  noise: strongest noise in grey levels, drawn anew for each scene.
    """

    seed: int = 0
    image_size: int = 96
    min_objects: int = 2
    max_objects: int = 12
    min_visible: float = 0.45
    noise: int = 10
    no_target_share: float = 0.22
    held_out: list[str] = field(
        default_factory=lambda: ["red star", "blue triangle", "green ring", "yellow square", "purple circle", "orange cross", "dotted bar"]
    )


@dataclass
class DataConfig:
    """train: a dataset folder, or "synthetic"."""

    train: str = "synthetic"
    train_split: str = "train"
    image_size: int = 480
    resize: str = "squash"  # squash (aspect ignored, as released) | pad (longest side, padded right and bottom)
    image_root: str | None = None  # where the images lie, when not where dataset.json says
    expressions_per_image: int = 8
    num_workers: int = 0
    num_generation_targets: int = 8  # expressions of an image that the generator learns from in one grounding batch (train.joint_batches)
    easy_share: float = 0.0  # synthetic: first part of the training in which the easy kinds come more often
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)


@dataclass
class InstanceLossConfig:
    """Weights of the terms of instance_selection: regions against all objects, then the choice of targets."""

    heat: float = 1.0
    cell_box_l1: float = 5.0
    cell_box_giou: float = 1.0
    objectness: float = 2.0
    box_l1: float = 5.0
    box_giou: float = 2.0
    mask_bce: float = 2.0
    mask_dice: float = 2.0
    attribute: float = 0.5  # each scene attribute, where the model has heads for them
    target: float = 1.0
    no_target: float = 0.5
    count: float = 0.5


@dataclass
class LossConfig:
    """Weights of the named loss terms; 0 switches a term off. The defaults are the article's joint weights (2, 5, 0.2, 1)."""

    mask: float = 2.0
    minimap: float = 0.2
    no_target: float = 0.2
    box_l1: float = 5.0
    box_giou: float = 5.0
    box_score: float = 2.0
    count: float = 1.0
    class_weights: list[float] = field(default_factory=lambda: [0.9, 1.1])  # of background and target in the cross-entropies
    minimap_target: str = "area"  # area (share of the cell, a soft target) | truncated (as released: 1 where all sampled pixels are)
    box_score_kind: str = "focal"  # focal | bce
    deep_supervision: float = 0.0  # weight of each earlier layer's terms beside the last layer's
    match_score: float = 2.0  # weights of the pairing cost of boxes and queries
    match_l1: float = 5.0
    match_giou: float = 2.0

    instances: InstanceLossConfig = field(default_factory=InstanceLossConfig)  # instance_selection has terms of its own
    lm: float = 1.0  # the generator's language-model loss
    lm_start: float = 0.0  # share of the training before the generator's loss begins; its attributes are learned from the start
    object_attribute: float = 0.3  # each scene attribute of the generator's objects, where it has heads for them


@dataclass
class OptimConfig:
    """Parameter groups, optimiser, schedule, clipping, averaging."""

    groups: str = "default"  # default (biases, norms, embeddings not decayed) | released (as the authors' code of ReLA)
    text: str = "all"  # which part of the text encoder trains: all | released (layers 0-9) | last_two (as the article says) | none
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    muon: bool = False  # Muon for hidden matrices, AdamW for the rest
    muon_lr: float = 1e-3
    muon_convolutions: bool = False  # Muon for the kernels of hidden convolutions, too
    muon_momentum: float = 0.95
    schedule: str = "cosine"  # constant | multistep | cosine
    warmup_fraction: float = 0.0
    milestones: list[int] = field(default_factory=lambda: [110_000, 140_000])
    gamma: float = 0.1
    final_fraction: float = 0.0  # of the learning rate, left at the end of the cosine
    clip: float = 1.0  # global L2 norm of the gradients; 0 = not clipped
    lr_scale: dict[str, float] = field(default_factory=dict)  # start of a parameter's name -> factor on its learning rate; longest wins
    average_decay: float = 0.0  # of the running average of weights that is evaluated and saved; 0 = none


@dataclass
class TextTrainConfig:
    """Training of the tiny language model without images, on lines of text, then on attributes of objects. The joint training freezes it.

    The attribute pre-training reads attributes and places of objects, no pixels; it needs data with attributes and
    model.generator.attribute_classes.
    """

    steps: int = 0  # batches of lines; 0 = none
    batch: int = 64  # lines
    lr: float = 2e-3
    scenes: int = 0  # batches of train.batch_images scenes of the attribute pre-training; 0 = none
    num_generation_targets: int = 8  # expressions of such a scene that the generator learns from


@dataclass
class TrainConfig:
    """The training loop.

    steps: optimizer steps.  batch_images: images of one batch, over all processes; `accumulation` batches make one step.
    ground_ratio: share of grounding batches, the rest are generation batches.
    save_every, log_every: in steps; a checkpoint is also made at the end.  keep: how many checkpoints stay.
    start: a model folder whose weights the training starts from; heads that it lacks start as built.
    resume: go on from the newest complete checkpoint in `out` if there is one.  deepspeed: a JSON of deepspeed_configs/, or None.
    num_threads: CPU threads of each process, 0 = torch's choice.
    """

    seed: int = 0
    out: str = "runs/train"
    start: str | None = None
    steps: int = 10000
    batch_images: int = 8
    accumulation: int = 1
    ground_ratio: float = 1.0  # 1 = no generation batches
    joint_batches: bool = False  # grounding batches teach the generator, too: the image is encoded once for both
    precision: str = "auto"  # auto (bf16 where the machine multiplies it natively, else fp32) | fp32 | bf16 | fp16 (not on CPU)
    log_every: int = 20
    save_every: int = 500
    keep: int = 2
    resume: bool = False
    deepspeed: str | None = None
    num_threads: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    text: TextTrainConfig = field(default_factory=TextTrainConfig)


@dataclass
class PredictConfig:
    """From logits to answers. batch: expressions that are answered at once.  precision: auto = what fits the machine."""

    batch: int = 64
    masks: bool = True  # false: the model answers with boxes alone (GREC only); masks are not read
    boxes: str = "count"  # count (the N_O best) | threshold | both (the N_O best above the threshold)
    box_threshold: float = 0.7
    no_target: str = "head"  # head | pixels (a mask under min_mask_pixels means no target: the papers' rule for methods without the head)
    no_target_threshold: float = 0.5  # "no target" is said above this probability of the head (`grex errors` draws the curve)
    min_mask_pixels: int = 50
    precision: str = "auto"  # auto | fp32 | bf16


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
        file = find_file(path)
        if not file.is_file():
            raise GrexError(f"config {file} does not exist; expected a YAML file; give one of configs/*.yaml")
        try:
            data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise GrexError(f"config {file} is not valid YAML ({error}); expected key: value lines; fix the file") from None
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
        raise GrexError(f"{path or 'command line'}: {error}; expected a value of the field's type; fix the value") from None
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
