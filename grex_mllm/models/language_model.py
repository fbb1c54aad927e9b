"""The causal language model under the generator: a tiny Llama, a folder or a hub id; frozen, optionally quantised, with LoRA adapters.

LoRA: Hu et al. 2021; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024; NF4: Dettmers et al. 2023; through peft and bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grex_mllm.compat import fold_adapters
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.lm_shapes import shape_of, weights_are_left_out
from grex_mllm.models.lm_tokenizer import LMTokenizer

if TYPE_CHECKING:
    from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig

DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
QUANTISATIONS = ("none", "nf4", "int8")
PARTS_OF_OTHERS = ("vision_config", "audio_config", "text_config", "thinker_config")  # what the configuration of a multimodal model has
SAMPLED = 4096  # token embeddings that are measured


def build_language_model(cfg: RegionTokensConfig, tokenizer: LMTokenizer) -> Any:
    """Return the frozen base LM with LoRA adapters (a PeftModel), or the bare frozen LM for `lora_rank: 0`.

    Raises:
        GrexError: no LM asked for, an LM that cannot be had, one that is multimodal or no causal LM, an unknown dtype or quantisation,
            bitsandbytes missing, adapters that fit no layer.
    """
    if cfg.lm == "tiny":
        lm = _tiny(cfg, tokenizer)
    else:
        lm = shape_of(cfg) if weights_are_left_out() else _pretrained(cfg, tokenizer)
    if lm.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise fault(
            f"language model {cfg.lm} with {lm.get_input_embeddings().weight.shape[0]} token embeddings",
            f"at least the tokenizer's {len(tokenizer)}",
            "use the tokenizer that belongs to the model",
        )
    lm.requires_grad_(False)
    if cfg.quantisation != "none":
        from peft import prepare_model_for_kbit_training

        lm = prepare_model_for_kbit_training(lm, use_gradient_checkpointing=cfg.gradient_checkpointing)
        for layer in lm.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):  # else bitsandbytes repacks 4-bit weights on a CPU's first answer without
                layer.support_avx512bf16_for_cpu = False  # gradients, after which training goes on without them, unannounced
    elif cfg.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _with_lora(lm, cfg) if cfg.lora_rank else lm


def is_base_key(name: str) -> bool:
    """Tell whether a parameter name inside the LM belongs to the frozen base and not to an adapter."""
    return "lora_" not in name


def base_parameters(lm: nn.Module) -> list[nn.Parameter]:
    """Return the base LM's own parameters, without adapters."""
    return [p for name, p in lm.named_parameters() if is_base_key(name)]


def embedding_scale(lm: Any) -> float:
    """Return the root mean square of the token embeddings: the size of input that the LM is used to.

    Measured on what the embedding module gives, not on its weights: Gemma's multiplies them by sqrt(D).
    """
    embed = lm.get_input_embeddings()
    num = embed.weight.shape[0]
    if embed.weight.is_meta:
        return 1.0  # nothing to measure
    ids = torch.arange(0, num, max(1, num // SAMPLED), device=embed.weight.device)
    with torch.no_grad():
        return float(embed(ids).float().square().mean().sqrt())


def _tiny(cfg: RegionTokensConfig, tokenizer: LMTokenizer) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if cfg.quantisation != "none":
        raise fault(
            f"model.generator.quantisation {cfg.quantisation} with lm: tiny",
            "a folder or hub id (quantisation happens while weights are read)",
            "save the LM to a folder first, or set quantisation: none",
        )
    if cfg.hidden_size % cfg.num_heads or (cfg.hidden_size // cfg.num_heads) % 2:
        raise fault(
            f"model.generator.hidden_size {cfg.hidden_size} with num_heads {cfg.num_heads}",
            "an even number of channels for each head",
            "change one of them",
        )
    sizes = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_heads,
        intermediate_size=cfg.intermediate_size,
        max_position_embeddings=cfg.max_positions,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        tie_word_embeddings=False,
        attn_implementation="sdpa" if cfg.attn_implementation == "auto" else cfg.attn_implementation,
    )
    return LlamaForCausalLM(sizes)


def _pretrained(cfg: RegionTokensConfig, tokenizer: LMTokenizer) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if cfg.lm == "none":
        raise fault("model.generator.lm: none", "tiny, a folder or a hub id", "configure a language model to describe objects")
    if cfg.dtype not in DTYPES:
        raise fault(f"model.generator.dtype {cfg.dtype!r}", f"one of {', '.join(DTYPES)}", "fix the value")
    attention = None if cfg.attn_implementation == "auto" else cfg.attn_implementation
    quantisation = _quantisation(cfg)
    try:
        _check_text_only(cfg.lm, AutoConfig.from_pretrained(cfg.lm))
        lm = AutoModelForCausalLM.from_pretrained(
            cfg.lm, dtype=DTYPES[cfg.dtype], attn_implementation=attention, quantization_config=quantisation
        )
    except GrexError:
        raise
    except (OSError, ImportError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise fault(
            f"language model {cfg.lm}: {reason}",
            "a folder with config.json and safetensors weights of a causal language model, or a hub id, and the packages its options need",
            "fix model.generator.lm, attn_implementation or quantisation",
        ) from None
    # an LLM's own generation_config.json (penalties, temperatures, banned n-grams) would have a say in beam search
    lm.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    return lm


def _check_text_only(name: str, config: Any) -> None:
    parts = [part for part in PARTS_OF_OTHERS if getattr(config, part, None) is not None]
    if parts:
        raise fault(
            f"language model {name} is a multimodal model ({config.model_type}, with {', '.join(parts)})",
            "a causal language model of text alone: objects are seen through the image encoder of the grounding model",
            "use a text model of its family (such as Qwen2.5-7B-Instruct, not -VL-), or save its language part as a folder",
        )


def _quantisation(cfg: RegionTokensConfig) -> Any:
    if cfg.quantisation not in QUANTISATIONS:
        raise fault(f"model.generator.quantisation {cfg.quantisation!r}", f"one of {', '.join(QUANTISATIONS)}", "fix the value")
    if cfg.quantisation == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise fault(
            f"model.generator.quantisation {cfg.quantisation} without bitsandbytes",
            "the package bitsandbytes",
            "pip install bitsandbytes, or set quantisation: none",
        )
    from transformers import BitsAndBytesConfig

    if cfg.quantisation == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if cfg.dtype in ("float32", "auto") else DTYPES[cfg.dtype]
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _with_lora(lm: Any, cfg: RegionTokensConfig) -> Any:
    # bitsandbytes, which peft imports, reports at each start that a kernel package for 4-bit models is not there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        use_rslora=cfg.lora_rslora,
        use_dora=cfg.lora_dora,
        target_modules=_targets(lm, cfg),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers is about to change
        adapted = get_peft_model(lm, adapters)
    if cfg.lm == "tiny" and cfg.lora_dropout == 0 and not cfg.lora_dora:
        fold_adapters(adapted)
    return adapted


def _targets(lm: Any, cfg: RegionTokensConfig) -> list[str]:
    """Return the names of the layers that get adapters."""
    if cfg.lora_targets == "auto":
        lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=nn.ModuleList())
        found = _linear_names(blocks)
        if not found:
            raise fault(
                f"model.generator.lora_targets auto: no list of layers in {cfg.lm}", "one", "name the linear layers in lora_targets"
            )
        return sorted(found)
    wanted = [cfg.lora_targets] if isinstance(cfg.lora_targets, str) else list(cfg.lora_targets)
    names = _linear_names(lm)
    missing = [target for target in wanted if target not in names]
    if missing or not wanted:
        raise fault(
            f"model.generator.lora_targets {wanted}: no layer called {', '.join(missing) or '(none given)'} in {cfg.lm}",
            f"auto, or names among {', '.join(sorted(names))}",
            "fix lora_targets",
        )
    return wanted


def _linear_names(module: nn.Module) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {name.rsplit(".", 1)[-1] for name, layer in module.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
