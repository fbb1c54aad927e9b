"""Which attention `auto` means, on which device and with which packages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers.utils.import_utils as found

from grex_mllm.models.attention_choice import choose_attention

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A GPU of compute capability 9.0 without any package."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    for name in ("is_flash_attn_2_available", "is_flash_attn_3_available", "is_kernels_available"):
        monkeypatch.setattr(found, name, lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return monkeypatch


def have(machine: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        machine.setattr(found, name, lambda: True)


def test_what_is_named_is_taken(machine: pytest.MonkeyPatch) -> None:
    assert choose_attention("eager", GPU, torch.bfloat16).name == "eager"


def test_a_cpu_and_float32_have_none(machine: pytest.MonkeyPatch) -> None:
    have(machine, "is_flash_attn_2_available", "is_flash_attn_3_available")
    cpu, wide = choose_attention("auto", CPU, torch.bfloat16), choose_attention("auto", GPU, torch.float32)
    assert cpu.name is None and "this is cpu" in cpu.reason
    assert wide.name is None and "this is float32" in wide.reason


def test_the_newest_that_the_gpu_can(machine: pytest.MonkeyPatch) -> None:
    assert choose_attention("auto", GPU, torch.bfloat16).name is None
    have(machine, "is_flash_attn_2_available")
    assert choose_attention("auto", GPU, torch.bfloat16).name == "flash_attention_2"
    have(machine, "is_flash_attn_3_available")
    assert choose_attention("auto", GPU, torch.bfloat16).name == "flash_attention_3"
    machine.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    assert choose_attention("auto", GPU, torch.float16).name == "flash_attention_2"
    machine.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    old = choose_attention("auto", GPU, torch.float16)
    assert old.name is None and "7.5" in old.reason


def test_a_kernel_of_the_hub_only_where_it_lies_here_already(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    have(machine, "is_kernels_available")
    assert choose_attention("auto", GPU, torch.bfloat16).name is None
    (tmp_path / "models--kernels-community--flash-attn2" / "snapshots").mkdir(parents=True)
    assert choose_attention("auto", GPU, torch.bfloat16).name == "kernels-community/flash-attn2"
    (tmp_path / "models--kernels-community--vllm-flash-attn3" / "snapshots").mkdir(parents=True)
    assert choose_attention("auto", GPU, torch.bfloat16).name == "kernels-community/vllm-flash-attn3"
    machine.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    assert choose_attention("auto", GPU, torch.bfloat16).name == "kernels-community/flash-attn2"
