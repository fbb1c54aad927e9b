"""How an expression of every kind is built for a scene. A builder may fail (None) or miss; the sampler checks what comes out.

Empty ones are deceptive: they name values that other objects of the scene have, count one too many, or state what does not hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from grex_mllm.data.synthetic.descriptions import (
    SIDES,
    Draw,
    by_number,
    choose,
    clear_side,
    described,
    draw_object,
    draw_relation,
    draw_side,
    keep,
    mixed,
    placed,
    some_attributes,
    subject,
    swapped,
)
from grex_mllm.data.synthetic.grammar import (
    ALL,
    THE,
    Condition,
    Description,
    Exclusion,
    Expression,
    Extreme,
    Ordinal,
    Part,
    Reference,
    Relation,
    Shared,
    Union,
)
from grex_mllm.data.synthetic.meaning import denoted, matching
from grex_mllm.data.synthetic.scenes import Scene, bits
from grex_mllm.data.synthetic.shapes import COLOUR, NUM_VALUES, SHAPE, SIZE, TEXTURE


def _category(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    if empty and r() < 0.6:
        absent = [value for value in range(NUM_VALUES[SHAPE]) if not scene.masks[SHAPE][value]]
        if absent:
            return Reference(ALL if r() < 0.5 else THE, Description().having(SHAPE, choose(absent, r)))
    tree = keep(scene, draw_object(scene, r), [SHAPE])
    mask = matching(tree, scene)
    if empty or r() < 0.3:
        return placed(scene, r, tree, mask, empty)
    return Reference(by_number(mask), tree)


def _attribute(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    tree = subject(scene, r, empty)
    if tree is None:
        return None
    mask = matching(tree, scene)
    if not empty and r() < 0.2:
        found = placed(scene, r, tree, mask)
        if found is not None:
            return found
    return Reference((ALL if r() < 0.5 else THE) if empty else by_number(mask), tree)


def _shared(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    tree = described(scene, r, draw_object(scene, r), generic=1.0)
    if empty and r() < 0.6:
        tree = mixed(scene, r, tree)
    both = matching(tree, scene)
    having = [value for value in scene.present[SHAPE] if bool(both & scene.masks[SHAPE][value]) != empty]
    if not having:
        return None
    first = having.pop(int(r() * len(having)))
    if empty and not having:  # one shape that is there, one that is not
        having = [value for value in range(NUM_VALUES[SHAPE]) if not scene.masks[SHAPE][value]]
    if not having:
        return None
    second = choose(having, r)
    counts = [(both & scene.masks[SHAPE][shape]).bit_count() for shape in (first, second)]
    quantifier = (THE if r() < 0.5 else ALL) if empty else THE if counts == [1, 1] else ALL
    return Shared(quantifier, tree, (first, second))


def _separate(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    first, second = _attributed_part(scene, r, empty, False), _attributed_part(scene, r, empty, True)
    if first is None or second is None:
        return None
    one, other = first.description.values, second.description.values
    if one[1:] == other[1:] and first.place == second.place:
        return None
    if not empty and (denoted(first, scene) or 0) & (denoted(second, scene) or 0):
        return None
    return None if _overlapping([first, second]) else Union((first, second))


def _attributed_part(scene: Scene, r: Draw, empty: bool, last: bool) -> Reference | None:
    tree = subject(scene, r, empty, generic=0.1)
    if tree is None:
        return None
    mask = matching(tree, scene)
    if not empty and r() < 0.3:
        found = placed(scene, r, tree, mask)
        if found is not None and (found.quantifier == THE or not last):
            return found
    return _part(tree, mask, r, empty)


def _part(tree: Description, mask: int, r: Draw, empty: bool) -> Reference:
    return Reference(by_number(mask) if not empty else THE if r() < 0.6 else ALL, tree)


def _cardinal(scene: Scene, r: Draw, empty: bool) -> Reference | None:
    tree = described(scene, r, draw_object(scene, r), generic=0.25, plain=0.45)
    mask = whole = matching(tree, scene)
    place = relation = None
    if r() < 0.5:
        if r() < 0.75:
            place = clear_side(scene, r, mask, False)
            if place is not None:
                mask &= scene.beside(place, None)[0]
        else:
            relation = draw_relation(scene, r)
            if relation is None:
                return None
            anchor = denoted(relation.anchor, scene) or 0
            mask &= scene.beside(relation.side, anchor.bit_length() - 1)[0] & ~anchor
    number = mask.bit_count()
    if empty:
        number = whole.bit_count() if mask != whole and r() < 0.5 else number + (1 if r() < 0.7 else 2)
    if not 2 <= number <= 6:
        return None
    return Reference(number, tree, place, relation)


def _ordinal(scene: Scene, r: Draw, empty: bool) -> Ordinal | None:
    tree = described(scene, r, draw_object(scene, r), generic=0.15, plain=0.6)
    mask = matching(tree, scene)
    number = mask.bit_count()
    if empty:
        rank = number + (1 if r() < 0.75 else 2)
    elif number < 2:
        return None
    else:
        rank = 1 + int(r() * min(number, 5))
        if scene.focus:  # aim at an object with a held-out pair
            side = draw_side(r)
            for candidate in range(1, min(number, 5) + 1):
                if (scene.ranked(mask, side, candidate) or 0) & scene.focus:
                    return Ordinal(candidate, side, tree)
    return Ordinal(rank, draw_side(r), tree) if rank <= 5 else None


def _extreme(scene: Scene, r: Draw, empty: bool) -> Extreme | None:
    if empty:
        absent = subject(scene, r, True, generic=0.1)
        return Extreme(r() < 0.5, absent) if absent is not None and absent.values[SIZE] is None else None
    tree = Description() if r() < 0.12 else described(scene, r, draw_object(scene, r), generic=0.3, plain=0.5)
    if tree.values[SIZE] is not None:  # "the largest small star" is right but odd
        tree = tree.having(SIZE, None)
    return Extreme(r() < 0.5, tree) if matching(tree, scene).bit_count() > 1 else None


def _relating(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    swap = empty and r() < 0.3
    relation = draw_relation(scene, r)
    if relation is None:
        return None
    anchor = denoted(relation.anchor, scene) or 0
    tree = subject(scene, r, swap, generic=0.25, plain=0.45)
    if tree is None:
        return None
    mask = matching(tree, scene) & ~anchor
    if swap:
        return Reference(ALL if r() < 0.4 else THE, tree, None, relation)
    if not mask:
        return None
    start = int(r() * 4)
    for k in range(4):
        side = SIDES[(start + k) % 4]
        inside, unsure = scene.beside(side, anchor.bit_length() - 1)
        if not mask & unsure and ((mask & inside) == 0) == empty:
            return Reference(by_number(mask if empty else mask & inside), tree, None, Relation(side, relation.anchor))
    return None


def _exclusion(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    item = draw_object(scene, r)
    choice = r()
    if empty:
        return _empty_exclusion(scene, r, item)
    tree = Description() if choice < 0.35 else described(scene, r, item, generic=0.3, plain=0.55)
    mask = matching(tree, scene)
    place = clear_side(scene, r, mask, False) if r() < 0.15 else None
    if place is not None:
        mask &= scene.beside(place, None)[0]
    if mask.bit_count() < 2:
        return None
    removed = choose(bits(mask), r)
    minus: Part
    choice = r()
    if choice < 0.3 and place is None:
        minus = Extreme(r() < 0.5, tree) if choice < 0.17 else Ordinal(1 + int(r() * min(mask.bit_count(), 3)), draw_side(r), tree)
    else:
        other = described(scene, r, removed, generic=0.1, plain=0.3)
        if tree.values[SHAPE] is not None or r() < 0.3:  # the "ones" of the base
            extra = [k for k in some_attributes(r) if tree.values[k] is None]
            other = keep(scene, removed, [*(k for k, _ in tree.stated), *extra])
        minus = Reference(by_number(matching(other, scene)), other)
    taken = denoted(minus, scene)
    if not taken or not mask & ~taken or not mask & taken:
        return None
    return Exclusion(Reference(ALL, tree, place), minus)


def _empty_exclusion(scene: Scene, r: Draw, item: int) -> Expression | None:
    """Return "all circles except the red ones" where all are red, or where the circles so described do not exist."""
    if r() < 0.6:
        shape = keep(scene, item, [SHAPE])
        group = matching(shape, scene)
        common = [k for k in (COLOUR, SIZE, TEXTURE) if not group & ~scene.masks[k][scene.objects[item].values[k]]]
        if common:
            other = keep(scene, item, [SHAPE, choose(common, r)])
            return Exclusion(Reference(ALL, shape), Reference(by_number(group) if group.bit_count() > 1 else ALL, other))
    tree = swapped(scene, r, described(scene, r, item, generic=0.0))
    if tree is None or not tree.free:
        return None
    k = choose(tree.free, r)
    other = tree.having(k, choose(scene.present[k], r))
    return Exclusion(Reference(ALL, tree), Reference(ALL if r() < 0.5 else THE, other))


def _list(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    parts: list[Part] = []
    seen = 0
    wanted = 3 if r() < 0.2 else 2
    for k in range(wanted):
        part = _list_part(scene, r, empty, k == wanted - 1)
        if part is None:
            return None
        mask = denoted(part, scene)
        if mask is None or (mask == 0) != empty or mask & seen or part in parts:
            return None
        seen |= mask
        parts.append(part)
    return None if _overlapping(parts) else Union(tuple(parts))


def _overlapping(parts: list[Part]) -> bool:
    """Say whether one reference of a list is but a special case of another ("the large circle and the circle")."""
    values = [part.description.values for part in parts if isinstance(part, Reference) and part.place is None]
    return any(a is not b and all(x is None or x == y for x, y in zip(a, b, strict=True)) for a, b in itertools.permutations(values, 2))


def _list_part(scene: Scene, r: Draw, empty: bool, last: bool) -> Part | None:
    choice = r()
    if choice < 0.2:
        return _ordinal(scene, r, empty)
    if choice < 0.35:
        return _extreme(scene, r, empty)
    if choice < 0.5:
        counted = _cardinal(scene, r, empty)
        if counted is not None and counted.relation is None and (counted.place is None or not last):
            return counted
    tree = subject(scene, r, empty, generic=0.1, plain=0.5)
    if tree is None:
        return None
    return _part(tree, matching(tree, scene), r, empty)


def _either(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    item = draw_object(scene, r)
    choice = r()
    first = COLOUR if choice < 0.45 else TEXTURE if choice < 0.75 else SHAPE
    second = first if r() < 0.7 else (COLOUR, TEXTURE)[int(r() * 2)]
    stated = [] if first == SHAPE or second == SHAPE else [SHAPE] if r() < 0.75 else []
    for k in (SIZE, TEXTURE, COLOUR):
        if k not in (first, second) and r() < (0.5 if empty or not stated else 0.12):
            stated.append(k)
    base = keep(scene, item, stated)
    group = matching(base, scene)
    options = [(k, value) for k in {first, second} for value in scene.present[k] if bool(group & scene.masks[k][value]) != empty]
    if empty and len(options) < 2:  # any two values that the group lacks
        free = [k for k in (SHAPE, COLOUR, TEXTURE) if base.values[k] is None]
        options = [(k, value) for k in free for value in scene.present[k] if not group & scene.masks[k][value]]
        one, other = options, options
    else:
        one = [term for term in options if term[0] == first]
        other = [term for term in options if term[0] == second]
    if not one or not other:
        return None
    pair = one[int(r() * len(one))], other[int(r() * len(other))]
    if pair[0] == pair[1] or (pair[0][0] == TEXTURE and 0 in (pair[0][1], pair[1][1]) and r() < 0.7):
        return None
    tree = Description(base.values, Condition("either", pair))
    mask = matching(tree, scene)
    if not empty and mask == group and r() < 0.7:  # then the condition says nothing
        return None
    return Reference(by_number(mask) if not empty else ALL if r() < 0.7 else THE, tree)


def _negation(scene: Scene, r: Draw, empty: bool) -> Expression | None:
    item = draw_object(scene, r)
    generic = not empty and r() < 0.3
    tree = Description() if generic else described(scene, r, item, generic=0.2, plain=0.3 if empty else 0.7)
    group = matching(tree, scene)
    terms = [
        (k, value) for k in tree.free for value in scene.present[k] if group & scene.masks[k][value] and not (k == TEXTURE and value == 0)
    ]
    neither = r() < 0.25
    if empty:
        terms = [(k, value) for k, value in terms if neither or not group & ~scene.masks[k][value]]
    if len(terms) < 1 + neither:
        return None
    first = terms.pop(int(r() * len(terms)))
    if neither:
        terms = [term for term in terms if (term[0] == first[0]) != (first[0] == SIZE)] or terms
        if first[0] == SIZE and terms[0][0] == SIZE:
            return None
        condition = Condition("neither", (first, terms[int(r() * len(terms))]))
    else:
        condition = Condition("not", (first,))
    found = Description(tree.values, condition)
    return Reference(by_number(group if empty else matching(found, scene)), found)


BUILDERS: dict[str, Callable[[Scene, Draw, bool], Expression | None]] = {
    "category": _category,
    "attribute": _attribute,
    "shared_attribute": _shared,
    "separate_attributes": _separate,
    "cardinal": _cardinal,
    "ordinal": _ordinal,
    "extreme": _extreme,
    "relation": _relating,
    "exclusion": _exclusion,
    "compound_and": _list,
    "compound_with_or": _either,
    "negation": _negation,
}
KINDS = tuple(BUILDERS)
