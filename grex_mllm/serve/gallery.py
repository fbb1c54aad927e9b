"""Pictures to begin with: synthetic scenes of the test split, each with expressions to try."""

from __future__ import annotations

from functools import lru_cache

from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import fault
from grex_mllm.serve.pictures import Picture

NUM_SCENES = 8
EXAMPLES = 4
PREFIX = "scene-"


class Gallery:
    """Scenes drawn with the settings that the model was trained with, where it has any."""

    def __init__(self, settings: SyntheticConfig | None) -> None:
        self._scenes = SyntheticDataset(settings or SyntheticConfig(), "test", NUM_SCENES, EXAMPLES)
        self.scene = lru_cache(maxsize=NUM_SCENES)(self._draw)

    def __len__(self) -> int:
        return NUM_SCENES

    def _draw(self, number: int) -> tuple[Picture, list[str]]:
        sample = self._scenes[number]
        height, width = sample.image.shape[:2]
        return Picture(sample.image, (width, height)), [record.expression for record in sample.expressions]

    def get(self, number: int) -> tuple[Picture, list[str]]:
        """Return a scene and expressions about it.

        Raises:
            GrexError: no such scene.
        """
        if not 0 <= number < NUM_SCENES:
            raise fault(f"scene {number}", f"0 to {NUM_SCENES - 1}", "choose one of the gallery")
        return self.scene(number)
