"""Text encoder of the grounding model (BERT from transformers), and its tokenizer.

The tokenizer is the `tokenizers` object behind BERT's fast tokenizer, read from `tokenizer.json` or `vocab.txt`, so that data
is prepared without importing transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.compat import recompute_blocks
from grex_mllm.config import TextConfig
from grex_mllm.errors import fault
from grex_mllm.types import TextFeatures

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CHUNK = 10_000  # expressions that are tokenised at once to count their tokens


BERT_SIZES = {  # name in `TextConfig` -> BERT's
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}


class TextEncoder(nn.Module):
    """Encode expressions with a BERT without pooler."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        if config.path is not None:
            if not (Path(config.path) / "config.json").is_file():
                raise fault(f"model.text.path {config.path}", "a folder with config.json and weights", "fix the path, or leave it out")
            self.bert = BertModel.from_pretrained(
                config.path, add_pooling_layer=False, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout
            )
        else:
            sizes = {theirs: getattr(config, ours) for ours, theirs in BERT_SIZES.items()}
            bert = BertConfig(**sizes, hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)
            self.bert = BertModel(bert, add_pooling_layer=False)
        self.bert.set_attn_implementation(config.attention)
        self.bert.config.use_cache = False
        if config.gradient_checkpointing:
            recompute_blocks(self.bert)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.bert.config.hidden_size)

    def sizes(self) -> dict[str, int]:
        """Return the sizes under the names of `TextConfig`, so that a model folder can be built again without `path`."""
        return {ours: int(getattr(self.bert.config, theirs)) for ours, theirs in BERT_SIZES.items()}

    def forward(self, text_ids: Tensor, text_mask: Tensor) -> TextFeatures:
        """Return the last hidden state, padding rows included (the released ReLA reads them).

        text_ids, text_mask: int64 [E, L].  Returns tokens float [E, L, C].
        """
        tokens = self.bert(input_ids=text_ids, attention_mask=text_mask).last_hidden_state
        return TextFeatures(tokens, text_mask)


class TextTokenizer:
    """Turn expressions into BERT ids: [CLS] words [SEP], cut to a length (a long sentence loses [SEP], as released), zero-padded."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @property
    def vocabulary(self) -> list[str]:
        """The entry of every id."""
        return [str(self.tokenizer.id_to_token(number)) for number in range(self.vocab_size)]

    def encode(self, expressions: Sequence[str], max_tokens: int, pad: str = "max") -> tuple[Tensor, Tensor]:
        """Return ids and mask, int64 [E, L]; mask 1 on real tokens. pad: L = max_tokens ("max"), or the longest of these ("longest")."""
        rows = [encoding.ids[:max_tokens] for encoding in self.tokenizer.encode_batch(list(expressions))]
        length = max((len(row) for row in rows), default=1) if pad == "longest" else max_tokens
        ids = torch.zeros(len(expressions), length, dtype=torch.int64)
        mask = torch.zeros(len(expressions), length, dtype=torch.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def too_long(self, expressions: Sequence[str], max_tokens: int) -> list[int]:
        """Return the positions of the expressions that `encode` cuts."""
        found: list[int] = []
        for start in range(0, len(expressions), CHUNK):
            rows = self.tokenizer.encode_batch(list(expressions[start : start + CHUNK]))
            found += [start + i for i, row in enumerate(rows) if len(row.ids) > max_tokens]
        return found

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(Path(folder) / "tokenizer.json"))


def load_text_tokenizer(folder: str | Path) -> TextTokenizer:
    """Read `tokenizer.json`, or build BERT's lower-casing WordPiece from `vocab.txt`.

    Raises:
        GrexError: the folder has neither file.
    """
    from tokenizers import Tokenizer

    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return TextTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    if (folder / "vocab.txt").is_file():
        words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return TextTokenizer(_wordpiece({word.rstrip("\n"): i for i, word in enumerate(words)}))
    raise fault(f"tokenizer folder {folder}", "tokenizer.json or vocab.txt in it", "give a folder that has one")


def train_text_tokenizer(sentences: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a lower-casing WordPiece tokenizer on sentences; deterministic for a given list."""
    import tempfile

    from grex_mllm.models.lm_tokenizer import train_wordpiece

    with tempfile.TemporaryDirectory() as folder:
        train_wordpiece(sentences, folder, vocab_size)
        return load_text_tokenizer(folder)


def _wordpiece(vocab: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    for token in SPECIAL_TOKENS[:4]:
        if token not in vocab:
            raise fault(f"a vocabulary without {token}", f"BERT's special tokens {SPECIAL_TOKENS}", "give BERT's vocab.txt")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocab])
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return tokenizer
