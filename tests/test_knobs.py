"""Every field of the configuration is read by code: as an attribute of its own class, not as a word that occurs somewhere.

A copy of the package gets every plain field of config.py, and of the configurations of its entries, renamed; mypy then reports each place
that reads a field of a configuration object under its old name. Fields that are read by name, in a loop, are tried at run time instead.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_step import built
from tiny import tiny_model

from grex_mllm.config import LossConfig, TextConfig
from grex_mllm.data.collate import collate
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.models.decoders.instance_selection.config import InstanceLossConfig, InstanceSelectionConfig
from grex_mllm.models.decoders.instance_selection.criterion import InstanceSelectionCriterion
from grex_mllm.models.decoders.isfp.config import IsfpConfig
from grex_mllm.models.decoders.isfp.criterion import OWN_TERMS, IsfpCriterion
from grex_mllm.models.decoders.lavt import Config as LavtConfig
from grex_mllm.models.decoders.lavt import Criterion as LavtCriterion
from grex_mllm.models.decoders.m3att.config import M3AttConfig
from grex_mllm.models.decoders.m3att.criterion import M3AttCriterion
from grex_mllm.models.decoders.rela.config import RelaConfig
from grex_mllm.models.decoders.rela.criterion import RelaCriterion
from grex_mllm.models.decoders.vlt.config import VltConfig
from grex_mllm.models.decoders.vlt.criterion import VltCriterion
from grex_mllm.models.grex_losses import TERMS
from grex_mllm.models.text import BERT_SIZES, TextEncoder
from grex_mllm.models.words import WordEncoder
from grex_mllm.training.step import Step

RENAMED = "__renamed"
MISSING = re.compile(r'^(?P<file>[^:]+):(?P<line>\d+):(?P<column>\d+): error: "(?P<kind>\w+)" has no attribute "(?P<field>\w+)"')
INSTANCE_TERMS = [f.name for f in fields(InstanceLossConfig) if f.type == "float"]
BY_NAME = {("GrexLossConfig", name) for name in TERMS} | {("InstanceLossConfig", name) for name in INSTANCE_TERMS}
BY_NAME |= {("LossConfig", "ground"), ("LossConfig", "generate")}
# what chooses an entry; the contract tests build every one by its name
BY_NAME |= {
    ("ModelConfig", "decoder"),
    *((f"{kind}Config", "name") for kind in ("Rela", "InstanceSelection", "Vlt", "M3Att", "Isfp", "RegionTokens", "Mllm")),
    ("Config", "name"),
    *(("IsfpLossConfig", name) for name in (*OWN_TERMS, "mask", "minimap")),
}
FILES = (
    "config.py", "encoders.py", "augmentation.py", "models/decoders/rela/config.py", "models/decoders/instance_selection/config.py",
    "models/grex_losses.py", "models/grex_heads.py", "models/hard_examples.py",
    "models/decoders/vlt/config.py", "models/decoders/m3att/config.py", "models/decoders/isfp/config.py", "models/decoders/lavt.py",
    "models/decoders/vlt_rela.py",
    "models/lm_config.py", "models/generators/region_tokens/config.py", "models/generators/mllm/config.py",
    "data/synthetic/settings.py", "training/pretraining.py", "zeroshot/settings.py", "zeroshot/local_settings.py",
    "zeroshot/server/settings.py",
)  # fmt: skip


BY_NAME |= {("TextConfig", name) for name in BERT_SIZES}


def plain_fields(config: Path) -> list[tuple[str, ast.AnnAssign]]:
    """Return class and line of every field that is no section."""
    found = []
    for node in ast.parse(config.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
            lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            found += [(node.name, line) for line in lines if not ast.unparse(line.annotation).endswith(("Config", "Settings"))]
    return found


def field_name(line: ast.AnnAssign) -> str:
    assert isinstance(line.target, ast.Name)
    return line.target.id


def is_read(file: Path, line: int, column: int, field: str) -> bool:
    """Tell whether the attribute at a place (both counted from 1, as mypy does) is read, not set."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and (node.lineno, node.col_offset + 1, node.attr) == (line, column, field):
            return isinstance(node.ctx, ast.Load)
    return False


def unread(package: Path) -> set[tuple[str, str]]:
    """Return class and field of everything in FILES of the package that no module reads. Changes the package."""
    known: set[tuple[str, str]] = set()
    for file in (package / name for name in FILES):
        found = plain_fields(file)
        known |= {(kind, field_name(line)) for kind, line in found}
        lines = file.read_text(encoding="utf-8").splitlines()
        for _, line in found:
            lines[line.lineno - 1] = re.sub(r"^(\s+\w+):", rf"\1{RENAMED}:", lines[line.lineno - 1])
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ["--config-file=", "--check-untyped-defs", "--ignore-missing-imports", "--follow-imports=skip", "--show-column-numbers"]
    command = [sys.executable, "-m", "mypy", *options, "--no-error-summary", "--cache-dir", str(package.parent / "cache"), package.name]
    shown = subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=False)
    assert shown.returncode == 1, shown.stderr
    hits = [hit for line in shown.stdout.splitlines() if (hit := MISSING.match(line)) and not hit["file"].endswith("/config.py")]
    read = {
        (hit["kind"], hit["field"])
        for hit in hits
        if is_read(package.parent / hit["file"], int(hit["line"]), int(hit["column"]), hit["field"])
    }
    return known - read


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "grex_mllm", tmp_path / "grex_mllm", ignore=shutil.ignore_patterns("__pycache__")))


def test_every_knob_is_read_and_an_unread_one_is_found(package: Path) -> None:
    """Two planted fields are found, though their words occur: one as a string and on another class, one that is only set."""
    assert sum(len(plain_fields(package / name)) for name in FILES) > 150
    config = package / "config.py"
    planted = "class PredictConfig:\n    unread_knob: int = 0\n    only_set: int = 0\n"
    config.write_text(config.read_text(encoding="utf-8").replace("class PredictConfig:\n", planted), encoding="utf-8")
    code = "from grex_mllm.config import PredictConfig\n\n\nclass Other:\n    unread_knob = 1\n\n\n"
    code += 'def use(config: PredictConfig) -> str:\n    config.only_set = Other().unread_knob\n    return "unread_knob only_set"\n'
    (package / "planted.py").write_text(code, encoding="utf-8")
    assert unread(package) - BY_NAME == {("PredictConfig", "unread_knob"), ("PredictConfig", "only_set")}


@pytest.mark.parametrize(
    ("decoder", "criterion", "names"),
    [
        (RelaConfig(), RelaCriterion, TERMS),
        (VltConfig(), VltCriterion, [*TERMS, "contrastive"]),
        (M3AttConfig(), M3AttCriterion, [*TERMS, "reconstruction"]),
        (IsfpConfig(), IsfpCriterion, [*TERMS, *OWN_TERMS]),
        (LavtConfig(), LavtCriterion, TERMS),
        (InstanceSelectionConfig(), InstanceSelectionCriterion, INSTANCE_TERMS),
    ],
    ids=["rela", "vlt", "m3att", "isfp", "lavt", "instance_selection"],
)
def test_loss_weights_that_are_read_by_name_arrive(decoder: Any, criterion: Any, names: list[str]) -> None:
    for name in names:
        weights = criterion(replace(decoder, loss=replace(decoder.loss, **{name: 123.0}))).weights
        assert [key for key, value in weights.items() if value == 123.0] == [name]


def test_sizes_of_the_text_encoder_arrive() -> None:
    tiny = {"vocab_size": 30, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_positions": 16}
    assert tiny.keys() == BERT_SIZES.keys()
    for name, value in tiny.items():
        changed = TextConfig(**(tiny | {name: value * 2}))  # type: ignore[arg-type]
        assert TextEncoder(changed).sizes() == tiny | {name: value * 2}, name


def test_sizes_of_the_word_encoder_arrive() -> None:
    tiny = {"vocab_size": 30, "word_width": 5, "hidden_size": 16}
    for name, value in tiny.items():
        changed = TextConfig(name="bigru", **(tiny | {name: value * 2}))  # type: ignore[arg-type]
        assert WordEncoder(changed).sizes() == tiny | {name: value * 2}, name


def test_the_weights_of_both_parts_of_a_step_arrive(tmp_path: Path) -> None:
    model, batches = built("rela", tmp_path)
    batch, step = batches.at(0), Step(model, model.config).eval()
    terms = step(batch)
    for name in ("ground", "generate"):
        step.loss = replace(LossConfig(), **{name: 3.0})
        assert torch.allclose(step(batch)["total"] - terms["total"], 2 * terms[f"{name}/total"], rtol=1e-3)


def test_every_weight_of_the_instance_losses_moves_the_total() -> None:
    torch.manual_seed(0)
    model = tiny_model(model__decoder__attribute_classes="{shape: 7, colour: 6, size: 2, texture: 3, scale: 6}", model__decoder__words=100)
    data = SyntheticDataset(SyntheticConfig(image_size=64), "train", 100, 4)
    batch = collate([data[i] for i in range(3)], model.encode_text, image_size=64)
    with torch.no_grad():
        output = model.grounding.ground(model.grounding.encode_image(batch.image), batch.image_index, batch.text_ids, batch.text_mask)
    config = InstanceSelectionConfig()
    before = InstanceSelectionCriterion(config)(output, batch)["total"]
    for name in INSTANCE_TERMS:
        changed = replace(config.loss, **{name: getattr(config.loss, name) + 10.0})
        assert InstanceSelectionCriterion(replace(config, loss=changed))(output, batch)["total"] > before + 1e-3, name
