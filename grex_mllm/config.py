"""Every knob, as typed dataclasses that are the YAML and the command-line flags at once.

A field exists only if code reads it. Sizes are for the real models; the demo's YAML makes them tiny.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from grex_mllm.augmentation import AugmentConfig
from grex_mllm.encoders import PixelDecoderConfig as PixelDecoderConfig
from grex_mllm.encoders import TextConfig as TextConfig
from grex_mllm.encoders import VisionConfig as VisionConfig
from grex_mllm.entries import CONTRACTS, SOURCES, entry
from grex_mllm.errors import GrexError, fault
from grex_mllm.shipped import CONFIG_FOLDER as CONFIG_FOLDER
from grex_mllm.shipped import PROTOCOL_FOLDER as PROTOCOL_FOLDER
from grex_mllm.shipped import find_file

DEFAULT_ENTRIES = {"model.decoder": "rela", "model.generator": "region_tokens", "train.pretraining": "tiny_lm"}
ALWAYS = ("model.decoder",)  # present also where a configuration does not name it


@dataclass
class ModelConfig:
    """The parts of a model. decoder and generator: the `Config` of an entry of DECODERS and GENERATORS (`grex_mllm/entries.py`)."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    decoder: Any = None  # of the entry that `name` chooses (default rela)
    generator: Any = None  # of the entry that `name` chooses (default region_tokens); None = grounding alone
    # group | batch: of maps in the pixel decoders fpn, fpn_levels and top_down and in the decoders; see `grex_mllm/models/norms.py`
    map_norm: str = "group"

    def __post_init__(self) -> None:
        if self.decoder is None:
            self.decoder = entry("model.decoder", DEFAULT_ENTRIES["model.decoder"]).Config()


@dataclass
class WeightedSource:
    """One part of a training mixture. train: a dataset folder, or a source by name.  weight: its share.  split, image_root: its own."""

    train: str
    weight: float = 1.0
    split: str | None = None
    image_root: str | None = None


@dataclass
class DataConfig:
    """train: a dataset folder, a source by name ("synthetic"), or a list of those with weights.  sources: knobs of the sources by name."""

    train: str | list[WeightedSource] = "synthetic"
    train_split: str = "train"
    image_size: int = 480
    # squash (aspect ignored, as released) | pad (longest side, padded right and bottom) | letterbox (longest side, centred on grey)
    resize: str = "squash"
    image_root: str | None = None  # where the images lie, when not where dataset.json says
    expressions_per_image: int = 8  # of a training sample, at most; an image with more gives several samples an epoch
    # of dataset folders, every expression once an epoch: exact (any order) | released (as the authors of ReLA: runs of six images of one
    # orientation, each expression with an image of its own, so expressions_per_image must be 1)
    sampling: str = "exact"
    num_workers: int = 0
    num_generation_targets: int = 8  # expressions of a sample, at most, that the generator learns from; fewer than it has: drawn anew
    sources: dict[str, Any] = field(default_factory=dict)
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # of dataset folders, in training alone
    feature_cache: float = 0.0  # GiB for the maps of a frozen image encoder, computed once for each image and its mirror image; 0 = none


@dataclass
class LossConfig:
    """Weights of the two parts of a step; the terms within them are weighed by the decoder's and the generator's own `loss`."""

    ground: float = 1.0
    generate: float = 1.0
    contrast: float = 0.0  # object sets and their expressions meet in one space (`models/contrast.py`); needs both parts; 0 = not
    round_trip: float = 0.0  # generated expressions, grounded, must return their set (`models/round_trip.py`); needs both parts; 0 = not
    round_trip_start: float = 0.5  # share of the training before it
    distill: float = 0.0  # what the model `train.teacher` answers is learned as well (`models/distillation.py`); 0 = not
    distill_temperature: float = 2.0  # that softens the probabilities of both
    generate_start: float = 0.0  # share of the training before the expressions are learned; see the generator's `forward`


@dataclass
class OptimConfig:
    """Parameter groups, optimiser, schedule, clipping, averaging."""

    name: str = "adamw"  # adamw | sgd (without momentum)
    groups: str = "default"  # default (biases, norms, embeddings not decayed) | released (as the authors' code of ReLA)
    text: str = "all"  # which part of the text encoder trains: all | released (layers 0-9) | last_two (as the article says) | none
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    adapter_decay: float = 0.0  # weight decay of LoRA matrices, whatever the groups
    muon: bool = False  # Muon for hidden matrices, AdamW for the rest
    muon_lr: float = 1e-3
    muon_convolutions: bool = False  # Muon for the kernels of hidden convolutions, too
    muon_momentum: float = 0.95
    muon_spares: list[str] = field(default_factory=list)  # starts of names that AdamW keeps: pre-trained parts
    frozen: list[str] = field(default_factory=list)  # starts of names of parameters that do not train, such as grounding.vision.blocks.0
    schedule: str = "cosine"  # constant | multistep | cosine | poly (what is left of the steps, to the power of `power`)
    power: float = 0.9
    warmup_fraction: float = 0.0
    milestones: list[int] = field(default_factory=lambda: [110_000, 140_000])
    gamma: float = 0.1
    final_fraction: float = 0.0  # of the learning rate, left at the end of the cosine
    clip: float = 1.0  # global L2 norm of the gradients; 0 = not clipped
    lr_scale: dict[str, float] = field(default_factory=dict)  # start of a parameter's name -> factor on its learning rate; longest wins
    average_decay: float = 0.0  # of the running average of weights that is evaluated and saved; 0 = none


@dataclass
class ValidationConfig:
    """Validation inside the training, on all processes.

    every: steps between two of them (and one after the last step); 0 = none.
    split: of each folder or source that data.train names.  images: how many of it, spread evenly; the same ones in every run.
    metric: what the best model is chosen by: "task/column" of results.json under the strict rules of eval/protocols/all.yaml (gres/gIoU,
    grec/Pr@F1, count/accuracy, ...), generate/round_trip_Pr@F1 with a generator, or loss/total.  The best one is in `<train.out>/best`.
    patience: validations in a row without a better value after which the training stops; 0 = it never does.
    """

    every: int = 0
    split: str = "val"
    images: int = 64
    metric: str = "gres/gIoU"
    patience: int = 0


@dataclass
class TrainConfig:
    """The training loop.

    steps: optimizer steps.  batch_images: images of one batch, over all processes; `accumulation` batches make one step.
    tasks: what is learned: all (that the model has) | ground | generate (text encoder and decoder stay as they are) | align (the
    generator's projector alone, everything else frozen: a first run, whose folder is the joint one's `start`) | words (the same, by the
    words of objects alone, with a language model that is not read: before align, and fast).
    save_every, log_every: in steps; a checkpoint is also made at the end.  keep: how many checkpoints stay.
    start: a model folder whose weights the training starts from; heads that it lacks start as built.
    teacher: a model folder whose answers are learned as well (`loss.distill`); it stays as it is.
    resume: go on from the newest complete checkpoint in `out` if there is one; batch_images, accumulation, the number of processes and
    deepspeed may be others then.  deepspeed: a JSON of deepspeed_configs/, or None.
    num_threads: CPU threads of each process, 0 = torch's choice.
    compile: parts that torch.compile compiles (vision, text, pixel_decoder, decoder, lm, ...; needs a C++ compiler on a CPU).
    profile: steps that are recorded after the first two, into `<out>/profile`: a trace, and the time by part; 0 = none.
    hang_s: seconds without progress of a process after which the run names the one that is behind and ends with status 3; 0 = never.
    """

    seed: int = 0
    out: str = "runs/train"
    start: str | None = None
    teacher: str | None = None
    steps: int = 10000
    batch_images: int = 8
    accumulation: int = 1
    tasks: str = "all"
    precision: str = "auto"  # auto (bf16 where the machine multiplies it natively, else fp32) | fp32 | bf16 | fp16 (not on CPU)
    log_every: int = 20
    save_every: int = 500
    keep: int = 2
    resume: bool = False
    deepspeed: str | None = None
    num_threads: int = 0
    hang_s: float = 1800.0
    compile: list[str] = field(default_factory=list)
    profile: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    pretraining: Any = None  # of the entry that `name` chooses (default tiny_lm); None = none


@dataclass
class PredictConfig:
    """From logits to answers. batch: expressions that are answered at once.  precision: auto = what fits the machine."""

    batch: int = 64
    masks: bool = True  # false: the model answers with boxes alone (GREC only); masks are not read
    mask_threshold: float = 0.5  # a pixel belongs to the mask above this probability (0.5: the likelier; public code of VLT: 0.35)
    boxes: str = "count"  # count (the N_O best) | threshold | both (the N_O best above the threshold)
    box_threshold: float = 0.7
    no_target: str = "head"  # head | pixels (a mask under min_mask_pixels means no target: the papers' rule for methods without the head)
    no_target_threshold: float = 0.5  # "no target" is said above this probability of the head (`grex errors` draws the curve)
    min_mask_pixels: int = 50
    # none | location | mask: the ground truth in place of a branch of the decoder, to see what the others lose (isfp; `grex predict` alone)
    oracle: str = "none"
    # of the candidates of `--listener`: listener | objects | own (mllm) | own_grounding (mllm); see models/describe.py
    rerank: str = "listener"
    # the mean of the answers about the image and about its mirror image, asked with left and right swapped; takes twice as long
    mirror: bool = False
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


def load_config(path: str | Path | None = None, overrides: list[str] | None = None, *, trusted: bool = True) -> Config:
    """Read a YAML file, apply `--a.b=c` overrides, and return a checked Config.

    trusted: False for a file that may come from the net; see `entry`.

    Raises:
        GrexError: file missing, unknown key (with a suggestion), or a value of the wrong type.
    """
    source = str(path) if path is not None else "command line"
    data = read_yaml(path) if path is not None else {}
    changes = [item if item.startswith("--") else f"--{item}" for item in overrides or []]
    chosen = {}
    for field_name in CONTRACTS:
        own = [item for item in changes if item.partition("=")[0] == f"--{field_name}" or item.startswith(f"--{field_name}.")]
        changes = [item for item in changes if item not in own]
        chosen[field_name] = _entry_config(field_name, _take(data, field_name), own, source, trusted)
    sources = {}
    for name, module in SOURCES.items():
        where = f"data.sources.{name}"
        own = [item for item in changes if item.startswith(f"--{where}.")]
        changes = [item for item in changes if item not in own]
        given = (data.get("data") or {}).get("sources", {}).pop(name, None)
        if given is not None or own:
            sources[name] = parsed(import_module(module).Config, given or {}, own, where, source)
    unknown = sorted((data.get("data") or {}).get("sources", {}))
    unknown += [item.split(".")[2].partition("=")[0] for item in changes if item.startswith("--data.sources.")]
    if unknown:
        raise fault(f"{source}: data.sources.{unknown[0]}", f"one of {', '.join(SOURCES)}", "fix the name")
    config = parsed(Config, data, changes, "", source)
    config.data.sources |= sources
    for field_name, value in chosen.items():
        section, name = field_name.split(".")
        setattr(getattr(config, section), name, value)
    return config  # type: ignore[no-any-return]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of sections.

    Raises:
        GrexError: file missing, no YAML, or no mapping.
    """
    import yaml

    file = find_file(path)
    if not file.is_file():
        raise GrexError(f"config {file} does not exist; expected a YAML file; give one of configs/*.yaml")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise GrexError(f"config {file} is not valid YAML ({error}); expected key: value lines; fix the file") from None
    if not isinstance(data, dict):
        raise GrexError(f"config {file} holds a {type(data).__name__}; expected a mapping of sections; see configs/")
    return data


def parsed(kind: Any, data: dict[str, Any], changes: list[str], where: str, source: str) -> Any:
    """Return a dataclass `kind` with the values of `data` and the flags --a.b=c in `changes` (below the field `where`), types checked.

    Raises:
        GrexError: unknown key (with a suggestion), or a value of the wrong type.
    """
    from jsonargparse import ArgumentError

    check_keys(data, kind, where, source)
    start = f"--{where}." if where else "--"
    flags = [f"--{item.removeprefix(start)}" for item in changes]
    for item in flags:
        check_keys(_nest(item.removeprefix("--").partition("=")[0]), kind, where, "command line")
    parser = _parser_of(kind)
    try:
        values = parser.parse_object(data)
        if flags:
            values = parser.parse_args(flags, namespace=values)
        made = parser.instantiate_classes(values)
    except ArgumentError as error:
        raise GrexError(f"{source}: {where and where + ': '}{error}; expected a value of the field's type; fix the value") from None
    return kind(**{f.name: made[f.name] for f in fields(kind)})


@cache
def _parser_of(kind: Any) -> Any:
    """Return the parser of a dataclass's fields; building it takes most of the time of reading a configuration."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False)
    return parser


def _take(data: dict[str, Any], field_name: str) -> Any:
    """Take a nested field out of the data; None where it is not set."""
    section, name = field_name.split(".")
    inner = data.get(section)
    if not isinstance(inner, dict) or name not in inner:
        return None
    data[section] = {key: value for key, value in inner.items() if key != name}
    return inner[name]


def _entry_config(field_name: str, given: Any, changes: list[str], source: str, trusted: bool) -> Any:
    """Return the `Config` of the entry that `name` in the data or in the changes chooses; None for a field that is left out."""
    import yaml

    for item in [item for item in changes if item.startswith(f"--{field_name}=")]:
        given, source = yaml.safe_load(item.partition("=")[2]), "command line"
        changes = [other for other in changes if other != item]
    if given is None and not changes and field_name not in ALWAYS:
        return None
    if given is not None and not isinstance(given, dict):
        raise fault(f"{source}: {field_name} is {given!r}", "a mapping with name and the knobs of that entry", "see configs/")
    data = dict(given or {})
    name = str(data.get("name", DEFAULT_ENTRIES[field_name]))
    for item in changes:
        if item.startswith(f"--{field_name}.name="):
            name = item.partition("=")[2]
    data["name"] = name
    return parsed(entry(field_name, name, trusted).Config, data, changes, field_name, source)


def _nest(dotted: str) -> dict[str, Any]:
    head, _, rest = dotted.partition(".")
    return {head: _nest(rest) if rest else None}


def name_no_parts(config: Config) -> None:
    """Let a configuration name no files of pre-trained parts, where a checkpoint holds them; a language model stays named."""
    config.model.vision.weights = config.model.text.path = None
    encoder = getattr(getattr(config.model.generator, "crops", None), "vision", None)
    if encoder is not None:
        encoder.weights = None


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested plain dictionaries, as they stand in `config.yaml`."""
    return asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Write the whole configuration as YAML."""
    import yaml

    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
