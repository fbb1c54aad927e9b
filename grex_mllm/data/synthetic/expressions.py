"""Sample expressions for a scene: first the kind and whether there is a target, then trees of that kind until one is provably right."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

from grex_mllm.data.synthetic.descriptions import Draw
from grex_mllm.data.synthetic.grammar import Expression, descriptions, to_text
from grex_mllm.data.synthetic.kinds import BUILDERS, KINDS
from grex_mllm.data.synthetic.meaning import denoted
from grex_mllm.data.synthetic.scenes import HeldOut, Scene
from grex_mllm.data.synthetic.shapes import COLOUR, SHAPE, TEXTURE
from grex_mllm.errors import fault

MAX_WORDS = 20
_TRIES = 16  # trees of one kind
_PATIENCE = 20  # kinds


def sample_expression(
    scene: Scene, rng: random.Random, no_target_share: float, kind_weights: Mapping[str, float] | None = None, held: HeldOut | None = None
) -> tuple[Expression, str, int]:
    """Return (tree, kind, targets as a bit mask) of one expression that the scene determines.

    no_target_share: probability of a no-target expression, the same for all kinds.  kind_weights: relative frequency of kinds, uniform
    by default.
    held: attribute pairs that no expression may mention; where the scene shows them (`scene.focus`), every target set holds such an
    object instead.
    """
    r = rng.random
    empty = r() < no_target_share
    for attempt in itertools.count():
        if attempt == _PATIENCE:  # a poor scene cannot host the wished kinds
            kind_weights = None
        elif attempt == 2 * _PATIENCE:
            empty = False
        kind = draw_kind(r, kind_weights)
        build = BUILDERS[kind]
        for _ in range(_TRIES):
            tree = build(scene, r, empty)
            if tree is None or mentions_held_out(tree, scene, held):
                continue
            mask = denoted(tree, scene)
            if mask is None or (mask == 0) != empty or (mask and scene.focus and not mask & scene.focus):
                continue
            return tree, kind, mask
    raise AssertionError("unreachable")


def draw_kind(r: Draw, kind_weights: Mapping[str, float] | None) -> str:
    """Draw a kind.

    Raises:
        GrexError: an unknown kind, a negative weight, or nothing left to draw.
    """
    if kind_weights is None:
        return KINDS[int(r() * len(KINDS))]
    unknown = set(kind_weights) - set(KINDS)
    total = sum(kind_weights.values())
    if unknown or total <= 0 or min(kind_weights.values()) < 0:
        expected = f"non-negative weights, some above 0, for kinds among {', '.join(KINDS)}"
        raise fault(f"kind weights {dict(kind_weights)}", expected, "fix the weights")
    point = r() * total
    for kind, weight in kind_weights.items():
        point -= weight
        if point < 0:
            return kind
    return next(kind for kind, weight in kind_weights.items() if weight > 0)


def mentions_held_out(tree: Expression, scene: Scene, held: HeldOut | None) -> bool:
    """Tell whether an expression names an attribute pair that the split does not show."""
    if held is None or scene.focus:
        return False
    pairs = {COLOUR: held.colours, TEXTURE: held.textures}
    for found in descriptions(tree):
        terms = [*found.stated, *(found.condition.terms if found.condition is not None else ())]
        shapes = [value for k, value in terms if k == SHAPE]
        if any((shape, value) in pairs[k] for shape in shapes for k, value in terms if k in pairs):
            return True
    return False


def word_expression(tree: Expression, rng: random.Random) -> str | None:
    """Word a tree, or return None where it takes more than 20 words."""
    text = to_text(tree, rng)
    return text if text.count(" ") < MAX_WORDS else None
