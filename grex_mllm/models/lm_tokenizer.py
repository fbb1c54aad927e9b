"""Tokenizers: sentencepiece for the generator's language model, WordPiece for the grounding text encoder; training is deterministic.

The sentencepiece model is BPE with byte fallback, so text of any script and emoji come back unchanged; only runs of white space
(with sentencepiece's own sign for it, U+2581) become one space.
"""

from __future__ import annotations

import heapq
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grex_mllm.errors import fault
from grex_mllm.models.lm_framing import resolve_style, turn_end

if TYPE_CHECKING:
    from torch import Tensor

SENTENCEPIECE_FILE = "tokenizer.model"
SMALLEST_VOCABULARY = 260  # 256 bytes, <unk>, <s>, </s>, <pad>
WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_WORD = 100  # BERT's WordPiece gives [UNK] to longer words


class LMTokenizer:
    """Turn expressions into token ids with BOS and EOS, and ids into text.

    Wraps a Hugging Face tokenizer of any kind (sentencepiece folder, LLM folder or hub id). Special tokens written in the text
    (such as "</s>") are treated as plain characters. style: auto | chat | plain. In a chat, EOS is what the chat template ends an answer
    with (<|im_end|>, <|eot_id|>, <end_of_turn>, ...). The first id of a row stands for whatever opens the expression in front of the LM
    (`lm_framing`): BOS, or EOS where the LM has none. Where it has no padding token, EOS pads (masked).

    Raises:
        GrexError: no EOS, an unknown style, or chat without a chat template that takes a question and an answer.
    """

    def __init__(self, tokenizer: Any, style: str = "auto") -> None:
        if tokenizer.eos_token_id is None:
            raise fault(
                f"tokenizer {tokenizer.name_or_path!r} without an end-of-text token", "one with eos_token", "set eos_token in its folder"
            )
        self.hf, self.style = tokenizer, resolve_style(tokenizer, style)
        self.eos_id = turn_end(tokenizer) if self.style == "chat" else int(tokenizer.eos_token_id)
        self.bos_id = self.eos_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    @classmethod
    def load(cls, path: str | Path, style: str = "auto") -> LMTokenizer:
        """Read a tokenizer folder or a hub id.

        Raises:
            GrexError: the folder holds no tokenizer, the hub id cannot be had, or the style does not fit.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise fault(
                f"language-model tokenizer {path}: {reason}", "a folder with tokenizer files or a hub id", "give another path or train one"
            ) from None
        return cls(tokenizer, style)

    def in_style(self, style: str) -> LMTokenizer:
        """Return this tokenizer, or one of the other style. Raises as the class."""
        return self if resolve_style(self.hf, style) == self.style else LMTokenizer(self.hf, style)

    @property
    def num_ids(self) -> int:
        """One more than the largest id; an LLM may have more embeddings than that."""
        return max(self.hf.get_vocab().values()) + 1

    @property
    def unwritable(self) -> list[int]:
        """Ids that no expression contains: special tokens but EOS, sorted."""
        special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special}
        return sorted({self.bos_id, self.pad_id, *self.hf.all_special_ids, *special} - {self.eos_id})

    def __len__(self) -> int:
        return len(self.hf)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer so that `load` and `AutoTokenizer.from_pretrained` read it."""
        self.hf.save_pretrained(str(folder))

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of one text without BOS and EOS."""
        return list(self.hf(" ".join(text.split()), add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (ids, mask) int64 [E, L], each row BOS + text + EOS, right-padded; mask 1 = real token.

        Raises:
            GrexError: an empty text.
        """
        import torch

        rows = []
        for text in texts:
            ids = self.text_ids(text)
            if not ids:
                raise fault(f"expression {text!r} is empty", "a text with at least one character", "give one")
            rows.append([self.bos_id, *ids, self.eos_id])
        length = max((len(row) for row in rows), default=0)
        ids_out = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), length), dtype=torch.int64)
        for i, row in enumerate(rows):
            ids_out[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids_out, mask

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the first EOS (a BOS in front is skipped)."""
        kept = [int(i) for i in ids]
        if kept and kept[0] == self.bos_id:
            kept = kept[1:]
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        return str(self.hf.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def train_sentencepiece(lines: Iterable[str], folder: str | Path, vocab_size: int = 1000) -> LMTokenizer:
    """Train BPE with byte fallback on lines, write a folder that AutoTokenizer reads, and return the tokenizer.

    The vocabulary gets smaller than `vocab_size` where the corpus does not have that many pieces. Equal lines give equal files.

    Raises:
        GrexError: no text, or a vocabulary too small for the 256 bytes and 4 special tokens.
    """
    import sentencepiece

    corpus = [text for line in lines if (text := " ".join(line.split()))]
    if not corpus:
        raise fault("no text to train a tokenizer on", "at least one non-empty line", "give a corpus")
    if vocab_size < SMALLEST_VOCABULARY:
        raise fault(
            f"vocabulary of {vocab_size} pieces", f"at least {SMALLEST_VOCABULARY} (256 bytes, 4 special tokens)", "raise vocab_size"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=max(vocab_size, SMALLEST_VOCABULARY + len(set("".join(corpus))) + 2),
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return LMTokenizer.load(target)


def train_wordpiece(lines: Iterable[str], folder: str | Path, vocab_size: int = 2000) -> Path:
    """Train a BERT WordPiece vocabulary (lower case, accents stripped) on lines and write `<folder>/vocab.txt`; return its path.

    Pieces are merged by pair count, ties in alphabetical order, so equal lines give equal files (the `tokenizers` trainer does not).
    Every printable ASCII character is in the vocabulary, so ASCII text never becomes [UNK].

    Raises:
        GrexError: no text, or a vocabulary smaller than its characters.
    """
    words = _count_words(lines)
    if not words:
        raise fault("no text to train a vocabulary on", "at least one non-empty line", "give a corpus")
    characters = {chr(code) for code in range(33, 127) if not chr(code).isupper()} | {c for word in words for c in word}
    vocabulary = [*WORDPIECE_SPECIAL, *sorted(characters), *(f"##{c}" for c in sorted(characters))]
    if vocab_size < len(vocabulary):
        raise fault(f"vocabulary of {vocab_size} pieces", f"at least {len(vocabulary)}, one for each character", "raise vocab_size")
    vocabulary += _merge_pairs(words, vocab_size - len(vocabulary), set(vocabulary))
    path = Path(folder) / "vocab.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return path


def _count_words(lines: Iterable[str]) -> Counter[str]:
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normaliser, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words: Counter[str] = Counter()
    for line, times in Counter(lines).items():
        for word, _span in splitter.pre_tokenize_str(normaliser.normalize_str(line)):
            if len(word) <= LONGEST_WORD:
                words[word] += times
    return words


def _merge_pairs(words: Counter[str], room: int, known: set[str]) -> list[str]:
    """Return up to `room` new pieces: repeatedly join the most frequent neighbouring pair (Sennrich et al. 2016, with BERT's ## prefix)."""
    items = sorted(words.items())
    pieces = [[c if i == 0 else f"##{c}" for i, c in enumerate(word)] for word, _count in items]
    counts: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for k, parts in enumerate(pieces):
        for pair in pairwise(parts):
            counts[pair] += items[k][1]
            where[pair].add(k)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    new: list[str] = []
    while heap and len(new) < room:
        count, pair = heapq.heappop(heap)
        if counts[pair] != -count or count == 0:
            continue  # an older entry of a pair whose count has changed since
        joined = pair[0] + pair[1].removeprefix("##")
        if joined not in known:
            known.add(joined)
            new.append(joined)
        changed: set[tuple[str, str]] = set()
        for k in sorted(where.pop(pair)):
            before, after = pieces[k], _join(pieces[k], pair, joined)
            for sign, parts in ((-1, before), (1, after)):
                for neighbours in pairwise(parts):
                    counts[neighbours] += sign * items[k][1]
                    changed.add(neighbours)
                    if sign > 0:
                        where[neighbours].add(k)
            pieces[k] = after
        for item in changed:
            if counts[item] > 0:
                heapq.heappush(heap, (-counts[item], item))
    return new


def _join(parts: list[str], pair: tuple[str, str], joined: str) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(parts):
        found = tuple(parts[i : i + 2]) == pair
        out.append(joined if found else parts[i])
        i += 2 if found else 1
    return out
