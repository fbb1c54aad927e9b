"""ISFP: every equation of chapter 3 against a direct transcription, values and gradients; the readings that the thesis leaves open."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_batch import make_batch
from tiny import tiny_config
from torch import Tensor

from grex_mllm.config import load_config
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.models.decoders.isfp import Config, Criterion, Decoder
from grex_mllm.models.decoders.isfp.config import IsfpLossConfig
from grex_mllm.models.decoders.isfp.criterion import identification, refinement, segmentation, target_cells
from grex_mllm.models.decoders.isfp.network import IsfpImages, LanguagePart, Refinement
from grex_mllm.models.decoders.isfp.propagation import Propagation
from grex_mllm.models.decoders.isfp.truth import cells_of_centres, centres, owners
from grex_mllm.models.grounding import GroundingModel
from grex_mllm.training.combinations import check_combinations
from grex_mllm.types import Batch, DecoderInputs, TextFeatures

SIDE, WIDTH = 4, 6
STEPS = {"DR": (1, 1), "UL": (-1, -1), "DL": (1, -1), "UR": (-1, 1)}
PATHS = (("DR", "UL"), ("UL", "DR"), ("DL", "UR"), ("UR", "DL"))


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


def one_pass(p: list[list[Tensor]], w1: Tensor, w2: Tensor, alpha: float, direction: str) -> list[list[Tensor]]:
    """Equation 3.2, cell by cell in the order of the direction."""
    down, right = STEPS[direction]
    side = len(p)
    rows, columns = list(range(side))[::down], list(range(side))[::right]
    states: dict[tuple[int, int], Tensor] = {}
    for i in rows:
        for j in columns:
            incoming = torch.zeros_like(p[0][0])
            for m, n in ((i - down, j), (i, j - right), (i - down, j - right)):
                if (m, n) in states:
                    incoming = incoming + states[m, n]
            states[i, j] = leaky(w1 @ p[i][j] + alpha * (w2 @ incoming))
    return [[states[i, j] for j in range(side)] for i in range(side)]


def brute_force(net: Propagation, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for e in range(len(x)):
        for path, directions in enumerate(PATHS):
            grid = [[x[e, i * SIDE + j] for j in range(SIDE)] for i in range(SIDE)]
            for number, direction in enumerate(directions):
                grid = one_pass(grid, net.input_weight[number, path], net.state_weight[number, path], net.alpha, direction)
            total = total.index_add(0, torch.tensor([e]), torch.stack([cell for row in grid for cell in row])[None])
    return total


def test_propagation_equals_a_loop_over_cells_with_gradients() -> None:
    torch.manual_seed(0)
    net = Propagation(WIDTH, SIDE, 0.3).double()
    x = torch.randn(2, SIDE * SIDE, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, SIDE * SIDE, WIDTH, dtype=torch.float64)
    found, expected = net(x), brute_force(net, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    variables = [x, net.input_weight, net.state_weight]
    ours = torch.autograd.grad((found * weight).sum(), variables)
    theirs = torch.autograd.grad((expected * weight).sum(), variables)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert b.abs().max() > 0


def test_equation_3_3_is_the_second_cell_of_the_diagonal() -> None:
    """F_11 = act(W_1 p_11 + alpha W_2 (F_01 + F_10 + F_00)), all three incoming states by hand."""
    torch.manual_seed(1)
    net = Propagation(3, 2, 0.25).double()
    p = torch.randn(4, 3, dtype=torch.float64)
    w1, w2 = net.input_weight[0, 0], net.state_weight[0, 0]
    f00 = leaky(w1 @ p[0])
    f01, f10 = leaky(w1 @ p[1] + 0.25 * w2 @ f00), leaky(w1 @ p[2] + 0.25 * w2 @ f00)
    f11 = leaky(w1 @ p[3] + 0.25 * w2 @ (f01 + f10 + f00))
    grid = p.view(1, 1, 2, 2, 3).expand(4, 1, 2, 2, 3)
    torch.testing.assert_close(net._pass(grid, 0)[0, 0].flatten(0, 1), torch.stack([f00, f01, f10, f11]), rtol=0, atol=1e-12)


def test_without_state_weights_a_cell_reads_itself_alone_and_with_them_an_impulse_reaches_all() -> None:
    torch.manual_seed(0)
    net = Propagation(WIDTH, SIDE, 0.3).double()
    x = torch.zeros(1, SIDE * SIDE, WIDTH, dtype=torch.float64)
    x[0, 0] = 1.0
    assert bool((net(x)[0].abs().sum(dim=-1) > 1e-6).all())
    torch.nn.init.zeros_(net.state_weight)
    assert bool((net(x)[0, 1:] == 0).all()) and bool((net(x)[0, 0] != 0).any())


def test_a_flipped_grid_takes_the_opposite_direction() -> None:
    """DR on a flipped map is UL flipped: with the paths' weights exchanged, the sum is the flipped sum."""
    torch.manual_seed(0)
    net, other = Propagation(WIDTH, SIDE, 0.3).double(), Propagation(WIDTH, SIDE, 0.3).double()
    with torch.no_grad():
        other.input_weight.copy_(net.input_weight[:, [1, 0, 3, 2]])
        other.state_weight.copy_(net.state_weight[:, [1, 0, 3, 2]])
    x = torch.randn(1, SIDE * SIDE, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(other(x.flip(1)).flip(1), net(x), rtol=0, atol=1e-12)


def test_bfloat16_and_an_expression_alone() -> None:
    torch.manual_seed(0)
    net = Propagation(16, 5, 0.3)
    x = torch.randn(3, 25, 16)
    exact = net(x)
    torch.testing.assert_close(net(x[1:2]), exact[1:2], rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert (net(x).float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def small(**changes: Any) -> Config:
    sizes: dict[str, Any] = {"width": WIDTH, "segmentation_width": 4, "minimap_side": SIDE, "aspp_rates": [1], "refinement_width": 4}
    return Config(**sizes | changes)


def test_fusion_is_equation_3_1() -> None:
    """f = (f_v W_v) * (F_t W_t) at every position of every level, each with its own W_v."""
    torch.manual_seed(0)
    decoder = Decoder(small(), DecoderInputs((4, 4, 4, 4), 5, 5, 7)).double()
    levels = [torch.randn(2, 5, s, s, dtype=torch.float64) for s in (2, 4, 8)]
    text = TextFeatures(torch.randn(3, 2, 7, dtype=torch.float64), torch.ones(3, 2, dtype=torch.int64))
    index = torch.tensor([1, 0, 1])
    from grex_mllm.types import PixelFeatures

    images = decoder.image_part([], PixelFeatures(levels[-1], levels), torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    seen: list[list[Tensor]] = []
    part: LanguagePart = decoder.language_part
    part.segmentation.register_forward_pre_hook(lambda _, given: seen.append(list(given[0])))
    part(images, index, text)
    for number, level in enumerate(levels):
        w_v, w_t = decoder.image_part.project[number].weight[:, :, 0, 0], part.sentence.weight
        for e in range(3):
            for i in range(level.shape[-2]):
                for j in range(level.shape[-1]):
                    expected = (w_v @ level[index[e], :, i, j]) * (w_t @ text.tokens[e, 0])
                    torch.testing.assert_close(seen[0][number][e, :, i, j], expected, rtol=0, atol=1e-12)


def square(top: int, left: int, size: int = 8, side: int = 64) -> Tensor:
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[top : top + size, left : left + size] = True
    return mask


def batch_of(instances: list[Tensor], targets: list[list[int]]) -> Batch:
    """One image whose expressions mean some of its instances."""
    union = torch.stack([torch.stack([instances[t] for t in own]).any(0) if own else torch.zeros_like(instances[0]) for own in targets])
    batch = make_batch(union, [torch.zeros(len(own), 4) for own in targets])
    batch.image = batch.image[:1]
    batch.image_index = torch.zeros(len(targets), dtype=torch.int64)
    batch.target_index = [torch.tensor(own, dtype=torch.int64) for own in targets]
    batch.instance_masks = [torch.stack(instances)]
    batch.instance_boxes_norm = [torch.full((len(instances), 4), 0.5)]
    return batch


def test_positive_cells_are_the_centre_and_its_neighbours() -> None:
    """By hand on a 4 x 4 grid over 64 pixels: the middle, a corner (clipped to four cells), and a centre on a border of cells."""
    assert centres(torch.stack([square(24, 40), square(0, 0)])).tolist() == [[28 / 64, 44 / 64], [4 / 64, 4 / 64]]
    middle = owners(torch.tensor([[0.4, 0.7]]), 4).view(4, 4)
    assert (middle >= 0).int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert (owners(torch.tensor([[0.01, 0.01]]), 4).view(4, 4) >= 0).sum() == 4
    assert cells_of_centres(square(28, 28)[None], 4).tolist() == [2 * 4 + 2]  # centre 32 = the border of rows 1 and 2
    two = owners(torch.tensor([[0.1, 0.1], [0.1, 0.4]]), 4).view(4, 4)  # cells 0 and 1 of the first row
    assert two[0].tolist() == [0, 1, 1, -1] and two[1].tolist() == [0, 1, 1, -1] and bool((two[2:] == -1).all())
    assert bool((owners(torch.zeros(0, 2), 4) == -1).all())
    empty = centres(torch.zeros(1, 8, 8, dtype=torch.bool), torch.tensor([[0.25, 0.75]]))
    assert empty.tolist() == [[0.25, 0.75]]


def bce(z: float, t: float) -> float:
    q = 1 / (1 + math.exp(-z))
    return -(t * math.log(q) + (1 - t) * math.log(1 - q))


def test_losses_are_equation_3_4_and_negative_channels_teach_nothing() -> None:
    torch.manual_seed(0)
    instances = [square(4, 4, 16), square(40, 40, 16)]
    batch = batch_of(instances, [[0], [0, 1], []])
    owner = target_cells(batch, SIDE)
    y = torch.randn(3, SIDE**2, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(3, SIDE**2, 8, 8, dtype=torch.float64, requires_grad=True)
    expected_ide = sum(bce(y[e, c].item(), float(owner[e, c] >= 0)) for e in range(3) for c in range(16)) / 48
    assert identification(y, owner).item() == pytest.approx(expected_ide, abs=1e-6)
    total, number = 0.0, 0
    for e in range(3):
        for c in range(16):
            if owner[e, c] < 0:
                continue
            truth = instances[batch.target_index[e][int(owner[e, c])]]
            for i in range(8):
                for j in range(8):
                    share = float(truth[8 * i : 8 * i + 8, 8 * j : 8 * j + 8].float().mean())
                    total, number = total + bce(masks[e, c, i, j].item(), share), number + 1
    loss = segmentation(masks, owner, batch)
    assert loss.item() == pytest.approx(total / number, abs=1e-6)
    loss.backward()
    assert masks.grad is not None
    assert bool((masks.grad[owner < 0] == 0).all()) and bool((masks.grad[owner >= 0].abs().amax(dim=(1, 2)) > 0).all())
    nothing = segmentation(masks, target_cells(batch_of(instances, [[], [], []]), SIDE), batch_of(instances, [[], [], []]))
    assert nothing.item() == 0 and nothing.requires_grad


def test_refinement_learns_only_above_theta() -> None:
    """An IoU of exactly theta closes the gate; one pixel more opens it."""
    truth = torch.zeros(1, 4, 4, dtype=torch.bool)
    truth[0, 0] = True
    coarse = torch.full((1, 4, 4), -1.0)
    coarse[0, 0, :2] = 1.0  # IoU 2 / 4
    final = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert refinement(final, coarse, truth, 0.5).item() == 0
    expected = sum(bce((final[0, 1, i, j] - final[0, 0, i, j]).item(), float(truth[0, i, j])) for i in range(4) for j in range(4)) / 16
    assert refinement(final, coarse, truth, 0.49).item() == pytest.approx(expected, abs=1e-6)
    assert refinement(final, coarse, torch.zeros_like(truth), 0.0).item() == 0  # no target


def test_the_total_is_the_weighted_sum() -> None:
    config = small(loss=IsfpLossConfig(identification=2.0, segmentation=3.0, refinement=5.0, least_iou=-1.0))
    torch.manual_seed(0)
    model, batch = isfp_model(config), batch_of([square(4, 4, 16), square(40, 40, 16)], [[0], [1]])
    terms = Criterion(config)(forward(model, batch), batch)
    weights = {"identification": 2.0, "segmentation": 3.0, "refinement": 5.0, "no_target": 0.2, "count": 1.0, "box_l1": 5.0}
    weights |= {"box_giou": 5.0, "box_score": 2.0}
    assert set(terms) == {*weights, "total"}
    assert float(terms["total"]) == pytest.approx(sum(weights[name] * float(terms[name]) for name in weights), rel=1e-5)


def isfp_model(config: Config) -> GroundingModel:
    whole = tiny_config(model__pixel_decoder__name="fpn_levels").model
    whole.decoder = config
    return build_grounding(whole)


def forward(model: GroundingModel, batch: Batch) -> Any:
    num = len(batch.image_index)
    ids, mask = torch.randint(1, 20, (num, 5)), torch.ones(num, 5, dtype=torch.int64)
    return model(batch.image, batch.image_index, ids, mask)


def test_refinement_adds_to_the_enlarged_mask_at_four_times_its_size() -> None:
    torch.manual_seed(0)
    net = Refinement(4)
    image, coarse = torch.randn(2, 3, 16, 16), torch.randn(2, 8, 8)
    assert net(image, coarse).shape == (2, 64, 64)
    torch.nn.init.zeros_(net.last.weight)
    torch.nn.init.zeros_(net.last.bias)  # type: ignore[arg-type]
    enlarged = F.interpolate(coarse[:, None], size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(net(image, coarse), enlarged)


def test_published_map_sizes() -> None:
    """At 416 with strides 8, 16 and 32: maps of 52, 26 and 13, S = 13, 169 masks of 52 x 52, the refined one 416 x 416."""
    config = Config(width=8, segmentation_width=8, refinement_width=8)
    decoder = Decoder(config, DecoderInputs((8, 8, 8, 8), 8, 8, 8)).eval()
    images = IsfpImages([torch.randn(1, 8, s, s) for s in (13, 26, 52)], torch.randn(1, 3, 104, 104))
    text = TextFeatures(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.int64))
    with torch.no_grad():
        output = decoder.language_part(images, torch.tensor([0, 0]), text)
    assert output.extra.cell_logits.shape == (2, 169) and output.extra.cell_masks.shape == (2, 169, 52, 52)
    assert output.mask_logits.shape == (2, 2, 416, 416) and output.minimap_prob.shape == (2, 13, 13)
    full = Propagation(256, 13, 0.3)
    assert sum(p.numel() for p in full.parameters()) == 16 * 256 * 256  # eight pairs


def test_selection_of_one_cell_and_of_all_likely_ones() -> None:
    torch.manual_seed(0)
    masks, logits = torch.randn(2, 16, 3, 3), torch.randn(2, 16)
    inputs = DecoderInputs((4, 4, 4, 4), 5, 5, 7)
    one = Decoder(small(selection="argmax"), inputs).language_part._select(masks, logits)
    both = Decoder(small(), inputs).language_part._select(masks, logits)
    for e in range(2):
        assert torch.equal(one[e], masks[e, int(logits[e].argmax())])
        expected = torch.full((3, 3), -torch.inf)
        for c in range(16):
            expected = torch.maximum(expected, torch.minimum(masks[e, c], logits[e, c]))
        assert torch.equal(both[e], expected)
    assert bool((Decoder(small(), inputs).language_part._select(masks, logits - 100) < 0).all())  # no target


def test_ground_truth_in_place_of_a_branch() -> None:
    """Table 3.2: the cell of the true centre; the true mask of whatever object was chosen."""
    torch.manual_seed(0)
    instances = torch.stack([square(4, 4, 16), square(40, 40, 16)])
    batch = batch_of(list(instances), [[0], [1], []])
    for selection in ("argmax", "union"):
        model: Any = isfp_model(small(selection=selection, refinement=False)).eval()
        with torch.no_grad(), model.decoder.given("location", instances, batch.target_index):
            output = forward(model, batch)
        cells = cells_of_centres(instances, SIDE).tolist()
        for e in range(2):
            assert torch.equal(output.extra.coarse[e], output.extra.cell_masks[e, cells[e]])
        assert bool((output.mask_logits[2, 1] < 0).all())
        with torch.no_grad():
            head = model.decoder.language_part.identification.target
            head.weight.zero_()
            head.bias.fill_(-1.0)
            with model.decoder.given("mask", instances, batch.target_index):
                output = forward(model, batch)
        # argmax of equal logits is cell 0, which the first object owns; with the union no cell is likely
        expected = instances[:1].expand(3, -1, -1) if selection == "argmax" else torch.zeros(3, 64, 64, dtype=torch.bool)
        assert torch.equal(output.mask_logits[:, 1] > 0, expected)
    assert model.decoder.language_part.truth is None
    with pytest.raises(GrexError, match="location or mask"), model.decoder.given("box", instances, []):
        pass


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(GrexError, match="propagation or convolution or none"):
        isfp_model(small(identification="attention"))
    with pytest.raises(GrexError, match="union or argmax"):
        isfp_model(small(selection="best"))
    with pytest.raises(GrexError, match=r"set model\.pixel_decoder\.name to fpn_levels"):
        check_combinations(load_config(None, ["--model.decoder.name=isfp"]))
    batch = batch_of([square(0, 0)], [[0]])
    batch.gt_masks = None
    with pytest.raises(GrexError, match="ISFP learns the mask of every cell"):
        Criterion(small())(forward(isfp_model(small()), batch), batch)
