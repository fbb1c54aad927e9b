"""What every entry of DECODERS must give, and the worked example: shapes, padding, batch = single, gradients, saving, bf16, a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_config
from torch import Tensor

from grex_mllm.config import load_config
from grex_mllm.data.collate import collate
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.entries import CONTRACTS, DECODERS, entry
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.loop import check
from grex_mllm.training.optim import build_optimizer
from grex_mllm.training.step import Step
from grex_mllm.types import Batch, GroundingOutput

EXAMPLE = "examples.decoder_example"
NAMES = [*DECODERS, EXAMPLE]
SMALL = {
    "rela": {"num_layers": 2, "minimap_side": 4, "width": 16, "num_heads": 2, "feedforward": 32, "mask_language_padding": "true"},
    "vlt": {
        "width": 16,
        "num_heads": 2,
        "feedforward": 32,
        "grid_side": 4,
        "num_queries": 5,
        "mask_widths": "[8, 8, 8]",
        "least_words": 1,
        "heads.minimap_side": 4,
    },
    "m3att": {"width": 16, "num_heads": 2, "feedforward": 32, "grid_side": 4, "mask_widths": "[8, 8, 8]", "heads.minimap_side": 4},
    "instance_selection": {"width": 16, "num_heads": 2, "feedforward": 32, "kept_regions": 6, "roi_channels": 8, "roi_size": 3},
    "isfp": {
        "width": 16,
        "segmentation_width": 16,
        "refinement_width": 8,
        "minimap_side": 4,
        "aspp_rates": "[1, 2]",
        "loss.least_iou": -1.0,
    },
    "lavt": {"width": 16, "heads.minimap_side": 4},
    "vlt_rela": {
        "width": 16,
        "num_heads": 2,
        "num_layers": 2,
        "feedforward": 32,
        "minimap_side": 4,
        "mask_language_padding": "true",
        "grid_side": 4,
        "encoder_layers": 1,
        "encoder_feedforward": 32,
    },
}
# what an entry needs of the other parts
SWIN = {"name": "swin", "embed_width": 8, "swin_depths": "[1, 1, 1, 1]", "swin_heads": "[1, 1, 2, 2]", "window": 4, "drop_path": 0.0}
AROUND: dict[str, dict[str, object]] = {
    "isfp": {"model__pixel_decoder__name": "fpn_levels"},
    "lavt": {"model__pixel_decoder__name": "top_down", "model__vision__fusion": "pwam", "model__vision__fusion_start": "open",
             **{f"model__vision__{field}": value for field, value in SWIN.items()}},
}  # fmt: skip
# adds the same number to all logits of a softmax
SILENT = re.compile(
    r".*(attention\.self\.key|image_part\.keys\.\d+|region_\w+\.\d+\.attention\.key|stages\.\d\.fusion\.(key|query|value|output))\.bias"
)  # those of a fusion but its key's are a shift before an instance norm
# words shifted all alike: nothing in a softmax, and gone with the norm after it, where only the fusion of an encoder reads them
SHIFTED_WORDS = {"lavt": {"grounding.text.bert.encoder.layer.0.output.LayerNorm.bias"}}
LEAST = 1e-12


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return request.param


def model_of(name: str) -> GrexModel:
    """A tiny model; language matters in it though a released projection starts at zero."""
    changes = {f"model__decoder__{field.replace('.', '__')}": value for field, value in SMALL.get(name, {}).items()}
    config = tiny_config(model__decoder__name=name, **changes, **AROUND.get(name, {}))
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(WORDS, config.model.text.vocab_size)
    config.model.text.vocab_size = tokenizer.vocab_size
    model = GrexModel(config, tokenizer)
    with torch.no_grad():
        for parameter in model.grounding.decoder.parameters():
            parameter += torch.randn_like(parameter) * 0.02
    return model.eval()


def batch_of(model: GrexModel, no_target: float = 0.3, num: int = 2) -> Batch:
    data = SyntheticDataset(SyntheticConfig(image_size=64, no_target_share=no_target), "train", 100, 4)
    return collate([data[i] for i in range(num)], model.encode_text, image_size=64)


def run(model: GrexModel, batch: Batch) -> GroundingOutput:
    return model.grounding(batch.image, batch.image_index, batch.text_ids, batch.text_mask, batch.input_sizes)


def own_tensors(output: GroundingOutput) -> dict[str, Tensor]:
    return {field: value for field, value in output._asdict().items() if isinstance(value, Tensor)}


def test_the_entry_has_the_names_of_the_contract(name: str) -> None:
    module = entry("model.decoder", name)
    assert all(hasattr(module, part) for part in CONTRACTS["model.decoder"][1])
    assert module.Config().name == name.rpartition(".")[2] and isinstance(model_of(name).config.model.decoder, module.Config)


def test_a_compact_form_answers_as_the_image_does(name: str) -> None:
    """What `grex search` keeps: half precision, no masks, and everything else as from the image itself."""
    model = model_of(name)
    decoder = model.grounding.decoder
    if not hasattr(decoder, "compact"):
        assert not hasattr(decoder, "restore")
        return
    batch = batch_of(model)
    with torch.no_grad():
        features = model.grounding.encode_image(batch.image, batch.input_sizes)
        text = model.grounding.encode_text(batch.text_ids, batch.text_mask)
        whole = decoder.language_part(features.decoded, batch.image_index, text)
        kept = decoder.compact(features.decoded)
        again = decoder.language_part(decoder.restore(kept), batch.image_index, text)
    assert all(len(tensor) == 2 and tensor.dtype in (torch.float16, torch.float32) for tensor in kept.values())
    assert again.mask_logits.numel() == 0
    for field, value in own_tensors(whole).items():
        if field != "mask_logits":
            torch.testing.assert_close(own_tensors(again)[field], value, atol=5e-3, rtol=5e-3)


def test_shapes(name: str) -> None:
    model = model_of(name)
    batch = batch_of(model)
    output, num = run(model, batch), len(batch.image_index)
    assert output.mask_logits.shape[:2] == (num, 2) and output.mask_logits.ndim == 4
    for field, rest in {"no_target_logits": (2,), "count_logits": (7,)}.items():
        value = getattr(output, field)
        assert value is None or value.shape == (num, *rest)
    assert (output.boxes_norm is None) == (output.box_logits is None)
    if output.boxes_norm is not None:
        assert output.box_logits is not None and output.boxes_norm.shape == (*output.box_logits.shape, 4)
        assert bool(((output.boxes_norm >= 0) & (output.boxes_norm <= 1)).all())
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    answer = model.ground(image, "the red circle")
    assert answer.mask.shape == (40, 60) and answer.count == answer.count and 0 <= answer.no_target_prob <= 1


def test_batch_equals_single_and_padding_is_not_read(name: str) -> None:
    model = model_of(name).double()
    batch = batch_of(model)
    with torch.no_grad():
        together = own_tensors(run(model, batch))
        longer = torch.nn.functional.pad(batch.text_ids, (0, 3), value=5), torch.nn.functional.pad(batch.text_mask, (0, 3))
        padded = own_tensors(model.grounding(batch.image, batch.image_index, *longer))
        for e in range(len(batch.image_index)):
            image = batch.image[batch.image_index[e]][None]
            alone = own_tensors(model.grounding(image, torch.tensor([0]), batch.text_ids[e : e + 1], batch.text_mask[e : e + 1]))
            for field, value in together.items():
                torch.testing.assert_close(alone[field][0], value[e], rtol=0, atol=1e-8)
    for field, value in together.items():
        torch.testing.assert_close(padded[field], value, rtol=0, atol=1e-8)


def test_gradients_reach_every_weight(name: str) -> None:
    model = model_of(name).double().train()
    step = Step(model, model.config)
    step(batch_of(model), 1.0)["total"].backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < LEAST]
    assert {n for n in silent if not SILENT.fullmatch(n)} == SHIFTED_WORDS.get(name, set())
    assert all(p.grad is not None for p in model.parameters())


def test_a_head_whose_loss_is_off_has_a_gradient_of_zero() -> None:
    """Else DDP would wait for it."""
    model = model_of("rela").train()
    weights = model.config.model.decoder.loss
    weights.no_target = weights.count = weights.box_l1 = weights.box_giou = weights.box_score = 0.0
    Step(model, model.config)(batch_of(model), 1.0)["total"].backward()
    heads = dict(model.grounding.decoder.language_part.heads.named_parameters())
    assert {name.split(".")[0] for name, p in heads.items() if not p.grad.any()} == {"no_target", "count", "box", "box_score"}


@pytest.mark.parametrize("share", [0.0, 0.95], ids=["all have a target", "hardly any has"])
def test_batches_with_and_without_targets_give_finite_losses(name: str, share: float) -> None:
    model = model_of(name).train()
    batch = batch_of(model, share)
    if share:
        kept = batch.no_target.nonzero().flatten()[:3]
        assert len(kept) > 0
        batch.image_index, batch.text_ids, batch.text_mask = (t[kept] for t in (batch.image_index, batch.text_ids, batch.text_mask))
        batch.gt_masks = batch.gt_masks[kept] if batch.gt_masks is not None else None
        batch.gt_count, batch.no_target = batch.gt_count[kept], batch.no_target[kept]
        batch.gt_boxes_norm, batch.target_index = (
            [values[i] for i in kept.tolist()] for values in (batch.gt_boxes_norm, batch.target_index)
        )
    terms = Step(model, model.config)(batch, 1.0)
    terms["total"].backward()
    assert all(bool(value.isfinite()) for value in terms.values())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_save_and_load(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path / "m")
    again = GrexModel.from_pretrained(tmp_path / "m")
    assert again.config.model.decoder == model.config.model.decoder
    batch = batch_of(model)
    with torch.no_grad():
        first, second = own_tensors(run(model, batch)), own_tensors(run(again, batch))
    assert first.keys() == second.keys() and all(torch.equal(first[field], second[field]) for field in first)


def test_bf16_follows_float32(name: str) -> None:
    model = model_of(name)
    batch = batch_of(model)
    with torch.no_grad():
        exact = run(model, batch).mask_logits
        with torch.autocast("cpu", torch.bfloat16):
            rough = run(model, batch).mask_logits
    assert rough.isfinite().all() and (rough.float() - exact).abs().mean() < 0.1 * exact.abs().mean() + 0.05


def test_a_step_of_its_criterion_lowers_the_loss(name: str) -> None:
    model = model_of(name).train()
    step = Step(model, model.config)
    batch = batch_of(model)
    optimizer = build_optimizer(model, model.config.train.optim)
    losses = []
    for _ in range(6):
        total = step(batch, 1.0)["total"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]


def test_a_knob_of_another_decoder_is_an_error() -> None:
    with pytest.raises(GrexError, match=r"model\.decoder\.kept_regions.*known here: boxes"):
        load_config(None, ["--model.decoder.name=rela", "--model.decoder.kept_regions=4"])
    with pytest.raises(GrexError, match=r'model\.decoder\.num_layers"; .*did you mean "image_layers"'):
        load_config(None, ["--model.decoder.name=instance_selection", "--model.decoder.num_layers=4"])
    with pytest.raises(GrexError, match=r"instance_selection, .*rela, .*or the dotted path"):
        load_config(None, ["--model.decoder.name=relay"])
    with pytest.raises(GrexError, match=r"no module no_such\b"):
        load_config(None, ["--model.decoder.name=no_such.module"])
    with pytest.raises(GrexError, match=r"a module without Config, Decoder, Criterion"):
        load_config(None, ["--model.decoder.name=grex_mllm.errors"])
    check(load_config(None, ["--model.decoder.loss.mask=3"]).train)


def test_a_model_folder_runs_no_module_that_nobody_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = (Path(__file__).parent / "examples" / "decoder_example.py").read_text(encoding="utf-8")
    (tmp_path / "planted_decoder.py").write_text(code + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.yaml").write_text("model: {decoder: {name: planted_decoder.x}}\n", encoding="utf-8")
    for name in ("model.safetensors", "text_tokenizer"):
        (tmp_path / "m" / name).mkdir()
    with pytest.raises(GrexError, match=r"planted_decoder\.x.*importing runs it; set GREX_MODULES=planted_decoder\.x"):
        GrexModel.from_pretrained(tmp_path / "m")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("GREX_MODULES", "another:planted_decoder.x")
    with pytest.raises(GrexError, match=r"no module planted_decoder\.x"):
        GrexModel.from_pretrained(tmp_path / "m")


def test_nothing_outside_an_entry_tests_its_name() -> None:
    """No general module names an entry, its classes or its type."""
    package = Path(entry("model.decoder", "rela").__file__ or "").parents[3]
    words = re.compile(r"\binstance_selection\b|['\"]rela['\"]|\bInstanceSelection\b|isinstance\([^)]*decoder")
    own = ("entries.py", "models/decoders", "convert/")
    files = {f.relative_to(package).as_posix(): f.read_text(encoding="utf-8") for f in package.rglob("*.py")}
    found = {name: words.findall(text) for name, text in files.items() if not name.startswith(own)}
    assert {file: hits for file, hits in found.items() if hits} == {"config.py": ['"rela"']}  # the default
