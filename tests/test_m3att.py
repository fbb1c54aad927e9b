"""M3Att against its equations, written out with loops over words and cells in float64, gradients included."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_batch import make_batch
from test_vlt import SIDE, WIDTH, inputs, moved, same_with_gradients, softmax
from torch import Tensor

from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.m3att.attention import ImageKeys, Interaction, MutualAttention
from grex_mllm.models.decoders.m3att.config import M3AttConfig, M3AttLossConfig
from grex_mllm.models.decoders.m3att.criterion import M3AttCriterion, reconstruction, spread
from grex_mllm.models.decoders.m3att.network import M3Att, MaskDecoder
from grex_mllm.models.decoders.m3att.reconstruction import Reconstruction, word_positions
from grex_mllm.models.grex_heads import GrexHeadsConfig
from grex_mllm.models.grid import split_words
from grex_mllm.types import DecoderInputs, PixelFeatures, TextFeatures

SMALL = M3AttConfig(width=WIDTH, num_heads=2, feedforward=16, grid_side=SIDE, mask_widths=[8, 6, 4], max_words=4)
REAL = torch.tensor([[True, True, True], [True, True, False]])
CELLS = SIDE**2


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean()
    normal = centred / (centred.square().mean() + norm.eps).sqrt()
    return normal if norm.weight is None else normal * norm.weight + norm.bias


def mutual_by_loops(module: MutualAttention, words: Tensor, keys: list[Tensor]) -> Tensor:
    """Equations 5.1 to 5.2b, and the unnumbered product with its linear layer, word by word and cell by cell."""
    rows = []
    for e in range(2):
        length = int(REAL[e].sum())

        def matrix(project: Any, cells: Tensor, e: int = e) -> list[list[Tensor]]:  # 5.1
            return [[project.weight @ words[e, n] @ cells[e, p] / math.sqrt(WIDTH) for p in range(CELLS)] for n in range(3)]

        first = matrix(module.key, keys[0])
        second = first if module.second_key is None else matrix(module.second_key, keys[2])
        vision = [sum(s * keys[1][e, p] for p, s in enumerate(softmax(first[n]))) for n in range(3)]  # 5.2a
        if module.value is None:
            rows.append(torch.stack([layer_norm(module.out.weight @ v + module.out.bias, module.norm) for v in vision]))
            continue
        values = [module.value.weight @ words[e, n] + module.value.bias for n in range(length)]
        language = [sum(s * values[n] for n, s in enumerate(softmax([second[n][p] for n in range(length)]))) for p in range(CELLS)]  # 5.2b
        products = [torch.stack([vision[n] @ language[p] for p in range(CELLS)]) / math.sqrt(WIDTH) for n in range(3)]  # F_mul
        rows.append(torch.stack([layer_norm(module.out.weight @ f + module.out.bias, module.norm) for f in products]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["shared", "independent", "vision_only"])
def test_mutual_attention(kind: str) -> None:
    module, keys = moved(MutualAttention(WIDTH, CELLS, kind)), moved(ImageKeys(WIDTH, kind))
    words, encoded = leaf(2, 3, WIDTH), leaf(2, CELLS, WIDTH)
    image = keys(encoded)
    assert len(image) == (3 if kind == "independent" else 2)
    ours, expected = module(words, REAL, image), mutual_by_loops(module, words, image)
    same_with_gradients(ours[REAL], expected[REAL], [words, encoded, module.key.weight, module.out.weight, keys.key.weight])


def test_softmaxes_run_over_pixels_and_over_real_words() -> None:
    """With values of one everywhere the gathered features are one, which only weights that sum to one give."""
    module = moved(MutualAttention(WIDTH, CELLS, "shared"))
    with torch.no_grad():
        module.value.weight.zero_()
        module.value.bias.fill_(1.0)
    words, key = torch.randn(2, 3, WIDTH).double(), torch.randn(2, CELLS, WIDTH).double()
    ours = module(words, REAL, [key, torch.ones(2, CELLS, WIDTH).double()])
    expected = module.norm(F.linear(torch.full((2, 3, CELLS), math.sqrt(WIDTH)).double(), module.out.weight, module.out.bias))
    torch.testing.assert_close(ours, expected)


def test_independent_matrices_do_not_share() -> None:
    module = moved(MutualAttention(WIDTH, CELLS, "independent"))
    words, image = torch.randn(2, 3, WIDTH).double(), [torch.randn(2, CELLS, WIDTH).double() for _ in range(3)]
    before = module(words, REAL, image)
    image[2] = image[2] + 1
    assert not torch.allclose(module(words, REAL, image), before)


@pytest.mark.parametrize("kind", ["transformed", "same"])
def test_interaction(kind: str) -> None:
    """Equation 5.3, what follows it, and the path of the words from block to block."""
    block = moved(Interaction(WIDTH, kind, 0.1))
    x, words = leaf(2, 3, WIDTH), leaf(2, 3, WIDTH)
    ours, passed = block(x, words, REAL)
    rows, paths = [], []
    for e in range(2):
        language = [block.transform.weight @ w + block.transform.bias if kind == "transformed" else w for w in words[e]]
        paths.append(torch.stack(language))
        for n in range(3):
            query = (block.query.weight @ x[e, n]).clamp(min=0)
            real = [i for i in range(3) if REAL[e, i]]
            shares = softmax([query @ language[i] / math.sqrt(WIDTH) for i in real])
            read = sum(s * (block.value.weight @ language[i]).clamp(min=0) for s, i in zip(shares, real))
            rows.append(layer_norm(x[e, n] + block.weight * read, block.norm))
    same_with_gradients(ours, torch.stack(rows).reshape(2, 3, WIDTH), [x, words, block.weight, block.query.weight])
    torch.testing.assert_close(passed, torch.stack(paths))
    assert (passed is words) == (kind == "same")


def test_reconstruction() -> None:
    """Equation 5.4, the three layers of F_rec, and the loss; padding words are in no mean."""
    module = moved(Reconstruction(WIDTH, False))
    decoded, words, sentence = leaf(2, 3, WIDTH), leaf(2, 3, WIDTH), leaf(2, WIDTH)
    found = module(decoded, words, sentence, REAL)
    rebuilt, projected = [], []
    for e in range(2):
        length = int(REAL[e].sum())
        codes = [[f(n / 10000 ** (2 * k / WIDTH)) for k in range(WIDTH // 2) for f in (math.sin, math.cos)] for n in range(length)]
        rows = [words[e, n] + torch.tensor(codes[n], dtype=torch.float64) for n in range(length)] + [sentence[e]]
        projected.append(sum(layer_norm(module.project.weight @ row, module.norm).clamp(min=0) for row in rows) / (length + 1))
        total = torch.zeros(WIDTH, dtype=torch.float64)
        for n in range(length):
            row = decoded[e, n]
            for layer, norm in zip(module.layers, module.norms, strict=True):
                row = layer_norm(layer.weight @ row + layer.bias, norm).clamp(min=0)
            total = total + row / length
        rebuilt.append(total)
    torch.testing.assert_close(word_positions(2, WIDTH, words), torch.tensor(codes, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    for ours, expected, needed in ((found[0], rebuilt, [decoded]), (found[1], projected, [words, sentence, module.project.weight])):
        torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-6, atol=1e-7)  # the codes are made in float32
        for a, b in zip(torch.autograd.grad(ours.square().sum(), needed, retain_graph=True),
                        torch.autograd.grad(torch.stack(expected).square().sum(), needed), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    expected_loss = sum((a - b) ** 2 for a, b in zip(found[0].flatten(), found[1].flatten())) / (2 * WIDTH)
    torch.testing.assert_close(reconstruction(*found).double(), expected_loss, rtol=1e-5, atol=1e-7)


def test_a_target_cannot_be_made_constant_by_scale_or_shift() -> None:
    """However small W_proj becomes, the targets keep their size; detached, it has no gradient at all."""
    torch.manual_seed(0)
    module = Reconstruction(WIDTH, False)
    given = torch.randn(4, 3, WIDTH), torch.randn(4, 3, WIDTH), torch.randn(4, WIDTH), torch.ones(4, 3, dtype=torch.bool)
    with torch.no_grad():
        before = spread(module(*given)[1])
        module.project.weight *= 0.03
        after = spread(module(*given)[1])
    assert before > 0.01 and after > 0.5 * before and spread(torch.ones(4, WIDTH)) == 0
    assert not list(module.norm.parameters())
    module = Reconstruction(WIDTH, True)
    assert not module.project.weight.requires_grad and not module(*given)[1].requires_grad


def test_spread_is_the_variance_over_expressions() -> None:
    values = torch.randn(5, 7).relu()
    torch.testing.assert_close(spread(values), values.var(dim=0, correction=0).mean())


def decoder_of(kind: str) -> MaskDecoder:
    torch.manual_seed(6)
    return moved(MaskDecoder(replace(SMALL, mask_decoder=kind)))


@pytest.mark.parametrize("kind", ["kernels", "responses", "concatenate"])
def test_mask_decoders_read_what_they_name(kind: str) -> None:
    decoder = decoder_of(kind)
    decoded, encoded = torch.randn(2, 3, WIDTH).double(), torch.randn(2, CELLS, WIDTH).double()
    logits, first = decoder(decoded, REAL, encoded)
    assert logits.shape == (2, 8 * SIDE, 8 * SIDE) and first.shape == (2, 8, SIDE, SIDE)
    rows = decoder.self_attention(decoded, decoded, REAL[:, None, None])
    if kind == "concatenate":
        words = torch.stack([rows[0].sum(dim=0), rows[1, :2].sum(dim=0)])
        maps = [torch.cat([words[e][:, None].expand(-1, CELLS), encoded[e].T]) for e in range(2)]
    else:
        maps = []
        for e in range(2):
            kernels = torch.stack([rows[e, n] if n < 3 and REAL[e, n] else torch.zeros(WIDTH).double() for n in range(4)])
            if kind == "responses":
                made = (decoder.cells.weight @ kernels.T + decoder.cells.bias[:, None]).T.clamp(min=0)
                maps.append(made * torch.tensor([n < 3 and bool(REAL[e, min(n, 2)]) for n in range(4)])[:, None])
            else:
                maps.append(kernels @ encoded[e].T / math.sqrt(WIDTH))
    expected, _ = decoder.upsample(torch.stack(maps).unflatten(2, (SIDE, SIDE)))
    torch.testing.assert_close(logits, expected)
    changed, _ = decoder(decoded, REAL, encoded + 1)
    assert torch.equal(changed, logits) == (kind == "responses")


def test_more_words_than_kernels_are_left_out() -> None:
    decoder = decoder_of("kernels")
    decoded, real = torch.randn(1, 6, WIDTH).double(), torch.ones(1, 6, dtype=torch.bool)
    assert decoder(decoded, real, torch.randn(1, CELLS, WIDTH).double())[0].isfinite().all()


def test_a_text_without_words_has_its_sentence_as_its_word() -> None:
    text = TextFeatures(torch.randn(2, 3, 4), torch.tensor([[1, 0, 0], [1, 1, 0]]))
    sentence, words, real = split_words(text)
    assert (
        real.tolist() == [[True, False], [True, False]]
        and torch.equal(words[0, 0], sentence[0])
        and torch.equal(words[1], text.tokens[1, 1:])
    )
    assert split_words(TextFeatures(text.tokens[:, :1], text.mask[:, :1]))[1].shape == (2, 1, 4)


def built(**changes: Any) -> M3Att:
    torch.manual_seed(5)
    return M3Att(replace(SMALL, **changes), DecoderInputs((4, 8, 8, 8), WIDTH, 6, 7))


VARIANTS: dict[str, dict[str, Any]] = {
    "independent": {"attention": "independent"},
    "generic": {"attention": "vision_only"},
    "one layer": {"num_layers": 1},
    "no interaction": {"iterate": "none"},
    "same words in all layers": {"iterate": "same"},
    "no reconstruction": {"loss": M3AttLossConfig(reconstruction=0)},
    "concatenate": {"mask_decoder": "concatenate"},
    "responses": {"mask_decoder": "responses"},
    "three maps": {"maps": "three"},
    "mask alone": {"heads": GrexHeadsConfig(minimap=False, no_target=False, boxes=False, count=False)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_answer_and_learn(name: str) -> None:
    model = moved(built(**VARIANTS[name])).train()
    maps, pixels, text = inputs()
    pixels = PixelFeatures(pixels.mask_features.double(), [x.double() for x in pixels.levels])
    output = model.language_part(model.image_part(maps, pixels), torch.tensor([0, 1, 1]), TextFeatures(text.tokens.double(), text.mask))
    assert output.mask_logits.shape == (3, 2, 8 * SIDE, 8 * SIDE) and model.answers_boxes == (output.boxes_norm is not None)
    heads = [output.mask_logits, *output[1:6], output.extra.reconstructed, output.extra.projected]
    weights = [torch.randn_like(x) for x in heads if x is not None]
    sum(((x * w).sum() for x, w in zip([x for x in heads if x is not None], weights)), start=torch.zeros(())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-13] == []
    assert len(model.language_part.decoder.interactions) == {"one layer": 0, "no interaction": 0}.get(name, 2)


def test_generic_attention_reads_no_language_value() -> None:
    assert built(attention="vision_only").language_part.decoder.layers[0].mutual.value is None


def test_reconstruction_changes_no_answer() -> None:
    model = built().eval()
    maps, pixels, text = inputs()
    index = torch.tensor([0, 1, 1])
    before = model.language_part(model.image_part(maps, pixels), index, text)
    model.language_part.reconstruction = None
    after = model.language_part(model.image_part(maps, pixels), index, text)
    assert torch.equal(before.mask_logits, after.mask_logits) and torch.equal(before.box_logits, after.box_logits)


def test_the_criterion_weighs_the_reconstruction_and_reports_the_spread() -> None:
    model = built()
    maps, pixels, text = inputs()
    output = model.language_part(model.image_part(maps, pixels), torch.tensor([0, 0, 1]), text)
    batch = make_batch(torch.rand(3, 16, 16) > 0.5, [torch.rand(1, 4)] * 2 + [torch.zeros(0, 4)])
    terms = [M3AttCriterion(replace(SMALL, loss=M3AttLossConfig(reconstruction=w)))(output, batch) for w in (0.0, 1.0, 3.0)]
    assert "reconstruction" not in terms[0] and terms[1]["reconstruction"] > 0
    torch.testing.assert_close(terms[2]["total"] - terms[1]["total"], 2 * terms[1]["reconstruction"])
    torch.testing.assert_close(terms[1]["target_spread"], spread(output.extra.projected))
    assert not terms[1]["target_spread"].requires_grad


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attention": "language_only"}, "model.decoder.attention"),
        ({"iterate": "x"}, "model.decoder.iterate"),
        ({"mask_decoder": "x"}, "model.decoder.mask_decoder"),
        ({"width": 16}, "model.decoder.width"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(GrexError, match=match):
        built(**changes)
