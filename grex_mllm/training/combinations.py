"""Refuse settings that cannot work together, before anything is read, built or trained."""

from __future__ import annotations

from grex_mllm.config import Config
from grex_mllm.errors import fault


def check_combinations(config: Config) -> None:
    """Raise on settings of which one makes another impossible or without effect.

    Raises:
        GrexError: names both settings and what to change.
    """
    _check_encoder(config)
    if config.model.generator.lm == "none":
        _check_grounding_only(config)
    else:
        _check_joint(config)
    if config.train.optim.muon and config.train.deepspeed:
        raise fault(
            f"train.optim.muon is on with train.deepspeed {config.train.deepspeed}",
            "AdamW with DeepSpeed, because ZeRO flattens the matrices that Muon needs",
            "set train.optim.muon to false",
        )


def _check_encoder(config: Config) -> None:
    vision, decoder, loss = config.model.vision, config.model.decoder, config.loss
    if vision.fusion != "none" and vision.name != "swin":
        raise fault(
            f"model.vision.fusion is {vision.fusion} with model.vision.name {vision.name}",
            "fusion of language in the image encoder swin only",
            "set model.vision.fusion to none, or model.vision.name to swin",
        )
    if vision.fusion != "none" and decoder.name == "instance_selection":
        raise fault(
            f"model.vision.fusion is {vision.fusion} with model.decoder.name instance_selection",
            "no fusion there: its regions are found once in an image, for all expressions",
            "set model.vision.fusion to none, or model.decoder.name to rela",
        )
    if loss.deep_supervision and not (decoder.name == "rela" and decoder.deep_supervision):
        raise fault(
            f"loss.deep_supervision is {loss.deep_supervision:g}, but decoder {decoder.name} gives no earlier layers",
            "decoder rela with model.decoder.deep_supervision: true",
            "set that, or loss.deep_supervision to 0",
        )


def _check_grounding_only(config: Config) -> None:
    train = config.train
    used = {
        f"train.ground_ratio is {train.ground_ratio:g}": train.ground_ratio != 1,
        "train.joint_batches is true": train.joint_batches,
        f"train.text.steps is {train.text.steps}": train.text.steps > 0,
        f"train.text.scenes is {train.text.scenes}": train.text.scenes > 0,
    }
    for given, wrong in used.items():
        if wrong:
            name = given.split(" ")[0]
            neutral = {"train.ground_ratio": "1", "train.joint_batches": "false"}.get(name, "0")
            raise fault(
                f"{given}, but model.generator.lm is none",
                "a generator, or a training of grounding alone",
                f"set model.generator.lm (for example to tiny), or {name} to {neutral}",
            )


def _check_joint(config: Config) -> None:
    train, generator = config.train, config.model.generator
    if not 0 <= train.ground_ratio <= 1:
        raise fault(f"train.ground_ratio is {train.ground_ratio:g}", "a share between 0 and 1", "give 1 for grounding batches only")
    if train.joint_batches and train.ground_ratio == 0:
        raise fault(
            "train.joint_batches is true with train.ground_ratio 0",
            "grounding batches, in which the generator learns, too",
            "set train.ground_ratio above 0, or train.joint_batches to false",
        )
    if train.joint_batches and config.data.num_generation_targets < 1:
        raise fault(
            f"data.num_generation_targets is {config.data.num_generation_targets} with train.joint_batches",
            "at least 1 expression of an image",
            "raise data.num_generation_targets",
        )
    if generator.lm != "tiny" and (train.text.steps or train.text.scenes):
        raise fault(
            f"train.text.steps {train.text.steps} and scenes {train.text.scenes} with model.generator.lm {generator.lm}",
            "lm: tiny there; other language models come trained",
            "set train.text.steps and train.text.scenes to 0",
        )
    if train.text.scenes and not generator.attribute_classes:
        raise fault(
            f"train.text.scenes is {train.text.scenes} without model.generator.attribute_classes",
            "a generator that knows attributes",
            "set model.generator.attribute_classes, or train.text.scenes to 0",
        )
    if not 0 <= config.loss.lm_start < 1:
        raise fault(
            f"loss.lm_start is {config.loss.lm_start:g}",
            "a share of the training from 0 to below 1",
            "lower it: the generator would learn nothing",
        )
    if train.ground_ratio == 1 and not train.joint_batches and not train.text.scenes and train.start is None:
        raise fault(
            f"model.generator.lm is {generator.lm}, but train.ground_ratio is 1 and train.joint_batches is false",
            "batches that the generator learns from",
            "set train.joint_batches to true, train.ground_ratio below 1, or model.generator.lm to none",
        )
