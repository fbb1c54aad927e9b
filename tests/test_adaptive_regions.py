"""ReLA with a number of regions that follows the image: the measure, the grids, losses, and equality with a model of one grid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from made_batch import make_batch
from test_decoder_contract import batch_of, model_of, own_tensors, run

from grex_mllm.config import load_config
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.models.answer import answers
from grex_mllm.models.decoders.rela.adaptive import EDGE, OwnGrids, chosen_sides, edge_share, grid_rows, own_grids
from grex_mllm.models.decoders.rela.config import RelaConfig, RelaLossConfig
from grex_mllm.models.decoders.rela.criterion import RelaCriterion
from grex_mllm.models.decoders.rela.heads import box_start
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.grex_losses import box_score, minimap_cross_entropy, minimap_target, own_minimap_target
from grex_mllm.ops.matching import match
from grex_mllm.training.step import Step
from grex_mllm.types import GroundingOutput

SIDES = [2, 4]


def adaptive(limit: float | None = None) -> GrexModel:
    """A tiny model whose limit lies between the complexities of the images of `batch_of`, so that both grids are there."""
    model = model_of("rela")
    if limit is None:
        shares = edge_share(model.grounding.normalise(batch_of(model).image)).tolist()
        assert shares[0] != shares[1]
        limit = sum(shares) / 2
    config = model.config
    config.model.decoder.region_sides, config.model.decoder.complexity = list(SIDES), [limit]
    again = GrexModel(config, model.text_tokenizer)
    again.load_state_dict(model.state_dict())
    return again.eval()


def test_edges_by_hand() -> None:
    """Six pixels, two rows: 3 pairs below each other and 4 beside each other; the one bright pixel makes 1 and 2 of them edges."""
    image = torch.full((1, 3, 2, 3), 0.5)
    image[0, :, 0, 1] = 0.5 + 2 * EDGE
    assert float(edge_share(image)) == pytest.approx(3 / 7)
    assert edge_share(torch.zeros(1, 3, 4, 4)).tolist() == [0]  # nothing but padding
    padded = torch.nn.functional.pad(image, (0, 3, 0, 2))
    assert float(edge_share(padded)) == pytest.approx(3 / 7)
    small = torch.full((1, 3, 2, 3), 0.5)
    small[0, :, 0, 1] += EDGE / 2
    assert edge_share(small).tolist() == [0]


def test_limits_choose_the_side() -> None:
    image = torch.full((3, 3, 8, 8), 0.5)
    image[1, :, :, 4:] = 2.0  # one vertical edge: 8 of 112 pairs
    image[2] = torch.where(torch.arange(8) % 2 == 0, 0.5, 2.0)  # every pair beside each other: 56 of 112
    assert chosen_sides(image, [4, 8, 16], [0.05, 0.2]).tolist() == [4, 8, 16]


def test_a_coarser_grid_is_the_mean_of_the_finer_one() -> None:
    table = torch.randn(16, 5)
    grids = own_grids(torch.tensor([2, 4]), SIDES)
    found = grid_rows(table, grids)
    assert found.shape == (2, 16, 5) and torch.equal(found[1], table) and not found[0, 4:].any()
    cells = table.unflatten(0, (4, 4))
    for row in range(2):
        for column in range(2):
            mean = cells[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(dim=(0, 1))
            torch.testing.assert_close(found[0, 2 * row + column], mean)
    assert grids.active.sum(dim=1).tolist() == [4, 16]
    few = own_grids(torch.tensor([2]), SIDES)
    assert few.active.shape == (1, 4) and torch.equal(grid_rows(table, few)[0], found[0, :4])
    assert torch.equal(few.box_starts()[0], box_start(2)) and torch.equal(grids.box_starts()[1], box_start(4))
    picture = grids.spread(torch.arange(32.0).unflatten(0, (2, 16)))
    assert picture[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert picture[1].flatten().tolist() == list(range(16, 32))


def test_both_grids_are_there_and_one_image_has_the_answer_of_its_own() -> None:
    model = adaptive()
    output = run(model, batch_of(model))
    assert output.active_regions is not None
    assert set(output.active_regions.sum(dim=1).tolist()) == {4, 16} and output.box_logits is not None
    dead = ~output.active_regions
    assert (output.box_logits[dead] == -1e4).all() and not output.boxes_norm[dead].any() and not output.minimap_logits[dead].any()  # type: ignore[index]


def test_an_image_of_the_largest_grid_has_the_answer_of_the_plain_model() -> None:
    plain, batch = model_of("rela"), batch_of(model_of("rela"))
    with torch.no_grad():
        wanted, found = run(plain, batch), run(adaptive(limit=-1.0), batch)
    for field, value in own_tensors(wanted).items():
        torch.testing.assert_close(own_tensors(found)[field], value, atol=1e-5, rtol=1e-5)
    assert found.active_regions is not None and found.active_regions.all()


def test_an_image_of_a_small_grid_has_the_answer_of_a_small_model() -> None:
    """The same weights, the tables pooled by hand: a model that has never had more regions."""
    model, batch = adaptive(limit=1.0), batch_of(model_of("rela"))
    config = copy.deepcopy(model.config)
    config.model.decoder.region_sides, config.model.decoder.minimap_side = [], 2
    small = GrexModel(config, model.text_tokenizer)
    state = model.state_dict()
    for name in ("region_features", "region_positions"):
        key = f"grounding.decoder.language_part.{name}.weight"
        state[key] = state[key].unflatten(0, (2, 2, 2, 2)).mean(dim=(1, 3)).flatten(0, 1)
    small.load_state_dict(state)
    with torch.no_grad():
        wanted, found = run(small.eval(), batch), run(model, batch)
    for field in ("mask_logits", "no_target_logits", "count_logits"):
        torch.testing.assert_close(getattr(found, field), getattr(wanted, field), atol=1e-5, rtol=1e-5)
    for field in ("boxes_norm", "box_logits", "minimap_logits"):
        torch.testing.assert_close(getattr(found, field)[:, :4], getattr(wanted, field), atol=1e-5, rtol=1e-5)
    ours = RelaCriterion(model.config.model.decoder)(found, batch)
    for name, value in RelaCriterion(config.model.decoder)(wanted, batch).items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5)


def test_batch_equals_single_and_padding_is_not_read() -> None:
    model = adaptive().double()
    batch = batch_of(model)
    with torch.no_grad():
        together = own_tensors(run(model, batch))
        for e in range(len(batch.image_index)):
            image = batch.image[batch.image_index[e]][None]
            alone = own_tensors(model.grounding(image, torch.tensor([0]), batch.text_ids[e : e + 1], batch.text_mask[e : e + 1]))
            for field, value in together.items():
                torch.testing.assert_close(alone[field][0], value[e], rtol=0, atol=1e-8)


def test_gradients_reach_every_region_of_the_table_even_without_an_image_of_its_grid() -> None:
    model = adaptive(limit=1.0).train()
    Step(model, model.config)(batch_of(model))["total"].backward()
    for name in ("region_features", "region_positions"):
        table = getattr(model.grounding.decoder.language_part, name).weight
        assert table.grad is not None and (table.grad.abs().sum(dim=1) > 0).all(), name
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_deep_supervision_saving_and_answers(tmp_path: Path) -> None:
    model = adaptive()
    model.config.model.decoder.loss.deep_supervision = 0.5
    batch = batch_of(model)
    terms = Step(model.train(), model.config)(batch)
    assert terms["ground/deep"] > 0 and all(bool(value.isfinite()) for value in terms.values())
    model.eval().save_pretrained(tmp_path / "m")
    again = GrexModel.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        first, second = run(model, batch), run(again, batch)
    assert torch.equal(first.mask_logits, second.mask_logits)
    model.config.predict.boxes = "threshold"
    geometries = [batch.geometries[i] for i in batch.image_index.tolist()]
    rules, names = model.config.predict, batch.expression_ids
    for result in answers(first, names, geometries, (64, 64), rules):
        assert result.boxes_xyxy is not None and len(result.boxes_xyxy) <= 16 and result.minimap is not None
        assert result.minimap.shape == (4, 4)


def test_an_image_encoder_that_reads_language_chooses_too() -> None:
    swin = ["name=swin", "embed_width=8", "swin_depths=[1,1,1,1]", "swin_heads=[1,1,2,2]", "window=4", "drop_path=0.0", "fusion=pwam"]
    decoder = ["width=16", "num_heads=2", "num_layers=2", "feedforward=16", "minimap_side=4", "region_sides=[2,4]", "complexity=[0.1]"]
    text = ["vocab_size=50", "hidden_size=16", "num_layers=1", "num_heads=2", "intermediate_size=16", "max_positions=16"]
    flags = [f"--model.vision.{item}" for item in swin] + [f"--model.decoder.{item}" for item in decoder]
    flags += [f"--model.text.{item}" for item in text]
    flags += ["--model.pixel_decoder.name=top_down", "--model.pixel_decoder.width=16", "--model.pixel_decoder.mask_width=16"]
    torch.manual_seed(0)
    model = build_grounding(load_config(None, flags).model).eval()
    plain, busy = torch.full((3, 64, 64), 120, dtype=torch.uint8), torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    image, index = torch.stack([plain, busy]), torch.tensor([0, 1, 0, 1, 1])
    ids, mask = torch.randint(1, 50, (5, 6)), torch.ones(5, 6, dtype=torch.int64)
    with torch.no_grad():
        output = model(image, index, ids, mask)
    assert output.active_regions is not None and output.active_regions.sum(dim=1).tolist() == [4, 16, 4, 16, 16]


def test_losses_by_hand_over_grids_of_two_sizes() -> None:
    torch.manual_seed(0)
    masks = torch.rand(2, 8, 8) > 0.5
    active = own_grids(torch.tensor([2, 4]), SIDES).active
    target = own_minimap_target(masks, active, "area")
    assert torch.equal(target[0, :4], minimap_target(masks[:1], 2, "area")[0]) and not target[0, 4:].any()
    assert torch.equal(target[1], minimap_target(masks[1:], 4, "area")[0])
    logits, weights = torch.randn(2, 16, 2), torch.tensor([0.9, 1.1])
    value = up = 0.0
    for e in range(2):
        for q in range(int(active[e].sum())):
            for label, share in enumerate((1 - float(target[e, q]), float(target[e, q]))):
                weight = float(weights[label]) * share
                value -= weight * float(logits[e, q].double().log_softmax(0)[label])
                up += weight
    assert float(minimap_cross_entropy(logits, target, weights, active)) == pytest.approx(value / up, rel=1e-5)
    scores = torch.randn(2, 16).masked_fill(~active, -1e4)
    nothing = match(torch.rand(2, 16, 4), [torch.zeros(0, 4)] * 2)
    wanted = torch.nn.functional.softplus(scores[active]).mean()
    assert float(box_score(scores, nothing, "bce", active)) == pytest.approx(float(wanted), rel=1e-6)


def test_rows_that_are_no_regions_get_no_box() -> None:
    """More targets than regions: all four are paired, none beyond them."""
    gt = torch.rand(6, 4) * 0.3 + 0.2
    active = torch.arange(16)[None] < 4
    boxes = torch.rand(1, 16, 4) * 0.3 + 0.2
    boxes[0, 8:14] = gt  # as near as can be, but no regions
    boxes.requires_grad_()
    output = GroundingOutput(torch.randn(1, 2, 8, 8), no_target_logits=torch.randn(1, 2), count_logits=torch.randn(1, 7))
    output = output._replace(boxes_norm=boxes, box_logits=torch.zeros(1, 16), active_regions=active)
    config = RelaConfig(loss=RelaLossConfig(mask=0.0, minimap=0.0))
    terms = RelaCriterion(config)(output, make_batch(torch.zeros(1, 8, 8) > 0, [gt]))
    terms["box_l1"].backward()
    assert boxes.grad is not None and (boxes.grad.abs().sum(dim=2)[0] > 0).tolist() == [True] * 4 + [False] * 12


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"region_sides": [4, 8]}, "region_sides is .* with minimap_side 10"),
        ({"region_sides": [8, 4, 10]}, "from small to large"),
        ({"region_sides": [4, 10]}, "complexity is .* with 2 region_sides"),
        ({"region_sides": [4, 8, 10], "complexity": [0.3, 0.1]}, "complexity is"),
        ({"region_sides": [4, 8, 10], "ria": "pooled"}, "ria: pooled"),
    ],
)
def test_grids_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    from grex_mllm.models.decoders.rela.network import Rela
    from grex_mllm.types import DecoderInputs

    with pytest.raises(GrexError, match=said):
        Rela(RelaConfig(**changes), DecoderInputs((8, 16, 16, 16), 256, 256, 16))


def test_vlt_rela_has_one_grid() -> None:
    with pytest.raises(GrexError, match=r"region_sides .* with vlt_rela"):
        build_grounding(load_config(None, ["--model.decoder.name=vlt_rela", "--model.decoder.region_sides=[4,10]"]).model)


def test_grids_of_expressions_are_those_of_their_images() -> None:
    grids = own_grids(torch.tensor([2, 4]), SIDES).of(torch.tensor([1, 0, 0]))
    assert isinstance(grids, OwnGrids) and grids.side.tolist() == [4, 2, 2] and grids.active.sum(dim=1).tolist() == [16, 4, 4]
