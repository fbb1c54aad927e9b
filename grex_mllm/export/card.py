"""A model card from what is on file: configuration, weights and results. It claims nothing that was not measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from grex_mllm.config import Config, load_config
from grex_mllm.errors import fault
from grex_mllm.score.table import asked_lines, table_rows
from grex_mllm.writing import whole_file

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
LIMITS = (
    "Expressions are English phrases like those of the training data; other languages and instructions were not measured.",
    "A count above five is said as “more than five”.",
    "The numbers hold for the split and protocol above. On images of another kind expect less, and measure before use.",
    "The probability of “no target” is the model's own; its threshold was not chosen on the user's data.",
    "It inherits what its data and pre-trained parts say about people; not examined for bias, not for decisions about persons.",
)


def write_card(model: Path, results: Path, out: Path) -> Path:
    """Write the card and return its path.

    Raises:
        GrexError: no model folder, or a file that is no results.json.
    """
    if not (model / CONFIG).is_file() or not (model / WEIGHTS).is_file():
        raise fault(f"{model} without {CONFIG} and {WEIGHTS}", "a model folder", "train one (grex train), or fix the path")
    if not results.is_file():
        raise fault(f"results {results} do not exist", "a results.json of grex score", "score the model's predictions first")
    try:
        scored = json.loads(results.read_text(encoding="utf-8"))
        rows, provenance = table_rows(scored), scored["provenance"]
        text = "\n".join(
            _lines(load_config(model / CONFIG, trusted=False), num_parameters(model / WEIGHTS), model, scored, rows, provenance)
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fault(f"{results} is no results.json ({type(error).__name__}: {error})", "a file of grex score", "score again") from None
    with whole_file(out) as work:
        work.write_text(text + "\n", encoding="utf-8")
    return out


def num_parameters(weights: Path) -> int:
    """Return how many numbers a safetensors file holds, from its head alone."""
    from safetensors import safe_open

    with safe_open(str(weights), framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


def _lines(config: Config, count: int, model: Path, results: dict[str, Any], rows: list[Any], provenance: dict[str, Any]) -> list[str]:
    protocol, dataset, predictions = provenance["protocol"], provenance["dataset"], provenance["predictions"]
    generator = config.model.generator
    lines = ["---", "library_name: grex-mllm", "pipeline_tag: image-segmentation", "tags: [referring-expressions, segmentation]", "---", ""]
    lines += [
        f"# {model.resolve().name}",
        "",
        "Answers a referring expression with a mask, boxes and a count of any number of objects, or with",
    ]
    lines += [f"“nothing here”{'; describes a set of objects' if generator is not None else ''}.", "", "## Model", ""]
    lines += [f"- Image encoder: {config.model.vision.name}; text encoder: {config.model.text.name}"]
    lines += [f"- Pixel decoder: {config.model.pixel_decoder.name}; decoder: {config.model.decoder.name}"]
    lines += [f"- Generator: {generator.name if generator is not None else 'none'}"]
    lines += [f"- Image size: {config.data.image_size} ({config.data.resize}); parameters on file: {count:,}", "", "## Data", ""]
    lines += [
        f"- Trained on: {config.data.train}; {config.train.steps:,} steps of {config.train.batch_images} images, seed {config.train.seed}"
    ]
    lines += [f"- Measured on: {dataset['name']}, split {dataset['split']}, {dataset['num_expressions']:,} expressions", ""]
    lines += ["## Protocol", "", f"{protocol['name']}, version {protocol['version']}, grex_mllm {provenance['grex_mllm']}."]
    lines += [f"Thresholds: {provenance['thresholds']['chosen']}", f"Missing predictions: {predictions['num_missing']}."]
    if predictions.get("reads_truth"):
        lines += [f"**The predictions read the ground truth ({predictions['reads_truth']}): no result of a model alone.**"]
    lines += ["", "## Numbers", "", *_table(rows), *_of_sets(results), *asked_lines(predictions)]
    lines += [f"Note: {note}" for note in provenance["notes"]]
    return [*lines, "", "## Limits", "", *(f"- {limit}" for limit in LIMITS), "", "## Use", "", *_use(model, generator is not None)]


def _table(rows: list[tuple[str, dict[str, str]]]) -> list[str]:
    if not rows:
        return ["No grounding was scored."]
    names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    head = ["Shares in percent.", "", f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    return [*head, *(f"| {label} | {' | '.join(cells.get(name, '') for name in names)} |" for label, cells in rows), ""]


def _of_sets(results: dict[str, Any]) -> list[str]:
    """Return the numbers of generated expressions, as they stand in results.json."""
    lines = []
    for task, block in results["results"]["strict"].items():
        for part, numbers in block.items():
            shown = {k: v for k, v in numbers.items() if isinstance(v, int | float)} if isinstance(numbers, dict) else {}
            if shown and task not in ("gres", "grec", "count"):
                lines.append(f"- {task}, {part}: " + ", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    return [*lines, ""] if lines else []


def _use(model: Path, describes: bool) -> list[str]:
    name = model.resolve().name
    lines = ["```python", "from grex_mllm import GrexModel", "", f'model = GrexModel.from_pretrained("{name}")']
    lines += ['answer = model.ground("photo.jpg", "the two people on the left")']
    return [*lines, *(['text = model.describe("photo.jpg", boxes_xyxy=[[10, 12, 40, 44]])'] if describes else []), "```"]
