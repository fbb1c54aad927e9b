"""Chats with pictures as the inputs of a multimodal model, by its own chat template.

The template is rendered with one token a picture, which becomes as many as the picture has features; the text is tokenised as the model's
processor would tokenise it. Chats of a batch are padded on the left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.lm_framing import TEMPLATE_OPTIONS
from grex_mllm.models.multimodal.families import FAMILIES, Family, Layout

PREPROCESSOR, PROCESSOR, LEGACY_TEMPLATE = "preprocessor_config.json", "processor_config.json", "chat_template.json"
# special tokens with which some families write places; all others in a text would end a turn or stand for a picture
OF_PLACES = re.compile(
    r"</?\|?/?(object_ref|box|quad|ref|det|grounding|phrase|object|point|delimiter_of_multi_objects|patch_index_|loc|seg)[\w]*/?\|?>"
)
ANSWER, SPACE = "⟪answer⟫", "⟪space⟫"
_TASKS = ", which is asked by task words and takes no chat (`grex predict` can ask it)"
WHY_NOT = {
    **dict.fromkeys(("paligemma", "florence2", "kosmos-2"), _TASKS),
    "molmo2": ", whose image processor needs torchvision",
    "deepseek_vl": ", the first generation, which does not ground (DeepSeek-VL2 has no class in transformers: use a server)",
}


class Turn(Protocol):
    """One message. role: system, user or assistant.  parts: texts, `Space`, pictures as uint8 [H, W, 3] or objects with such `pixels`."""

    @property
    def role(self) -> str: ...
    @property
    def parts(self) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Space:
    """Room in a text for this many embeddings of the caller's own."""

    number: int


class Message(NamedTuple):
    """A `Turn`."""

    role: str
    parts: tuple[Any, ...]


class Chat:
    """The tokenizer, chat template and picture rules of one multimodal model.

    tokenizer: of transformers.  family: how pictures are taken.  config: the model's.  ends: ids that end an answer, the chat template's
    own first.  extras: name -> text of further files that `save` writes.
    """

    def __init__(self, config: Any, tokenizer: Any, processor: Any, settings: dict[str, Any], extra_ends: Sequence[int] = ()) -> None:
        self.config, self.tokenizer, self.settings = config, tokenizer, settings
        self.extras: dict[str, str] = {}
        self.family: Family = FAMILIES[config.model_type](config, processor, settings, tokenizer)
        self.pad_id = int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
        own = self._answer_end()
        self.ends = list(dict.fromkeys([own, int(tokenizer.eos_token_id), *extra_ends]))
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*tokenizer.all_special_tokens, self.family.place, self.family.image_token}
        control = sorted((t for t in {*special, SPACE} if not OF_PLACES.fullmatch(t)), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)))

    @classmethod
    def load(cls, name: str | Path, *, pixels: tuple[int, int] | None = None, tiles: int | None = None) -> Chat:
        """Read what belongs to a model: a folder or a hub id.

        pixels: least and most pixels of a picture (Qwen-VL).  tiles: most tiles of a picture (InternVL).  None: as the folder says.

        Raises:
            GrexError: no such model, one of a family that is not known, without a chat template, or a limit that its family lacks.
        """
        config, tokenizer, given, settings, ends = read_parts(name)
        if config.model_type not in FAMILIES:
            raise fault(
                f"multimodal model {name} of type {config.model_type}{WHY_NOT.get(config.model_type, '')}",
                f"one of {', '.join(FAMILIES)}",
                "use a model of these families",
            )
        if not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = _json(name, LEGACY_TEMPLATE).get("chat_template") or _json(name, PROCESSOR).get("chat_template")
        if not tokenizer.chat_template:
            raise fault(f"multimodal model {name} without a chat template", "chat_template.jinja in its folder", "use an instruct model")
        processor = picture_settings(config.model_type, given, pixels, tiles)
        return cls(config, tokenizer, processor, settings, ends)

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads: tokenizer, template, picture settings and the model's configuration, without weights."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(target))
        self.config.save_pretrained(str(target))
        self.family.processor.save_pretrained(str(target))
        (target / PROCESSOR).write_text(json.dumps({**self.settings, **self._saved_processor(target)}), encoding="utf-8")
        for file, text in self.extras.items():
            (target / file).write_text(text, encoding="utf-8")
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": self.ends}), encoding="utf-8")

    def _saved_processor(self, folder: Path) -> dict[str, Any]:
        saved = folder / PREPROCESSOR
        return {"image_processor": json.loads(saved.read_text(encoding="utf-8"))}

    def known(self) -> list[Any]:
        """Return what decides the inputs, as JSON holds it."""
        return [self.tokenizer.chat_template, self.family.processor.to_dict()]

    def render(self, turns: Sequence[Turn], generation: bool = True) -> str:
        """Return the text of a chat as the template writes it, one token a picture; with the opening of the answer, if `generation`."""
        messages = [{"role": turn.role, "content": self._content(turn.parts)} for turn in turns]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **TEMPLATE_OPTIONS))

    def inputs(self, chats: Sequence[Sequence[Turn]]) -> dict[str, Tensor]:
        """Return the model's inputs for B chats, padded on the left: input_ids, attention_mask int64 [B, L], and what its family needs.

        Raises:
            GrexError: a chat whose template drops a picture.
        """
        tensors, tokens = self.pictures([[pixels_of(part) for turn in chat for part in turn.parts if is_picture(part)] for chat in chats])
        return tensors | self.padded([self.row(chat, own)[0] for chat, own in zip(chats, tokens, strict=True)])

    def pictures(self, pictures: list[list[np.ndarray]]) -> tuple[dict[str, Tensor], list[list[str]]]:
        """Return what the model gets for the pictures of some chats, uint8 [H, W, 3], and the text that stands for each of them."""
        tensors, tokens = self.family.encode(pictures) if any(pictures) else ({}, [])
        following = iter(tokens)
        return tensors, [[next(following) for _ in some] for some in pictures]

    def row(self, turns: Sequence[Turn], tokens: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the ids of a chat, up to where its answer begins, and the positions of its spaces. tokens: of its pictures.

        Raises:
            GrexError: a chat whose template drops a picture.
        """
        pieces = self.render(turns).split(self.family.place)
        if len(pieces) != len(tokens) + 1:
            given = f"a chat with {len(tokens)} pictures of which the chat template writes {len(pieces) - 1}"
            raise fault(given, "a template that writes each picture once", "put pictures into the user's turns")
        text = pieces[0] + "".join(token + piece for token, piece in zip(tokens, pieces[1:], strict=True))
        first, *others = text.split(SPACE)
        ids, spaces = self.text_ids(first), list[int]()
        rooms = [part.number for turn in turns for part in turn.parts if isinstance(part, Space)]
        for number, piece in zip(rooms, others, strict=True):
            spaces += range(len(ids), len(ids) + number)
            ids += [self.pad_id] * number + list(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
        return ids, spaces

    def padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and token types int64 [B, L] of rows of ids, padded on the left."""
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        made = {"input_ids": ids, "attention_mask": mask}
        if self.family.token_types:
            made[self.family.token_types] = (ids == self.family.image_id).long() * mask
        return made

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a rendered chat."""
        bos = self.tokenizer.bos_token
        begun = bos is not None and text.startswith(bos)
        return list(self.tokenizer(text, add_special_tokens=not begun)["input_ids"])

    def answer_ids(self, text: str) -> list[int]:
        """Return the ids of an answer, without what ends it; special tokens in it are plain characters."""
        return list(self.tokenizer(" ".join(text.split()), add_special_tokens=False, split_special_tokens=True)["input_ids"])

    @property
    def unwritable(self) -> list[int]:
        """Ids that no expression contains: special tokens but the answer's end, and the picture's, sorted."""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return sorted({self.pad_id, *self.tokenizer.all_special_ids, *special, *self.ends, self.family.image_id} - {self.ends[0]})

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of an answer up to what ends it. special: keep special tokens, with which some families write boxes."""
        return decoded(self.tokenizer, ids, self.ends, special)

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of the picture that the model sees of an original of this size, without padding."""
        return self.family.sent_size(width, height)

    def layout(self, width: int, height: int) -> Layout:
        """Return where the image tokens of a picture of this size look."""
        return self.family.layout(width, height)

    def _content(self, parts: Sequence[Any]) -> list[dict[str, str]]:
        content: list[dict[str, str]] = []
        for picture, some in groupby(parts, is_picture):
            if picture:
                content += [{"type": "image"} for _ in some]
            else:
                content.append({"type": "text", "text": "".join(SPACE if isinstance(part, Space) else self._plain(part) for part in some)})
        return content

    def _plain(self, text: str) -> str:
        """Break the control tokens in a text."""
        return self._control.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)

    def _answer_end(self) -> int:
        """Return the id with which the template ends an answer: the first special token behind it, else the tokenizer's EOS."""
        said = [("user", "?"), ("assistant", ANSWER)]
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **TEMPLATE_OPTIONS)
        behind = self.tokenizer(text.partition(ANSWER)[2], add_special_tokens=False)["input_ids"]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return next((int(token) for token in behind if token in special), int(self.tokenizer.eos_token_id))


def read_parts(name: str | Path) -> tuple[Any, Any, dict[str, Any], dict[str, Any], list[int]]:
    """Return a model's configuration, tokenizer, settings of pictures and of its processor, and further ids that end an answer.

    Raises:
        GrexError: no such model.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(str(name))
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except (OSError, ValueError, KeyError) as error:
        raise fault(
            f"multimodal model {name}: {_line(error)}", "a folder with config.json and a tokenizer, or a hub id", "fix the path"
        ) from None
    settings = _json(name, PROCESSOR)
    pictures = settings.pop("image_processor", None) or _json(name, PREPROCESSOR)
    ends = _json(name, "generation_config.json").get("eos_token_id") or []
    return config, tokenizer, pictures, settings, ends if isinstance(ends, list) else [ends]


def decoded(tokenizer: Any, ids: Sequence[int], ends: Sequence[int], special: bool) -> str:
    """Return the text of an answer up to what ends it. special: keep special tokens."""
    kept = [int(i) for i in ids]
    at = next((n for n, i in enumerate(kept) if i in ends), len(kept))
    return str(tokenizer.decode(kept[:at], skip_special_tokens=not special, clean_up_tokenization_spaces=False)).strip()


def is_picture(part: Any) -> bool:
    """Tell whether a turn's part is a picture."""
    return not isinstance(part, str | Space)


def pixels_of(part: Any) -> np.ndarray:
    """Return uint8 [H, W, 3] of a picture among a turn's parts."""
    pixels: np.ndarray = part if isinstance(part, np.ndarray) else part.pixels
    return pixels


def picture_settings(model_type: str, given: dict[str, Any], pixels: tuple[int, int] | None, tiles: int | None) -> Any:
    """Return the image processor of a family. given: of a folder's file.  pixels, tiles: as in `Chat.load`.

    Raises:
        GrexError: a limit that the family lacks.
    """
    import transformers

    family = FAMILIES[model_type]
    options = {k: v for k, v in given.items() if k not in ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")}
    if pixels is not None:
        if family.name != "qwen":
            raise fault(f"limits of pixels for {model_type}", "a model of the Qwen-VL families", "leave them out")
        for name in ("min_pixels", "max_pixels"):
            options.pop(name, None)
        options["size"] = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    if tiles is not None:
        if family.name != "internvl":
            raise fault(f"a limit of tiles for {model_type}", "a model of the InternVL family", "leave it out")
        options["max_patches"] = tiles
    return getattr(transformers, family.image_processor)(**family.adjust(options))


def _json(name: str | Path, file: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    path = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    found: dict[str, Any] = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
