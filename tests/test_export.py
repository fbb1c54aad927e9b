"""A model that leaves: graphs against torch, the script in a process that cannot import torch, and what is refused."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import tiny_config, tiny_model

from grex_mllm.cli import main
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.export.checking import FACTOR, TOLERANCE, difference
from grex_mllm.export.folder import export_model
from grex_mllm.export.ground import Model
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnx", reason="the extra `export` is not installed")

SAID = ["the red circle on the left", "two blue squares and a star", "all shapes except the largest one"]
FORBIDDEN = """
import runpy, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "grex_mllm", "transformers"):
            raise ImportError(name + " is forbidden here")
sys.meta_path.insert(0, NoTorch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(folder: Path, image: Path, expressions: list[str], out: Path) -> list[dict]:
    """Run ground.py of an exported folder where torch cannot be imported."""
    words = [sys.executable, "-c", FORBIDDEN, str(folder / "ground.py"), str(image), *expressions, "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_same(answer: dict, wanted: object, mask: np.ndarray) -> None:
    """Compare an answer of the script with a `Grounding`: decisions equal, numbers within the tolerance."""
    assert (answer["no_target"], answer["count"]) == (wanted.no_target, wanted.count)
    assert answer["no_target_prob"] == pytest.approx(wanted.no_target_prob, abs=TOLERANCE)
    np.testing.assert_array_equal(mask, wanted.mask)
    np.testing.assert_allclose(np.reshape(answer["boxes_xyxy"], (-1, 4)), wanted.boxes_xyxy, atol=0.01)
    np.testing.assert_allclose(answer["box_scores"], wanted.box_scores, atol=TOLERANCE)


def imports(node: ast.AST) -> list[str]:
    """Return the modules that a statement imports."""
    return [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []


def picture(number: int, height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[GrexModel, Path]:
    """A tiny model of the demo's kind, and its exported folder."""
    work = tmp_path_factory.mktemp("export")
    model = tiny_model()
    with torch.no_grad():
        model.grounding.decoder.language_part.target.bias.fill_(4.0)
        model.grounding.decoder.image_part.mask_map.bias.fill_(0.3)
    model.save_pretrained(work / "model")
    assert main(["export", "--model", str(work / "model"), "--out", str(work / "onnx")]) == 0
    return GrexModel.from_pretrained(work / "model"), work / "onnx"


def test_export_is_checked_at_two_sizes(exported: tuple[GrexModel, Path]) -> None:
    facts = json.loads((exported[1] / "export.json").read_text(encoding="utf-8"))
    assert facts["any_size"]
    assert 0 < max(facts["largest_difference"].values()) <= TOLERANCE
    assert set(facts["largest_difference"]) == {"mask_logits", "no_target_logits", "boxes_norm", "box_logits", "count_logits"}
    assert list(facts["graphs"]) == ["prepare", "image", "language", "decide"]
    assert facts["decisions"]["compared"] == 2 * 3 * 3 and facts["decisions"]["image"] == 0
    assert max(facts["decisions"][name] for name in ("boxes_xyxy", "box_scores", "no_target_prob")) <= TOLERANCE


@pytest.mark.parametrize("name", ["ground.py", "describe.py", "ground_torch.py"])
def test_scripts_have_sixty_lines_and_need_little(name: str) -> None:
    text = (ROOT / "grex_mllm" / "export" / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert not [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string == ";"]
    imported = {part.split(".")[0] for node in ast.walk(ast.parse(text)) for part in imports(node)}
    torch_alone = {"torch"} if name == "ground_torch.py" else set()
    assert imported <= {"argparse", "json", "pathlib", "numpy", "PIL", "tokenizers", "onnxruntime", "ground"} | torch_alone


def test_script_without_torch_answers_as_the_model(exported: tuple[GrexModel, Path], tmp_path: Path) -> None:
    model, folder = exported
    file = tmp_path / "a picture.png"
    picture(1, 50, 70).save(file)
    answers = run_script(folder, file, SAID, tmp_path / "out")
    wanted = model.ground(file, SAID)
    assert any(not answer.no_target for answer in wanted)
    for answer, grounding in zip(answers, wanted, strict=True):
        assert answer["expression"] == grounding.expression
        assert_same(answer, grounding, np.asarray(Image.open(answer["mask"])) > 0)


def test_answers_of_the_largest_overlap_leave_too(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.model.decoder.answer = "overlap"
    with torch.no_grad():
        model.grounding.decoder.image_part.mask_map.bias.fill_(0.3)
    model.save_pretrained(tmp_path / "model")
    facts = export_model(str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert facts["any_size"] and list(facts["graphs"]) == ["prepare", "image", "language", "decide"]
    given, found = picture(4, 90, 64), 0
    for answer, wanted in zip(
        Model(tmp_path / "onnx").ground(given, SAID), GrexModel.from_pretrained(tmp_path / "model").ground(given, SAID), strict=True
    ):
        differs = (answer["mask"] != wanted.mask).mean()
        assert differs < 0.005  # where two numbers of pixels promise nearly the same, rounding chooses
        assert_same(answer, wanted, wanted.mask)
        found += wanted.mask.any()
    assert found > 0


@pytest.mark.parametrize("number", [0, 1, 17])
def test_any_number_of_expressions(exported: tuple[GrexModel, Path], number: int) -> None:
    said, given = (SAID * 6)[:number], picture(3, 64, 64)
    together = exported[0].ground(given, said)
    for text, answer, grounding in zip(said, Model(exported[1]).ground(given, said), together, strict=True):
        assert answer["expression"] == text
        assert_same(answer, grounding, answer["mask"])


def test_another_input_size(exported: tuple[GrexModel, Path]) -> None:
    model, folder = exported
    model.config.data.image_size, kept = 96, model.config.data.image_size
    for answer, grounding in zip(
        Model(folder).ground(picture(4, 70, 50), SAID, size=96), model.ground(picture(4, 70, 50), SAID), strict=True
    ):
        assert_same(answer, grounding, answer["mask"])
    model.config.data.image_size = kept


def test_pictures_are_read_as_the_model_reads_them(exported: tuple[GrexModel, Path], tmp_path: Path) -> None:
    model, script = exported[0], Model(exported[1])
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, 20, 30).save(turned, exif=exif)
    layer = picture(2, 20, 30).convert("RGBA")
    layer.putalpha(Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)))
    palette = picture(3, 20, 30).quantize(9)
    palette.info["transparency"] = 4
    for given in (turned, layer, palette, *(picture(4, 20, 30).convert(mode) for mode in ("L", "LA", "P", "CMYK", "1", "YCbCr"))):
        np.testing.assert_array_equal(script.network_input(given)["image"], model.encode(given).features.image)


def test_a_difference_is_found() -> None:
    assert difference(np.zeros(3), np.full(3, 2e-4)) > TOLERANCE
    assert difference(np.full(2, -30.001), np.full(2, -30.0)) > TOLERANCE
    assert difference(np.zeros((2, 1)), np.zeros(2)) == difference(np.array([np.nan]), np.zeros(1)) == float("inf")
    assert difference(np.zeros((0, 4)), np.zeros((0, 4))) == 0


@pytest.mark.parametrize(("options", "said"), [({"form": "tflite"}, "onnx or torch"), ({"task": "generate"}, "all or ground")])
def test_what_does_not_leave_is_refused(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(GrexError, match=said):
        export_model("nowhere", str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grex_mllm.export import onnx_graphs

    monkeypatch.setattr(onnx_graphs, "NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(GrexError, match=r"no_such_package.*grex-mllm\[export\]"):
        export_model("nowhere", str(tmp_path / "out"))


def test_a_graph_that_answers_otherwise_is_found(exported: tuple[GrexModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from grex_mllm.export import checking

    right = checking.graphs_of

    def wrong(*given: object) -> dict:
        graphs = right(*given)
        language = graphs["language"]
        return graphs | {"language": lambda arrays: {name: value + 0.001 for name, value in language(arrays).items()}}

    monkeypatch.setattr(checking, "graphs_of", wrong)
    facts = json.loads((exported[1] / "export.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="differ"):  # then one size is tried
        checking.check_folder(exported[0], exported[1], facts)
    with pytest.raises(GrexError, match="differs by"):
        checking.check_folder(exported[0], exported[1], facts | {"any_size": False})


@pytest.mark.long
def test_fifty_scenes_and_twenty_photographs(shared: Path, tmp_path: Path) -> None:
    """The demo's own architecture and sizes, random weights."""
    from grex_mllm.config import load_config
    from grex_mllm.data.synthetic.scenes import draw_scene

    torch.manual_seed(1)
    config = load_config(ROOT / "configs" / "demo.yaml", ["--model.generator=null"])
    model = GrexModel(config, train_text_tokenizer(SAID * 5, config.model.text.vocab_size)).eval()
    model.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), str(tmp_path / "onnx"))
    script = Model(tmp_path / "onnx")
    pictures = [Image.fromarray(draw_scene(SyntheticConfig(image_size=64 + 8 * (i % 9)), "test", i).image) for i in range(50)]
    pictures += [Image.open(file) for file in sorted((shared / "data" / "photos" / "images").iterdir())[:20]]
    assert len(pictures) == 70
    for given in pictures:
        for answer, grounding in zip(script.ground(given, SAID), model.ground(given, SAID), strict=True):
            assert_same(answer, grounding, answer["mask"])


def _rela(config_name: str, folder: Path, seed: int = 0) -> None:
    from shrink import shrink

    from grex_mllm.config import load_config

    torch.manual_seed(seed)
    config = shrink(load_config(ROOT / "configs" / f"{config_name}.yaml"))
    config.data.image_size = 128
    GrexModel(config, train_text_tokenizer(SAID * 5, 200)).eval().save_pretrained(folder)


def test_where_float32_is_unsure_float64_decides(exported: tuple[GrexModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With no tolerance left, the exported model must err about as torch does; with no factor left either, nothing passes."""
    from grex_mllm.export import checking

    facts = json.loads((exported[1] / "export.json").read_text(encoding="utf-8")) | {"any_size": False}
    checking.check_folder(exported[0], exported[1], facts)
    assert "float64" not in facts
    monkeypatch.setattr(checking, "TOLERANCE", 0.0)
    monkeypatch.setattr(checking, "FACTOR", 50.0)
    checking.check_folder(exported[0], exported[1], facts)
    for errors in facts["float64"].values():
        assert 0 < errors["torch"] < TOLERANCE and errors["exported"] <= 50 * errors["torch"]
    monkeypatch.setattr(checking, "FACTOR", 0.0)
    with pytest.raises(GrexError, match=r"from float64 by .* times torch's own error"):
        checking.check_folder(exported[0], exported[1], facts)


@pytest.mark.long
def test_an_image_encoder_that_reads_the_expression_leaves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    swin = {"name": "swin", "embed_width": 8, "swin_depths": "[1, 1, 1, 1]", "swin_heads": "[1, 1, 2, 2]", "window": 4, "fusion": "pwam"}
    config = tiny_config(model__decoder__name="rela", model__decoder__minimap_side=4, model__decoder__feedforward=16,
                         **{f"model__vision__{name}": value for name, value in swin.items()})  # fmt: skip
    GrexModel(config, train_text_tokenizer(SAID * 5, 300)).eval().save_pretrained(tmp_path / "model")
    facts = export_model(str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert list(facts["graphs"]) == ["prepare", "whole", "decide"]
    model, script = GrexModel.from_pretrained(tmp_path / "model"), Model(tmp_path / "onnx")
    for answer, grounding in zip(script.ground(picture(5, 60, 100), SAID), model.ground(picture(5, 60, 100), SAID), strict=True):
        assert (answer["no_target"], answer["count"]) == (grounding.no_target, grounding.count)
        assert (answer["mask"] != grounding.mask).mean() < 0.001


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rela_behind_swin_leaves(tmp_path: Path, seed: int) -> None:
    """Mask logits of random weights of the released kind differ by more than the tolerance, and err little more than torch's own."""
    _rela("gres_rela_swin_tiny", tmp_path / "model", seed)
    facts = export_model(str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert list(facts["graphs"]) == ["prepare", "whole", "decide"]
    assert facts["largest_difference"]["mask_logits"] <= TOLERANCE or facts["float64"]["mask_logits"]["torch"] > TOLERANCE / FACTOR
    model, script = GrexModel.from_pretrained(tmp_path / "model"), Model(tmp_path / "onnx")
    for number in range(5):
        given = picture(number, 60 + 10 * number, 100)
        for answer, grounding in zip(script.ground(given, SAID), model.ground(given, SAID), strict=True):
            assert (answer["no_target"], answer["count"]) == (grounding.no_target, grounding.count)
            assert (answer["mask"] != grounding.mask).mean() < 0.001


@pytest.mark.long
def test_rela_leaves_too(tmp_path: Path) -> None:
    _rela("gres_rela_r50", tmp_path / "model")
    facts = export_model(str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert list(facts["graphs"]) == ["prepare", "image", "language", "decide"]
    assert not facts["any_size"]
    model, script = GrexModel.from_pretrained(tmp_path / "model"), Model(tmp_path / "onnx")
    for number in range(5):
        given = picture(number, 60 + 10 * number, 100)
        for answer, grounding in zip(script.ground(given, SAID), model.ground(given, SAID), strict=True):
            assert (answer["no_target"], answer["count"]) == (grounding.no_target, grounding.count)
            np.testing.assert_array_equal(answer["mask"], grounding.mask)


@pytest.mark.long
def test_torch_programs_answer_as_the_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    facts = export_model(str(tmp_path / "model"), str(tmp_path / "torch"), "torch")
    assert max(facts["largest_difference"].values()) <= TOLERANCE
    picture(1, 50, 70).save(tmp_path / "a.png")
    words = [sys.executable, str(tmp_path / "torch" / "ground_torch.py"), str(tmp_path / "a.png"), *SAID, "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    wanted = GrexModel.from_pretrained(tmp_path / "model").ground(tmp_path / "a.png", SAID)
    for line, grounding in zip(done.stdout.splitlines(), wanted, strict=True):
        answer = json.loads(line)
        assert_same(answer, grounding, np.asarray(Image.open(answer["mask"])) > 0)
