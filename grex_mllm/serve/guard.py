"""What stands before every request: who may ask, from where, how much, and what a browser may do with the answer.

The page is of one origin. A page of another origin can send requests to a server on loopback as well, so each of them must come from here:
the Host header is one of ours (no DNS rebinding), Origin and Sec-Fetch-Site are our own, and a body has a type that no HTML form sends.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from grex_mllm.serve.limits import BODY_TIMEOUT_S, MAX_JSON_BYTES, MAX_UPLOAD_BYTES

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp")
OPEN_PATHS = ("/", "/docs", "/page/")  # the page itself holds no secret; it asks for the token
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
POLICY += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Refusal(Exception):
    """status: of HTTP.  text: what was given, what is expected, what to do."""

    status: int
    text: str


class Guard:
    """An ASGI application around another one. token: demanded as `Authorization: Bearer`.  loopback: serve names of this machine alone."""

    def __init__(self, app: App, token: str | None, loopback: bool) -> None:
        self.app, self.token, self.loopback = app, token, loopback

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            self._check(scope["method"], scope["path"], headers)
            body = await _body(receive, headers) if scope["method"] == "POST" else b""
        except Refusal as refusal:
            await _refuse(guarded, refusal)
            return
        await self.app(scope, _replay(body, receive), guarded)

    def _check(self, method: str, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.loopback and _without_port(host) not in LOOPBACK:
            raise Refusal(421, f"the host {host[:80]!r}; expected localhost or 127.0.0.1; open the address that grex serve printed")
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != host
        if foreign or (method == "POST" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")):
            raise Refusal(403, "a request of a page from elsewhere; expected this server's own page; open it here")
        if method not in ("GET", "HEAD", "POST"):
            raise Refusal(405, f"the method {method[:20]}; expected GET or POST; see /docs")
        if self.token is not None and not _is_open(path):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                raise Refusal(401, "no valid token; expected the server's own (Authorization: Bearer TOKEN); ask whoever runs it")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/page/")


def _without_port(host: str) -> str:
    return host if host.endswith("]") else host.rpartition(":")[0] or host


async def _body(receive: Receive, headers: dict[str, str]) -> bytes:
    """Return a request's whole body, of a type and size that this server takes."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (*IMAGE_TYPES, "application/json"):
        raise Refusal(415, f"the content type {kind[:60]!r}; expected application/json, or {', '.join(IMAGE_TYPES)} for a picture; set it")
    limit = MAX_JSON_BYTES if kind == "application/json" else MAX_UPLOAD_BYTES
    large = Refusal(413, f"more than {limit:,} bytes; expected at most that; send less, or a smaller picture")
    if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > limit:
        raise large
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            parts, size, more = [], 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(400, "a request that was broken off; expected its whole body; send it again")
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > limit:
                    raise large
    except TimeoutError:
        raise Refusal(408, f"a body that took over {BODY_TIMEOUT_S:.0f} s; expected it sooner; send it again") from None
    body = b"".join(parts)
    if kind == "application/json":
        try:
            json.loads(body)
        except (ValueError, RecursionError):
            raise Refusal(400, "a body that is no JSON, or nested too deeply; expected an object as /docs shows; fix it") from None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one piece, then what else the client says (that it went away)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"error": refusal.text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
