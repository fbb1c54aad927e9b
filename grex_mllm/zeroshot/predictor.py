"""A multimodal language model as a predictor: `qwen2.5-vl:FOLDER`, `openai:MODEL` with a base_url.

Every prediction line keeps the raw answers (`raw`), the rules of the parser that were needed (`flags`) and who answered (`by`), so that a
better parser never costs a second run: `reparse:FILE` reads the raw answers of a predictions file again. What differs from run to run
(time, cost, answers out of the store) stands in a file of its own beside the predictions, so that equal answers are equal files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Abilities, Answer, Item, Options, costs_file
from grex_mllm.zeroshot.asking import Asking
from grex_mllm.zeroshot.base import Backend, Conversation, Request
from grex_mllm.zeroshot.families import FAMILIES, Family, find_family
from grex_mllm.zeroshot.listening import parse_reranking
from grex_mllm.zeroshot.prompts import find_prompt
from grex_mllm.zeroshot.rejection import parse_rejection
from grex_mllm.zeroshot.segmenters import open_segmenter
from grex_mllm.zeroshot.settings import ROOTS, Settings, read_settings
from grex_mllm.zeroshot.shots import choose_shots, shot_turns

SERVER = "openai"
CACHE = "answers.sqlite"  # beside the predictions, unless --server.cache says otherwise
PREVIEWED = 200  # questions from which --dry-run estimates the whole


class ZeroShot:
    """Asks a backend about every expression and object set; see `Asking` for the ways of asking.

    Raises:
        GrexError: settings, prompts, model or server at fault.
    """

    def __init__(self, backend: Backend, family: Family, settings: Settings, options: Options) -> None:
        self.backend, self.family, self.settings, self.options = backend, family, settings, options
        ask = settings.ask
        rejection = parse_rejection(ask.reject)
        lacks = {} if getattr(backend, "chats", True) else family.lacks
        self._check_tasks(lacks, rejection.asks_existence)
        self.asking = Asking(
            family,
            locate=find_prompt(ask.task, family, ask.prompt or ""),
            describe=None if "greg" in lacks else find_prompt("greg", family, ask.describe or ""),
            exists=find_prompt("exists", family, ask.exists or "") if rejection.asks_existence else None,
            rerank=parse_reranking(ask.rerank),
            segmenter=None if ask.task == "count" else open_segmenter(ask.masks, ask.mask_device),
            rejection=rejection,
            view=backend.view,
            seed=ask.seed,
            structured=ask.structured,
        )
        if ask.shots:
            self._add_shots()
        self.by = f"{backend.name}, {self.asking.name}"
        self.can = Abilities(
            ("ground",) if "greg" in lacks else ("ground", "generate"),
            lacks={"generate": f"{family.name}: {lacks['greg']}"} if "greg" in lacks else {},
            how=f"by {self.by}",
            remarks=lambda _: self.backend.remarks(),
            takes=ROOTS,
            asks_again=True,
            finish=getattr(backend, "close", lambda: None),
            preview=self.preview,
        )

    def _check_tasks(self, lacks: Mapping[str, str], asks_existence: bool) -> None:
        """Refuse what a model that takes no chat cannot be asked."""
        ask = self.settings.ask
        wanted = {"greg": f"ask.describe {ask.describe}" if ask.describe else "", "count": "ask.task count" if ask.task == "count" else ""}
        wanted["exists"] = f"ask.reject {ask.reject}" if asks_existence else ""
        for task, given in wanted.items():
            if given and task in lacks:
                raise fault(f"{given} with {self.family.name}: {lacks[task]}", "what its tasks allow", "leave it out")
        if ask.shots and not getattr(self.backend, "chats", True):
            raise fault(f"ask.shots {ask.shots} with {self.family.name}, which takes no chat", "no examples", "leave them out")

    def _add_shots(self) -> None:
        ask, asking = self.settings.ask, self.asking
        if self.options.data is None:
            raise fault(f"ask.shots {ask.shots} without a dataset", "one whose train split gives the examples", "use grex predict")
        for prompt, targeted in ((asking.locate, False), (asking.exists, False), (asking.describe, True)):
            if prompt is None:
                continue
            root = self.options.image_root
            chosen = choose_shots(self.options.data, ask.shots, ask.seed, split=ask.shots_split, image_root=root, targeted=targeted)
            asking.shown.update(shot.record.image_id for shot in chosen)
            asking.shots[f"{prompt.task}/{prompt.name}"] = shot_turns(chosen, prompt, self.family, asking.view_of)

    def fingerprint(self) -> str:
        """Name backend and way of asking."""
        return json.dumps(["zero-shot", self.backend.fingerprint(), self.asking.fingerprint()])

    def ground(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Ask about every open expression."""
        return self._signed("ground", self.backend.hold(self._grounds(items)))

    def describe(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Ask for an expression for every open object set."""
        return self._signed("generate", self.backend.hold(self._describes(items)))

    def _grounds(self, items: Iterable[Item]) -> Iterator[Conversation]:
        for item in items:
            for record in item.open_expressions:
                _ = item.image  # read here: a backend's threads must not share a file
                yield self.asking.ground(item, record)

    def _describes(self, items: Iterable[Item]) -> Iterator[Conversation]:
        for item in items:
            for targets in item.open_sets:
                _ = item.image, item.masks
                yield self.asking.describe_set(item, targets)

    def _signed(self, task: str, answers: Iterator[Answer]) -> Iterator[Answer]:
        """Add who answered; move what differs from run to run into the file of costs."""
        with ExitStack() as opened:
            costs = None
            if self.options.out is not None:
                path = costs_file(self.options.out)
                path.parent.mkdir(parents=True, exist_ok=True)
                costs = opened.enter_context(path.open("a", encoding="utf-8"))
            for answer in answers:
                spent = take_costs(answer.fields.get("raw", []))
                if costs is not None:
                    costs.write(json.dumps({"task": task, **spent}) + "\n")
                    costs.flush()
                answer.fields["by"] = self.by
                yield answer

    def preview(self, items: Iterable[Item], tasks: list[str]) -> dict[str, Any]:
        """Return the first request of each task as it would be sent, and an estimate of the whole run; nothing is sent."""
        from grex_mllm.zeroshot.preview import preview

        asked: dict[str, Callable[[Iterable[Item]], Iterator[Conversation]]] = {"ground": self._grounds, "generate": self._describes}
        items = list(items)
        numbers = {
            "ground": sum(len(item.open_expressions) for item in items),
            "generate": sum(len(item.open_sets) for item in items),
        }
        first = {task: [_first_round(talk) for talk in islice(asked[task](items), PREVIEWED)] for task in tasks}
        return preview(self.backend, self.asking, first, {task: numbers[task] for task in tasks}, self.settings)


def take_costs(raw: list[dict[str, Any]]) -> dict[str, float]:
    """Take out of the raw answers of a line what differs from run to run, and return its sums."""
    spent = {"calls": float(len(raw)), "cached": 0.0, "seconds": 0.0, "cost": 0.0, "cached_tokens": 0.0}
    for answer in raw:
        for name in ("cached", "seconds", "cost"):
            spent[name] += float(answer.pop(name, 0.0))
        usage = answer.get("usage", {})
        spent["cached_tokens"] += float(usage.pop("cached_tokens", 0))
    return {name: round(value, 6) for name, value in spent.items()}


def _first_round(conversation: Conversation) -> list[Request]:
    requests = next(conversation)
    conversation.close()
    return requests


def open_backend(head: str, model: str, settings: Settings, options: Options) -> tuple[Backend, Family]:
    """Return the backend and the family of FAMILY:MODEL or openai:MODEL.

    Raises:
        GrexError: no server, a model whose family nobody knows, or what the backend raises.
    """
    if head == SERVER:
        from dataclasses import replace

        from grex_mllm.zeroshot.server.server import Server

        base_url = options.asked.get("base_url")
        if base_url is None:
            raise fault(f"{head}:{model} without --base-url", "the server's address, as http://localhost:8000/v1", "give it")
        server = settings.server
        if server.cache is None and options.out is not None:
            server = replace(server, cache=str(Path(options.out).with_name(CACHE)))
        return Server(model, base_url, server), find_family(settings.ask.family or model)
    if "base_url" in options.asked:
        raise fault(f"--base-url with {head}:{model}", f"{SERVER}:MODEL, which is behind a server", "leave it out, or use openai:MODEL")
    from grex_mllm.zeroshot.local import Local

    return Local(model, settings.local, options.device), find_family(settings.ask.family or head)


def build(argument: str, options: Options) -> ZeroShot:
    """Return the predictor of "FAMILY:FOLDER" or "openai:MODEL"; options.asked may hold base_url.

    Raises:
        GrexError: what `ZeroShot`, `open_backend` and `read_settings` raise.
    """
    head, _, model = argument.partition(":")
    if not model or (head != SERVER and head not in FAMILIES):
        raise fault(f'"{argument}"', f"FAMILY:FOLDER with one of {', '.join(FAMILIES)}, or {SERVER}:MODEL", "fix --model")
    settings = read_settings(options.overrides)
    backend, family = open_backend(head, model, settings, options)
    return ZeroShot(backend, family, settings, options)
