"""Entry "m3att" of `DECODERS`: M3Att (Liu et al., TIP 2023; thesis, chapter 5), with heads for GREx."""

from grex_mllm.models.decoders.m3att.config import M3AttConfig as Config
from grex_mllm.models.decoders.m3att.criterion import M3AttCriterion as Criterion
from grex_mllm.models.decoders.m3att.network import M3Att as Decoder

__all__ = ["Config", "Criterion", "Decoder"]
