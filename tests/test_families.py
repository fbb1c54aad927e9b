"""Families: known boxes go through each family's resize, frame and format and come back; sizes equal those of the real image processors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grex_mllm.errors import GrexError
from grex_mllm.models.multimodal.families import FAMILIES as LOCAL_FAMILIES
from grex_mllm.models.multimodal.task_words import KINDS
from grex_mllm.ops.boxes import box_iou
from grex_mllm.ops.frames import FRAMES, boxes_from_pixels, boxes_to_pixels, points_from_pixels, points_to_pixels, step
from grex_mllm.zeroshot.base import RawAnswer, View
from grex_mllm.zeroshot.families import FAMILIES, Limits, family_of_type, find_family
from grex_mllm.zeroshot.families.sizes import fitted, longest_then_tiles, padded_square, patch_budget, smart, smart_resize, tiles
from grex_mllm.zeroshot.parsing import parse_grounding
from grex_mllm.zeroshot.prompts import TASKS

SIZES = 50
RED, GREEN = (220, 30, 30), (30, 200, 60)


def random_sizes(seed: int, count: int = SIZES, longest: int = 1600) -> list[tuple[int, int]]:
    """Widths and heights of 60 to `longest` pixels, aspects from 1:6 to 6:1."""
    rng = np.random.default_rng(seed)
    sizes = []
    while len(sizes) < count:
        area, aspect = np.exp(rng.uniform(np.log(120**2), np.log(1000**2))), np.exp(rng.uniform(-np.log(6), np.log(6)))
        width, height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if min(width, height) >= 60 and max(width, height) <= longest:
            sizes.append((width, height))
    return sizes


def random_boxes(rng: np.random.Generator, width: int, height: int, count: int = 2) -> np.ndarray:
    """Whole-pixel boxes of at least a sixth of the picture, apart from each other."""
    while True:
        sides = rng.uniform(1 / 6, 0.6, (count, 2))
        corners = rng.uniform(0, 1 - sides)
        boxes = np.round(np.concatenate([corners, corners + sides], axis=1) * [width, height, width, height])
        if np.triu(box_iou(boxes, boxes), 1).max() < 0.3:
            return boxes


def picture(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    pixels = np.full((height, width, 3), 128, np.uint8)
    x1, y1, x2, y2 = boxes[0].astype(int)
    pixels[y1:y2, x1:x2] = RED
    return pixels


def red_box(pixels: np.ndarray) -> np.ndarray:
    """The box of what is red, in whole pixels; any scale of the values."""
    pixels = pixels.astype(float)
    red = (pixels[..., 0] - pixels[..., 1]) > 0.5 * (RED[0] - RED[1]) / 255 * (1 if pixels.max() <= 1.5 else 255)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def back(name: str, text: str, view: View, answer: str) -> Any:
    family = find_family(name)
    parsed = parse_grounding(
        RawAnswer(text), frame=family.frame, order=family.order, answer=answer, empty_answer=family.empty_answer, view=view
    )
    assert parsed.status == "ok" and not parsed.no_target, (text, parsed)
    return parsed


def near(found: np.ndarray, wanted: np.ndarray, frame: str, view: View) -> None:
    """At most half the frame's step, and a pixel of the original."""
    limit = np.array(step(frame, view)) / 2 + 1
    assert len(found) == len(wanted)
    assert (np.abs(found - wanted).reshape(-1, 2) <= limit + 1e-6).all(), (found, wanted, limit)


@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_come_back(name: str) -> None:
    """Drawn, resized to what the model sees, found there, written in the family's format, parsed."""
    family, rng = find_family(name), np.random.default_rng(7)
    for width, height in random_sizes(1):
        boxes, view = random_boxes(rng, width, height), family.view(width, height)
        assert min(view.sent_width, view.sent_height) >= 1
        text = family.write(boxes, view, "the red box")
        if family.answer == "points":
            near(back(name, text, view, "points").points, boxes.reshape(-1, 2, 2).mean(axis=1), family.frame, view)
        else:
            near(back(name, text, view, "boxes").boxes_xyxy, boxes, family.frame, view)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_model_sees_is_written_and_comes_back(name: str) -> None:
    """The box is read off the resized picture, where a model would see it; half a sent pixel may be lost there."""
    family, rng = find_family(name), np.random.default_rng(8)
    for width, height in random_sizes(2, 12, 900):
        boxes, view = random_boxes(rng, width, height, 1), family.view(width, height)
        scale = np.array([width / view.sent_width, height / view.sent_height] * 2)
        small = Image.fromarray(picture(boxes, width, height)).resize((view.sent_width, view.sent_height), Image.Resampling.BILINEAR)
        seen = red_box(np.asarray(small)) * scale
        assert (np.abs(seen - boxes[0]) <= scale + 1).all()
        text = family.write(seen[None], view, "box")
        if family.answer == "boxes":
            limit = np.tile(step(family.frame, view), 2) / 2 + 1 + scale
            assert (np.abs(back(name, text, view, "boxes").boxes_xyxy[0] - boxes[0]) <= limit).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_points_polygons_mentions_and_nothing(name: str) -> None:
    family, rng = find_family(name), np.random.default_rng(9)
    for width, height in random_sizes(3, 10):
        view, boxes = family.view(width, height), random_boxes(rng, width, height)
        if family.write_points is not None:
            points = boxes.reshape(-1, 2, 2).mean(axis=1)
            near(back(name, family.write_points(points, view, 'a "<b>" & c'), view, "points").points, points, family.frame, view)
        if family.write_polygons is not None:
            shapes = [np.array([[b[0], b[1]], [b[2], b[1]], [b[2], b[3]], [(b[0] + b[2]) // 2, b[3]]]) for b in boxes]
            found = back(name, family.write_polygons(shapes, view, "x"), view, "polygons")
            for one, wanted in zip(found.polygons, shapes, strict=True):
                near(one, wanted, family.frame, view)
            assert back(name, family.write_polygons(shapes, view, "x"), view, "boxes").flags.count("bounds") == 1
        if family.answer == "boxes":
            near(back(name, family.mention(boxes, view), view, "boxes").boxes_xyxy, boxes, family.frame, view)
        for answer in family.formats:
            given = {"frame": family.frame, "order": family.order, "answer": answer, "empty_answer": family.empty_answer}
            parsed = parse_grounding(RawAnswer(family.write_nothing()), view=view, **given)  # type: ignore[arg-type]
            assert parsed.status == "ok" and parsed.no_target
            assert ("{width}" in family.formats[answer]) == (family.frame == "px")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_whole(name: str) -> None:
    family = find_family(name)
    assert family.name == name and family.frame in FRAMES and family.order in ("xyxy", "yxyx")
    assert family.answer in family.formats and family.patterns == tuple(pattern for pattern in family.patterns if re.compile(pattern))
    assert (family.write_points is not None) == ("points" in family.formats)
    assert (family.write_polygons is not None) == ("polygons" in family.formats)
    assert (family.write_masks is not None) == ("masks" in family.formats)


def test_every_model_that_runs_here_has_one_family() -> None:
    """By its type in transformers; what a family lacks is a task with a reason."""
    types = [kind for name in FAMILIES for kind in find_family(name).model_types]
    assert len(set(types)) == len(types) and {*LOCAL_FAMILIES, *KINDS} == set(types)
    assert all(family_of_type(kind).model_types.count(kind) == 1 for kind in types)
    for family in map(find_family, FAMILIES):
        assert set(family.lacks) <= set(TASKS) and all(family.lacks.values()) and not {"grec", "gres"} & set(family.lacks)
        assert not family.lacks or set(family.model_types) <= set(KINDS)


def test_steps_and_edges() -> None:
    view = View(640, 480, 644, 476)
    steps = {frame: step(frame, view) for frame in FRAMES}
    assert steps["px"] == (1, 1) and steps["k1000"] == (0.64, 0.48) and steps["patch32"] == (20, 15)
    assert steps["px_sent"] == (640 / 644, 480 / 476) and steps["unit_pad"] == pytest.approx((6.4, 6.4))
    assert steps["unit"] == pytest.approx((6.4, 4.8)) and steps["pct"] == pytest.approx((0.64, 0.48))
    corners = np.array([[0.0, 0.0], [640.0, 480.0]])
    assert points_from_pixels(corners, "loc1024", view).tolist() == [[0, 0], [1023, 1023]]
    assert points_from_pixels(corners, "loc1000", view).tolist() == [[0, 0], [999, 999]]
    assert points_from_pixels(corners, "unit_pad", view).tolist() == [[0, 0.12], [1, 0.88]]  # (0 + 80) / 640, rounded to even
    assert points_to_pixels(np.array([[0.0, 0.125]]), "unit_pad", view).tolist() == [[0, 0]]
    assert boxes_from_pixels(np.zeros((0, 4)), "patch32", view).shape == boxes_to_pixels(np.zeros((0, 4)), "k999", view).shape == (0, 4)
    with pytest.raises(GrexError, match='coordinate frame "k100"; expected one of px'):
        step("k100", view)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("openai:gpt-4o-mini", "gpt"),
        ("o3", "gpt"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5-vl"),
        ("models/Qwen2-VL-2B-Instruct", "qwen2-vl"),
        ("Qwen/Qwen3-VL-30B-A3B-Thinking", "qwen3-vl"),
        ("OpenGVLab/InternVL3_5-8B-HF", "internvl"),
        ("llava-hf/llava-1.5-7b-hf", "llava"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision"),
        ("google/gemma-3-4b-it", "gemma3"),
        ("google/gemma-4-e4b-it", "gemma4"),
        ("google/paligemma2-3b-mix-448", "paligemma"),
        ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm"),
        ("HuggingFaceM4/Idefics3-8B-Llama3", "idefics3"),
        ("deepseek-ai/deepseek-vl2-small", "deepseek-vl2"),
        ("allenai/Molmo-7B-D-0924", "molmo"),
        ("allenai/Molmo2-8B", "molmo2"),
        ("microsoft/Florence-2-large", "florence2"),
        ("microsoft/kosmos-2-patch14-224", "kosmos2"),
        ("gemini-2.5-flash", "gemini"),
        ("anthropic/claude-sonnet-4.5", "claude"),
        ("generic", "generic"),
    ],
)
def test_a_model_is_recognised(model: str, name: str) -> None:
    assert find_family(model).name == name


def test_an_unknown_model_is_never_guessed() -> None:
    with pytest.raises(GrexError, match=r'model or family "meta/llama-3.2-11b-vision"; expected one of .*name the family'):
        find_family("meta/llama-3.2-11b-vision")
    with pytest.raises(GrexError, match='did you mean "internvl"'):
        find_family("interovl")


def test_sizes_of_the_specification() -> None:
    sizes = {name: find_family(name).view(640, 480) for name in FAMILIES}
    seen = {name: (view.sent_width, view.sent_height) for name, view in sizes.items()}
    assert seen["qwen2-vl"] == seen["qwen2.5-vl"] == (644, 476) and seen["qwen3-vl"] == (640, 480)
    assert find_family("qwen2.5-vl").view(640, 427).sent_height == 420
    assert seen["internvl"] == (4 * 448, 3 * 448) and find_family("internvl").sent(640, 480, Limits(max_tiles=6)) == (3 * 448, 2 * 448)
    assert seen["gpt"] == seen["claude"] == seen["gemini"] == (640, 480)
    assert find_family("gpt").sent(4000, 3000, Limits()) == (1024, 768)
    assert max(find_family("claude").sent(4000, 3000, Limits())) <= 1568
    assert find_family("paligemma").sent(640, 480, Limits(side=448)) == (448, 448)
    assert find_family("qwen2.5-vl").sent(640, 480, Limits(max_pixels=100 * 28 * 28)) == (308, 224)
    assert find_family("qwen2.5-vl").sent(40, 40, Limits(min_pixels=56 * 56)) == (56, 56)
    assert find_family("generic").view(640, 480, (320, 240)) == View(640, 480, 320, 240)
    with pytest.raises(GrexError, match="image of 30x9000 pixels"):
        smart_resize(30, 9000, 28, 56 * 56, 10**7)


def unnormalised(values: np.ndarray, processor: Any) -> np.ndarray:
    """Pixels [H, W, 3] of normalised values [3, H, W]."""
    return (values * np.array(processor.image_std)[:, None, None] + np.array(processor.image_mean)[:, None, None]).transpose(1, 2, 0)


def qwen_pixels(processor: Any, image: Image.Image) -> np.ndarray:
    out = processor(images=[image], return_tensors="np")
    (_, rows, columns), patch, merge = out["image_grid_thw"][0], processor.patch_size, processor.merge_size
    cut = out["pixel_values"].reshape(rows // merge, columns // merge, merge, merge, 3, processor.temporal_patch_size, patch, patch)[
        :, :, :, :, :, 0
    ]
    return unnormalised(cut.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch), processor)


def tiled_pixels(values: np.ndarray, columns: int, rows: int, processor: Any) -> np.ndarray:
    side = values.shape[-1]
    whole = values[: rows * columns].reshape(rows, columns, 3, side, side).transpose(2, 0, 3, 1, 4)
    return unnormalised(whole.reshape(3, rows * side, columns * side), processor)


def internvl_pixels(processor: Any, image: Image.Image) -> np.ndarray:
    values = processor(images=[image], return_tensors="np")["pixel_values"]
    columns, rows = (side // 448 for side in tiles(448, 12)(*image.size, Limits()))
    assert len(values) == rows * columns + (rows * columns > 1), "the processor cut other tiles"
    return tiled_pixels(values, columns, rows, processor)


def idefics_pixels(processor: Any, image: Image.Image) -> np.ndarray:
    out = processor(images=[image], return_tensors="np", return_row_col_info=True)
    rows, columns = out["rows"][0][0], out["cols"][0][0]
    return tiled_pixels(out["pixel_values"][0], columns, rows, processor)


def llava_pixels(processor: Any, image: Image.Image) -> np.ndarray:
    return unnormalised(processor(images=[image], return_tensors="np")["pixel_values"][0], processor)


def onevision_pixels(processor: Any, image: Image.Image) -> np.ndarray:
    from transformers.image_processing_utils import select_best_resolution

    values = processor(images=[image], return_tensors="np")["pixel_values"][0][1:]  # the overview comes first
    height, width = select_best_resolution((image.height, image.width), processor.image_grid_pinpoints)
    return tiled_pixels(values, width // 384, height // 384, processor)


def gemma4_pixels(processor: Any, image: Image.Image) -> np.ndarray:
    out = processor(images=[image], return_tensors="np")
    places, patch = out["image_position_ids"][0], processor.patch_size
    kept = places[:, 0] >= 0
    columns, rows = places[kept].max(axis=0) + 1
    cut = np.zeros((rows, columns, patch, patch, 3), np.float32)
    cut[places[kept, 1], places[kept, 0]] = out["pixel_values"][0][kept].reshape(-1, patch, patch, 3)
    return cut.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)


Pixels = Callable[[Any, Image.Image], np.ndarray]
PROCESSORS: dict[str, tuple[str, dict[str, Any], Any, Pixels]] = {
    "qwen2.5-vl": ("Qwen2VLImageProcessorPil", {"patch_size": 14}, smart(28, 56 * 56, 28 * 28 * 1280), qwen_pixels),
    "qwen3-vl": ("Qwen2VLImageProcessorPil", {"patch_size": 16}, smart(32, 56 * 56, 28 * 28 * 1280), qwen_pixels),
    "internvl": (
        "GotOcr2ImageProcessorPil",
        {"crop_to_patches": True, "max_patches": 12, "size": {"height": 448, "width": 448}},
        tiles(448, 12),
        internvl_pixels,
    ),
    "idefics3": ("Idefics3ImageProcessorPil", {}, longest_then_tiles(4 * 364, 364), idefics_pixels),
    "smolvlm": (
        "SmolVLMImageProcessorPil",
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        longest_then_tiles(2048, 512),
        idefics_pixels,
    ),
    "llava": (
        "LlavaImageProcessorPil",
        {"do_pad": True, "do_center_crop": False, "size": {"height": 336, "width": 336}},
        padded_square(336),
        llava_pixels,
    ),
    "llava-onevision": (
        "LlavaOnevisionImageProcessorPil",
        {"size": {"height": 384, "width": 384}},
        fitted((w * 384, h * 384) for h in range(1, 7) for w in range(1, 7)),
        onevision_pixels,
    ),
    "gemma3": ("Gemma3ImageProcessorPil", {"size": {"height": 896, "width": 896}}, find_family("gemma3").sent, llava_pixels),
    "gemma4": ("Gemma4ImageProcessorPil", {}, patch_budget(16, 3, 280), gemma4_pixels),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_real_image_processor_puts_a_box_where_the_size_says(name: str) -> None:
    """A red rectangle goes through the processor of transformers; it lies where `sent` says, within a pixel and a half of that picture."""
    import transformers

    kind, options, rule, pixels_of = PROCESSORS[name]
    processor = getattr(transformers, kind)(**options)
    rng = np.random.default_rng(11)
    for width, height in [(640, 480), (640, 427), (427, 640), *random_sizes(4, 5, 900)]:
        boxes = random_boxes(rng, width, height, 1)
        seen = pixels_of(processor, Image.fromarray(picture(boxes, width, height)))
        sent = np.array(rule(width, height, Limits()), float)
        padding = (np.array(seen.shape[1::-1]) - sent) / 2 if name in ("llava", "llava-onevision") else np.zeros(2)
        if name not in ("llava", "llava-onevision"):
            assert seen.shape[1::-1] == tuple(sent.astype(int)), (width, height)
        wanted = boxes[0] * np.tile(sent / [width, height], 2) + np.tile(padding, 2)
        assert (np.abs(red_box(seen) - wanted) <= 1.5).all(), (width, height, red_box(seen), wanted)
