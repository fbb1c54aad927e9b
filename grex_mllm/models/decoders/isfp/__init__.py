"""Entry "isfp" of `DECODERS`: Instance-Specific Feature Propagation (Liu et al., TMM 2022; Liu's thesis, chapter 3)."""

from grex_mllm.models.decoders.isfp.config import IsfpConfig as Config
from grex_mllm.models.decoders.isfp.criterion import IsfpCriterion as Criterion
from grex_mllm.models.decoders.isfp.network import Isfp as Decoder

__all__ = ["Config", "Criterion", "Decoder"]
