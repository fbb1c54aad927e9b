"""ImageNet weights of ResNet-50, -101, -152 for our encoder: torchvision's names, or detectron2's conversion of them.

The released ReLA R50 starts from them (its batch norm is frozen, the stride lies in the 3x3 convolution). Caffe's older R-50.pkl has its
stride in the 1x1 convolution and BGR input: it is refused, because its names are others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from grex_mllm.config import VisionConfig
from grex_mllm.convert.folder import write_weights
from grex_mllm.convert.reader import read_checkpoint
from grex_mllm.convert.rela import Conversion, fill, new_name, shapes_of, sort_keys
from grex_mllm.errors import fault
from grex_mllm.models.resnet import ResNet

NORM = "weight|bias|running_mean|running_var"
# torchvision counts stages from 1, [n], detectron2 from 2, <n>: see `new_name`
RULES: tuple[tuple[str, str], ...] = (
    (r"(?:stem\.)?conv1\.weight", r"stem.conv.weight"),
    (rf"(?:bn1|stem\.conv1\.norm)\.({NORM})", r"stem.norm.\1"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.weight", r"stages.[\1].\2.conv\3.weight"),
    (rf"layer(\d)\.(\d+)\.bn(\d)\.({NORM})", r"stages.[\1].\2.norm\3.\4"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", r"stages.[\1].\2.shortcut.conv.weight"),
    (rf"layer(\d)\.(\d+)\.downsample\.1\.({NORM})", r"stages.[\1].\2.shortcut.norm.\3"),
    (r"res(\d)\.(\d+)\.conv(\d)\.weight", r"stages.<\1>.\2.conv\3.weight"),
    (rf"res(\d)\.(\d+)\.conv(\d)\.norm\.({NORM})", r"stages.<\1>.\2.norm\3.\4"),
    (r"res(\d)\.(\d+)\.shortcut\.weight", r"stages.<\1>.\2.shortcut.conv.weight"),
    (rf"res(\d)\.(\d+)\.shortcut\.norm\.({NORM})", r"stages.<\1>.\2.shortcut.norm.\3"),
)
IGNORED: tuple[tuple[str, str], ...] = (
    ("classifier", r"(?:stem\.)?fc\.(weight|bias)"),
    ("count of batches (the norm is frozen)", r".+\.num_batches_tracked"),
)


def convert_resnet(path: str | Path, out: str | Path) -> Conversion:
    """Write a safetensors file for `model.vision.weights`; nothing is written unless everything fits.

    Raises:
        GrexError: unreadable or unsafe file, no bottleneck ResNet, unknown, missing or misshapen keys, or an output that exists.
    """
    state, beside = read_checkpoint(path)
    found, ignored, unknown = sort_keys(state, IGNORED, lambda key: new_name(key, RULES))
    named = {name: tensor.float() for name, tensor in found.items()}
    if unknown:
        raise fault(f"{path} has keys that no torchvision ResNet has ({', '.join(unknown[:6])})", "its names", "give torchvision's weights")
    vision = _sizes(named, str(path))
    fill(named, shapes_of(lambda: ResNet(vision)), str(path))
    write_weights(Path(out), named)
    sizes = f"depths: {vision.depths}, widths: {vision.widths}, bottleneck_widths: {vision.bottleneck_widths}"
    note = f"set under model.vision: {{name: resnet, {sizes}, stem_width: {vision.stem_width}, weights: {out}}}"
    ignored = {f"beside the weights: {entry}": 1 for entry in beside} | ignored
    return Conversion("resnet", len(named), ignored, Path(out), [note])


def _sizes(named: Mapping[str, Tensor], source: str) -> VisionConfig:
    """Read the sizes from the shapes."""
    needed = ["stem.conv.weight", *(f"stages.{s}.0.conv{c}.weight" for s in range(4) for c in (1, 3))]
    missing = [name for name in needed if name not in named]
    if missing:
        raise fault(f"{source} lacks {', '.join(missing[:4])}", "a whole ResNet of bottlenecks (50, 101, 152)", "download it again")
    return VisionConfig(
        name="resnet",
        stem_width=int(named["stem.conv.weight"].shape[0]),
        widths=[int(named[f"stages.{s}.0.conv3.weight"].shape[0]) for s in range(4)],
        bottleneck_widths=[int(named[f"stages.{s}.0.conv1.weight"].shape[0]) for s in range(4)],
        depths=[sum(1 for name in named if re.fullmatch(rf"stages\.{s}\.\d+\.conv1\.weight", name)) for s in range(4)],
    )
