"""Read a causal language model from a folder or hub id: whole onto the process's own device, quantised, or in partitions for ZeRO-3.

ZeRO-3: Rajbhandari et al. 2020. The weights are made in partitions and filled one by one, each read by the first process alone, so no
process ever holds more than its share and one whole tensor.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grex_mllm.compat import names_in_model, partitions_made_here, processes_of_this_node
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.attention_choice import choose_attention
from grex_mllm.models.lm_config import ModelChoice
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.models.placement import placement
from grex_mllm.precision import DTYPES as COMPUTED

if TYPE_CHECKING:
    from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISATIONS = ("none", "nf4", "int8")
PARTS_OF_OTHERS = ("vision_config", "audio_config", "text_config", "thinker_config")  # what the configuration of a multimodal model has
MMAP_THRESHOLD = -3  # of glibc's mallopt
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_base(cfg: RegionTokensConfig, tokenizer: LMTokenizer) -> Any:
    """Return the causal LM of a folder or hub id, in evaluation mode, as the current placement wants it.

    Raises:
        GrexError: no LM asked for, one that cannot be had, is multimodal or no causal LM, an unknown dtype or quantisation, bitsandbytes
            missing.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    if cfg.lm == "none":
        raise fault("model.generator.lm: none", "tiny, a folder or a hub id", "configure a language model to describe objects")
    lm = read_model(cfg, AutoModelForCausalLM, _check_text_only)
    # an LLM's own generation_config.json (penalties, temperatures, banned n-grams) would have a say in beam search
    lm.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    return lm


def read_model(choice: ModelChoice, kind: Any, check: Callable[[str, Any], None], safetensors: bool | None = None) -> Any:
    """Return the model of a folder or hub id, in evaluation mode, as the current placement wants it.

    kind: its auto class in transformers.  check(name, configuration): raise where it is not of the right sort.
    safetensors: True = no other files; None = others where there are none.

    Raises:
        GrexError: a model that cannot be had, an unknown dtype or quantisation, bitsandbytes missing.
    """
    from transformers import AutoConfig

    here = placement()
    options: dict[str, Any] = {"dtype": base_dtype(choice, here.precision)}
    attention = choose_attention(choice.attn_implementation, here.device, options["dtype"])
    options["attn_implementation"] = attention.name
    quantisation = _quantisation(choice, options["dtype"])
    try:
        config = AutoConfig.from_pretrained(choice.lm)
        check(choice.lm, config)
        if here.zero3 is not None and quantisation is None:
            return_freed_memory(here.device)
            lm = _partitioned(choice.lm, config, here.zero3, kind, options)
        else:
            options |= {"device_map": {"": here.device}, "quantization_config": quantisation, "use_safetensors": safetensors}
            lm = kind.from_pretrained(choice.lm, **options)
    except GrexError:
        raise
    except (OSError, ImportError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise fault(
            f"language model {choice.lm}: {reason}",
            "a folder with config.json and safetensors weights of a model of this kind, or a hub id, and the packages its options need",
            "fix the path, attn_implementation or quantisation",
        ) from None
    lm.attention_reason = attention.reason  # for the first lines of a training
    return lm


def base_dtype(cfg: ModelChoice, precision: str) -> torch.dtype:
    """Return the type of the frozen base: the configured one, or for `auto` the one that is computed in.

    Raises:
        GrexError: an unknown dtype.
    """
    if cfg.dtype not in ("auto", *DTYPES):
        raise fault(f"model.generator.dtype {cfg.dtype!r}", f"one of auto, {', '.join(DTYPES)}", "fix the value")
    return COMPUTED[precision] if cfg.dtype == "auto" else DTYPES[cfg.dtype]


def partitioned_lm(module: nn.Module) -> Any:
    """Return the language model below a module whose weights lie in partitions since it was read; None where there is none."""
    from transformers import PreTrainedModel

    models = (part for part in module.modules() if isinstance(part, PreTrainedModel))
    return next((lm for lm in models if any(hasattr(parameter, "ds_id") for parameter in lm.parameters())), None)


def gathered(*parameters: nn.Parameter) -> AbstractContextManager[object]:
    """Let every process see these parameters whole within the block; all processes call it where they are partitioned."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    entered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(parameters))
    return entered


def return_freed_memory(device: torch.device) -> None:
    """Let this process give whole tensors back to the system as soon as they are freed.

    On a CPU under glibc freed blocks of up to 32 MiB stay with the process, in pieces: with two processes each half of a language model of
    1.07 GB then took 1.13 GB, and 0.6 with this.
    """
    if device.type == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)


def _partitioned(name: str, config: Any, zero3: dict[str, Any], kind: Any, options: dict[str, Any]) -> Any:
    """Make the model in partitions, in its own types, and fill it; transformers' own way has the first process hold all of it."""
    import deepspeed
    from transformers.initialization import no_init_weights

    files = _weight_files(name)
    kept = torch.random.fork_rng(devices=[])  # what is built after it does not depend on how it is read
    node = processes_of_this_node() if zero3["zero_optimization"].get("zero_hpz_partition_size", 1) > 1 else None
    parts = deepspeed.zero.Init(config_dict_or_path=zero3, tensor_overrides=[], zero_param_parallel_group=node)
    with kept, parts, partitions_made_here(), no_init_weights():
        lm = kind.from_config(config, **options)
    lm.tie_weights()
    named = lm.state_dict(keep_vars=True)
    if not named.keys() <= files.keys():
        files = dict(zip(names_in_model(lm, list(files)), files.values(), strict=True))
    missing = [key for key, tensor in lm.named_parameters() if files.get(key, ("", "", None))[2] != list(tensor.ds_shape)]
    if missing:
        raise fault(
            f"language model {name}: {len(missing)} tensors are missing or have another shape ({', '.join(missing[:3])})",
            "with ZeRO-3 the names and shapes of transformers' model, because every tensor is read by itself",
            "write the folder anew (AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)), or use ZeRO-2",
        )
    filled: set[int] = set()
    for key, tensor in named.items():
        if id(tensor) in filled or key not in files:
            continue
        filled.add(id(tensor))
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0), torch.no_grad():
            if not isinstance(tensor, nn.Parameter) or torch.distributed.get_rank() == 0:
                tensor.copy_(_read(*files[key][:2]))
    return lm.eval()


def _weight_files(name: str) -> dict[str, tuple[str, str, list[int]]]:
    """Return, for each tensor of a folder or hub id, its file, its name there, and its shape."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False)
    parts = {WEIGHTS} if index is None else set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    found: dict[str, tuple[str, str, list[int]]] = {}
    for part in sorted(parts):
        path = str(cached_file(name, part))
        with safe_open(path, "pt") as file:
            found |= {key: (path, key, list(file.get_slice(key).get_shape())) for key in file.keys()}  # noqa: SIM118
    return found


def _read(path: str, key: str) -> Tensor:
    """Return one tensor; a file that stayed open would keep all that was read of it in memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def _check_text_only(name: str, config: Any) -> None:
    parts = [part for part in PARTS_OF_OTHERS if getattr(config, part, None) is not None]
    if parts:
        raise fault(
            f"language model {name} is a multimodal model ({config.model_type}, with {', '.join(parts)})",
            "a causal language model of text alone: objects are seen through the image encoder of the grounding model",
            "use a text model of its family (such as Qwen2.5-7B-Instruct, not -VL-), or take model.generator.name: mllm",
        )


def _quantisation(cfg: ModelChoice, compute: torch.dtype) -> Any:
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
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
