"""VLT against its equations, written out with loops over cells, words and queries in float64, gradients included."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.vlt.config import VltConfig, VltLossConfig
from grex_mllm.models.decoders.vlt.criterion import VltCriterion, at_most, contrastive, relations
from grex_mllm.models.decoders.vlt.fusion import ImageFusion, LanguageFusion
from grex_mllm.models.decoders.vlt.network import Vlt, VltExtra, mask_features
from grex_mllm.models.decoders.vlt.queries import ImageQueries, LanguageQueries, QueryBalance, clip_mean, mask_words
from grex_mllm.models.grex_heads import GrexHeadsConfig
from grex_mllm.types import DecoderInputs, PixelFeatures, TextFeatures

WIDTH, SIDE, WORDS = 8, 4, 5
SMALL = VltConfig(width=WIDTH, num_heads=2, feedforward=16, grid_side=SIDE, num_queries=3, mask_widths=[6, 5, 4], least_words=1)


def moved(module: Any) -> Any:
    """Return the module in float64, with norms that scale and shift."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return module.double()


def text_of(lengths: list[int]) -> TextFeatures:
    torch.manual_seed(2)
    mask = torch.arange(WORDS)[None] < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(len(lengths), WORDS, WIDTH, dtype=torch.float64), mask.long())


def same_with_gradients(ours: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values, and equal gradients of a random projection."""
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((value * weights).sum(), inputs, retain_graph=True) for value in (ours, expected)]
    for found, wanted in zip(*grads, strict=True):
        assert wanted.abs().max() > 1e-9
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


def group_norm(x: Tensor, norm: Any) -> Tensor:
    """Written out: float [C, h, w]."""
    groups = x.reshape(norm.num_groups, -1)
    centred = groups - groups.mean(dim=1, keepdim=True)
    normal = centred / (centred.square().mean(dim=1, keepdim=True) + norm.eps).sqrt()
    return normal.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


def conv(x: Tensor, block: Any) -> Tensor:
    """ "Conv" of the equations: 3x3, ReLU, normalisation; float [C, h, w] by loops over cells and offsets."""
    weight, bias = block.conv.weight, block.conv.bias
    _, height, width = x.shape
    rows = []
    for i in range(height):
        for j in range(width):
            total = bias
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < height and 0 <= j + dj < width:
                        total = total + weight[:, :, di + 1, dj + 1] @ x[:, i + di, j + dj]
            rows.append(total.clamp(min=0))
    return group_norm(torch.stack(rows, dim=1).reshape(-1, height, width), block.norm)


def softmax(logits: list[Tensor]) -> list[Tensor]:
    shares = [logit.exp() for logit in logits]
    return [share / sum(shares) for share in shares]


def test_spatial_dynamic_fusion() -> None:
    """Equations 4.1 to 4.3, cell by cell; the second expression has padding."""
    image, language = moved(ImageFusion("spatial", WIDTH)), moved(LanguageFusion("spatial", WIDTH))
    text = text_of([5, 3])
    visual = torch.randn(1, WIDTH, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    tokens = text.tokens.requires_grad_()
    ours = language(image(visual), torch.zeros(2, dtype=torch.int64), text)
    keys = conv(visual[0], image.key)
    expected = []
    for e, length in enumerate((5, 3)):
        words = [tokens[e, n] for n in range(length)]
        word_keys, word_values = ([block.norm(F.relu(block.linear(word))) for word in words] for block in (language.key, language.value))
        sdl = torch.zeros(WIDTH, SIDE, SIDE, dtype=torch.float64)
        for i in range(SIDE):
            for j in range(SIDE):
                shares = softmax([keys[:, i, j] @ key / math.sqrt(WIDTH) for key in word_keys])  # 4.1
                cell = torch.zeros(SIDE, SIDE, dtype=torch.float64)
                cell[i, j] = 1
                sdl = sdl + sum(s * v for s, v in zip(shares, word_values))[:, None, None] * cell  # 4.2
        weight = torch.cat([language.fuse.weight, image.fuse.weight], dim=1)  # 4.3, one convolution over [F_sdl ; F_vr]
        both = F.conv2d(torch.cat([sdl, visual[0]])[None], weight, image.fuse.bias, padding=1)[0]
        expected.append(group_norm(both.clamp(min=0), language.norm))
    same_with_gradients(ours, torch.stack(expected), [visual, tokens, language.key.linear.weight, language.fuse.weight])


def test_every_cell_reads_real_words_alone() -> None:
    image, language = moved(ImageFusion("spatial", WIDTH)), moved(LanguageFusion("spatial", WIDTH))
    shares = language.attend(image(torch.randn(1, WIDTH, SIDE, SIDE).double()), torch.zeros(2, dtype=torch.int64), text_of([5, 3]))
    torch.testing.assert_close(shares.sum(dim=2), torch.ones(2, SIDE * SIDE).double())
    assert (shares[1, :, 3:] == 0).all() and (shares[1, :, :3] > 0).all()
    assert shares[0].std(dim=0).max() > 1e-3  # the cells read differently


@pytest.mark.parametrize("kind", ["tile", "tile_convolutions"])
def test_tiled_fusion_reads_the_sentence_alone(kind: str) -> None:
    image, language = moved(ImageFusion(kind, WIDTH)), moved(LanguageFusion(kind, WIDTH))
    text, visual = text_of([5]), torch.randn(1, WIDTH, SIDE, SIDE).double()
    ours = language(image(visual), torch.zeros(1, dtype=torch.int64), text)
    sentence = language.value(text.tokens[:, 0])[..., None, None].expand(-1, -1, SIDE, SIDE)
    weight = torch.cat([language.fuse.weight, image.fuse.weight], dim=1)
    expected = language.norm(F.relu(F.conv2d(torch.cat([sentence, visual], dim=1), weight, image.fuse.bias, padding=1)))
    assert len(language.more) == (3 if kind == "tile_convolutions" else 0)
    for block in language.more:
        expected = block(expected)
    torch.testing.assert_close(ours, expected)


def test_query_generation() -> None:
    """Equations 4.4 to 4.6, query by query and word by word; row 0 is the sentence, which query generation does not read."""
    image, language = moved(ImageQueries(WIDTH, 3, SIDE, False)), moved(LanguageQueries("generated", 3, WIDTH))
    text = text_of([5, 3])
    visual = torch.randn(1, WIDTH, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    tokens = text.tokens.requires_grad_()
    found = language(image(visual)[[0, 0]], text)
    maps = visual[0]
    for block in image.reduce:
        maps = conv(maps, block)
    sequences = maps.reshape(3, -1)  # F_vq, 4.4
    w_v, w_a, w_t = image.project.weight.T, language.key.weight.T, language.value.weight.T
    queries, attention = [], torch.zeros(2, 3, WORDS, dtype=torch.float64)
    for e, length in enumerate((5, 3)):
        for n in range(3):
            seen = (sequences[n] @ w_v).clamp(min=0)
            words = list(range(1, length))
            shares = softmax([seen @ (tokens[e, i] @ w_a).clamp(min=0) / math.sqrt(WIDTH) for i in words])  # 4.5
            queries.append(sum(s * (tokens[e, i] @ w_t).clamp(min=0) for s, i in zip(shares, words)) + seen)  # 4.6
            attention[e, n, 1:length] = torch.stack(shares).detach()
    same_with_gradients(found.rows, torch.stack(queries).reshape(2, 3, WIDTH), [visual, tokens, image.project.weight, language.key.weight])
    torch.testing.assert_close(found.attention, attention)


def test_query_balance() -> None:
    balance = moved(QueryBalance(WIDTH))
    queries, responses = (torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    rows = []
    for e in range(2):
        for n in range(3):
            both = torch.cat([(balance.query.weight @ queries[e, n] + balance.query.bias).clamp(min=0), responses[e, n]])
            hidden = (balance.hidden.weight @ both + balance.hidden.bias).clamp(min=0)
            rows.append(responses[e, n] / (1 + (-(balance.confidence.weight @ hidden + balance.confidence.bias)).exp()))
    same_with_gradients(balance(queries, responses), torch.stack(rows).reshape(2, 3, WIDTH), [queries, responses])


def test_mask_features() -> None:
    """Equation 4.7, scaled by C^-1/2."""
    memory = torch.randn(2, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    responses = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    rows = [memory[e, p] @ responses[e, n] / math.sqrt(WIDTH) for e in range(2) for n in range(3) for p in range(6)]
    same_with_gradients(mask_features(memory, responses), torch.stack(rows).reshape(2, 3, 6), [memory, responses])


def test_contrast() -> None:
    """Equation 4.8 by loops over anchors, positives and negatives, with masked copies; one expression has no target."""
    torch.manual_seed(3)
    image_index = torch.tensor([0, 0, 0, 0, 1, 1])
    targets = [torch.tensor(t, dtype=torch.int64) for t in ([0, 1], [1, 0], [2], [], [0], [0, 1])]
    features, copies = (torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    masked = torch.tensor([True, False, True, True, False, True])
    same, different = relations(image_index, targets)
    assert same.nonzero().tolist() == [[0, 1], [1, 0]]
    assert different.nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3], [2, 0], [2, 1], [2, 3]]
    flat, flat_copies = features.flatten(1), copies.flatten(1)
    tau, values = 0.3, []
    for i in (0, 1, 2):  # those with a target and a positive

        def near(rows: Tensor, j: int, i: int = i) -> Tensor:
            return (rows[j] @ flat[i] / rows[j].norm() / flat[i].norm() / tau).exp()

        others = sum(near(flat, j) for j in range(6) if image_index[j] == 0 and not set(targets[j].tolist()) & set(targets[i].tolist()))
        equal = [j for j in range(6) if image_index[j] == 0 and set(targets[j].tolist()) == set(targets[i].tolist())]
        positives = [near(flat, j) for j in equal if j != i] + [near(flat_copies, j) for j in equal if masked[j]]
        values.append(-sum((p / (p + others)).log() for p in positives) / len(positives))
    expected = sum(values) / len(values)
    ours = contrastive(VltExtra(features, copies, masked), same, different, tau, "all")
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
    for found, wanted in zip(torch.autograd.grad(ours, [features, copies]), torch.autograd.grad(expected, [features, copies]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    first = contrastive(VltExtra(features, copies, masked), same, different, tau, "one")
    torch.testing.assert_close(first.double(), values[0], rtol=1e-5, atol=0)


def test_contrast_of_one_positive_and_two_negatives_by_hand() -> None:
    features = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 2.0]], [[-3.0, 0.0]]])
    same, different = relations(torch.zeros(4, dtype=torch.int64), [torch.tensor([n]) for n in (0, 0, 1, 2)])
    positive, negatives = math.exp(0.5**0.5), math.exp(0) + math.exp(-1)
    expected = -math.log(positive / (positive + negatives))
    assert abs(contrastive(VltExtra(features), same, different, 1.0, "one").item() - expected) < 1e-6


def test_contrast_without_a_positive_is_zero_with_a_gradient_path() -> None:
    features = torch.randn(3, 2, 4, requires_grad=True)
    same, different = relations(torch.arange(3), [torch.tensor([0])] * 3)
    loss = contrastive(VltExtra(features), same, different, 0.1, "all")
    loss.backward()
    assert loss == 0 and features.grad is not None and (features.grad == 0).all()


def test_other_images_change_nothing_in_the_contrast() -> None:
    features = torch.randn(4, 2, 4)
    index, targets = torch.tensor([0, 0, 0, 1]), [torch.tensor([n]) for n in (0, 0, 1, 0)]
    whole = contrastive(VltExtra(features), *relations(index, targets), 0.1, "all")
    part = contrastive(VltExtra(features[:3]), *relations(index[:3], targets[:3]), 0.1, "all")
    torch.testing.assert_close(whole, part)


def test_expressions_are_told_from_so_many_others_at_most() -> None:
    _, different = relations(torch.zeros(5, dtype=torch.int64), [torch.tensor([n]) for n in range(5)])
    assert at_most(different, 2).nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1], [3, 0], [3, 1], [4, 0], [4, 1]]
    assert torch.equal(at_most(different, 0), different)


def test_uniform_attention_masks_every_word_alike_and_more_attention_more_often() -> None:
    torch.manual_seed(0)
    mask = torch.ones(4000, 6, dtype=torch.int64)
    uniform = torch.full((4000, 2, 6), 0.25) * torch.tensor([0, 1, 1, 1, 1, 0])
    taken = ~mask_words(uniform, mask, "weighted", 3, 1.0, True).rows
    share = taken.float().mean(dim=0)
    assert share[0] == 1 and share[5] == 0  # the sentence's row is never read, the end is never masked
    assert ((share[1:5] - 0.25).abs() < 0.03).all() and (taken[:, 1:].sum(dim=1) == 1).all()
    attention = torch.tensor([0.0, 0.4, 0.2, 0.2, 0.2, 0.0]).expand(4000, 16, 6)
    share = (~mask_words(attention, mask, "weighted", 3, 1.0, True).rows).float().mean(dim=0)
    expected = torch.softmax(torch.tensor([6.4, 3.2, 3.2, 3.2]), 0)  # a = the sum over 16 queries
    assert ((share[1:5] - expected).abs() < 0.03).all()


def test_rules_of_masking_words() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]] * 300 + [[1, 1, 1, 1, 0, 0]] * 300)
    attention = torch.tensor([0.0, 0.6, 0.1, 0.3, 0.0, 0.0]).expand(600, 2, 6)
    sure = mask_words(attention, mask, "threshold", 2, 1.5, True)
    assert sure.masked.tolist() == [True] * 300 + [False] * 300  # the second kind has two words and an end
    assert not sure.rows[:300, 1].any() and sure.rows[:300, 2:5].all()
    assert sure.rows[300:].tolist() == [[False, True, True, True, False, False]] * 300
    by_chance = (~mask_words(attention, mask, "random", 2, 1.0, True).rows[:300]).float().mean(dim=0)
    assert ((by_chance[1:4] - 1 / 3).abs() < 0.1).all() and by_chance[4] == 0
    assert mask_words(attention, mask, "random", 2, 1.0, False).masked.all()  # the last row is a word, too


def inputs() -> tuple[list[Tensor], PixelFeatures, TextFeatures]:
    torch.manual_seed(4)
    levels = [torch.randn(2, WIDTH, n, n) for n in (2, 4, 8)]
    return [], PixelFeatures(torch.randn(2, 6, 16, 16), levels), TextFeatures(torch.randn(3, WORDS, 7), text_of([5, 4, 2]).mask)


def built(**changes: Any) -> Vlt:
    torch.manual_seed(5)
    return Vlt(replace(SMALL, **changes), DecoderInputs((4, 8, 8, 8), WIDTH, 6, 7))


VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {"queries": "learned", "masked_words": "none"},
    "words": {"queries": "words", "masked_words": "none"},
    "without balance": {"balance": False},
    "tile": {"fusion": "tile"},
    "tile and four convolutions": {"fusion": "tile_convolutions"},
    "seven convolutions": {"body": "convolutions", "masked_words": "none"},
    "three maps": {"maps": "three"},
    "coordinates": {"coordinates": True},
    "one query": {"num_queries": 1},
    "mask alone": {"heads": GrexHeadsConfig(minimap=False, no_target=False, boxes=False, count=False)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_answer_and_learn(name: str) -> None:
    model = moved(built(**VARIANTS[name])).train()
    maps, pixels, text = inputs()
    pixels = PixelFeatures(pixels.mask_features.double(), [x.double() for x in pixels.levels])
    output = model.language_part(model.image_part(maps, pixels), torch.tensor([0, 1, 1]), TextFeatures(text.tokens.double(), text.mask))
    assert output.mask_logits.shape == (3, 2, 8 * SIDE, 8 * SIDE) and model.answers_boxes == (output.boxes_norm is not None)
    heads = [x for x in (output.minimap_logits, output.no_target_logits, output.boxes_norm, output.box_logits) if x is not None]
    sum((x.square().sum() for x in [output.mask_logits, *heads]), start=torch.zeros(())).backward()
    silent = [n for n, p in model.named_parameters() if (p.grad is None or p.grad.abs().max() < 1e-13) and "heads.heads.count" not in n]
    alone = name == "one query"  # a softmax over one query is 1
    assert [n for n in silent if not (alone and re.search(r"self_attention\.attention\.(query|key)", n))] == []
    if name == "seven convolutions":
        assert len(model.language_part.body) == 7 and model.language_part.decoder is None


def test_queries_of_words_do_not_read_padding() -> None:
    model = built(queries="words", masked_words="none", num_queries=4).eval()
    maps, pixels, text = inputs()
    images = model.image_part(maps, pixels)
    changed = TextFeatures(torch.where(text.mask.bool()[..., None], text.tokens, torch.randn_like(text.tokens)), text.mask)
    index = torch.tensor([0, 1, 1])
    torch.testing.assert_close(
        model.language_part(images, index, changed).mask_logits, model.language_part(images, index, text).mask_logits
    )


def test_frames_of_a_clip_have_the_same_queries() -> None:
    """The query input F_vq is averaged over a clip's frames; everything else stays the frame's own."""
    clip = torch.tensor([0, 1, 0])
    sequences = torch.randn(3, 2, 5)
    expected = torch.stack([(sequences[0] + sequences[2]) / 2, sequences[1], (sequences[0] + sequences[2]) / 2])
    torch.testing.assert_close(clip_mean(sequences, clip), expected)
    model = built().eval()
    pixels = PixelFeatures(torch.randn(3, 6, 16, 16), [torch.randn(3, WIDTH, n, n) for n in (2, 4, 8)])
    apart, together = model.image_part([], pixels), model.image_part([], pixels, clip)
    assert torch.equal(together.queries[0], together.queries[2]) and not torch.equal(apart.queries[0], apart.queries[2])
    torch.testing.assert_close(together.queries[1], apart.queries[1])
    assert torch.equal(together.fusion.cells, apart.fusion.cells)
    part = model.image_part.queries
    mean = part.reduce(model.image_part.sum(pixels)).flatten(2)[[0, 2]].mean(dim=0)
    torch.testing.assert_close(together.queries[0], F.relu(part.project(mean)))


def test_a_masked_word_is_read_by_no_query_and_its_copy_joins_the_contrast() -> None:
    model = built().train()
    maps, pixels, text = inputs()
    images, index = model.image_part(maps, pixels), torch.tensor([0, 1, 1])
    extra = model.language_part(images, index, text).extra
    assert extra.masked.tolist() == [True, True, False] and not torch.allclose(extra.masked_features[0], extra.mask_features[0])
    torch.testing.assert_close(extra.masked_features[2], extra.mask_features[2])
    language = model.language_part.decoder.queries
    projected = TextFeatures(model.language_part.text(text.tokens), text.mask)
    kept = torch.tensor([[False, True, False, True, True]] * 3) & text.mask.bool()
    assert (language(images.queries[index], projected, kept).attention[:, :, 2] == 0).all()
    model.eval()
    assert model.language_part(images, index, text).extra.masked is None


def test_the_criterion_weighs_the_contrast() -> None:
    from made_batch import make_batch

    heads = GrexHeadsConfig(minimap=False, no_target=False, boxes=False, count=False)
    bare = VltLossConfig(minimap=0, no_target=0, box_l1=0, box_giou=0, box_score=0, count=0)
    model = built(heads=heads).eval()
    maps, pixels, text = inputs()
    output = model.language_part(model.image_part(maps, pixels), torch.tensor([0, 0, 0]), text)
    batch = make_batch(torch.rand(3, 16, 16) > 0.5, [torch.rand(1, 4)] * 3)
    batch.image_index, batch.target_index = torch.zeros(3, dtype=torch.int64), [torch.tensor([n]) for n in (0, 0, 1)]
    totals = [VltCriterion(replace(SMALL, loss=replace(bare, contrastive=w)))(output, batch)["total"] for w in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(totals[2] - totals[0], 3 * (totals[1] - totals[0]))
    assert totals[1] > totals[0]
    hot, cold = (VltCriterion(replace(SMALL, loss=replace(bare, temperature=t)))(output, batch)["contrastive"] for t in (1.0, 0.01))
    assert not torch.allclose(hot, cold)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fusion": "add"}, "model.decoder.fusion"),
        ({"queries": "few", "masked_words": "none"}, "model.decoder.queries"),
        ({"body": "x"}, "body"),
        ({"maps": "five"}, "model.decoder.maps"),
        ({"mask_widths": []}, "mask_widths"),
        ({"num_heads": 3}, "heads that divide"),
        ({"queries": "learned"}, "masked_words"),
        ({"loss": VltLossConfig(anchors="two")}, "anchors"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(GrexError, match=match):
        built(**changes)
        VltCriterion(replace(SMALL, **changes))
