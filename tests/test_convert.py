"""Released checkpoints: every key of the full sizes, the recorded nano networks and their training step, every way to be wrong."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_batch import RELEASED, make_batch

from grex_mllm.config import OptimConfig, load_config
from grex_mllm.convert.check import convert_check, load_grounding
from grex_mllm.convert.rela import convert_rela, differences, map_keys, new_name, recognise, shapes_of, unpacked_names
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.models.decoders.rela.criterion import RelaCriterion
from grex_mllm.models.grounding import GroundingModel
from grex_mllm.training.optim import build_optimizer, clip_gradients, optimized_parameters
from grex_mllm.types import GroundingOutput

SIZES = Path(__file__).parent / "data"
NANO = ["rela_nano_swin", "rela_nano_r50"]
FULL = ["swin_base", "swin_tiny", "r50"]
CUT = 2 * 2 * (9 + 9 + 1)  # tensors more than released: weight and bias of each attention are three here
RELEASED_OPTIM = OptimConfig(groups="released", text="released", lr=1e-5, clip=0.01, schedule="multistep")


@pytest.fixture(scope="session")
def nano(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Return (model folder, recorded tensors) of a nano network; unpacked and converted once."""
    made: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in made:
            folder, recorded = tmp_path_factory.mktemp(name), shared / "oracle" / name
            with lzma.open(recorded / "checkpoint.pth.xz") as packed, (folder / "released.pth").open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
            done = convert_rela(folder / "released.pth", folder / "model", SIZES / f"{name}.yaml", shared / "oracle/preprocess/vocab.txt")
            (folder / "released.pth").unlink()
            assert done.notes == [] and done.mapped > 500
            made[name] = folder / "model", torch.load(recorded / "oracle.pt", weights_only=True)
        return made[name]

    return get


def full_size(shared: Path, name: str) -> dict[str, torch.Tensor]:
    """Return a state dict with the keys, shapes and types of a released checkpoint; each tensor is one number, expanded."""
    keys = json.loads((shared / "oracle" / f"keys_{name}.json").read_text(encoding="utf-8"))
    return {key: torch.zeros((), dtype=getattr(torch, kind)).expand(shape) for key, shape, kind in keys}


@pytest.mark.parametrize("name", FULL)
def test_full_size_keys_and_shapes(shared: Path, name: str) -> None:
    state = full_size(shared, name)
    state["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    kind, config = recognise(state, "released")
    assert kind == name
    mapped, ignored = map_keys(state, "released")
    assert len(mapped) + sum(ignored.values()) == len(state) + CUT
    assert not any(differences(mapped, shapes_of(lambda: build_grounding(config.model))).values())


@pytest.mark.parametrize("name", NANO)
def test_recorded_tensors_agree(shared: Path, nano: Callable[[str], Any], name: str) -> None:
    said: list[str] = []
    assert convert_check(nano(name)[0], shared / "oracle" / name, said.append), "\n".join(line for line in said if "FAIL" in line)
    assert len(said) > 60 and sum("float64" in line for line in said) >= 10


def test_a_changed_weight_is_noticed(shared: Path, nano: Callable[[str], Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copy(nano("rela_nano_r50")[0] / "config.yaml", tmp_path)
    state = load_file(nano("rela_nano_r50")[0] / "model.safetensors")
    state["grounding.decoder.language_part.region_image.7.norm.bias"][3] += 1e-3
    save_file(state, tmp_path / "model.safetensors")
    said: list[str] = []
    assert not convert_check(tmp_path, shared / "oracle" / "rela_nano_r50", said.append)
    failed = {line.split()[1] for line in said if line.startswith("FAIL")}
    assert "decoder.7.RIA" in failed and "decoder.6.ffn" not in failed


def test_converted_folder_is_a_model(nano: Callable[[str], Any]) -> None:
    from grex_mllm.models.grex import GrexModel

    folder, recorded = nano("rela_nano_r50")
    model = GrexModel.from_pretrained(str(folder))
    image = recorded["inputs"][0]["image"].permute(1, 2, 0).numpy()
    result = model.ground(image, "the person on the left")
    assert result.mask.shape == image.shape[:2] and 0 <= result.no_target_prob <= 1


def whole(tensors: Mapping[str, Any], key: str) -> torch.Tensor:
    """Return what a released key stands for; queries, keys and values of an attention are tensors of their own here."""
    return torch.cat([tensors[name] for name in unpacked_names(str(new_name(key)))])


def forward_loss(model: GroundingModel, recorded: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Run the recorded training batch, all dropouts off."""
    samples = recorded["inputs"]
    image = torch.stack([sample["image"] for sample in samples])
    ids, mask = (torch.cat([sample[key] for sample in samples]) for key in ("lang_tokens", "lang_mask"))
    output: GroundingOutput = model(image, torch.arange(len(samples)), ids, mask)
    batch = make_batch(torch.cat([sample["gt_mask_merged"] for sample in samples]), [torch.zeros(0, 4) for _ in samples])
    batch.no_target = torch.tensor([bool(sample["empty"]) for sample in samples])
    return RelaCriterion(RELEASED)(output, batch)


@pytest.mark.parametrize("name", NANO)
def test_released_training_step(nano: Callable[[str], Any], name: str) -> None:
    folder, recorded = nano(name)
    train, model = recorded["train"], load_grounding(folder)
    losses = forward_loss(model, recorded)
    assert losses["total"].item() == pytest.approx(train["losses"]["loss_mask"], abs=1e-5 * 10)
    for ours, theirs in (("mask", "mask"), ("minimap", "minimap"), ("no_target", "nt")):
        assert losses[ours].item() == pytest.approx(train["ce_terms_unweighted"][theirs], abs=1e-5)
    losses["total"].backward()
    parameters = dict(model.named_parameters())
    largest = max(train["grad_norm"].values())
    for key, norm in train["grad_norm"].items():
        gradient = whole({name: parameter.grad for name, parameter in parameters.items()}, key)
        # biases before an instance norm, and of keys, have no gradient but rounding noise
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6 * largest), key
    optimizer = build_optimizer(model, RELEASED_OPTIM)
    assert_same_groups(optimizer, parameters, train["param_groups"])
    total = clip_gradients(optimized_parameters(optimizer), RELEASED_OPTIM.clip)
    assert total.item() == pytest.approx(train["total_grad_norm_over_optimized"], rel=1e-3)
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    optimizer.step()
    compared = [key for key in train["update_norm"] if train["grad_norm"][key] > 1e-6 * largest]
    assert len(compared) > 0.9 * len(train["update_norm"])
    for key in compared:  # Adam's first step is lr * sign(g) where g is well above eps
        mine = whole(parameters, key).detach() - whole(before, key)
        assert mine.norm().item() == pytest.approx(train["update_norm"][key], rel=0.02, abs=1e-7), key
    with torch.no_grad():
        after = forward_loss(model, recorded)["total"].item()
    assert after == pytest.approx(train["losses_after_step"]["loss_mask"], rel=0.01)


def assert_same_groups(optimizer: torch.optim.Optimizer, parameters: dict[str, Any], recorded: list[dict[str, Any]]) -> None:
    names = {id(parameter): name for name, parameter in parameters.items()}
    keys = ("lr", "weight_decay", "betas", "eps")
    ours = {names[id(p)]: tuple(group[key] for key in keys) for group in optimizer.param_groups for p in group["params"]}
    theirs = {
        own: tuple(group[key] for key in keys)
        for group in recorded
        for name in group["params"]
        for own in unpacked_names(str(new_name(name)))
    }
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != tuple(theirs[name])] == []


@pytest.mark.parametrize(
    ("name", "tensors", "groups"), [("swin_base", 692 - 1 + 160, 692), ("swin_tiny", 536 - 1 + 160, 536), ("r50", 358 - 1 + 160, 358)]
)
def test_full_size_optimises_as_many_tensors(shared: Path, name: str, tensors: int, groups: int) -> None:
    from accelerate import init_empty_weights

    _, config = recognise(full_size(shared, name), name)
    with init_empty_weights():
        model = build_grounding(config.model)
    tensors += CUT
    assert len(optimized_parameters(build_optimizer(model, RELEASED_OPTIM))) == tensors
    everything = optimized_parameters(build_optimizer(model, replace(RELEASED_OPTIM, text="all")))
    assert len(everything) == tensors + 37
    assert len(optimized_parameters(build_optimizer(model, replace(RELEASED_OPTIM, text="last_two")))) == tensors - 160 + 32


def spoil(state: dict[str, torch.Tensor], how: str) -> dict[str, Any]:
    key = "sem_seg_head.predictor.decoder_norm.weight"
    if how == "missing":
        del state[key]
    elif how == "extra":
        state["sem_seg_head.predictor.surprise.weight"] = torch.zeros(2)
    elif how == "shape":
        state[key] = torch.zeros(255)
    elif how == "nan":
        state[key] = torch.full((256,), float("nan"))
    elif how == "architecture":
        return {"model": {name: value for name, value in state.items() if name.startswith("backbone")}}
    elif how == "sizes":
        state["backbone.stem.conv1.weight"] = torch.zeros(8, 3, 7, 7)
    elif how == "entry":
        return {"model": state, "surprise": 1}
    return {"model": state}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", ["1 missing", "decoder.language_part.norm.weight"]),
        ("extra", ["1 unknown", "surprise.weight"]),
        ("shape", ["decoder.language_part.norm.weight (255,) for (256,)"]),
        ("nan", ["NaN", "1 tensors", "decoder.language_part.norm.weight"]),
        ("architecture", ["no RIA layers"]),
        ("sizes", ["other sizes", "--config"]),
        ("entry", ["surprise", "'model'"]),
    ],
)
def test_wrong_checkpoints_write_nothing(shared: Path, tmp_path: Path, how: str, words: list[str]) -> None:
    torch.save(spoil(full_size(shared, "r50"), how), tmp_path / "wrong.pth")
    with pytest.raises(GrexError) as caught:
        convert_rela(tmp_path / "wrong.pth", tmp_path / "deep" / "out")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["wrong.pth"]


def test_outputs_in_use_and_bad_vocabularies_are_refused(nano: Callable[[str], Any], shared: Path, tmp_path: Path) -> None:
    from grex_mllm.convert.folder import write_model_folder

    config = load_config(SIZES / "rela_nano_r50.yaml")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(GrexError, match="not empty"):
        write_model_folder(tmp_path / "used", config, {}, None)
    with pytest.raises(GrexError, match="does not exist"):
        write_model_folder(tmp_path / "out", config, {}, tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(401))), encoding="utf-8")
    with pytest.raises(GrexError, match="401 words"):
        write_model_folder(tmp_path / "out", config, {}, tmp_path / "vocab.txt")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["used", "vocab.txt"]
    with pytest.raises(GrexError, match=r"no config\.yaml"):
        convert_check(tmp_path / "used", shared)
    with pytest.raises(GrexError, match="recording"):
        convert_check(nano("rela_nano_r50")[0], tmp_path)
