"""Every shipped configuration loads, says how it is run, and trains a step at tiny size; a released model starts a joint one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_batch import make_batch
from shrink import LANGUAGE_MODELS, MULTIMODAL_MODELS, shrink, shrink_run, write_language_models
from tiny import WORDS
from torch import Tensor

from grex_mllm.config import Config, load_config, name_no_parts
from grex_mllm.entries import entry
from grex_mllm.errors import GrexError
from grex_mllm.estimate.model import Load, made_batch
from grex_mllm.models import build_grounding
from grex_mllm.models.answer import answers
from grex_mllm.models.decoders.rela.criterion import RelaCriterion
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.optim import build_optimizer, build_schedule, clip_gradients, optimized_parameters
from grex_mllm.training.step import Step
from grex_mllm.types import Batch

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
RELEASED = ("gres_rela_r50", "gres_rela_swin_tiny", "gres_rela_swin_base")
SIZE = 64


def tiny_batch() -> Batch:
    """Two expressions, one of them without target."""
    torch.manual_seed(0)
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    masks[0, 8:40, 16:48] = True
    batch = make_batch(masks, [torch.tensor([[0.5, 0.375, 0.5, 0.5]]), torch.zeros(0, 4)])
    batch.image = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    batch.text_ids = torch.randint(1, 30, (2, 7))
    batch.text_mask = torch.ones(2, 7, dtype=torch.int64)
    batch.text_mask[1, 4:] = 0
    batch.instance_masks = [masks[0][None], torch.zeros(0, SIZE, SIZE, dtype=torch.bool)]
    return batch


def criterion(config: Config) -> Any:
    return entry("model.decoder", config.model.decoder.name).Criterion(config.model.decoder)


def grounding_terms(config: Config, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
    output = model(batch.image, batch.image_index, batch.text_ids, batch.text_mask)
    return criterion(config)(output, batch)


def test_there_are_configurations() -> None:
    assert len(FILES) >= 20 and {f"{name}.yaml" for name in RELEASED} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_configuration_trains_a_step(file: Path) -> None:
    config = shrink(load_config(file))
    torch.manual_seed(0)
    model, batch = build_grounding(config.model).train(), tiny_batch()
    scales = config.train.optim.lr_scale  # the generator's have no parameter here
    own = {start.removeprefix("grounding."): scale for start, scale in scales.items() if start.partition(".")[0] != "generator"}
    config.train.optim.lr_scale = own
    optimizer = build_optimizer(model, config.train.optim)
    schedule = build_schedule(optimizer, config.train.optim, config.train.steps)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    terms = grounding_terms(config, model, batch)
    terms["total"].backward()
    chosen = {id(parameter) for parameter in optimized_parameters(optimizer)}
    assert torch.isfinite(clip_gradients(optimized_parameters(optimizer), config.train.optim.clip))
    optimizer.step()
    schedule.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(id(parameter) in chosen for name, parameter in model.named_parameters() if name in moved)
    model.eval()
    with torch.no_grad():
        output = model(batch.image, batch.image_index, batch.text_ids, batch.text_mask)
        assert torch.isfinite(criterion(config)(output, batch)["total"])
    results = answers(output, ["a", "b"], batch.geometries, (SIZE, SIZE), config.predict)
    assert len(results) == 2


WITH_LM = [file for file in FILES if getattr(load_config(file).model.generator, "lm", "tiny") != "tiny"]


@pytest.fixture(scope="module")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_language_models({name: folder / name for name in (*LANGUAGE_MODELS, *MULTIMODAL_MODELS)})
    return folder


@pytest.mark.parametrize(
    "file",
    [
        file
        if file.stem in ("joint_rela_swin_base_qwen2.5_7b_qlora", "joint_rela_r50_qwen2.5_0.5b", "generator_qwen2.5_vl_3b")
        else pytest.param(file, marks=pytest.mark.long)
        for file in WITH_LM
    ],
    ids=lambda file: file.stem,
)
def test_joint_configuration_trains_every_part(file: Path, language_models: Path, tmp_path: Path) -> None:
    """A step of both tasks moves the adapters, the region tokens and every part of the grounding model that is not frozen, not the base."""
    config = shrink_run(load_config(file))
    config.model.generator.lm = str(language_models / Path(config.model.generator.lm).name)
    chosen_entry = entry("model.generator", config.model.generator.name)
    chosen_entry.make_tokenizer(config.model.generator, lambda: WORDS, tmp_path)
    name_no_parts(config)
    torch.manual_seed(0)
    tokenizer, words = chosen_entry.load_tokenizer(config.model.generator, tmp_path), train_text_tokenizer(WORDS, 200)
    model = GrexModel(config, words, tokenizer)
    step, alone = Step(model, config), config.train.optim.frozen == ["grounding"]
    optimizer = build_optimizer(model, config.train.optim)
    chosen = {id(parameter) for parameter in optimized_parameters(optimizer)}
    assert {group["lr"] for group in optimizer.param_groups} == ({1e-4} if alone else {1e-5, 3e-5, 1e-4})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    base = [name for name, parameter in model.generator.lm.named_parameters() if id(parameter) in chosen]
    assert base and all("lora_" in name for name in base)
    batch = made_batch(config, model, Load(2, objects=3, tokens=6))
    step(batch)["total"].backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if name in before and not torch.equal(parameter, before[name])}
    parts = {".".join(name.split(".")[:2]) for name in moved}
    grounding = {"grounding.vision", "grounding.text", "grounding.pixel_decoder", "grounding.decoder"}
    assert parts == {"generator.lm", "generator.region_tokens"} | (set() if alone else grounding)


def test_there_is_a_configuration_for_every_language_model() -> None:
    named = {Path(load_config(file).model.generator.lm).name for file in WITH_LM}
    assert named == {*LANGUAGE_MODELS, *MULTIMODAL_MODELS} and "joint_rela_swin_base_qwen2.5_7b" in {file.stem for file in WITH_LM}


@pytest.mark.parametrize("file", [file for file in FILES if load_config(file).model.decoder.name == "rela"], ids=lambda file: file.stem)
def test_weighted_terms_are_the_heads_that_exist(file: Path) -> None:
    config = shrink(load_config(file))
    names = set(grounding_terms(config, build_grounding(config.model), tiny_batch())) - {"total"}
    weights = ("mask", "minimap", "no_target", "box_l1", "box_giou", "box_score", "count")
    assert names == {name for name in weights if getattr(config.model.decoder.loss, name)}
    assert ("box_l1" in names) == config.model.decoder.boxes and ("count" in names) == config.model.decoder.count


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_what_conversion_writes(name: str) -> None:
    from grex_mllm.convert.rela import BACKBONES, released_config

    ours, converted = load_config(FOLDER / f"{name}.yaml"), released_config(BACKBONES[name.removeprefix("gres_rela_")])
    ours.model.vision.weights = ours.model.text.path = None
    assert ours.model == converted.model and ours.train.optim == converted.train.optim
    assert (ours.train.steps, ours.train.batch_images) == (converted.train.steps, converted.train.batch_images)


def test_ablations_change_what_they_name() -> None:
    """The rows of one table differ from the full model in the one thing."""
    full = load_config(FOLDER / "gres_rela_swin_base.yaml")
    for name, change in (
        ("ria_pooled", ("ria", "pooled")),
        ("rla_none", ("rla", "none")),
        ("rla_language", ("rla", "language")),
        ("rla_region", ("rla", "region")),
        ("regions_4", ("minimap_side", 4)),
        ("regions_8", ("minimap_side", 8)),
        ("regions_12", ("minimap_side", 12)),
    ):
        row = load_config(FOLDER / f"ablation_{name}.yaml")
        assert getattr(row.model.decoder, change[0]) == change[1]
        setattr(row.model.decoder, change[0], getattr(full.model.decoder, change[0]))
        assert row == full
    row = load_config(FOLDER / "ablation_ria_hard_split.yaml")
    assert row.model.vision.patches == full.model.decoder.minimap_side and row.model.decoder.ria == "pooled"
    row.model.vision.patches, row.model.decoder.ria = 0, "attention"
    assert row == full
    row = load_config(FOLDER / "ablation_ria_no_minimap.yaml")
    assert row.model.decoder.loss.minimap == 0
    row.model.decoder.loss.minimap = full.model.decoder.loss.minimap
    assert row == full


def test_options_change_what_they_name() -> None:
    """Each differs from the full model in the option alone, which is off there."""
    for name, full, changes in (
        ("focal", "gres_rela_swin_base", {"model.decoder.loss.hard.focal_gamma": 2.0}),
        ("hard_pixels", "gres_rela_swin_base", {"model.decoder.loss.hard.pixels": 0.25}),
        ("hard_masks", "gres_rela_swin_base", {"model.decoder.loss.hard.masks": 0.5}),
        ("regions_by_image", "gres_rela_swin_base", {"model.decoder.minimap_side": 16, "model.decoder.region_sides": [4, 8, 16]}),
        ("batch_norm", "res_vlt_darknet53", {"model.map_norm": "batch"}),
        ("distill", "gres_rela_r50", {"loss.distill": 1.0, "train.teacher": "models/rela-swin-base"}),
    ):
        row, plain = load_config(FOLDER / f"option_{name}.yaml"), load_config(FOLDER / f"{full}.yaml")
        assert row != plain
        for field, value in changes.items():
            *path, last = field.split(".")
            ours, theirs = row, plain
            for part in path:
                ours, theirs = getattr(ours, part), getattr(theirs, part)
            assert getattr(ours, last) == value
            setattr(ours, last, getattr(theirs, last))
        assert row == plain


def test_the_table_names_every_configuration() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in FILES if f"`{file.name}`" not in table] == []


def test_a_released_model_starts_a_joint_one_without_its_new_heads(tmp_path: Path) -> None:
    from grex_mllm.training.start import describe_new, start_from

    tokenizer = train_text_tokenizer(["two red circles", "the blue square"], 200)
    released = GrexModel(shrink(load_config(FOLDER / "gres_rela_r50.yaml")), tokenizer)
    released.save_pretrained(tmp_path / "released")
    joint = GrexModel(shrink(load_config(FOLDER / "joint_rela_r50.yaml")), tokenizer)
    new = start_from(joint, tmp_path / "released")
    assert {name.split(".")[4] for name in new} == {"box", "box_score", "count"}
    assert (
        describe_new(new)
        == "new, as built: decoder.language_part.heads.box (6 tensors), decoder.language_part.heads.box_score (2 tensors), "
        "decoder.language_part.heads.count (4 tensors)"
    )
    theirs, ours = released.saved_state(), joint.saved_state()
    assert set(ours) - set(theirs) == set(new) and all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert describe_new(start_from(joint, tmp_path / "released")[:0]) == "every tensor was there"
    joint.save_pretrained(tmp_path / "joint")
    with pytest.raises(GrexError, match=r"12 superfluous: grounding\.decoder\.language_part\.heads"):
        start_from(released, tmp_path / "joint")
    with pytest.raises(GrexError, match="has no model"):
        start_from(joint, tmp_path)


def test_loss_weights_without_heads_are_refused() -> None:
    config = shrink(load_config(FOLDER / "gres_rela_r50.yaml"))
    config.model.decoder.loss.count = 1.0
    with pytest.raises(GrexError, match=r"decoder\.count"):
        batch = tiny_batch()
        RelaCriterion(config.model.decoder)(
            build_grounding(config.model)(batch.image, batch.image_index, batch.text_ids, batch.text_mask), batch
        )
