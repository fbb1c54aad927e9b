"""Tokenizers: any text comes back, training is deterministic, faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grex_mllm.errors import GrexError
from grex_mllm.models.lm_tokenizer import SENTENCEPIECE_FILE, LMTokenizer, train_sentencepiece, train_wordpiece

LINES = ["the red circle", "the two blue squares on the left", "all objects except the large striped star", "every green ring"] * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LMTokenizer:
    return train_sentencepiece(LINES, tmp_path_factory.mktemp("tokenizer"), 2000)


@pytest.mark.parametrize(
    "text",
    [
        "the red circle",
        "новый круг 红色的圆",
        "😀 die größte Ente, links!",
        "<s> the </s> <pad> <unk> <0x41>",
        "a\x00b \ufffd \ue000",
        "Ａ ｆｕｌｌ ﬁ",
    ],
)
def test_any_text_comes_back(tokenizer: LMTokenizer, text: str) -> None:
    ids, mask = tokenizer.encode([text, "the"])
    assert ids.dtype == mask.dtype == torch.int64
    assert tokenizer.decode(ids[0].tolist()) == text
    assert tokenizer.decode(ids[1].tolist()) == "the"
    assert int(mask[1].sum()) < ids.shape[1] and (ids[1][mask[1] == 0] == tokenizer.pad_id).all()
    assert tokenizer.bos_id not in ids[0, 1:].tolist() and tokenizer.hf.unk_token_id not in ids[0].tolist()


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1).filter(
        lambda text: bool(text.split())
    )
)
@settings(max_examples=200, deadline=None)
def test_random_text_comes_back(tokenizer: LMTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode([text])[0][0].tolist()) == " ".join(text.split())


def test_ids_are_those_of_sentencepiece(tokenizer: LMTokenizer, tmp_path: Path) -> None:
    import sentencepiece

    train_sentencepiece(LINES, tmp_path, 2000)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / SENTENCEPIECE_FILE))
    for line in [*LINES, "an unseen ördinary line"]:
        assert tokenizer.text_ids(line) == reference.encode(line)


def test_training_twice_gives_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_sentencepiece(LINES, tmp_path / name, 400)
        train_wordpiece(LINES, tmp_path / name, 200)
    for file in (SENTENCEPIECE_FILE, "vocab.txt"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_vocabulary_shrinks_with_the_corpus(tokenizer: LMTokenizer, tmp_path: Path) -> None:
    assert 260 < len(tokenizer) < 500
    assert len(train_sentencepiece(LINES * 5, tmp_path, 300)) <= 300
    assert (
        train_sentencepiece(["a"], tmp_path / "one", 300).decode(train_sentencepiece(["a"], tmp_path / "two", 300).text_ids("ab")) == "ab"
    )


def test_saved_tokenizer_is_the_same(tokenizer: LMTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = LMTokenizer.load(tmp_path)
    assert [again.text_ids(line) for line in LINES] == [tokenizer.text_ids(line) for line in LINES]
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_wordpiece_works_in_bert(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = train_wordpiece([*LINES, "Größe Привет"], tmp_path, 260)
    vocabulary = path.read_text(encoding="utf-8").split()
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(vocabulary) == len(set(vocabulary)) <= 260
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    bert = AutoTokenizer.from_pretrained(tmp_path)
    assert bert.tokenize("The RED circle") == ["the", "red", "circle"]
    assert "[UNK]" not in bert.tokenize("zqx-17 (unseen) ~{words}! größe привет")


def test_wordpiece_merges_the_most_frequent_pair_first(tmp_path: Path) -> None:
    size = 5 + 2 * len({chr(c) for c in range(33, 127) if not chr(c).isupper()})
    new = train_wordpiece(["abab cd cd cd"], tmp_path, size + 2).read_text(encoding="utf-8").split()[size:]
    assert new == ["cd", "##ab"]


def test_faults_name_the_text(tokenizer: LMTokenizer, tmp_path: Path) -> None:
    with pytest.raises(GrexError, match="is empty"):
        tokenizer.encode(["the", "  "])
    with pytest.raises(GrexError, match="no text"):
        train_sentencepiece(["", " "], tmp_path)
    with pytest.raises(GrexError, match="no text"):
        train_wordpiece([], tmp_path)
    with pytest.raises(GrexError, match="at least 260"):
        train_sentencepiece(LINES, tmp_path, 100)
    with pytest.raises(GrexError, match="at least"):
        train_wordpiece(LINES, tmp_path, 20)
    with pytest.raises(GrexError, match="nowhere"):
        LMTokenizer.load(tmp_path / "nowhere")
