"""LAVT and the systems that put ReLA behind another front; their parts against direct transcriptions; the oracle rows by prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import WORDS, tiny_config
from torch import nn

from grex_mllm.config import OptimConfig, PixelDecoderConfig, VisionConfig, load_config
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.isfp.truth import cells_of_centres
from grex_mllm.models.decoders.lavt import Config, Decoder
from grex_mllm.models.feature_pyramid import LevelPyramid
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.pixel_decoder import build_pixel_decoder
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.models.top_down import TopDown
from grex_mllm.models.vision import build_vision
from grex_mllm.ops.masks import decode_rle
from grex_mllm.predict import predict_split
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.optim import build_schedule
from grex_mllm.types import DecoderInputs, PixelFeatures, TextFeatures

CHANNELS = (8, 16, 24, 32)
SWIN: dict[str, Any] = {"name": "swin", "embed_width": 8, "swin_depths": [1, 1, 1, 1], "swin_heads": [1, 1, 2, 2], "window": 4}


def maps() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, c, 32 // 2**i, 32 // 2**i) for i, c in enumerate(CHANNELS)]


def test_the_way_up_is_a_chain_of_concatenations() -> None:
    """[coarse resized with corners aligned ; fine], twice convolution, norm, ReLU, at strides 16, 8, 4."""
    net = TopDown(PixelDecoderConfig(width=16), CHANNELS).eval()
    given = maps()
    found = net(given)
    x = given[3]
    for number, fine in enumerate((given[2], given[1], given[0])):
        x = torch.cat([F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=True), fine], dim=1)
        first, norm, _, second, last, _ = net.joins[number]  # type: ignore[misc]
        x = F.relu(F.group_norm(F.conv2d(x, first.weight, padding=1), 8, norm.weight, norm.bias))
        x = F.relu(F.group_norm(F.conv2d(x, second.weight, padding=1), 8, last.weight, last.bias))
    torch.testing.assert_close(found.mask_features, x)
    assert [level.shape[-1] for level in found.levels] == [4, 8, 16] and found.mask_features.shape == (2, 16, 32, 32)
    assert torch.equal(found.levels[0], F.avg_pool2d(found.levels[1], 2))


def test_lavts_decoder_has_its_published_size() -> None:
    """Swin-B: 512 wide, 3 x 3, three joins of two convolutions, and the 1x1 to two classes."""
    net = TopDown(PixelDecoderConfig(width=512), (128, 256, 512, 1024))
    kernels = sum(p.numel() for p in net.parameters() if p.ndim == 4)
    assert kernels == 9 * 512 * ((1024 + 512) + (512 + 256) + (512 + 128) + 3 * 512)
    off = Config()
    off.heads.minimap = off.heads.no_target = off.heads.boxes = off.heads.count = False
    decoder = Decoder(off, DecoderInputs((1, 1, 1, 1), 512, 512, 768))
    assert sum(p.numel() for p in decoder.parameters()) == 2 * 512 + 2
    features = torch.randn(3, 512, 4, 4)
    index, text = torch.tensor([2, 0]), TextFeatures(torch.randn(2, 3, 768), torch.ones(2, 3, dtype=torch.int64))
    output = decoder.language_part(decoder.image_part([], PixelFeatures(features, [])), index, text)
    weight, bias = decoder.language_part.classes.weight[:, :, 0, 0], decoder.language_part.classes.bias
    torch.testing.assert_close(output.mask_logits, torch.einsum("kc,echw->ekhw", weight, features[index]) + bias[None, :, None, None])
    assert output.no_target_logits is output.boxes_norm is output.count_logits is output.minimap_logits is None


def test_a_pyramid_without_its_finest_map_leaves_nothing_without_a_gradient() -> None:
    net = build_pixel_decoder(PixelDecoderConfig(name="fpn_levels", width=16), CHANNELS)
    assert isinstance(net, LevelPyramid)
    found = net(maps())
    assert found.mask_features is found.levels[-1] and [level.shape[-1] for level in found.levels] == [4, 8, 16]
    vision = build_vision(VisionConfig(**SWIN), 8)
    vision.leave_out(1)
    assert isinstance(vision.norms[0], nn.Identity) and isinstance(vision.norms[1], nn.LayerNorm)
    split = build_vision(VisionConfig(**SWIN, patches=2), 8)
    split.leave_out(1)
    assert isinstance(split.net.norms[0], nn.Identity)


@pytest.mark.parametrize("start", ["closed", "open"])
def test_the_start_of_the_fusion(start: str) -> None:
    """ReLA: gates exactly zero, projections of deviation 0.02. LAVT: gates of deviation 0.02, projections as torch starts a layer."""
    torch.manual_seed(0)
    net = build_vision(VisionConfig(**SWIN | {"embed_width": 64}, fusion="pwam", fusion_start=start), 64)
    gates = torch.cat([p.flatten() for n, p in net.named_parameters() if ".gate." in n])
    projections = net.stages[3].fusion.visual.weight
    assert bool((gates == 0).all()) == (start == "closed")
    if start == "open":
        assert gates.std().item() == pytest.approx(0.02, rel=0.05)
        assert projections.std().item() == pytest.approx(1 / (3 * 512) ** 0.5, rel=0.05)  # uniform within 512 ** -0.5
    else:
        assert projections.std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(GrexError, match="closed or open"):
        build_vision(VisionConfig(**SWIN, fusion="pwam", fusion_start="ajar"), 8)


def test_a_polynomial_schedule_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, OptimConfig(schedule="poly"), 10)
    found = []
    for _ in range(11):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([(1 - t / 10) ** 0.9 for t in range(11)])
    assert build_schedule(optimizer, OptimConfig(schedule="poly", power=2.0), 10).lr_lambdas[0](5) == pytest.approx(0.25)


def test_lavt_is_refused_where_no_language_would_reach_it() -> None:
    with pytest.raises(GrexError, match=r"set model\.vision\.fusion to pwam"):
        check_combinations(load_config(None, ["--model.decoder.name=lavt", "--model.pixel_decoder.name=top_down"]))
    swin = ["--model.vision.name=swin", "--model.vision.fusion=pwam", "--model.decoder.name=lavt"]
    with pytest.raises(GrexError, match=r"set model\.pixel_decoder\.name to top_down"):
        check_combinations(load_config(None, swin))
    check_combinations(load_config(None, [*swin, "--model.pixel_decoder.name=top_down"]))


def isfp(folder: Path) -> Path:
    torch.manual_seed(0)
    config = tiny_config(model__decoder__name="isfp", model__decoder__minimap_side=4, model__decoder__segmentation_width=8,
                         model__decoder__refinement_width=8, model__decoder__refinement="false", model__decoder__selection="argmax",
                         model__pixel_decoder__name="fpn_levels")  # fmt: skip
    tokenizer = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = tokenizer.vocab_size
    GrexModel(config, tokenizer).save_pretrained(folder)
    return folder


def test_rows_with_the_ground_truth_are_predicted_by_a_setting(tmp_path: Path) -> None:
    """`predict.oracle: mask` gives true masks of objects alone; `location` the mask of the target's own cell, whatever the net says."""
    export(SyntheticConfig(image_size=64), "test", 3, tmp_path / "d", 4)
    model = str(isfp(tmp_path / "m"))
    lines = {}
    for kind in ("none", "location", "mask"):
        fields = [f"--predict.oracle={kind}", "--predict.no_target_threshold=1.0", "--predict.precision=fp32"]
        out = predict_split(model, str(tmp_path / "d"), tmp_path / f"{kind}.jsonl", "test", ["ground"], device="cpu", overrides=fields)
        lines[kind] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["expression_id"] for line in lines["none"]] == [line["expression_id"] for line in lines["mask"]]
    images = {line["image_id"]: line for line in map(json.loads, (tmp_path / "d" / "images.jsonl").read_text().splitlines())}
    known = {line["expression_id"]: line for line in map(json.loads, (tmp_path / "d" / "expressions.jsonl").read_text().splitlines())}
    net = GrexModel.from_pretrained(model)
    for at, by_mask in zip(lines["location"], lines["mask"], strict=True):
        record = known[at["expression_id"]]
        objects = {i["annotation_id"]: decode_rle(i["segmentation"]) for i in images[record["image_id"]]["instances"]}
        found = decode_rle(by_mask["mask_rle"])
        assert not found.any() or any(np.array_equal(found, mask) for mask in objects.values())
        if len(record["targets"]) != 1:
            continue
        file = tmp_path / "d" / "images" / images[record["image_id"]]["file"]
        file = file if file.is_file() else tmp_path / "d" / images[record["image_id"]]["file"]
        encoded = net.encode(file)
        with torch.no_grad():
            ids, mask = net.encode_text([record["raw"]])
            masks = net.grounding.ground(encoded.features, torch.tensor([0]), ids, mask).extra.cell_masks[0]
        cell = int(cells_of_centres(torch.from_numpy(objects[record["targets"][0]])[None], 4)[0])
        expected = F.interpolate(masks[cell][None, None], size=(64, 64), mode="bilinear", align_corners=False)[0, 0] > 0
        assert np.array_equal(decode_rle(at["mask_rle"]), expected.numpy()), record


def test_an_oracle_that_a_decoder_has_not_is_refused(tmp_path: Path) -> None:
    export(SyntheticConfig(image_size=64), "test", 1, tmp_path / "d", 1)
    with pytest.raises(GrexError, match="none or location or mask"):
        predict_split(str(isfp(tmp_path / "m")), str(tmp_path / "d"), tmp_path / "p.jsonl", "test", ["ground"], device="cpu",
                      overrides=["--predict.oracle=box"])  # fmt: skip
