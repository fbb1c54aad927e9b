"""Tiny random models that are asked by task words, as folders: PaliGemma 1 and 2, Florence-2, Kosmos-2; their tokenizers and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_llms import _byte_level, _sentencepiece

TASK_MODELS = ("paligemma", "paligemma2", "florence2", "kosmos2")
LOC = [f"<loc{n:04d}>" for n in range(1024)] + [f"<seg{n:03d}>" for n in range(128)]
BINS = [f"<loc_{n}>" for n in range(1000)] + ["<sep>", "<poly>", "</poly>", "<and>"]
SQUARE = {
    "paligemma": {"size": {"height": 56, "width": 56}, "image_seq_length": 16, "image_processor_type": "SiglipImageProcessor"},
    "florence2": {"size": {"height": 64, "width": 64}, "do_center_crop": False, "image_seq_length": 5, "resample": 3,
                  "image_processor_type": "CLIPImageProcessor"},
    "kosmos2": {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True,
                "image_processor_type": "CLIPImageProcessor"},
}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "initializer_range": 0.1}


def write_task_model(name: str, folder: Path, lines: Sequence[str], seed: int = 0) -> Path:
    """Write a tiny random model with its tokenizer and settings into a folder, and return that."""
    tokenizer = _tokenizer(name, lines)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(_config(name, tokenizer))
    start = {"decoder_start_token_id": 2, "num_beams": 3, "no_repeat_ngram_size": 3} if name == "florence2" else {}
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, **start)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SQUARE[name.removesuffix("2") if name == "paligemma2" else name]))
    return folder


def _tokenizer(name: str, lines: Sequence[str]) -> Any:
    """Kosmos-2: the ids after <unk> stand for the places of a picture, as in the released vocabulary."""
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if name.startswith("paligemma"):
        names |= {"bos_token": "<bos>", "eos_token": "<eos>"}
    special = list(names.values()) + ([] if name == "kosmos2" else ["<image>"])
    made = (_byte_level if name == "florence2" else _sentencepiece)("byte" if name == "florence2" else "replace", special, lines)
    extra = {} if name == "kosmos2" else {"extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names, **extra)
    if name == "kosmos2":
        transformers.Kosmos2Processor(transformers.CLIPImageProcessorPil(), tokenizer)  # adds the tags and patches
    else:
        tokenizer.add_tokens(BINS if name == "florence2" else LOC)
    return tokenizer


def _config(name: str, tokenizer: Any) -> Any:
    ids = {key: getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    given = {f"{key}_token_id": value for key, value in ids.items()}
    if name == "kosmos2":
        text: dict[str, Any] = {"vocab_size": len(tokenizer), "embed_dim": 64, "layers": 2, "ffn_dim": 128, "attention_heads": 4,
                                "max_position_embeddings": 512, "init_std": 0.3, "dropout": 0.0} | given  # fmt: skip
        return transformers.Kosmos2Config(text_config=text, vision_config=VISION | {"image_size": 28, "patch_size": 14})
    if name == "florence2":
        text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 64, "encoder_layers": 1, "decoder_layers": 2,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
                "max_position_embeddings": 512, "init_std": 0.3, "decoder_start_token_id": 2} | given  # fmt: skip
        vision = {"depths": [1, 1, 1, 1], "embed_dim": [16, 16, 32, 32], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2],
                  "window_size": 4, "projection_dim": 64, "drop_path_rate": 0.0}  # fmt: skip
        image = tokenizer.convert_tokens_to_ids("<image>")
        return transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=image, **given)
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.3} | given  # fmt: skip
    text |= {"model_type": "gemma2", "sliding_window": 64, "query_pre_attn_scalar": 16} if name == "paligemma2" else {"model_type": "gemma"}
    # PaliGemma 2 with tied embeddings and random weights would say the question's last word again and again
    vision = VISION | {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False}
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=64,
        hidden_size=64, tie_word_embeddings=name == "paligemma", **given,
    )  # fmt: skip
