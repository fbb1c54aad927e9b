"""What a run would send and cost, before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from grex_mllm.zeroshot.base import Request
from grex_mllm.zeroshot.server.address import HIDDEN
from grex_mllm.zeroshot.server.bodies import shortened
from grex_mllm.zeroshot.server.server import Server
from grex_mllm.zeroshot.server.settings import ServerSettings
from grex_mllm.zeroshot.server.tally import cost_of

TURN_TOKENS = 5  # what a chat template puts around a message
LETTERS_PER_TOKEN = 4.0
WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7a3\u3040-\u30ff]")  # of scripts in which a letter is about a token

ImageTokens = Callable[[int, int], int]


@dataclass(frozen=True)
class Estimate:
    """calls: requests.  tokens_in: estimated.  tokens_out: at most, as every answer may be as long as it is allowed.  cost: at most."""

    calls: int
    tokens_in: int
    tokens_out: int
    cost: float

    def lines(self) -> list[str]:
        """Return what a person reads before a run."""
        money = f", cost at most {self.cost:.2f}" if self.cost else ""
        return [f"{self.calls:,} calls, about {self.tokens_in:,} tokens in, at most {self.tokens_out:,} out{money}"]


def describe_request(request: Request, server: Server) -> dict[str, Any]:
    """Return a request as it would be sent: pictures as their size and SHA-256, the key as a mark."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {HIDDEN}"} if server.key.is_set else {})
    return {"method": "POST", "url": server.caller.url, "headers": headers, "body": shortened(server.caller.body(request))}


def estimate(requests: Iterable[Request], settings: ServerSettings, image_tokens: ImageTokens) -> Estimate:
    """Return what requests would need, without caches of prompts.

    image_tokens: of a picture of (width, height), by the family's rule.  Text counts as four letters a token, one in Chinese, Japanese and
    Korean; a first real call tells better.
    """
    calls = tokens_in = tokens_out = 0
    for request in requests:
        calls += 1
        tokens_out += request.max_tokens
        for turn in request.turns:
            tokens_in += TURN_TOKENS
            for part in turn.parts:
                tokens_in += text_tokens(part) if isinstance(part, str) else image_tokens(part.pixels.shape[1], part.pixels.shape[0])
    return Estimate(calls, tokens_in, tokens_out, cost_of(tokens_in, 0, tokens_out, settings))


def text_tokens(text: str) -> int:
    """Return about how many tokens a text has."""
    wide = len(WIDE.findall(text))
    return wide + -int(-(len(text) - wide) // LETTERS_PER_TOKEN)
