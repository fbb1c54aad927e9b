"""Entry "vlt" of `DECODERS`: VLT (Ding et al., ICCV 2021 and TPAMI 2022; thesis, chapter 4), with heads for GREx."""

from grex_mllm.models.decoders.vlt.config import VltConfig as Config
from grex_mllm.models.decoders.vlt.criterion import VltCriterion as Criterion
from grex_mllm.models.decoders.vlt.network import Vlt as Decoder

__all__ = ["Config", "Criterion", "Decoder"]
