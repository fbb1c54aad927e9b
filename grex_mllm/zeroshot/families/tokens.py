"""How many tokens a picture takes, as far as the families' processors and price lists say; for estimates before a run alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from grex_mllm.zeroshot.families.base import Family

UNKNOWN = 1000  # of a family of which nothing is known

Rule = Callable[[Family, int, int], int]


def _patches(side: int) -> Rule:
    """One token for each square of `side` pixels of the picture that is sent (Qwen-VL: patch 14 or 16, merged 2 by 2)."""

    def rule(family: Family, width: int, height: int) -> int:
        view = family.view(width, height)
        return math.ceil(view.sent_width / side) * math.ceil(view.sent_height / side)

    return rule


def _tiles(side: int, each: int) -> Rule:
    """`each` tokens for every tile of `side` pixels, and for the whole picture beside them where there are several."""

    def rule(family: Family, width: int, height: int) -> int:
        view = family.view(width, height)
        tiles = math.ceil(view.sent_width / side) * math.ceil(view.sent_height / side)
        return each * (tiles + (tiles > 1))

    return rule


def _always(number: int) -> Rule:
    return lambda family, width, height: number


def _gpt(family: Family, width: int, height: int) -> int:
    """GPT-4o at high detail: fitted in 2048 x 2048, the short side then in 768; 85 and 170 for each tile of 512."""
    scale = min(1.0, 2048 / max(width, height))
    scale *= min(1.0, 768 / (min(width, height) * scale))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


def _gemini(family: Family, width: int, height: int) -> int:
    """258 up to 384 pixels a side, else for each tile of 768."""
    return 258 if max(width, height) <= 384 else 258 * math.ceil(width / 768) * math.ceil(height / 768)


RULES: dict[str, Rule] = {
    "qwen2-vl": _patches(28),
    "qwen2.5-vl": _patches(28),
    "qwen3-vl": _patches(32),
    "internvl": _tiles(448, 256),
    "llava": _always(576),
    "gemma3": _always(256),
    "gemma4": _always(280),
    "smolvlm": _tiles(364, 169),
    "idefics3": _tiles(364, 169),
    "florence2": _always(577),
    "kosmos2": _always(64),
    "paligemma": _always(1024),
    "gpt": _gpt,
    "gemini": _gemini,
    "claude": _patches(28),
}


def image_tokens(family: Family, width: int, height: int) -> int:
    """Return the tokens of a picture of this size, about."""
    rule = RULES.get(family.name)
    return UNKNOWN if rule is None else rule(family, width, height)
