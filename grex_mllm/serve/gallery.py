"""Pictures to begin with, each with expressions to try: synthetic scenes of the test split, and README's photographs.

The photographs (folder `photographs`, written by docs/photographs.py) are those of README's first picture, without answers; each is shown
with where it is from and its licence.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from grex_mllm.data.images import load_image
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import fault
from grex_mllm.serve.pictures import Picture

NUM_SCENES = 8
EXAMPLES = 4
PREFIX = "scene-"
PHOTOGRAPHS = Path(__file__).parent / "photographs"


class Shown(NamedTuple):
    """examples: expressions to try.  credit: link and licence of a photograph, None of a scene."""

    picture: Picture
    examples: list[str]
    credit: dict[str, str] | None = None


class Gallery:
    """Scenes, drawn with the settings that the model was trained with where it has any, and then photographs."""

    def __init__(self, settings: SyntheticConfig | None) -> None:
        self._scenes = SyntheticDataset(settings or SyntheticConfig(), "test", NUM_SCENES, EXAMPLES)
        self._photographs: list[dict[str, Any]] = json.loads((PHOTOGRAPHS / "photographs.json").read_text(encoding="utf-8"))
        self._shown = lru_cache(maxsize=len(self))(self._open)

    def __len__(self) -> int:
        return NUM_SCENES + len(self._photographs)

    def _open(self, number: int) -> Shown:
        if number >= NUM_SCENES:
            return self._photograph(number - NUM_SCENES)
        sample = self._scenes[number]
        height, width = sample.image.shape[:2]
        return Shown(Picture(sample.image, (width, height)), [record.expression for record in sample.expressions])

    def _photograph(self, number: int) -> Shown:
        pixels, facts = load_image(PHOTOGRAPHS / f"{number}.jpg"), self._photographs[number]
        others = dict.fromkeys([facts["expression"], *(other["expression"] for other in self._photographs)])
        credit = {"link": facts["link"], "licence": facts["licence"]}
        return Shown(Picture(pixels, (pixels.shape[1], pixels.shape[0])), list(others)[:EXAMPLES], credit)

    def get(self, number: int) -> Shown:
        """Return a scene, or from NUM_SCENES on a photograph.

        Raises:
            GrexError: no such picture.
        """
        if not 0 <= number < len(self):
            raise fault(f"picture {number}", f"0 to {len(self) - 1}", "choose one of the gallery")
        return self._shown(number)
