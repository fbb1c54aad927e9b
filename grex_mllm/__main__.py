"""Run the command line: python -m grex_mllm VERB ..."""

from __future__ import annotations

import sys

from grex_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
