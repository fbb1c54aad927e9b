"""A chat-completions server on loopback whose answers are scripted, and a proxy that breaks some of what passes through it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]
JSON = {"Content-Type": "application/json"}
BUSY = json.dumps({"error": {"message": "busy", "type": "overloaded", "code": None}}).encode()


def completion(text: str | None, finish: str = "stop", usage: tuple[int, int, int] | None = (100, 10, 0), **more: Any) -> Reply:
    """Return a chat completion. usage: tokens of the prompt, of the answer, and of the prompt's cached part."""
    message = {"role": "assistant", "content": text, "refusal": more.pop("refusal", None)}
    body: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, **more}],
    }
    if usage is not None:
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": usage[0] + usage[1]}
        body["usage"] = {**counts, "prompt_tokens_details": {"cached_tokens": usage[2]}}
    return 200, JSON, json.dumps(body).encode()


def failure(status: int, message: str, headers: dict[str, str] | None = None, **fields: Any) -> Reply:
    """Return an error in OpenAI's shape."""
    return status, {**JSON, **(headers or {})}, json.dumps({"error": {"message": message, **fields}}).encode()


def last_text(body: dict[str, Any]) -> str:
    """Return the text of the last message."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handle: Callable[[_Handler], None]) -> None:
        self.handle_post, self.sockets = handle, set[socket.socket]()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def do_POST(self) -> None:
        self.content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.handle_post(self)

    def reply(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
        self.send_response_only(status)  # without a date of its own
        for name, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def cut(self) -> None:
        """Break the connection off, as a killed server does."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Place:
    """Something that listens on loopback. It can die and come back at the same port."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.lock = threading.Lock()
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._listener: _Listener | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._listener = _Listener(("127.0.0.1", self.port), self._take)
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def die(self) -> None:
        """Close the port and every connection."""
        assert self._listener is not None
        self._listener.shutdown()
        self._listener.server_close()
        for open_one in list(self._listener.sockets):
            try:
                open_one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self._listener = None

    def close(self) -> None:
        if self._listener is not None:
            self.die()

    def _take(self, handler: _Handler) -> None:
        body = json.loads(handler.content)
        with self.lock:
            self.seen.append(body)
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            number = len(self.seen) - 1
        try:
            self.answer(handler, body, number)
        except OSError:  # the client hung up, or this place died
            handler.close_connection = True

    def answer(self, handler: _Handler, body: dict[str, Any], number: int) -> None:
        raise AssertionError("of the classes below")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeServer(_Place):
    """Answers POST /v1/chat/completions with what `script(body)` returns. seen, headers: of all requests so far."""

    def __init__(self, script: Callable[[dict[str, Any]], Reply], port: int = 0, delay_s: float = 0.0) -> None:
        self.script, self.delay_s = script, delay_s
        super().__init__(port)

    def answer(self, handler: _Handler, body: dict[str, Any], number: int) -> None:
        time.sleep(self.delay_s)
        handler.reply(*self.script(body)) if handler.path == "/v1/chat/completions" else handler.reply(
            404, JSON, b'{"detail": "Not Found"}'
        )


FAULTS = (
    "429", "429 date", "500", "503", "529", "408", "cut before", "cut within", "reset", "stall", "trickle", "malformed", "truncated",
    "empty", "wrong type", "html", "html 502", "error in 200", "no choices", "null",
)  # fmt: skip


class FaultyProxy(_Place):
    """Passes requests on to another server, or does what `fault(number of the request)` names, one of FAULTS; "" = passes it on."""

    def __init__(self, upstream: int, fault: Callable[[int], str], stall_s: float = 1.0, port: int = 0) -> None:
        self.upstream, self.fault, self.stall_s = upstream, fault, stall_s
        self.done: list[str] = []
        super().__init__(port)

    def answer(self, handler: _Handler, body: dict[str, Any], number: int) -> None:
        fault = self.fault(number)
        with self.lock:
            self.done.append(fault)
        plain = {
            "429": (429, {**JSON, "Retry-After": "0.2"}, BUSY),
            "429 date": (429, {**JSON, "Retry-After": "Wed, 21 Oct 2015 07:28:01 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}, BUSY),
            "500": (500, JSON, BUSY),
            "503": (503, JSON, b'{"detail": "loading"}'),
            "529": (529, JSON, json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}).encode()),
            "408": (408, {}, b""),
            "malformed": (200, JSON, b"{'choices': [oops}"),
            "empty": (200, JSON, b""),
            "wrong type": (200, {"Content-Type": "text/event-stream"}, b'data: {"choices": []}\n\n'),
            "html": (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><html><body>Please log in</body></html>"),
            "html 502": (502, {"Content-Type": "text/html"}, b"<html><h1>502 Bad Gateway</h1></html>"),
            "error in 200": (200, JSON, BUSY),
            "no choices": (200, JSON, b'{"choices": []}'),
            "null": (200, JSON, b"null"),
        }
        if fault in plain:
            handler.reply(*plain[fault])
        elif fault == "cut before":
            handler.cut()
        elif fault == "stall":
            time.sleep(self.stall_s)
            handler.cut()
        else:
            self._broken(handler, fault)

    def _broken(self, handler: _Handler, fault: str) -> None:
        """Ask the server; the answer comes whole, or is broken on the way, so that the server has done its work in vain."""
        way = HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        way.request("POST", handler.path, handler.content, dict(handler.headers.items()))
        response = way.getresponse()
        status, content = response.status, response.read()
        way.close()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in ("content-length", "date", "server")}
        half = content[: len(content) // 2]
        if fault == "":
            handler.reply(status, headers, content)
        elif fault == "truncated":
            handler.reply(status, headers, half)
        elif fault in ("cut within", "reset"):
            handler.reply(status, headers, half, len(content))
            handler.cut() if fault == "reset" else handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif fault == "trickle":
            handler.reply(status, headers, b"", len(content))
            for n in range(len(content)):
                handler.wfile.write(content[n : n + 1])
                time.sleep(self.stall_s / 20)
        else:
            raise AssertionError(fault)


@contextmanager
def faulty(
    script: Callable[[dict[str, Any]], Reply], fault: Callable[[int], str], stall_s: float = 1.0
) -> Iterator[tuple[FakeServer, FaultyProxy]]:
    """Yield a server, and a proxy before it."""
    with FakeServer(script) as server, FaultyProxy(server.port, fault, stall_s) as proxy:
        yield server, proxy
