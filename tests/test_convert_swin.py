"""Safe reading of checkpoint files, and ImageNet Swin weights under three spellings."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grex_mllm.config import VisionConfig
from grex_mllm.convert.reader import read_checkpoint
from grex_mllm.convert.swin import convert_swin
from grex_mllm.errors import GrexError
from grex_mllm.models.swin import SwinTransformer
from grex_mllm.models.vision import build_vision

TINY = VisionConfig(name="swin", embed_width=8, swin_depths=[1, 2, 1, 1], swin_heads=[1, 2, 2, 4], window=3, fusion="none")


class Trap:
    """Runs a command when it is unpickled by a careless reader."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "stream", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    file, mark = tmp_path / "trap.pth", tmp_path / "ran"
    content = {"model": {"a": torch.zeros(2) if kind != "pickle" else np.zeros(2)}, "optimizer": Trap(mark)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(GrexError, match="system, which is not data; nothing was run"):
        read_checkpoint(file)
    assert not mark.exists()


def test_numpy_pickles_of_every_protocol_are_read(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True]), "c": np.asfortranarray(np.ones((2, 3)))}
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}, protocol=protocol))
        state, beside = read_checkpoint(tmp_path / "x.pkl")
        assert beside == ["__author__", "matching_heuristics"]
        assert all(np.array_equal(state[key].numpy(), value) for key, value in arrays.items())


def test_training_checkpoints_and_bare_dicts_are_read(tmp_path: Path) -> None:
    weights = {"a": torch.randn(3)}
    torch.save({"model": weights, "optimizer": {"state": {0: {"x": np.float64(2.0)}}}, "iteration": 7}, tmp_path / "x.pth")
    state, beside = read_checkpoint(tmp_path / "x.pth")
    assert torch.equal(state["a"], weights["a"]) and beside == ["optimizer", "iteration"]
    torch.save(weights, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "x.pth")[1] == []


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["pth", "pkl", "safetensors"])
def test_truncated_files_are_named(tmp_path: Path, kind: str, share: float) -> None:
    from safetensors.torch import save_file

    file, weights = tmp_path / f"x.{kind}", {"a": torch.randn(2000)}
    if kind == "pth":
        torch.save({"model": weights}, file)
    elif kind == "pkl":
        file.write_bytes(pickle.dumps({"model": {"a": weights["a"].numpy()}}))
    else:
        save_file(weights, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(GrexError, match="cannot be read"):
        read_checkpoint(file)


def test_files_of_other_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    for content, words in ((torch.zeros(2), "holds a Tensor"), ({"model": {}}, "no tensors"), ({"a": "text"}, "entry a is a str")):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(GrexError, match=words):
            read_checkpoint(tmp_path / "x.pth")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": np.array(["text"])}))
    with pytest.raises(GrexError, match="entry a is a ndarray"):
        read_checkpoint(tmp_path / "x.pkl")


def spelled(net: SwinTransformer, spelling: str) -> dict[str, torch.Tensor]:
    """Return the network's weights as the original, detectron2's tool, or timm would name them, classifier and constants included."""
    state = {}
    for name, tensor in net.state_dict().items():
        if name.startswith("norms."):
            continue
        key = name.replace("stages.", "layers.", 1)
        if spelling.startswith("timm"):
            key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m.group(1)) + 1}.downsample", key)
        if spelling == "timm_flat":
            key = re.sub(r"layers\.(\d)\.", r"layers_\1.", key)
        state[key] = tensor
    head = "head.fc" if spelling == "timm" else "head"
    state |= {
        "norm.weight": torch.ones(64),
        "norm.bias": torch.zeros(64),
        f"{head}.weight": torch.zeros(5, 64),
        f"{head}.bias": torch.zeros(5),
    }
    layer = "layers_1" if spelling == "timm_flat" else "layers.1"
    return {
        **state,
        f"{layer}.blocks.1.attn_mask": torch.zeros(4, 9, 9),
        f"{layer}.blocks.0.attn.relative_position_index": torch.zeros(9, 9),
    }


@pytest.mark.parametrize("spelling", ["original", "pickled", "timm", "timm_flat"])
def test_swin_weights_reach_a_fusing_encoder(tmp_path: Path, spelling: str) -> None:
    torch.manual_seed(0)
    plain = SwinTransformer(TINY, text_width=6).eval()
    state = spelled(plain, spelling)
    file = tmp_path / "swin.pth"
    if spelling == "pickled":
        arrays = {key: tensor.numpy() for key, tensor in state.items()}
        file.write_bytes(pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}))
    else:
        torch.save({"model": state}, file)
    done = convert_swin(file, tmp_path / "swin.safetensors")
    assert done.mapped + sum(number for rule, number in done.ignored.items() if "beside" not in rule) == len(state)
    assert "swin_depths: [1, 2, 1, 1], swin_heads: [1, 2, 2, 4], window: 3" in done.notes[0]
    fusing: Any = build_vision(VisionConfig(**{**vars(TINY), "fusion": "pwam", "weights": str(tmp_path / "swin.safetensors")}), 6).eval()
    image = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        for ours, theirs in zip(fusing(image), plain(image)):
            assert torch.equal(ours, theirs)
    with pytest.raises(GrexError, match="exists"):
        convert_swin(file, tmp_path / "swin.safetensors")


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "other"])
def test_wrong_swin_weights_write_nothing(tmp_path: Path, how: str) -> None:
    state = spelled(SwinTransformer(TINY, text_width=6), "original")
    words = {
        "missing": "1 missing: stages.2.blocks.0.mlp.fc1.weight",
        "extra": "logit_scale",
        "shape": "of another shape",
        "other": "no Swin has",
    }
    if how == "missing":
        del state["layers.2.blocks.0.mlp.fc1.weight"]
    elif how == "extra":
        state["layers.2.blocks.0.attn.logit_scale"] = torch.zeros(2)
    elif how == "shape":
        state["layers.2.blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    else:
        state = {"conv1.weight": torch.zeros(4)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(GrexError, match=words[how]):
        convert_swin(tmp_path / "x.pth", tmp_path / "out.safetensors")
    assert [item.name for item in tmp_path.iterdir()] == ["x.pth"]


def torchvision_names(net: Any) -> dict[str, torch.Tensor]:
    """Return a ResNet's weights under torchvision's names, with classifier and batch counts."""
    state = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3), "bn1.num_batches_tracked": torch.tensor(5)}
    for name, tensor in net.state_dict().items():
        key = re.sub(r"^stem\.(conv)\.", r"\g<1>1.", re.sub(r"^stem\.norm\.", "bn1.", name))
        key = re.sub(r"stages\.(\d)", lambda match: f"layer{int(match.group(1)) + 1}", key)
        key = key.replace("shortcut.conv", "downsample.0").replace("shortcut.norm", "downsample.1").replace(".norm", ".bn")
        state[key] = tensor
    return state


def detectron_names(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Rename as detectron2's tool does."""
    made = {}
    for key, tensor in state.items():
        key = re.sub(r"^layer(\d)", lambda match: f"res{int(match.group(1)) + 1}", key) if key.startswith("layer") else f"stem.{key}"
        key = re.sub(r"bn(\d)", r"conv\1.norm", key).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        made[key] = tensor.numpy()
    return made


@pytest.mark.parametrize("spelling", ["torchvision", "detectron"])
def test_resnet_weights(tmp_path: Path, spelling: str) -> None:
    from grex_mllm.convert.resnet import convert_resnet
    from grex_mllm.models.resnet import ResNet

    config = VisionConfig(name="resnet", stem_width=4, widths=[8, 8, 16, 16], bottleneck_widths=[4, 4, 8, 8], depths=[2, 1, 1, 3])
    net = ResNet(config).eval()
    for name, tensor in net.state_dict().items():
        tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith("var") else -0.2))
    state = torchvision_names(net)
    file = tmp_path / "resnet.bin"
    if spelling == "torchvision":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps({"model": detectron_names(state), "__author__": "torchvision", "matching_heuristics": True}))
    done = convert_resnet(file, tmp_path / "resnet.safetensors")
    assert "depths: [2, 1, 1, 3]" in done.notes[0]
    again = build_vision(VisionConfig(**{**vars(config), "weights": str(tmp_path / "resnet.safetensors")}), 6).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(image), net(image)))
    state.pop("layer2.0.conv3.weight")
    torch.save(state, file)
    with pytest.raises(GrexError, match=r"lacks stages\.1\.0\.conv3\.weight"):
        convert_resnet(file, tmp_path / "other.safetensors")
    torch.save({"conv1_w": torch.zeros(2)}, file)
    with pytest.raises(GrexError, match="no torchvision ResNet"):
        convert_resnet(file, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_the_verb_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from grex_mllm.convert.command import run_convert

    with pytest.raises(GrexError, match="adapters, rela, swin, resnet, check"):
        run_convert("bert", ["x"], "y")
    with pytest.raises(GrexError, match="without --out"):
        run_convert("swin", ["x"])
    with pytest.raises(GrexError, match="1 paths"):
        run_convert("check", ["x"])
    with pytest.raises(GrexError, match="--config"):
        run_convert("swin", ["x"], "y", config="z")
    torch.save(spelled(SwinTransformer(TINY, text_width=6), "timm"), tmp_path / "x.pth")
    assert run_convert("swin", [str(tmp_path / "x.pth")], str(tmp_path / "swin.safetensors")) == 0
    assert "ignored 4: classifier" in capsys.readouterr().out
