"""Entry "instance_selection" of `DECODERS`: instances are proposed once per image, then selected by language."""

from grex_mllm.models.decoders.instance_selection.config import InstanceSelectionConfig as Config
from grex_mllm.models.decoders.instance_selection.criterion import InstanceSelectionCriterion as Criterion
from grex_mllm.models.decoders.instance_selection.network import InstanceSelection as Decoder

__all__ = ["Config", "Criterion", "Decoder"]
