"""Generators: see `GENERATORS` in `grex_mllm/entries.py`."""
