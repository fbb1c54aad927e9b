"""Statements about a scene, drawn: true ones and deceptive false ones, in the shares that are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from grex_mllm.data.templates.colours import VAGUE
from grex_mllm.data.templates.enumeration import absent
from grex_mllm.data.templates.evaluate import evaluate
from grex_mllm.data.templates.judge import denoted
from grex_mllm.data.templates.meaning import PLURAL, Except, Meaning, Phrase, Relation, Union
from grex_mllm.data.templates.naming import Names, Set
from grex_mllm.data.templates.scene import Scene
from grex_mllm.data.templates.wording import canonical, wordings
from grex_mllm.types import ImageRecord

MOST_ABSENT = 6
MOST_OF_A_SET = 3  # expressions of one object set
FEWEST_FOR_EXCEPTION = 3
MOST_PAIRS = 200  # conjunctions that are looked at
JOINED = frozenset({"category", "side", "position", "size", "order", "colour", "depth"})  # kinds in conjunctions
CANONICAL_SHARE = 0.25  # of the texts
FALSE_KINDS = {"category": "", "count": "wrong_count", "order": "wrong_order", "side": "wrong_place", "negation": ""}
FALSE_KINDS |= {"position": "", "size": "", "depth": "", "colour": "wrong_colour", "relation": "wrong_relation"}
WEIGHTS = {"side": 3.0, "position": 2.0, "order": 1.5, "size": 1.5, "depth": 1.0, "colour": 2.5, "relation": 2.0, "negation": 0.7}
WEIGHTS |= {"wrong_colour": 0.1}  # certain colours are rare, certainly wrong ones are not: a colour word shall not mean "no target"
WEIGHTS |= {"exclusion": 2.0, "conjunction": 3.0, "category": 2.0, "count": 1.0}
# Classes of statements: without a target, all of a category, one object, several.
NONE, WHOLE, ONE, SEVERAL = CLASSES = ("none", "whole", "one", "several")


@dataclass(frozen=True)
class Statement:
    """An expression with its truth. text: as somebody says it.  expression: the canonical one of the same objects.

    targets: annotation ids in the record's order.  kind: the phenomenon.  group: of CLASSES.
    """

    text: str
    expression: str
    targets: tuple[str, ...]
    kind: str
    group: str


@dataclass(frozen=True)
class Shares:
    """Shares of a drawn set: no_target exactly, at least so many with several targets, at most so many of a whole category."""

    no_target: float = 0.2
    several: float = 0.4
    whole: float = 0.15


def count_cooccurrence(records: Iterable[ImageRecord]) -> Counter[tuple[str, str]]:
    """Return, for ordered pairs of categories, in how many images both stand."""
    pairs: Counter[tuple[str, str]] = Counter()
    for record in records:
        names = sorted({instance.category for instance in record.instances})
        pairs.update((a, b) for a in names for b in names if a != b)
    return pairs


def absent_categories(scene: Scene, cooccurrence: Counter[tuple[str, str]]) -> list[str]:
    """Return up to MOST_ABSENT categories that are provably absent, those first that often come with what is there."""
    score: Counter[str] = Counter({name: 0 for name in scene.labelled or () if scene.is_absent(name)})
    for (here, other), number in cooccurrence.items():
        if here in scene.present and other in score:
            score[other] += number
    return [name for name, _ in sorted(score.items(), key=lambda item: (-item[1], item[0]))[:MOST_ABSENT]]


def statements(names: Names, cooccurrence: Counter[tuple[str, str]], rng: np.random.Generator) -> Iterator[tuple[str, str, Meaning, Set]]:
    """Yield (class, kind, meaning, targets) of what is certainly true or false of a scene; of conjunctions, a drawn part."""
    scene = names.scene
    if not names.whole:
        return
    wholes = set(names.whole.values())

    def group_of(ids: Set) -> str:
        return WHOLE if ids in wholes else ONE if len(ids) == 1 else SEVERAL

    for kind, phrase, ids in names.known:
        if ids:
            if kind != "negation" or ids not in wholes:
                yield group_of(ids), kind, phrase, ids
        elif FALSE_KINDS[kind] and phrase.colour not in VAGUE and not _of_their_own(phrase):
            yield NONE, FALSE_KINDS[kind], phrase, ids
    for category in absent_categories(scene, cooccurrence):
        for kind, phrase in absent(category):
            if evaluate(phrase, scene) == frozenset():
                yield NONE, kind, phrase, frozenset()
    for meaning in _exceptions(names):
        found = evaluate(meaning, scene)
        if found and len(found) > 1:  # nobody says "all but" of one
            yield group_of(found), "exclusion", meaning, found
    for union in _conjunctions(names, rng):
        found = evaluate(union, scene)
        if found:
            yield group_of(found), "conjunction", union, found


def _of_their_own(phrase: Phrase) -> bool:
    """Tell whether objects are set beside one of their own category: whether none is in front of it is hard to say."""
    return any(isinstance(where, Relation) and _categories(where.anchor) == phrase.categories for where in phrase.conditions)


def _categories(meaning: Meaning) -> tuple[str, ...]:
    return meaning.categories if isinstance(meaning, Phrase) else ()


def _exceptions(names: Names) -> Iterator[Except]:
    for kind, phrase, ids in names.known:
        named = phrase.categories[0] if len(phrase.categories) == 1 else ""
        num = len(names.whole.get(named, ()))
        if not ids or num < FEWEST_FOR_EXCEPTION or len(ids) >= num or kind not in ("position", "side", "size", "colour", "order", "depth"):
            continue
        if phrase.number != PLURAL or kind == "colour":
            yield Except(Phrase(phrase.categories, PLURAL), phrase)


def _conjunctions(names: Names, rng: np.random.Generator) -> Iterator[Union]:
    """Yield two things together, of one category or of two."""
    wholes = set(names.whole.values())
    single = [
        (phrase, ids)
        for kind, phrase, ids in names.known
        if ids and kind in JOINED and not _unusual(phrase) and (kind == "category" or ids not in wholes)
    ]
    pairs = list(combinations(range(len(single)), 2))
    chosen = rng.permutation(len(pairs))
    looked_at = 0
    for n in chosen:
        (one, first), (two, second) = (single[place] for place in pairs[int(n)])
        if first & second or (one.plain and two.plain and len(names.whole) > 2 and rng.random() < 0.5):
            continue
        looked_at += 1
        if looked_at > MOST_PAIRS:
            return
        yield Union((one, two) if rng.random() < 0.5 else (two, one))


def _unusual(phrase: Phrase) -> bool:
    """Tell whether nobody says a phrase beside another one: "of the picture", "the fifth from the left", "the three topmost"."""
    if phrase.pick and (phrase.pick.rank > 3 or (phrase.number > 2 and phrase.pick.by in ("top", "bottom"))):
        return True
    return any(getattr(condition, "frame", False) for condition in phrase.conditions)


def draw_statements(
    scene: Scene, cooccurrence: Counter[tuple[str, str]], *, num: int, shares: Shares, rng: np.random.Generator
) -> list[Statement]:
    """Draw up to `num` different statements about a scene, none more often than MOST_OF_A_SET for one object set.

    First the class, by its share, then the kind among those possible here, then the meaning, then the words.
    """
    names = Names(scene)
    categories = tuple(sorted({*scene.present, *(scene.labelled or ())}))
    pools: dict[str, dict[str, list[tuple[Meaning, Set]]]] = {group: {} for group in CLASSES}
    for group, kind, meaning, ids in statements(names, cooccurrence, rng):
        pools[group].setdefault(kind, []).append((meaning, ids))
    drawn: list[Statement] = []
    texts: set[str] = set()
    uses: Counter[Set] = Counter()
    for group, wanted in _wanted(pools, num, shares).items():
        pool = pools[group]
        taken = 0
        while pool and taken < wanted:
            kinds = sorted(pool)
            weights = np.array([WEIGHTS.get(kind, 1.0) for kind in kinds])
            kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
            meaning, ids = pool[kind].pop(int(rng.integers(len(pool[kind]))))
            if not pool[kind]:
                del pool[kind]
            said = wordings(meaning)
            text = said[0] if rng.random() < CANONICAL_SHARE else said[int(rng.integers(len(said)))]
            if denoted(text, scene, categories) != ids:  # another reading means something else here
                continue
            if text in texts or (ids and uses[ids] >= MOST_OF_A_SET):
                continue
            texts.add(text)
            uses[ids] += 1
            taken += 1
            named = names.name(ids) or meaning
            drawn.append(Statement(text, canonical(named) if ids else text, scene.ids_of(ids), kind, group))
    return [drawn[int(n)] for n in rng.permutation(len(drawn))]


def _wanted(pools: dict[str, dict[str, list[tuple[Meaning, Set]]]], num: int, shares: Shares) -> dict[str, int]:
    """Return how many statements of each class an image gives."""
    sizes = {group: sum(map(len, pool.values())) for group, pool in pools.items()}
    if not sum(sizes[group] for group in (WHOLE, ONE, SEVERAL)):
        return {}
    whole = min(sizes[WHOLE], max(1, round(0.8 * shares.whole * num)))
    rest = num - round(shares.no_target * num) - whole
    several = min(sizes[SEVERAL], round(rest * 0.68))
    one = min(sizes[ONE], rest - several)
    several = min(sizes[SEVERAL], rest - one)
    true = whole + several + one
    none = min(sizes[NONE], round(true * shares.no_target / (1 - shares.no_target) + 0.2))
    return {NONE: none, WHOLE: whole, ONE: one, SEVERAL: several}
