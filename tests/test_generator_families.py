"""The generator on language models of the real families: frames, sizes, ends, settings, learning, files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from operator import eq
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generator import CHANNELS, TEXTS, scene
from tiny_llms import ADDS_BOS, FAMILIES, UNUSED, spoil_generation_config, write_llm

from grex_mllm.errors import GrexError
from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig
from grex_mllm.models.generators.region_tokens.network import RegionTokenGenerator
from grex_mllm.models.lm_framing import INSTRUCTION, PLACE
from grex_mllm.models.lm_tokenizer import LMTokenizer

SMALL = RegionTokensConfig(lora_rank=16, lora_alpha=32.0, projector_width=64, image_grid=0, max_new_tokens=24)
CHATS = [name for name, family in FAMILIES.items() if family.template]
SOME = ("qwen3", "gemma2")  # in every run; the others are long
ALL = [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return the folder of a family's tiny model; written once."""

    @cache
    def write(name: str) -> Path:
        return write_llm(name, tmp_path_factory.mktemp(name), [*TEXTS, INSTRUCTION] * 2)

    return write


def build(path: Path, seed: int = 0, **changes: Any) -> RegionTokenGenerator:
    torch.manual_seed(seed)
    cfg = replace(SMALL, lm=str(path), **changes)
    return RegionTokenGenerator(cfg, CHANNELS, LMTokenizer.load(path, cfg.prompt_style))


def learn(generator: RegionTokenGenerator, steps: int) -> float:
    """Train on the eight sets of `scene`; return the last loss, nats a token."""
    inputs = scene()
    ids, mask = generator.tokenizer.encode(TEXTS)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 5) * (1 - step / steps)
        loss = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return loss.item()


def first_inputs(generator: RegionTokenGenerator) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer gets, [rows, D]: from the region tokens, and from text."""
    layers = next(m for m in generator.lm.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    seen: list[torch.Tensor] = []
    hook = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    prefix = generator.prefix(**scene())  # type: ignore[arg-type]
    generator.lm(inputs_embeds=prefix.embeds, attention_mask=prefix.mask.long())
    generator.lm(input_ids=torch.tensor([generator.tokenizer.text_ids(" ".join(TEXTS))]))
    hook.remove()
    before, after = len(generator.frame.before), len(generator.frame.after)
    end = prefix.embeds.shape[1] - after
    return seen[0][:, before:end][prefix.mask[:, before:end]], seen[1][0]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_region_tokens_arrive_as_large_as_text(name: str, folder: Folder) -> None:
    regions, text = first_inputs(build(folder(name)))
    ratio = regions.square().mean().sqrt() / text.square().mean().sqrt()
    assert 1 / 1.5 < float(ratio) < 1.5


@pytest.mark.parametrize("prompt", ["", "{regions} Name these.", "Look: {regions}", "The marked {regions} are what?"])
@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_the_chat_template(name: str, prompt: str, folder: Folder) -> None:
    """A special token of the family's own, which splits text as a region token does, stands in the regions' place."""
    generator = build(folder(name), prompt=prompt)
    hf, frame = generator.tokenizer.hf, generator.frame
    asked = [{"role": "user", "content": (prompt or INSTRUCTION).replace(PLACE, UNUSED)}]
    ids = hf.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False, date_string="26 Jul 2024"
    )
    at = ids.index(hf.convert_tokens_to_ids(UNUSED))
    assert [frame.before, [*frame.after, frame.opener]] == [ids[:at], ids[at + 1 :]]
    assert (hf.bos_token_id in ids) == (name in ADDS_BOS) and (not frame.before or hf.bos_token_id not in ids[1:])
    embeds, mask = generator.prefix(**scene()).open(generator.lm, frame.opener)  # type: ignore[arg-type]
    embed = generator.lm.get_input_embeddings()
    assert bool(mask[:, : len(frame.before)].all())
    assert torch.equal(embeds[0, : len(frame.before)], embed(torch.tensor(frame.before, dtype=torch.int64)))
    assert torch.equal(embeds[3, -1 - len(frame.after) : -1], embed(torch.tensor(frame.after, dtype=torch.int64)))


def test_thinking_is_off_and_no_day_changes_a_model(folder: Folder) -> None:
    qwen = build(folder("qwen3"))
    assert qwen.tokenizer.hf.decode([*qwen.frame.after, qwen.frame.opener]).endswith("<think>\n\n</think>\n\n")
    llama = build(folder("llama"))
    assert "Today Date: 26 Jul 2024" in llama.tokenizer.hf.decode(llama.frame.before)


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_style_opens_with_bos_and_a_separator(name: str, folder: Folder) -> None:
    generator = build(folder(name), prompt_style="plain")
    hf, frame = generator.tokenizer.hf, generator.frame
    assert frame.before == ([hf.bos_token_id] if name in ADDS_BOS else [])
    assert frame.opener not in hf.all_special_ids and hf.decode([*frame.after, frame.opener]).strip(" ") == "\n"
    assert generator.tokenizer.eos_id == hf.eos_token_id
    asked = build(folder(name), prompt_style="plain", prompt="See {regions} and say").frame
    assert hf.decode([*asked.after, asked.opener]).strip() == "and say"
    assert hf.decode(asked.before, skip_special_tokens=True).strip() == "See"


@pytest.mark.parametrize("name", FAMILIES)
def test_end_and_adapters_of_a_family(name: str, folder: Folder) -> None:
    family, generator = FAMILIES[name], build(folder(name))
    tokenizer = generator.tokenizer
    end = tokenizer.hf.convert_tokens_to_ids(family.end)
    ids, mask = tokenizer.encode(TEXTS)
    assert tokenizer.eos_id == end and [int(row[n - 1]) for row, n in zip(ids, mask.sum(1), strict=True)] == [end] * len(TEXTS)
    assert [tokenizer.decode(row.tolist()) for row in ids] == TEXTS
    assert tokenizer.decode(tokenizer.encode(["a dog , it 's red ."])[0][0].tolist()) == "a dog , it 's red ."
    others = {tokenizer.hf.convert_tokens_to_ids(token) for token in (family.bos, family.eos, UNUSED, *family.special) if token} - {end}
    assert others <= set(generator.banned) and end not in generator.banned
    assert set(range(len(tokenizer), len(tokenizer) + 7)) <= set(generator.banned)
    assert generator.lm.peft_config["default"].target_modules == set(family.linear)
    assert not any("lm_head" in key or "embed" in key for key in generator.state_dict() if "lora_" in key)


@pytest.mark.parametrize("name", ALL)
def test_learns_eight_object_sets_and_loads_again(name: str, folder: Folder, tmp_path: Path) -> None:
    """After 30 steps greedy answers end where they should; generation settings of the folder have no say in any mode.

    Alone, with AdamW, rounding decides whether two sets of which one holds the other are told apart (7 or 8 right, by machine); the joint
    training of test_family_training.py learns all eight.
    """
    from safetensors.torch import load_file, save_file

    path, changes = folder(name), {"lora_alpha": 64.0 if name.startswith("gemma") else 32.0}  # Gemma's stream is larger
    generator = build(path, **changes)
    learn(generator, 30)
    greedy = [answer for [answer] in generator.generate_batch(**scene())]  # type: ignore[arg-type]
    assert sum(map(eq, greedy, TEXTS)) >= 6 and set(greedy) <= set(TEXTS)
    modes = ({"mode": "beam", "num_beams": 3}, {"mode": "sample", "num_candidates": 2, "temperature": 3.0})
    answers = [generator.generate_batch(**scene(), **options) for options in modes]  # type: ignore[arg-type]
    save_file(generator.eval().state_dict(), tmp_path / "generator.safetensors")
    assert not any(key.startswith("lm.") and "lora_" not in key for key in generator.state_dict())
    spoil_generation_config(path)
    again = build(path, seed=1, **changes)
    again.load_state_dict(load_file(tmp_path / "generator.safetensors"), strict=True)
    assert [answer for [answer] in again.generate_batch(**scene())] == greedy  # type: ignore[arg-type]
    assert [again.generate_batch(**scene(), **options) for options in modes] == answers  # type: ignore[arg-type]
    assert {best for best, *_ in answers[0]} <= set(TEXTS)


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_quantised_base_learns_as_well(quantisation: str, folder: Folder) -> None:
    generator = build(folder("qwen3"), quantisation=quantisation)
    with torch.no_grad():
        regions, text = first_inputs(generator)
    assert 1 / 1.5 < float(regions.square().mean().sqrt() / text.square().mean().sqrt()) < 1.5
    assert generator.lm.peft_config["default"].target_modules == set(FAMILIES["qwen3"].linear)
    assert learn(generator, 30) < 0.5
    assert sum(answer == text for [answer], text in zip(generator.generate_batch(**scene()), TEXTS, strict=True)) >= 6  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"lora_rslora": True}, {"lora_dora": True}, {"lora_targets": "q_proj"}, {"lora_targets": ["v_proj"]}])
@torch.no_grad()
def test_kinds_of_adapters(change: dict[str, Any], folder: Folder) -> None:
    """Each starts as the base alone does, has the layers and scale that it should, and is part of what is saved."""
    generator, plain = build(folder("qwen3"), **change), build(folder("qwen3"))
    ids, mask = generator.tokenizer.encode(TEXTS)
    plain.region_tokens.load_state_dict(generator.region_tokens.state_dict())
    losses = [g.likelihood(**scene(), lm_ids=ids, lm_mask=mask).loss for g in (generator, plain)]  # type: ignore[arg-type]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    layers = {name.split(".lora_A")[0].rsplit(".", 1)[-1]: m for name, m in generator.lm.named_modules() if hasattr(m, "lora_A")}
    scale = 32 / 16**0.5 if "lora_rslora" in change else 2.0
    assert {m.scaling["default"] for m in layers.values()} == {scale}
    assert any("magnitude" in key for key in generator.state_dict()) == ("lora_dora" in change)
    if "lora_targets" in change:
        assert set(layers) == set([change["lora_targets"]] if isinstance(change["lora_targets"], str) else change["lora_targets"])


def test_knobs_as_flags_of_the_command_line() -> None:
    from grex_mllm.config import load_config

    def chosen(*flags: str) -> Any:
        return load_config(None, [f"--model.generator.{flag}" for flag in ("lm=tiny", *flags)]).model.generator

    assert chosen().lora_targets == "auto" and chosen("lora_targets=[q_proj, v_proj]").lora_targets == ["q_proj", "v_proj"]
    assert chosen("prompt_style=plain").prompt_style == "plain" and chosen("lora_dora=true").lora_dora


@pytest.mark.parametrize("kind", ["Qwen2_5_VLConfig", "LlavaConfig", "Gemma3Config"])
def test_multimodal_folder_is_refused(kind: str, folder: Folder, tmp_path: Path) -> None:
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path)
    tokenizer = LMTokenizer.load(folder("qwen2"))
    with pytest.raises(GrexError, match=r"multimodal model .*vision_config.*expected a causal language model of text alone.*Qwen2.5-7B"):
        RegionTokenGenerator(replace(SMALL, lm=str(tmp_path)), CHANNELS, tokenizer)


def test_model_that_is_no_causal_lm_is_refused(folder: Folder, tmp_path: Path) -> None:
    import transformers

    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(GrexError, match=r"AutoModelForCausalLM[^;]*; expected a folder"):
        RegionTokenGenerator(replace(SMALL, lm=str(tmp_path)), CHANNELS, LMTokenizer.load(folder("qwen2")))


@pytest.mark.parametrize(
    ("name", "style", "template", "message"),
    [
        ("phi", "chat", None, "no chat template"),
        ("qwen2", "talk", None, "prompt_style 'talk'"),
        ("qwen2", "auto", "{{ raise_exception('no users') }}", "no users"),
        ("qwen2", "chat", "{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "writes 2 times"),
    ],
)
def test_faulty_styles(name: str, style: str, template: str | None, message: str, folder: Folder) -> None:
    hf = LMTokenizer.load(folder(name), "plain").hf
    hf.chat_template = template or hf.chat_template
    with pytest.raises(GrexError, match=message):
        LMTokenizer(hf, style)
