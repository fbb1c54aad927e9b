"""What the words of an expression allow: whether colours, places and the sides of the picture may change under them."""

from __future__ import annotations

import re
from dataclasses import replace

from grex_mllm.data.templates.mirror import mirrored_text
from grex_mllm.types import ExpressionRecord

COLOURS = re.compile(
    r"amber|auburn|beige|black|blond|blonde|blondes|blonds|blue|bluish|bright|bronze|brown|brownish|brunette|"
    r"brunettes|burgundy|chestnut|color|colored|colorful|colors|colour|coloured|colourful|colours|copper|cream|"
    r"crimson|cyan|dark|darker|darkest|denim|fair|faded|fuchsia|ginger|gold|golden|gray|grayish|green|greenish|"
    r"grey|greyish|indigo|ivory|jeans|khaki|lavender|light|lighter|lightest|lilac|magenta|maroon|mauve|navy|"
    r"neon|ochre|olive|orange|pale|peach|pink|pinkish|plaid|purple|red|reddish|rust|salmon|scarlet|sepia|"
    r"shade|shaded|silver|tabby|tan|tanned|teal|turquoise|violet|white|whites|whitish|yellow|yellowish"
)
PLACES = re.compile(
    r"\w*(?:left|right|lft|rght)\w*|mid|middle|cent(?:er|re|ral)\w*|top\w*|bottom\w*|upper\w*|lower\w*|above|below|high\w*|low\w*|corners?|"
    r"edges?|sides?|borders?|ends?|far\w*|furthest|outer\w*|first|second|third|fourth|fifth|sixth|last|\d+(?:st|nd|rd|th)|half|halves|"
    r"clock|oclock|foreground|background|picture|photo|photograph|image|frame|screen|view|visible|cut|cropped|partial\w*|off"
)
WORD = re.compile(r"[a-z0-9]+")
WRITTEN_NUMBER = re.compile(r"#\s*\d|\d{2,}")  # on a shirt or a sign: a mirrored one cannot be read


def has_colour_word(text: str) -> bool:
    """Tell whether a text may speak of a colour or a shade. In doubt it does."""
    return any(COLOURS.fullmatch(word) is not None for word in WORD.findall(text.lower()))


def has_place_word(text: str) -> bool:
    """Tell whether a text may speak of a place in the picture, which changes where the picture is cut. In doubt it does."""
    return any(PLACES.fullmatch(word) is not None for word in WORD.findall(text.lower()))


def mirrored_words(text: str) -> str | None:
    """Return what a text says of the flipped image; None where that is not certain (see `mirrored_text`), or where it may quote a sign."""
    return None if WRITTEN_NUMBER.search(text) else mirrored_text(text)


def mirrored_expression(expression: ExpressionRecord) -> ExpressionRecord | None:
    """Return the expression of the flipped image, both in `raw` and in `expression`; None where either is not certain."""
    raw, plain = mirrored_words(expression.raw), mirrored_words(expression.expression)
    return None if raw is None or plain is None else replace(expression, raw=raw, expression=plain)
