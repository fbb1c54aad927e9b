"""Model folders stand alone: loading needs no BERT beside them, and a training that starts from one needs no other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_configs import FOLDER, shrink
from tiny import WORDS
from tiny_folder import tiny_folder

from grex_mllm.config import Config, load_config
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import load_text_tokenizer, train_text_tokenizer
from grex_mllm.training.run import train_from_config
from grex_mllm.training.start import adopt_start

ROWS = 320  # of the embedding: more than the tokenizer has, as in released models of a padded vocabulary


def tiny(name: str) -> Config:
    config = shrink(load_config(FOLDER / f"{name}.yaml"))
    config.model.text.vocab_size, config.data.image_size = ROWS, 64
    return config


def released(folder: Path) -> GrexModel:
    """Write what a converted GRES checkpoint is, at tiny size."""
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(WORDS, 200)
    assert tokenizer.vocab_size < ROWS
    model = GrexModel(tiny("gres_rela_r50"), tokenizer)
    model.save_pretrained(folder)
    return model


def joint(data: Path, start: Path, out: Path) -> Config:
    """Return the joint configuration as shipped: with weights and a BERT that are not at hand."""
    config, shipped = tiny("joint_rela_r50"), load_config(FOLDER / "joint_rela_r50.yaml")
    config.model.vision.weights, config.model.text.path = shipped.model.vision.weights, shipped.model.text.path
    config.model.text.vocab_size, config.model.text.hidden_size = 30522, 768
    config.data.train, config.data.num_workers = str(data), 0
    config.train.start, config.train.out, config.train.precision = str(start), str(out), "fp32"
    config.train.steps, config.train.batch_images, config.train.num_threads = 1, 1, 1
    return config


def test_a_joint_training_starts_from_a_released_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = released(tmp_path / "released").saved_state()
    train_from_config(joint(tiny_folder(tmp_path / "data"), tmp_path / "released", tmp_path / "run"))
    assert (
        "language_part.heads.box (6 tensors), decoder.language_part.heads.box_score (2 tensors), decoder.language_part.heads.count (4"
        in capsys.readouterr().out
    )
    ours = GrexModel.from_pretrained(tmp_path / "run")
    assert ours.config.model.text.vocab_size == ROWS and ours.encode_text(WORDS)[0].tolist()
    state = ours.saved_state()
    # one step of 1e-5 is all that lies between them; embeddings do not train
    assert all((state[name].float() - value.float()).abs().max() < 1e-4 for name, value in theirs.items())
    assert torch.equal(*(s["grounding.text.bert.embeddings.word_embeddings.weight"] for s in (state, theirs)))


def test_the_vocabulary_is_that_of_the_start(tmp_path: Path) -> None:
    released(tmp_path / "released")
    config = joint(tmp_path, tmp_path / "released", tmp_path / "run")
    config.model.text.tokenizer = "train"
    adopt_start(config)
    assert config.model.text.tokenizer == str(tmp_path / "released" / "text_tokenizer")
    assert config.model.text.path is None and config.model.vision.weights is None and config.model.text.hidden_size == 16
    (tmp_path / "released" / "text_tokenizer" / "tokenizer.json").unlink()  # converted without a vocabulary
    config = joint(tmp_path, tmp_path / "released", tmp_path / "run")
    adopt_start(config)
    assert config.model.text.tokenizer == "models/bert-base-uncased"
    config.train.start = str(tmp_path / "none")
    with pytest.raises(GrexError, match=r"none has no config\.yaml"):
        adopt_start(config)


def test_a_model_folder_needs_no_bert_beside_it(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    bert = tmp_path / "bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 24, "max_position_embeddings": 40}
    BertModel(BertConfig(vocab_size=ROWS, **sizes), add_pooling_layer=False).save_pretrained(bert)
    train_text_tokenizer(WORDS, 200).save(bert)
    config = tiny("gres_rela_r50")
    config.model.text.path, config.model.text.vocab_size, config.model.text.hidden_size = str(bert), 30522, 768
    model = GrexModel(config, load_text_tokenizer(bert)).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(bert)
    again = GrexModel.from_pretrained(tmp_path / "model")
    text = again.config.model.text
    assert (text.vocab_size, text.num_heads, text.intermediate_size, text.max_positions) == (ROWS, 4, 24, 40)
    ids, mask = model.encode_text(WORDS)
    with torch.no_grad():
        assert torch.equal(model.grounding.text(ids, mask).tokens, again.grounding.text(ids, mask).tokens)


def test_a_tokenizer_larger_than_the_loaded_bert_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = train_text_tokenizer(WORDS, 200)
    small = BertConfig(
        vocab_size=tokenizer.vocab_size - 1, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8
    )
    BertModel(small, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    config = tiny("gres_rela_r50")
    config.model.text.path = str(tmp_path / "bert")
    with pytest.raises(GrexError, match=f"{tokenizer.vocab_size} entries; expected at most"):
        GrexModel(config, tokenizer)
