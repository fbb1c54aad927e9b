"""Which objects come first among their kind: against hand-made pictures, and what the generator makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_step import built

from grex_mllm.errors import GrexError
from grex_mllm.models.generators.region_tokens.parts import GenerationPart
from grex_mllm.models.generators.region_tokens.ranks import OF_OBJECT, OF_SET, ORDERS, Kinds, Said, orders, rank
from grex_mllm.models.generators.region_tokens.tokens import ObjectTokens, RegionTokens
from grex_mllm.models.generators.region_tokens.words import word_loss
from grex_mllm.models.word_bags import SMOOTHING

LEFT, RIGHT, TOP, BOTTOM, LARGEST, SMALLEST = range(ORDERS)


def row_of_boxes(across: list[float], sizes: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares side by side; sizes: their sides."""
    boxes = torch.tensor([[[x - s / 2, 0.5 - s / 2, x + s / 2, 0.5 + s / 2] for x, s in zip(across, sizes, strict=True)]])
    return boxes, (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


# four cats from left to right, the third one the largest, and a dog (the last) left of all
BOXES, AREA = row_of_boxes([0.2, 0.4, 0.6, 0.9, 0.05], [0.1, 0.1, 0.2, 0.1, 0.1])
SAME = torch.ones(5, 5)
SAME[4] = SAME[:, 4] = 0
SAME = (SAME - SAME.diag().diag())[None]


def ranked(targets: list[int], others: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What one set of the four cats and the dog is told, the counts alone (not their exponentials)."""
    member, other = torch.zeros(2, 1, 5, dtype=torch.bool)
    member[0, targets] = other[0, others] = True
    each, whole = rank(SAME, BOXES, AREA, torch.tensor([0]), member, other)
    assert each.shape == (1, 5, OF_OBJECT) and whole.shape == (1, OF_SET)
    return 3 * each[0, :, : OF_OBJECT // 2], torch.cat([3 * whole[0, : OF_SET // 2], whole[0, -1:]])


def close(got: torch.Tensor, expected: list[float], atol: float = 0.02) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), atol=atol, rtol=0)


def test_one_comes_before_another_by_place_and_size() -> None:
    before, unsure = orders(BOXES, AREA)
    assert before.shape == unsure.shape == (1, ORDERS, 5, 5)
    close(before[0, LEFT, 2], [1, 1, 0.5, 0, 1])  # of what stands left of the third cat
    close(before[0, RIGHT, 2], [0, 0, 0.5, 1, 0])
    close(before[0, LARGEST, 0], [0.5, 0.5, 1, 0.5, 0.5])
    close(before[0, TOP, 0], [0.5] * 5)  # all stand alike
    close(unsure[0, TOP, 0], [1] * 5)  # so that none comes clearly after
    close(unsure[0, SMALLEST, 2], [1] * 5)


def test_the_two_leftmost_and_all_but_the_rightmost() -> None:
    each, whole = ranked([0, 1], [2, 3, 4])
    close(each[:4, LEFT], [0, 1, 2, 3])  # the dog is of another kind
    close(each[:4, RIGHT], [3, 2, 1, 0])
    close(each[:4, ORDERS + LEFT], [0, 0, 2, 2])  # rivals before a target; targets before a rival
    close(each[:4, 2 * ORDERS], [1, 1, 2, 2])  # of its kind in the set
    close(each[:4, 2 * ORDERS + 1], [2, 2, 1, 1])  # and beside it
    close(whole[:ORDERS], [0, 2, 2, 2, 2, 1], atol=0.05)  # no rival before them from the left alone
    assert whole[ORDERS + RIGHT] < 0.05 and whole[ORDERS + LEFT] > 1.9  # all but the two rightmost ones
    close(whole[2 * ORDERS :], [2, 2, 1])
    each, whole = ranked([0, 1, 2], [3, 4])
    assert whole[LEFT] < 0.05 and whole[ORDERS + RIGHT] < 0.05
    assert not ranked([0, 1, 2], [3])[0][4].any()  # the dog is hidden


def test_what_stands_closer_than_people_can_tell_is_first_of_nothing() -> None:
    boxes, area = row_of_boxes([0.30, 0.33, 0.8], [0.1, 0.1, 0.1])
    member, other = torch.tensor([[True, False, False]]), torch.tensor([[False, True, True]])
    _, whole = rank((torch.ones(3, 3) - torch.eye(3))[None], boxes, area, torch.tensor([0]), member, other)
    assert 0.8 < 3 * whole[0, LEFT] <= 1.0  # the second one does not clearly come after
    far = boxes.clone()
    far[0, 1, [0, 2]] += 0.1
    _, whole = rank((torch.ones(3, 3) - torch.eye(3))[None], far, area, torch.tensor([0]), member, other)
    assert 3 * whole[0, LEFT] < 0.02


def test_unlike_targets_say_so() -> None:
    _, alike = ranked([0, 1], [2])
    _, unlike = ranked([0, 4], [1, 2])
    assert alike[-1] == 1 and unlike[-1] == 0
    close(unlike[2 * ORDERS : 2 * ORDERS + 2], [2, 2])


def test_kinds_are_of_the_same_words() -> None:
    kinds = Kinds(4, 8, 6, 3)
    sure = torch.tensor([[[9.0, 0, 0], [9.0, 0, 0], [0, 9.0, 0]]], requires_grad=True)
    same = kinds.same(sure)
    assert same[0, 0, 1] > 0.9 and same[0, 0, 2] < 0.01 and not same[0].diagonal().any()
    torch.testing.assert_close(same, same.transpose(1, 2))
    (grad,) = torch.autograd.grad(kinds.same(torch.randn(1, 3, 3, requires_grad=True)).sum(), kinds.limit)
    assert grad != 0
    (slope,) = torch.autograd.grad(same.sum(), sure)
    assert bool(slope.isfinite().all())


def shown_objects() -> tuple[RegionTokens, ObjectTokens]:
    """Four objects that do not stand from left to right, in a picture of 32 x 16 with padding on the right; all of one kind."""
    torch.manual_seed(0)
    module = RegionTokens([4], 8, hidden=8, image_grid=0, shape_side=0, words=5, ranks=True)
    mask = torch.zeros(4, 32, 24, dtype=torch.bool)
    for i, x in enumerate((12, 0, 8, 4)):
        mask[i, 2 : 6 + i, x : x + 3] = True
    objects = module([torch.randn(1, 4, 16, 12)], [mask], torch.tensor([[32, 16]]))
    objects.table, objects.words = torch.randn(5, 8), torch.zeros(1, 4, 8)
    objects.same = 1.0 - torch.eye(4)[None]
    return module, objects


def test_ranks_are_of_the_objects_that_may_stand_beside() -> None:
    """Places are shares of the picture without its padding, and what is hidden from a set does not count, whatever the order."""
    module, objects = shown_objects()
    assert objects.boxes is not None and objects.boxes[0, 0].tolist() == [12 / 16, 2 / 32, 15 / 16, 6 / 32]
    member, beside = torch.tensor([[True, False, False, False]]), torch.tensor([[False, False, True, True]])
    told: list[torch.Tensor] = []
    for part in (module.ranked.objects, module.ranked.sets):
        part.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0]))
    module.select(objects, torch.tensor([0]), member, beside)
    expected = rank(objects.same, objects.boxes, objects.area, torch.tensor([0]), member, beside)
    torch.testing.assert_close(tuple(told), expected)
    assert 3 * told[0][0, 0, LEFT] > 1.9  # the two, not the third one, stand left of it


def test_words_of_objects_and_of_the_set_are_shown_to_the_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    module, objects = shown_objects()
    member = torch.tensor([[True, False, True, False]])
    words, of_set = torch.randn(1, 4, 8), torch.randn(1, 8)

    def selected(words: torch.Tensor, of_set: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(module.ranked, "say", lambda *args: Said(torch.zeros(1, 4, 5), torch.zeros(1, 5), words, of_set))
        tokens, _, summary, _ = module.select(objects, torch.tensor([0]), member)
        return tokens, summary

    tokens, summary = selected(words, of_set)
    same, other = selected(words, torch.randn(1, 8))
    assert torch.equal(same, tokens) and not torch.allclose(other, summary)
    for place, row, in_set in ((1, 0, False), (3, 1, False), (2, 2, True), (0, 3, True)):  # distractors, then targets, left to right
        moved = words.clone()
        moved[0, place] += torch.randn(8)
        tokens_then, summary_then = selected(moved, of_set)
        assert [n for n in range(4) if not torch.allclose(tokens_then[0, n], tokens[0, n])] == [row]
        assert torch.allclose(summary_then, summary) != in_set


def test_the_loss_is_of_objects_sets_and_kinds() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 4, 6, 2], [1, 5, 2, 0]])
    part = GenerationPart(ids, (ids > 0).long(), torch.tensor([0, 1]), [torch.tensor([0, 2]), torch.tensor([1])], torch.ones(2))
    listed, logits, set_logits, kinds = torch.arange(4, 8), torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 3, 4)
    objects = ObjectTokens(torch.zeros(2, 3, 8), *[torch.zeros(0)] * 4, word_logits=torch.randn(2, 3, 4), kind_logits=kinds)
    got = word_loss(objects, part, listed, 2, Said(logits, set_logits, torch.zeros(0), torch.zeros(0)))
    share, of_set, kind = (x.log_softmax(-1).exp() for x in (logits + often(), set_logits + often(), kinds))
    # words 4, 6 of the first expression, said of objects 0 and 2; word 5 of the second, of object 1
    said = [(share[0, [0, 2], w].mean(), of_set[0, w], kind[0, [0, 2], w].mean()) for w in (0, 2)]
    said += [(share[1, 1, 1], of_set[1, 1], kind[1, 1, 1])]
    torch.testing.assert_close(got, -torch.stack([torch.stack(row) for row in said]).log().sum(1).mean())


def often() -> torch.Tensor:
    """The logarithms of how often each word is said in those two expressions, smoothed."""
    return torch.tensor([1.0, 1.0, 1.0, SMOOTHING]).log()


def test_a_generator_learns_kinds_and_reads_ranks(tmp_path: Path) -> None:
    """Every weight gets a gradient; who else stands there changes the prefix, also where no token of it is shown."""
    model, batches = built("words", tmp_path, model__generator__ranks=True, model__generator__max_distractors=0)
    batch, generator = batches.at(0), model.generator
    maps = [m.detach() for m in model.grounding.language_free(model.grounding.encode_image(batch.image, batch.input_sizes))]
    generator(maps, batch)["total"].backward()
    parts = [generator.region_tokens.kinds, generator.region_tokens.ranked]
    silent = [name for part in parts for name, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    generator.eval()
    objects = generator.objects(maps, batch.instance_masks, torch.tensor(batch.input_sizes), batch.instance_boxes_norm)
    image = next(i for i, masks in enumerate(batch.instance_masks) if len(masks) > 1)
    index, targets = torch.tensor([image]), [torch.tensor([0])]
    counts = [len(m) for m in batch.instance_masks]
    among_all = generator.arrange(objects, counts, index, targets)
    alone = generator.arrange(objects, counts, index, targets, beside=[torch.zeros(0, dtype=torch.int64)])
    assert among_all.embeds.shape == alone.embeds.shape
    assert not torch.allclose(among_all.summary, alone.summary) and not torch.allclose(among_all.embeds, alone.embeds)


def test_ranks_want_words(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r"model.generator.ranks without words"):
        built("generate", tmp_path, model__generator__ranks=True)
