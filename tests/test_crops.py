"""A closer look at every object: the crop by hand, what stays frozen, and the whole model with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_step import built
from tiny import tiny_config

from grex_mllm.config import load_config
from grex_mllm.encoders import VisionConfig
from grex_mllm.errors import GrexError
from grex_mllm.export.generator_graphs import check_generator_exportable
from grex_mllm.models.generators.region_tokens import crops as module
from grex_mllm.models.generators.region_tokens.crops import Crops, CropsConfig
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.vision import build_vision
from grex_mllm.training.start import adopt_start, start_from
from grex_mllm.training.step import Step, freeze_but_projector
from grex_mllm.types import Batch

TINY = VisionConfig(block="basic", stem="conv3", norm="group", stem_width=8, widths=[8, 16, 16, 24], depths=[1, 1, 1, 1])
FLAGS: dict[str, object] = {
    "model__generator__crops__size": 32, "model__generator__crops__vision__block": "basic",
    "model__generator__crops__vision__stem": "conv3", "model__generator__crops__vision__norm": "group",
    "model__generator__crops__vision__stem_width": 8, "model__generator__crops__vision__widths": [8, 16, 16, 24],
    "model__generator__crops__vision__depths": [1, 1, 1, 1],
}  # fmt: skip


def closer(size: int = 64, margin: float = 1.6, name: str = "efficientnet_lite0") -> Crops:
    torch.manual_seed(0)
    crops = Crops(CropsConfig(size, margin, VisionConfig(name=name) if name != "resnet" else TINY))
    with torch.no_grad():
        for parameter in crops.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return crops


def rectangles(boxes: list[tuple[int, int, int, int]], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of boxes xyxy with their lower right quarter left out, and the boxes."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
        mask[(y1 + y2) // 2 : y2 - 1, (x1 + x2) // 2 : x2 - 1] = False
    return masks, torch.tensor(boxes, dtype=torch.float32)[None]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet"])
def test_a_crop_of_the_image_is_read_and_pooled_under_the_mask(name: str) -> None:
    """Boxes of which a crop at the image's own resolution is a slice of it, the second one beyond two borders."""
    crops = closer(name=name)
    masks, boxes = rectangles([(30, 20, 70, 60), (70, 50, 110, 90)], 92, 120)
    image = torch.randn(1, 3, 92, 120)
    found = crops(image, [masks], boxes)
    padded, shown = (torch.nn.functional.pad(tensor, (0, 64, 0, 64)) for tensor in (image[0], masks.float()))
    for number, (x, y) in enumerate(((18, 8), (58, 38))):
        maps = crops.vision(padded[None, :, y : y + 64, x : x + 64], None)[1:]
        mask = shown[number, y : y + 64, x : x + 64]
        for level, got in zip(maps, found, strict=True):
            part = 64 // level.shape[-1]
            weight = mask.reshape(level.shape[-2], part, level.shape[-1], part).mean((1, 3))
            assert 0 < weight.mean() < 1
            torch.testing.assert_close(got[0, number], (level[0] * weight).sum((1, 2)) / weight.sum(), atol=1e-4, rtol=1e-3)
    assert [level.shape[-1] for level in found] == crops.channels == list(crops.vision.channels[1:])


def test_masks_need_not_cover_the_padding() -> None:
    """The image is padded to the coarsest stride of its own encoder, objects are drawn without that; neither changes what a crop shows."""
    crops = closer(32, 1.3)
    masks, boxes = rectangles([(30, 20, 70, 60), (80, 50, 100, 80)], 84, 100)
    image = torch.randn(1, 3, 84, 100)
    whole = torch.nn.functional.pad(image, (0, 28, 0, 12))
    for plain, padded, both in zip(
        crops(image, [masks], boxes),
        crops(whole, [masks], boxes),
        crops(whole, [torch.nn.functional.pad(masks, (0, 28, 0, 12))], boxes),
        strict=True,
    ):
        torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(both, plain, atol=1e-4, rtol=1e-3)


def test_a_small_object_is_enlarged_with_more_around_it() -> None:
    crops = closer(64, 2.0)
    places = crops._places(torch.tensor([[50.0, 40.0, 54.0, 43.0], [10.0, 10.0, 30.0, 50.0]]), torch.Size([80, 100]))
    across, down = (places[..., 0] + 1) * 50, (places[..., 1] + 1) * 40
    spacing = across[:, 0, 1:] - across[:, 0, :-1]
    torch.testing.assert_close(spacing[:, 0], torch.tensor([2 * 12 / 64, 2 * 40 / 64]))  # 12 pixels at the least; the longer side
    torch.testing.assert_close(spacing, spacing[:, :1].expand_as(spacing), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(across.mean((1, 2)), torch.tensor([52.0, 20.0]))
    torch.testing.assert_close(down.mean((1, 2)), torch.tensor([41.5, 30.0]))
    assert down[0, 0].unique().numel() == 1 and down[0, :, 0].diff().min() > 0


def test_batches_chunks_and_absent_objects_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crops = closer(32, 1.3)
    torch.manual_seed(1)
    images = torch.randn(3, 3, 64, 96)
    first, one = rectangles([(0, 0, 9, 30), (40, 8, 90, 60), (3, 3, 60, 40), (80, 50, 96, 64), (20, 20, 23, 24)], 64, 96)
    second, two = rectangles([(5, 5, 50, 50), (30, 10, 60, 30)], 64, 96)
    second[1] = False  # without a pixel
    two[0, 1] = 0
    boxes = torch.zeros(3, 5, 4)
    boxes[0], boxes[1, :2] = one[0], two[0]
    together = crops(images, [first, second, first[:0]], boxes)
    monkeypatch.setattr(module, "AT_ONCE", 2)
    for whole, alone, other in zip(together, crops(images[:1], [first], one), crops(images[1:2], [second], two), strict=True):
        torch.testing.assert_close(whole[:1], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole[1:2, :2], other, atol=1e-5, rtol=1e-4)
        assert not whole[1, 1:].any() and not whole[2].any() and whole.isfinite().all()


def test_a_closer_look_never_learns() -> None:
    crops = closer(32, 1.3, "resnet").train()
    assert not crops.vision.training and not any(p.requires_grad for p in crops.parameters())
    masks, boxes = rectangles([(5, 5, 50, 50)], 64, 96)
    found = crops(torch.randn(1, 3, 64, 96, requires_grad=True), [masks], boxes)
    assert not any(level.requires_grad for level in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 16}, "size 16 and margin 1.3; expected a size of at least 32"),
        ({"margin": 0.5}, "size 32 and margin 0.5; expected a size of at least 32"),
        ({"vision": VisionConfig(name="swin", fusion="pwam")}, "crops.vision with fusion"),
        ({"vision": VisionConfig(name="none")}, 'model.vision.name "none"'),
        ({"vision": VisionConfig(weights="no/such.safetensors")}, "no/such.safetensors"),
    ],
)
def test_what_cannot_look_says_so(changes: dict[str, object], message: str) -> None:
    with pytest.raises(GrexError, match=message.replace("(", r"\(")):
        Crops(CropsConfig(**({"size": 32, "vision": TINY} | changes)))


def maps_of(model: GrexModel, batch: Batch) -> list[torch.Tensor]:
    return [m.detach() for m in model.grounding.language_free(model.grounding.encode_image(batch.image, batch.input_sizes))]


def test_the_generator_sees_what_only_the_crop_shows(tmp_path: Path) -> None:
    """Other pixels under the same maps change the tokens of the objects there, and no others; every weight that learns has a gradient."""
    model, batches = built("words", tmp_path, model__generator__ranks=True, model__generator__image_grid=1, **FLAGS)
    batch, generator = batches.at(0), model.generator
    maps = maps_of(model, batch)
    assert maps[-1].shape[1] == 3 and len(maps) == len(model.feature_channels) + 1
    generator(maps, batch)["total"].backward()
    frozen = [name for name, p in generator.named_parameters() if name.startswith("crops.")]
    assert frozen and all(generator.get_parameter(name).grad is None for name in frozen)
    silent = [name for name, p in generator.region_tokens.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [name for name in silent if not name.startswith("count")]  # no set of so many
    generator.eval()
    given = (batch.instance_masks, torch.tensor(batch.input_sizes), batch.instance_boxes_norm)
    before = generator.objects(maps, *given).tokens
    image = next(i for i, masks in enumerate(batch.instance_masks) if len(masks) > 1)
    dark = maps[-1].clone()
    dark[image] += batch.instance_masks[image][0] * torch.randn(dark.shape[-2:])
    after = generator.objects([*maps[:-1], dark], *given).tokens
    moved = ((after - before).abs().amax(-1) > 1e-4).nonzero().tolist()
    assert [image, 0] in moved and all(b == image for b, _ in moved)
    other = torch.randn_like(maps[0])
    assert not torch.allclose(generator.objects([other, *maps[1:]], *given).tokens, before)  # the maps count as well


def test_align_learns_the_projector_beside_a_frozen_look(tmp_path: Path) -> None:
    model, batches = built("words", tmp_path, train__tasks="align", **FLAGS)
    freeze_but_projector(model)
    learning = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"region_tokens"}
    Step(model, model.config)(batches.at(0))["total"].backward()
    assert all(p.grad is None for p in model.generator.crops.parameters())


def test_a_model_folder_holds_the_encoder_of_the_crops(tmp_path: Path) -> None:
    """The file that its weights came from may be gone; a training that starts from the folder needs it no more than a prediction."""
    from safetensors.torch import save_file

    torch.manual_seed(3)
    weights = tmp_path / "parts" / "encoder.safetensors"
    weights.parent.mkdir()
    save_file(build_vision(TINY, 0).state_dict(), str(weights))
    flags = FLAGS | {"model__generator__crops__vision__weights": str(weights)}
    model, _ = built("generate", tmp_path, **flags)
    model.eval().save_pretrained(tmp_path / "model")
    weights.unlink()
    again = GrexModel.from_pretrained(tmp_path / "model")
    picture, masks = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8), np.zeros((2, 48, 64), bool)
    masks[0, 5:30, 8:20] = masks[1, 20:40, 30:60] = True
    assert again.describe(picture, masks=list(masks)) == model.describe(picture, masks=list(masks))
    for ours, theirs in zip(again.generator.crops.parameters(), model.generator.crops.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    config = load_config(tmp_path / "model" / "config.yaml")
    assert config.model.generator.crops.vision.weights == str(weights)
    config.train.start = str(tmp_path / "model")
    adopt_start(config)
    torch.manual_seed(4)
    started = GrexModel(config, again.text_tokenizer, again.generator.tokenizer)
    assert start_from(started, config.train.start) == []
    assert all(torch.equal(p, q) for p, q in zip(started.generator.crops.parameters(), model.generator.crops.parameters(), strict=True))


def test_a_start_without_crops_leaves_their_weights_named(tmp_path: Path) -> None:
    model, _ = built("generate", tmp_path)
    model.save_pretrained(tmp_path / "model")
    config = tiny_config(model__generator__crops__vision__weights="encoder.safetensors", train__start=tmp_path / "model", **FLAGS)
    adopt_start(config)
    assert config.model.generator.crops.vision.weights == "encoder.safetensors"


def test_crops_are_not_exported(tmp_path: Path) -> None:
    model, _ = built("generate", tmp_path, **FLAGS)
    with pytest.raises(GrexError, match=r"model\.generator\.crops; expected a generator without"):
        check_generator_exportable(model)
