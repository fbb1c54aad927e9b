"""The generation part of a batch, and what stands for the tokenizer, of the generator on a multimodal model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from grex_mllm.data.transforms import instance_mask, selectable_instances
from grex_mllm.errors import fault
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.models.generators.mllm.instructions import INSTRUCTION, instruction_text
from grex_mllm.models.generators.mllm.showing import ask
from grex_mllm.models.multimodal.chat import Chat
from grex_mllm.types import GenerationImage, GenerationItem, Geometry


class Questions(NamedTuple):
    """G questions about object sets, up to where the answers begin.

    ids, mask: int64 [G, L], padded on the left.  spaces: bool [G, L], places of object tokens.  group: int64 [G], which pictures each has.
    number, tokens: int64 [groups], pictures and image tokens of each group.  tensors: of all pictures, group after group.
    sizes: int64 [images, 2], width and height of the originals; own_group: int64 [images], the group of an original alone, -1 = none.
    """

    ids: Tensor
    mask: Tensor
    spaces: Tensor
    group: Tensor
    number: Tensor
    tokens: Tensor
    tensors: dict[str, Tensor]
    sizes: Tensor
    own_group: Tensor

    def rows(self, chosen: slice) -> Questions:
        """Return some of the questions; the pictures stay."""
        return self._replace(ids=self.ids[chosen], mask=self.mask[chosen], spaces=self.spaces[chosen], group=self.group[chosen])


class MllmPart(NamedTuple):
    """G expressions to learn. answers, answer_mask: int64 [G, T], the expression and its end, padded on the right.

    image_index: int64 [G].  target_index: G x int64 [n_g].  weight: float32 [G], 0 for the stand-in of a batch without any expression.
    """

    questions: Questions
    answers: Tensor
    answer_mask: Tensor
    image_index: Tensor
    target_index: list[Tensor]
    weight: Tensor


@dataclass
class SetOf:
    """An object set to ask about. image: position.  masks: of the selected objects, where they are drawn or named by places.

    selected, others: how many objects are selected, and how many may stand beside them.
    """

    image: int
    masks: list[np.ndarray]
    selected: int
    others: int


def collate(
    config: MllmConfig, tokenizer: Chat, images: Sequence[GenerationImage], items: Sequence[GenerationItem]
) -> tuple[MllmPart, list[str]]:
    """Return the part, and the ids of the expressions that are left out because they have more than `max_expression_tokens` tokens.

    The tokens count with what ends an expression.
    """
    answers = [[*tokenizer.answer_ids(item.expression), tokenizer.ends[0]] for item in items]
    kept = [n for n, ids in enumerate(answers) if 1 < len(ids) <= config.max_expression_tokens]
    left_out = [items[n].expression_id for n in range(len(items)) if n not in set(kept)]
    sets = [_set_of(config, images, items[n]) for n in kept] or [SetOf(0, [], 0, 0)]  # the stand-in learns nothing
    rows = [answers[n] for n in kept] or [[tokenizer.ends[0]]]
    questions = questions_of(config, tokenizer, [image.original for image in images], sets)
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    targets = [torch.from_numpy(items[n].targets) for n in kept] or [torch.zeros(0, dtype=torch.int64)]
    index = torch.tensor([one.image for one in sets], dtype=torch.int64)
    return MllmPart(questions, ids, mask, index, targets, torch.full((len(rows),), float(bool(kept)))), left_out


def questions_of(config: MllmConfig, chat: Chat, originals: Sequence[np.ndarray], sets: Sequence[SetOf]) -> Questions:
    """Return the questions about object sets of some images. originals: uint8 [H, W, 3].

    The picture of an image is prepared once, however many sets show it as it is.
    """
    groups: list[list[np.ndarray]] = []
    own, group, asked = [-1] * len(originals), [], []
    wanted = {one.image for one in sets}
    if config.objects == "tokens" and config.maps == "own":  # the tokens of all images are pooled from their own pictures
        wanted |= set(range(len(originals)))
    if config.objects != "marks" and (not config.crops or config.maps == "own"):
        for b in sorted(wanted):
            own[b] = len(groups)
            groups.append([originals[b]])
    for one in sets:
        question = ask(config, chat, originals[one.image], one.masks, places_of(config, one))
        if question.alone and own[one.image] >= 0:
            group.append(own[one.image])
        else:
            group.append(len(groups))
            groups.append(question.pictures)
        asked.append(question.turns)
    tensors, texts = chat.pictures(groups)
    tokens = torch.tensor([sum(text.count(chat.family.image_token) for text in some) for some in texts], dtype=torch.int64)
    rows = [chat.row(turns, texts[at]) for turns, at in zip(asked, group, strict=True)]
    padded = chat.padded([ids for ids, _ in rows])
    spaces = torch.zeros_like(padded["input_ids"], dtype=torch.bool)
    for i, (ids, positions) in enumerate(rows):
        spaces[i, [spaces.shape[1] - len(ids) + at for at in positions]] = True
    number = torch.tensor([len(some) for some in groups], dtype=torch.int64)
    sizes = torch.tensor([picture.shape[1::-1] for picture in originals], dtype=torch.int64)
    where = torch.tensor(group, dtype=torch.int64)
    return Questions(padded["input_ids"], padded["attention_mask"], spaces, where, number, tokens, tensors, sizes, torch.tensor(own))


def places_of(config: MllmConfig, one: SetOf) -> int:
    """Return how many tokens may stand for an object set: others, selected ones, and the summary of the set."""
    return one.selected + (min(one.others, config.max_distractors) if config.distractors else 0) + 1


def _set_of(config: MllmConfig, images: Sequence[GenerationImage], item: GenerationItem) -> SetOf:
    image, masks = images[item.image], list[np.ndarray]()
    if config.objects != "tokens" or config.crops:  # else the masks of the batch do
        height, width = image.original.shape[:2]
        instances = selectable_instances(image.record)
        masks = [instance_mask(instances[int(n)], Geometry(height, width, height, width)) for n in item.targets]
        if not all(mask.any() for mask in masks):
            given = f"expression {item.expression_id}: an object of image {image.record.image_id} without a pixel"
            raise fault(given, "at least one pixel", "fix its mask or box (`grex data check` lists every fault)")
    return SetOf(item.image, masks, len(item.targets), len(image.instance_masks) - len(item.targets))


def make_tokenizer(config: MllmConfig, lines: Callable[[], list[str]], folder: Path) -> None:
    """Write tokenizer, chat template and picture settings of the model into a folder."""
    if not config.lm:
        raise fault("model.generator.lm is not set", "a folder or hub id of a multimodal language model", "set it")
    chat = read_chat(config)
    chat.extras[INSTRUCTION] = instruction_text(config)
    chat.save(folder)


def read_chat(config: MllmConfig) -> Chat:
    """Read the chat of the model's own folder or hub id, with the configured limits of pictures."""
    return Chat.load(config.lm, pixels=pixel_limits(config), tiles=config.max_tiles or None)


def pixel_limits(config: MllmConfig) -> tuple[int, int] | None:
    """Return least and most pixels of the picture that the model sees, where most are set."""
    return (config.min_pixels, config.max_pixels) if config.max_pixels else None


def load_tokenizer(config: MllmConfig, folder: Path) -> Chat:
    """Read what `make_tokenizer` or a model folder wrote."""
    chat = Chat.load(folder)
    kept = folder / INSTRUCTION
    chat.extras[INSTRUCTION] = kept.read_text(encoding="utf-8") if kept.is_file() else instruction_text(config)
    return chat
