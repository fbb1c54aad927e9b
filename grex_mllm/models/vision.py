"""Image encoders by name: our ResNet and Swin (exact to the released ReLA), EfficientNet-Lite0, any of timm, any transformers backbone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from grex_mllm.compat import recompute_blocks
from grex_mllm.config import VisionConfig
from grex_mllm.errors import GrexError, fault
from grex_mllm.types import TextFeatures

NUM_MAPS = 4
PROBE_SIZE = 64


class TimmEncoder(nn.Module):
    """Run a timm network's last four feature maps. Needs the extra `timm` (timm and torchvision)."""

    fuses_language = False

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise fault(f"model.vision.name timm:{name}", "the packages timm and torchvision", "install grex-mllm[timm]") from None
        try:
            probe = timm.create_model(name, features_only=True, pretrained=False)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise fault(f"model.vision.name timm:{name} ({error})", "a timm network with feature maps", "see timm.list_models()") from None
        count = len(probe.feature_info.channels())
        if count < NUM_MAPS:
            raise fault(f"timm:{name} with {count} feature maps", f"at least {NUM_MAPS}", "choose a hierarchical network")
        indices = tuple(range(count - NUM_MAPS, count))
        self.net = timm.create_model(name, features_only=True, pretrained=False, out_indices=indices)
        self.strides = tuple(self.net.feature_info.reduction())
        self.channels = tuple(self.net.feature_info.channels())

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return four maps, fine to coarse, of normalised images [B, 3, H, W]; `text` is unread."""
        return [
            # Swin-like timm networks return channels last
            m if m.shape[1] == c else m.permute(0, 3, 1, 2).contiguous()
            for m, c in zip(self.net(image), self.channels, strict=True)
        ]


class HubEncoder(nn.Module):
    """Run the last four feature maps of a transformers `AutoBackbone` from a folder or a hub id."""

    fuses_language = False

    def __init__(self, path: str) -> None:
        super().__init__()
        from transformers import AutoBackbone, AutoConfig

        try:
            config = AutoConfig.from_pretrained(path)
            stages = config.stage_names[-NUM_MAPS:]
            if not Path(path).is_dir() or any(Path(path).glob("*.safetensors")):
                self.net = AutoBackbone.from_pretrained(path, out_features=stages)
            else:
                config.out_features = stages
                self.net = AutoBackbone.from_config(config)
        except (OSError, ValueError, AttributeError) as error:
            raise fault(f"model.vision.name hf:{path} ({error})", "a folder or hub id of a backbone", "fix the name") from None
        if len(stages) < NUM_MAPS:
            raise fault(f"hf:{path} with {len(stages)} stages", f"at least {NUM_MAPS}", "choose a hierarchical network")
        self.channels = tuple(self.net.channels)
        with torch.no_grad():  # configurations do not tell strides
            maps = self.net(torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE)).feature_maps
        self.strides = tuple(PROBE_SIZE // int(m.shape[-1]) for m in maps)
        if any(coarse != 2 * fine for fine, coarse in pairwise(self.strides)):
            raise fault(f"hf:{path} with maps at strides {self.strides}", "strides that double", "choose a hierarchical network")

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return four maps, fine to coarse, of normalised images [B, 3, H, W]; `text` is unread."""
        return list(self.net(image).feature_maps)


def build_vision(config: VisionConfig, text_width: int) -> nn.Module:
    """Build the image encoder with `.strides`, `.channels` (fine to coarse) and `.fuses_language`, weights loaded where given.

    Raises:
        GrexError: unknown name, or weights that do not fit.
    """
    if config.name == "resnet":
        from grex_mllm.models.resnet import ResNet

        net: nn.Module = ResNet(config)
    elif config.name == "swin":
        from grex_mllm.models.swin import SwinTransformer

        net = SwinTransformer(config, text_width)
    elif config.name == "efficientnet_lite0":
        from grex_mllm.models.efficientnet import EfficientNetLite0

        net = EfficientNetLite0(config)
    elif config.name == "darknet53":
        from grex_mllm.models.darknet import Darknet

        net = Darknet(config)
    elif config.name.startswith("timm:"):
        net = TimmEncoder(config.name.removeprefix("timm:"))
        _recompute(net.net.set_grad_checkpointing, config)
    elif config.name.startswith("hf:"):
        net = HubEncoder(config.name.removeprefix("hf:"))
        _recompute(partial(recompute_blocks, net.net), config)
    else:
        known = "resnet, swin, darknet53, efficientnet_lite0, timm:<model> or hf:<folder or hub id>"
        raise fault(f'model.vision.name "{config.name}"', known, "fix the name")
    if config.weights is not None:
        load_weights(net, config.weights)
    if config.patches:
        from grex_mllm.models.hard_split import HardSplit

        return HardSplit(net, config.patches)
    return net


def _recompute(switch: Callable[[], object], config: VisionConfig) -> None:
    """Turn on a library's own gradient checkpointing if it is asked for."""
    if not config.gradient_checkpointing:
        return
    try:
        switch()
    except (ValueError, AssertionError) as error:
        reason = str(error) or "the network cannot"
        raise fault(f"model.vision.gradient_checkpointing with {config.name} ({reason})", "false there", "turn it off") from None


def load_weights(net: nn.Module, file: str) -> None:
    """Load a safetensors file into the encoder. Parameters of the language fusion may be absent: they start as built.

    Raises:
        GrexError: no such file, a key too many, a key missing outside the fusion, or another shape.
    """
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise fault(f"model.vision.weights {file}", "a safetensors file", "write one with `grex convert swin` or data_prep/weights.py")
    given = load_file(file)
    own_names: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = getattr(net, "own_names", None)
    if own_names is not None:
        given = own_names(given)
    own = net.state_dict()
    missing = [k for k in own if k not in given and not is_fusion(k)]
    unknown = [k for k in given if k not in own]
    shapes = [f"{k} {tuple(given[k].shape)} != {tuple(own[k].shape)}" for k in own if k in given and own[k].shape != given[k].shape]
    if missing or unknown or shapes:
        raise GrexError(
            f"{file}: missing {missing[:4]}, unknown {unknown[:4]}, shapes {shapes[:4]}; expected the keys of the configured backbone; "
            "check model.vision"
        )
    own.update(given)
    net.load_state_dict(own)


def is_fusion(key: str) -> bool:
    """Tell whether a parameter belongs to the language fusion, which no image-only checkpoint has."""
    parts = key.split(".")
    return "fusion" in parts or "gate" in parts or key.startswith("norms.")
