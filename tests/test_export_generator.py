"""A generator that leaves: graphs with a cache against torch's greedy decoding, the script in a process without torch, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_export import FORBIDDEN, picture
from tiny import WORDS, tiny_config, tiny_speaker

from grex_mllm.cli import main
from grex_mllm.errors import GrexError
from grex_mllm.export.checking import TOLERANCE, check_folder, difference, example_image
from grex_mllm.export.decision import prepare_graph
from grex_mllm.export.folder import export_model
from grex_mllm.export.generator_folder import compared_logits, write_generator
from grex_mllm.export.onnx_graphs import write_onnx
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import train_sentencepiece
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.ops.recordable import among_themselves, area_pool, stable_order

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnx", reason="the extra `export` is not installed")

ASK_MANY = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
sys.path.insert(0, sys.argv[1])
from describe import Describer
describer, answers = Describer(Path(sys.argv[1])), []
for name in sys.argv[3:]:
    asked = np.load(name)
    sets = [np.nonzero(row)[0].tolist() for row in asked["chosen"]]
    answers.append(describer.describe(Image.fromarray(asked["image"]), asked["masks"], sets))
Path(sys.argv[2]).write_text(json.dumps(answers))
"""


def without_torch(program: list[str]) -> str:
    """Run a program (a file and its arguments) where torch cannot be imported, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(program[0]).parent)}  # where a script finds its neighbours
    done = subprocess.run([sys.executable, "-c", FORBIDDEN, *program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told_by_script(folder: Path, work: Path, asked: list[tuple[np.ndarray, np.ndarray, list[list[int]]]]) -> list[list[str]]:
    """Return what describe.py of an exported folder says of images, masks and sets, in a process without torch."""
    (work / "ask.py").write_text(ASK_MANY, encoding="utf-8")
    files = []
    for number, (image, masks, sets) in enumerate(asked):
        chosen = np.array([[n in chosen for n in range(len(masks))] for chosen in sets])
        files.append(work / f"{number}.npz")
        np.savez(files[-1], image=image, masks=masks, chosen=chosen)
    without_torch([str(work / "ask.py"), str(folder), str(work / "answers.json"), *map(str, files)])
    return json.loads((work / "answers.json").read_text(encoding="utf-8"))


def told_by_torch(model: GrexModel, image: np.ndarray, masks: np.ndarray, sets: list[list[int]]) -> list[str]:
    """Return the greedy expressions of the model itself."""
    return model.describe(image, masks=list(masks), object_sets=sets)


def objects(seed: int, num: int, height: int, width: int) -> np.ndarray:
    """Draw masks bool [num, height, width] of rectangles and discs."""
    random, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    masks = []
    for n in range(num):
        top, left, tall, wide = (int(random.integers(0, side)) for side in (height - 9, width - 9, height // 2, width // 2))
        box = (y >= top) & (y < top + 6 + tall) & (x >= left) & (x < left + 6 + wide)
        masks.append(box if n % 2 else box & ((y - top - 5) ** 2 + (x - left - 5) ** 2 < 36))
    return np.stack(masks)


def wordy(model: GrexModel) -> GrexModel:
    """Let a random generator say different things of different sets: its prefix outweighs what its last layer says by itself."""
    with torch.no_grad():
        model.generator.region_tokens.set_token_scale(3.0)
        for name, weight in model.generator.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[GrexModel, Path]:
    work = tmp_path_factory.mktemp("speaker")
    torch.manual_seed(0)
    wordy(tiny_speaker(work / "tokenizer")).save_pretrained(work / "model")
    assert main(["export", "--model", str(work / "model"), "--out", str(work / "onnx")]) == 0
    return GrexModel.from_pretrained(work / "model"), work / "onnx"


def test_it_leaves_with_every_size_open_and_is_compared(exported: tuple[GrexModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from grex_mllm.export import generator_folder

    model, folder = exported
    facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert facts["any_size"] and 0 < facts["largest_difference"]["generator_logits"] <= TOLERANCE
    assert set(facts["generator"]["graphs"]) == {"see", "prefix", "step", "at_input", "at_image"}
    right = generator_folder.onnx_graph

    def wrong(file: Path, *ends: list[str], **named: list[str]) -> Callable:
        run = right(file, *ends, **named)
        return (lambda arrays: {k: v + 0.01 if "values" in k else v for k, v in run(arrays).items()}) if file.name == "step" else run

    monkeypatch.setattr(generator_folder, "onnx_graph", wrong)
    with pytest.raises(GrexError, match="differs by"):
        check_folder(model, folder, facts | {"any_size": False})


def test_script_without_torch_says_the_same(exported: tuple[GrexModel, Path], tmp_path: Path) -> None:
    model, folder = exported
    asked, wanted = [], []
    for seed, (height, width, num) in enumerate(((64, 64, 3), (50, 90, 6), (120, 40, 1))):
        image, masks = np.asarray(picture(seed, height, width)), objects(seed, num, height, width)
        sets = [[n] for n in range(num)] + ([[0, num - 1], list(range(num))] if num > 1 else [])
        asked.append((image, masks, sets))
        wanted.append(told_by_torch(model, image, masks, sets))
    assert len({text for texts in wanted for text in texts}) > 3
    assert told_by_script(folder, tmp_path, asked) == wanted


def test_the_script_takes_pictures_of_masks(exported: tuple[GrexModel, Path], tmp_path: Path) -> None:
    model, folder = exported
    masks = objects(4, 3, 60, 80)
    picture(4, 60, 80).save(tmp_path / "photo.png")
    for n, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / f"{n}.png")
    names = [str(tmp_path / f"{n}.png") for n in range(3)]
    words = [str(folder / "describe.py"), str(tmp_path / "photo.png"), "--mask", names[0], "--mask", names[2], "--beside", names[1]]
    image = np.asarray(picture(4, 60, 80))
    assert without_torch(words).strip() == told_by_torch(model, image, masks[[0, 2, 1]], [[0, 1]])[0]


def test_small_masks_and_padded_pictures(exported: tuple[GrexModel, Path], tmp_path: Path) -> None:
    model, folder = exported
    facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    kept, (height, width) = model.config.data.resize, (100, 300)
    masks = objects(2, 3, height, width)
    masks[0] = False
    masks[0, 51, 133] = True
    try:
        for resize in ("pad", "letterbox"):
            model.config.data.resize = resize
            write_onnx(folder, prepare_graph(model), True)
            (folder / "export.json").write_text(json.dumps(facts | {"resize": resize}), encoding="utf-8")
            image = np.asarray(picture(9, height, width))
            assert told_by_script(folder, tmp_path, [(image, masks, [[0], [1, 2]])])[0] == told_by_torch(model, image, masks, [[0], [1, 2]])
    finally:
        model.config.data.resize = kept
        write_onnx(folder, prepare_graph(model), True)
        (folder / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@pytest.mark.long
def test_other_parts_of_a_generator_leave(tmp_path: Path) -> None:
    """Image tokens, context among tokens, words around them and of objects, ranks, attributes, more objects than distractors; a decoder
    without proposals; an image size that is no multiple of the stride, open and fixed."""
    config = tiny_config(model__decoder__name="rela", model__decoder__minimap_side=4, model__decoder__feedforward=16,
                         model__decoder__boxes="false", data__image_size=72,
                         model__generator__lm="tiny", model__generator__hidden_size=16, model__generator__num_heads=2,
                         model__generator__num_layers=2, model__generator__intermediate_size=32, model__generator__projector_width=16,
                         model__generator__max_new_tokens=4, model__generator__image_grid=2, model__generator__context_layers=1,
                         model__generator__prompt="Name {regions} now: ", model__generator__max_distractors=2,
                         model__generator__words=200, model__generator__ranks="true",
                         model__generator__attribute_classes='{"shape": 3, "colour": 2}')  # fmt: skip
    torch.manual_seed(3)
    text = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = text.vocab_size
    model = wordy(GrexModel(config, text, train_sentencepiece(WORDS * 5, tmp_path / "tokenizer", 300)).eval())
    model.save_pretrained(tmp_path / "model")
    facts = export_model(str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert facts["largest_difference"]["generator_logits"] <= TOLERANCE
    image, masks = np.asarray(picture(1, 64, 64)), objects(1, 7, 64, 64)
    sets = [[0], [1, 2], [3, 4, 5], list(range(7))]
    assert told_by_script(tmp_path / "onnx", tmp_path, [(image, masks, sets)])[0] == told_by_torch(model, image, masks, sets)
    with torch.no_grad():
        fixed = write_generator(model, tmp_path, example_image(model, 0), varies=False)
    rows = compared_logits(model, None, tmp_path, fixed, {(72, 72): example_image(model, 1)})
    assert len(rows) == 10 and max(difference(given, wanted) for given, wanted, _ in rows) <= TOLERANCE


def test_what_is_recorded_is_torch_by_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from grex_mllm.ops import recordable

    torch.manual_seed(0)
    values = torch.randint(0, 4, (5, 9)).float()
    values[2, 3] = torch.inf
    wanted = [stable_order(values, descending) for descending in (False, True)]
    pictures = torch.rand(2, 3, 20, 14)
    sizes = ((20, 14), (10, 7), (3, 5), (1, 1), (7, 13))
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    tokens, mask = torch.randn(3, 5, 16), torch.arange(5) < torch.tensor([[5], [1], [3]])
    mixed = among_themselves(layer, tokens, mask)
    pooled = [area_pool(pictures, size) for size in sizes]
    monkeypatch.setattr(recordable, "traced", lambda: True)
    for descending, order in zip((False, True), wanted):
        assert torch.equal(stable_order(values, descending), order)
    for size, pool in zip(sizes, pooled, strict=True):
        torch.testing.assert_close(area_pool(pictures, size), pool)
    torch.testing.assert_close(among_themselves(layer, tokens, mask)[mask], mixed[mask])


def test_generators_that_stay_are_refused(exported: tuple[GrexModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grex_mllm.export.generator_graphs import check_generator_exportable

    model, folder = exported
    name = str(folder.parent / "model")
    with pytest.raises(GrexError, match=r"--format torch of a model with a generator.*--task ground"):
        export_model(name, str(tmp_path / "out"), "torch")
    with pytest.raises(GrexError, match="all or ground"):
        export_model(name, str(tmp_path / "out"), task="describe")
    with monkeypatch.context() as patch:
        patch.setattr(model.generator.tokenizer, "style", "chat")
        with pytest.raises(GrexError, match=r"chat model.*--task ground"):
            check_generator_exportable(model)
    with pytest.raises(GrexError, match=r"region_tokens: a multimodal model.*--task ground"):
        check_generator_exportable(SimpleNamespace(generator=torch.nn.Linear(1, 1), config=model.config))
    with monkeypatch.context() as patch:
        patch.setattr(model.generator.lm.config, "sliding_window", 8, raising=False)
        with pytest.raises(GrexError, match="sliding window"):
            check_generator_exportable(model)
    rounded = GrexModel.from_pretrained(name)
    rounded.generator.lm.half()
    with pytest.raises(GrexError, match=r"float16; expected float32"):
        check_generator_exportable(rounded)
    facts = export_model(name, str(tmp_path / "ground"), task="ground")
    assert "generator" not in facts and not (tmp_path / "ground" / "describe.py").exists()


@pytest.mark.long
def test_fifty_sets_of_drawn_scenes(tmp_path: Path) -> None:
    """The demo's own architecture and sizes, random weights."""
    from grex_mllm.config import load_config
    from grex_mllm.data.synthetic import SyntheticDataset
    from grex_mllm.data.synthetic.settings import SyntheticConfig

    torch.manual_seed(1)
    config = load_config(ROOT / "configs" / "demo.yaml")
    text = train_text_tokenizer(WORDS * 5, config.model.text.vocab_size)
    model = wordy(GrexModel(config, text, train_sentencepiece(WORDS * 5, tmp_path / "tokenizer", 300)).eval())
    model.save_pretrained(tmp_path / "model")
    facts = export_model(str(tmp_path / "model"), str(tmp_path / "onnx"))
    assert facts["any_size"] and facts["largest_difference"]["generator_logits"] <= TOLERANCE
    data, asked = SyntheticDataset(SyntheticConfig(image_size=96), "test", 25, 1), []
    for n in range(25):
        sample = data[n]
        masks = np.stack([instance.mask for instance in sample.record.instances])
        asked.append((sample.image, masks, [[0], list(range(1, 1 + (len(masks) + 1) // 2))]))
    assert sum(len(sets) for _, _, sets in asked) == 50
    wanted = [told_by_torch(model, *one) for one in asked]
    assert len({text for texts in wanted for text in texts}) > 10
    assert told_by_script(tmp_path / "onnx", tmp_path, asked) == wanted
