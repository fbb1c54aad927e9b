"""The output layer runs for the tokens that count alone, and gives what it gives for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_generator import TEXTS
from tiny_llms import FAMILIES, write_llm

from grex_mllm.models.lm_decoding import position_ids
from grex_mllm.models.lm_loss import token_losses

SOME = ("qwen3", "gemma2")
ALL = [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]


@pytest.mark.parametrize("family", ALL)
def test_losses_and_gradients_are_those_of_all_logits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(write_llm(family, tmp_path, TEXTS * 2), dtype=torch.float32)
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 0]]).bool()
    ids, real = torch.randint(5, 20, (3, 3)), mask[:, -3:]
    start = torch.randn(3, 7, lm.get_input_embeddings().weight.shape[1]) * 0.1
    rows: list[int] = []
    hook = lm.get_output_embeddings().register_forward_hook(lambda _module, inputs, _out: rows.append(inputs[0].shape[:-1].numel()))
    embeds = start.clone().requires_grad_()
    losses = token_losses(lm, embeds, mask, ids, real)
    losses.sum().backward()
    hook.remove()
    assert rows == [int(real.sum())] == [6]
    plain = start.clone().requires_grad_()
    logits = lm(inputs_embeds=plain, attention_mask=mask.long(), position_ids=position_ids(mask)).logits[:, -4:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(3, 3) * real
    expected.sum().backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embeds.grad, plain.grad, rtol=1e-3, atol=1e-4)
    assert lm(input_ids=ids).logits.shape[:2] == (3, 3)  # the model itself is as it was
