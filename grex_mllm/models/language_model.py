"""The causal language model under the generator: a tiny Llama, a folder or a hub id; frozen, optionally quantised, with LoRA adapters.

LoRA: Hu et al. 2021; NF4: Dettmers et al. 2023; both through peft and bitsandbytes.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grex_mllm.compat import fold_adapters
from grex_mllm.errors import fault
from grex_mllm.models.lm_tokenizer import LMTokenizer

if TYPE_CHECKING:
    from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig

DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
QUANTISATIONS = ("none", "nf4", "int8")


def build_language_model(cfg: RegionTokensConfig, tokenizer: LMTokenizer) -> Any:
    """Return the frozen base LM with LoRA adapters (a PeftModel), or the bare frozen LM for `lora_rank: 0`.

    Raises:
        GrexError: no LM asked for, an LM that cannot be had, an unknown dtype or quantisation, bitsandbytes missing, adapters that fit
            no layer.
    """
    lm = _tiny(cfg, tokenizer) if cfg.lm == "tiny" else _pretrained(cfg)
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
    """Return the root mean square of the token embeddings: the size of input that the LM is used to."""
    weight = lm.get_input_embeddings().weight
    return float(weight.detach()[:4096].float().square().mean().sqrt())


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
        attn_implementation=cfg.attn_implementation,
    )
    return LlamaForCausalLM(sizes)


def _pretrained(cfg: RegionTokensConfig) -> Any:
    from transformers import AutoModelForCausalLM

    if cfg.lm == "none":
        raise fault("model.generator.lm: none", "tiny, a folder or a hub id", "configure a language model to describe objects")
    if cfg.dtype not in DTYPES:
        raise fault(f"model.generator.dtype {cfg.dtype!r}", f"one of {', '.join(DTYPES)}", "fix the value")
    try:
        return AutoModelForCausalLM.from_pretrained(
            cfg.lm, dtype=DTYPES[cfg.dtype], attn_implementation=cfg.attn_implementation, quantization_config=_quantisation(cfg)
        )
    except (OSError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise fault(
            f"language model {cfg.lm}: {reason}",
            "a folder with config.json and safetensors weights, or a hub id, and the packages its options need",
            "fix model.generator.lm, attn_implementation or quantisation",
        ) from None


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
    from transformers.pytorch_utils import Conv1D

    names = {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    missing = [target for target in cfg.lora_targets if target not in names]
    if missing or not cfg.lora_targets:
        raise fault(
            f"model.generator.lora_targets {cfg.lora_targets}: no layer called {', '.join(missing) or '(none given)'} in {cfg.lm}",
            f"names among {', '.join(sorted(names))}",
            "fix lora_targets",
        )
    scales = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "lora_dropout": cfg.lora_dropout}
    adapters = LoraConfig(**scales, target_modules=list(cfg.lora_targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers is about to change
        adapted = get_peft_model(lm, adapters)
    if cfg.lm == "tiny" and cfg.lora_dropout == 0:
        fold_adapters(adapted)
    return adapted
