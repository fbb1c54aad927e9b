"""`grex search`: scores from the index are those of the model itself, an index survives kills and changes, hostile files are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import tiny_config, tiny_model

from grex_mllm.cli import main
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.search import SearchIndex, open_index
from grex_mllm.search import folder as folder_module
from grex_mllm.search import index as index_module
from grex_mllm.search import store as store_module
from grex_mllm.search.scoring import MAX_ROW_BYTES, SURENESS, Part, from_rows, layout_of, row_bytes, to_rows

EXPRESSIONS = ["the red circle on the left", "two blue squares", "everything green"]


@pytest.fixture(scope="module")
def model() -> GrexModel:
    return tiny_model()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return scenes(tmp_path / "images", 7)


def scenes(folder: Path, number: int) -> Path:
    """Write drawn scenes, one of them in a folder of its own."""
    data = SyntheticDataset(SyntheticConfig(image_size=64), "test", number, 1)
    (folder / "below").mkdir(parents=True)
    for n in range(number):
        Image.fromarray(data[n].image).save(folder / ("below" if n == 0 else "") / f"{n}.png")
    return folder


def contents(opened: SearchIndex) -> dict[str, bytes]:
    return {entry.file: opened.store.rows([entry.row]).tobytes() for entry in opened.store.indexed}


def test_the_index_scores_as_the_model_itself(model: GrexModel, images: Path) -> None:
    opened = open_index(model, images)
    scores = opened.scores(EXPRESSIONS)
    assert opened.files == ["1.png", "2.png", "3.png", "4.png", "5.png", "6.png", "below/0.png"]
    assert scores.score.shape == (3, 7) and len(np.unique(scores.score)) == 21
    for column, file in enumerate(opened.files):
        encoded = model.encode(images / file)
        ids, mask = model.encode_text(EXPRESSIONS)
        with torch.inference_mode():
            output = model.grounding.ground(encoded.features, torch.zeros(3, dtype=torch.int64), ids, mask)
        assert output.no_target_logits is not None and output.box_logits is not None
        no_target = output.no_target_logits.softmax(dim=-1)[:, 1].numpy()
        region = output.box_logits.amax(dim=-1).sigmoid().numpy()
        np.testing.assert_allclose(scores.no_target_prob[:, column], no_target, atol=2e-3)
        np.testing.assert_allclose(scores.region_score[:, column], region, atol=2e-3)
        chosen = output.box_logits.sigmoid().numpy()
        counted = output.count_logits.softmax(dim=-1).numpy()[range(3), (chosen > 0.5).sum(axis=1).clip(max=6)]
        sure = (counted * np.maximum(chosen, 1 - chosen).prod(axis=1)) ** SURENESS
        np.testing.assert_allclose(scores.score[:, column], (1 - no_target) * region * sure, atol=2e-3, rtol=0.03)
        answers = model.ground(images / file, EXPRESSIONS)
        assert scores.no_target[:, column].tolist() == [answer.head_no_target for answer in answers]


def test_one_expression_is_scored_as_among_many(model: GrexModel, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_index(model, images)
    together = opened.scores(EXPRESSIONS)
    monkeypatch.setattr(index_module, "PAIRS_AT_ONCE", 2)
    np.testing.assert_allclose(opened.scores(EXPRESSIONS[1]).score[0], together.score[1], atol=1e-5)
    hits = opened.rank(EXPRESSIONS[1])
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True) and len(hits) == 7
    assert [hit.file for hit in opened.search(EXPRESSIONS[1], top=3)] == [hit.file for hit in hits if not hit.no_target][:3]
    assert [len(found) for found in opened.search(EXPRESSIONS, top=2)] == [2, 2, 2]


def test_images_without_a_target_are_left_out(images: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.grounding.decoder.language_part.no_target[2].bias.copy_(torch.tensor([-40.0, 40.0]))
    opened = open_index(model, images)
    assert opened.search("people in white") == [] and len(opened.rank("people in white")) == 7


def test_an_image_takes_at_most_20_kilobytes() -> None:
    full = tiny_config(model__decoder__width=256, model__decoder__kept_regions=20, model__decoder__num_heads=8)
    wide = tiny_config(model__decoder__width=512, model__decoder__kept_regions=24)
    far_too_wide = tiny_config(model__decoder__width=1024, model__decoder__kept_regions=24)
    tokenizer = train_text_tokenizer(["a b"], 300)
    parts = layout_of(GrexModel(full, tokenizer).eval())
    assert {part.kept for part in parts} == {"float16", "float32"} and 10_000 < row_bytes(parts) <= MAX_ROW_BYTES
    parts = layout_of(GrexModel(wide, tokenizer).eval())
    assert {part.name: part.kept for part in parts}["features"] == "int8" and row_bytes(parts) <= MAX_ROW_BYTES
    with pytest.raises(GrexError, match="bytes an image; expected at most 20,000"):
        layout_of(GrexModel(far_too_wide, tokenizer).eval())


def test_rows_give_back_what_was_kept() -> None:
    kept = {"a": torch.randn(3, 2, 8).half() * 5, "b": torch.randn(3, 4)}
    for kind, close in (("float16", 0.0), ("int8", 0.005)):
        parts = (Part("a", (2, 8), kind), Part("b", (4,), "float32"))
        rows = to_rows(kept, parts)
        back = from_rows(rows, parts)
        assert rows.shape == (3, row_bytes(parts)) and torch.equal(back["b"], kept["b"])
        largest = kept["a"].float().abs().amax(dim=-1, keepdim=True)
        assert ((back["a"].float() - kept["a"].float()).abs() <= close * largest).all()
    with pytest.raises(GrexError, match="not finite"):
        to_rows({"a": torch.full((1, 2, 8), float("inf")).half(), "b": torch.zeros(1, 4)}, parts)


def test_only_what_is_new_or_changed_is_read(model: GrexModel, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_index(model, images)
    before = contents(first)
    read: list[str] = []
    real = index_module.read_image
    monkeypatch.setattr(index_module, "read_image", lambda root, file: (read.append(file), real(root, file))[1])
    again = open_index(model, images).updated
    assert again is not None and (again.added, again.changed, again.removed, again.kept, read) == (0, 0, 0, 7, [])
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(images / "3.png")
    os.utime(images / "3.png", ns=(1, 1))
    (images / "5.png").unlink()
    Image.open(images / "1.png").save(images / "new.png")
    opened = open_index(model, images)
    assert opened.updated is not None and (opened.updated.added, opened.updated.changed, opened.updated.removed) == (1, 1, 1)
    assert read == ["3.png", "new.png"]
    after = contents(opened)
    assert {file for file in before if after.get(file) != before[file]} == {"3.png", "5.png"}
    alike = {hit.file: hit.score for hit in opened.search(EXPRESSIONS[0], top=7)}  # encoded in another batch: equal but for rounding
    assert alike["new.png"] == pytest.approx(alike["1.png"], rel=1e-2)
    fresh = open_index(model, images, images.parent / "other")
    assert contents(fresh).keys() == after.keys() and contents(open_index(model, images)) == after


def test_a_long_journal_is_written_anew(model: GrexModel, images: Path) -> None:
    opened = open_index(model, images)
    for n in range(130):
        opened.store.note([store_module.Entry("x.png", 1, n, refused="no image")])
    kept = contents(opened)
    opened.update()
    assert len((images / ".grex_index" / "images.jsonl").read_text(encoding="utf-8").splitlines()) == 7
    assert contents(open_index(model, images, update=False)) == kept


KILLED = """
import sys, torch
from tiny import tiny_model
from grex_mllm.search import index as module
torch.set_num_threads(1)
module.IMAGES_AT_ONCE = 2
real, done = module.read_image, []
def slow(root, file):
    if len(done) == 5:
        print("five", flush=True)
        sys.stdin.read()
    done.append(file)
    return real(root, file)
module.read_image = slow
module.open_index(tiny_model(), sys.argv[1], sys.argv[2])
"""


def test_a_killed_indexing_goes_on(model: GrexModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "IMAGES_AT_ONCE", 2)
    whole = contents(open_index(model, images, tmp_path / "whole"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    words = [sys.executable, "-c", KILLED, str(images), str(tmp_path / "cut")]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "five\n"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(GrexError, match="being written by another process"):
            patch.setattr(store_module, "LOCK_WAIT_S", 0.05)
            open_index(model, images, tmp_path / "cut")
        process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
        process.wait()
    opened = open_index(model, images, tmp_path / "cut")
    assert opened.updated is not None and (opened.updated.kept, opened.updated.added) == (4, 3)
    assert contents(opened) == whole


def test_cut_off_and_damaged_parts_are_done_again(model: GrexModel, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "IMAGES_AT_ONCE", 1)  # so that an image is encoded as before
    folder = images / ".grex_index"
    whole = contents(open_index(model, images))
    journal, rows = (folder / "images.jsonl").read_bytes(), (folder / "features.bin").read_bytes()
    row = len(rows) // 7
    flipped = rows[: 2 * row] + bytes([rows[2 * row] ^ 1]) + rows[2 * row + 1 :]
    lines = journal.splitlines(keepends=True)
    for new_journal, new_rows, kept in (
        (journal[:-9], rows, 6),
        (journal, flipped, 6),
        (journal, rows[: -row // 2], 6),
        (b"".join(lines[:3]) + b'{"file": 3}\n' + b"".join(lines[3:]), rows, 3),
        (b"[" * 90_000 + b"\n" + journal, rows, 0),
        (b"", b"", 0),
    ):
        (folder / "images.jsonl").write_bytes(new_journal)
        (folder / "features.bin").write_bytes(new_rows)
        opened = open_index(model, images)
        assert opened.updated is not None and opened.updated.kept == kept
        assert contents(opened) == whole


def test_another_model_is_refused_and_another_language_part_is_not(model: GrexModel, images: Path) -> None:
    open_index(model, images)
    other = tiny_model(seed=1)
    with pytest.raises(GrexError, match=r"another model or version .model differs.*--rebuild"):
        open_index(other, images)
    same_eyes = tiny_model()
    with torch.no_grad():
        same_eyes.grounding.decoder.language_part.target.bias.fill_(-1.0)
    done = open_index(same_eyes, images).updated
    assert done is not None and done.kept == 7
    rebuilt = open_index(other, images, rebuild=True).updated
    assert rebuilt is not None and rebuilt.added == 7
    (images / ".grex_index" / "index.json").write_text("{", encoding="utf-8")
    with pytest.raises(GrexError, match="is damaged"):
        open_index(other, images)


def test_models_of_which_nothing_can_be_kept_are_refused(images: Path) -> None:
    tokenizer = train_text_tokenizer(["a b"], 300)
    swin = {"name": "swin", "embed_width": 8, "swin_depths": "[1, 1, 1, 1]", "swin_heads": "[1, 1, 2, 2]", "window": 4}
    fused = tiny_config(model__decoder__name="rela", model__decoder__minimap_side=4, model__decoder__feedforward=16,
                        model__vision__fusion="pwam", **{f"model__vision__{k}": v for k, v in swin.items()})  # fmt: skip
    plain = tiny_config(model__decoder__name="rela", model__decoder__minimap_side=4, model__decoder__feedforward=16)
    with pytest.raises(GrexError, match=r"image encoder reads the expression .model.vision.fusion: pwam."):
        open_index(GrexModel(fused, tokenizer).eval(), images)
    rela = GrexModel(plain, tokenizer).eval()
    decoded = rela.encode(images / "1.png").features.decoded
    numbers = sum(t.numel() for t in [*(t for pair in decoded.memory for t in pair), *decoded.mask_levels, decoded.mask_features])
    with pytest.raises(GrexError, match=rf"rela, which has no compact form.* reads {numbers:,} numbers of each image"):
        open_index(rela, images)
    assert not (images / ".grex_index").exists()


def test_hostile_files_are_refused_and_reported(
    model: GrexModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (0, 90, 200)]
    pixels[0].save(images / "moves.gif", save_all=True, append_images=pixels[1:])
    pixels[0].save(images / "moves.png", save_all=True, append_images=pixels[1:])
    pixels[0].save(images / "moves.webp", save_all=True, append_images=pixels[1:])
    pixels[0].save(images / "one.gif")
    (images / "drawing.svg").write_text("<svg/>", encoding="utf-8")
    (images / "drawing.png").write_text("<svg/>", encoding="utf-8")
    (images / "note.txt").write_text("no image", encoding="utf-8")
    (images / "empty.jpg").touch()
    half = (images / "1.png").read_bytes()
    (images / "half.png").write_bytes(half[: len(half) // 2])
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + half[24:29]
    (images / "bomb.png").write_bytes(half[:12] + header + zlib.crc32(header).to_bytes(4, "big") + half[33:])
    Image.new("L", (9, 9)).save(images / "script.eps")
    (images / "script.eps").rename(images / "script.jpg")
    big = images / "big.png"
    big.write_bytes(b"")
    os.truncate(big, folder_module.MAX_FILE_BYTES + 1)
    outside = scenes(tmp_path / "outside", 2)
    expected = {"moves.gif": "animation", "moves.png": "animation", "moves.webp": "animation", "drawing.svg": "SVG",
                "drawing.png": "no readable", "empty.jpg": "no readable", "half.png": "cannot be read", "bomb.png": "pixels",
                "script.jpg": "no readable", "big.png": "bytes"}  # fmt: skip
    if os.name != "nt":
        (images / "out.png").symlink_to(outside / "1.png")
        (images / "outside").symlink_to(outside)
        (images / "in.png").symlink_to(images / "1.png")
        (images / "nowhere.png").symlink_to(images / "nothing.png")
        os.mkfifo(images / "pipe.png")
        expected |= {"out.png": "out of the folder", "outside": "out of the folder", "nowhere.png": "cannot be read", "pipe.png": "regular"}
    opened = open_index(model, images)
    assert opened.updated is not None
    assert {name: word for name, word in expected.items() if word not in opened.updated.refused.get(name, "")} == {}
    assert opened.updated.refused.keys() == expected.keys()
    assert set(opened.files) >= {"1.png", "one.gif"} and len(opened) == 8 + (os.name != "nt")
    again = open_index(model, images).updated
    assert again is not None and again.added == again.changed == 0 and again.refused.keys() == expected.keys()
    for name in ("../outside/1.png", "moves.gif", str(outside / "1.png")):
        with pytest.raises(GrexError):
            opened.read(name)


def test_exif_orientation_counts(model: GrexModel, images: Path) -> None:
    turned = Image.open(images / "1.png").rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(images / "turned.png", exif=exif)
    opened = open_index(model, images)
    by_file = {hit.file: hit.score for hit in opened.rank("people in white")}
    assert by_file["turned.png"] == pytest.approx(by_file["1.png"], abs=1e-4) and by_file["2.png"] != by_file["1.png"]


def test_the_command_prints_json_and_draws_sheets(
    model: GrexModel, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    Image.new("RGB", (1500, 700), (90, 20, 200)).save(images / "large.jpg")
    out = tmp_path / "sheets" / "found.png"
    words = ["search", "--model", str(tmp_path / "model"), "--images", str(images), "--index", str(tmp_path / "index"), "--top", "5"]
    assert main([*words, "--out", str(out), "two blue squares", "green"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_images"] == 8 and printed["refused"] == {} and not (images / ".grex_index").exists()
    for number, answer in enumerate(printed["answers"]):
        results = answer["results"]
        assert answer["num_found"] >= len(results) == 5 and [line["rank"] for line in results] == [1, 2, 3, 4, 5]
        truth = model.ground(images / results[0]["file"], answer["expression"])
        assert results[0]["mask_pixels"] == truth.mask.sum() and truth.boxes_xyxy is not None
        np.testing.assert_allclose(results[0]["boxes_xyxy"], truth.boxes_xyxy, atol=0.06)
        assert results[0]["no_target_prob"] == pytest.approx(truth.no_target_prob, abs=2e-3)
        assert answer["sheet"] == str(out.with_name(f"found.{number}.png"))
        with Image.open(answer["sheet"]) as sheet:
            assert sheet.width > 4 * 384 and sheet.height > 2 * 384
    assert main([*words, "--top", "0", "green"]) == 2 and main([*words[:4], str(images / "nothing"), "green"]) == 2
    assert main([*words, " "]) == 2 and main([*words, "x" * 10_000]) == 2
    errors = capsys.readouterr().err
    assert "--top 0; expected 1 to 200" in errors and "no folder" in errors and "an empty expression" in errors


def test_an_empty_folder_has_no_hits(model: GrexModel, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    opened = open_index(model, tmp_path / "none")
    assert len(opened) == 0 and opened.rank("green") == [] and opened.search(["green", "red"]) == [[], []]


def test_a_changed_folder_in_the_meantime_is_told(model: GrexModel, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grex_mllm.search.command import run_search

    model.save_pretrained(images.parent / "model")
    real = index_module.SearchIndex.found

    def found_then_gone(self: SearchIndex, expression: str) -> object:
        hits = real(self, expression)
        (images / hits[0].file).unlink()
        return hits

    monkeypatch.setattr(index_module.SearchIndex, "found", found_then_gone)
    out = images.parent / "sheet.png"
    found = run_search(str(images.parent / "model"), str(images), ["green"], index=None, top=3, out=out, device="cpu", rebuild=False)
    lines = found["answers"][0]["results"]
    assert "error" in lines[0] and "error" not in lines[1] and out.is_file()
