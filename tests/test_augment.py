"""Augmented samples: masks and boxes lie where the pixels went, expressions stay true, a position gives the same bytes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_folder import HEIGHT, WIDTH, gradient, rectangle_mask, tiny_folder

from grex_mllm.augmentation import AugmentConfig
from grex_mllm.config import load_config
from grex_mllm.data.augment import Surroundings, augment, cropped, draw_window, flipped
from grex_mllm.data.augment.geometry import Window, clip_polygon, crop_record, instance_area, mirror_record, polygon_area
from grex_mllm.data.augment.paste import paste_objects
from grex_mllm.data.augment.source import Augmented, check_augmentation
from grex_mllm.data.augment.truth import Origins
from grex_mllm.data.augment.words import has_colour_word, has_place_word, mirrored_expression
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.sources import PRETRAINING, describe_epochs, training_samples
from grex_mllm.data.transforms import instance_mask, prepare
from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import encode_rle, mask_to_box_xyxy
from grex_mllm.types import ExpressionRecord, Geometry, ImageRecord, Instance, Sample

LETTER_C = [4.5, 3, 25, 3, 25, 8, 10, 8, 10, 18, 25, 18, 25, 24.5, 4.5, 24.5]  # concave: a cut through its gap leaves two parts


def record() -> ImageRecord:
    """An image of every kind of instance: a concave polygon, two polygons, a code, pixels, a box alone, a crowd region."""
    pixels = rectangle_mask(30, 2, 38, 9)
    instances = [
        Instance("1", "cat", [4.5, 3, 25, 24.5], [LETTER_C]),
        Instance("2", "dog", [1, 25, 39, 29], [[1, 25, 8, 25, 8, 29, 1, 29], [31, 26, 39, 26, 39, 29]]),
        Instance("3", "dog", [20, 5, 30, 15], encode_rle(rectangle_mask(20, 5, 30, 15))),
        Instance("4", "dog", [30, 2, 38, 9], mask=pixels),
        Instance("5", "cow", [11, 9, 19, 17]),
        Instance("6", "dog", [0, 20, 40, 30], encode_rle(rectangle_mask(0, 20, 40, 30)), iscrowd=True),
    ]
    return ImageRecord("i", "a.png", HEIGHT, WIDTH, instances)


def said(text: str, targets: Sequence[str] = ("1",), raw: str | None = None) -> ExpressionRecord:
    return ExpressionRecord(text, "r", "i", text, raw or text, list(targets), "train", "tiny")


def sample(*texts: str, targets: Sequence[str] = ("1",)) -> Sample:
    return Sample(gradient(), record(), [said(text, targets) for text in texts or ("the cat",)])


def pixels_of(instance: Instance, of: ImageRecord) -> np.ndarray:
    return instance_mask(instance, Geometry(of.height, of.width, of.height, of.width))


class WholeScene:
    """A scene with one rule: "whole" is true where the image has six instances; what is drawn is "drawn"."""

    def __init__(self, record: ImageRecord, origins: Origins) -> None:
        self.num, self.origins = len(record.instances), origins

    def holds(self, expression: ExpressionRecord) -> bool:
        return expression.raw != "whole" or self.num == 6

    def draw(self, num: int, rng: np.random.Generator, like: ExpressionRecord) -> list[ExpressionRecord]:
        return [replace(like, raw="drawn")] * num


def same(first: Sample, second: Sample) -> bool:
    alike = np.array_equal(first.image, second.image) and asdict(first.record) == asdict(second.record)
    return alike and first.expressions == second.expressions and first.scale == second.scale


def test_a_flip_moves_pixels_masks_boxes_and_words() -> None:
    before = sample("the cat on the left", "the leftmost dog")
    after = flipped(before)
    assert [e.raw for e in after.expressions] == ["the cat on the right", "the rightmost dog"] == [e.expression for e in after.expressions]
    assert np.array_equal(after.image, before.image[:, ::-1])
    for was, now in zip(before.record.instances, after.record.instances, strict=True):
        differ = np.count_nonzero(pixels_of(now, after.record) ^ pixels_of(was, before.record)[:, ::-1])
        assert differ <= (30 if isinstance(was.segmentation, list) else 0)  # a polygon's border is rounded to the other side
        x1, y1, x2, y2 = was.box_xyxy
        assert now.box_xyxy == [WIDTH - x2, y1, WIDTH - x1, y2]
    again = flipped(after)
    assert again.expressions == before.expressions and np.array_equal(again.image, before.image)
    for was, now in zip(before.record.instances, again.record.instances, strict=True):
        assert np.array_equal(pixels_of(was, before.record), pixels_of(now, again.record)) and was.box_xyxy == now.box_xyxy


@pytest.mark.parametrize("text", ["the car at 3 o'clock", "the sign that reads stop", "player 23", "the cat right behind the dog"])
def test_a_text_that_cannot_be_mirrored_keeps_its_sample_from_the_flip(text: str) -> None:
    assert mirrored_expression(said(text)) is None
    assert mirrored_expression(said("the cat", raw=text)) is None and mirrored_expression(said(text, raw="the cat")) is None
    before = sample("the cat on the left", text)
    assert flipped(before) is before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, WIDTH - 1), st.integers(0, HEIGHT - 1), st.integers(1, WIDTH), st.integers(1, HEIGHT))
def test_a_cut_takes_masks_and_boxes_along(left: int, top: int, width: int, height: int) -> None:
    window = Window(left, top, min(left + width, WIDTH), min(top + height, HEIGHT))
    before = record()
    after = crop_record(before, window)
    assert (after.height, after.width) == (window.bottom - window.top, window.right - window.left)
    kept = {instance.annotation_id: instance for instance in after.instances}
    for was in before.instances:
        expected = pixels_of(was, before)[window.top : window.bottom, window.left : window.right]
        if was.annotation_id not in kept:
            assert np.count_nonzero(expected) <= (0 if was.segmentation is None or isinstance(was.segmentation, dict) else 16)
            continue
        found = pixels_of(kept[was.annotation_id], after)
        # a polygon's clipped border lies within half a pixel of where it was
        assert np.count_nonzero(found ^ expected) <= (30 if isinstance(was.segmentation, list) else 0)
        extent = mask_to_box_xyxy(found)
        assert np.abs(np.subtract(kept[was.annotation_id].box_xyxy, extent)).max() <= 1.0 + 1e-9
        assert not isinstance(was.segmentation, list) or instance_area(kept[was.annotation_id]) <= instance_area(was) + 1e-9


def test_a_clipped_polygon_has_the_area_of_the_part() -> None:
    c = np.asarray(LETTER_C).reshape(-1, 2)
    assert polygon_area(c) == pytest.approx(20.5 * 21.5 - 15 * 10)
    left, right = clip_polygon(c, 12, 30), clip_polygon(c - [12, 0], 28, 30)
    assert polygon_area(left) + polygon_area(right) == pytest.approx(polygon_area(c))
    assert polygon_area(right) == pytest.approx(13 * 5 + 13 * 6.5)  # two arms, and a bridge without area
    assert len(clip_polygon(c - [30, 0], 10, 30)) == 0 and np.array_equal(clip_polygon(c, 40, 30), c)


def test_without_a_judge_a_cut_keeps_all_whole_and_speaks_of_no_place() -> None:
    before = sample("the cat", "the cat on the left", "second dog", "the largest dog")
    config = AugmentConfig(crop=1.0, scale=[1.0, 3.0])
    sizes = set()
    for seed in range(30):
        after = augment(before, config, np.random.default_rng(seed))
        assert len(after.record.instances) == len(before.record.instances)
        assert [instance_area(i) for i in after.record.instances[:5]] == [instance_area(i) for i in before.record.instances[:5]]
        texts = [e.raw for e in after.expressions]
        assert texts == [e.raw for e in before.expressions], "half of the expressions would go: no cut"
        after = augment(replace(before, expressions=[said("the cat"), said("the largest dog")]), config, np.random.default_rng(seed))
        sizes.add(after.image.shape[:2])
    assert len(sizes) > 1 and min(sizes) < (HEIGHT, WIDTH)


def test_a_judge_says_which_expressions_a_cut_leaves_true() -> None:
    before = sample("the cat", "whole", "small", "cat")
    window = Window(3, 2, 27, 26)
    after = cropped(before, window, Surroundings(WholeScene))
    assert len(after.record.instances) < 6 and [e.raw for e in after.expressions] == ["the cat", "small", "cat"]
    assert np.array_equal(after.image, gradient()[2:26, 3:27])
    for kept in (0, 1):  # of ("whole", "x"): fewer than three quarters stay, so the image is not cut
        texts = ["whole", "x"][: kept + 1]
        for seed in range(10):
            drawn = augment(
                sample(*texts), AugmentConfig(crop=1.0, scale=[1.0, 4.0]), np.random.default_rng(seed), Surroundings(WholeScene)
            )
            assert len(drawn.record.instances) == 6 and [e.raw for e in drawn.expressions] == texts


def test_windows_hold_the_targets_and_enlarge_as_far_as_asked() -> None:
    known = record()
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        window = draw_window(sample(), known.instances[2:3], 2.0, rng)
        assert window is not None
        x1, y1, x2, y2 = known.instances[2].box_xyxy
        assert 0 <= window.left <= x1 and x2 <= window.right <= WIDTH and 0 <= window.top <= y1 and y2 <= window.bottom <= HEIGHT
        assert window.right - window.left >= WIDTH / 2 / 1.2 and window.bottom - window.top >= HEIGHT / 2 / 1.2
        seen.add(window)
    assert len(seen) > 50
    everything = replace(known.instances[4], box_xyxy=[0.0, 0.0, float(WIDTH), float(HEIGHT)])
    assert draw_window(sample(), [everything], 4.0, rng) is None


def test_colours_change_but_hues_stay_where_a_colour_is_named() -> None:
    config = AugmentConfig(colour=1.0)
    grey = np.repeat(gradient()[..., :1], 3, axis=2)
    hues = {}
    for text in ("the cat", "the red cat"):
        before = replace(sample(text), image=np.stack([gradient()[..., 0] // 2 + 60] * 3, -1).astype(np.uint8))
        before.image[..., 0] += 40
        differences = []
        for seed in range(20):
            after = augment(before, config, np.random.default_rng(seed)).image.astype(float)
            assert after.shape == before.image.shape and not np.array_equal(after, before.image)
            assert np.abs(after - before.image).mean() < 50
            differences.append(float(np.abs(after[..., 1] - after[..., 2]).mean()))
        hues[text] = max(differences)
    assert hues["the red cat"] < 1.5 < hues["the cat"]  # green and blue are equal before; only a turn of hue parts them
    after = augment(replace(sample("the cat"), image=grey), config, np.random.default_rng(3)).image.astype(int)
    assert np.abs(after[..., 0] - after[..., 2]).max() <= 3, "grey stays grey"


@pytest.mark.parametrize(("text", "colour", "place"), [
    ("the person in white", True, False), ("the blonde girl", True, False), ("guy in Red", True, False), ("a red-haired one", True, False),
    ("the leftmost cat", False, True), ("top-right corner", False, True), ("second from left", False, True), ("the 2nd dog", False, True),
    ("the largest cat", False, False), ("all people but the smallest", False, False), ("the person with an umbrella", False, False),
])  # fmt: skip
def test_words_of_colour_and_place(text: str, colour: bool, place: bool) -> None:
    assert (has_colour_word(text), has_place_word(text)) == (colour, place)


@pytest.mark.parametrize("resize", ["pad", "squash"])
def test_a_smaller_size_takes_a_part_of_the_input(resize: str) -> None:
    before = sample()
    small = replace(before, scale=0.5)
    ready, full = prepare(small, 80, resize), prepare(before, 80, resize)
    assert (ready.geometry.input_height, ready.geometry.input_width) == (full.geometry.input_height // 2, full.geometry.input_width // 2)
    assert ready.image.shape == (80, 80, 3) and not ready.image[:, 40:].any() and not ready.instance_masks[:, :, 40:].any()
    assert ready.instance_boxes_norm == pytest.approx(full.instance_boxes_norm / 2)
    for mask, box in zip(ready.instance_masks, ready.instance_boxes_norm, strict=True):
        x1, y1, x2, y2 = np.asarray(mask_to_box_xyxy(mask)) / 80
        assert np.abs(np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) - box).max() < 2 / 80


def test_sizes_are_drawn_between_the_two_and_spare_small_targets() -> None:
    config = AugmentConfig(scale=[0.25, 1.0])
    scales = [augment(sample(), config, np.random.default_rng(seed)).scale for seed in range(200)]
    assert min(scales) < 0.3 and max(scales) > 0.9 and all(0.25 <= scale <= 1 for scale in scales)
    assert np.median(scales) == pytest.approx(0.5, abs=0.1)  # even in the logarithm
    spared = [augment(sample(targets=["4"]), config, np.random.default_rng(s), Surroundings(image_size=40)).scale for s in range(50)]
    assert min(spared) == pytest.approx((32 / 56) ** 0.5)  # 7 x 8 pixels at full size


def test_a_position_gives_the_same_sample_again_and_another_seed_another(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "d")
    config = AugmentConfig(flip=0.5, crop=0.5, colour=0.8, scale=[0.5, 2.0])

    def made(seed: int) -> Augmented:
        return Augmented(FolderDataset(folder, "train", 2, training=True, seed=seed), config, seed, 64)

    first, again, other = made(1), made(1), made(2)
    samples = [first[position] for position in range(40)]
    assert all(same(again[position], samples[position]) for position in reversed(range(40)))
    assert len({s.image.tobytes() + str(s.scale).encode() for s in samples}) > 30
    assert not all(same(other[position], samples[position]) for position in range(40))
    plain = FolderDataset(folder, "train", 2, training=True, seed=1)
    assert len(first) == len(plain)
    for position, varied in enumerate(samples):  # order and epochs are those of the folder
        assert {e.expression_id for e in varied.expressions} <= {e.expression_id for e in plain[position].expressions}


def test_only_the_training_of_folders_is_varied(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "d")
    flags = ["--data.augment.flip=1.0", f"--data.train={folder}", "--data.expressions_per_image=1"]
    data = load_config(None, flags).data
    plain = training_samples(load_config(None, flags[1:]).data, 0, 10)
    varied = training_samples(data, 0, 10)
    assert isinstance(varied, Augmented) and isinstance(plain, FolderDataset)
    assert all(np.array_equal(varied[p].image, plain[p].image[:, ::-1]) for p in range(6))
    before = training_samples(data, 0, 10, PRETRAINING)
    assert isinstance(before, FolderDataset)
    assert not isinstance(training_samples(replace(data, train="synthetic"), 0, 10), Augmented)
    lines = describe_epochs(varied, 2, 10)
    assert lines[:1] == describe_epochs(plain, 2, 10)
    assert lines[1].endswith(": flip (0 of 3 expressions cannot be mirrored: their samples are not)")


@pytest.mark.parametrize(("setting", "message"), [
    ({"flip": 1.5}, r"data\.augment\.flip is 1\.5; expected the share"),
    ({"colour": -0.1}, r"data\.augment\.colour"), ({"paste": 2.0}, r"data\.augment\.paste"),
    ({"scale": [0.5]}, r"data\.augment\.scale"), ({"scale": [1.2, 2.0], "crop": 0.5}, r"data\.augment\.scale"),
    ({"crop": 0.5}, r"crop is 0\.5 with data\.augment\.scale"), ({"scale": [0.5, 2.0]}, "crop makes what is larger"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(setting: dict[str, object], message: str) -> None:
    with pytest.raises(GrexError, match=message):
        check_augmentation(AugmentConfig(**setting))  # type: ignore[arg-type]


def test_mirroring_twice_gives_the_record_back() -> None:
    known = record()
    again = mirror_record(mirror_record(known))
    for was, now in zip(known.instances, again.instances, strict=True):
        assert was.box_xyxy == now.box_xyxy
        assert was.segmentation == now.segmentation or was.mask is not None


def test_pasted_objects_hide_what_lies_behind_them_and_are_in_the_record() -> None:
    """Pixels, masks and boxes agree; ids are new; nothing loses more than half; most of the image stays as it was."""
    before = sample()
    donor = Sample(255 - gradient(), replace(record(), image_id="j", instances=[record().instances[i] for i in (0, 2, 3)]), [])
    pasted = 0
    for seed in range(40):
        found = paste_objects(before, donor, np.random.default_rng(seed))
        if found is None:
            continue
        after, origins = found
        olds, news = after.record.instances[:6], after.record.instances[6:]
        pasted += len(news)
        assert 1 <= len(news) <= 3 and len({i.annotation_id for i in after.record.instances}) == 6 + len(news)
        assert {i.annotation_id.rstrip("+") for i in news} <= {"1", "3", "4"}
        front = np.zeros((HEIGHT, WIDTH), bool)
        for new in reversed(news):
            mask = pixels_of(new, after.record)
            assert mask.any() and new.box_xyxy == mask_to_box_xyxy(mask) and not (mask & front).any()
            front |= mask
        assert np.array_equal(after.image[~front], before.image[~front]) and not np.array_equal(after.image[front], before.image[front])
        for was, now in zip(before.record.instances, olds, strict=True):
            whole, seen = pixels_of(was, before.record), pixels_of(now, after.record)
            if was.iscrowd or (was.segmentation is None and was.mask is None):
                continue
            assert np.array_equal(seen, whole & ~front) and seen.sum() >= whole.sum() / 2
            assert now is was or now.box_xyxy == mask_to_box_xyxy(seen)
            assert (was.annotation_id in origins) == (now is was)
        whole = [new for new in news if new.annotation_id in origins]
        assert news[-1] in whole and all(origins[new.annotation_id] == ("j", new.annotation_id.rstrip("+")) for new in whole)
        assert np.array_equal(before.image, gradient()) and before.record.instances[0].segmentation == [LETTER_C], "the sample given"
    assert pasted > 20
    crowd = replace(donor, record=replace(donor.record, instances=[record().instances[i] for i in (1, 4, 5)]))
    assert paste_objects(before, crowd, np.random.default_rng(0)) is None, "cut by the border, a box alone, a crowd region"
