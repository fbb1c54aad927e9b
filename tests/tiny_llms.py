"""Tiny random language models of the real families: configuration classes, trained tokenizers with the families' special tokens, templates.

The templates are written after those that the families publish, shortened to what a question and an answer need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BYTES = [f"<0x{value:02X}>" for value in range(256)]
UNUSED = "<|unused|>"  # a special token that no template writes

LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim"
    " + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
QWEN2 = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN3 = (
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + content + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


class Family(NamedTuple):
    """kind: of tokenizer (byte | metaspace | prepend | replace).  special: its tokens besides bos, eos, pad.  end: of an answer.

    linear: the layers of attention and MLP.  plain: tokens that the tokenizer knows whole but that are not special.
    """

    config: str
    kind: str
    bos: str | None
    eos: str
    pad: str | None
    special: tuple[str, ...]
    end: str
    template: str | None
    linear: tuple[str, ...]
    plain: tuple[str, ...] = ()


LLAMA_LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
CHATML = ("<|im_start|>", "<|im_end|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
FAMILIES = {
    "llama": Family("LlamaConfig", "byte", "<|begin_of_text|>", "<|eot_id|>", None,
                    ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>", LLAMA, LLAMA_LAYERS),
    "qwen2": Family("Qwen2Config", "byte", None, "<|im_end|>", "<|endoftext|>", CHATML[:1], "<|im_end|>", QWEN2, LLAMA_LAYERS),
    "qwen3": Family("Qwen3Config", "byte", None, "<|im_end|>", "<|endoftext|>", CHATML[:1], "<|im_end|>", QWEN3, LLAMA_LAYERS,
                    ("<think>", "</think>")),
    "mistral": Family("MistralConfig", "metaspace", "<s>", "</s>", None, ("[INST]", "[/INST]"), "</s>", MISTRAL, LLAMA_LAYERS),
    "gemma2": Family("Gemma2Config", "replace", "<bos>", "<eos>", "<pad>", TURNS, "<end_of_turn>", GEMMA, LLAMA_LAYERS),
    "gemma3": Family("Gemma3TextConfig", "replace", "<bos>", "<eos>", "<pad>", TURNS, "<end_of_turn>", GEMMA, LLAMA_LAYERS),
    "phi": Family("PhiConfig", "byte", "<|endoftext|>", "<|endoftext|>", None, (), "<|endoftext|>", None,
                  ("dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj")),
    "phi3": Family("Phi3Config", "prepend", "<s>", "<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
                   "<|end|>", PHI3, ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")),
}  # fmt: skip
ADDS_BOS = ("llama", "mistral", "gemma2", "gemma3")


def write_llm(name: str, folder: Path, lines: Sequence[str], seed: int = 0, shard: str = "50GB", **larger: int) -> Path:
    """Write a tiny random model of a family with its tokenizer into a folder, and return that. shard: bytes of a file, at most.

    larger: other sizes than the tiny ones.
    """
    import transformers

    family = FAMILIES[name]
    tokenizer = train_tokenizer(name, lines)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 7, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if name.startswith("gemma"):
        sizes["query_pre_attn_scalar"] = 16  # as ever, the width of a head; left at 256, attention is even
    config = getattr(transformers, family.config)(**sizes | larger)
    torch.manual_seed(seed)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    lm.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    lm.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def spoil_generation_config(folder: Path) -> None:
    """Give a model folder settings of its own for generation, as hubs' models have them, only worse."""
    settings = {"repetition_penalty": 2.0, "temperature": 0.1, "top_p": 0.3, "top_k": 2, "do_sample": True, "no_repeat_ngram_size": 1}
    settings |= {"length_penalty": -5.0, "max_length": 9, "num_beams": 2, "early_stopping": True}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")


def train_tokenizer(name: str, lines: Sequence[str]) -> Any:
    """Return a tokenizer of the family's kind, trained on lines, with its special tokens and chat template."""
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    named = [token for token in (family.bos, family.eos, family.pad) if token]
    special = list(dict.fromkeys(["<unk>", *named, *family.special, UNUSED]))
    made = (_byte_level if family.kind == "byte" else _sentencepiece)(family.kind, special, lines)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=name == "phi3" and token in family.special)
                             for token in special])  # fmt: skip
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if name in ADDS_BOS:
        bos = str(family.bos)
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))]
        )
    names = {key: token for key, token in zip(("bos_token", "eos_token", "pad_token"), family[2:5], strict=True) if token}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", clean_up_tokenization_spaces=name == "llama", **names)
    tokenizer.chat_template = family.template
    return tokenizer


def _byte_level(_kind: str, special: list[str], lines: Sequence[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(lines, trainer)
    return made


def _sentencepiece(kind: str, special: list[str], lines: Sequence[str]) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space: dict[str, Callable[[], None]] = {
        "metaspace": lambda: setattr(made, "pre_tokenizer", pre_tokenizers.Metaspace(prepend_scheme="first", split=True)),
        "prepend": lambda: setattr(made, "normalizer", normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])),
        "replace": lambda: setattr(made, "normalizer", normalizers.Replace(" ", "▁")),
    }
    space[kind]()
    if kind != "metaspace":
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=[*special, *BYTES], show_progress=False)
    made.train_from_iterator(lines, trainer)
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in BYTES]
    made = Tokenizer.from_str(json.dumps(state))
    start = [] if kind == "replace" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *start])
    return made
