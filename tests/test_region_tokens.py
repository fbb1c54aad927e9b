"""Region tokens: pooling against hand-made values, geometry, order, and the checks of what a user selected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grex_mllm.errors import GrexError
from grex_mllm.models.generators.region_tokens.comparison import compare
from grex_mllm.models.generators.region_tokens.tokens import GEOMETRY_WIDTH, RegionTokens, geometry_code, interval_weights
from grex_mllm.ops.selection import boxes_to_masks, mask_boxes, selection_masks


def test_interval_weights_by_hand() -> None:
    weights = interval_weights(torch.tensor([0.0, 1.0]), torch.tensor([4.0, 2.0]), 2, 4)
    torch.testing.assert_close(weights[0], torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))
    torch.testing.assert_close(weights[1], torch.tensor([[0, 1.0, 0, 0], [0, 1.0, 0, 0]]))


def test_boxes_and_masks_are_inverse() -> None:
    boxes = torch.tensor([[3.0, 2, 7, 9], [0, 0, 1, 1], [0, 0, 12, 10]])
    assert torch.equal(mask_boxes(boxes_to_masks(boxes, 10, 12)), boxes.long())
    thin = boxes_to_masks(torch.tensor([[3.2, 4.1, 3.3, 4.2], [11.9, 9.9, 12.0, 10.0]]), 10, 12)
    assert thin.flatten(1).sum(1).tolist() == [1, 1] and thin[0, 4, 3] and thin[1, 9, 11]
    assert mask_boxes(torch.zeros(1, 4, 4, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


def test_geometry_code_has_its_width_and_is_finite_for_a_point() -> None:
    code = geometry_code(torch.tensor([[0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1]]), torch.tensor([0.0, 1.0]))
    assert code.shape == (2, GEOMETRY_WIDTH) and bool(code.isfinite().all())
    torch.testing.assert_close(code[1, :7], torch.tensor([0.5, 0.5, 1, 1, 1, 0, 1.0]))


def pooled_inputs(module: RegionTokens, *args: object, **kwargs: object) -> torch.Tensor:
    """What the projection gets for objects."""
    seen = []
    hook = module.project.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    module(*args, **kwargs)
    hook.remove()
    return seen[0]


def test_pooling_is_the_mean_under_the_mask() -> None:
    """An object on a constant patch gets that constant; one of a single pixel gets its cell at every scale."""
    module = RegionTokens([2, 2], 8, hidden=8, image_grid=0, shape_side=2)
    module.norms = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    fine, coarse = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 2, 2)
    fine[:, :, 2:4, 4:6] = 5.0
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 4:8, 8:12] = True
    masks[1, 15, 0] = True
    got = pooled_inputs(module, [fine, coarse], [masks])[0]
    torch.testing.assert_close(got[0, :2], torch.tensor([5.0, 5.0]))
    torch.testing.assert_close(got[0, 2:4], coarse[0, :, 0, 1])
    torch.testing.assert_close(got[1, :2], fine[0, :, 7, 0])
    torch.testing.assert_close(got[1, 2:4], coarse[0, :, 1, 0])
    torch.testing.assert_close(got[:, -4:], torch.ones(2, 4))  # both masks fill their boxes


def test_padding_of_the_image_changes_nothing() -> None:
    """The unpadded part decides: geometry and image tokens are the same with 16 more rows of anything."""
    module = RegionTokens([4], 8, hidden=8, image_grid=2)
    feature = torch.randn(1, 4, 8, 8)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, 3:9, 4:8] = True
    mask[1, 20:30, 11:30] = True
    small = module([feature], [mask])
    tall = module(
        [torch.cat([feature, torch.randn(1, 4, 4, 8)], 2)], [torch.nn.functional.pad(mask, (0, 0, 0, 16))], torch.tensor([[32, 32]])
    )
    torch.testing.assert_close(small.tokens, tall.tokens)
    torch.testing.assert_close(small.image, tall.image)


def test_distractors_then_targets_left_to_right_then_padding() -> None:
    module = RegionTokens([4], 8, hidden=8, image_grid=0, max_distractors=1, shape_side=0)
    mask = torch.zeros(4, 16, 16, dtype=torch.bool)
    for i, x in enumerate((12, 0, 8, 4)):
        mask[i, 2 : 4 + i, x : x + 3] = True
    objects = module([torch.randn(2, 4, 8, 8)], [mask, mask[:1]])
    assert objects.order[0].tolist() == [1, 3, 2, 0]
    member = torch.tensor([[True, False, True, False], [True, False, False, False]])
    tokens, keep, summary, said = module.select(objects, torch.tensor([0, 1]), member)
    assert keep.tolist() == [[True, True, True], [True, False, False]]
    expected = [objects.tokens[0, 3] + module.kind.weight[1]]  # the larger one of the two that are not selected
    expected += [objects.tokens[0, 2] + module.kind.weight[2], objects.tokens[0, 0] + module.kind.weight[2]]
    mean = (expected[1] + expected[2]) / 2
    torch.testing.assert_close(summary[0], module.summary_to_lm(mean + module.count.weight[2]))
    torch.testing.assert_close(tokens[0], module.to_lm(torch.stack(expected)))
    assert not tokens[1, 1:].any() and said is None


def test_targets_are_compared_with_the_other_objects() -> None:
    """Two red circles are selected among a red circle, a red square and a blue circle."""
    red_circle, red_square, blue_circle = [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]
    words = torch.tensor([[red_circle, red_circle, red_circle, red_square, blue_circle]])
    member = torch.tensor([[True, True, False, False, False], [True, False, False, True, False]])
    objects, sets = compare(words, [2, 2], torch.tensor([0, 0]), member, ~member)
    torch.testing.assert_close(objects[0], torch.tensor([[0, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(sets[0], torch.tensor([1.0, 1.0, 1.0]), atol=1e-3, rtol=0)
    # a red circle and the red square share the colour alone, which two more objects have
    torch.testing.assert_close(objects[1, :, 0], torch.tensor([0, 1, 1, 0, 0]).float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(sets[1], torch.tensor([1.0, 0.0, 2.0]), atol=1e-3, rtol=0)
    hidden = compare(words, [2, 2], torch.tensor([0]), member[:1], torch.zeros(1, 5, dtype=torch.bool))
    assert not hidden[0][:, :, :2].any() and hidden[1][0, 2] == 0


def test_image_without_objects_beside_one_with_objects() -> None:
    module = RegionTokens([4], 8, hidden=8)
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    objects = module([torch.randn(2, 4, 8, 8)], [mask[:0], mask])
    assert objects.present.tolist() == [[False], [True]] and bool(objects.tokens.isfinite().all())


MASK = np.ones((4, 6), bool)


@pytest.mark.parametrize(
    ("masks", "boxes", "message"),
    [
        (None, None, "neither"),
        ([MASK], [[0, 0, 1, 1]], "both given"),
        ([], None, "empty object set"),
        (None, [], "empty object set"),
        ([MASK, MASK.T], None, "mask 1 is 6x4"),
        ([MASK, ~MASK], None, "mask 1 has no pixel"),
        (None, [[0, 0, 7, 2]], "outside the image"),
        (None, [[-1, 0, 3, 2]], "outside the image"),
        (None, [[3, 1, 3, 2]], "no area"),
        (None, [[0, 0, 1]], "four finite numbers"),
        (None, [[0, 0, 1, float("nan")]], "four finite numbers"),
    ],
)
def test_faulty_selections(masks: list | None, boxes: list | None, message: str) -> None:
    with pytest.raises(GrexError, match=message):
        selection_masks(4, 6, masks, boxes)


def test_selection_of_masks_and_boxes() -> None:
    assert selection_masks(4, 6, [MASK, MASK.astype(np.uint8) * 255]).all()
    assert mask_boxes(selection_masks(4, 6, boxes_xyxy=[[1, 2, 5, 4]])).tolist() == [[1, 2, 5, 4]]


def test_selection_of_stacked_masks_and_boxes() -> None:
    """One array of several masks or boxes, as segmenters and detectors give them."""
    masks = np.stack([MASK, MASK & (np.arange(6) < 2)])
    for stacked in (masks, torch.from_numpy(masks)):
        assert np.array_equal(selection_masks(4, 6, stacked).numpy(), masks)
    boxes = np.array([[1.0, 2, 5, 4], [0, 0, 1, 1]])
    for stacked in (boxes, torch.from_numpy(boxes)):
        assert mask_boxes(selection_masks(4, 6, boxes_xyxy=stacked)).tolist() == boxes.tolist()
