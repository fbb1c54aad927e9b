"""The backend for OpenAI-compatible servers: vLLM, `transformers serve`, llama.cpp, a cloud; live, or through files of a batch API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grex_mllm.zeroshot.server.settings import ServerSettings

if TYPE_CHECKING:
    from grex_mllm.zeroshot.server.server import Server


def open_server(model: str, base_url: str, settings: ServerSettings) -> Server:
    """Return the backend of a model behind a server; see `Server`."""
    from grex_mllm.zeroshot.server.server import Server

    return Server(model, base_url, settings)
