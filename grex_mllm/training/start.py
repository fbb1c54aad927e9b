"""Start a training from the weights of another model folder: a converted GRES checkpoint under new heads, or an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grex_mllm.config import Config, load_config
from grex_mllm.errors import GrexError, fault

if TYPE_CHECKING:
    from grex_mllm.models.grex import GrexModel

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.yaml", "text_tokenizer"
TEXT_SIZES = ("vocab_size", "hidden_size", "word_width", "num_layers", "num_heads", "intermediate_size", "max_positions")
SEVERAL = 4


def adopt_start(config: Config) -> None:
    """Let `train.start` stand for what it holds: `model.vision.weights` and `model.text.path` need not be at hand.

    The text encoder has the sizes and the tokenizer of that folder, because its embeddings belong to them. A folder that was converted
    without a vocabulary leaves the tokenizer to `model.text.tokenizer`, or to the folder under `model.text.path`.

    Raises:
        GrexError: no model folder.
    """
    folder = Path(str(config.train.start))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise fault(f"train.start {folder} has no {name}", "a model folder", "convert or train one, or fix train.start")
    held = load_config(folder / CONFIG, trusted=False)
    text, theirs = config.model.text, held.model.text
    if any((folder / TOKENIZER / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        text.tokenizer = str(folder / TOKENIZER)
    elif text.tokenizer is None:
        text.tokenizer = text.path
    for name in TEXT_SIZES:
        setattr(text, name, getattr(theirs, name))
    config.model.vision.weights = text.path = None
    if _has_crops(held) and _has_crops(config):
        config.model.generator.crops.vision.weights = None


def _has_crops(config: Config) -> bool:
    crops = getattr(config.model.generator, "crops", None)
    return crops is not None and hasattr(crops, "vision") and crops.size > 0


def start_from(model: GrexModel, folder: str | Path) -> list[str]:
    """Load the weights of a model folder and return the names of the tensors that it does not have, which stay as built.

    Only the heads for boxes, box scores and count, and the generator, may be new: a released GRES checkpoint has none of them.

    Raises:
        GrexError: no such folder, other tensors missing or superfluous, or another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise fault(f"train.start {folder} has no {WEIGHTS}", "a model folder", "convert or train one, or fix train.start")
    try:
        given = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise fault(f"{file} cannot be read ({error})", "a whole safetensors file", "copy the folder again") from None
    own = model.saved_state()
    missing = [name for name in own if name not in given]
    new = [name for name in missing if name.startswith(new_parts(model))]
    wrong = {
        "missing": sorted(set(missing) - set(new)),
        "superfluous": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {tuple(given[name].shape)}" for name in own if name in given and given[name].shape != own[name].shape
        ],
    }
    if any(wrong.values()):
        differences = "; ".join(f"{len(names)} {word}: {', '.join(names[:SEVERAL])}" for word, names in wrong.items() if names)
        raise GrexError(
            f"{file} does not fit the model ({differences}); expected its tensors but for new heads; give the same sizes under model"
        )
    model.load_saved_state({**own, **given}, str(file))
    return new


def new_parts(model: GrexModel) -> tuple[str, ...]:
    """Return the parts that a model may have beyond the one it starts from; everything else must be there, in its shape."""
    return (*(f"grounding.decoder.{part}" for part in getattr(model.grounding.decoder, "new_parts", ())), "generator.")


def describe_new(new: list[str]) -> str:
    """Say in one line which parts started as built."""
    parts: dict[str, int] = {}
    for name in new:
        part = ".".join(name.removeprefix("grounding.").split(".")[: 1 if name.startswith("generator.") else 4])
        parts[part] = parts.get(part, 0) + 1
    listed = ", ".join(f"{part} ({number} tensors)" for part, number in parts.items())
    return f"new, as built: {listed}" if listed else "every tensor was there"
