"""Masks from answers: filled boxes, polygons, and tiny random SAM models made from configuration classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import mask_to_box_xyxy, segmentation_to_mask
from grex_mllm.zeroshot.base import Picture
from grex_mllm.zeroshot.parsing import Parsed
from grex_mllm.zeroshot.segmenters import Boxes, Polygons, Prompted, Segmenter, box_mask, check_segmenter, open_segmenter

SIDE = 64  # of the tiny models' square


def picture(width: int = 48, height: int = 36, seed: int = 0) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def boxes(*rows: tuple[float, float, float, float]) -> Parsed:
    return Parsed("ok", boxes_xyxy=np.array(rows, np.float64))


def write_sam(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8, "mlp_dim": 32,
              "output_channels": 16, "global_attn_indexes": [1], "window_size": 4, "num_pos_feats": 8}  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": SIDE, "patch_size": 8, "image_embedding_size": SIDE // 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 2}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    transformers.SamModel(config).eval().save_pretrained(folder)
    size = {"size": {"longest_edge": SIDE}, "pad_size": {"height": SIDE, "width": SIDE}}
    transformers.SamImageProcessorPil(**size).save_pretrained(folder)
    return folder


def write_sam2(folder: Path) -> Path:
    torch.manual_seed(0)
    backbone = {"hidden_size": 8, "num_attention_heads": 1, "image_size": [SIDE, SIDE], "blocks_per_stage": [1, 1, 2, 1],
                "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4],
                "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 2]}  # fmt: skip
    vision = {"backbone_config": {"model_type": "sam2_hiera_det_model"} | backbone, "backbone_channel_list": [64, 32, 16, 8],
              "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 16, "num_pos_feats": 8}  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16, "num_hidden_layers": 2}
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    transformers.Sam2Model(config).eval().save_pretrained(folder)
    settings = '{"image_processor_type": "Sam2ImageProcessor", "size": {"height": 64, "width": 64}, '
    settings += '"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    (folder / "preprocessor_config.json").write_text(settings, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sam": write_sam(tmp_path_factory.mktemp("sam")), "sam2": write_sam2(tmp_path_factory.mktemp("sam2"))}


def test_a_box_holds_the_pixels_whose_centre_lies_in_it() -> None:
    for box, rows, columns in (
        ((1.0, 2.0, 3.0, 5.0), range(2, 5), range(1, 3)),
        ((1.5, 2.4, 3.4, 4.6), range(2, 5), range(1, 3)),  # centres 1.5 and 2.5; 2.5 to 4.5
        ((-3.0, -1.0, 0.4, 99.0), range(0), range(0)),
        ((8.0, 5.0, 99.0, 99.0), range(5, 6), range(8, 9)),
        ((3.0, 3.0, 3.0, 3.0), range(0), range(0)),
    ):
        wanted = np.zeros((6, 9), bool)
        wanted[np.ix_(list(rows), list(columns))] = True
        assert (box_mask(np.array([box]), 6, 9) == wanted).all(), box
    whole = box_mask(np.array([[0.0, 0, 4, 6], [4, 0, 9, 6]]), 6, 9)
    assert whole.all() and not box_mask(np.zeros((0, 4)), 6, 9).any()
    mask = np.zeros((30, 40), bool)
    mask[4:9, 7:33] = True
    assert (box_mask(np.array([mask_to_box_xyxy(mask)]), 30, 40) == mask).all()


def test_boxes_are_filled_and_polygons_as_coco_fills_them() -> None:
    found = Boxes().segment(picture(), boxes((1, 2, 30, 20)))
    assert found.mask.sum() == 29 * 18 and found.boxes_xyxy.tolist() == [[1, 2, 30, 20]]
    triangle = np.array([[2.0, 3.0], [40.0, 3.0], [2.0, 30.0]])
    parsed = Parsed("ok", boxes_xyxy=np.array([[2.0, 3.0, 40.0, 30.0]]), polygons=[triangle])
    found = Polygons().segment(picture(), parsed)
    assert (found.mask == segmentation_to_mask([triangle.reshape(-1).tolist()], 36, 48)).all() and found.flags == ()
    parsed = Parsed("ok", boxes_xyxy=np.array([[2.0, 3.0, 40.0, 30.0], [42.0, 0.0, 46.0, 4.0]]), polygons=[triangle])
    both = Polygons().segment(picture(), parsed)
    assert both.flags == ("filled_box",) and both.mask.sum() == found.mask.sum() + 16


def test_names_and_what_goes_together(sams: dict[str, Path]) -> None:
    assert open_segmenter("none") is None and isinstance(open_segmenter("box"), Boxes) and isinstance(open_segmenter("polygon"), Polygons)
    found = open_segmenter(f"sam:{sams['sam']}", "cpu")
    assert isinstance(found, Prompted) and found.name == f"sam:{sams['sam'].name}"
    for wrong in ("boxes", "sam:", "sam", "sam:no/such/folder"):
        with pytest.raises(GrexError, match="segmenter"):
            open_segmenter(wrong, "cpu")
    for segmenter, answer in ((None, "boxes"), (Boxes(), "boxes"), (Boxes(), "polygons"), (found, "points"), (Polygons(), "polygons")):
        check_segmenter(segmenter, answer)
    for segmenter, answer in ((None, "points"), (Boxes(), "points"), (Polygons(), "boxes")):
        with pytest.raises(GrexError, match=f"answers with {answer}"):
            check_segmenter(segmenter, answer)


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_a_box_and_a_point_give_what_the_models_own_way_gives(kind: str, sams: dict[str, Path]) -> None:
    segmenter = Prompted(str(sams[kind]), "cpu")
    seen = picture()
    rows = [(4.0, 3.0, 30.0, 20.0), (10.0, 10.0, 40.0, 33.0)]
    found = segmenter.segment(seen, boxes(*rows))
    alone = [segmenter.segment(seen, boxes(row)).mask for row in rows]
    assert found.mask.shape == (36, 48) and (found.mask == (alone[0] | alone[1])).all()
    assert found.boxes_xyxy.tolist() == [list(row) for row in rows]
    agreement = (_own_way(segmenter, seen, rows) == np.stack(alone)).mean()
    assert agreement == 1.0 if kind == "sam" else agreement > 0.98  # torch and Pillow round resized pixels differently
    points = segmenter.segment(seen, Parsed("ok", points=np.array([[12.0, 9.0], [30.5, 30.0]])))
    assert points.mask.shape == (36, 48)
    assert len(points.boxes_xyxy) == 2 or points.flags == ("empty_mask",)
    for box in points.boxes_xyxy:
        assert 0 <= box[0] < box[2] <= 48 and 0 <= box[1] < box[3] <= 36
    assert segmenter.fingerprint() == Prompted(str(sams[kind]), "cpu").fingerprint()
    with torch.no_grad():
        next(segmenter.model.parameters()).add_(1.0)
    assert segmenter.fingerprint() != Prompted(str(sams[kind]), "cpu").fingerprint()


def _own_way(segmenter: Prompted, seen: Picture, rows: list[tuple[float, ...]]) -> np.ndarray:
    """Masks [N, H, W] as the model's documentation makes them, without keeping the picture's encoding."""
    model = segmenter.model
    if segmenter.kind == "sam":
        processor = segmenter.processor
        inputs = processor(images=seen.pixels, input_boxes=[[list(row) for row in rows]], return_tensors="pt")
        sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs = {name: value.float() for name, value in inputs.items()}
        with torch.no_grad():
            low = model(**inputs, multimask_output=False).pred_masks
        return np.asarray(processor.image_processor.post_process_masks(low, *sizes)[0][:, 0])
    pixels = torch.nn.functional.interpolate(
        torch.from_numpy(seen.pixels).permute(2, 0, 1)[None].float(), (SIDE, SIDE), mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    given = torch.tensor([[[x1 * SIDE / 48, y1 * SIDE / 36, x2 * SIDE / 48, y2 * SIDE / 36] for x1, y1, x2, y2 in rows]])
    with torch.no_grad():
        low = model(pixel_values=(pixels.round() / 255 - mean) / std, input_boxes=given, multimask_output=False).pred_masks
    return np.asarray(torch.nn.functional.interpolate(low[0], (36, 48), mode="bilinear", align_corners=False)[:, 0] > 0)


def test_a_picture_is_encoded_once(sams: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = Prompted(str(sams["sam"]), "cpu")
    calls: list[Any] = []
    encode = segmenter.model.get_image_embeddings
    monkeypatch.setattr(segmenter.model, "get_image_embeddings", lambda pixels: calls.append(pixels) or encode(pixels))
    first, second = picture(seed=1), picture(seed=2)
    for seen in (first, first, second, Picture(first.pixels.copy())):
        segmenter.segment(seen, boxes((4, 3, 30, 20)))
    assert len(calls) == 2
    many = [(float(n % 20), 1.0, float(n % 20 + 10), 20.0) for n in range(37)]
    assert segmenter.segment(first, boxes(*many)).mask.shape == (36, 48) and len(calls) == 2


def test_every_segmenter_has_the_contract() -> None:
    kinds: list[Segmenter] = [Boxes(), Polygons()]
    assert [kind.fingerprint() for kind in kinds] == ["box", "polygon"]
