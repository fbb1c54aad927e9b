"""The decoder `instance_selection` whose regions do not see where the others lie: a variant of benchmarks/photo_comparison.py.

The relative geometry of two boxes (`pair_geometry`) is zero in region-region attention; a region still knows its own box.
"""

from __future__ import annotations

from typing import Any

from grex_mllm.models.decoders.instance_selection import Config, Criterion
from grex_mllm.models.decoders.instance_selection import Decoder as WithGeometry
from grex_mllm.models.decoders.instance_selection.regions import ImagePart, Regions

__all__ = ["Config", "Criterion", "Decoder"]


class BlindImagePart(ImagePart):
    """Finds the same regions."""

    def forward(self, *inputs: Any) -> Regions:
        """Return the regions of B images without their relations."""
        regions = super().forward(*inputs)
        return regions._replace(geometry=regions.geometry * 0)


class Decoder(WithGeometry):
    """`instance_selection` behind BlindImagePart."""

    def __init__(self, config: Any, inputs: Any) -> None:
        super().__init__(config, inputs)
        self.image_part = BlindImagePart(config, inputs.width, inputs.mask_width)
