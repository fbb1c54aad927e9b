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
