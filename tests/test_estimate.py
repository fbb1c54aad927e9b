"""`grex estimate`: arithmetic by hand, operations by formula, published sizes, and (long) memory against real trainings."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from shrink import shrink_run
from tiny_mllms import write_mllm
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grex_mllm.cli import main
from grex_mllm.config import load_config, save_config
from grex_mllm.errors import GrexError
from grex_mllm.estimate.count import Counted, Part, count
from grex_mllm.estimate.fitting import CHECKPOINTING, HALF_BATCH, LEFT_FREE, NF4, ZERO2, Case, smallest_change
from grex_mllm.estimate.memory import Memory, Plan, memory
from grex_mllm.estimate.model import Load, build, made_batch, standing_alone, word_tokenizers
from grex_mllm.estimate.shapes_only import Live, as_on_cpu
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_shapes import FOLDER, leaving_out_weights, shape_of
from grex_mllm.training.step import Step

PUBLISHED = {
    "Qwen2.5-0.5B-Instruct": 494_032_768, "Qwen2.5-1.5B-Instruct": 1_543_714_304, "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Llama-3.1-8B-Instruct": 8_030_261_248, "vicuna-7b-v1.5": 6_738_415_616,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976, "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}  # fmt: skip
# 100 trained weights, 1,000 frozen bytes of which 800 are matrices of 400 parameters; 800 numbers in all
HAND = Counted(
    frozen=1000, trainable=400, quantisable=800, quantisable_parameters=400, parts={"all": Part(800, 100)},
    largest_matrix=20, largest_layer=60, gradients=400, state=800, peak=2000, peak_without_gradients=1800, update=40,
)  # fmt: skip


def small(name: str = "joint_rela_r50_qwen2.5_0.5b", *overrides: str) -> Any:
    """A shipped configuration at tiny size, its language model as published but for the sizes."""
    config = shrink_run(load_config(ROOT / "configs" / f"{name}.yaml", list(overrides)))
    config.model.generator.lm = "tiny"
    config.train.optim.text, config.model.text.num_layers, config.model.decoder.num_layers, config.data.image_size = "all", 1, 1, 64
    return standing_alone(config)[0]


def test_memory_without_zero_is_the_sum() -> None:
    alone = memory(HAND, Plan(), gpus=1)
    assert alone == Memory(weights=1400, gradients=400, optimizer=800, activations=1600, buffers=0, cpu=0) and alone.total == 4200
    assert memory(HAND, Plan(), gpus=4) == Memory(1400, 400, 800, 1600, buffers=400)


def test_memory_by_stage_by_hand() -> None:
    """Four processes; a bucket of 25 numbers, two at a time; Adam's moments and the float32 copy are shared out."""
    plan = {"bucket": 25, "prefetch": 10, "live": 100}
    assert memory(HAND, Plan(1, **plan), 4) == Memory(1400, 400, 200 + 100, 1600, 200)  # type: ignore[arg-type]
    # a quarter of the gradients stays: 3/4 of 1800 and 1/4 of 2000 at once, less that quarter
    assert memory(HAND, Plan(2, **plan), 4) == Memory(1400, 100, 300, 1850 - 100, 200)  # type: ignore[arg-type]
    assert memory(HAND, Plan(3, **plan), 4) == Memory(350, 100, 300, 1750, 200 + 40 + 175)  # type: ignore[arg-type]
    assert memory(HAND, Plan(2, "optimizer", **plan), 4) == Memory(1400, 100, 0, 1750, 200, cpu=400)  # type: ignore[arg-type]
    assert memory(HAND, Plan(3, "all", **plan), 4) == Memory(0, 100, 0, 1750, 415, cpu=400 + 350)  # type: ignore[arg-type]


def test_memory_of_a_quantised_base_by_hand() -> None:
    """Matrices shrink to half a byte and scales a parameter, or one byte; the rest of the base stays."""
    whole = memory(HAND, Plan(), 1)
    assert memory(HAND, Plan(quantisation="int8"), 1).weights == whole.weights - 800 + 400
    scales = 400 / 64 + 4 * 400 / (64 * 256)
    assert memory(HAND, Plan(quantisation="nf4"), 1).weights == whole.weights - 800 + int(200 + scales)
    assert memory(HAND, Plan(quantisation="nf4"), 1).activations == whole.activations + 20


def test_plans_that_no_training_can_have_are_refused() -> None:
    for plan in (Plan(4), Plan(None, "optimizer"), Plan(2, "all"), Plan(3, quantisation="nf4")):
        with pytest.raises(GrexError):
            memory(HAND, plan, 2)


def test_the_smallest_change_that_fits() -> None:
    less = Counted(**{**vars(HAND), "peak": 1000, "peak_without_gradients": 800})
    case = Case(Plan(), 4, 2, False, True, with_checkpointing=less, without_checkpointing=HAND)
    need = memory(HAND, Plan(), 4).total

    def changes(total: float) -> Any:
        found = smallest_change(case, total + LEFT_FREE)
        return None if found is None else found[0]

    assert changes(need) == ()
    assert changes(need - 1) == (CHECKPOINTING,)
    assert changes(need - 1001)[0] == CHECKPOINTING and len(changes(need - 1001)) == 2
    assert changes(1) is None
    one = Case(Plan(), 1, 2, True, True, HAND, HAND)
    found = smallest_change(one, memory(HAND, Plan(), 1).total - 1 + LEFT_FREE)
    assert found is not None and found[0] == (HALF_BATCH,) and ZERO2 not in found[0] and NF4 not in found[0]


def test_live_bytes_and_operations_of_a_linear_layer_by_hand() -> None:
    """x [5, 8] W' [8, 3]: 2 * 5 * 8 * 3 operations forward, the same for the weight's gradient, and for the input's if it is asked for."""
    layer = nn.Linear(8, 3, bias=False, device="meta")
    as_on_cpu(layer)
    live, x = Live(), torch.ones(5, 8)
    live.ignore(layer.weight)
    live.ignore(x)
    layer.weight.register_post_accumulate_grad_hook(live.own)
    with FlopCounterMode(display=False) as operations, live:
        out = layer(x)
        assert live.bytes == out.numel() * 4 and operations.get_total_flops() == 240
        out.sum().backward()
    assert operations.get_total_flops() == 480 and live.gradient_bytes == layer.weight.numel() * 4
    assert live.peak >= live.gradient_bytes + out.numel() * 4
    del out
    assert live.bytes == live.gradient_bytes


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = load_config(None, [f"--model.generator.lm=models/{name}", "--model.generator.dtype=bfloat16"])
    with leaving_out_weights(), torch.device("meta"):
        lm = shape_of(config.model.generator)
    assert sum(parameter.numel() for parameter in lm.parameters()) == PUBLISHED[name]
    assert {file.stem for file in FOLDER.glob("*.json")} == set(PUBLISHED)


def test_a_language_model_that_nobody_knows_is_named() -> None:
    config = load_config(ROOT / "configs" / "joint_rela_r50_qwen2.5_0.5b.yaml", ["--model.generator.lm=models/Qwen2.5-3B"])
    with pytest.raises(GrexError, match=r"Qwen2\.5-3B is not there; expected its folder"):
        standing_alone(config)


def test_large_configuration_builds_on_meta() -> None:
    config, notes = standing_alone(load_config(ROOT / "configs" / "joint_rela_swin_base_qwen2.5_7b.yaml"))
    model = build(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(p.numel() for name, p in model.generator.lm.named_parameters() if "lora_" not in name) == PUBLISHED["Qwen2.5-7B-Instruct"]
    assert any("shape from grex_mllm/models/shapes/Qwen2.5-7B-Instruct.json, because models/Qwen2.5-7B-Instruct is not there" in note
               for note in notes)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", ["joint_rela_swin_base_qwen2.5_vl_7b", "generator_qwen2.5_vl_3b"])
def test_a_multimodal_generator_is_counted_without_its_folder(name: str) -> None:
    """One small image and expression. Forward, 2 operations for every weight of a layer and token of the sequence at least."""
    settings = load_config(ROOT / "configs" / f"{name}.yaml", ["--data.image_size=128", "--data.expressions_per_image=1"])
    config, notes = standing_alone(settings)
    lm = Path(config.model.generator.lm).name
    found = count(config, Load(1, objects=2, tokens=4), device="cuda", precision="bf16")
    assert found.parts["language model"].total == PUBLISHED[lm] and found.parts["language model"].trainable == 0
    assert any(f"shape from grex_mllm/models/shapes/{lm}.json" in note for note in notes)
    tokens = 25 + 30 + 4  # of a picture of 140 x 140, of the chat around it, of the answer
    assert found.forward_flops > 2 * tokens * 0.8 * (PUBLISHED[lm] - 1.3e9)


def test_a_multimodal_generator_is_counted_from_its_folder(tmp_path: Path) -> None:
    config = small("generator_qwen2.5_vl_3b")
    config.model.generator.lm = str(write_mllm("qwen2.5-vl", tmp_path, ["dog"] * 3))
    found = count(config, Load(1, objects=2, tokens=4), device="cpu", precision="fp32")
    lm = load_file(tmp_path / "model.safetensors")
    assert found.parts["language model"].total == sum(tensor.numel() for tensor in lm.values())
    assert found.parts["adapters"].trainable > 0 and found.flops > found.forward_flops > 0
    config.model.generator.dtype = "auto"  # the base is held in what is computed in
    full, half = (count(config, Load(1, objects=2, tokens=4), device="cpu", precision=name) for name in ("fp32", "bf16"))
    saved = 2 * sum(tensor.numel() for tensor in lm.values())
    assert full.frozen - half.frozen == saved and full.trainable == half.trainable


def test_counts_equal_those_of_a_real_step() -> None:
    """Operations of shapes and of real tensors are the same on a CPU, gradients and Adam's state have the size of what trains."""
    config = small()
    found = count(config, Load(2, objects=3, tokens=6), device="cpu", precision="fp32")
    trained = sum(part.trainable for part in found.parts.values())
    assert found.gradients == 4 * trained and found.state == pytest.approx(8 * trained, rel=0.01)
    assert found.peak >= found.peak_without_gradients > 0 and 2 < found.flops / found.forward_flops < 4
    torch.manual_seed(0)
    model = GrexModel(config, *word_tokenizers(config))
    step = Step(model, config).train()
    batch = made_batch(config, model, Load(2, objects=3, tokens=6))
    with FlopCounterMode(display=False) as operations:
        step(batch)
    assert operations.get_total_flops() == pytest.approx(found.forward_flops, rel=0.02)


def test_options_of_the_joint_training_are_counted() -> None:
    """Words add their weights, a round trip a second pass of the language model; among found objects, nothing is found by shapes."""
    found = []
    for words, share, trip in ((0, 0.0, 0.0), (50, 0.5, 1.0)):
        config = load_config(ROOT / "configs" / "demo.yaml")
        config.model.decoder.image_layers = config.model.decoder.language_layers = 1
        config.model.text.num_layers = config.model.generator.num_layers = 1
        config.model.generator.max_new_tokens, config.data.image_size = 2, 64
        config.model.decoder.words = config.model.generator.words = words
        config.model.generator.found_share, config.loss.round_trip, config.loss.generate_start = share, trip, 0.0
        found.append(count(config, Load(2, objects=3, tokens=6), device="cpu", precision="fp32"))
    plain, more = found
    width = config.model.decoder.width  # as wide as the projector and the language model
    assert more.gradients - plain.gradients == 4 * ((width**2 + width) + 2 * width + (width * 50 + 50) + 50 * width)
    assert more.forward_flops > plain.forward_flops and more.peak > plain.peak


@pytest.mark.long
def test_bfloat16_needs_less_than_float32() -> None:
    config = small()
    full, half = (count(config, Load(2, objects=3, tokens=6), device="cuda", precision=name) for name in ("fp32", "bf16"))
    assert half.peak_without_gradients < full.peak_without_gradients and half.state == full.state


def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(small(), tmp_path / "small.yaml")
    words = ["estimate", "--config", str(tmp_path / "small.yaml"), "--objects", "3", "--tokens", "6", "--train.batch_images=2"]
    assert main([*words, "--gpus", "2", "--gpu-memory-gb", "24", "--samples-per-s", "10", "--samples", "36000"]) == 0
    text = capsys.readouterr().out
    for part in ("image encoder", "adapters", "ZeRO-3 + all on CPU", "GFLOP", "1.0 hours an epoch", "fits 24 GiB as configured"):
        assert part in text, text
    assert main([*words, "--tflops", "0.001", "--utilisation", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["time"]["samples_per_s"] == pytest.approx(0.5e9 / found["flops"]["per_sample"])
    row = found["as_configured"]
    assert row["total"] == sum(row[name] for name in ("weights", "gradients", "optimizer", "activations", "buffers"))
    assert main([*words, "--gpus", "3"]) == 2 and main([*words, "--device", "tpu"]) == 2 and main([*words, "--utilisation", "2"]) == 2


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of memory are read from Linux's /proc")
@pytest.mark.parametrize("name", ["joint", "generate", "ground"])
def test_estimates_are_within_a_tenth_of_what_trainings_take(name: str) -> None:
    spec = importlib.util.spec_from_file_location("estimate_benchmark", ROOT / "benchmarks" / "estimate.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    guess, true = benchmark.compare(name)
    assert true > 2 * 2**30 and abs(guess / true - 1) < 0.1, (guess, true)
