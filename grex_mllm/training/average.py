"""A running average of the weights, for evaluation and the saved model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.compat import foreach


class WeightAverage:
    """Keep an exponential moving average of the trainable parameters of a model (Polyak averaging).

    The decay after n updates is min(decay, (1 + n) / (10 + n)), so that random initial weights are forgotten at once.
    """

    def __init__(self, model: nn.Module, decay: float = 0.998) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected a number in [0, 1); 0 follows the weights themselves")
        self.decay = decay
        self.num_updates = 0
        self.shadow = {name: parameter.detach().clone() for name, parameter in _averaged(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights; call once after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        live = [parameter.detach() for _, parameter in _averaged(model)]
        foreach("lerp_")(list(self.shadow.values()), live, 1 - decay)

    @contextmanager
    def swap(self, model: nn.Module) -> Iterator[None]:
        """Put the averaged weights into the model within the block and the trained ones back after it, whatever happens there."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def state_dict(self) -> dict[str, Any]:
        """Return {"num_updates": int, "shadow": name -> tensor}."""
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; raises ValueError where its names are not this model's."""
        unlike = state["shadow"].keys() ^ self.shadow.keys()
        if unlike:
            names = ", ".join(sorted(unlike)[:5])
            raise ValueError(f"weight average has other parameters ({names}); expected this model's; resume with its own checkpoint")
        self.num_updates = int(state["num_updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in _averaged(model):
            kept: Tensor = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)


def _averaged(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
