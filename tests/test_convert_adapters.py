"""Adapters of a trained generator for other programs: a folder of peft, a merged copy; a model folder that answers the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, tiny_config, tiny_speaker
from tiny_llms import write_llm

from grex_mllm.cli import main
from grex_mllm.convert.adapters import export_adapters
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.models.text import train_text_tokenizer

FAMILIES = ["phi3", pytest.param("gemma3", marks=pytest.mark.long), pytest.param("phi", marks=pytest.mark.long), "tiny"]


def speaker(name: str, work: Path, **changes: object) -> GrexModel:
    """A model whose generator has a tiny LM of a family and adapters that have learned something at random."""
    if name == "tiny":
        model = tiny_speaker(work / "tokenizer")
    else:
        lm = write_llm(name, work / "lm", WORDS * 3)
        own = {"lm": lm, "projector_width": 16, "max_new_tokens": 6, "lora_rank": 4, **changes}
        config = tiny_config(**{f"model__generator__{key}": value for key, value in own.items()})
        text = train_text_tokenizer(WORDS, 300)
        config.model.text.vocab_size = text.vocab_size
        model = GrexModel(config, text, LMTokenizer.load(lm)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.generator.lm.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def logits_of(lm: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(input_ids=ids).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_exports_give_the_same_logits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = speaker(name, tmp_path)
    model.save_pretrained(tmp_path / "model")
    ids = torch.tensor([model.generator.tokenizer.text_ids(" ".join(WORDS))])
    adapted = logits_of(model.generator.lm, ids)
    assert main(["convert", "adapters", str(tmp_path / "model"), "--out", str(tmp_path / "peft")]) == 0
    base = tmp_path / ("peft/base" if name == "tiny" else "lm")
    assert str(base) in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits_of(plain, ids), adapted, atol=1e-2)
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(plain, tmp_path / "peft"), ids), adapted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "peft"), ids), adapted, rtol=1e-5, atol=1e-5)
    assert main(["convert", "adapters", str(tmp_path / "model"), "--out", str(tmp_path / "merged"), "--merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, ids), adapted, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the red")["input_ids"]


@pytest.mark.parametrize("name", ["mistral", pytest.param("gemma2", marks=pytest.mark.long)])
def test_saved_model_describes_the_same(name: str, tmp_path: Path) -> None:
    model = speaker(name, tmp_path, prompt="{regions} What are they?")
    model.save_pretrained(tmp_path / "model")
    again = GrexModel.from_pretrained(tmp_path / "model")
    assert again.generator.frame == model.generator.frame and again.generator.tokenizer.style == "chat"
    image, masks = torch.zeros(40, 60, 3, dtype=torch.uint8).numpy(), torch.zeros(2, 40, 60, dtype=torch.bool)
    image[5:20, 5:20] = 200
    masks[0, 5:20, 5:20] = masks[1, 25:35, 40:50] = True
    said = [[m.describe(image, masks, mode=mode, details=True) for mode in ("greedy", "beam", "sample")] for m in (model, again)]
    assert repr(said[0]) == repr(said[1])


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    speaker("qwen2", tmp_path, quantisation="int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(GrexError, match="quantised as int8"):
        export_adapters(tmp_path / "int8", tmp_path / "merged", merged=True)
    assert not (tmp_path / "merged").exists()
    export_adapters(tmp_path / "int8", tmp_path / "peft")
    with pytest.raises(GrexError, match="not empty"):
        export_adapters(tmp_path / "int8", tmp_path / "peft")
    speaker("qwen2", tmp_path / "bare", lora_rank=0).save_pretrained(tmp_path / "none")
    with pytest.raises(GrexError, match="without adapters"):
        export_adapters(tmp_path / "none", tmp_path / "out")
    assert main(["convert", "rela", "x", "--out", "y", "--merged"]) == 2
