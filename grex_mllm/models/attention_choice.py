"""`attn_implementation: auto`: the fastest attention that a language model, its dtype and this machine allow, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

HOPPER, AMPERE = (9, 0), (8, 0)  # compute capabilities
NARROW = (torch.float16, torch.bfloat16)


class Choice(NamedTuple):
    """name: as transformers calls it, None = its own default (sdpa where the family can, else eager).  reason: for the log."""

    name: str | None
    reason: str


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return what `wanted` means on a device for a language model that computes in dtype.

    auto, on a CUDA GPU in half precision: flash_attention_3 (from compute capability 9.0, with its package), flash_attention_2 (from 8.0,
    with its package), a kernel of kernels-community that lies in the local hub cache already (nothing is downloaded); else torch's
    scaled_dot_product_attention, which has a flash kernel of its own.
    """
    if wanted != "auto":
        return Choice(wanted, "model.generator.attn_implementation names it")
    if device.type != "cuda":
        return Choice(None, f"flash attention packages want a CUDA GPU, this is {device.type}")
    if dtype not in NARROW:
        return Choice(None, f"flash attention packages want float16 or bfloat16, this is {str(dtype).removeprefix('torch.')}")
    capability = torch.cuda.get_device_capability(device)
    return _installed(capability) or Choice(None, f"no flash attention package for compute capability {'.'.join(map(str, capability))}")


def _installed(capability: tuple[int, int]) -> Choice | None:
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

    if capability >= HOPPER and is_flash_attn_3_available():
        return Choice("flash_attention_3", "its package is installed, and the GPU is of compute capability 9.0 or higher")
    if capability >= AMPERE and is_flash_attn_2_available():
        return Choice("flash_attention_2", "the package flash-attn is installed")
    if capability >= AMPERE and is_kernels_available():
        for name in ("kernels-community/vllm-flash-attn3", "kernels-community/flash-attn2")[capability < HOPPER :]:
            if _cached(name):
                return Choice(name, "the package kernels is installed, and this kernel lies in the local hub cache")
    return None


def _cached(repository: str) -> bool:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folders = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind) for kind in ("model", "kernel")]
    return any((folder / "snapshots").is_dir() for folder in folders)
