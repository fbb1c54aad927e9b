"""The language model under the generator: text training, folders, quantisation, faults."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grex_mllm.errors import GrexError
from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig
from grex_mllm.models.generators.region_tokens.network import RegionTokenGenerator
from grex_mllm.models.lm_tokenizer import LMTokenizer, train_sentencepiece
from grex_mllm.training.lm import train_language_model

LINES = [
    f"the {size} {colour} {shape}"
    for size in ("small", "large")
    for colour in ("red", "blue", "green")
    for shape in ("ring", "star", "cross")
]
SMALL = RegionTokensConfig(lm="tiny", hidden_size=64, num_layers=2, num_heads=2, intermediate_size=64, lora_rank=4, projector_width=32)
CHANNELS = [8]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LMTokenizer:
    return train_sentencepiece(LINES, tmp_path_factory.mktemp("tokenizer"), 320)


@pytest.fixture(scope="module")
def lm_folder(tokenizer: LMTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as a user's own LLM would lie on disk."""
    folder = tmp_path_factory.mktemp("lm")
    torch.manual_seed(0)
    RegionTokenGenerator(replace(SMALL, lora_rank=0), CHANNELS, tokenizer).lm.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def inputs() -> dict:
    torch.manual_seed(7)
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 2:6, 3:9] = mask[1, 9:15, 8:14] = True
    return {
        "features": [torch.randn(1, 8, 8, 8)],
        "instance_masks": [mask],
        "image_index": torch.tensor([0, 0]),
        "target_index": [torch.tensor([0]), torch.tensor([0, 1])],
    }


def one_step(generator: RegionTokenGenerator, tokenizer: LMTokenizer) -> tuple[float, float]:
    """Loss before and after one step of training."""
    ids, mask = tokenizer.encode(LINES[:2])
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=1e-2)
    before = generator.likelihood(**inputs(), lm_ids=ids, lm_mask=mask).loss
    before.backward()
    gradients = [p.grad for p in generator.parameters() if p.requires_grad]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    # LoRA's A gets its first gradient in the second step, when B is no longer zero
    assert sum(bool(g.any()) for g in gradients) >= len(gradients) - len([n for n, _ in generator.named_parameters() if "lora_A" in n])
    optimizer.step()
    return before.item(), generator.likelihood(**inputs(), lm_ids=ids, lm_mask=mask).loss.item()


@torch.no_grad()
def text_loss(lm: torch.nn.Module, tokenizer: LMTokenizer) -> float:
    """Mean negative log-likelihood of a token of LINES, in nats."""
    ids, mask = tokenizer.encode(LINES)
    logits = lm(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits[mask[:, 1:].bool()], ids[:, 1:][mask[:, 1:].bool()]))


def test_text_training_learns_the_grammar_and_freezes(tokenizer: LMTokenizer) -> None:
    torch.manual_seed(0)
    generator = RegionTokenGenerator(SMALL, CHANNELS, tokenizer)
    trainable = [p.requires_grad for p in generator.parameters()]
    adapters = {k: v.clone() for k, v in generator.state_dict().items() if "lora_" in k}
    seen: list[float] = []
    with generator.text_only() as lm:
        before = text_loss(lm, tokenizer)
        train_language_model(lm, tokenizer, LINES, steps=120, batch=18, lr=5e-3, progress=lambda share, _loss: seen.append(share))
        after = text_loss(lm, tokenizer)
    floor = math.log(len(LINES)) / (sum(len(tokenizer.text_ids(t)) + 1 for t in LINES) / len(LINES))  # entropy of a uniform choice
    assert before > 4 and after < floor + 0.05
    assert seen[-1] == 1.0 and len(seen) == 120
    assert [p.requires_grad for p in generator.parameters()] == trainable
    assert all(torch.equal(v, generator.state_dict()[k]) for k, v in adapters.items())
    assert generator.region_tokens.to_lm[2].weight[0].item() == pytest.approx(
        float(generator.lm.get_input_embeddings().weight.square().mean().sqrt()), rel=1e-4
    )


def test_text_training_is_reproducible(tokenizer: LMTokenizer) -> None:
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        with RegionTokenGenerator(SMALL, CHANNELS, tokenizer).text_only() as lm:
            losses.append(train_language_model(lm, tokenizer, LINES, steps=5, batch=4, seed=seed))
    assert losses[0] == losses[1] != losses[2]


def test_text_training_in_bf16(tokenizer: LMTokenizer) -> None:
    with RegionTokenGenerator(SMALL, CHANNELS, tokenizer).text_only() as lm:
        assert math.isfinite(train_language_model(lm, tokenizer, LINES, steps=2, batch=4, precision="bf16"))


def test_text_training_faults(tokenizer: LMTokenizer, lm_folder: Path) -> None:
    generator = RegionTokenGenerator(SMALL, CHANNELS, tokenizer)
    with generator.text_only() as lm, pytest.raises(GrexError, match="without text"):
        train_language_model(lm, tokenizer, [" "], steps=1)
    named = RegionTokenGenerator(replace(SMALL, lm=str(lm_folder)), CHANNELS, LMTokenizer.load(lm_folder))
    with pytest.raises(GrexError, match="lm: tiny"), named.text_only():
        pass


@pytest.mark.parametrize("quantisation", ["none", "nf4", "int8"])
def test_folder_lm_trains_one_step_and_stores_no_base(quantisation: str, lm_folder: Path, tmp_path: Path) -> None:
    tokenizer = LMTokenizer.load(lm_folder)
    torch.manual_seed(1)
    cfg = replace(SMALL, lm=str(lm_folder), quantisation=quantisation, lora_dropout=0.1, gradient_checkpointing=True)
    generator = RegionTokenGenerator(cfg, CHANNELS, tokenizer)
    kinds = {type(module).__name__ for module in generator.lm.modules()}
    assert {"none": "Linear", "nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantisation] in kinds
    before, after = one_step(generator, tokenizer)
    assert after < before
    assert all("lora_" in key or key.startswith("region_tokens.") for key in generator.state_dict())
    save_file(generator.eval().state_dict(), tmp_path / "generator.safetensors")
    again = RegionTokenGenerator(cfg, CHANNELS, tokenizer).eval()
    again.load_state_dict(load_file(tmp_path / "generator.safetensors"), strict=True)
    ids, mask = tokenizer.encode(LINES[:2])
    assert torch.equal(
        again.likelihood(**inputs(), lm_ids=ids, lm_mask=mask).loss, generator.likelihood(**inputs(), lm_ids=ids, lm_mask=mask).loss
    )


def test_gradient_checkpointing_gives_the_same_gradients(lm_folder: Path) -> None:
    tokenizer, grads = LMTokenizer.load(lm_folder), []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        generator = RegionTokenGenerator(replace(SMALL, lm=str(lm_folder), gradient_checkpointing=checkpointing), CHANNELS, tokenizer)
        ids, mask = tokenizer.encode(LINES[:2])
        generator.likelihood(**inputs(), lm_ids=ids, lm_mask=mask).loss.backward()
        grads.append(generator.region_tokens.to_lm[1].weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_missing_key_of_a_named_lm_is_still_found(lm_folder: Path) -> None:
    generator = RegionTokenGenerator(replace(SMALL, lm=str(lm_folder)), CHANNELS, LMTokenizer.load(lm_folder))
    state = generator.state_dict()
    holder = torch.nn.ModuleDict({"generator": generator})
    holder.load_state_dict({f"generator.{k}": v for k, v in state.items()}, strict=True)
    state.pop("region_tokens.kind.weight")
    with pytest.raises(RuntimeError, match=r"kind\.weight"):
        holder.load_state_dict({f"generator.{k}": v for k, v in state.items()}, strict=True)


def test_float_dtypes_of_a_folder_lm(lm_folder: Path) -> None:
    tokenizer = LMTokenizer.load(lm_folder)
    generator = RegionTokenGenerator(replace(SMALL, lm=str(lm_folder), dtype="bfloat16", attn_implementation="eager"), CHANNELS, tokenizer)
    assert generator.lm.get_input_embeddings().weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in generator.parameters() if p.requires_grad)
    ids, mask = tokenizer.encode(LINES[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generator.likelihood(**inputs(), lm_ids=ids, lm_mask=mask).loss.backward()
    assert generator.generate_batch(**inputs())


def test_lm_of_another_family_without_bos(tokenizer: LMTokenizer, tmp_path: Path) -> None:
    """GPT-2 (learnt positions, Conv1D layers, tied embeddings) with a tokenizer that has neither BOS nor padding token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=2, bos_token_id=2)
    GPT2LMHeadModel(sizes).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    other = LMTokenizer.load(tmp_path)
    other.hf.bos_token = other.hf.pad_token = None
    other = LMTokenizer(other.hf)
    assert other.bos_id == other.eos_id == other.pad_id
    assert other.decode(other.encode(LINES[:1])[0][0].tolist()) == LINES[0]
    generator = RegionTokenGenerator(replace(SMALL, lm=str(tmp_path), lora_targets=["c_attn"], max_new_tokens=5), CHANNELS, other)
    before, after = one_step(generator, other)
    assert after < before
    first = generator.generate_batch(**inputs(), mode="sample", num_candidates=2)
    assert [len(answers) for answers in first] == [2, 2]
    assert all(first[0]) and len(generator.generate_batch(**inputs(), mode="beam", num_candidates=2)[1]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm": "none"}, "lm: none"),
        ({"lm": "./no/such/folder"}, "no/such/folder"),
        ({"quantisation": "nf4"}, "with lm: tiny"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"lora_targets": ["query"]}, "no layer called query"),
        ({"lora_targets": []}, "none given"),
    ],
)
def test_faulty_configurations(tokenizer: LMTokenizer, change: dict, message: str) -> None:
    with pytest.raises(GrexError, match=message):
        RegionTokenGenerator(replace(SMALL, **change), CHANNELS, tokenizer)


@pytest.mark.parametrize(("change", "message"), [({"dtype": "float8"}, "float8"), ({"quantisation": "int3"}, "int3")])
def test_faulty_loading_options(lm_folder: Path, change: dict, message: str) -> None:
    with pytest.raises(GrexError, match=message):
        RegionTokenGenerator(replace(SMALL, lm=str(lm_folder), **change), CHANNELS, LMTokenizer.load(lm_folder))


def test_quantisation_without_bitsandbytes(lm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest))
    with pytest.raises(GrexError, match="pip install bitsandbytes"):
        RegionTokenGenerator(replace(SMALL, lm=str(lm_folder), quantisation="nf4"), CHANNELS, LMTokenizer.load(lm_folder))


def test_tokenizer_of_another_model(lm_folder: Path, tmp_path: Path) -> None:
    larger = train_sentencepiece(["".join(chr(0x4E00 + i) for i in range(300))], tmp_path, 700)
    with pytest.raises(GrexError, match="tokenizer"):
        RegionTokenGenerator(replace(SMALL, lm=str(lm_folder)), CHANNELS, larger)
