"""How a multimodal model runs on this machine; light to import, for the command line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalSettings:
    """How a model runs on this machine.

    batch: requests at once.  share_prefix: read a picture once for all that is asked about it.
    dtype, quantisation, attn_implementation: of the weights, as a generator's configuration has them.  precision: of the computation.
    min_pixels, max_pixels: of a picture, for the Qwen-VL families; max_tiles: for InternVL; None = as the checkpoint says.
    """

    batch: int = 8
    share_prefix: bool = True
    dtype: str = "auto"
    quantisation: str = "none"
    attn_implementation: str = "auto"
    precision: str = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None
