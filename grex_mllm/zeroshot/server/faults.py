"""What a response means: an answer, a fault that passes, one that stays, or one that ends the run. Nothing is sent from here.

Rules as the makers of the public clients publish them: 408, 409, 429 and 5xx pass; `retry-after-ms` and `retry-after` are minimum pauses;
`x-should-retry: false` is a veto; what a quota, a balance or a key refuses is refused again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from grex_mllm.zeroshot.base import RawAnswer, Request
from grex_mllm.zeroshot.server.bodies import read_answer

PASSING = {408, 409, 425, 429}
QUOTA_CODES = {
    "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance", "insufficient_credits",
    "insufficient_funds", "credit_balance_too_low", "spend_limit_reached", "access_terminated", "payment_required",
}  # fmt: skip
QUOTA_WORDS = re.compile(r"insufficient[ _](balance|credit|fund)|credit balance is too low|spend(ing)? limit|PerDay", re.I)
FILTER_CODES = {"content_filter", "content_policy_violation", "moderation_blocked"}
REFUSED_FIELD = re.compile(
    r"unsupported|not (yet )?supported|unrecogni[sz]ed|unknown|unexpected|extra (inputs|fields)|not (permitted|allowed)|does not support",
    re.I,
)
DROPPABLE = ("temperature", "top_p", "seed", "response_format", "structured_outputs", "logprobs", "top_logprobs")
TOGETHER = ("logprobs", "top_logprobs")
SHOWN = 300


@dataclass
class Verdict:
    """What a response means.

    kind: "answer" | "retry" (it may pass) | "adapt" (the server refuses `fields`) | "fail" (of this request alone) | "refused" (of this
    request, or of the run where nothing has succeeded yet) | "stop" (of the run).
    reason: in words.  wait_s: least pause before the next try.  pause_s: least pause for every request (rate limits).
    """

    kind: str
    reason: str = ""
    answer: RawAnswer | None = None
    wait_s: float = 0.0
    pause_s: float = 0.0
    fields: tuple[str, ...] = ()


@dataclass
class ServerError:
    """The error that a body tells, in any of the shapes that servers use."""

    message: str
    codes: set[str] = field(default_factory=set)
    param: str | None = None
    refused: tuple[str, ...] = ()


def judge(status: int, headers: Mapping[str, str], content: bytes, request: Request, body: Mapping[str, Any]) -> Verdict:
    """Return what a whole response to `request`, sent as `body`, means. headers: names in lower case."""
    data, broken = _parse(content)
    error = error_of(data)
    if 200 <= status < 300:
        if isinstance(data, dict) and error is None:
            try:
                return Verdict("answer", answer=read_answer(data, request), pause_s=rate_limit_pause(headers))
            except ValueError as wrong:
                return Verdict("retry", f"status {status} with {wrong}")
        if error is None:
            return Verdict("retry", f"status {status} with {broken or 'JSON that is no object'}")
        numbers = [int(code) for code in error.codes if code.isdigit() and 400 <= int(code) < 600]
        status = numbers[0] if numbers else 500
    said = error or ServerError(_excerpt(content) or "no message")
    reason = f"status {status}: {said.message}"
    if said.codes & FILTER_CODES:
        return Verdict("answer", answer=RawAnswer(None, "content_filter", said.message))
    if status == 402 or said.codes & QUOTA_CODES or (status in (403, 429) and QUOTA_WORDS.search(said.message)):
        return Verdict("stop", f"{reason} (quota or balance)")
    if 300 <= status < 400:
        return Verdict("stop", f"status {status}, a redirect to {headers.get('location', 'nowhere')}, which is not followed")
    if status == 401:
        return Verdict("stop", reason)
    if status in PASSING or status >= 500:
        if headers.get("x-should-retry", "").lower() == "false":
            return Verdict("fail", f"{reason} (the server says: do not retry)")
        wait_s = max(retry_after(headers), rate_limit_pause(headers))
        return Verdict("retry", reason, wait_s=wait_s, pause_s=wait_s if status == 429 else 0.0)
    fields = refused_fields(said, body) if status in (400, 422) else ()
    if fields:
        return Verdict("adapt", reason, fields=fields)
    return Verdict("refused" if status in (403, 404) else "fail", reason)


def error_of(data: Any) -> ServerError | None:
    """Return the error of a body: {"error": {...} | text}, {"detail": text | [...]}, flat {"message", "code", "object": "error"}."""
    if isinstance(data, list) and len(data) == 1:  # as one cloud wraps it
        data = data[0]
    if not isinstance(data, dict) or data.get("choices"):
        return None
    inner = data.get("error")
    if isinstance(inner, str) and inner:
        return ServerError(_short(inner))
    if isinstance(inner, dict):
        return _flat(inner)
    detail = data.get("detail")
    if isinstance(detail, str):
        return ServerError(_short(detail))
    if isinstance(detail, list):
        items = [item for item in detail if isinstance(item, dict)]
        message = "; ".join(f"{item.get('msg')} {item.get('loc')}" for item in items) or str(detail)
        extra = [item["loc"][-1] for item in items if item.get("type") == "extra_forbidden" and isinstance(item.get("loc"), list)]
        return ServerError(_short(message), refused=tuple(str(name) for name in extra))
    if data.get("object") == "error" or ("message" in data and "code" in data):
        return _flat(data)
    return None


def _flat(error: Mapping[str, Any]) -> ServerError:
    codes = {str(error[name]).lower() for name in ("code", "type", "status") if isinstance(error.get(name), str | int)}
    message = error.get("message")
    param = error.get("param")
    return ServerError(
        _short(message if isinstance(message, str) else json.dumps(dict(error))), codes, param if isinstance(param, str) else None
    )


def refused_fields(error: ServerError, body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields of a body that the server refuses as such, of those that can be left out or have another name."""
    known = [name for name in ("max_tokens", *DROPPABLE) if name in body]
    if error.refused:
        found = [name for name in known if name in error.refused]
    elif "invalid schema" in error.message.lower() or "invalid_json_schema" in error.codes or not REFUSED_FIELD.search(error.message):
        found = []
    elif error.param is not None:
        found = [name for name in known if name == error.param.split(".")[0]]
    else:
        found = [name for name in known if re.search(rf"(?<!\w){name}(?!\w)", error.message)]
    if set(found) & set(TOGETHER):
        found += [name for name in TOGETHER if name in body and name not in found]
    return tuple(found)


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that the server asks to wait: milliseconds, seconds, or a date beside its own clock; 0 = it asks nothing."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    date = _date(headers.get("retry-after"))
    return 0.0 if date is None else max(date - (_date(headers.get("date")) or time.time()), 0.0)


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, TypeError, OverflowError):
        return None


def rate_limit_pause(headers: Mapping[str, str]) -> float:
    """Return the seconds until a limit that is used up (x-ratelimit-remaining-* is 0) is reset; 0 = none is."""
    waits = [0.0]
    for kind in ("requests", "tokens"):
        if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0":
            waits.append(duration(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return max(waits)


def duration(text: str) -> float:
    """Return the seconds of "1s", "6m0s", "20ms", "1h2m", "2.5" or of a time since 1970; 0 where it is none of them."""
    text = text.strip()
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
    if parts and "".join(f"{n}{unit}" for n, unit in parts) == text:
        return sum(float(n) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[unit] for n, unit in parts)
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        return 0.0
    seconds = float(text)
    return seconds if seconds < 1e9 else max(seconds - time.time(), 0.0)


def _parse(content: bytes) -> tuple[Any, str]:
    """Return the JSON of a body, and why there is none."""
    if not content.strip():
        return None, "an empty body"
    try:
        return json.loads(content), ""
    except (ValueError, RecursionError):
        start = content.lstrip()[:15].lower()
        return None, "an HTML page" if start.startswith((b"<!doctype", b"<html", b"<?xml")) else "a body that is no whole JSON"


def _excerpt(content: bytes) -> str:
    text = re.sub(r"<[^>]*>", " ", content[: 20 * SHOWN].decode("utf-8", "replace"))
    return _short(" ".join(text.split()))


def _short(text: str) -> str:
    """Return a text of one line, without what steers a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
