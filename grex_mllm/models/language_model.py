"""The causal language model under the generator: a tiny Llama, a folder or a hub id; frozen, optionally quantised, with LoRA adapters.

LoRA: Hu et al. 2021; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024; NF4: Dettmers et al. 2023; through peft and bitsandbytes.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grex_mllm.compat import attention_of, fold_adapters, recompute_blocks
from grex_mllm.errors import fault
from grex_mllm.models.lm_config import AdaptedConfig
from grex_mllm.models.lm_loading import gathered, load_base, partitioned_lm
from grex_mllm.models.lm_shapes import shape_of, weights_are_left_out
from grex_mllm.models.lm_tokenizer import LMTokenizer

if TYPE_CHECKING:
    from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig

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
        lm = shape_of(cfg) if weights_are_left_out() else load_base(cfg, tokenizer)
    freeze_base(lm, cfg, len(tokenizer))
    return with_lora(lm, cfg, _targets(lm, cfg)) if cfg.lora_rank else lm


def freeze_base(lm: Any, cfg: AdaptedConfig, num_tokens: int) -> None:
    """Make a model the frozen base of adapters, with gradient checkpointing where it is configured. num_tokens: of its tokenizer.

    Raises:
        GrexError: fewer token embeddings than tokens.
    """
    num_embeddings, _ = embedding_shape(lm)
    if num_embeddings < num_tokens:
        raise fault(
            f"language model {cfg.lm} with {num_embeddings} token embeddings",
            f"at least the tokenizer's {num_tokens}",
            "use the tokenizer that belongs to the model",
        )
    lm.requires_grad_(False)
    for layer in lm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # else bitsandbytes repacks 4-bit weights on a CPU's first answer without
            layer.support_avx512bf16_for_cpu = False  # gradients, after which training goes on without them, unannounced
    if cfg.gradient_checkpointing:
        recompute_blocks(lm)


def describe_base(lm: nn.Module) -> str:
    """Say in one line how a language model's own weights are held, and which attention it computes, for what reason."""
    frozen = [p for p in base_parameters(lm) if not p.requires_grad] or base_parameters(lm)
    types = sorted({str(p.dtype).removeprefix("torch.") for p in frozen})
    number = sum(getattr(p, "ds_numel", p.numel()) for p in frozen)
    where = "in partitions over the processes" if partitioned_lm(lm) is not None else f"whole on {frozen[0].device}"
    reasons = [module.attention_reason for module in lm.modules() if hasattr(module, "attention_reason")]
    attention = f"; attention {attention_of(lm)} ({reasons[0]})" if reasons else ""
    return f"language model: {number:,} stored numbers of its own in {', '.join(types)}, {where}{attention}"


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
    num, weight = embedding_shape(lm)[0], embedding_weight(lm)
    if weight.is_meta:
        return 1.0  # nothing to measure
    ids = torch.arange(0, num, max(1, num // SAMPLED), device=weight.device)
    with torch.no_grad(), gathered(weight):
        return float(lm.get_input_embeddings()(ids).float().square().mean().sqrt())


def embedding_weight(lm: Any) -> nn.Parameter:
    """Return the token embeddings for a look at their type and device; read as an attribute, ZeRO-3 would gather them."""
    return next(lm.get_input_embeddings().parameters())  # type: ignore[no-any-return]


def embedding_shape(lm: Any) -> tuple[int, int]:
    """Return number and width of the token embeddings, also where they lie in partitions."""
    weight = embedding_weight(lm)
    number, width = getattr(weight, "ds_shape", weight.shape)
    return int(number), int(width)


def leave_out_named_base(generator: nn.Module) -> None:
    """Let a generator's state hold no weights of a base that its `cfg.lm` names by folder or hub id, and loading not miss them.

    Strict loading still finds every other gap. The base is below `lm`; that of `lm: tiny` is held.
    """
    generator.register_state_dict_post_hook(_drop_named_base)
    generator.register_load_state_dict_post_hook(_excuse_named_base)


def _named_base_keys(generator: Any, prefix: str) -> set[str]:
    if generator.cfg.lm == "tiny":
        return set()
    return {f"{prefix}lm.{name}" for name in generator.lm.state_dict() if is_base_key(name)}


def _drop_named_base(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in _named_base_keys(module, prefix):
        state.pop(key, None)


def _excuse_named_base(module: nn.Module, incompatible: Any) -> None:
    own = _named_base_keys(module, "")
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not any(key.endswith(name) for name in own)]


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


def with_lora(lm: Any, cfg: AdaptedConfig, targets: list[str]) -> Any:
    """Return the model with adapters, a PeftModel. targets: names, or ends of names, of the linear layers that get them."""
    # bitsandbytes, which peft imports, reports at each start that a kernel package for 4-bit models is not there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        use_rslora=cfg.lora_rslora,
        use_dora=cfg.lora_dora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers is about to change
        adapted = get_peft_model(lm, adapters)
    if cfg.lm == "tiny" and cfg.lora_dropout == 0 and not cfg.lora_dora:
        fold_adapters(adapted)
    return adapted


def _targets(lm: Any, cfg: AdaptedConfig) -> list[str]:
    """Return the names of the layers that get adapters."""
    if cfg.lora_targets == "auto":
        lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
        blocks = max(lists, key=lambda module: sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()), default=nn.ModuleList())
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
