"""The generator: learning, batch = single, order of the selection, gradients, modes, files, faults."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grex_mllm.errors import GrexError
from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig
from grex_mllm.models.generators.region_tokens.network import RegionTokenGenerator
from grex_mllm.models.lm_decoding import stratified_uniforms
from grex_mllm.models.lm_tokenizer import LMTokenizer, train_sentencepiece
from grex_mllm.training.lm import train_language_model

CHANNELS = [8, 12]
TEXTS = [
    "the red circle",
    "the two blue squares on the left",
    "all objects except the green star",
    "every object",
    "the large ring above the square",
    "the three triangles",
    "the yellow cross",
    "the rightmost star",
]
SMALL = RegionTokensConfig(
    lm="tiny",
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    intermediate_size=64,
    lora_rank=8,
    projector_width=32,
    image_grid=2,
    max_new_tokens=24,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LMTokenizer:
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer"), 300)


def build(tokenizer: LMTokenizer, seed: int = 0, **changes: object) -> RegionTokenGenerator:
    torch.manual_seed(seed)
    return RegionTokenGenerator(replace(SMALL, **changes), CHANNELS, tokenizer)  # type: ignore[arg-type]


def scene(seed: int = 0) -> dict[str, object]:
    """Three images with 3, 5 and 2 objects, eight object sets."""
    draw = torch.Generator().manual_seed(seed)
    masks = []
    for num in (3, 5, 2):
        mask = torch.zeros(num, 32, 48, dtype=torch.bool)
        for i in range(num):
            x, y = int(torch.randint(0, 40, (1,), generator=draw)), int(torch.randint(0, 26, (1,), generator=draw))
            mask[i, y : y + 3 + i, x : x + 4] = True
        masks.append(mask)
    return {
        "features": [torch.randn(3, 8, 16, 24, generator=draw), torch.randn(3, 12, 4, 6, generator=draw)],
        "instance_masks": masks,
        "image_index": torch.tensor([0, 0, 1, 1, 1, 1, 2, 2]),
        "target_index": [torch.tensor(t) for t in ([0], [1, 2], [4, 0, 2], [3], [0, 1, 2, 3, 4], [1, 2], [0, 1], [1])],
    }


def single(inputs: dict, e: int) -> dict:
    b = int(inputs["image_index"][e])
    return {
        "features": [f[b : b + 1] for f in inputs["features"]],
        "instance_masks": [inputs["instance_masks"][b]],
        "image_index": torch.tensor([0]),
        "target_index": [inputs["target_index"][e]],
    }


def test_overfits_eight_object_sets(tokenizer: LMTokenizer) -> None:
    """After training on text the base is frozen; LoRA and region tokens alone learn to name eight sets of three images."""
    generator, inputs = build(tokenizer, lora_rank=16, context_layers=1), scene()
    with generator.text_only() as lm:
        train_language_model(lm, tokenizer, TEXTS, steps=80, batch=8, lr=1e-2)
    ids, mask = tokenizer.encode(TEXTS)
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(100):
        loss = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in generator.parameters() if p.requires_grad], 1.0)
        optimizer.step()
    assert loss.item() < 0.05
    assert [answer for [answer] in generator.generate_batch(**inputs)] == TEXTS
    assert [answers[0] for answers in generator.generate_batch(**inputs, mode="beam", num_beams=3)] == TEXTS
    assert [answers[0] for answers in generator.generate_batch(**inputs, mode="sample", temperature=0.1)] == TEXTS


def test_adapters_are_summed_once_for_all_tokens_and_anew_for_every_call(tokenizer: LMTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, inputs = build(tokenizer).eval(), scene()
    layers = [module for module in generator.lm.modules() if "lora_B" in dict(module.named_children())]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    plain = generator.generate_batch(**inputs, mode="sample", num_candidates=2)
    sums = []
    matmul = torch.Tensor.__matmul__

    def counted(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        sums.extend(True for layer in layers if one is layer.lora_B["default"].weight)
        return matmul(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    assert generator.generate_batch(**inputs, mode="sample", num_candidates=2) == plain
    assert len(sums) == len(layers) == 14
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.neg_()
    assert generator.generate_batch(**inputs, mode="sample", num_candidates=2) != plain and len(sums) == 28
    ids, mask = tokenizer.encode(TEXTS)
    generator.train().likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss.backward()
    assert all(layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in layers)


def test_batch_equals_single(tokenizer: LMTokenizer) -> None:
    generator, inputs = build(tokenizer, context_layers=1).double().eval(), scene()
    inputs["features"] = [f.double() for f in inputs["features"]]
    ids, mask = tokenizer.encode(TEXTS)
    whole = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask)
    for mode, num in (("greedy", 1), ("sample", 3), ("beam", 2)):
        together = generator.generate_batch(**inputs, mode=mode, num_candidates=num)
        assert together == [generator.generate_batch(**single(inputs, e), mode=mode, num_candidates=num)[0] for e in range(8)]
    for e in range(8):
        one_ids, one_mask = tokenizer.encode(TEXTS[e : e + 1])
        alone = generator.likelihood(**single(inputs, e), lm_ids=one_ids, lm_mask=one_mask)
        torch.testing.assert_close(alone.log_likelihood[0], whole.log_likelihood[e], rtol=1e-9, atol=1e-9)
        assert alone.num_tokens[0] == whole.num_tokens[e]
    torch.testing.assert_close(whole.loss, -whole.log_likelihood.sum() / whole.num_tokens.sum())


def test_decoding_equals_forward_without_cache(tokenizer: LMTokenizer) -> None:
    """Greedy tokens are the arg-max of the full forward pass at every step, for sequences of several lengths in one batch."""
    generator, inputs = build(tokenizer, seed=3).eval(), scene()
    answers = [answer for [answer] in generator.generate_batch(**inputs, max_new_tokens=6)]
    prefix = generator.prefix(**inputs)
    for e, answer in enumerate(answers):
        embeds = prefix.embeds[e][prefix.mask[e]][None]
        tokens = [tokenizer.bos_id]
        for step in range(6):
            text = generator.lm.get_input_embeddings()(torch.tensor([tokens]))
            text[0, 0] += prefix.summary[e]
            logits = generator.lm(inputs_embeds=torch.cat([embeds, text], 1)).logits[0, -1]
            logits[generator.banned + ([tokenizer.eos_id] if step == 0 else [])] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == tokenizer.eos_id:
                break
        assert tokenizer.decode(tokens) == answer


def test_order_of_selection_does_not_matter(tokenizer: LMTokenizer) -> None:
    generator, inputs = build(tokenizer).eval(), scene()
    ids, mask = tokenizer.encode(TEXTS)
    first = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).log_likelihood
    inputs["target_index"] = [t.flip(0) for t in inputs["target_index"]]
    assert torch.equal(first, generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).log_likelihood)


def test_order_of_instances_does_not_matter(tokenizer: LMTokenizer) -> None:
    generator, inputs = build(tokenizer).eval(), scene()
    ids, mask = tokenizer.encode(TEXTS)
    first = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).log_likelihood
    inputs["instance_masks"] = [m.flip(0) for m in inputs["instance_masks"]]
    sizes = [len(inputs["instance_masks"][int(b)]) for b in inputs["image_index"]]
    inputs["target_index"] = [n - 1 - t for n, t in zip(sizes, inputs["target_index"])]
    torch.testing.assert_close(first, generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).log_likelihood, rtol=1e-5, atol=1e-5)


def test_gradients_reach_features_and_adapters_but_not_the_base(tokenizer: LMTokenizer) -> None:
    generator, inputs = build(tokenizer, context_layers=1).double(), scene()
    trainable = {id(p) for p in generator.parameters() if p.requires_grad}
    with torch.no_grad():  # LoRA's B starts at zero and keeps gradients from A
        for parameter in filter(lambda p: p.requires_grad, generator.parameters()):
            parameter += torch.randn_like(parameter) * 0.02
    features = inputs["features"] = [f.double().requires_grad_() for f in inputs["features"]]
    ids, mask = tokenizer.encode(TEXTS)
    before = copy.deepcopy(generator.state_dict())
    generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss.backward()
    torch.optim.SGD(generator.parameters(), lr=1.0).step()
    assert all(f.grad is not None and f.grad.flatten(1).abs().amax(1).min() > 0 for f in features)  # of every image
    assert len(trainable) > 20
    for name, parameter in generator.named_parameters():
        base = name.startswith("lm.") and "lora_" not in name
        reached = parameter.grad is not None and parameter.grad.abs().max().item() > 1e-10
        assert (id(parameter) in trainable) == reached == (not base), name
        assert torch.equal(parameter, before[name]) == base, name


def test_distractors_and_image_tokens_are_seen(tokenizer: LMTokenizer) -> None:
    """Turning each kind of token off, or moving an object that is not selected, changes the likelihood."""
    ids, mask = tokenizer.encode(TEXTS)
    inputs = scene()
    lengths = {}
    for name, changes in {
        "all": {},
        "no_distractors": {"distractors": False},
        "no_image": {"image_grid": 0},
        "one": {"max_distractors": 1},
    }.items():
        generator = build(tokenizer, **changes).eval()
        lengths[name] = generator.prefix(**inputs).mask.sum(1).tolist()
    assert lengths["all"] == [4 + n for n in (3, 3, 5, 5, 5, 5, 2, 2)]
    assert lengths["no_distractors"] == [4 + n for n in (1, 2, 3, 1, 5, 2, 2, 1)]
    assert lengths["no_image"] == [3, 3, 5, 5, 5, 5, 2, 2]
    assert lengths["one"] == [4 + n for n in (2, 3, 4, 2, 5, 3, 2, 2)]
    generator = build(tokenizer).eval()
    first = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).log_likelihood
    inputs["instance_masks"][2][0] = inputs["instance_masks"][2][0].roll(5, 0)
    second = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).log_likelihood
    assert torch.equal(first[:6], second[:6]) and first[7] != second[7]


def test_distractor_dropout_hides_the_others_in_training_only(tokenizer: LMTokenizer) -> None:
    generator, inputs = build(tokenizer, distractor_dropout=0.5), scene()
    targets, everything = (torch.tensor(n) + 4 for n in ((1, 2, 3, 1, 5, 2, 2, 1), (3, 3, 5, 5, 5, 5, 2, 2)))
    seen = torch.stack([generator.prefix(**inputs).mask.sum(1) for _ in range(20)])
    assert bool(((seen == targets) | (seen == everything)).all())
    varied = seen[:, targets != everything]
    assert bool((varied.min(0).values < varied.max(0).values).all())
    assert generator.eval().prefix(**inputs).mask.sum(1).tolist() == everything.tolist()


def test_sampling_is_reproducible_and_varied(tokenizer: LMTokenizer) -> None:
    generator, inputs = build(tokenizer), scene()
    first = generator.generate_batch(**inputs, mode="sample", num_candidates=5, seed=1, max_new_tokens=5)
    assert first == generator.generate_batch(**inputs, mode="sample", num_candidates=5, seed=1, max_new_tokens=5)
    assert first != generator.generate_batch(**inputs, mode="sample", num_candidates=5, seed=2, max_new_tokens=5)
    assert all(len(set(answers)) > 1 for answers in first)
    assert generator.training


def test_small_chunks_give_the_same_answers(tokenizer: LMTokenizer) -> None:
    large, small, inputs = build(tokenizer).eval(), build(tokenizer, max_rows=4).eval(), scene()
    for mode, num in (("greedy", 1), ("sample", 3)):
        assert large.generate_batch(**inputs, mode=mode, num_candidates=num) == small.generate_batch(
            **inputs, mode=mode, num_candidates=num
        )


def test_stratified_uniforms_fill_every_part_once() -> None:
    values = stratified_uniforms(16, 30, 0)
    assert torch.equal((values * 16).floor().sort(0).values, torch.arange(16.0, dtype=torch.float64)[:, None].expand(16, 30))
    assert not torch.equal(values.argsort(0)[:, 0], values.argsort(0)[:, 1])


def test_prompt_stands_around_the_regions(tokenizer: LMTokenizer) -> None:
    plain, inputs = build(tokenizer).eval(), scene()
    asked = build(tokenizer, prompt="the {regions} objects").eval()
    extra = len(tokenizer.hf("the ", add_special_tokens=False)["input_ids"]) + len(
        tokenizer.hf(" objects", add_special_tokens=False)["input_ids"]
    )
    assert asked.prefix(**inputs).embeds.shape[1] == plain.prefix(**inputs).embeds.shape[1] + extra
    ids, mask = tokenizer.encode(TEXTS)
    assert not torch.equal(
        asked.likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss, plain.likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss
    )
    with pytest.raises(GrexError, match="regions"):
        build(tokenizer, prompt="no place")


def test_autocast_is_near_float32(tokenizer: LMTokenizer) -> None:
    generator, inputs = build(tokenizer, context_layers=1).eval(), scene()
    ids, mask = tokenizer.encode(TEXTS)
    exact = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs["features"] = [f.bfloat16() for f in inputs["features"]]
        rough = generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask).loss
        rough.backward()
        assert all(generator.generate_batch(**inputs))
    torch.testing.assert_close(rough.float(), exact, rtol=0.02, atol=0.02)


def test_bfloat16_weights_keep_exact_positions(tokenizer: LMTokenizer) -> None:
    """All weights in bfloat16, as under DeepSpeed: geometry stays exact, so an order of near objects is still seen."""
    generator = build(tokenizer).bfloat16().eval()
    mask = torch.zeros(2, 8, 1024, dtype=torch.bool)
    mask[0, :, 901:910] = mask[1, :, 900:909] = True
    objects = generator.region_tokens([torch.randn(1, 8, 2, 256).bfloat16(), torch.randn(1, 12, 1, 128).bfloat16()], [mask])
    assert objects.order.tolist() == [[1, 0]] and objects.tokens.dtype == torch.bfloat16
    inputs = scene() | {"features": [f.bfloat16() for f in scene()["features"]]}
    ids, mask_ids = tokenizer.encode(TEXTS)
    generator.likelihood(**inputs, lm_ids=ids, lm_mask=mask_ids).loss.backward()


def test_objects_as_boxes_in_training(tokenizer: LMTokenizer) -> None:
    """box_share 1 draws each object's box in training and leaves masks alone in evaluation."""
    generator, inputs = build(tokenizer, box_share=1.0), scene()
    inputs["instance_masks"][0][0, :, :] = torch.eye(32, 48, dtype=torch.bool)
    plain = build(tokenizer)
    a, b = generator.prefix(**inputs).embeds, plain.prefix(**inputs).embeds
    assert not torch.allclose(a[0], b[0])
    assert torch.equal(generator.eval().prefix(**inputs).embeds, plain.eval().prefix(**inputs).embeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_index": [torch.tensor([], dtype=torch.int64)]}, "object set 0 is empty"),
        ({"target_index": [torch.tensor([5])]}, "names object 5"),
        ({"target_index": [torch.tensor([0]), torch.tensor([0])]}, "2 object sets for 1"),
        ({"instance_masks": [torch.zeros(3, 32, 48, dtype=torch.bool)]}, "without a pixel"),
        ({"instance_masks": [torch.ones(3, 48, 32, dtype=torch.bool)]}, "48x32"),
        ({"instance_masks": []}, "masks of 0 images"),
    ],
)
def test_faulty_object_sets(tokenizer: LMTokenizer, change: dict, message: str) -> None:
    inputs = single(scene(), 0) | change
    with pytest.raises(GrexError, match=message):
        build(tokenizer).generate_batch(**inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 600}, "512 positions"),
        ({"mode": "guess"}, "guess"),
        ({"num_candidates": 3}, "3 candidates"),
        ({"mode": "sample", "temperature": 0.0}, "temperature"),
    ],
)
def test_faulty_modes(tokenizer: LMTokenizer, change: dict, message: str) -> None:
    with pytest.raises(GrexError, match=message):
        build(tokenizer).generate_batch(**single(scene(), 0), **change)


def test_boxes_stand_in_for_empty_masks(tokenizer: LMTokenizer) -> None:
    inputs = single(scene(), 0)
    full = torch.zeros(3, 32, 48, dtype=torch.bool)
    full[:, 8:16, 12:24] = True
    boxes = [torch.tensor([[18 / 48, 12 / 32, 12 / 48, 8 / 32]] * 3)]
    generator = build(tokenizer).eval()
    drawn = generator.prefix(**(inputs | {"instance_masks": [full]})).embeds
    empty = generator.prefix(**(inputs | {"instance_masks": [torch.zeros_like(full)]}), instance_boxes_norm=boxes).embeds
    torch.testing.assert_close(empty, drawn)


def test_state_dict_loads_strictly(tokenizer: LMTokenizer, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    first, second = build(tokenizer, seed=1).eval(), build(tokenizer, seed=2).eval()
    save_file({k: v.contiguous() for k, v in first.state_dict().items()}, tmp_path / "generator.safetensors")
    second.load_state_dict(load_file(tmp_path / "generator.safetensors"), strict=True)
    ids, mask = tokenizer.encode(TEXTS)
    assert torch.equal(
        first.likelihood(**scene(), lm_ids=ids, lm_mask=mask).loss, second.likelihood(**scene(), lm_ids=ids, lm_mask=mask).loss
    )
    state = first.state_dict()
    state.pop(next(k for k in state if "lora_A" in k))
    with pytest.raises(RuntimeError, match="lora_A"):
        second.load_state_dict(state, strict=True)
