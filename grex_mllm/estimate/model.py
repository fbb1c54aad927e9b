"""The model and a batch of a configuration, without weights: sizes come from the files that are there, or from published ones."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grex_mllm.config import Config, name_no_parts
from grex_mllm.data.collate import collate
from grex_mllm.entries import entry
from grex_mllm.estimate.shapes_only import on_meta
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_framing import INSTRUCTION
from grex_mllm.models.lm_shapes import leaving_out_weights, shape_file
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.models.text import BERT_SIZES
from grex_mllm.types import Batch, ExpressionRecord, ImageRecord, Instance, Sample

CHAT_WORDS = 40  # what a chat template and the instruction add to a sequence, where there is no tokenizer to ask


@dataclass(frozen=True)
class Load:
    """What a batch of one process holds. images; objects: of each.  tokens: of an expression to generate, with BOS and EOS."""

    images: int
    objects: int = 8
    tokens: int = 16


class _Vocabulary:
    """Stands for the tokenizer of the text encoder; the batch has made-up ids."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def standing_alone(config: Config) -> tuple[Config, list[str]]:
    """Return a copy of a configuration that names no files, with the sizes of those that are there, and where sizes came from otherwise."""
    config, notes = copy.deepcopy(config), list[str]()
    model = config.model
    if model.text.path is not None and model.text.name == "bert":
        file = Path(model.text.path) / "config.json"
        if file.is_file():
            theirs = json.loads(file.read_text(encoding="utf-8"))
            for ours, name in BERT_SIZES.items():
                setattr(model.text, ours, theirs.get(name, getattr(model.text, ours)))
        else:
            notes.append(f"text encoder: sizes from the configuration, because {model.text.path} is not there")
    name_no_parts(config)
    if config.train.teacher is not None:
        notes.append("the teacher (train.teacher) is not counted: its weights and the memory of its answers come on top")
        config.train.teacher, config.loss.distill = None, 0.0
    lm = getattr(model.generator, "lm", "tiny")
    if lm != "tiny" and not (Path(lm) / "config.json").is_file():
        notes.append(f"language model: shape from grex_mllm/models/shapes/{shape_file(lm).name}, because {lm} is not there")
        if not hasattr(entry("model.generator", model.generator.name), "stand_in_tokenizer"):
            model.generator.prompt = model.generator.prompt or INSTRUCTION + " word" * CHAT_WORDS
    return config, notes


def build(config: Config) -> GrexModel:
    """Build the model of a configuration from `standing_alone` on the device "meta"."""
    tokenizers = word_tokenizers(config)
    config.model.generator = _unquantised(config.model.generator)
    with leaving_out_weights(), on_meta():
        return GrexModel(config, *tokenizers)


def word_tokenizers(config: Config) -> tuple[Any, Any]:
    """Return what stands for the tokenizers where they are not read: a vocabulary's size, and one token a word (None without generator)."""
    return _Vocabulary(config.model.text.vocab_size), _lm_tokenizer(config)


def made_batch(config: Config, model: GrexModel, load: Load) -> Batch:
    """Return a real batch of blank images with square objects, one of which each expression means."""
    size, most = config.data.image_size, config.model.text.max_tokens
    words = " ".join(["dog"] * max(1, load.tokens - 2))

    def encode_text(texts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.ones(len(texts), most, dtype=torch.int64), torch.ones(len(texts), most, dtype=torch.int64)

    side = max(2, size // (load.objects + 1))
    samples = []
    for b in range(load.images):
        instances = [_square(n, n * side, side, size) for n in range(load.objects)]
        record = ImageRecord(str(b), f"{b}.png", size, size, instances)
        expressions = [
            ExpressionRecord(f"{b}.{e}", f"{b}.{e}", str(b), words, words, [str(e % load.objects)], "train", "made")
            for e in range(config.data.expressions_per_image)
        ]
        samples.append(Sample(np.zeros((size, size, 3), np.uint8), record, expressions))
    generation = None
    if model.generator is not None:
        chosen = config.model.generator
        generation = partial(entry("model.generator", chosen.name).collate, chosen, model.generator.tokenizer)
    return collate(
        samples, encode_text, generation, image_size=size, resize=config.data.resize,
        num_generation_targets=config.data.num_generation_targets,
    )  # fmt: skip


def _square(number: int, left: int, side: int, size: int) -> Instance:
    mask = np.zeros((size, size), bool)
    mask[:side, left : left + side] = True
    return Instance(str(number), "thing", [float(left), 0.0, float(left + side), float(side)], mask=mask)


def _unquantised(generator: Any) -> Any:
    """Return the generator's configuration with whole weights: what quantisation changes is arithmetic (`estimate.memory`)."""
    if getattr(generator, "quantisation", "none") != "none":
        generator = copy.copy(generator)
        generator.quantisation = "none"
    return generator


def _lm_tokenizer(config: Config) -> Any:
    """Return the tokenizer of the language model's folder; a stand-in of one token a word where there is none."""
    generator = config.model.generator
    if generator is None:
        return None
    own = getattr(entry("model.generator", generator.name), "stand_in_tokenizer", None)
    if own is not None:
        return own(generator)
    lm = getattr(generator, "lm", "tiny")
    if lm != "tiny" and Path(lm).is_dir():
        return LMTokenizer.load(lm, generator.prompt_style)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    filler = generator.vocab_size - 3 if lm == "tiny" else 0
    names = ["<unk>", "<s>", "</s>", *(f"<{n}>" for n in range(filler))]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LMTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"))
