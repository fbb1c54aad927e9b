"""Mirrored expressions: left and right change places, and only those."""

from __future__ import annotations

import pytest

from grex_mllm.data.templates.mirror import mirrored_text


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("the leftmost cat and the dog on the right", "the rightmost cat and the dog on the left"),
        ("Left guy in the upright chair, bright shirt", "Right guy in the upright chair, bright shirt"),
        ("TOP RIGHT zebra", "TOP LEFT zebra"),
        ("top-right, left-hand side, lower left", "top-left, right-hand side, lower right"),
        ("the two people to the left of the bus", "the two people to the right of the bus"),
        ("the largest cat", "the largest cat"),
        ("cat that is left of the dog", "cat that is right of the dog"),
        ("the car on the rhs", "the car on the lhs"),
    ],
)
def test_sides_change_places(text: str, mirrored: str) -> None:
    assert mirrored_text(text) == mirrored and mirrored_text(mirrored) == text


@pytest.mark.parametrize(
    "text",
    [
        "the car right behind the bus",
        "the one left over",
        "the cup that is left",
        'the shirt with "EXIT" on it',
        "the shirt with the number 5",
        "rigth guy",
        "the lefty",
        "the hand turning clockwise",
        "person at 3 o'clock",
    ],
)
def test_what_a_flip_does_not_keep_is_refused(text: str) -> None:
    assert mirrored_text(text) is None
