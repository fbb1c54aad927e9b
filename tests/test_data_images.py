"""Every kind of image file to one form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_folder import gradient

from grex_mllm.data import images
from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.errors import GrexError

BACK = {  # orientation -> what was done to the upright picture before it was stored
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", BACK)
def test_every_exif_orientation_comes_out_upright(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    stored = Image.fromarray(np.ascontiguousarray(BACK[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated.png"
    stored.save(path, exif=exif)
    assert np.array_equal(load_image(path), upright)


def test_exif_orientation_of_a_jpeg(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "rotated.jpg"
    Image.fromarray(np.ascontiguousarray(np.rot90(gradient(), 1))).save(path, exif=exif, quality=95)
    assert np.abs(load_image(path).astype(int) - gradient().astype(int)).mean() < 4


def test_a_broken_exif_block_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "broken_exif.jpg"
    Image.fromarray(gradient()).save(path, exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\xff\xff")
    assert load_image(path).shape == (30, 40, 3)


def test_grey_scale_has_three_equal_channels(tmp_path: Path) -> None:
    grey = gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(load_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "sixteen.png")
    assert load_image(tmp_path / "sixteen.png")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_one_bit_and_palette(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient()).quantize(64)
    picture.save(tmp_path / "palette.png")
    assert np.array_equal(load_image(tmp_path / "palette.png"), np.asarray(picture.convert("RGB")))
    Image.fromarray(gradient()[..., 0] > 100).save(tmp_path / "bits.png")
    assert set(np.unique(load_image(tmp_path / "bits.png"))) == {0, 255}


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :, 0], picture[:, :, 2] = 200, 30
    Image.fromarray(picture).convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    with Image.open(tmp_path / "print.jpg") as stored:
        assert stored.mode == "CMYK"
    assert np.abs(load_image(tmp_path / "print.jpg").astype(int) - picture).max() < 12


def test_transparent_pixels_lie_on_white(tmp_path: Path) -> None:
    layer = np.zeros((4, 6, 4), np.uint8)
    layer[:, 3:, 3] = 255  # black, the left half transparent
    Image.fromarray(layer).save(tmp_path / "alpha.png")
    loaded = load_image(tmp_path / "alpha.png")
    assert (loaded[:, :3] == 255).all() and (loaded[:, 3:] == 0).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "hole.png", transparency=1)
    assert (load_image(tmp_path / "hole.png") == 255).all()


def test_arrays_tensors_and_pil_give_the_same() -> None:
    image = gradient()
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for source in (image, Image.fromarray(image), tensor, tensor.float() / 255, torch.from_numpy(image)):
        assert np.array_equal(load_image(source), image)
    assert load_image(image[..., 0]).shape == image.shape
    assert load_image(tensor[:1]).shape == image.shape


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.full((3, 4, 4), 2.0),
        torch.zeros(2, 3, 4, 4),
        17,
    ],
)
def test_other_arrays_are_refused(source: object) -> None:
    with pytest.raises(GrexError, match="expected"):
        load_image(source)


def test_missing_truncated_and_foreign_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("missing.jpg", "cut.jpg", "text.jpg", "empty.png"):
        with pytest.raises(GrexError) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(GrexError, match="does not exist"):
        load_image(tmp_path)


def test_a_damaged_file_never_escapes_as_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "damaged"
    for kind in ("JPEG", "PNG"):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path, format=kind)
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes()[: int(rng.integers(1, len(whole) + 1))])
            try:
                assert load_image(path).dtype == np.uint8
            except GrexError as error:
                assert "damaged" in str(error)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (9000, 8000)).save(tmp_path / "bomb.png")
    with pytest.raises(GrexError, match="too large"):
        load_image(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(GrexError, match="at most"):
        load_image(gradient())


@pytest.mark.parametrize("file", ["../secret.png", "/etc/passwd", "a/../../b.png", "C:\\a.png", "..\\a.png", "", "a\x00.png"])
def test_paths_stay_under_the_root(tmp_path: Path, file: str) -> None:
    with pytest.raises(GrexError, match="root"):
        resolve_image(tmp_path, file)


def test_a_path_below_the_root(tmp_path: Path) -> None:
    assert resolve_image(tmp_path, "train2014/a..b.jpg") == tmp_path / "train2014" / "a..b.jpg"
