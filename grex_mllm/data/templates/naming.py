"""Sets of objects to words: the plainest meaning that denotes exactly a set."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import combinations

from grex_mllm.data.templates.enumeration import all_candidates
from grex_mllm.data.templates.evaluate import evaluate
from grex_mllm.data.templates.meaning import PLURAL, Except, Meaning, Phrase, Union
from grex_mllm.data.templates.scene import Scene
from grex_mllm.data.templates.wording import canonical

Set = frozenset[str]


class Names:
    """What every object set of a scene is called.

    Preferred, from first to last: the whole category; a side where there are two; first from left or right; a side; size; an order from
    left or right; first, or an order, from top or bottom; a corner; colour; depth; a relation; all except such a one; and such ones
    together, from left to right.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    @cached_property
    def known(self) -> list[tuple[str, Phrase, Set]]:
        """All that can be said without "and" and "except", and what it denotes (nothing, where it is false)."""
        found = ((kind, phrase, evaluate(phrase, self.scene)) for kind, phrase in all_candidates(self.scene))
        return [(kind, phrase, ids) for kind, phrase, ids in found if ids is not None]

    @cached_property
    def simple(self) -> dict[Set, Phrase]:
        """Set -> the plainest phrase."""
        found: dict[Set, Phrase] = {}
        for _, phrase, ids in self.known:
            if ids:
                found.setdefault(ids, phrase)
        return found

    @cached_property
    def whole(self) -> dict[str, Set]:
        """Category -> all its instances, where it can be named."""
        return {name: frozenset(thing.annotation_id for thing in things) for name, things in self.scene.groups.items()}

    def name(self, targets: Iterable[str]) -> Meaning | None:
        """Return the plainest meaning that denotes exactly the targets, None where there is none."""
        wanted = frozenset(targets)
        if not wanted:
            return None
        if wanted in self.simple:
            return self.simple[wanted]
        parts: list[Meaning] = []
        for ids in self.whole.values():
            if wanted & ids:
                found = self._of_category(wanted & ids, ids)
                if found is None:
                    return None
                parts += found.parts if isinstance(found, Union) else (found,)
        if not parts or not wanted <= frozenset().union(*self.whole.values()):
            return None
        named = parts[0] if len(parts) == 1 else Union(tuple(sorted(parts, key=self._place)))
        return named if evaluate(named, self.scene) == wanted else None

    def _of_category(self, wanted: Set, ids: Set) -> Meaning | None:
        if wanted in self.simple:
            return self.simple[wanted]
        left_out = self.simple.get(ids - wanted)
        if left_out is not None and len(wanted) > 1 and len(left_out.categories) == 1:
            found = Except(Phrase(left_out.categories, PLURAL), left_out)
            if evaluate(found, self.scene) == wanted:
                return found
        inside = [(part, phrase) for part, phrase in self.simple.items() if part < wanted]
        for size in (2, 3):
            for chosen in combinations(inside, size):
                parts = [part for part, _ in chosen]
                if sum(map(len, parts)) == len(wanted) and frozenset().union(*parts) == wanted:
                    return Union(tuple(phrase for _, phrase in chosen))
        return None

    def _place(self, meaning: Meaning) -> tuple[float, str]:
        ids = evaluate(meaning, self.scene) or frozenset()
        across = [thing.centre(0) for thing in self.scene.things if thing.annotation_id in ids]
        return sum(across) / max(len(across), 1), canonical(meaning)


def canonical_expression(scene: Scene, targets: Iterable[str]) -> str | None:
    """Return the plainest expression that denotes exactly the targets (annotation ids), None where no template does."""
    named = Names(scene).name(targets)
    return None if named is None else canonical(named)
