"""What templated expressions mean: a small tree.

    Phrase   "the two black cats on the left": categories, colour, conditions, what is picked among the rest, and the number
    Except   "all the cats except the largest one"
    Union    "the leftmost cat and the dog"

`evaluate.py` says what a tree denotes in a scene, `wording.py` writes it, `parsing.py` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

PLURAL = 0  # "the cats": two or more
SIDES = ("left", "right", "top", "bottom", "middle")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("left", "right", "top", "bottom")
PICKS = (*DIRECTIONS, "largest", "smallest", "front", "back")
RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind")


@dataclass(frozen=True)
class Where:
    """A place in the picture. side: of SIDES or CORNERS.  frame: "of the picture" is said, so that a half of it is meant.

    negated: "not on the left".
    """

    side: str
    frame: bool = False
    negated: bool = False


@dataclass(frozen=True)
class Relation:
    """A place beside another object. kind: of RELATIONS.  anchor: must denote one object."""

    kind: str
    anchor: Meaning


@dataclass(frozen=True)
class Pick:
    """The first ones in an order. by: of PICKS, or "nearest" (to the anchor).

    rank: "the second from the left" = 2, alone; 0 = the first so many, as the phrase's number says.
    """

    by: str
    rank: int = 0
    anchor: Meaning | None = None


@dataclass(frozen=True)
class Phrase:
    """Objects of one kind. number: how many, PLURAL = two or more.  negated_colour: "that are not black"."""

    categories: tuple[str, ...]
    number: int = 1
    colour: str = ""
    negated_colour: bool = False
    conditions: tuple[Where | Relation, ...] = ()
    pick: Pick | None = None

    @property
    def plain(self) -> bool:
        """Tell whether all of the categories are meant."""
        return not (self.colour or self.conditions or self.pick)


@dataclass(frozen=True)
class Except:
    """What the base denotes, without what `minus` denotes."""

    base: Phrase
    minus: Meaning


@dataclass(frozen=True)
class Union:
    """All that the parts denote, each of them something."""

    parts: tuple[Meaning, ...]


Meaning = Phrase | Except | Union
