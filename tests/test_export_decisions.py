"""What decides in an exported folder: the graphs before and after a model, against the model's own decisions, for every rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import SAID, assert_same, exported, picture

from grex_mllm.config import PredictConfig
from grex_mllm.data.transforms import fit, input_masks, mask_to_original
from grex_mllm.errors import GrexError
from grex_mllm.export import decision
from grex_mllm.export.checking import check_decisions, example_image, graphs_of, torch_answers
from grex_mllm.export.decision import AtImageGraph, AtInputGraph, DecisionGraph, decide_graph, place_of, prepare_graph
from grex_mllm.export.folder import export_model
from grex_mllm.export.graphs import Graph, names_of
from grex_mllm.export.ground import Model, onnx_graph
from grex_mllm.export.onnx_graphs import write_onnx
from grex_mllm.models.answer import answers
from grex_mllm.models.grex import GrexModel
from grex_mllm.types import GroundingOutput

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnx", reason="the extra `export` is not installed")

__all__ = ["exported"]  # the fixture


def write_anew(script: Model, work: Path, graph: Graph) -> None:
    """Record a graph and let the script run it."""
    script.graphs[graph[0]] = onnx_graph(work / graph[0], write_onnx(work, graph, True), graph[-1])


def decide_anew(script: Model, model: GrexModel, work: Path) -> None:
    """Record the decision by the rules that the model's configuration has now."""
    image = example_image(model, 0)
    with torch.no_grad():
        write_anew(script, work, decide_graph(model, image, torch_answers(model.grounding, image, *model.encode_text(SAID[:1]))))


RULES = [{"boxes": "threshold", "box_threshold": 0.3}, {"boxes": "both", "box_threshold": 0.5}, {"no_target": "pixels"},
         {"no_target": "pixels", "min_mask_pixels": 2000}, {"mask_threshold": 0.7, "no_target_threshold": 0.9}, {"no_target_threshold": 0},
         {"no_target_threshold": 1}, {"masks": False}, {"masks": False, "no_target_threshold": 1}]  # fmt: skip


@pytest.mark.parametrize("change", RULES, ids=str)
def test_decisions_equal_torch_for_every_rule(exported: tuple[GrexModel, Path], tmp_path: Path, change: dict) -> None:
    model, folder = exported
    script, kept = Model(folder), model.config.predict
    model.config.predict = replace(kept, **change)
    try:
        decide_anew(script, model, tmp_path)
        for given in (picture(2, 33, 91), picture(7, 1, 300)):
            for answer, grounding in zip(script.ground(given, SAID), model.ground(given, SAID), strict=True):
                assert_same(answer, grounding, answer["mask"])
    finally:
        model.config.predict = kept


HEADS = [(), ("no_target_logits",), ("count_logits",), ("no_target_logits", "boxes_norm", "box_logits"),
         ("no_target_logits", "boxes_norm", "box_logits", "count_logits")]  # fmt: skip


@pytest.mark.parametrize("rules", [{}, {"boxes": "threshold"}, {"boxes": "both"}, {"no_target": "pixels"}, {"masks": False}], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=len)
def test_decisions_of_answers_made_by_hand(tmp_path: Path, heads: tuple[str, ...], rules: dict) -> None:
    """Equal scores, none and seven above the threshold, a count of six, no target, an empty mask, heads that a model lacks."""
    config, (height, width, canvas) = PredictConfig(**{"no_target_threshold": 0.5, **rules}), (37, 101, (64, 96))
    geometry = fit(height, width, 64, "letterbox")
    random = torch.Generator().manual_seed(0)
    every = {"mask_logits": torch.randn(6, 2, 16, 24, generator=random), "no_target_logits": torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]]),
             "boxes_norm": torch.rand(6, 9, 4, generator=random), "box_logits": torch.randn(6, 9, generator=random),
             "count_logits": torch.eye(7)[[2, 6, 6, 0, 3, 1]]}  # fmt: skip
    every["box_logits"][0], every["box_logits"][1], every["box_logits"][2] = 1.0, -5.0, torch.tensor([2.0] * 7 + [-1.0] * 2)
    every["mask_logits"][4, 1] = -9.0
    output = GroundingOutput(**{name: every[name] for name in ("mask_logits", *heads)})
    graph = DecisionGraph(names_of(output), config)
    place = place_of(geometry, 64, canvas)
    example = (place_of(fit(50, 50, 64, "pad"), 64, (64, 64)), *(torch.zeros_like(getattr(output, name)[:1]) for name in graph.reads))
    inputs = write_onnx(tmp_path, ("decide", graph, example, ["place", *graph.reads], graph.makes), True)
    decide, numbers = onnx_graph(tmp_path / "decide", inputs, graph.makes), set()
    for e, wanted in enumerate(answers(output, [""] * 6, [geometry] * 6, canvas, config)):
        given = {"place": place.numpy()} | {name: getattr(output, name)[e : e + 1].numpy() for name in graph.reads}
        said = {"count": None, "boxes_xyxy": None, "box_scores": None} | decide(given)
        np.testing.assert_array_equal(said["mask"], wanted.mask)
        assert (said["no_target"], said["no_target_prob"]) == (wanted.no_target, pytest.approx(wanted.no_target_prob, abs=1e-6))
        assert said["count"] == wanted.count
        assert (said["boxes_xyxy"] is None) == (wanted.boxes_xyxy is None)
        if wanted.boxes_xyxy is not None:
            np.testing.assert_allclose(said["boxes_xyxy"], wanted.boxes_xyxy, rtol=1e-5, atol=1e-4)
            np.testing.assert_allclose(said["box_scores"], wanted.box_scores, atol=1e-6)
            numbers.add(len(wanted.boxes_xyxy))
    assert "boxes_norm" not in heads or len(numbers) > 1


@pytest.mark.parametrize("resize", ["pad", "letterbox"])
def test_every_way_to_resize(exported: tuple[GrexModel, Path], tmp_path: Path, resize: str) -> None:
    model, folder = exported
    script, kept = Model(folder), model.config.data.resize
    script.facts["resize"] = model.config.data.resize = resize
    try:
        write_anew(script, tmp_path, prepare_graph(model))
        for height, width in ((40, 90), (120, 64), (1, 300), (77, 200)):
            given = picture(height, height, width)
            encoded, made = model.encode(given), script.network_input(given)
            np.testing.assert_array_equal(made["image"], encoded.features.image)
            np.testing.assert_array_equal(made["place"], place_of(encoded.geometry, 64, encoded.canvas))
            for answer, grounding in zip(script.ground(given, SAID), model.ground(given, SAID), strict=True):
                assert_same(answer, grounding, answer["mask"])
    finally:
        model.config.data.resize = kept


def test_masks_between_picture_and_network(tmp_path: Path) -> None:
    """The graphs of describe.py, against the model's own functions."""
    place, sizes = place_of(fit(50, 70, 64, "pad"), 64, (64, 64)), {0: "height", 1: "width"}
    write_onnx(tmp_path, ("in", AtInputGraph(), (torch.ones(50, 70) > 0, place), ["mask", "place"], ["out"]), True, {"mask": sizes})
    write_onnx(tmp_path, ("back", AtImageGraph(), (torch.ones(16, 24), place), ["logits", "place"], ["out"]), True, {"logits": sizes})
    into, back = onnx_graph(tmp_path / "in", ["mask", "place"], ["out"]), onnx_graph(tmp_path / "back", ["logits", "place"], ["out"])
    random = np.random.default_rng(0)
    for number in range(90):
        (height, width), size = random.integers(1, 200, 2).tolist(), int(random.choice([32, 64, 72]))
        geometry = fit(height, width, size, ("pad", "letterbox", "squash")[number % 3])
        place = place_of(geometry, size, (96, 96)).numpy()
        mask = random.random((height, width)) < (0.5, 3 / (height * width))[number % 2]
        mask[random.integers(height), random.integers(width)] = True
        np.testing.assert_array_equal(into({"mask": mask, "place": place})["out"], input_masks(mask[None], geometry, (size, size))[0])
        cells = random.integers(1, 30, 2)
        if number < 3:  # large enough to tell float64 from float32
            geometry, cells = fit(900, 1400, 96, ("pad", "letterbox", "squash")[number]), (200, 300)
            place = place_of(geometry, 96, (96, 96)).numpy()
        logits = torch.from_numpy(random.normal(size=cells).astype(np.float32))
        np.testing.assert_array_equal(back({"logits": logits.numpy(), "place": place})["out"], mask_to_original(logits, geometry, (96, 96)))


@pytest.mark.parametrize(("graph", "part"), [("prepare", "image"), ("prepare", "place"), ("decide", "mask"), ("decide", "box_scores")])
def test_a_decision_that_differs_is_found(exported: tuple[GrexModel, Path], graph: str, part: str) -> None:
    model, folder = exported
    graphs = graphs_of(folder, json.loads((folder / "export.json").read_text(encoding="utf-8")))
    assert check_decisions(model, graphs, [64])["compared"] == 9
    right = graphs[graph]
    change = {"image": lambda x: x + 0.001, "place": lambda x: x + 1, "mask": lambda x: ~x, "box_scores": lambda x: x[1:]}[part]
    graphs[graph] = lambda arrays: {name: change(value) if name == part else value for name, value in right(arrays).items()}
    with pytest.raises(GrexError, match=f"another {part} than the model's own"):
        check_decisions(model, graphs, [64])


def test_a_folder_that_decides_otherwise_is_not_written(
    exported: tuple[GrexModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision, "stable_order", lambda values, descending: torch.arange(len(values)))
    with pytest.raises(GrexError, match="another box"):
        export_model(str(exported[1].parent / "model"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
