"""What stands around the region tokens of a language model: BOS, instruction, chat template, and the token that opens the expression.

An instruct model is asked as it was trained to be asked: the chat template of its tokenizer is rendered with a place holder among the
user's words, and the ids left and right of the place holder are the frame. What the template writes after an answer is the token that ends
an expression. A base model gets its BOS at the very beginning, and a line break opens the expression. The built-in tiny model has its BOS
there instead.
"""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any, NamedTuple

from grex_mllm.errors import fault

PLACE = "{regions}"
# chat, where no prompt is configured; words before the regions are the same for all object sets and cost next to nothing
INSTRUCTION = f"Name exactly the marked objects of the image in one short expression.\n{PLACE}"
STYLES = ("auto", "chat", "plain")
SEPARATORS = ("\n", ":", " ")  # the first one that the tokenizer has opens an expression that no prompt or template opens
WRITTEN = datetime(2024, 7, 26)  # the date in templates that print today's (Llama's own default): else a model's inputs change overnight
TEMPLATE_OPTIONS: dict[str, Any] = {
    "enable_thinking": False,
    "date_string": WRITTEN.strftime("%d %b %Y"),
    "strftime_now": WRITTEN.strftime,
}
REGIONS_MARK, ANSWER_MARK = "<|grex_regions|>", "<|grex_answer|>"


class Frame(NamedTuple):
    """Token ids around the region tokens: before, regions, after, opener, expression, end. The opener also carries the set's summary."""

    before: list[int]
    after: list[int]
    opener: int


def resolve_style(hf: Any, style: str) -> str:
    """Return "chat" or "plain" for a style of STYLES; auto is chat where the tokenizer `hf` of transformers has a chat template.

    Raises:
        GrexError: an unknown style, or chat without a template.
    """
    if style not in STYLES:
        raise fault(f"prompt_style {style!r}", f"one of {', '.join(STYLES)}", "fix model.generator.prompt_style")
    has_template = bool(getattr(hf, "chat_template", None))
    if style == "chat" and not has_template:
        raise fault(
            f"prompt_style chat with tokenizer {hf.name_or_path!r}, which has no chat template",
            "the tokenizer of an instruct model",
            "set prompt_style: plain, or put chat_template.jinja into the model's folder",
        )
    return ("chat" if has_template else "plain") if style == "auto" else style


def turn_end(hf: Any) -> int:
    """Return the id with which the chat template ends an answer: the first special token behind it, else the tokenizer's EOS.

    Raises:
        GrexError: the template does not take a question and an answer.
    """
    marked, ids = _rendered(hf, [_turn("user", "?"), _turn("assistant", ANSWER_MARK)], ANSWER_MARK, generation=False)
    behind = ids[ids.index(marked) + 1 :]
    special = {*hf.all_special_ids, *(hf.added_tokens_decoder or {})}
    return next((token for token in behind if token in special), int(hf.eos_token_id))


def tiny_frame(hf: Any, bos_id: int, prompt: str) -> Frame:
    """Return the frame of the built-in tiny model: the prompt around the regions, and BOS, with which all of its texts begin, as opener."""
    before, after = _prompt_ids(hf, prompt)
    return Frame(before, after, bos_id)


def plain_frame(hf: Any, prompt: str) -> Frame:
    """Return the frame of a base model: BOS where the tokenizer puts one, the prompt, and a separator where no words follow the regions."""
    before, after = _prompt_ids(hf, prompt)
    first = list(hf("a")["input_ids"])[:1]
    if hf.bos_token_id is not None and first == [hf.bos_token_id]:
        before = [*first, *before]
    after = after or _separator(hf)
    return Frame(before, after[:-1], after[-1])


def chat_frame(hf: Any, prompt: str) -> Frame:
    """Return the frame of an instruct model: what its chat template writes around the regions, up to where its answer begins.

    The ids are those of `apply_chat_template(..., add_generation_prompt=True)` with a token of its own in the regions' place.

    Raises:
        GrexError: the template does not write the user's words exactly once.
    """
    marked, ids = _rendered(hf, [_turn("user", (prompt or INSTRUCTION).replace(PLACE, REGIONS_MARK))], REGIONS_MARK, generation=True)
    at = ids.index(marked)
    after = ids[at + 1 :] or _separator(hf)
    return Frame(ids[:at], after[:-1], after[-1])


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(hf: Any, messages: list[dict[str, str]], mark: str, generation: bool) -> tuple[int, list[int]]:
    """Return the id of `mark`, made a special token of a copy of the tokenizer, and the ids of the rendered chat, which hold it once."""
    from jinja2.exceptions import TemplateError
    from tokenizers import AddedToken

    marking = copy.deepcopy(hf)
    marking.add_tokens([AddedToken(mark, normalized=False, special=True)], special_tokens=True)
    marked = int(marking.convert_tokens_to_ids(mark))
    try:
        ids = marking.apply_chat_template(messages, add_generation_prompt=generation, tokenize=True, return_dict=False, **TEMPLATE_OPTIONS)
        reason = f"writes {ids.count(marked)} times what it is given"
    except (TemplateError, TypeError, ValueError) as error:
        ids, reason = [], str(error).splitlines()[0] if str(error) else type(error).__name__
    if ids.count(marked) != 1:
        raise fault(
            f"the chat template of tokenizer {hf.name_or_path!r}: {reason}",
            "a template that takes a user's text and an answer and writes each once",
            "set model.generator.prompt_style: plain, or fix the template",
        )
    return marked, list(ids)


def _prompt_ids(hf: Any, prompt: str) -> tuple[list[int], list[int]]:
    before, after = prompt.split(PLACE) if prompt else ("", "")
    return _ids(hf, before), _ids(hf, after)


def _separator(hf: Any) -> list[int]:
    found = (_ids(hf, text) for text in SEPARATORS)
    return next((ids for ids in found if ids and hf.unk_token_id not in ids), [int(hf.eos_token_id)])


def _ids(hf: Any, text: str) -> list[int]:
    return list(hf(text, add_special_tokens=False)["input_ids"]) if text else []
