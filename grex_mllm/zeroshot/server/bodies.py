"""Request -> the JSON that is sent, and the JSON that came back -> raw answer (chat completions as OpenAI defines them)."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from grex_mllm.zeroshot.base import Picture, RawAnswer, Request
from grex_mllm.zeroshot.server.settings import ServerSettings

KEPT_PICTURES = 16
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
FINISH = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "refusal": "refusal",
    "max_tokens": "length",
    "safety": "content_filter",
}


class Pictures:
    """Pictures as PNG data URLs at original size. One picture comes in many requests in turn: the last ones are kept encoded."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def url(self, picture: Picture) -> str:
        """Return data:image/png;base64,..."""
        with self._lock:
            if picture.digest in self._kept:
                self._kept.move_to_end(picture.digest)
                return self._kept[picture.digest]
        encoded = "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")
        with self._lock:
            self._kept[picture.digest] = encoded
            while len(self._kept) > KEPT_PICTURES:
                self._kept.popitem(last=False)
        return encoded


def png_bytes(picture: Picture) -> bytes:
    """Return the picture as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.pixels).save(file, "PNG", compress_level=1)  # the network is seldom slower than a high level
    return file.getvalue()


def body_of(request: Request, model: str, settings: ServerSettings, pictures: Pictures, adapted: Mapping[str, str]) -> dict[str, Any]:
    """Return the body of POST chat/completions.

    adapted: field -> its name at this server, "" = left out (`Adaptation`).
    """
    messages = [{"role": turn.role, "content": _content(turn.parts, settings, pictures)} for turn in request.turns]
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": request.max_tokens}
    body |= {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
    if request.schema is not None and settings.structured == "response_format":
        strict = {"name": "answer", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": strict}
    elif request.schema is not None and settings.structured == "structured_outputs":
        body["structured_outputs"] = {"json": request.schema}
    if request.choices:
        body |= {"logprobs": True, "top_logprobs": settings.top_logprobs}
    body |= settings.body
    for name, own in [*((name, "") for name in settings.omit), *adapted.items()]:
        if name in body:
            value = body.pop(name)
            if own:
                body[own] = value
    return body


def _content(parts: tuple[str | Picture, ...], settings: ServerSettings, pictures: Pictures) -> str | list[dict[str, Any]]:
    """Return a message's content: plain text where there is no picture, as every server takes it; else its parts in their order."""
    if all(isinstance(part, str) for part in parts):
        return "\n".join(str(part) for part in parts)
    detail = {"detail": settings.detail} if settings.detail else {}
    return [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image_url", "image_url": {"url": pictures.url(p), **detail}}
        for p in parts
    ]


def shortened(body: Any) -> Any:
    """Return a body in which every data URL stands as its kind, number of bytes and SHA-256, so that a person can read it."""
    if isinstance(body, dict):
        return {name: shortened(value) for name, value in body.items()}
    if isinstance(body, list):
        return [shortened(value) for value in body]
    if isinstance(body, str) and body.startswith("data:") and ";base64," in body:
        kind, _, data = body.partition(";base64,")
        content = base64.b64decode(data)
        return f"{kind};base64,<{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}>"
    return body


def read_answer(data: Mapping[str, Any], request: Request) -> RawAnswer:
    """Return the raw answer of a whole response.

    Raises:
        ValueError: no chat completion, in words.
    """
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("an answer without choices")
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("an answer without a message")
    reason = choice.get("finish_reason")
    if reason == "error":
        raise ValueError("an answer with finish_reason error")
    text, refusal = _text(message.get("content"), "text"), _text(message.get("refusal"), "refusal")
    refusal = refusal or _text(message.get("content"), "refusal", parts_only=True)
    finish = FINISH.get(reason.lower(), "stop") if isinstance(reason, str) else "stop"
    if refusal and finish == "stop":
        finish = "refusal"
    return RawAnswer(text, finish, refusal or None, usage_of(data.get("usage")), choice_probs=_choice_probs(choice, request.choices))


def _text(content: Any, kind: str, parts_only: bool = False) -> str | None:
    """Return the text of a content: a string, or a list of parts of which those of `kind` count."""
    if isinstance(content, list):
        found = [part.get(kind) for part in content if isinstance(part, dict) and part.get("type") == kind]
        return LONE_SURROGATE.sub("\ufffd", "".join(part for part in found if isinstance(part, str))) if found else None
    if content is None or parts_only:
        return None
    if not isinstance(content, str):
        raise ValueError(f"an answer whose {kind} is no text")
    return LONE_SURROGATE.sub("\ufffd", content)  # JSON can hold them, a file in UTF-8 cannot


def usage_of(usage: Any) -> dict[str, int]:
    """Return what is known of the tokens; counts that are no whole numbers from 0 on are left out."""
    if not isinstance(usage, dict):
        return {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    counts = {"prompt_tokens": usage.get("prompt_tokens"), "completion_tokens": usage.get("completion_tokens"), "cached_tokens": cached}
    return {name: n for name, n in counts.items() if isinstance(n, int) and not isinstance(n, bool) and n >= 0}


def _choice_probs(choice: Mapping[str, Any], words: tuple[str, ...]) -> dict[str, float] | None:
    """Return the probability of each word as the first token: a word's own forms (" Yes", "YES") and unique beginnings are summed up.

    A word that is not among the listed tokens gets 0; None where the server gave no probabilities.
    """
    logprobs = choice.get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not words or not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], dict):
        return None
    listed = tokens[0].get("top_logprobs")
    listed = listed if isinstance(listed, list) and listed else [tokens[0]]
    probs = dict.fromkeys(words, 0.0)
    for entry in listed:
        token, value = (entry.get("token"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
            continue
        said = token.strip(" \n\t\u2581\u0120\"'.*").casefold()
        meant = [word for word in words if word.casefold() == said]
        if not meant and len(said) > 1:
            meant = [word for word in words if word.casefold().startswith(said)]
        if len(meant) == 1:
            probs[meant[0]] += math.exp(min(float(value), 0.0))
    return {word: min(prob, 1.0) for word, prob in probs.items()}
