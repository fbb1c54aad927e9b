"""The training loop on a toy: determinism, workers, accumulation, precision, non-finite losses, logs, the weight average."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import ToyModel, ToyStep, losses, toy_batch, toy_config, toy_train

from grex_mllm.data.dataset import epoch_index
from grex_mllm.errors import GrexError
from grex_mllm.training import checkpoint
from grex_mllm.training.batches import BatchStream, map_tensors, mix, stream
from grex_mllm.training.engine import determinism
from grex_mllm.training.log import cut_log


def batches(images: int = 4) -> BatchStream:
    return BatchStream(toy_batch, images)


def test_positions_are_counted_without_gaps() -> None:
    assert [position for index in range(500) for position in batches().positions(index)] == list(range(2000))
    source = batches()
    assert [source.positions(index) for index in reversed(range(100))] == [batches().positions(index) for index in reversed(range(100))]


def test_processes_share_every_batch() -> None:
    for index in (0, 7, 4096, 5001):
        parts = [batches().share(rank, 4).positions(index) for rank in range(4)]
        assert sorted(position for part in parts for position in part) == batches().positions(index)


@pytest.mark.parametrize(("images", "ranks"), [(3, 2), (0, 1)])
def test_batches_that_cannot_be_shared_are_refused(images: int, ranks: int) -> None:
    with pytest.raises(GrexError, match="batch_images"):
        BatchStream(toy_batch, images, 0, ranks)


def test_every_epoch_is_another_whole_pass() -> None:
    epochs = [[epoch_index(position, 10, seed=3)[1] for position in range(10 * epoch, 10 * epoch + 10)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_hash_is_the_same_everywhere() -> None:
    """The first value is the published first output of splitmix64 from state 0."""
    assert [mix(0), mix(1, 2), mix(2, 1)] == [0xE220A8397B1DCDAF, 2549061549998628137, 13807703414589227019]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_do_not_matter(num_workers: int) -> None:
    def plain(workers: int) -> list[Any]:
        found = stream(batches(), 3, 9, workers, seed=1)
        return [map_tensors(batch, lambda tensor: (str(tensor.dtype), tensor.tolist())) for batch in found]

    assert plain(num_workers) == plain(0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_the_data_keeps_its_words(num_workers: int) -> None:
    def broken(positions: list[int]) -> Any:
        raise GrexError("a.png is cut short; expected a whole file; fix it")

    source = BatchStream(broken, 2)
    with pytest.raises(GrexError, match=r"^a\.png is cut short; expected a whole file; fix it$"):
        list(stream(source, 0, 2, num_workers, seed=0))


def test_one_seed_gives_one_run(tmp_path: Path) -> None:
    for name, settings in {"a": {}, "b": {"num_workers": 1}, "c": {"seed": 1}}.items():
        toy_train(toy_config(tmp_path / name, **settings), dropout=0.3)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_accumulated_batches_make_the_step_of_a_large_one(tmp_path: Path) -> None:
    _, whole = toy_train(toy_config(tmp_path / "a"))
    _, parts = toy_train(toy_config(tmp_path / "b", batch_images=2, accumulation=2))
    for name, value in whole.state_dict().items():
        if name != "calls":
            torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert int(parts.calls) == 2 * int(whole.calls)


def test_frozen_weights_stay(tmp_path: Path) -> None:
    _, model = toy_train(toy_config(tmp_path, **{"optim.weight_decay": 0.5}))
    torch.manual_seed(0)
    fresh = ToyModel()
    assert torch.equal(model.frozen.weight, fresh.frozen.weight) and not torch.equal(model.shared.weight, fresh.shared.weight)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    settings = {"optim.lr": 1e-6, "optim.eps": 1e3, "optim.weight_decay": 0.0, "steps": 1}
    moves = []
    for clip in (1e-3, 0.0):
        _, model = toy_train(toy_config(tmp_path / str(clip), **{**settings, "optim.clip": clip, "optim.lr": 1.0}))
        torch.manual_seed(0)
        before = ToyModel()
        moves.append(sum(float((a - b).norm() ** 2) for a, b in zip(model.parameters(), before.parameters(), strict=True)) ** 0.5)
    norm = losses(tmp_path / "0.0")[0]["grad_norm"]
    assert moves[0] == pytest.approx(moves[1] * 1e-3 / norm, rel=1e-2)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], ToyModel.forward

    def watched(model: ToyModel, image: torch.Tensor) -> Any:
        seen.append(model.shared(torch.zeros(1, 12)).dtype)
        return forward(model, image)

    monkeypatch.setattr(ToyModel, "forward", watched)
    _, model = toy_train(toy_config(tmp_path, precision="bf16"))
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("precision", "named"), [("fp16", "fp16 on cpu"), ("half", '"half"')])
def test_precisions_that_cannot_work_are_refused(tmp_path: Path, precision: str, named: str) -> None:
    if precision == "fp16" and torch.accelerator.is_available():
        pytest.skip("fp16 works on this machine's accelerator")
    with pytest.raises(GrexError, match=named):
        toy_train(toy_config(tmp_path, precision=precision))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    forward = ToyStep.forward

    def broken(step: ToyStep, batch: Any, progress: float) -> Any:
        terms = forward(step, batch, progress)
        if progress >= 6 / 12:
            zero = step.model.shared.weight.sum() * 0
            terms["bad"] = zero / zero.detach() if kind == "loss" else zero.abs().sqrt()
            terms["total"] = terms["total"] + terms["bad"]
        return terms

    config = toy_config(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(GrexError) as caught:
        patch.setattr(ToyStep, "forward", broken)
        toy_train(config, save=True)
    message = str(caught.value)
    ids = [index for position in range(24, 28) for index in [f"i{epoch_index(position, 10, 7)[1]}"]]
    assert "step 7: not finite" in message and f"image ids {', '.join(ids)}" in message and f"expression ids e{ids[0][1:]}.0" in message
    assert ("bad nan" in message) if kind == "loss" else ("gradient norm nan" in message)
    assert "step_00000004" in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["frozen.safetensors", "step_00000004"]
    assert not (tmp_path / "toy.pt").exists() and len(losses(tmp_path)) == 6
    result, _ = toy_train(toy_config(tmp_path, resume=True), save=True)
    assert result.resumed_from == 4 and result.steps == 12 and (tmp_path / "toy.pt").exists()


def test_a_line_tells_everything(tmp_path: Path) -> None:
    result, _ = toy_train(toy_config(tmp_path, log_every=5))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12] == [line["step"] for line in result.lines]
    expected = {"loss/ground/fit", "loss/generate/size", "loss/total", "grad_norm", "images_per_s", "expressions_per_s"}
    expected |= {"step", "tokens_per_s", "peak_memory_bytes", "lr/0", "lr/1", "elapsed_s"}
    assert set(lines[0]) == expected
    assert lines[0]["expressions_per_s"] == pytest.approx(2 * lines[0]["images_per_s"], rel=1e-3)
    assert lines[0]["tokens_per_s"] == pytest.approx(6 * lines[0]["images_per_s"], rel=1e-3)
    toy_train(toy_config(tmp_path / "each"))
    each = losses(tmp_path / "each")
    assert lines[0]["loss/ground/fit"] == pytest.approx(sum(line["loss/ground/fit"] for line in each[:4]) / 4)


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy_train(toy_config(tmp_path))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Scalars("loss/total")
    assert [event.step for event in events] == list(range(1, 13))
    assert [event.value for event in events] == pytest.approx([line["loss/total"] for line in losses(tmp_path)], rel=1e-6)


def test_a_cut_log_ends_at_the_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    cut_log(log, 3)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    log.write_text('{"step": 1}\n{"st')
    cut_log(log, 3)
    assert log.read_text() == '{"step": 1}\n'


def test_the_averaged_weights_are_published(tmp_path: Path) -> None:
    result, model = toy_train(toy_config(tmp_path, **{"optim.average_decay": 0.9}), save=True)
    assert result.checkpoint is not None
    average = torch.load(result.checkpoint / "state.pt", weights_only=True)["average"]
    published = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert average["num_updates"] == 12
    assert torch.equal(published["shared.weight"], average["shadow"]["shared.weight"])
    assert not torch.equal(published["shared.weight"], model.shared.weight)


def test_nothing_unusual_is_left_in_the_process(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        toy_train(toy_config(tmp_path, num_threads=threads + 1))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    with determinism(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()


def test_numbers_that_make_no_run_are_refused(tmp_path: Path) -> None:
    for name in ("steps", "batch_images", "accumulation", "log_every", "save_every", "keep"):
        with pytest.raises(GrexError, match=f"train.{name} is 0"):
            toy_train(toy_config(tmp_path, **{name: 0}))
    toy_train(toy_config(tmp_path, steps=4))
    with pytest.raises(GrexError, match="holds a run"):
        toy_train(toy_config(tmp_path, steps=4))
    assert checkpoint.latest(tmp_path) is not None
