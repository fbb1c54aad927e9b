"""Models that are asked by a task word or a prefix instead of a chat: PaliGemma 1 and 2, Florence-2, Kosmos-2.

They have no chat template. A question is one picture and one text, which their own processors of transformers put together, and
`generate` of transformers writes the answer: Florence-2 encodes the question apart, PaliGemma reads it in both directions, Kosmos-2 marks
the places of a picture by a mask. So nothing is shared between the questions about one picture.
PaliGemma: Beyer et al. 2024; PaliGemma 2: Steiner et al. 2024; Florence-2: Xiao et al. 2024; Kosmos-2: Peng et al. 2023.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.multimodal.chat import OF_PLACES, Chat, Turn, decoded, is_picture, pixels_of, read_parts
from grex_mllm.models.multimodal.decoding import Answers, sampled


class Kind(NamedTuple):
    """processor, image_processor: classes of transformers; the latter on Pillow.  before: what stands before the text.

    apart: the question is encoded apart from the answer.  padding: on this side; "" = positions in an answer would count it, so a batch
    holds questions of one length.
    """

    processor: str
    image_processor: str
    before: str = ""
    apart: bool = False
    padding: str = "left"


KINDS = {
    "paligemma": Kind("PaliGemmaProcessor", "SiglipImageProcessorPil", before="<image>"),
    "florence2": Kind("Florence2Processor", "CLIPImageProcessorPil", apart=True, padding="right"),  # its positions count padding
    "kosmos-2": Kind("Kosmos2Processor", "CLIPImageProcessorPil", padding=""),
}
OUTSIDE = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")


class TaskWords:
    """What belongs to one model: tokenizer, processor, and what ends an answer.

    config: of the model.  tokenizer: of transformers.  pictures: settings of the image processor.  settings: of processor_config.json.
    """

    def __init__(
        self, config: Any, tokenizer: Any, pictures: dict[str, Any], settings: dict[str, Any], extra_ends: Sequence[int] = ()
    ) -> None:
        import transformers

        self.config, self.tokenizer, self.kind = config, tokenizer, KINDS[config.model_type]
        options = {key: value for key, value in pictures.items() if key not in OUTSIDE}
        self.image_processor = getattr(transformers, self.kind.image_processor)(**options)
        tokenizer.padding_side = self.kind.padding or "left"
        known = {key: settings[key] for key in ("num_additional_image_tokens", "num_patch_index_tokens") if key in settings}
        self.processor = getattr(transformers, self.kind.processor)(self.image_processor, tokenizer, **known)
        self.pad_id = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        self.ends = list(dict.fromkeys([int(tokenizer.eos_token_id), *extra_ends]))
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {"<image>", "</image>"}
        control = sorted((t for t in {*special, *tokenizer.all_special_tokens} if not OF_PLACES.fullmatch(t)), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)))

    @classmethod
    def load(cls, name: str | Path) -> TaskWords:
        """Read what belongs to a model of KINDS: a folder or a hub id.

        Raises:
            GrexError: no such model, or one whose files belong to code of its own.
        """
        config, tokenizer, pictures, settings, ends = read_parts(name)
        if getattr(config, "auto_map", None):
            given = f"multimodal model {name}, whose files belong to code of its own"
            raise fault(given, "a conversion for transformers (florence-community/Florence-2-large)", "use such a folder")
        return cls(config, tokenizer, pictures, settings, ends)

    def known(self) -> list[Any]:
        """Return what decides the inputs, as JSON holds it."""
        return [type(self.processor).__name__, self.image_processor.to_dict()]

    def question(self, turns: Sequence[Turn]) -> tuple[np.ndarray, str]:
        """Return the picture and the text of a question.

        Raises:
            ValueError: more than one user's turn with one picture in front of its text.
        """
        pictures = [part for turn in turns for part in turn.parts if is_picture(part)]
        if len(turns) != 1 or turns[0].role != "user" or len(pictures) != 1:
            raise ValueError(f"{self.config.model_type} takes one picture and one text, not a chat of {len(turns)} turns")
        text = "".join(part for part in turns[0].parts if isinstance(part, str))
        return pixels_of(pictures[0]), self._control.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)

    def inputs(self, chats: Sequence[Sequence[Turn]]) -> dict[str, Tensor]:
        """Return the model's inputs for B questions, padded to the longest.

        Raises:
            ValueError: what `question` raises, or a task word that stands with a text that it does not take.
        """
        asked = [self.question(chat) for chat in chats]
        texts = [self.kind.before + text for _, text in asked]
        given = self.processor(images=[one for one, _ in asked], text=texts, padding=True, return_tensors="pt")
        return {key: value for key, value in given.items() if key != "labels"}

    def decode(self, ids: Sequence[int], special: bool = True) -> str:
        """Return the text of an answer up to what ends it. special: keep special tokens, which location tokens are in some families."""
        return decoded(self.tokenizer, ids, self.ends, special)

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of the picture that the model sees: a square, whatever the original."""
        return int(self.image_processor.size["width"]), int(self.image_processor.size["height"])


@torch.no_grad()
def answer_tasks(
    model: Any, words: TaskWords, inputs: dict[str, Tensor], max_new_tokens: int, *, temperature: float, top_p: float, seeds: Sequence[int]
) -> Answers:
    """Answer B questions. inputs: of `TaskWords.inputs`, on the model's device; other arguments as in `decoding.write`.

    Nothing of the checkpoint's generation_config.json has a say, such as the three beams and the ban of repeated words of Florence-2.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    chosen = _Chosen(temperature, top_p, seeds)
    start = getattr(model.config.get_text_config(), "decoder_start_token_id", None)
    own = GenerationConfig(pad_token_id=words.pad_id, eos_token_id=words.ends, decoder_start_token_id=start, use_cache=True)
    for part in (model, getattr(model, "text_model", model)):  # values that are not set come from there; Kosmos-2 writes by a part
        part.generation_config = own
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=LogitsProcessorList([chosen]))
    tokens = tokens[:, -chosen.steps :]
    stops = torch.isin(tokens, torch.tensor(words.ends, device=tokens.device))
    ended = stops.any(1)
    length = torch.where(ended, stops.long().argmax(1), tokens.shape[1])
    assert chosen.first is not None
    return Answers(tokens, chosen.first, length.tolist(), ended.tolist())


class _Chosen:
    """Keeps the logits of the first token, and leaves but one token where answers are sampled: each row by random numbers of its own."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.first: Tensor | None = None
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        self.first = scores.clone() if self.first is None else self.first
        if self.temperature <= 0:
            return scores
        chance = torch.tensor([float(torch.rand((), generator=one, dtype=torch.float64)) for one in self.generators], dtype=torch.float64)
        token = sampled(scores.float() / self.temperature, self.top_p, chance.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def load_chat(name: str | Path, *, pixels: tuple[int, int] | None = None, tiles: int | None = None) -> Chat | TaskWords:
    """Read what belongs to a model, whether it is asked by chats or by task words. Arguments as in `Chat.load`.

    Raises:
        GrexError: what `Chat.load` and `TaskWords.load` raise, or a limit for a model that sees a square.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(str(name)).model_type
    except (OSError, ValueError, KeyError):
        kind = ""  # `Chat.load` says what is wrong
    if kind not in KINDS:
        return Chat.load(name, pixels=pixels, tiles=tiles)
    if pixels is not None or tiles is not None:
        raise fault(f"a limit of pixels or tiles for {kind}", "none: it sees every picture as a square", "leave it out")
    return TaskWords.load(name)
