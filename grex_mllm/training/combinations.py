"""Refuse settings that cannot work together, before anything is read, built or trained."""

from __future__ import annotations

from grex_mllm.config import Config
from grex_mllm.entries import entry
from grex_mllm.errors import fault
from grex_mllm.models.round_trip import check_round_trip
from grex_mllm.training.engine import stage_of
from grex_mllm.training.step import GENERATE, GROUND, tasks_of
from grex_mllm.training.teacher import check_teacher


def check_combinations(config: Config) -> None:
    """Raise on settings of which one makes another impossible or without effect.

    Raises:
        GrexError: names both settings and what to change.
    """
    _check_encoder(config)
    check = getattr(entry("model.decoder", config.model.decoder.name).Decoder, "check", None)
    if check is not None:
        check(config.model)
    tasks = tasks_of(config)
    check_teacher(config, GROUND in tasks)
    _check_round_trip(config, tasks)
    if GENERATE in tasks:
        _check_generation(config)
    elif config.train.pretraining is not None:
        raise fault(
            f"train.pretraining {config.train.pretraining.name} without anything that generates",
            "a generator that is trained",
            "set model.generator, or leave train.pretraining out",
        )
    if config.train.optim.muon and config.train.deepspeed:
        raise fault(
            f"train.optim.muon is on with train.deepspeed {config.train.deepspeed}",
            "AdamW with DeepSpeed, because ZeRO flattens the matrices that Muon needs",
            "set train.optim.muon to false",
        )


def _check_round_trip(config: Config, tasks: tuple[str, ...]) -> None:
    own = config.model.generator
    generator = entry("model.generator", own.name).Generator if own is not None else None
    check_round_trip(config.loss, generator, tasks, stage_of(config.train.deepspeed) if config.train.deepspeed is not None else 0)


def _check_encoder(config: Config) -> None:
    vision = config.model.vision
    if vision.fusion != "none" and vision.name != "swin":
        raise fault(
            f"model.vision.fusion is {vision.fusion} with model.vision.name {vision.name}",
            "fusion of language in the image encoder swin only",
            "set model.vision.fusion to none, or model.vision.name to swin",
        )
    if config.model.text.name != "bert" and config.train.optim.text not in ("all", "none"):
        raise fault(
            f"train.optim.text is {config.train.optim.text} with model.text.name {config.model.text.name}",
            "all or none there: only BERT has layers of which some train",
            "set train.optim.text to all",
        )


def _check_generation(config: Config) -> None:
    _check_partitions(config)
    _check_found(config)
    if config.data.num_generation_targets < 1:
        raise fault(
            f"data.num_generation_targets is {config.data.num_generation_targets} with a generator",
            "at least 1 expression of an image",
            "raise data.num_generation_targets",
        )
    if not 0 <= config.loss.generate_start < 1:
        raise fault(
            f"loss.generate_start is {config.loss.generate_start:g}",
            "a share of the training from 0 to below 1",
            "lower it: the generator would learn nothing",
        )


def _check_found(config: Config) -> None:
    share = getattr(config.model.generator, "found_share", 0.0)
    if not 0 <= share <= 1:
        raise fault(f"model.generator.found_share is {share:g}", "a share from 0 to 1", "fix it")
    if share and not hasattr(entry("model.decoder", config.model.decoder.name).Decoder, "proposals"):
        raise fault(
            f"model.generator.found_share is {share:g} with model.decoder.name {config.model.decoder.name}",
            "a decoder that finds objects without an expression",
            "set it to 0, or choose another decoder",
        )


def _check_partitions(config: Config) -> None:
    if config.train.deepspeed is None or stage_of(config.train.deepspeed) != 3:
        return
    generator = config.model.generator
    quantisation = getattr(generator, "quantisation", "none")
    if quantisation != "none":
        raise fault(
            f"model.generator.quantisation {quantisation} with ZeRO-3 (train.deepspeed {config.train.deepspeed})",
            "weights of floating-point numbers there: ZeRO-3 cuts them into parts, and quantised ones cannot be put together again",
            "use ZeRO-2, or set quantisation to none: ZeRO-3 itself gives each process a part of the base only",
        )
    if getattr(generator, "lora_dora", False):
        raise fault(
            f"model.generator.lora_dora with ZeRO-3 (train.deepspeed {config.train.deepspeed})",
            "adapters that need no whole weights of the base: DoRA reads their lengths in every step",
            "use ZeRO-2, or set lora_dora to false",
        )
