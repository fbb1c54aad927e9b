"""Options of the losses: focal loss, the hardest pixels and masks alone, and a teacher's answers; equations in loops, every knob turned."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_batch import make_batch
from test_decoder_contract import batch_of, model_of
from test_start import joint, released, tiny
from tiny import WORDS
from tiny_folder import tiny_folder
from torch import Tensor

from grex_mllm.config import load_config
from grex_mllm.entries import DECODERS, entry
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.isfp.criterion import refinement, segmentation
from grex_mllm.models.distillation import distillation, divergence
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.grex_losses import mask_cross_entropy
from grex_mllm.models.hard_examples import HardConfig, check_hard, pixel_losses
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.ops.losses import alone, hardest
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.run import train_from_config
from grex_mllm.training.step import Step
from grex_mllm.training.teacher import Teacher
from grex_mllm.types import GroundingOutput

CASES = {
    "plain": HardConfig(),
    "gamma": HardConfig(focal_gamma=2.0),
    "root": HardConfig(focal_gamma=0.5),
    "alpha": HardConfig(focal_alpha=0.25),
    "focal": HardConfig(focal_gamma=2.0, focal_alpha=0.25),
    "pixels": HardConfig(pixels=0.3),
    "masks": HardConfig(masks=0.5),
    "all": HardConfig(focal_gamma=1.0, focal_alpha=0.75, pixels=0.4, masks=0.4),
}


def by_loops(logits: Tensor, gt: Tensor, weights: list[float], hard: HardConfig) -> Tensor:
    """The mask loss as its sources write it, float64: one pixel after the other. logits: [E, 2, h, w].  gt: bool [E, h, w]."""
    masks = []
    for scores, truth in zip(logits, gt, strict=True):
        pixels = []
        for one, y in zip((scores[1] - scores[0]).flatten(), truth.flatten().tolist(), strict=True):
            p = 1 / (1 + torch.exp(-one))
            p_t = p if y else 1 - p
            value = -((1 - p_t) ** hard.focal_gamma) * torch.log(p_t)
            weight = 1.0
            if hard.focal_alpha is not None:
                value = value * (hard.focal_alpha if y else 1 - hard.focal_alpha)
            else:
                weight = weights[1] if y else weights[0]
                value = value * weight
            pixels.append((value, weight))
        pixels.sort(key=lambda pair: -float(pair[0].detach()))
        masks.append(pixels[: math.ceil(hard.pixels * len(pixels))])
    masks.sort(key=lambda mask: -sum(float(v.detach()) for v, _ in mask) / sum(w for _, w in mask))
    kept = [pair for mask in masks[: math.ceil(hard.masks * len(masks))] for pair in mask]
    return torch.stack([v for v, _ in kept]).sum() / sum(w for _, w in kept)


@pytest.mark.parametrize("case", CASES)
def test_mask_loss_against_loops(case: str) -> None:
    torch.manual_seed(1)
    logits, gt, weights = torch.randn(5, 2, 3, 4) * 2, torch.rand(5, 3, 4) > 0.6, [0.9, 1.1]
    gt[3] = False
    exact, own = logits.double().requires_grad_(), logits.clone().requires_grad_()
    wanted = by_loops(exact, gt, weights, CASES[case])
    found = mask_cross_entropy(own, gt, torch.tensor(weights), CASES[case])
    wanted.backward()
    found.backward()
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-7)
    assert own.grad is not None and exact.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_the_focal_loss_of_the_guide_is_a_setting() -> None:
    """alpha (1 - exp(-BCE))^gamma BCE, a mean: its alpha is one factor for all pixels, so it is the term's weight."""
    torch.manual_seed(0)
    logits, gt = torch.randn(2, 2, 3, 5), torch.rand(2, 3, 5) > 0.5
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], gt.float(), reduction="none")
    guide = (0.25 * (1 - torch.exp(-bce)) ** 2 * bce).mean()
    ours = mask_cross_entropy(logits, gt, torch.ones(2), HardConfig(focal_gamma=2.0))
    assert float(0.25 * ours) == pytest.approx(float(guide), rel=1e-5)


def test_what_is_surely_right_costs_nothing_and_has_a_slope_that_is_a_number() -> None:
    for gamma in (0.5, 2.0):
        logits = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
        each, _ = pixel_losses(logits, torch.tensor([[True, False, True]]), HardConfig(focal_gamma=gamma))
        each.sum().backward()
        assert float(each[0, :2].max().detach()) < 1e-20 and logits.grad is not None and bool(logits.grad.isfinite().all())


def test_a_share_counts_only_what_lies_inside() -> None:
    """Ten pixels of which six count: half of them are three, whatever the others cost; rounding keeps one of few."""
    logits = torch.tensor([[9.0, 5, 4, 3, 2, 1, 0, 9, 9, 9], [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    inside = torch.zeros(2, 10, dtype=torch.bool)
    inside[0, 1:7], inside[1, 0] = True, True
    each, weight = pixel_losses(logits, torch.zeros(2, 10), HardConfig(pixels=0.5), inside=inside)
    assert weight.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1] + [0] * 9]
    assert torch.equal(each > 0, weight > 0)


def test_the_hardest_are_a_number_and_the_first_of_equal_ones() -> None:
    values = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert hardest(values, 0.4).tolist() == [False, True, True, False, False]
    assert hardest(values, 0.41).sum() == 3 and hardest(values, 1.0).all() and hardest(values, 0.01).sum() == 1
    assert hardest(torch.zeros(10), 0.3).sum() == 3 and len(hardest(torch.zeros(0), 0.5)) == 0
    with alone():
        assert hardest(values, 0.4).sum() == 2


def run(name: str) -> tuple[GrexModel, GroundingOutput, Any]:
    model = model_of(name).train()
    batch = batch_of(model, num=1)
    return model, model.grounding(batch.image, batch.image_index, batch.text_ids, batch.text_mask, batch.input_sizes), batch


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_reads_every_knob(name: str) -> None:
    model, output, batch = run(name)
    config = model.config.model.decoder
    totals = {}
    for case, hard in CASES.items():
        criterion = entry("model.decoder", name).Criterion(replace(config, loss=replace(config.loss, hard=hard)))
        terms = criterion(output, batch)
        assert all(bool(value.isfinite()) for value in terms.values())
        totals[case] = float(terms["total"].detach())
    assert len({round(total, 6) for total in totals.values()}) == len(CASES), totals
    plain = entry("model.decoder", name).Criterion(config)(output, batch)
    assert totals["plain"] == pytest.approx(float(plain["total"].detach()), rel=1e-6)


@pytest.mark.parametrize("name", ["rela", "isfp", "instance_selection"])
def test_gradients_with_every_option_are_numbers_and_there(name: str) -> None:
    model = model_of(name).train()
    model.config.model.decoder.loss.hard = CASES["all"]
    Step(model, model.config)(batch_of(model))["total"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("field", "value"), [("focal_gamma", -1.0), ("focal_alpha", 1.0), ("pixels", 0.0), ("masks", 1.5), ("pixels", math.nan)]
)
def test_numbers_that_make_no_loss_are_refused(field: str, value: float) -> None:
    with pytest.raises(GrexError, match=rf"model\.decoder\.loss\.hard\.{field} is"):
        check_hard(replace(HardConfig(), **{field: value}))
    for name in ("rela", "instance_selection"):
        config = entry("model.decoder", name).Config()
        setattr(config.loss.hard, field, value)
        with pytest.raises(GrexError, match=field):
            entry("model.decoder", name).Criterion(config)


def test_masks_of_cells_without_any_target_are_no_number_less() -> None:
    """ISFP: no cell is a target, and the refinement of a wrong choice is the easiest of all."""
    batch, hard = make_batch(torch.zeros(2, 8, 8, dtype=torch.bool), [torch.zeros(0, 4)] * 2), HardConfig(masks=0.5, pixels=0.5)
    cells = torch.randn(2, 4, 4, 4, requires_grad=True)
    nothing = segmentation(cells, torch.full((2, 4), -1), batch, hard)
    nothing.backward()
    assert float(nothing.detach()) == 0 and cells.grad is not None
    gt = torch.zeros(2, 8, 8, dtype=torch.bool)
    gt[:, :4] = True
    right, logits = torch.where(gt, 5.0, -5.0), torch.randn(2, 2, 8, 8)
    coarse = torch.stack([right[0], -right[1]])  # the second one was chosen wrongly
    both, first = refinement(logits, coarse, gt, 0.3, hard), refinement(logits[:1], coarse[:1], gt[:1], 0.3, replace(hard, masks=1.0))
    assert float(both) == pytest.approx(float(first), rel=1e-6)


def test_distillation_against_loops() -> None:
    torch.manual_seed(0)
    logits, wanted, t = torch.randn(3, 2, 2, 3), torch.randn(3, 2, 2, 3), 2.5
    total = 0.0
    for e in range(3):
        for y in range(2):
            for x in range(3):
                own = torch.softmax(logits[e, :, y, x].double() / t, 0).tolist()
                theirs = torch.softmax(wanted[e, :, y, x].double() / t, 0).tolist()
                total += sum(q * math.log(q / p) for p, q in zip(own, theirs, strict=True)) * t * t
    assert float(divergence(logits, wanted, t)) == pytest.approx(total / 18, rel=1e-5)


def test_equal_answers_cost_nothing_and_only_the_student_learns() -> None:
    torch.manual_seed(0)
    teacher = GroundingOutput(torch.randn(2, 2, 4, 4), no_target_logits=torch.randn(2, 2), count_logits=torch.randn(2, 7))
    same = GroundingOutput(*(None if v is None else v.clone().requires_grad_() for v in teacher))
    loss = distillation(same, teacher, 3.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-7)
    for value in (same.mask_logits, same.no_target_logits, same.count_logits):
        assert value is not None and value.grad is not None and value.grad.abs().max() < 1e-7
    for field in ("mask_logits", "no_target_logits", "count_logits"):
        other = teacher._replace(**{field: getattr(teacher, field) * -1})
        assert float(distillation(other, teacher, 3.0)) > 0.01
        assert float(distillation(other, other._replace(**{field: None}) if field != "mask_logits" else other, 3.0)) < 1e-6
    finer = teacher._replace(mask_logits=torch.nn.functional.interpolate(teacher.mask_logits, scale_factor=2, mode="nearest"))
    assert float(distillation(teacher, finer, 1.0)) < float(distillation(teacher._replace(mask_logits=-teacher.mask_logits), finer, 1.0))
    with pytest.raises(GrexError, match="makes no mask in training"):
        distillation(teacher._replace(mask_logits=torch.zeros(2, 2, 0, 0)), teacher, 1.0)


def another(folder: Path, name: str) -> GrexModel:
    """Write a tiny model of a configuration, with a vocabulary of its own."""
    teacher = GrexModel(tiny(name), train_text_tokenizer([*WORDS, "another vocabulary"], 150))
    teacher.save_pretrained(folder)
    return teacher


def distilled(tmp_path: Path) -> tuple[GrexModel, Step]:
    """A small student, and the step in which a model of another text tokenizer teaches it."""
    teacher, model = another(tmp_path / "teacher", "gres_rela_r50"), model_of("rela")
    assert teacher.text_tokenizer.vocab_size != model.text_tokenizer.vocab_size
    model.config.train.teacher, model.config.loss.distill = str(tmp_path / "teacher"), 0.5
    return model, Step(model, model.config).train()


def test_a_teacher_is_no_part_of_the_model(tmp_path: Path) -> None:
    model, step = distilled(tmp_path)
    names = set(step.state_dict())
    batch = batch_of(model)
    terms = step(batch)
    assert float(terms["total"]) == pytest.approx(float(terms["ground/total"]) + 0.5 * float(terms["distill"]), rel=1e-5)
    terms["total"].backward()
    assert float(terms["distill"]) > 0 and all(p.grad is not None for p in model.parameters())
    held = step.teacher
    assert held is not None and held.model is not None and not held.model.training
    assert not any(p.requires_grad or p.grad is not None for p in held.model.parameters())
    assert set(step.state_dict()) == names and set(model.saved_state()) == {name.removeprefix("model.") for name in names}
    assert sum(p.numel() for p in step.parameters()) == sum(p.numel() for p in model.parameters())
    assert copy.deepcopy(step).teacher is held
    answer = held(batch, (64, 64))
    theirs = held.model.grounding
    ids, mask = held.model.encode_text(batch.expressions)
    with torch.no_grad():
        again = theirs(batch.image, batch.image_index, ids, mask, batch.input_sizes)
    assert torch.equal(answer.mask_logits, again.mask_logits)
    step.loss.distill_temperature = 8.0
    assert float(step(batch)["distill"]) != pytest.approx(float(terms["distill"]), rel=1e-3)
    with pytest.raises(GrexError, match=r"pads images to \(64, 64\), the model to \(64, 32\)"):
        held(batch, (64, 32))


def test_a_model_that_is_its_own_teacher_learns_nothing_from_it(tmp_path: Path) -> None:
    model = model_of("vlt")
    model.save_pretrained(tmp_path / "m")
    model.config.train.teacher, model.config.loss.distill = str(tmp_path / "m"), 1.0
    assert float(Step(model, model.config).eval()(batch_of(model))["distill"]) == pytest.approx(0, abs=1e-6)


def test_a_training_with_a_teacher(tmp_path: Path) -> None:
    """From the configuration on: a checkpoint and a model folder hold the student alone, and the teacher's files stay as they are."""
    data = tiny_folder(tmp_path / "data")
    released(tmp_path / "start")
    another(tmp_path / "teacher", "gres_rela_swin_base")
    before = {file.name: file.read_bytes() for file in (tmp_path / "teacher").glob("*.*")}
    config = joint(data, tmp_path / "start", tmp_path / "run")
    config.train.teacher, config.loss.distill = str(tmp_path / "teacher"), 2.0
    result = train_from_config(config)
    assert result.lines and "distill" in " ".join(result.lines[-1])
    assert {file.name: file.read_bytes() for file in (tmp_path / "teacher").glob("*.*")} == before
    ours = GrexModel.from_pretrained(tmp_path / "run")
    assert set(ours.saved_state()) == set(GrexModel(ours.config, ours.text_tokenizer).saved_state())
    names = [file.name for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert names and not any("teacher" in name for name in names)


def test_distillations_that_cannot_be_are_refused(tmp_path: Path) -> None:
    def config(*changes: str) -> Any:
        return load_config(None, [*changes])

    for changes, said in (
        (["--loss.distill=0.5"], r"loss\.distill is 0\.5 and train\.teacher None"),
        (["--train.teacher=x"], r"loss\.distill is 0 and train\.teacher x"),
        (["--loss.distill=-1"], r"loss\.distill is -1"),
        (["--loss.distill_temperature=0"], r"distill_temperature is 0"),
        (["--loss.distill=1", f"--train.teacher={tmp_path}"], r"has no config\.yaml"),
    ):
        with pytest.raises(GrexError, match=said):
            check_combinations(config(*changes))
    with pytest.raises(GrexError, match=r"loss\.distill with train\.tasks generate"):
        check_combinations(config("--loss.distill=1", "--train.teacher=x", "--train.tasks=generate", "--model.generator.lm=tiny"))
    with pytest.raises(GrexError, match=r"does not exist|has no"):
        model = model_of("rela")
        Teacher(str(tmp_path / "gone"))(batch_of(model), (64, 64))
