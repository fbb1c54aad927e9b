"""Text encoder of the systems before BERT: word vectors, from a file or learned, and a bi-directional GRU; its vocabulary of whole words.

Liu's thesis, sections 3.2.1, 4.3 and 5.3: GloVe vectors of 300 numbers, bi-GRU states as word features, a weighted sum of them as the
sentence. As in the public code of that line of work, the states of both directions are added. It gives the same `TextFeatures` as BERT:
the sentence in row 0 (the place of [CLS], which is no word), the words after it. There is no end mark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grex_mllm.config import TextConfig
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.text import SPECIAL_TOKENS, TextTokenizer
from grex_mllm.types import TextFeatures

SENTENCES = ("attention", "channels", "final")
WORD_MARKS = SPECIAL_TOKENS[:3]  # padding, unknown words, and the place of the sentence
MAX_LINE_BYTES = 1 << 16
START_STD = 0.1  # of vectors that no file gives; those of GloVe have a standard deviation of 0.2 to 0.4


class WordEncoder(nn.Module):
    """Encode expressions with word vectors and a GRU in both directions. Padding is never read."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.sentence not in SENTENCES:
            raise fault(f'model.text.sentence "{config.sentence}"', f"one of {', '.join(SENTENCES)}", "fix the name")
        if config.gradient_checkpointing:
            raise fault("model.text.gradient_checkpointing with bigru", "false there: it has no blocks", "turn it off")
        width = config.hidden_size
        self.sentence = config.sentence
        self.vectors = nn.Embedding(config.vocab_size, config.word_width)
        nn.init.normal_(self.vectors.weight, std=START_STD)
        self.onward = nn.GRU(config.word_width, width, batch_first=True)
        self.back = nn.GRU(config.word_width, width, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        if config.sentence != "final":
            self.inner = nn.Linear(width, width)
            self.score = nn.Linear(width, width if config.sentence == "channels" else 1, bias=False)  # a bias is nothing to a softmax

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.onward.hidden_size)

    def sizes(self) -> dict[str, int]:
        """Return the sizes under the names of `TextConfig`, so that a model folder can be built again."""
        return {"vocab_size": self.vectors.num_embeddings, "word_width": self.vectors.embedding_dim, "hidden_size": self.width}

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> TextFeatures:
        """Return the sentence and the words of E expressions.

        text_ids, text_mask: int64 [E, L], of which column 0 is the place of the sentence.  Returns tokens float [E, L, C].
        """
        ids, real = text_ids[:, 1:], text_mask[:, 1:].bool()
        if ids.shape[1] == 0:  # nobody has a word
            ids, real = text_ids.new_zeros(len(text_ids), 1), real.new_zeros(len(text_ids), 1)
        num_words = real.sum(dim=1).clamp(min=1)  # without any, one padding row stands for the words
        real = real | (torch.arange(real.shape[1], device=real.device) == 0)
        vectors = self.vectors(ids)
        order = mirror(num_words, ids.shape[1])
        onward = self.onward(vectors)[0]
        back = take_rows(self.back(take_rows(vectors, order))[0], order)
        words = self.dropout(onward + back)
        sentence = self._sentence(onward, back, words, real, num_words)
        tokens = torch.cat([sentence[:, None], words], dim=1)
        return TextFeatures(tokens[:, : text_ids.shape[1]], text_mask)

    def _sentence(self, onward: Tensor, back: Tensor, words: Tensor, real: Tensor, num_words: Tensor) -> Tensor:
        if self.sentence == "final":
            last = onward.gather(1, (num_words - 1)[:, None, None].expand(-1, 1, onward.shape[-1]))
            return self.dropout(last[:, 0] + back[:, 0])
        scores = self.score(self.inner(words).tanh()).float().masked_fill(~real[..., None], -torch.inf)
        return (scores.softmax(dim=1).to(words.dtype) * words).sum(dim=1)

    def start_from(self, file: str, words: Sequence[str]) -> int:
        """Copy the vectors of a file into the rows of the words that it has, and return how many it has. words: of each id."""
        found = read_word_vectors(file, words, self.vectors.embedding_dim)
        with torch.no_grad():
            for row, word in enumerate(words):
                if word in found:
                    self.vectors.weight[row] = torch.from_numpy(found[word])
        return len(found)


def mirror(num_words: Tensor, length: int) -> Tensor:
    """Return int64 [E, L]: places of the words in reverse order, and of the padding behind them as it is; its own inverse."""
    place = torch.arange(length, device=num_words.device)
    back = num_words[:, None] - 1 - place
    return torch.where(back >= 0, back, place)


def take_rows(x: Tensor, order: Tensor) -> Tensor:
    """Return rows of x [E, L, C] in an order int64 [E, L]."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


def file_lines(file: str | Path) -> Iterator[tuple[str, list[bytes]]]:
    """Yield word and numbers of every line of a text file of word vectors, "word 0.1 -0.2 ...". Spaces may be part of a word.

    Raises:
        GrexError: no file, or a line that is too long.
    """
    file = Path(file)
    if not file.is_file():
        raise fault(f"model.text.path {file}", "a text file of word vectors (glove.840B.300d.txt)", "fix the path, or leave it out")
    width = 0
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > MAX_LINE_BYTES:
                raise fault(
                    f"{file}, line {number} of over {MAX_LINE_BYTES:,} bytes", "a word and its vector", "give a file of word vectors"
                )
            parts = line.split()
            if number == 1 and len(parts) == 2:  # the head of word2vec's text form: number of words, and of numbers
                continue
            width = width or len(parts) - 1
            if len(parts) <= width or width == 0:
                raise fault(f"{file}, line {number} of {len(parts)} parts", f"a word and {max(width, 1)} numbers", "copy the file again")
            yield b" ".join(parts[:-width]).decode("utf-8", "replace"), parts[-width:]


def read_word_vectors(file: str | Path, words: Iterable[str], width: int) -> dict[str, np.ndarray]:
    """Return word -> float32 [width] of the words that a text file has; the file is read once, line by line, and nothing of it is run.

    Raises:
        GrexError: vectors of another width, or what is no finite number.
    """
    wanted, found = set(words), {}
    for word, numbers in file_lines(file):
        if len(numbers) != width:
            raise fault(f"{file} with vectors of {len(numbers)} numbers", f"model.text.word_width = {width}", "change one of them")
        if word not in wanted or word in found:
            continue
        try:
            vector = np.array([float(number) for number in numbers], np.float32)
        except ValueError:
            raise fault(f'{file}: the vector of "{word}"', f"{width} numbers", "copy the file again") from None
        if not np.isfinite(vector).all():
            raise fault(f'{file}: the vector of "{word}" is not finite', f"{width} finite numbers", "copy the file again")
        found[word] = vector
    if not found:
        raise GrexError(f"{file} has none of the {len(wanted)} words of the vocabulary; expected some; give the vectors of its language")
    return found


def make_word_tokenizer(config: TextConfig, sentences: Callable[[], Iterable[str]]) -> TextTokenizer:
    """Return the tokenizer of a vocabulary of at most `vocab_size` entries.

    tokenizer: "train": the most frequent words of the training expressions; None: the first words of the file of vectors.
    """
    room = config.vocab_size - len(WORD_MARKS)
    if room < 1:
        raise fault(f"model.text.vocab_size {config.vocab_size}", f"more than the {len(WORD_MARKS)} marks", "raise it")
    if config.tokenizer is None:
        lower = (word.lower() for word, _ in file_lines(str(config.path)))
        return word_tokenizer(islice(dict.fromkeys(lower), room))
    split = word_tokenizer([]).tokenizer
    counts = Counter(
        word for sentence in sentences() for word, _ in split.pre_tokenizer.pre_tokenize_str(split.normalizer.normalize_str(sentence))
    )
    return word_tokenizer(word for word, _ in counts.most_common(room))


def word_tokenizer(words: Iterable[str]) -> TextTokenizer:
    """Build a lower-casing tokenizer of whole words, split at spaces and punctuation: the sentence's place, then the words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*WORD_MARKS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORD_MARKS[1]))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start = WORD_MARKS[2]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, vocabulary[start])])
    return TextTokenizer(tokenizer)
