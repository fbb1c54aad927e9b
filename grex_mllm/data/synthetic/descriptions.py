"""Draw descriptions of a scene's objects: true ones, unique ones, and deceptive ones that fit nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from grex_mllm.data.synthetic.grammar import ALL, THE, Description, Extreme, Reference, Relation
from grex_mllm.data.synthetic.meaning import denoted, matching
from grex_mllm.data.synthetic.scenes import Scene, bits
from grex_mllm.data.synthetic.shapes import COLOUR, SHAPE, SIZE, TEXTURE

Draw: TypeAlias = Callable[[], float]
SIDES = ("left", "right", "top", "bottom")


def choose(options: list[int], r: Draw) -> int:
    return options[int(r() * len(options))]


def draw_object(scene: Scene, r: Draw) -> int:
    """Draw an object, mostly one with a held-out pair where the scene has such."""
    if scene.focus and r() < 0.75:
        return choose(bits(scene.focus), r)
    return int(r() * len(scene.objects))


def keep(scene: Scene, item: int, attributes: list[int]) -> Description:
    """Describe an object by these attributes."""
    return Description(tuple([value if k in attributes else None for k, value in enumerate(scene.objects[item].values)]))


def some_attributes(r: Draw) -> list[int]:
    """Draw one to three attributes other than the shape; mostly one."""
    chosen = [(COLOUR, COLOUR, TEXTURE, SIZE)[int(r() * 4)]]
    if r() < 0.35:
        other = (COLOUR, SIZE, TEXTURE)[int(r() * 3)]
        if other not in chosen:
            chosen.append(other)
        if r() < 0.12:
            chosen = [COLOUR, SIZE, TEXTURE]
    return chosen


def described(scene: Scene, r: Draw, item: int, generic: float = 0.2, plain: float = 0.0) -> Description:
    """Describe an object by some of its attributes. generic: share without the shape; plain: share with nothing but the shape."""
    if r() < plain:
        return keep(scene, item, [SHAPE])
    attributes = some_attributes(r)
    if r() >= generic:
        attributes.append(SHAPE)
    return keep(scene, item, attributes)


def swapped(scene: Scene, r: Draw, tree: Description) -> Description | None:
    """Change one stated value to another one of the scene so that nothing fits any more."""
    stated = [k for k, _ in tree.stated]
    if len(stated) < 2:
        return None
    for _ in range(4):
        k = choose(stated, r)
        found = tree.having(k, choose(scene.present[k], r))
        if not matching(found, scene):
            return found
    return None


def mixed(scene: Scene, r: Draw, tree: Description) -> Description:
    """Take every stated value, and perhaps one more, from another object of the scene."""
    other = Description(tuple(None if value is None else choose(scene.present[k], r) for k, value in enumerate(tree.values)))
    k = (COLOUR, SIZE, TEXTURE)[int(r() * 3)]
    return other.having(k, choose(scene.present[k], r))


def subject(scene: Scene, r: Draw, empty: bool, generic: float = 0.2, plain: float = 0.0) -> Description | None:
    tree = described(scene, r, draw_object(scene, r), generic, 0.0 if empty else plain)
    return swapped(scene, r, tree) if empty else tree


def by_number(mask: int) -> int:
    return ALL if mask.bit_count() > 1 else THE


def draw_side(r: Draw) -> str:
    return SIDES[int(r() * 4)]


def clear_side(scene: Scene, r: Draw, mask: int, empty: bool) -> str | None:
    """Draw a side of the image on which some, but not only all, of `mask` lie (none of them for `empty`), each by a clear margin."""
    start = int(r() * 4)
    for k in range(4):
        side = SIDES[(start + k) % 4]
        inside, unsure = scene.beside(side, None)
        if not mask & unsure and ((mask & inside) == 0) == empty and (empty or mask & ~inside or r() < 0.15):
            return side
    return None


def placed(scene: Scene, r: Draw, tree: Description, mask: int, empty: bool = False) -> Reference | None:
    """Refer to those of `mask` on a side drawn by `clear_side`."""
    side = clear_side(scene, r, mask, empty)
    return None if side is None else Reference(by_number(mask if empty else mask & scene.beside(side, None)[0]), tree, side)


def unique(scene: Scene, r: Draw) -> Reference | Extreme | None:
    """Describe some object so that nothing else fits."""
    for _ in range(3):
        item = int(r() * len(scene.objects))
        tree = described(scene, r, item, generic=0.1, plain=0.35)
        mask = matching(tree, scene)
        if mask.bit_count() == 1:
            return Reference(THE, tree)
        if r() < 0.3 and tree.values[SIZE] is None:
            found = Extreme(r() < 0.5, tree)
            if denoted(found, scene):
                return found
    return None


def draw_relation(scene: Scene, r: Draw) -> Relation | None:
    anchor = unique(scene, r)
    return None if anchor is None else Relation(draw_side(r), anchor)
