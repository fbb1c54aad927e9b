"""The generator's instructions: shipped files, files and texts of one's own, and that a model keeps the words that it learned."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_mllm_generator import TEXTS, build
from tiny_mllms import write_mllm

from grex_mllm.errors import GrexError
from grex_mllm.models.generators.mllm import instructions
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.models.generators.mllm.instructions import INSTRUCTION, SHOWN, instruction_text, read_instruction
from grex_mllm.models.generators.mllm.parts import load_tokenizer, make_tokenizer
from grex_mllm.predictors.grex import GrexPredictor
from grex_mllm.predictors.protocol import Options
from grex_mllm.shipped import PROMPT_FOLDER


def config(shown: str, **changes: str) -> MllmConfig:
    way = {"objects": shown} if shown in ("tokens", "coordinates") else {"objects": "marks", "mark_style": shown}
    return MllmConfig(lm="x", **(way | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("shown", SHOWN)
def test_each_way_to_show_objects_has_an_instruction(shown: str) -> None:
    file = PROMPT_FOLDER / "generator" / f"{shown}.yaml"
    text = file.read_text(encoding="utf-8")
    assert instruction_text(config(shown)) == instruction_text(config(shown, prompt=shown)) == text
    assert instruction_text(config(shown, prompt=str(file))) == instruction_text(
        config(shown, prompt=f"eval/prompts/generator/{shown}.yaml")
    )
    read = read_instruction(text)
    assert (read.before + read.after).startswith(("Name exactly the ", "\nName exactly the marked")) and "{" not in read.before + read.after
    assert read.after.endswith("in one short expression.") and read.crops == "The pictures after the first show them alone. "
    own = read_instruction(instruction_text(config(shown, prompt="Boxes: {objects}. What?")))
    assert own == ("Boxes: ", ". What?", read.crops)


def test_wrong_instructions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r"prompt 'tokns'; expected one of coordinates, .*did you mean \"tokens\""):
        instruction_text(config("tokens", prompt="tokns"))
    with pytest.raises(GrexError, match=r"which is for objects shown as tokens; expected one for numbers"):
        instruction_text(config("numbers", prompt="tokens"))
    with pytest.raises(GrexError, match="expected one of coordinates"):
        instruction_text(config("numbers", prompt=str(tmp_path / "none.yaml")))
    good = (PROMPT_FOLDER / "generator" / "numbers.yaml").read_text(encoding="utf-8")
    for old, new, told in (
        ("version: 1", "version: one", "version a whole number"), ("crops:", "crop:", "the keys task"), ("{objects}", "it", "once"),
        ("task: generator", "task: greg", "task 'greg'"), ("objects: numbers", "objects: signs", "objects 'signs'"), (good, "a: [", "YAML"),
        (good, "- 1", "no keys"),
    ):  # fmt: skip
        file = tmp_path / "own.yaml"
        file.write_text(good.replace(old, new), encoding="utf-8")
        with pytest.raises(GrexError, match=told):
            instruction_text(config("numbers", prompt=str(file)))


def test_a_model_keeps_the_words_that_it_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_mllm("qwen3-vl", tmp_path / "lm", TEXTS * 2)
    model = build(folder, tmp_path / "t", objects="marks", lora_rank=1)
    shipped = (PROMPT_FOLDER / "generator" / "numbers.yaml").read_text(encoding="utf-8")
    assert (tmp_path / "t" / INSTRUCTION).read_text(encoding="utf-8") == shipped == model.generator.wording
    model.save_pretrained(tmp_path / "m")
    (kept,) = (tmp_path / "m").rglob(INSTRUCTION)
    assert kept.read_text(encoding="utf-8") == shipped
    first = GrexPredictor(str(tmp_path / "m"), Options("cpu")).fingerprint()
    (tmp_path / "changed" / "generator").mkdir(parents=True)
    changed = shipped.replace("Name exactly", "Say exactly").replace("version: 1", "version: 2")
    (tmp_path / "changed" / "generator" / "numbers.yaml").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(instructions, "PROMPT_FOLDER", tmp_path / "changed")
    again = GrexPredictor(str(tmp_path / "m"), Options("cpu"))
    assert again.net.generator.wording == shipped and again.fingerprint() == first  # a new version of the file changes no trained model
    kept.write_text(changed, encoding="utf-8")
    assert GrexPredictor(str(tmp_path / "m"), Options("cpu")).fingerprint() != first
    chosen = MllmConfig(lm=str(folder), objects="marks")
    make_tokenizer(chosen, list, tmp_path / "new")
    assert load_tokenizer(chosen, tmp_path / "new").extras[INSTRUCTION] == changed
    (tmp_path / "new" / INSTRUCTION).unlink()  # written before instructions were kept
    assert load_tokenizer(chosen, tmp_path / "new").extras[INSTRUCTION] == changed
