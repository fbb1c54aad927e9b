"""`grex predict --dry-run`: the exact first request of each task, and what the run would need; nothing is sent or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grex_mllm.zeroshot.asking import Asking
from grex_mllm.zeroshot.base import Backend, Picture, Request
from grex_mllm.zeroshot.families.tokens import image_tokens
from grex_mllm.zeroshot.server.estimates import describe_request, estimate
from grex_mllm.zeroshot.server.server import Server
from grex_mllm.zeroshot.settings import Settings


def preview(
    backend: Backend, asking: Asking, rounds: Mapping[str, Sequence[list[Request]]], numbers: Mapping[str, int], settings: Settings
) -> dict[str, Any]:
    """Return what `grex predict --dry-run` prints.

    rounds: task -> the first round of some of its questions.  numbers: task -> all its questions.
    """
    found: dict[str, Any] = {"asked": f"{backend.name}, {asking.name}", "tasks": {}}
    for task, some in rounds.items():
        requests = [request for round_ in some for request in round_]
        if not requests:
            continue
        part = estimate(requests, settings.server, lambda width, height: image_tokens(asking.family, width, height))
        share = numbers[task] / len(some)
        least, most = asking.rejection.calls if task == "ground" else (1, 1) if asking.rerank is None else asking.rerank.calls
        found["tasks"][task] = {
            "questions": numbers[task],
            "calls": {"at_least": least * numbers[task], "at_most": most * numbers[task]},
            "first_round": {
                "estimated_from": len(some),
                "tokens_in": round(part.tokens_in * share),
                "tokens_out_at_most": round(part.tokens_out * share),
                "cost_at_most": round(part.cost * share, 4),
            },
            "first_request": _shown(requests[0], backend),
        }
    return found


def _shown(request: Request, backend: Backend) -> dict[str, Any]:
    """Return a request as it is sent to a server; to a local model as its turns."""
    if isinstance(backend, Server):
        return describe_request(request, backend)
    turns = [{"role": turn.role, "parts": [_part(part) for part in turn.parts]} for turn in request.turns]
    render = getattr(backend, "rendered", None)
    sampling = {name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    return {"turns": turns, **sampling} | ({"rendered": render(request)} if render is not None else {})


def _part(part: str | Picture) -> Any:
    if isinstance(part, str):
        return part
    height, width = part.pixels.shape[:2]
    return {"picture": f"{width}x{height}", "sha256": part.digest}
