"""What a user can set about a model that is asked without training: `--ask.prompt=native`, `--server.concurrency=4`, `--local.batch=8`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from grex_mllm.config import parsed
from grex_mllm.errors import fault
from grex_mllm.zeroshot.local_settings import LocalSettings
from grex_mllm.zeroshot.server.settings import ServerSettings

ROOTS = ("ask", "server", "local")
GROUNDING_TASKS = ("grec", "gres", "count")


@dataclass(frozen=True)
class AskSettings:
    """How questions are put, and how answers are read.

    family: of the model (`zeroshot/families`); None = found by the model's name.
    task: of the question about an expression: grec (boxes), gres (what becomes masks: points, polygons) or count (a number alone).
    prompt, describe, exists: names of prompts of `eval/prompts`, or paths of your own: of that task, of greg, and of "is there ...?";
    None = the family's native one, else uniform.
    masks: what turns an answer into a mask: box, polygon, mask (as the model wrote it), sam:FOLDER, or none (boxes alone).
    mask_device: of the segmenter.
    reject: none, twice, consistency:K@T or probability:P (`zeroshot/rejection.py`).
    rerank: of generated expressions: none, or own_grounding:K@T: K candidates beside the greedy one, of which the model chooses by
    grounding them itself (`zeroshot/listening.py`).
    shots: examples from `shots_split`.  structured: answers by a JSON schema, where the server offers it.
    seed: of sampling, and of the choice of examples.
    """

    family: str | None = None
    task: str = "grec"
    prompt: str | None = None
    describe: str | None = None
    exists: str | None = None
    masks: str = "box"
    mask_device: str = "auto"
    reject: str = "none"
    rerank: str = "none"
    shots: int = 0
    shots_split: str = "train"
    structured: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise GrexError on a value that nothing can be done with."""
        if self.task not in GROUNDING_TASKS:
            raise fault(f'ask.task "{self.task}"', f"one of {', '.join(GROUNDING_TASKS)}", "fix it")
        if self.shots < 0:
            raise fault(f"ask.shots {self.shots}", "0 or more examples", "fix it")


@dataclass(frozen=True)
class Settings:
    """ask: see `AskSettings`.  server: of a model behind one.  local: of a model that this process loads."""

    ask: AskSettings = field(default_factory=AskSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    local: LocalSettings = field(default_factory=LocalSettings)


def read_settings(overrides: Sequence[str]) -> Settings:
    """Return the settings of `--ask.a=b` flags; other flags are left to the rest of the command.

    Raises:
        GrexError: an unknown name, or a value of the wrong type or out of its range.
    """
    own = [item for item in overrides if item.lstrip("-").partition(".")[0] in ROOTS]
    made: Settings = parsed(Settings, {}, own, "", "command line")
    made.ask.check()
    return made
