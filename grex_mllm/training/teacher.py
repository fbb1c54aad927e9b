"""The trained model that a smaller one imitates (`loss.distill`, `train.teacher`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grex_mllm.config import Config
from grex_mllm.errors import fault
from grex_mllm.models.distillation import check_distillation
from grex_mllm.models.grex import CONFIG, WEIGHTS, GrexModel
from grex_mllm.types import Batch, GroundingOutput


class Teacher:
    """A model folder that answers batches, frozen, in evaluation mode.

    It is no module: it belongs to no model, optimizer or checkpoint, no process sends it to another, and it is read at the first batch.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.model: GrexModel | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # nothing changes it

    @torch.no_grad()
    def __call__(self, batch: Batch, padded_size: tuple[int, int]) -> GroundingOutput:
        """Answer a batch's expressions, which the model's own tokenizer reads.

        padded_size: height and width that the student's masks cover.

        Raises:
            GrexError: no model folder, or masks that cover another size.
        """
        if self.model is None:
            self.model = GrexModel.from_pretrained(self.folder, device=str(batch.image.device))
            self.model.generator = None
            self.model.requires_grad_(False)
        grounding = self.model.grounding
        ids, mask = (tensor.to(batch.image.device) for tensor in self.model.encode_text(batch.expressions))
        features = grounding.encode_image(batch.image, batch.input_sizes)
        if features.padded_size != padded_size:
            raise fault(
                f"train.teacher pads images to {features.padded_size}, the model to {padded_size}",
                "the same size, so that their masks cover the same",
                "make data.image_size a multiple of the coarsest stride of both image encoders",
            )
        return grounding.ground(features, batch.image_index, ids, mask)


def teacher_of(config: Config) -> Teacher | None:
    """Return the teacher of a training that has one."""
    return Teacher(str(config.train.teacher)) if config.loss.distill else None


def check_teacher(config: Config, grounds: bool) -> None:
    """Raise on a distillation that cannot be.

    Raises:
        GrexError: weight or temperature out of range, a teacher without a weight or a weight without one, no grounding, no model folder.
    """
    weight, folder = config.loss.distill, config.train.teacher
    check_distillation(weight, config.loss.distill_temperature)
    if (folder is None) != (weight == 0):
        raise fault(f"loss.distill is {weight:g} and train.teacher {folder}", "both, or none", "give the other one, too, or leave both out")
    if folder is None:
        return
    if not grounds:
        raise fault(f"loss.distill with train.tasks {config.train.tasks}", "grounding to be learned", "set train.tasks to all or ground")
    for name in (CONFIG, WEIGHTS):
        if not Path(folder, name).is_file():
            raise fault(f"train.teacher {folder} has no {name}", "a model folder", "train a model, or fix train.teacher")
