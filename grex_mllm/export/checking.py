"""Whether an exported folder answers as torch does: on images, sizes and numbers of expressions that it was not recorded with.

Two float32 programs differ by rounding, and some models make much of it: then each is held against torch in float64, and the exported one
must err no more than torch's float32 errs itself, but for a factor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grex_mllm.data.transforms import resize_image
from grex_mllm.errors import fault
from grex_mllm.export import ground as runner
from grex_mllm.export.decision import DECIDE, DECISIONS, ORIGINAL, PICTURE, PLACE, PREPARE, SIZE, place_of
from grex_mllm.export.graphs import IMAGE, SEEN, TEXT_IDS, TEXT_MASK, names_of
from grex_mllm.models.answer import answers
from grex_mllm.models.grounding import GroundingModel, ImageFeatures
from grex_mllm.types import Grounding, GroundingOutput

TOLERANCE = 1e-4  # of mask logits, exported against torch
SAME = 1e-4  # of numbers in a decision about equal answers, as `difference` has them
# Times torch's own error against float64 is what an exported model may err, where that is more than TOLERANCE. ReLA behind Swin with random
# weights, where mask logits of float32 are off by 0.7 to 4e-4: the exported one's by 1.7 to 2.9 times as much (four seeds).
FACTOR = 4.0
LARGE = 10.0  # logits above it are compared relative to their size
SAID = ("the two red circles on the left", "a dog", "everyone but the kid in white")
GENERATOR = "generator_logits"
PICTURES = ((480, 640), (211, 64), (1, 300))  # height and width of the pictures on which decisions are compared
SCORE_STEP, LARGEST_SCORE = 1 / 64, 8.0  # of box logits there: equal ones occur, and no order hangs on rounding
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class SizeError(ValueError):
    """Answers that differ where the image size is open: one size alone may still do."""


class Case(NamedTuple):
    """Answers to one question by name: exported, torch's, and torch's in float64, {} where they are not asked for."""

    exported: dict[str, np.ndarray]
    torch: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]


@torch.no_grad()
def check_folder(model: Any, folder: Path, facts: dict[str, Any]) -> dict[str, float]:
    """Run the folder and return the largest differences from torch by name; in facts["float64"], where needed, errors against float64.

    Decisions are compared where the answers are the same: facts["decisions"] says how many were, and how much numbers in them differ.

    Raises:
        GrexError: mask logits, or another answer, that differ by more than TOLERANCE and err more than FACTOR times what torch errs; a
            network's input or a decision that differs.
        SizeError: the same where the image size is open.
    """
    size, stride = facts["image_size"], facts["stride"]
    graphs = graphs_of(folder, facts)
    facts["decisions"] = check_decisions(model, graphs, [size, *([size + stride] if facts["any_size"] else [])])
    sizes = [(size, size), *([(size + stride, size + 2 * stride)] if facts["any_size"] else [])]
    images = {given: example_image(model, seed, given) for seed, given in enumerate(sizes, start=1)}
    largest = largest_differences((case.exported, case.torch) for case in _cases(model, None, graphs, folder, facts, images))
    facts.pop("float64", None)
    if max(largest.values()) <= TOLERANCE:
        return largest
    cases = _cases(model, copy.deepcopy(model).double(), graphs, folder, facts, images)
    exported = largest_differences((case.exported, case.exact) for case in cases)
    own = largest_differences((case.torch, case.exact) for case in cases)
    wrong = [name for name in largest if exported[name] > max(TOLERANCE, FACTOR * own[name])]
    facts["float64"] = {name: {"exported": exported[name], "torch": own[name]} for name in largest}
    if wrong:
        given = f"an exported model whose {wrong[0]} differs by {largest[wrong[0]]:.2g}, from float64 by {exported[wrong[0]]:.2g}"
        if facts["any_size"]:
            raise SizeError(given)
        wanted = f"at most {TOLERANCE:g}, or {FACTOR:g} times torch's own error, {own[wrong[0]]:.2g}"
        raise fault(given, wanted, "use another format, or the model in Python")
    return largest


@torch.no_grad()
def check_decisions(model: Any, graphs: dict[str, Run], sizes: list[int]) -> dict[str, float]:
    """Compare network inputs and decisions about PICTURES with the model's own, at sizes of the network's input.

    Returns the number of decisions that were compared, and by name the largest difference of the numbers in them.

    Raises:
        GrexError: a picture, a place or a decision that differs, or a number in it by more than SAME.
    """
    largest: dict[str, float] = {}
    compared = 0
    for size in sizes:
        for seed, (height, width) in enumerate(PICTURES):
            original = example_pixels(seed, (height, width))
            resized, geometry = resize_image(original, size, model.config.data.resize)
            image = model.grounding.normalise(torch.from_numpy(resized.copy()).permute(2, 0, 1)[None], [geometry.seen_size])
            canvas = (int(image.shape[-2]), int(image.shape[-1]))
            given = {PICTURE: resized[geometry.inner].copy(), ORIGINAL: np.array((width, height)), SIZE: np.array(size)}
            made = graphs[PREPARE](given)
            wanted = {IMAGE: image.numpy(), PLACE: place_of(geometry, size, canvas).numpy(), SEEN: np.array([geometry.seen_size])}
            _require(largest, [(name, made[name], wanted[name]) for name in (IMAGE, PLACE, SEEN)])
            ids, mask = model.encode_text(SAID)
            output = _without_near_ties(torch_answers(model.grounding, image, ids, mask))
            results = answers(output, [""] * len(ids), [geometry] * len(ids), canvas, model.config.predict)
            for e, result in enumerate(results):
                row = {name: getattr(output, name)[e : e + 1].numpy() for name in names_of(output)}
                _require(largest, list(_decided(graphs[DECIDE](made | row), result)))
                compared += 1
    return {"compared": compared, **largest}


def _without_near_ties(output: GroundingOutput) -> GroundingOutput:
    """Round box logits to steps."""
    if output.box_logits is None:
        return output
    return output._replace(box_logits=(output.box_logits / SCORE_STEP).round().mul(SCORE_STEP).clamp(-LARGEST_SCORE, LARGEST_SCORE))


def _decided(decision: dict[str, np.ndarray], wanted: Grounding) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Return the name of each part of a decision, what it is and what it should be."""
    for name in DECISIONS:
        value = getattr(wanted, name)
        if name in decision or value is not None:
            yield name, np.asarray(decision.get(name)), np.asarray(value)


def _require(largest: dict[str, float], compared: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Note the largest differences of numbers, and raise on what is not the same."""
    for name, given, wanted in compared:
        if wanted.dtype.kind == "f":
            largest[name] = max(largest.get(name, 0.0), difference(given, wanted))
            same = largest[name] <= SAME
        else:
            same = np.array_equal(given, wanted)
        if not same:
            said = f"an exported model with another {name} than the model's own"
            raise fault(said, "the same", "use another format, or the model in Python")


def largest_differences(pairs: Any) -> dict[str, float]:
    """Return name -> the largest `difference` of pairs of answers by name."""
    largest: dict[str, float] = {}
    for given, wanted in pairs:
        for name in given:
            largest[name] = max(largest.get(name, 0.0), difference(given[name], wanted[name]))
    return largest


def difference(given: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference of two arrays, of numbers above LARGE relative to their size; infinite for another shape or NaN."""
    if given.shape != wanted.shape or not np.isfinite(given).all():
        return float("inf")
    return float((np.abs(given - wanted) / np.maximum(1, np.abs(wanted) / LARGE)).max(initial=0.0))


def torch_answers(grounding: GroundingModel, image: Tensor, ids: Tensor, mask: Tensor) -> GroundingOutput:
    """Return what torch answers about a normalised image [1, 3, H, W]."""
    features = grounding.encode_normalised(ImageFeatures(image, (int(image.shape[-2]), int(image.shape[-1]))))
    return grounding.ground(features, torch.zeros_like(ids[:, 0]), ids, mask)


def example_image(model: Any, seed: int, size: tuple[int, int] | None = None) -> Tensor:
    """Return a normalised and padded image [1, 3, H, W] of smooth colours, at the model's own size or another (height, width)."""
    pixels = example_pixels(seed, size or (model.config.data.image_size,) * 2)
    image: Tensor = model.grounding.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    return image


def example_pixels(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Return uint8 [H, W, 3] of smooth colours. size: height and width."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)).copy()


def graphs_of(folder: Path, facts: dict[str, Any]) -> dict[str, Run]:
    """Return the graphs of a folder as functions, in the order in which they run. facts: of export.json, or its part on the generator."""
    if facts.get("format") == "torch":
        from grex_mllm.export.programs import run_program

        return {name: run_program(folder / name, **ends) for name, ends in facts["graphs"].items()}
    return {name: runner.onnx_graph(folder / name, **ends) for name, ends in facts["graphs"].items()}


def _cases(
    model: Any, exact: Any, graphs: dict[str, Run], folder: Path, facts: dict[str, Any], images: dict[tuple[int, int], Tensor]
) -> list[Case]:
    """Ask all questions. exact: the model in float64, or None.  images: normalised, by their sizes before padding."""
    inner = [name for name in facts["graphs"] if name not in (PREPARE, DECIDE)]
    names = facts["graphs"][inner[-1]]["outputs"]
    cases = []
    for image in images.values():
        for said in (SAID[2:], *([] if model.grounding.fuses_language else [SAID])):
            ids, mask = model.encode_text(said)
            arrays = {IMAGE: image.numpy(), TEXT_IDS: ids.numpy(), TEXT_MASK: mask.numpy()}
            for name in inner:
                arrays |= graphs[name](arrays)
            wanted = _by_name(torch_answers(model.grounding, image, ids, mask), names)
            precise = {} if exact is None else _by_name(torch_answers(exact.grounding, image.double(), ids, mask), names)
            cases.append(Case({name: arrays[name] for name in names}, wanted, precise))
    if "generator" in facts:
        from grex_mllm.export.generator_folder import compared_logits

        rows = compared_logits(model, exact, folder, facts["generator"], images)
        cases += [Case(*({} if logits is None else {GENERATOR: logits} for logits in row)) for row in rows]
    return cases


def _by_name(output: GroundingOutput, names: list[str]) -> dict[str, np.ndarray]:
    return {name: getattr(output, name).numpy() for name in names}
