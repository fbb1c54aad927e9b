"""The generator on multimodal models of the real families: learning, files, each way to show objects, adapters, positions, batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_config
from tiny_mllms import KINDS, SIX, write_mllm

from grex_mllm.convert.adapters import export_adapters
from grex_mllm.data.collate import collate
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.data.transforms import selectable_instances
from grex_mllm.entries import entry
from grex_mllm.errors import GrexError
from grex_mllm.models.describe import describe_encoded
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.models.generators.mllm.network import rival_sets
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.multimodal.chat import Chat, Message
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.types import Batch, ExpressionRecord, Sample

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
QUICK = "qwen3-vl"
ALL = [name if name == QUICK else pytest.param(name, marks=pytest.mark.long) for name in SIX]
WAYS: list[dict[str, Any]] = [
    {"objects": "tokens"}, {"objects": "tokens", "maps": "own", "context_layers": 1}, {"objects": "tokens", "crops": 2},
    {"objects": "tokens", "maps": "own", "crops": 1}, {"objects": "marks"}, {"objects": "marks", "mark_style": "outlines", "crops": 1},
    {"objects": "coordinates"}, {"objects": "coordinates", "frame": "unit", "system": "Answer shortly."},
]  # fmt: skip
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    @cache
    def write(name: str) -> Path:
        return write_mllm(name, tmp_path_factory.mktemp(name), TEXTS * 2)

    return write


def build(folder: Path, work: Path, seed: int = 0, **changes: Any) -> GrexModel:
    fields = {"lm": str(folder), "projector_width": 32, "lora_rank": 8, "max_new_tokens": 24} | changes
    config = tiny_config(model__generator__name="mllm", **{f"model__generator__{key}": value for key, value in fields.items()})
    text = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = text.vocab_size
    module = entry("model.generator", "mllm")
    work.mkdir(exist_ok=True)
    module.make_tokenizer(config.model.generator, lambda: [], work)
    torch.manual_seed(seed)
    return GrexModel(config, text, module.load_tokenizer(config.model.generator, work))


@cache
def scenes() -> list[Sample]:
    """Three drawn scenes with eight object sets."""
    data = SyntheticDataset(SyntheticConfig(image_size=96), "train", 100, 2)
    chosen, made, texts = [s for s in (data[i] for i in range(30)) if len(selectable_instances(s.record)) > 3][:3], [], iter(TEXTS)
    for b, sample in enumerate(chosen):
        ids = [instance.annotation_id for instance in selectable_instances(sample.record)]
        sets = [[ids[0]], [ids[1], ids[2]], ids[:3]][: 3 if b < 2 else 2]
        image = sample.record.image_id
        expressions = [
            ExpressionRecord(f"{b}.{n}", f"{b}.{n}", image, t, t, s, "train", "made") for n, (s, t) in enumerate(zip(sets, texts))
        ]
        made.append(replace(sample, expressions=expressions))
    assert sum(len(sample.expressions) for sample in made) == len(TEXTS)
    return made


def batch_of(model: GrexModel, samples: list[Sample] | None = None) -> Batch:
    gather = partial(entry("model.generator", "mllm").collate, model.config.model.generator, model.generator.tokenizer)
    return collate(scenes() if samples is None else samples, model.encode_text, gather, image_size=64)


def maps_of(model: GrexModel, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return model.grounding.language_free(model.grounding.normalised(batch.image, batch.input_sizes))


def learn(model: GrexModel, steps: int, rate: float = 1e-2) -> float:
    model.generator.train()
    batch = batch_of(model)
    maps = maps_of(model, batch)
    parameters = [p for p in model.generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5) * (1 - step / steps)
        loss = model.generator(maps, batch)["total"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if loss.item() < 0.01:
            break
    model.eval()
    return loss.item()


def described(model: GrexModel, **options: Any) -> list[str]:
    """Describe the eight sets, image by image."""
    texts: list[str] = []
    for sample in scenes():
        instances = selectable_instances(sample.record)
        masks = np.stack([instance.mask for instance in instances])
        at = {instance.annotation_id: n for n, instance in enumerate(instances)}
        sets = [[at[target] for target in expression.targets] for expression in sample.expressions]
        given = {"mode": "greedy", "candidates": 1, "rerank": None} | options
        texts += [one.expression for one in describe_encoded(model, model.encode(sample.image), masks, sets, **given)]
    return texts


@pytest.mark.parametrize("name", ALL)
def test_learns_eight_sets_and_comes_back_from_its_folder(name: str, folder: Folder, tmp_path: Path) -> None:
    model = build(folder(name), tmp_path / "lm", lora_rank=16, projector_width=64)
    before = {key: value.clone() for key, value in model.generator.base.state_dict().items() if "lora_" not in key}
    assert learn(model, 150) < 0.05
    assert described(model) == TEXTS
    assert described(model, mode="beam", num_beams=3) == TEXTS
    after = model.generator.base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    model.save_pretrained(tmp_path / "m")
    stored = model.saved_state()
    assert sum(value.numel() for key, value in stored.items() if key.startswith("generator.lm.") and "lora_" not in key) == 0
    again = GrexModel.from_pretrained(tmp_path / "m")
    assert described(again) == TEXTS
    assert described(again, mode="sample", candidates=2, temperature=0.2) == described(model, mode="sample", candidates=2, temperature=0.2)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_the_selected_objects_are_seen_in_every_way(way: dict[str, Any], folder: Folder, tmp_path: Path) -> None:
    model = build(folder(QUICK), tmp_path / "lm", **way)
    model.generator.eval()
    batch = batch_of(model)
    terms = model.generator(maps_of(model, batch), batch)
    other = [
        replace(s, expressions=[replace(e, targets=s.expressions[n - 1].targets) for n, e in enumerate(s.expressions)]) for s in scenes()
    ]
    moved = batch_of(model, other)
    assert abs(float(model.generator(maps_of(model, moved), moved)["lm"]) - float(terms["lm"])) > 1e-3
    model.generator.train()
    model.generator(maps_of(model, batch), batch)["total"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.generator.parameters() if p.requires_grad)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
@pytest.mark.parametrize("name", [QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in KINDS if name != QUICK)])
def test_a_batch_is_its_sets_one_by_one(name: str, way: dict[str, Any], folder: Folder, tmp_path: Path) -> None:
    model = build(folder(name), tmp_path / "lm", max_new_tokens=5, **way).eval()
    batch = batch_of(model)
    nll, _ = model.generator.losses(maps_of(model, batch), batch, batch.generation)
    row = 0
    for sample in scenes():
        for expression in sample.expressions:
            one = batch_of(model, [replace(sample, expressions=[expression])])
            alone, _ = model.generator.losses(maps_of(model, one), one, one.generation)
            torch.testing.assert_close(alone.sum(), nll[row].sum(), rtol=1e-3, atol=1e-3)
            row += 1
    sample = scenes()[0]
    masks = np.stack([instance.mask for instance in selectable_instances(sample.record)])
    encoded, sets = model.encode(sample.image), [[0], [1, 2], [0, 1, 2]]
    maps = model.grounding.language_free(encoded.features)
    for mode, number in (("greedy", 1), ("sample", 3), ("beam", 2)):
        together = model.generator.generate(maps, encoded, masks, sets, mode=mode, num_candidates=number)
        assert together == [model.generator.generate(maps, encoded, masks, [one], mode=mode, num_candidates=number)[0] for one in sets]
    assert model.generator.generate(maps, encoded, masks, [[2, 1]]) == model.generator.generate(maps, encoded, masks, [[1, 2]])


def test_candidates_are_ranked_by_the_model_itself(folder: Folder, tmp_path: Path) -> None:
    """The model that has learned eight sets finds each text likelier for its own set than for those that differ in one object."""
    model = build(folder(QUICK), tmp_path / "lm", lora_rank=16, projector_width=64)
    learn(model, 150)
    sample = scenes()[0]
    masks = np.stack([instance.mask for instance in selectable_instances(sample.record)])
    encoded, sets = model.encode(sample.image), [[0], [1, 2], [0, 1, 2]]
    maps, own = model.grounding.language_free(encoded.features), TEXTS[:3]
    found = model.generator.agreements(maps, encoded, masks, sets, [own] * 3)
    assert all(max(range(3), key=row.__getitem__) == n and 0 < row[n] <= 1 for n, row in enumerate(found))
    value = model.generator.log_likelihoods(maps, encoded, masks, sets, own)
    nll, _ = model.generator.losses(maps_of(model, batch_of(model)), batch_of(model), batch_of(model).generation)
    torch.testing.assert_close(value, -nll.sum(1)[:3], atol=2e-2, rtol=2e-2)  # masks at the network input differ a little
    assert rival_sets([0, 2], 4) == [[0, 2, 1], [0, 2, 3], [2], [0], [1], [3]] and rival_sets([0], 1) == []
    assert described(model, rerank="own", candidates=3) == TEXTS


def test_beams_are_those_of_transformers(folder: Folder, tmp_path: Path) -> None:
    model = build(folder("gemma3"), tmp_path / "lm", objects="coordinates", max_new_tokens=6, lora_rank=1).eval()
    generator, sample = model.generator, scenes()[0]
    masks = np.stack([instance.mask for instance in selectable_instances(sample.record)])
    encoded = model.encode(sample.image)
    maps = model.grounding.language_free(encoded.features)
    questions, _, _, _ = generator._asked(maps, encoded, masks, [[0], [1, 2]], None)
    pixels = questions.tensors["pixel_values"][questions.group]
    types = (questions.ids == generator.tokenizer.family.image_id).long()
    end = generator.tokenizer.ends[0]
    theirs = generator.base.generate(
        input_ids=questions.ids, attention_mask=questions.mask, pixel_values=pixels, token_type_ids=types, do_sample=False, num_beams=4,
        num_return_sequences=3, min_new_tokens=1, max_new_tokens=6, suppress_tokens=generator.banned, eos_token_id=end, pad_token_id=end,
    )[:, questions.ids.shape[1] :].view(2, 3, -1)  # fmt: skip
    texts = [[generator.tokenizer.decode(row) for row in rows] for rows in theirs.tolist()]
    assert generator.generate(maps, encoded, masks, [[0], [1, 2]], mode="beam", num_beams=4, num_candidates=3) == texts


@pytest.mark.parametrize("name", KINDS)
def test_adapters_lie_in_the_language_part_alone(name: str, folder: Folder, tmp_path: Path) -> None:
    model = build(folder(name), tmp_path / "lm", objects="marks", lora_rank=2)
    adapted = {key.split(".lora_")[0] for key, _ in model.generator.lm.named_parameters() if "lora_" in key}
    assert len(adapted) == 2 * 7  # layers x (q, k, v, o, gate, up, down)
    assert all({"language_model", "text_model"} & set(key.split(".")) for key in adapted)
    trained = [key for key, p in model.generator.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(adapted) and all("lora_" in key for key in trained)


def test_adapters_in_named_parts(folder: Folder, tmp_path: Path) -> None:
    model = build(folder("qwen2.5-vl"), tmp_path / "lm", lora_parts=["language", "visual"], lora_targets=["q_proj", "qkv"], lora_rank=2)
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key, _ in model.generator.lm.named_parameters() if "lora_" in key}
    assert adapted == {"q_proj", "qkv"}
    batch = batch_of(model)
    model.generator(maps_of(model, batch), batch)["total"].backward()
    assert all(p.grad is not None for p in model.generator.parameters() if p.requires_grad)
    with pytest.raises(GrexError, match=r'lora_parts names "eyes", .*; expected names among language, visual'):
        build(folder("qwen2.5-vl"), tmp_path / "lm", lora_parts=["eyes"])
    with pytest.raises(GrexError, match=r"no layer called w_q in these parts; expected auto, or names among down_proj"):
        build(folder("qwen2.5-vl"), tmp_path / "lm", lora_targets="w_q")


@pytest.mark.parametrize("quantisation", ["nf4", pytest.param("int8", marks=pytest.mark.long)])
def test_a_quantised_base_learns(quantisation: str, folder: Folder, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = build(folder("qwen2.5-vl"), tmp_path / "lm", quantisation=quantisation)
    kept = [p.dtype for key, p in model.generator.base.named_parameters() if key.endswith("q_proj.base_layer.weight")]
    assert set(kept) == {torch.uint8 if quantisation == "nf4" else torch.int8}
    first = learn(model, 1)
    assert learn(model, 25) < 0.8 * first
    assert len(described(model)) == 8


def test_recomputing_gives_the_same_gradients(folder: Folder, tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        model = build(folder(QUICK), tmp_path / "lm", gradient_checkpointing=recompute)
        model.generator.train()
        batch = batch_of(model)
        model.generator(maps_of(model, batch), batch)["total"].backward()
        found.append([p.grad for p in model.generator.parameters() if p.requires_grad])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_a_question_is_the_template_with_the_objects_in_it(folder: Folder, tmp_path: Path) -> None:
    wanted = {"tokens": "Name exactly the marked objects", "marks": "objects marked 1 and 2 in the image", "coordinates": "objects at [",
              }  # fmt: skip
    for objects, words in wanted.items():
        model = build(folder("qwen2.5-vl"), tmp_path / objects, objects=objects, crops=2, system="Be brief.")
        questions = batch_of(model).generation.questions
        text = model.generator.tokenizer.tokenizer.decode(questions.ids[1][questions.mask[1].bool()])
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and text.endswith("<|im_start|>assistant\n") and words in text
        assert text.count("<|vision_start|>") == 3 and "The pictures after the first show them alone." in text
    own = build(folder("qwen2.5-vl"), tmp_path / "own", objects="coordinates", prompt="Boxes: {objects}. What?", frame="k1000")
    questions = batch_of(own).generation.questions
    assert "Boxes: [" in own.generator.tokenizer.tokenizer.decode(questions.ids[0])


@torch.no_grad()
def test_adapters_are_exported_for_other_programs(folder: Folder, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = build(folder(QUICK), tmp_path / "lm", objects="marks", lora_rank=2)
    for key, parameter in model.generator.lm.named_parameters():
        if "lora_B" in key:
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "m")
    chat = model.generator.tokenizer
    inputs = chat.inputs([[Message("user", (scenes()[0].image, "what?"))]])
    wanted = model.generator.base(**inputs).logits
    export_adapters(tmp_path / "m", tmp_path / "peft")
    plain = AutoModelForImageTextToText.from_pretrained(folder(QUICK))
    assert not torch.allclose(plain(**inputs).logits, wanted, atol=1e-2)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path / "peft").eval()(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    [line] = export_adapters(tmp_path / "m", tmp_path / "merged", merged=True).lines()
    assert "AutoModelForImageTextToText reads it" in line
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(**inputs).logits, wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(
        Chat.load(tmp_path / "merged").inputs([[Message("user", (scenes()[0].image, "what?"))]])["input_ids"], inputs["input_ids"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objects": "words"}, r'objects "words"; expected one of tokens, marks, coordinates'),
        ({"prompt": "What?"}, r"prompt 'What\?'; expected \{objects\} once"),
        ({"maps": "both"}, r'maps "both"; expected one of grounding, own'),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GrexError, match=message):
        MllmConfig(lm="x", **changes)


def test_faults_name_what_to_do(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r"a generator that learns nothing"):
        build(folder(QUICK), tmp_path / "lm", objects="marks", lora_rank=0)
    with pytest.raises(GrexError, match=r'frame "miles"; expected auto, or one of px'):
        batch_of(build(folder(QUICK), tmp_path / "lm", objects="coordinates", frame="miles"))
    with pytest.raises(GrexError, match=r"lm is not set"):
        build(Path(), tmp_path / "lm", lm="")
    model = build(folder(QUICK), tmp_path / "lm").eval()
    sample = scenes()[0]
    masks = np.stack([instance.mask for instance in selectable_instances(sample.record)])
    encoded = model.encode(sample.image)
    with pytest.raises(GrexError, match=r"object set 0 is empty"):
        model.generator.generate(model.grounding.language_free(encoded.features), encoded, masks, [[]])
