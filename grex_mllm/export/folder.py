"""`grex export`: a folder of graphs, tokenizer, facts and a script that runs them. What does not answer as torch does is not written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from grex_mllm import __version__
from grex_mllm.errors import GrexError, fault
from grex_mllm.export import ground as runner
from grex_mllm.export.graphs import IMAGE, TEXT_IDS, TEXT_MASK, Graph, ImageGraph, LanguageGraph, WholeGraph, check_exportable, names_of
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.grounding import PIXEL_MEAN, PIXEL_STD
from grex_mllm.ops.paths import as_on_gpu
from grex_mllm.types import GroundingOutput
from grex_mllm.writing import whole_folder

FORMATS = ("onnx", "torch")
PLACE = Path(__file__).parent
TOLERANCE = 1e-4  # of mask logits, exported against torch
LARGE = 10.0  # logits above it are compared relative to their size
EXPRESSIONS_AT_ONCE = 16
SAID = ("the two red circles on the left", "a dog", "everyone but the kid in white")  # of the check
Writer = Callable[[Path, Graph, bool], list[str]]  # returns the inputs that the written graph reads


def export_model(model_name: str, out: str, form: str = "onnx", task: str = "ground") -> dict[str, Any]:
    """Write the folder and return its facts (export.json).

    Raises:
        GrexError: unknown format, a task or model that does not leave, packages that are missing, or answers that differ from torch's.
    """
    if form not in FORMATS:
        raise fault(f"grex export --format {form}", " or ".join(FORMATS), "choose one of them")
    if task != "ground":
        raise fault(f"grex export --task {task}", "ground: the generator is not exported", "describe objects with grex describe")
    writer = _writer(form)  # what is missing is said before a model is loaded
    model = GrexModel.from_pretrained(model_name)
    check_exportable(model)
    facts = facts_of(model, form)
    with whole_folder(out) as work:
        model.text_tokenizer.save(work)
        shutil.copy(PLACE / "ground.py", work / "ground.py")
        if form == "torch":
            shutil.copy(PLACE / "ground_torch.py", work / "ground_torch.py")
        for varies in (True, False):
            facts["any_size"] = varies
            try:
                with torch.no_grad(), as_on_gpu():
                    facts["graphs"] = write_graphs(model, work, writer, varies)
                (work / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
                facts["largest_difference"] = check_folder(model, work, facts)
                break
            except GrexError:
                raise
            except Exception as error:  # of any depth of three libraries
                if not varies:
                    reason = str(error).strip().splitlines()
                    given = f"{model_name}: {form} fails with {type(error).__name__} ({reason[0] if reason else ''})"
                    raise fault(given, "a model that it can record", "use another format, or the model in Python") from error
        (work / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def facts_of(model: GrexModel, form: str) -> dict[str, Any]:
    """Return what the script must know beside the graphs."""
    config, fuses = model.config, model.grounding.fuses_language
    return {
        "format": form,
        "grex_mllm": __version__,
        "decoder": config.model.decoder.name,
        "image_size": config.data.image_size,
        "resize": config.data.resize,
        "stride": int(max(model.grounding.vision.strides)),
        "mean": list(PIXEL_MEAN),
        "std": list(PIXEL_STD),
        "max_tokens": config.model.text.max_tokens,
        "pad": config.model.text.pad,
        "expressions_at_once": 1 if fuses else EXPRESSIONS_AT_ONCE,
        "rules": asdict(config.predict),
    }


def write_graphs(model: GrexModel, work: Path, writer: Writer, varies: bool) -> dict[str, dict[str, list[str]]]:
    """Write the model's graphs and return their inputs and outputs by name."""
    ids, mask = model.encode_text(SAID[:1] if model.grounding.fuses_language else SAID[:2])
    image = example_image(model, 0)
    said = _answers(model, image, ids, mask)
    if model.grounding.fuses_language:
        whole = WholeGraph(model.grounding).eval()
        return {
            "whole": {
                "inputs": writer(work, ("whole", whole, (image, ids, mask), [IMAGE, TEXT_IDS, TEXT_MASK], said), varies),
                "outputs": said,
            }
        }
    first = ImageGraph(model.grounding).eval()
    tensors = first(image)
    between = [f"features_{i}" for i in range(len(tensors))]
    language = LanguageGraph(first).eval()
    read = writer(work, ("language", language, (ids, mask, *tensors), [TEXT_IDS, TEXT_MASK, *between], said), varies)
    first.kept = [i for i, name in enumerate(between) if name in read]
    made = [between[i] for i in first.kept]
    pixels = writer(work, ("image", first, (image,), [IMAGE], made), varies)
    return {"image": {"inputs": pixels, "outputs": made}, "language": {"inputs": read, "outputs": said}}


def _answers(model: GrexModel, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    return names_of(_torch_answers(model, image, ids, mask))


def _torch_answers(model: GrexModel, image: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> GroundingOutput:
    from grex_mllm.models.grounding import ImageFeatures

    features = model.grounding.encode_normalised(ImageFeatures(image, (int(image.shape[-2]), int(image.shape[-1]))))
    return model.grounding.ground(features, torch.zeros_like(ids[:, 0]), ids, mask)


def example_image(model: GrexModel, seed: int, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Return a normalised image [1, 3, H, W] of smooth colours, at the model's own size or another."""
    height, width = size or (model.config.data.image_size,) * 2
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()
    return model.grounding.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])


@torch.no_grad()
def check_folder(model: GrexModel, folder: Path, facts: dict[str, Any]) -> dict[str, float]:
    """Run the folder on images, sizes and numbers of expressions that it was not recorded with; return the largest differences.

    Raises:
        GrexError: mask logits, or another answer, that differ by more than TOLERANCE.
    """
    graphs = graphs_of(folder, facts)
    said_names = list(facts["graphs"].values())[-1]["outputs"]
    size, stride = facts["image_size"], facts["stride"]
    sizes = [None, *([(size + stride, size + 2 * stride)] if facts["any_size"] else [])]
    largest: dict[str, float] = {}
    for seed, given in enumerate(sizes, start=1):
        image = example_image(model, seed, given)
        for said in (SAID[2:], *([SAID] if facts["expressions_at_once"] > 1 else [])):
            ids, mask = model.encode_text(said)
            arrays = {IMAGE: image.numpy(), TEXT_IDS: ids.numpy(), TEXT_MASK: mask.numpy()}
            for run in graphs.values():
                arrays |= run(arrays)
            wanted = _torch_answers(model, image, ids, mask)
            for name in said_names:
                largest[name] = max(largest.get(name, 0.0), difference(arrays[name], getattr(wanted, name).numpy()))
    if max(largest.values()) > TOLERANCE:
        if facts["any_size"]:
            raise ValueError("answers differ")  # at another size: then one size alone
        raise fault(f"an exported model that differs by {largest}", f"at most {TOLERANCE:g}", "use another format, or the model in Python")
    return largest


def difference(given: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference of two arrays, of numbers above LARGE relative to their size; infinite for another shape or NaN."""
    if given.shape != wanted.shape or not np.isfinite(given).all():
        return float("inf")
    return float((np.abs(given - wanted) / np.maximum(1, np.abs(wanted) / LARGE)).max(initial=0.0))


def graphs_of(folder: Path, facts: dict[str, Any]) -> dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Return the graphs of a folder as functions, in the order in which they run."""
    if facts["format"] == "onnx":
        return runner.onnx_graphs(folder, facts)
    from grex_mllm.export.programs import run_programs

    return run_programs(folder, facts)


def _writer(form: str) -> Writer:
    if form == "onnx":
        from grex_mllm.export.onnx_graphs import check_installed, write_onnx

        check_installed()
        return write_onnx
    from grex_mllm.export.programs import write_program

    return write_program
