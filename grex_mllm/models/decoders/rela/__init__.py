"""Entry "rela" of `DECODERS`: the region decoder of GRES (Liu et al. 2023), with the heads for boxes and count of the GREx article."""

from grex_mllm.models.decoders.rela.config import RelaConfig as Config
from grex_mllm.models.decoders.rela.criterion import RelaCriterion as Criterion
from grex_mllm.models.decoders.rela.network import Rela as Decoder

__all__ = ["Config", "Criterion", "Decoder"]
