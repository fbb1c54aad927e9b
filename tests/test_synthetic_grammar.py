"""Wording and parsing: every text reads back to its tree, and nothing else is accepted."""

from __future__ import annotations

import random

import pytest

from grex_mllm.data.synthetic import corpus, draw_scene, parse, to_text, vocabulary
from grex_mllm.data.synthetic.expressions import sample_expression
from grex_mllm.data.synthetic.grammar import (
    ALL,
    THE,
    Condition,
    Description,
    Exclusion,
    Extreme,
    Ordinal,
    Reference,
    Relation,
    Shared,
    Union,
)
from grex_mllm.data.synthetic.settings import SyntheticConfig

STAR, RED, LARGE, STRIPED = 3, 0, 1, 1


def test_every_sampled_tree_reads_back() -> None:
    rng = random.Random(1)
    texts = set()
    for index in range(350):
        scene = draw_scene(SyntheticConfig(), "train", index).scene
        for _ in range(8):
            tree, _, _ = sample_expression(scene, rng, 0.3)
            for _ in range(3):
                text = to_text(tree, rng)
                assert parse(text) == tree, (text, tree)
                texts.add(text)
    assert len(texts) > 4000


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("the large red striped star", Reference(THE, Description((STAR, RED, LARGE, STRIPED)))),
        ("every star with stripes that is red", None),  # one attribute may follow the noun, not two
        ("the star that is red", Reference(THE, Description((STAR, RED, None, None)))),
        ("stars with stripes", Reference(ALL, Description((STAR, None, None, STRIPED)))),
        ("the left star", Reference(THE, Description((STAR, None, None, None)), "left")),
        ("the star on the left", Reference(THE, Description((STAR, None, None, None)), "left")),
        ("both stars", Reference(2, Description((STAR, None, None, None)))),
        ("the leftmost star", Ordinal(1, "left", Description((STAR, None, None, None)))),
        ("the first star from the left", Ordinal(1, "left", Description((STAR, None, None, None)))),
        ("the smallest object", Extreme(False, Description())),
        (
            "the stars above the red star",
            Reference(
                ALL, Description((STAR, None, None, None)), None, Relation("top", Reference(THE, Description((STAR, RED, None, None))))
            ),
        ),
        ("red stars and circles", Shared(ALL, Description((None, RED, None, None)), (STAR, 0))),
        (
            "stars and circles",
            Union((Reference(ALL, Description((STAR, None, None, None))), Reference(ALL, Description((0, None, None, None))))),
        ),
        (
            "everything but the red ones",
            Exclusion(Reference(ALL, Description()), Reference(ALL, Description((None, RED, None, None)))),
        ),
        (
            "all stars except the second one from the top",
            Exclusion(Reference(ALL, Description((STAR, None, None, None))), Ordinal(2, "top", Description((STAR, None, None, None)))),
        ),
        ("shapes without stripes", Reference(ALL, Description((None,) * 4, Condition("not", ((3, STRIPED),))))),
    ],
)
def test_hand_made_texts(text: str, tree: object) -> None:
    assert parse(text) == tree


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the",
        "star",
        "every stars",
        "all star",
        "the two star",
        "the red red star",
        "the red blue star",
        "the striking star",
        "The star",
        "the star.",
        "the star star",
        "the star that are red",
        "the stars that is red",
        "two",
        "the sixth star from the left",
        "the second star",
        "the second star from the middle",
        "the star and",
        "and the star",
        "the star and the bar on the left",  # could be the place of both
        "the star and the bars that are not red",
        "the stars above the bars",
        "the star except the red one",
        "all stars except",
        "all stars except the ones",
        "all red stars except the blue ones",
        "the circles above the bar that are not red",
        "the red star and star",
        "the star or the bar",
        "the circle with stripes or",
        "everything that is red or red",
        "the star and the bar and the ring and the cross",
        "the " * 100 + "star",
    ],
)
def test_outside_the_grammar(text: str) -> None:
    assert parse(text) is None


def test_random_word_salad_never_raises() -> None:
    rng = random.Random(2)
    words = vocabulary()
    accepted = 0
    for _ in range(20000):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 7)))
        tree = parse(text)
        if tree is not None:
            accepted += 1
            assert parse(to_text(tree, rng)) == tree, text
    assert accepted > 10


def test_corrupted_texts_read_as_what_they_say() -> None:
    """Whatever is still accepted after dropping, swapping or replacing a word must round-trip through its own tree."""
    rng = random.Random(3)
    words = vocabulary()
    accepted = 0
    for text in corpus(SyntheticConfig(), 2000):
        broken = text.split()
        place = rng.randrange(len(broken))
        change = rng.randrange(3)
        if change == 0:
            del broken[place]
        elif change == 1:
            broken[place] = rng.choice(words)
        else:
            broken.insert(place, rng.choice(words))
        tree = parse(" ".join(broken))
        if tree is not None:
            accepted += 1
            assert parse(to_text(tree, rng)) == tree, broken
    assert accepted > 100


def test_vocabulary_is_small_and_complete() -> None:
    words = set(vocabulary())
    assert 60 <= len(words) <= 85
    used = {word for text in corpus(SyntheticConfig(), 6000) for word in text.split()}
    assert used <= words
    assert len(words - used) <= 1
