"""Read published pickles without running what they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NoReturn

from grex_mllm.errors import GrexError, fault

MAX_PICKLE_BYTES = 1 << 30  # the largest published one has 150 MB
BROKEN_PICKLE = (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError)


class _PlainUnpickler(pickle.Unpickler):
    """Containers, strings and numbers have opcodes of their own; every class or function, which is how a pickle runs code, is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise GrexError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise GrexError("it asks for an object outside the file")


def load_plain_pickle(path: str | Path) -> Any:
    """Return the lists, dicts, strings and numbers of a pickle (RefCOCO's `refs(unc).p`, written by Python 2).

    Raises:
        GrexError: the file is missing or too large, holds anything else (nothing of it is run), or is no pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise fault(f"{path} does not exist", "a pickle as published", "check the path")
    if path.stat().st_size > MAX_PICKLE_BYTES:
        raise fault(f"{path} has {path.stat().st_size:,} bytes", f"at most {MAX_PICKLE_BYTES:,}", "check that it is the published file")
    try:
        try:
            return _load(path, "utf-8")
        except UnicodeDecodeError:  # byte strings of Python 2 carry no encoding
            return _load(path, "latin-1")
    except GrexError as error:
        raise fault(f"{path} is not plain data: {error}", "lists, dicts, strings and numbers", "fetch the published file again") from None
    except BROKEN_PICKLE as error:
        raise fault(f"{path} is no readable pickle ({error})", "a pickle as published", "fetch the file again") from None


def _load(path: Path, encoding: str) -> Any:
    with path.open("rb") as file:
        return _PlainUnpickler(file, encoding=encoding).load()
