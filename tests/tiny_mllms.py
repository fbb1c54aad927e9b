"""Tiny random multimodal language models of the real families, as folders: configuration classes, trained tokenizers, chat templates.

The templates are written after those that the families publish, shortened to what pictures, questions and answers need.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tiny_llms import BYTES, _byte_level, _sentencepiece
from tokenizers import AddedToken, processors

PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)


def chatml(image: str, system: str = "") -> str:
    """Return a ChatML template with this text for a picture; system: what it says where no system turn is given."""
    start = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{% endif %}".replace("SYSTEM", system)
    turns = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}" + PARTS.replace("IMAGE", image)
        + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )  # fmt: skip
    return (start if system else "") + turns


QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
LLAVA = (
    "{% for message in messages %}{{ {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''}[message['role']] }}"
    + PARTS.replace("IMAGE", "<image>\\n")
    + "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (  # has no system turn: its words stand at the beginning of the first question
    "{{ bos_token }}{% set system = messages[0]['role'] == 'system' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{% if system and loop.first %}{{ (messages[0]['content'] if messages[0]['content'] is string"
    " else messages[0]['content'][0]['text']) + '\n\n' }}{% endif %}"
    + PARTS.replace("IMAGE", "<start_of_image>")
    + "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    + PARTS.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class Kind(NamedTuple):
    """config: class.  tokenizer: byte or replace.  bos, eos, pad.  special: further special tokens.  named: attributes of the tokenizer.

    picture: settings of the image processor.  processor: of processor_config.json.
    """

    config: str
    tokenizer: str
    bos: str | None
    eos: str
    pad: str
    special: tuple[str, ...]
    named: dict[str, str]
    template: str
    picture: dict[str, Any]
    processor: dict[str, Any]


VISION_QWEN = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|box_start|>", "<|box_end|>")
ROWS = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))
AROUND = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def _qwen(config: str, system: str, patch: int) -> Kind:
    size = {"shortest_edge": (patch * 4) ** 2, "longest_edge": (patch * 8) ** 2}
    picture = {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": size,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return Kind(config, "byte", None, "<|im_end|>", "<|endoftext|>", VISION_QWEN, names, chatml(QWEN, system), picture, {})


KINDS = {
    "qwen2-vl": _qwen("Qwen2VLConfig", "You are a helpful assistant.", 14),
    "qwen2.5-vl": _qwen("Qwen2_5_VLConfig", "You are a helpful assistant.", 14),
    "qwen3-vl": _qwen("Qwen3VLConfig", "", 16),
    "internvl": Kind("InternVLConfig", "byte", None, "<|im_end|>", "<|endoftext|>",
                     ("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<ref>", "</ref>", "<box>", "</box>"),
                     {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                      "video_token": "<video>"}, chatml("<IMG_CONTEXT>\\n"),
                     {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 4,
                      "image_processor_type": "GotOcr2ImageProcessorFast"}, {"image_seq_length": 4}),
    "llava": Kind("LlavaConfig", "replace", "<s>", "</s>", "<pad>", ("<image>",), {"image_token": "<image>"}, LLAVA,
                  {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}, "image_processor_type": "CLIPImageProcessor"},
                  {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "llava-onevision": Kind("LlavaOnevisionConfig", "byte", None, "<|im_end|>", "<|endoftext|>", ("<|im_start|>", "<image>", "<video>"),
                            {"image_token": "<image>", "video_token": "<video>"}, chatml("<image>\\n"),
                            {"size": {"height": 28, "width": 28}, "image_processor_type": "LlavaOnevisionImageProcessor",
                             "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56], [84, 56], [56, 84]]},
                            {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}),
    "gemma3": Kind("Gemma3Config", "replace", "<bos>", "<eos>", "<pad>",
                   ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
                   {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}, GEMMA,
                   {"size": {"height": 56, "width": 56}, "image_processor_type": "Gemma3ImageProcessor"}, {"image_seq_length": 4}),
    "smolvlm": Kind("SmolVLMConfig", "byte", "<|im_start|>", "<end_of_utterance>", "<|im_end|>", (*AROUND[:3], *ROWS),
                    {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
                     "end_of_utterance_token": "<end_of_utterance>"}, SMOL,
                    {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": True,
                     "image_processor_type": "SmolVLMImageProcessor"}, {"image_seq_len": 4}),
    "idefics3": Kind("Idefics3Config", "byte", "<|begin_of_text|>", "<end_of_utterance>", "<|end_of_text|>", (*AROUND[:3], *ROWS),
                     {}, SMOL.replace("<|im_start|>", "<|begin_of_text|>"),
                     {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": True,
                      "image_processor_type": "Idefics3ImageProcessor"}, {"image_seq_len": 4}),
}  # fmt: skip
SIX = ("qwen2.5-vl", "qwen3-vl", "internvl", "llava-onevision", "gemma3", "smolvlm")


def write_mllm(name: str, folder: Path, lines: Sequence[str], seed: int = 0, **text: Any) -> Path:
    """Write a tiny random model with its tokenizer, template and picture settings into a folder, and return that. text: other sizes."""
    kind = KINDS[name]
    tokenizer = _tokenizer(name, lines)
    config = getattr(transformers, kind.config)(**_sizes(name, tokenizer, text))
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(kind.picture), encoding="utf-8")
    processor = {"processor_class": kind.config.replace("Config", "Processor"), **kind.processor}
    (folder / "processor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def _sizes(name: str, tokenizer: Any, changes: dict[str, Any]) -> dict[str, Any]:
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.get_vocab()}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 7, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 2048, "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    } | changes  # fmt: skip
    width = text["hidden_size"]
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
    }
    small |= {"initializer_range": 0.1}
    if name.startswith("qwen"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        text["rope_parameters"] = rope | ({"mrope_interleaved": True} if name == "qwen3-vl" else {})
        vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
        if name == "qwen2-vl":
            vision |= {"embed_dim": 32, "hidden_size": width, "patch_size": 14, "mlp_ratio": 2}
        elif name == "qwen2.5-vl":
            vision |= {"hidden_size": 32, "out_hidden_size": width, "patch_size": 14, "intermediate_size": 64, "window_size": 56,
                       "fullatt_block_indexes": [1]}  # fmt: skip
        else:
            vision |= {"hidden_size": 32, "out_hidden_size": width, "patch_size": 16, "intermediate_size": 64,
                       "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
        tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
                  "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
        return {"text_config": text, "vision_config": vision} | {key: ids[token] for key, token in tokens.items()}
    if name == "internvl":
        vision = small | {"image_size": [28, 28], "patch_size": [7, 7], "use_mean_pooling": True}
        return {"text_config": text | {"model_type": "qwen2"}, "vision_config": vision | {"model_type": "internvl_vision"},
                "image_token_id": ids["<IMG_CONTEXT>"], "image_seq_length": 4, "downsample_ratio": 0.5}  # fmt: skip
    if name == "llava":
        return {"text_config": text | {"model_type": "llama"}, "image_token_index": ids["<image>"], "image_seq_length": 9,
                "vision_config": small | {"model_type": "clip_vision_model", "image_size": 42, "num_hidden_layers": 2}}  # fmt: skip
    if name == "llava-onevision":
        return {"text_config": text | {"model_type": "qwen2"}, "image_token_index": ids["<image>"], "video_token_index": ids["<video>"],
                "vision_config": small | {"model_type": "siglip_vision_model", "vision_use_head": False},
                "image_grid_pinpoints": KINDS[name].picture["image_grid_pinpoints"]}  # fmt: skip
    if name == "gemma3":
        return {"text_config": text | {"query_pre_attn_scalar": 16, "sliding_window": 64}, "mm_tokens_per_image": 4,
                "vision_config": small | {"model_type": "siglip_vision_model", "image_size": 56, "vision_use_head": False},
                "boi_token_index": ids["<start_of_image>"], "eoi_token_index": ids["<end_of_image>"],
                "image_token_index": ids["<image_soft_token>"]}  # fmt: skip
    return {"text_config": text | {"model_type": "llama"}, "image_token_id": ids["<image>"], "scale_factor": 2,
            "pad_token_id": tokenizer.pad_token_id, "vision_config": small | {"patch_size": 7}}  # fmt: skip


def _tokenizer(name: str, lines: Sequence[str]) -> Any:
    kind = KINDS[name]
    special = list(dict.fromkeys(["<unk>", *filter(None, (kind.bos, kind.eos, kind.pad)), *kind.special]))
    made = (_byte_level if kind.tokenizer == "byte" else _sentencepiece)(kind.tokenizer, special, lines)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if kind.tokenizer == "replace":
        made.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A {kind.bos} $B", special_tokens=[(kind.bos, made.token_to_id(kind.bos))]
        )
    names = {"bos_token": kind.bos, "eos_token": kind.eos, "pad_token": kind.pad}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=kind.named,
        **{key: token for key, token in names.items() if token},
    )
    tokenizer.chat_template = kind.template
    assert len(BYTES) == 256
    return tokenizer
