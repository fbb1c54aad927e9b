"""Gradient checkpointing: keep a block's inputs alone, and run it again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Return block(*inputs). recompute: where gradients are wanted, what the block computes inside is not kept but computed again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
