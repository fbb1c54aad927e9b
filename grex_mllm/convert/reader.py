"""Read the tensors of a checkpoint file without running anything that is in it.

Kinds, told apart by their first bytes and not by their names: torch's zip and its older stream (`torch.load(weights_only=True)`),
safetensors, and plain pickles of numpy arrays (as detectron2's conversion tools write), through an unpickler that knows arrays and
builtin containers only.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from grex_mllm.compat import array_builders
from grex_mllm.data.pickles import BROKEN_PICKLE
from grex_mllm.errors import GrexError, fault

TORCH_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
# what a training run saves beside its weights; named here, so that nothing is skipped in silence
TRAINING_STATE = ("optimizer", "scheduler", "lr_scheduler", "iteration", "epoch", "trainer", "hooks", "grad_scaler", "scaler", "config")
NOTES = ("__author__", "matching_heuristics", "max_accuracy")
SEVERAL = 5


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict of a checkpoint on the CPU, and the names of the entries beside it that were ignored by rule.

    Accepts {"model": state dict, training state...} and a bare state dict.

    Raises:
        GrexError: missing, truncated or foreign file; a pickle that calls for code; entries that are neither weights nor known training
        state.
    """
    file = Path(path)
    if not file.is_file():
        raise fault(f"checkpoint {file} does not exist", "a .pth, .pkl or .safetensors file", "fix the path")
    content = _load(file)
    if not isinstance(content, Mapping):
        raise fault(f"{file} holds a {type(content).__name__}", "a state dict, or a dict with one under 'model'", "give a checkpoint")
    ignored: list[str] = []
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            state = content[key]
            beside = [str(name) for name in content if name != key]
            foreign = [name for name in beside if name not in TRAINING_STATE + NOTES]
            if foreign:
                names = ", ".join(foreign[:SEVERAL])
                raise fault(f"{file} holds {names} beside '{key}'", f"only {', '.join(TRAINING_STATE + NOTES)}", "save the weights alone")
            ignored = beside
            break
    if not state:
        raise fault(f"{file} holds no tensors", "a state dict", "give a checkpoint with weights")
    return {str(key): _tensor(value, str(key), file) for key, value in state.items()}, ignored


def _load(file: Path) -> Any:
    with file.open("rb") as stream:
        head = stream.read(16)
        stream.seek(0)
        if head[:4] == b"PK\x03\x04" or zipfile.is_zipfile(file):
            return _load_torch(file)
        if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < file.stat().st_size:
            return _load_safetensors(file)
        first = _load_pickle(stream, file)
    return _load_torch(file) if first == TORCH_STREAM_MAGIC else first


def _load_torch(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(found, name) for name, found in _numpy_names().items()]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        if "Unsupported" in reason or "WeightsUnpickler" in reason or "Weights only" in reason:
            raise _refused(file, _named_global(reason)) from None
        raise _unreadable(file, reason) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _unreadable(file, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _load_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, str(error)) from None


class _ArrayUnpickler(pickle.Unpickler):
    """Resolve only what arrays and containers need; every other name, and so every call of code, is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"collections.OrderedDict": OrderedDict, "_codecs.encode": _latin1} | _numpy_names()
        if f"{module}.{name}" not in known:
            raise _Refused(f"{module}.{name}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent id")


class _Refused(pickle.UnpicklingError):
    """A pickle asked for something other than data."""


def _load_pickle(stream: BinaryIO, file: Path) -> Any:
    try:
        return _ArrayUnpickler(stream, encoding="latin1").load()
    except _Refused as error:
        raise _refused(file, str(error)) from None
    except BROKEN_PICKLE as error:
        raise _unreadable(file, str(error) or type(error).__name__) from None


def _latin1(text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, by which old pickles carry bytes; no other codec."""
    if encoding != "latin1":
        raise _Refused(f"_codecs.encode with {encoding}")
    return text.encode("latin1")


def _numpy_names() -> dict[str, Any]:
    """Return what rebuilds an array or a scalar, dotted name -> function, under the module names of numpy 1 and 2."""
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)]
    found = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, **{f"numpy.dtypes.{kind.__name__}": kind for kind in kinds}}
    return found | array_builders()


def _tensor(value: Any, key: str, file: Path) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))
    raise fault(f"{file}: entry {key} is a {type(value).__name__}", "a tensor", "give a state dict, or a dict with one under 'model'")


def _named_global(reason: str) -> str:
    """Find the refused name in torch's message."""
    for marker in ("Unsupported global: GLOBAL ", "GLOBAL "):
        if marker in reason:
            return reason.split(marker, 1)[1].split()[0]
    return reason.split(". ")[0][:120]


def _refused(file: Path, name: str) -> GrexError:
    return fault(
        f"{file} calls for {name}, which is not data; nothing was run",
        "tensors or arrays in plain containers",
        "do not trust the file; get the checkpoint from its authors, or save its weights alone",
    )


def _unreadable(file: Path, reason: str) -> GrexError:
    given = f"{file} cannot be read ({reason.split('. ')[0][:160]})"
    return fault(given, "a whole .pth, .pkl or .safetensors file", "it may be cut off: download or copy it again")
