"""One question on its way: the requests that it needs, and everything that came back."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from grex_mllm.zeroshot.base import Picture, RawAnswer, Request, Turn, View
from grex_mllm.zeroshot.prompts import Prompt

T = TypeVar("T")
Asked = Generator[list[Request], list[RawAnswer], T]


@dataclass
class Talk:
    """The requests of one question.

    key: of the question.  pictures: of the last user turn.  view: of the first picture, before the model has said what it saw.
    words: what a prompt's places are filled with.  shots: turns of examples for each prompt, by "task/name".
    seed: of all sampling.  structured: ask for the prompt's JSON schema.
    raw: what came back, in order, with step, prompt and the size of the picture that the parser went by.  flags: in order, each once.
    """

    key: str
    pictures: tuple[Picture, ...]
    view: View
    words: dict[str, Any]
    shots: dict[str, tuple[Turn, ...]] = field(default_factory=dict)
    seed: int = 0
    structured: bool = False
    raw: list[dict[str, Any]] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    def ask(
        self, step: str, prompt: Prompt, *, samples: int = 1, temperature: float | None = None, choices: Sequence[str] = ()
    ) -> Asked[list[tuple[RawAnswer, View]]]:
        """Ask a prompt `samples` times in one round; return the answers, each with the view that it was given in.

        temperature: None = as the prompt file says.
        """
        system, user = prompt.render(self.view, **self.words)
        turns: tuple[Turn, ...] = (Turn("system", (system,)),) if system is not None else ()
        turns += (*self.shots.get(f"{prompt.task}/{prompt.name}", ()), Turn("user", (*self.pictures, user)))
        made = [
            Request(
                key=f"{self.key}#{step}" + (f".{n}" if samples > 1 else ""),
                turns=turns,
                max_tokens=prompt.max_tokens,
                temperature=prompt.sampling.temperature if temperature is None else temperature,
                top_p=prompt.sampling.top_p,
                seed=self.seed,
                sample=n,
                schema=prompt.schema if self.structured else None,
                choices=tuple(choices),
            )
            for n in range(samples)
        ]
        answers = yield made
        found = []
        for answer in answers:
            sent = answer.sent or (self.view.sent_width, self.view.sent_height)
            view = View(self.view.width, self.view.height, *sent)
            self.raw.append({"step": step, "prompt": prompt.sha256, **answer.fields(), "sent": list(sent)})
            found.append((answer, view))
        return found

    def note(self, flags: Sequence[str]) -> None:
        """Keep flags, each once."""
        self.flags.extend(flag for flag in flags if flag not in self.flags)

    def fields(self) -> dict[str, Any]:
        """Return what a prediction line keeps."""
        return {"raw": self.raw} | ({"flags": self.flags} if self.flags else {})
