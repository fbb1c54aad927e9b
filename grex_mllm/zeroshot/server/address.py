"""Where the server is, and the key: which addresses are accepted, and how the key stays out of everything that is written."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import urllib.parse

from grex_mllm.errors import fault

HIDDEN = "[key]"
SECRET_FROM = 12  # shorter ones are placeholders ("none", "EMPTY"); a model may say such a word, so that answers keep it
MASKED = re.compile(r"\bsk-[\w*.-]{4,}|(?<=Bearer )(?!\[key\])[^\s\"']{4,}")


def check_address(base_url: str, allow_http: bool) -> str:
    """Return the address without a slash at its end.

    Raises:
        GrexError: no http(s) address, one that holds credentials or a query, http to another machine without `allow_http`. The message
            never shows what an address holds beside host and path.
    """
    try:
        parts = urllib.parse.urlsplit(base_url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        raise fault("a base URL that cannot be read", "such as http://localhost:8000/v1", "fix --base-url") from None
    if parts.scheme not in ("http", "https") or not host:
        given = "a base URL without http:// or https://" if host is None else f"base URL {parts.scheme}://{host}"
        raise fault(given, "such as http://localhost:8000/v1", "fix --base-url")
    shown = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}{parts.path}".rstrip("/")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise fault(f"a base URL {shown} with a user, password, query or fragment", "host and path alone", "give the key by environment")
    if parts.scheme == "http" and not (allow_http or is_loopback(host)):
        raise fault(f"base URL {shown}", "https to another machine", "set allow_http, if the network between is your own")
    return shown


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine by its name alone; nothing is looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Key:
    """The key of a server, read from the environment. Neither repr nor errors show it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._value = os.environ.get(name, "").strip()
        if not (self._value.isascii() and self._value.isprintable()) or " " in self._value:
            raise fault(f"{name} holds blanks, line breaks or other letters than ASCII", "the key alone", "set the variable again")
        quoted = {urllib.parse.quote(self._value, safe=""), urllib.parse.quote_plus(self._value), json.dumps(self._value)[1:-1]}
        self._forms = sorted({self._value, *quoted} - {""}, key=len, reverse=True)

    def __repr__(self) -> str:
        return f"Key({self.name}, {'set' if self._value else 'not set'})"

    def __reduce__(self) -> tuple[type[Key], tuple[str]]:
        return Key, (self.name,)

    @property
    def is_set(self) -> bool:
        """Tell whether the variable holds a key."""
        return bool(self._value)

    def headers(self) -> dict[str, str]:
        """Return the header that carries the key; none without one."""
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def hide_in_answer(self, text: str) -> str:
        """Take the key out of what a model said; a placeholder of a few letters stays, since it may be a word."""
        return self._replace(text) if len(self._value) >= SECRET_FROM else text

    def hide(self, text: str) -> str:
        """Take the key, whole or masked, out of a message about a server."""
        return MASKED.sub(HIDDEN, self._replace(text))

    def _replace(self, text: str) -> str:
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        return text
