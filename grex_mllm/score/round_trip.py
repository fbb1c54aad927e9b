"""Live round trips: ground generated expressions with any model folder, so that texts of any system can be scored by what they point at."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.data.records import find_image_root
from grex_mllm.errors import GrexError, fault
from grex_mllm.ops.masks import encode_rle
from grex_mllm.score.truth import TruthFolder

if TYPE_CHECKING:
    from grex_mllm.types import Grounding


class RoundTrip:
    """A grounding model beside the images of a dataset folder.

    model: a model folder or hub id. image_root: where the images lie, when not where dataset.json says. num_grounded: texts so far.

    Raises:
        GrexError: no such model, image folder or device.
    """

    def __init__(self, model: str | Path, truth: TruthFolder, image_root: str | Path | None = None, device: str = "auto") -> None:
        from grex_mllm.ask import pick_device
        from grex_mllm.models.grex import GrexModel

        self.model, self.truth = str(model), truth
        self.image_root = find_image_root(truth.folder, truth.info, image_root)
        if not self.image_root.is_dir():
            raise fault(f"image folder {self.image_root} does not exist", "the images that the texts describe", "give --image-root")
        self.net = GrexModel.from_pretrained(model, device=pick_device(device))
        self.num_grounded = 0

    def ground(self, image_id: str, texts: list[str]) -> list[dict[str, Any]]:
        """Return the fields of a `round_trip` (`eval/README.md`) for each text; the image is read and encoded once.

        Raises:
            GrexError: the image is missing, unreadable or of another size than its record says.
        """
        from grex_mllm.models.grex import MAX_EXPRESSION_CHARACTERS

        record = self.truth.image(image_id)
        try:
            image = load_image(resolve_image(self.image_root, record.file))
        except GrexError as error:
            raise GrexError(f"round trip, image {image_id}: {error}") from None
        if image.shape[:2] != (record.height, record.width):
            given = f"image {image_id} of {image.shape[0]}x{image.shape[1]} (height x width)"
            raise fault(given, f"{record.height}x{record.width}, as its record says", "fix images.jsonl")
        settings = self.net.config.predict
        found = self.net.ground(self.net.encode(image), [t.strip()[:MAX_EXPRESSION_CHARACTERS] for t in texts], settings.batch)
        self.num_grounded += len(texts)
        return [_fields(result, settings.masks) for result in found]

    def provenance(self) -> dict[str, Any]:
        """Return which model grounded how many texts."""
        weights = Path(self.model, "model.safetensors")
        if not weights.is_file():
            return {"model": self.model, "sha256": None, "num_grounded": self.num_grounded}
        with weights.open("rb") as file:
            code = hashlib.file_digest(file, "sha256").hexdigest()
        return {"model": Path(self.model).name, "sha256": code, "num_grounded": self.num_grounded}


def _fields(result: Grounding, masks: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"mask_rle": encode_rle(result.mask)} if masks else {}
    return line | {
        "boxes_xyxy": np.round(result.boxes_xyxy.astype(np.float64), 3).tolist(),
        "box_scores": np.round(result.box_scores.astype(np.float64), 5).tolist(),
        "no_target": result.head_no_target,
    }
