"""Entry "own_grounding" of `LISTENERS`: the multimodal model of the generator `mllm` as the listener of its own candidates.

It is asked as in zero-shot GREC (`listening`), as its makers trained it: the adapters that learned to describe are off.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.marks import Shown
from grex_mllm.models.answer import EncodedImage
from grex_mllm.models.multimodal import Chat
from grex_mllm.ops.masks import mask_to_box_xyxy
from grex_mllm.precision import Resolved
from grex_mllm.predictors.protocol import Answer
from grex_mllm.zeroshot.base import Conversation, Picture
from grex_mllm.zeroshot.families import family_of_type
from grex_mllm.zeroshot.listening import KIND, agreement, listening_prompt
from grex_mllm.zeroshot.local import Local
from grex_mllm.zeroshot.local_settings import LocalSettings
from grex_mllm.zeroshot.prompts import Prompt
from grex_mllm.zeroshot.rejection import located
from grex_mllm.zeroshot.talk import Talk


class OwnGrounding:
    """The multimodal model of a generator as the listener of its own candidates: as its makers trained it, adapters off.

    costs: calls and tokens so far.

    Raises:
        GrexError: a generator without a multimodal model, or one whose family nobody knows.
    """

    def __init__(self, model: Any) -> None:
        self.generator = model.generator
        chat = getattr(self.generator, "tokenizer", None)
        if not isinstance(chat, Chat):
            raise fault(f'rerank "{KIND}" with a generator that is asked no chats', "model.generator.name: mllm", 'use "listener"')
        self.family = family_of_type(chat.config.model_type)
        self.prompt = listening_prompt(self.family)
        settings = LocalSettings(batch=min(8, self.generator.cfg.max_rows))
        self.backend = Local.around(self.generator.base, chat, settings, Resolved("fp32", "as the generator computes"))

    @property
    def costs(self) -> dict[str, int]:
        """Calls of the model, tokens read and written."""
        done = self.backend.done
        return {name: done[name] for name in ("calls", "prompt_tokens", "cached_tokens", "completion_tokens")}

    def agreements(self, encoded: EncodedImage, masks: np.ndarray, sets: list[list[int]], texts: list[list[str]]) -> list[list[float]]:
        """Return, for each text of each set, how well it leads the model back to that set; see `agreement`.

        masks: bool [N, H0, W0], every known object.  sets: positions in masks.  A text that several sets have is asked about once.
        """
        if encoded.original is None:
            raise fault("an encoded image without its original", "one that the model encoded itself", "give the image")
        picture = Picture(encoded.original)
        height, width = picture.pixels.shape[:2]
        view = self.family.view(width, height, self.backend.view(width, height))
        asked = list(dict.fromkeys(text for options in texts for text in options))
        talks = (_heard(Talk(f"{n}", (picture,), view, {"expression": text}), self.prompt) for n, text in enumerate(asked))
        with self.generator.without_adapters():
            found = {asked[int(answer.key)]: answer.fields["parsed"] for answer in self.backend.hold(talks)}
        known = [Shown(mask, tuple(mask_to_box_xyxy(mask))) for mask in masks]  # type: ignore[arg-type]
        return [
            [agreement(found[text], [known[n] for n in chosen]) for text in options] for chosen, options in zip(sets, texts, strict=True)
        ]


def listener(model: Any) -> OwnGrounding:
    """Return the entry's listener for a model with a generator."""
    return OwnGrounding(model)


def _heard(talk: Talk, prompt: Prompt) -> Conversation:
    (parsed,) = yield from located(talk, prompt)
    return Answer(talk.key, fields={"parsed": parsed, "raw": talk.raw})
