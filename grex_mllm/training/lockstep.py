"""Free answers of a language model whose weights ZeRO-3 holds in partitions: the processes call it together, however often each wants.

Its hooks gather weights on all processes at once, but one process answers more, or longer, than another. Before each call the processes
tell which one they want; all do the lowest of these: those that want another one, or none any more, on a stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grex_mllm.models.lm_loading import partitioned_lm
from grex_mllm.training.engine import votes

if TYPE_CHECKING:
    from accelerate import Accelerator

NOTHING, EMBEDDING, ON_EMBEDDINGS, ON_IDS = range(4)  # what a process wants; the last two: of the whole language model


@contextmanager
def in_lockstep(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """Let each process call the partitioned language model of a module as often as it likes within the block; all processes enter it."""
    lm = partitioned_lm(module)
    if lm is None:
        yield
        return
    calls = _Calls(accelerator, lm)
    hooks = [
        lm.register_forward_pre_hook(calls.before_model, with_kwargs=True, prepend=True),  # before those that gather weights
        lm.register_forward_hook(calls.after_model),
        lm.get_input_embeddings().register_forward_pre_hook(calls.before_embedding, prepend=True),
    ]
    try:
        yield
        calls.meet(NOTHING)
    finally:
        for hook in hooks:
            hook.remove()


class _Calls:
    """The calls of one language model. inside: it is running, so calls of its embedding are its own."""

    def __init__(self, accelerator: Accelerator, lm: Any) -> None:
        self.accelerator, self.lm, self.inside = accelerator, lm, False

    def before_model(self, _module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        if not self.inside:
            self.meet(ON_EMBEDDINGS if given.get("inputs_embeds") is not None else ON_IDS)
        self.inside = True

    def after_model(self, *_: Any) -> None:
        self.inside = False

    def before_embedding(self, *_: Any) -> None:
        if not self.inside:
            self.meet(EMBEDDING)

    def meet(self, wanted: int) -> None:
        """Return when it is this call's turn; for NOTHING when no process wants anything any more."""
        while True:
            asked = [row[0] for row in votes(self.accelerator, wanted) if row[0] != NOTHING]
            turn = min(asked, default=NOTHING)
            if turn == wanted:
                return
            self._stand_in(turn)

    @torch.no_grad()
    def _stand_in(self, turn: int) -> None:
        self.inside = True
        ids = torch.zeros(1, 1, dtype=torch.int64, device=self.accelerator.device)
        if turn == ON_IDS:
            self.lm(input_ids=ids, use_cache=False)
        else:
            weight = next(self.lm.get_input_embeddings().parameters())
            if turn == EMBEDDING:
                self.lm.get_input_embeddings()(ids)
            else:
                self.lm(inputs_embeds=torch.zeros(1, 1, weight.ds_shape[1], dtype=weight.dtype, device=ids.device), use_cache=False)
        self.inside = False
