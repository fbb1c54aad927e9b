"""Show selected objects to a multimodal model: places for their tokens, marks on the picture, coordinates in the text, crops.

Numbered marks: set of mark (arXiv 2310.11441); a red outline: arXiv 2304.06712. Objects are named from left to right, so that the order of
the selection does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.marks import Shown, crops, mark_picture, mark_words
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.models.generators.mllm.instructions import INSTRUCTION, instruction_text, read_instruction
from grex_mllm.models.multimodal.chat import Chat, Message, Space
from grex_mllm.ops.frames import DECIMALS, FRAMES, boxes_from_pixels
from grex_mllm.ops.masks import mask_to_box_xyxy

# the frame in which each family writes places, and how it writes a box (pixels of the original where nothing is known)
FAMILY_FRAMES = {"qwen2_vl": "k1000", "qwen2_5_vl": "px_sent", "qwen3_vl": "k1000", "qwen3_vl_moe": "k1000", "internvl": "k1000",
                 "llava": "unit_pad", "vipllava": "unit_pad", "llava_onevision": "unit", "gemma3": "k1000", "idefics3": "k1000",
                 "smolvlm": "k1000"}  # fmt: skip
FAMILY_BOXES = {"qwen2_vl": "<|box_start|>({},{}),({},{})<|box_end|>", "internvl": "<box>[[{}, {}, {}, {}]]</box>"}
BOX = "[{}, {}, {}, {}]"


class Seen(NamedTuple):
    """Size of an original, and of the picture of it that the model sees."""

    width: int
    height: int
    sent_width: int
    sent_height: int


class Asked(NamedTuple):
    """A question about one object set. turns: of the chat.  pictures: its pictures, uint8 [H, W, 3]; alone: the original only."""

    turns: list[Message]
    pictures: list[np.ndarray]
    alone: bool


def shown(masks: Sequence[np.ndarray]) -> list[Shown]:
    """Return the objects of a set from left to right. masks: bool [H, W] at original size, none empty."""
    found = [Shown(mask, tuple(mask_to_box_xyxy(mask))) for mask in masks]  # type: ignore[arg-type]
    return sorted(found, key=lambda one: (one.box_xyxy[0] + one.box_xyxy[2], one.box_xyxy[1] + one.box_xyxy[3], float(one.mask.sum())))


def ask(cfg: MllmConfig, chat: Chat, original: np.ndarray, masks: Sequence[np.ndarray], places: int) -> Asked:
    """Return the question about one object set.

    original: uint8 [H, W, 3].  masks: of the selected objects, bool [H, W]; read where the objects are drawn, cropped or named by their
    places; none: nothing is selected (a stand-in).  places: number of tokens of `objects: tokens`.
    """
    objects = shown(masks) if cfg.objects != "tokens" or cfg.crops else []
    picture = original
    parts: list[Any] = []
    if cfg.objects == "tokens":
        parts = [Space(places)]
    elif cfg.objects == "marks":
        picture = mark_picture(original, objects, [cfg.mark_style])
        parts = [mark_words(max(1, len(objects)), [cfg.mark_style])["numbers" if cfg.mark_style == "numbers" else "colours"]]
    else:
        parts = [box_words(cfg, chat, original.shape[:2], objects)]
    aside = [crop for crop in crops(picture, objects[: cfg.crops])] if cfg.crops else []
    before, after, apart = read_instruction(chat.extras.get(INSTRUCTION) or instruction_text(cfg))
    words = [text for text in ((apart if aside else "") + before, *parts, after) if text != ""]
    pictures = [picture, *aside]
    system = [Message("system", (cfg.system,))] if cfg.system else []
    return Asked([*system, Message("user", (*pictures, *words))], pictures, cfg.objects != "marks" and not aside)


def box_words(cfg: MllmConfig, chat: Chat, size: tuple[int, ...], objects: Sequence[Shown]) -> str:
    """Return the boxes of the objects as the family writes them. size: height and width of the original.

    Raises:
        GrexError: an unknown frame.
    """
    kind = chat.config.model_type
    frame = FAMILY_FRAMES.get(kind, "px") if cfg.frame == "auto" else cfg.frame
    if frame not in FRAMES:
        raise fault(f'model.generator.frame "{cfg.frame}"', f"auto, or one of {', '.join(FRAMES)}", "fix the value")
    height, width = size[0], size[1]
    numbers = boxes_from_pixels(np.array([one.box_xyxy for one in objects]), frame, Seen(width, height, *chat.sent_size(width, height)))
    decimals = DECIMALS.get(frame, 0)
    written = [FAMILY_BOXES.get(kind, BOX).format(*(f"{value:.{decimals}f}" for value in box)) for box in numbers]
    return ", ".join(written) or "[]"
