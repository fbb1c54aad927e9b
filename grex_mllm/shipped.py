"""Files that are data, not code: configurations, protocols, prompts, published numbers, DeepSpeed settings.

In a checkout they lie beside the package, in an installed wheel in `grex_mllm/files/` (setup.py puts them there).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE / "files" if (PACKAGE / "files").is_dir() else PACKAGE.parent
FOLDERS = ("configs", "deepspeed_configs", "eval")
CONFIG_FOLDER, PROTOCOL_FOLDER, PUBLISHED_FOLDER = ROOT / "configs", ROOT / "eval" / "protocols", ROOT / "eval" / "published"
PROMPT_FOLDER = ROOT / "eval" / "prompts"


def find_file(given: str | Path) -> Path:
    """Return `given`; where no such file exists and its name starts like that of a shipped one ("configs/..."), return the shipped file.

    The choice of a shipped file is printed on stderr, by one process of a launch.
    """
    file = Path(given)
    parts = file.parts
    if file.exists() or ".." in parts or not parts or parts[0] not in FOLDERS:
        return file
    shipped = ROOT / file
    if not shipped.is_file():
        return file
    if os.environ.get("RANK", "0") == "0":
        print(f"{file} is not in this folder; taking the one that comes with grex_mllm: {shipped}", file=sys.stderr)
    return shipped
