"""Live round trips: ground generated expressions with any predictor, so that texts of any system can be scored by what they point at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.data.records import MAX_EXPRESSION_CHARACTERS, find_image_root
from grex_mllm.errors import GrexError, fault
from grex_mllm.predictors import open_blind
from grex_mllm.predictors.lines import round_trip_fields
from grex_mllm.predictors.protocol import Item, Options
from grex_mllm.score.identity import sha256_of
from grex_mllm.score.truth import TruthFolder
from grex_mllm.types import ExpressionRecord, ImageRecord


class RoundTrip:
    """A predictor beside the images of a dataset folder.

    model: what `grex_mllm.predictors.open_predictor` takes.  image_root: where the images lie, when not where dataset.json says.
    num_grounded: texts so far.

    Raises:
        GrexError: no such predictor, image folder or device; a predictor that does not ground, or that knows the answers.
    """

    def __init__(self, model: str | Path, truth: TruthFolder, image_root: str | Path | None = None, device: str = "auto") -> None:
        self.model, self.truth = str(model), truth
        self.image_root = find_image_root(truth.folder, truth.info, image_root)
        if not self.image_root.is_dir():
            raise fault(f"image folder {self.image_root} does not exist", "the images that the texts describe", "give --image-root")
        self.predictor = open_blind(self.model, Options(device, precision="fp32"), "ground")
        self.num_grounded = 0

    def ground(self, image_id: str, texts: list[str]) -> list[dict[str, Any]]:
        """Return the fields of a `round_trip` (`eval/README.md`) for each text; the image is read and encoded once.

        Raises:
            GrexError: the image is missing, unreadable or of another size than its record says.
        """
        record = self.truth.image(image_id)
        said = [text.strip()[:MAX_EXPRESSION_CHARACTERS] for text in texts]
        records = [ExpressionRecord(f"{n}", f"{n}", image_id, text, text, [], self.truth.split, "generated") for n, text in enumerate(said)]
        file = resolve_image(self.image_root, record.file)
        found = {answer.key: answer for answer in self.predictor.ground([Item(record, file, lambda: _load(file, record), records)])}
        self.num_grounded += len(texts)
        return [round_trip_fields(found[f"{n}"]) for n in range(len(texts))]

    def provenance(self) -> dict[str, Any]:
        """Return which predictor grounded how many texts."""
        weights = Path(self.model, "model.safetensors")
        known = weights.is_file()
        named = {"model": Path(self.model).name, "sha256": sha256_of(weights)} if known else {"model": self.model, "sha256": None}
        return named | {"num_grounded": self.num_grounded}


def _load(file: Path, record: ImageRecord) -> np.ndarray:
    try:
        image = load_image(file)
    except GrexError as error:
        raise GrexError(f"round trip, image {record.image_id}: {error}") from None
    if image.shape[:2] != (record.height, record.width):
        given = f"image {record.image_id} of {image.shape[0]}x{image.shape[1]} (height x width)"
        raise fault(given, f"{record.height}x{record.width}, as its record says", "fix images.jsonl")
    return image
