"""Write model folders and weight files: whole, or not at all. The folder's layout is that of `GrexModel.save_pretrained`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from grex_mllm.config import Config, save_config
from grex_mllm.errors import fault
from grex_mllm.writing import whole_file, whole_folder

WEIGHTS, CONFIG, TOKENIZER, VOCAB = "model.safetensors", "config.yaml", "text_tokenizer", "vocab.txt"
BERT_NAMES = ("google-bert/bert-base-uncased", "bert-base-uncased")


def write_model_folder(out: Path, config: Config, tensors: Mapping[str, Tensor], vocab: str | Path | None) -> list[str]:
    """Write config.yaml, model.safetensors and text_tokenizer/vocab.txt; return notes for the user.

    The folder is built beside its place and renamed, so that a failure leaves nothing.

    Raises:
        GrexError: `out` is a file or a folder with something in it, or the vocabulary is missing or too large for the model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise fault(f"output {out} exists and is not empty", "a new or empty folder", "remove it or choose another --out")
    words = _vocabulary(vocab, config.model.text.vocab_size)
    with whole_folder(out) as work:
        (work / TOKENIZER).mkdir()
        if words is not None:
            shutil.copyfile(words, work / TOKENIZER / VOCAB)
        save_config(config, work / CONFIG)
        _save_tensors(tensors, work / WEIGHTS)
    return [] if words is not None else [f"no vocabulary at hand: put BERT's {VOCAB} into {out / TOKENIZER}, or convert again with --vocab"]


def write_weights(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under another name, then give it its own.

    Raises:
        GrexError: the file exists.
    """
    if target.exists():
        raise fault(f"output {target} exists", "a new file name", "remove it or choose another --out")
    with whole_file(target) as work:
        _save_tensors(tensors, work)


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    # copies: safetensors refuses tensors that share storage, as those of a training checkpoint may
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors lets nobody else read


def _vocabulary(vocab: str | Path | None, limit: int) -> Path | None:
    """Find the vocabulary: the one given, or BERT's in the local hub cache if it has the model's size; never from the network."""
    if vocab is None:
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(name, VOCAB) for name in BERT_NAMES]
        cached = next((Path(file) for file in found if isinstance(file, str)), None)
        return cached if cached is not None and _num_words(cached) == limit else None
    file = Path(vocab)
    if file.is_dir():
        file = file / VOCAB
    if not file.is_file():
        raise fault(f"vocabulary {file} does not exist", "BERT's vocab.txt", "fix --vocab")
    words = _num_words(file)
    if words > limit:
        raise fault(f"vocabulary {file} has {words} words", f"at most the {limit} that the model embeds", "give the model's own vocab.txt")
    return file


def _num_words(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())
