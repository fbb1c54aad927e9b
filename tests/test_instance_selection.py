"""The decoder `instance_selection` and its losses."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config, tiny_model

from grex_mllm.data.collate import collate
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.instance_selection.config import InstanceSelectionConfig
from grex_mllm.models.decoders.instance_selection.criterion import InstanceSelectionCriterion, heat_terms, region_terms
from grex_mllm.models.decoders.instance_selection.network import (
    LanguageLayer,
    answer_by_count,
    duplicates,
    largest_overlap,
    union_probability,
)
from grex_mllm.models.decoders.instance_selection.regions import OUTSIDE_LOGIT, PAIR_WIDTH, box_area, pair_geometry, region_masks
from grex_mllm.types import Batch


def batch_of(model, num=3, expressions=4, no_target_share=0.22) -> Batch:
    data = SyntheticDataset(SyntheticConfig(image_size=64, no_target_share=no_target_share), "train", 100, expressions)
    return collate([data[i] for i in range(num)], model.encode_text, image_size=64)


def run(model, batch):
    features = model.grounding.encode_image(batch.image)
    return model.grounding.ground(features, batch.image_index, batch.text_ids, batch.text_mask)


def test_shapes_and_answer_is_union_of_selected_regions():
    model = tiny_model()
    batch = batch_of(model)
    with torch.no_grad():
        out = run(model, batch)
    num = len(batch.expression_ids)
    assert out.mask_logits.shape == (num, 2, 64, 64)
    assert out.minimap_logits.shape == (num, 8, 2) and out.minimap_prob.shape == (num, 6, 6)
    assert out.boxes_norm.shape == (num, 8, 4) and out.count_logits.shape == (num, 7)
    regions = out.extra.regions
    masks = regions.masks() > 0
    sizes = {int((row > 0).sum()) for row in out.box_logits}
    assert max(sizes) > 1 and out.mask_logits[:, 1].gt(out.mask_logits[:, 0]).any()  # unions of several, and not of nothing
    for e in range(num):
        chosen = masks[batch.image_index[e]][out.box_logits[e] > 0]
        union = chosen.any(0) if len(chosen) else torch.zeros(64, 64, dtype=torch.bool)
        assert torch.equal(out.mask_logits[e, 1] - out.mask_logits[e, 0] > 0, union)


def test_the_answer_has_the_predicted_number_of_regions():
    """By hand: two wanted, one above; two wanted, three above; none wanted but a target; no target; more than there are regions; many."""
    logits = torch.tensor([[2.0, -1.0, -3.0], [2.0, 1.0, 0.5], *[[-2.0, -1.0, -3.0]] * 3, [1.0, 0.5, -3.0]])
    counts = torch.nn.functional.one_hot(torch.tensor([2, 2, 0, 2, 5, 6]), 7).float()
    no_target = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    moved = answer_by_count(logits, counts, no_target)
    assert [(row > 0).tolist() for row in moved] == [
        [True, True, False], [True, True, False], [False, True, False], [False, False, False], [True, True, True], [True, True, True]
    ]  # fmt: skip
    assert torch.equal(moved[3], logits[3]) and torch.equal(moved[0, [0, 2]], logits[0, [0, 2]])
    alone = answer_by_count(logits, None, no_target)
    assert [(row > 0).sum().item() for row in alone] == [1, 3, 1, 0, 1, 2]


def test_duplicates_are_the_less_sure_of_two_regions_on_one_object():
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1], [0.52, 0.5, 0.4, 0.4]]])
    assert duplicates(boxes, torch.tensor([[0.1, 0.9, 0.0, 0.5]])).tolist() == [[True, False, False, True]]
    assert duplicates(boxes[:, :1], torch.tensor([[0.1]])).tolist() == [[False]]


def test_answers_by_count_are_the_best_masks_where_a_target_is_predicted():
    model = tiny_model()
    batch = batch_of(model)
    with torch.no_grad():
        plain = run(model, batch)
        model.config.model.decoder.answer = "count"
        out = run(model, batch)
    regions = out.extra.regions
    repeated = duplicates(regions.boxes_norm[-1], regions.objectness[-1])[batch.image_index]
    assert torch.equal(out.box_logits[~repeated], plain.box_logits[~repeated]) and (out.box_logits[repeated] == OUTSIDE_LOGIT).all()
    targeted = out.no_target_logits.argmax(-1) == 0
    assert targeted.any()
    chosen = answer_by_count(out.box_logits, out.count_logits, out.no_target_logits) > 0
    masks = regions.masks() > 0
    for e in range(len(batch.expression_ids)):
        found = out.mask_logits[e, 1] > out.mask_logits[e, 0]
        assert torch.equal(found, masks[batch.image_index[e]][chosen[e]].any(0) if chosen[e].any() else torch.zeros_like(found))
        count = int(out.count_logits[e].argmax())
        assert not targeted[e] or count > 5 or int(chosen[e].sum()) == min(max(count, 1), 8)
    with pytest.raises(GrexError, match='answer is "most"; expected threshold or count or overlap'):
        tiny_model(model__decoder__answer="most")


def test_the_union_of_uncertain_regions_by_hand():
    """Two regions of two pixels, both targets with a half: a pixel of both is of the answer with three quarters."""
    masks = torch.tensor([[[1.0, 0.8]], [[1.0, 0.0]]])
    torch.testing.assert_close(union_probability(masks, torch.tensor([0.5, 0.5])), torch.tensor([[0.75, 0.4]]))
    torch.testing.assert_close(union_probability(masks, torch.tensor([1.0, 0.0])), masks[0])


def test_the_largest_expected_overlap_against_trying_every_number_of_pixels():
    torch.manual_seed(0)
    chances = torch.cat([torch.rand(6, 5, 7) ** 3, torch.rand(2, 5, 7) * 0.01])
    no_target = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] + [[1.0, 0.0]])
    found = largest_overlap(chances, no_target) > 0
    for row in range(len(chances)):
        order = chances[row].flatten().argsort(descending=True)
        values = chances[row].flatten()[order].tolist()
        expected = [sum(values[:n]) / (n + sum(values[n:])) for n in range(1, 36)]
        number = 1 + expected.index(max(expected))
        wanted = torch.zeros(35, dtype=torch.bool)
        wanted[order[:number]] = True
        if no_target[row, 1] > 0:
            wanted = chances[row].flatten() > 0.5
        assert torch.equal(found[row].flatten(), wanted), row
    assert found[7].any() and not found[6].all()
    sure = largest_overlap(torch.tensor([[[1.0, 0.0, 1.0]]]), no_target[:1])
    assert (sure > 0).tolist() == [[[True, False, True]]] and sure.isfinite().all()
    assert (largest_overlap(torch.ones(1, 2, 2), no_target[:1]) > 0).all()


def test_answers_of_the_largest_overlap_weigh_all_regions_and_leave_boxes_and_counts_as_by_count():
    model = tiny_model()
    batch = batch_of(model)
    outs = {}
    with torch.no_grad():
        for answer in ("count", "overlap"):
            model.config.model.decoder.answer = answer
            outs[answer] = run(model, batch)
    count, out = outs["count"], outs["overlap"]
    assert torch.equal(out.box_logits, count.box_logits) and torch.equal(out.count_logits, count.count_logits)
    masks = out.extra.regions.masks().sigmoid()
    for e, b in enumerate(batch.image_index.tolist()):
        none = torch.ones_like(masks[b][0])
        for mask, logit in zip(masks[b], out.box_logits[e], strict=True):
            none *= 1 - mask * logit.sigmoid()
        wanted = largest_overlap(1 - none[None], out.no_target_logits[e : e + 1])[0]
        torch.testing.assert_close(out.mask_logits[e, 1] - out.mask_logits[e, 0], wanted, atol=1e-3, rtol=1e-4)
        assert out.no_target_logits[e].argmax() == 1 or (wanted > 0).any()
    assert not torch.equal(out.mask_logits, count.mask_logits)
    model.train()
    assert run(model, batch).mask_logits.numel() == 0


def test_region_masks_end_at_their_boxes():
    boxes = torch.tensor([[[0.5, 0.5, 0.25, 0.25]]])
    logits = region_masks(torch.ones(1, 1, 2), boxes, torch.ones(1, 2, 32, 32))
    inside = box_area(boxes, 32, 32)[0, 0]
    assert (logits[0, 0][inside] == 2.0).all() and (logits[0, 0][~inside] == OUTSIDE_LOGIT).all()
    rows = inside.any(1).nonzero().flatten()
    assert (int(rows.min()), int(rows.max())) == (10, 21)  # 16 -+ (4 + 1 for the margin + 1 pixel), pixel centres at .5


def test_geometry_tells_left_from_right():
    boxes = torch.tensor([[[0.2, 0.5, 0.1, 0.1], [0.8, 0.5, 0.2, 0.2]]])
    geometry = pair_geometry(boxes)[0]
    assert geometry[0, 1, 0] == pytest.approx(1.2) and geometry[1, 0, 0] == pytest.approx(-1.2)
    assert geometry[0, 0, -1] == 1 and geometry[0, 1, -1] == 0
    assert geometry[0, 1, 7] == pytest.approx(2 * 0.6931, abs=1e-3)


def test_batch_equals_single_and_text_padding_is_unread():
    model = tiny_model().double()
    model.grounding.pixel_mean.data = model.grounding.pixel_mean.double()
    batch = batch_of(model)
    with torch.no_grad():
        together = run(model, batch)
        for e in range(len(batch.expression_ids)):
            b = int(batch.image_index[e])
            length = int(batch.text_mask[e].sum())
            features = model.grounding.encode_image(batch.image[b : b + 1])
            alone = model.grounding.ground(
                features, torch.tensor([0]), batch.text_ids[e : e + 1, :length], batch.text_mask[e : e + 1, :length]
            )
            for name in ("mask_logits", "no_target_logits", "box_logits", "count_logits"):
                torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[e], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.22, 0.95])
def test_losses_are_finite_and_reach_every_weight(share):
    model = tiny_model(model__decoder__attribute_classes="{shape: 7}").train()
    loss = InstanceSelectionCriterion(InstanceSelectionConfig())
    batch = batch_of(model, no_target_share=share)
    terms = loss(run(model, batch), batch)
    assert set(terms) == {
        "heat", "cell_box_l1", "cell_box_giou", "objectness", "box_l1", "box_giou", "mask_bce", "mask_dice", "attribute_shape", "target",
        "no_target", "count", "total",
    }  # fmt: skip
    assert all(torch.isfinite(v) for v in terms.values())
    terms["total"].backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    # the bias of BERT's keys adds the same number to all logits of a softmax
    assert silent == ["grounding.text.bert.encoder.layer.0.attention.self.key.bias"]


def test_total_is_the_weighted_sum_and_a_zero_weight_counts_nothing():
    model = tiny_model().train()
    batch = batch_of(model)
    config = InstanceSelectionConfig()
    out = run(model, batch)
    terms = InstanceSelectionCriterion(config)(out, batch)
    weights = vars(config.loss)
    expected, weights_of_dice = sum(weights[n] * v for n, v in terms.items() if n != "total"), config.loss.mask_dice
    torch.testing.assert_close(terms["total"], expected)
    config.loss.mask_dice = 0.0
    assert weights_of_dice > 0 and terms["mask_dice"] > 0
    torch.testing.assert_close(InstanceSelectionCriterion(config)(out, batch)["total"], expected - weights_of_dice * terms["mask_dice"])


def test_images_without_objects_give_finite_losses():
    model = tiny_model().train()
    batch = batch_of(model, num=2, no_target_share=0.9)
    batch.instance_boxes_norm = [torch.zeros(0, 4) for _ in range(2)]
    batch.instance_masks = [torch.zeros(0, 64, 64, dtype=torch.bool) for _ in range(2)]
    batch.target_index = [torch.zeros(0, dtype=torch.int64) for _ in batch.target_index]
    batch.instance_attributes = None
    terms = InstanceSelectionCriterion(InstanceSelectionConfig())(run(model, batch), batch)
    assert all(torch.isfinite(v) for v in terms.values())
    nothing = {"cell_box_l1", "cell_box_giou", "box_l1", "box_giou", "mask_bce", "mask_dice"}
    assert {n for n, v in terms.items() if v == 0} == nothing
    terms["total"].backward()
    reached = [p.grad for p in model.parameters() if p.grad is not None and p.grad.any()]
    assert len(reached) > 100 and all(bool(g.isfinite().all()) for g in reached)


def with_boxes(regions, wanted: list[torch.Tensor]) -> None:
    """Put the true boxes into the first regions of every layer."""
    for layer, boxes in enumerate(regions.boxes_norm):
        boxes = torch.full_like(boxes.detach(), 0.02)
        for b, true in enumerate(wanted):
            boxes[b, : len(true)] = true[: boxes.shape[1]]
        regions.boxes_norm[layer] = boxes
        regions.objectness[layer] = torch.zeros_like(regions.objectness[layer])


def test_perfect_regions_have_no_box_loss_and_stand_for_their_instances():
    model = tiny_model(model__decoder__kept_regions=14).train()
    batch = batch_of(model)
    regions = run(model, batch).extra.regions
    with_boxes(regions, batch.instance_boxes_norm)
    terms, owner = region_terms(regions, batch)
    assert terms["box_l1"] < 1e-6 and terms["box_giou"] < 1e-5
    for b, boxes in enumerate(batch.instance_boxes_norm):
        assert owner[b].tolist() == [*range(len(boxes)), *[-1] * (14 - len(boxes))]


def test_region_far_from_its_match_stands_for_nothing():
    model = tiny_model().train()
    batch = batch_of(model, num=1)
    regions = run(model, batch).extra.regions
    with_boxes(regions, [torch.zeros(0, 4)])
    batch.instance_boxes_norm = [torch.tensor([[0.8, 0.8, 0.2, 0.2]])]
    batch.instance_masks = [batch.instance_masks[0][:1]]
    _, owner = region_terms(regions, batch)
    assert (owner == -1).all()


def test_heat_is_least_with_a_peak_on_every_centre():
    model = tiny_model().train()
    batch = batch_of(model, num=1)
    regions = run(model, batch).extra.regions
    height, width = regions.heat_size
    boxes = batch.instance_boxes_norm[0]
    cell = (boxes[:, 1] * height).long() * width + (boxes[:, 0] * width).long()
    right = torch.full_like(regions.heat_logits, -8.0).detach()
    right[0, cell] = 8.0
    regions = regions._replace(heat_logits=right)
    good = heat_terms(regions, batch)["heat"]
    regions = regions._replace(heat_logits=right.roll(width * (height // 2) + width // 2, dims=1))
    assert good < 0.01 < heat_terms(regions, batch)["heat"]
    regions = regions._replace(cell_boxes_norm=boxes[0].expand_as(regions.cell_boxes_norm).clone())
    batch.instance_boxes_norm = [boxes[:1]]
    assert heat_terms(regions, batch)["cell_box_l1"] < 1e-6


def test_configuration_without_attributes_has_no_attribute_heads():
    assert len(tiny_model().grounding.decoder.image_part.attributes) == 0
    assert tiny_config(model__decoder__attribute_classes="{shape: 7}").model.decoder.attribute_classes == {"shape": 7}


def test_a_region_that_is_no_object_takes_next_to_no_part_in_relations():
    torch.manual_seed(0)
    layer = LanguageLayer(16, 4, 32).eval()
    x, geometry = torch.randn(2, 4, 16), torch.randn(2, 4, 4, PAIR_WIDTH)
    text = torch.randn(2, 3, 16), torch.ones(2, 1, 1, 3, dtype=torch.bool), torch.randn(2, 16)
    other = x.clone()
    other[:, 3] = torch.randn(2, 16)

    def moved(real: torch.Tensor) -> float:
        with torch.no_grad():
            return float((layer(x, geometry, real, *text) - layer(other, geometry, real, *text))[:, :3].abs().max())

    object_there, nothing_there = torch.ones(2, 4), torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(2, 4)
    assert moved(object_there) > 0.01 and moved(nothing_there) < 0.1 * moved(object_there)


def test_the_language_half_reads_what_the_attribute_heads_say():
    model = tiny_model(model__decoder__attribute_classes='{"shape": 7, "colour": 6}')
    assert model.grounding.decoder.language_part.known.weight.shape[1] == 1 + 7 + 6
    batch = batch_of(model)
    with torch.no_grad():
        before = run(model, batch).box_logits
        model.grounding.decoder.image_part.attributes["colour"].bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0]))
        after = run(model, batch).box_logits
    assert (before - after).abs().max() > 1e-3
