"""Ids as 64-bit numbers: a million of them in 8 MB, compared as arrays; the ids themselves are read back only for messages. Digests."""

from __future__ import annotations

from hashlib import blake2b, file_digest
from pathlib import Path

import numpy as np


def id_number(text: str) -> int:
    """Return the 64-bit number of an id (equal ids, equal numbers, on every machine)."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def duplicates(numbers: np.ndarray) -> np.ndarray:
    """Return the positions (ascending) whose number stood earlier in the array."""
    order = np.argsort(numbers, kind="stable")
    again = numbers[order][1:] == numbers[order][:-1]
    return np.sort(order[1:][again])


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
