"""The command line: every verb tells its options, every fault of the user is one line and leaves nothing behind, any image works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_speaker
from tiny_folder import expression, instance, rectangle_mask, tiny_folder, tiny_records, write_folder

from grex_mllm.cli import VERBS, main
from grex_mllm.config import PROTOCOL_FOLDER
from grex_mllm.metrics import language
from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import encode_rle
from grex_mllm.predictors.lines import grounding_fields

HEIGHT, WIDTH = 36, 60  # of the picture that most tests ask about
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model that has a generator."""
    root = tmp_path_factory.mktemp("cli")
    tiny_speaker(root / "work").save_pretrained(root / "model")
    return root / "model"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a picture and a truncated one."""
    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(photo())
    picture.save(tmp_path / "photo.png")
    picture.save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def files(*folders: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size if path.is_file() else -1 for folder in folders for path in sorted(folder.rglob("*"))}


def refused(capsys: Capture, words: list[Any], *parts: str) -> None:
    """Check that the call ends with status 2, one line on stderr that has all the parts, and no file more or less in the current folder."""
    before = files(Path.cwd())
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) == 1 and lines[0].startswith(f"grex {words[0]}: ")
    assert [part for part in parts if part not in lines[0]] == [], lines[0]
    assert lines[0].count(";") >= 2, "not in three parts: given; expected; remedy"
    assert files(Path.cwd()) == before


def ground(model: Path, image: str | Path, *expressions: str) -> list[Any]:
    return ["ground", "--model", model, "--image", image, "--out", "answers", "--device", "cpu", "--expression", *expressions]


def predict(model: Path, folder: Path, tasks: str) -> list[Any]:
    return ["predict", "--model", model, "--data", folder, "--split", "train", "--out", "p.jsonl", "--device", "cpu", "--tasks", tasks]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_tells_its_options(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: grex {verb}" in said
    assert (VERBS[verb].__doc__ or "").split()[0] in said


def test_help_and_faults_come_fast_in_a_process_of_their_own() -> None:
    before = os.times()
    run = subprocess.run([sys.executable, "-m", "grex_mllm.cli", "--help"], capture_output=True, text=True, check=True)
    after = os.times()  # CPU seconds: the wall clock tells more about a busy machine
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3.0
    assert all(f"  {verb} " in run.stdout for verb in VERBS)
    wrong = subprocess.run([sys.executable, "-m", "grex_mllm.cli", "grond"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1


def test_unknown_verb(place: Path, capsys: Capture) -> None:
    refused(capsys, ["grond"], '"grond"', 'did you mean "ground"?')
    refused(capsys, ["xyzzy"], '"xyzzy"', "grex --help")


def test_unknown_and_missing_options(place: Path, model: Path, capsys: Capture) -> None:
    refused(capsys, ["ground", "--model", model, "--expression", "x"], "image", "grex ground --help")
    refused(capsys, [*ground(model, "photo.png", "x"), "--colour", "red"], "--colour", "grex ground --help")
    refused(capsys, ["train", "--train.steps"], "--train.steps without a value")


def test_unknown_key_and_wrong_value_of_the_configuration(place: Path, capsys: Capture) -> None:
    refused(capsys, ["train", "--model.visoin.name", "swin"], '"model.visoin"', 'did you mean "vision"?')
    (place / "bad.yaml").write_text("data: {trian: synthetic}\n")
    refused(capsys, ["train", "--config", "bad.yaml"], "bad.yaml", '"data.trian"', 'did you mean "train"?')
    (place / "torn.yaml").write_text("data: {train: synthetic\nmodel: [\n")
    refused(capsys, ["train", "--config", "torn.yaml"], "torn.yaml", "not valid YAML")
    refused(capsys, ["train", "--train.steps=many"], "train.steps", "many")
    refused(capsys, ["train", "--config", "none.yaml"], "none.yaml does not exist", "configs/")


def test_images_that_cannot_be_read(place: Path, model: Path, capsys: Capture) -> None:
    refused(capsys, ground(model, "missing.png", "the red circle"), "missing.png does not exist", "check the path")
    refused(capsys, ground(model, "cut.jpg", "the red circle"), "cut.jpg cannot be read", "truncated", "a complete image file")
    (place / "text.png").write_text("no picture")
    refused(capsys, ground(model, "text.png", "the red circle"), "text.png cannot be read")


def test_expressions_that_cannot_be_answered(place: Path, model: Path, capsys: Capture) -> None:
    refused(capsys, ground(model, "photo.png", ""), "an empty expression", "write what to look for")
    refused(capsys, ground(model, "photo.png", "the red circle", " \t"), "an empty expression")
    refused(capsys, ground(model, "photo.png", "x" * 5000), "5,000 characters", "at most 1,000", "shorten it")


def test_model_folder_without_a_part(place: Path, model: Path, capsys: Capture) -> None:
    refused(capsys, ground(place / "nothing", "photo.png", "x"), "nothing does not exist", "model.safetensors")
    for part in ("model.safetensors", "config.yaml"):
        shutil.copytree(model, place / "m", dirs_exist_ok=True)
        (place / "m" / part).unlink()
        refused(capsys, ground(place / "m", "photo.png", "x"), str(place / "m"), f"without {part}", "give another folder")
    refused(capsys, [*ground(model, "photo.png", "x"), "--device", "abacus"], '"abacus"', "cpu, cuda or auto")


Lines = list[dict[str, Any]]


def unknown_target(images: Lines, expressions: Lines) -> None:
    expressions[0]["targets"] = ["99"]


def wrong_rle(images: Lines, expressions: Lines) -> None:
    images[0]["instances"][1] = instance("12", [20, 5, 30, 15], encode_rle(rectangle_mask(20, 5, 30, 15, 40, 30)), "cat")


def empty_text(images: Lines, expressions: Lines) -> None:
    expressions[1]["raw"] = ""


def wrong_size(images: Lines, expressions: Lines) -> None:
    images[0]["height"], images[0]["width"] = images[0]["width"], images[0]["height"]


FAULTS: list[tuple[Callable[[Lines, Lines], None], list[str]]] = [
    (unknown_target, ['target "99"', "expression e1", "images.jsonl line 1", "fix expressions.jsonl"]),
    (wrong_rle, ["images.jsonl", "annotation 12", "segmentation", "40x30", "30x40"]),
    (empty_text, ["expressions.jsonl line 2", "field raw", '""', "1 to 1,000 characters"]),
    (wrong_size, ["images.jsonl line 1", "40x30", "30x40", "order"]),
]


@pytest.mark.parametrize(("change", "parts"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_predicting_a_broken_dataset(
    place: Path, model: Path, capsys: Capture, change: Callable[[Lines, Lines], None], parts: list[str]
) -> None:
    images, expressions = tiny_records()
    change(images, expressions)
    write_folder(place / "d", images, expressions)
    refused(capsys, predict(model, place / "d", "ground,generate"), *parts)
    assert main(["data", "check", str(place / "d")]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) >= 2 and "faults in" in said.err


def test_predicting_what_does_not_exist(place: Path, model: Path, capsys: Capture) -> None:
    tiny_folder(place / "d")
    refused(capsys, [*predict(model, place / "d", "ground"), "--split", "exam"], '"exam"', "one of train, val")
    refused(capsys, predict(model, place / "e", "ground"), str(place / "e"), "does not exist", "data_prep")
    refused(capsys, predict(model, place / "d", "dance"), '"dance"', "ground or generate")


def test_predict_writes_a_line_for_every_answer(place: Path, model: Path) -> None:
    tiny_folder(place / "d")
    assert main([str(word) for word in predict(model, place / "d", "ground,generate")]) == 0
    lines = [json.loads(line) for line in (place / "p.jsonl").read_text().splitlines()]
    assert [line["expression_id"] for line in lines if "expression_id" in line] == ["e1", "e2", "e3"]
    assert [line["targets"] for line in lines if "targets" in line] == [["11"], ["11", "12"]]


def pictures(folder: Path) -> dict[str, tuple[Path, tuple[int, int]]]:
    """Write a picture in every form; return name -> (file, width and height as a viewer shows it)."""
    picture, shown = Image.fromarray(photo()), (WIDTH, HEIGHT)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.rotate(90, expand=True).save(folder / "rotated.png")
    picture.rotate(90, expand=True).save(folder / "exif.jpg", exif=turned)
    picture.convert("L").save(folder / "grey.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "a b.webp")
    sizes = {"rotated.png": (HEIGHT, WIDTH)}
    return {
        name: (folder / name, sizes.get(name, shown))
        for name in ("rotated.png", "exif.jpg", "grey.png", "cmyk.jpg", "palette.png", "a b.webp")
    }


@pytest.mark.parametrize("name", ["rotated.png", "exif.jpg", "grey.png", "cmyk.jpg", "palette.png", "a b.webp"])
def test_ground_answers_at_the_size_that_is_shown(place: Path, model: Path, capsys: Capture, name: str) -> None:
    image, size = pictures(place)[name]
    assert main([str(word) for word in ground(model, image, "the red circle")]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    overlay, mask = Image.open(answer["overlay"]), Image.open(answer["mask"])
    assert overlay.size == mask.size == size and mask.mode == "L"
    assert int((np.asarray(mask) == 255).sum()) == answer["mask_pixels"] == int((np.asarray(mask) > 0).sum())
    assert len(answer["boxes_xyxy"]) == len(answer["box_scores"])
    for x1, y1, x2, y2 in answer["boxes_xyxy"]:
        assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
    assert sorted(path.name for path in (place / "answers").iterdir()) == sorted(Path(answer[kind]).name for kind in ("overlay", "mask"))


def test_ground_takes_any_script_and_many_expressions(place: Path, model: Path, capsys: Capture) -> None:
    asked = ["赤い丸と二つの星", "красный круг", "الدائرة الحمراء", "🟥", "-- the circle", "x" * 1000]
    words = ground(model, "photo.png", *asked)
    assert main([str(word) for word in words]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["expression"] for answer in answers] == asked
    assert len({answer["overlay"] for answer in answers}) == len(asked)
    assert all(Path(answer["overlay"]).is_file() and Path(answer["mask"]).is_file() for answer in answers)


def test_answers_are_utf8_whatever_the_system_speaks(place: Path, model: Path) -> None:
    command = [sys.executable, "-m", "grex_mllm", *map(str, ground(model, "photo.png", "赤い丸 🟥"))]
    run = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.decode("utf-8"))[0]["expression"] == "赤い丸 🟥"


def describe(model: Path, *options: str) -> list[str]:
    return ["describe", "--model", str(model), "--image", "photo.png", "--device", "cpu", *options]


def test_describe_boxes_and_masks(place: Path, model: Path, capsys: Capture) -> None:
    for number, (x1, y1, x2, y2) in enumerate([(2, 3, 20, 30), (30, 5, 50, 25)]):
        mask = rectangle_mask(x1, y1, x2, y2, HEIGHT, WIDTH)
        Image.fromarray(mask.astype(np.uint8) * 255).save(place / f"mask{number}.png")
    assert main(describe(model, "--boxes", "[[2,3,20,30],[30,5,50,25]]")) == 0
    by_boxes = json.loads(capsys.readouterr().out)
    assert main(describe(model, "--masks", "mask0.png", "mask1.png")) == 0
    by_masks = json.loads(capsys.readouterr().out)
    assert by_boxes == by_masks and isinstance(by_boxes["expression"], str)  # these masks are the boxes
    assert main(describe(model, "--boxes", "[[2,3,20,30]]", "--candidates", "3", "--rerank", "listener")) == 0
    chosen = json.loads(capsys.readouterr().out)
    scores = [candidate["listener_score"] for candidate in chosen["candidates"]]
    assert scores == sorted(scores, reverse=True) and chosen["listener_score"] == scores[0]


def test_describe_refuses_what_is_no_object(place: Path, model: Path, capsys: Capture) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(place / "black.png")
    Image.new("L", (HEIGHT, WIDTH), 255).save(place / "turned.png")
    refused(capsys, describe(model), "neither masks nor boxes")
    refused(capsys, describe(model, "--boxes", "[[2,3,20,300]]"), "300", f"{WIDTH}")
    refused(capsys, describe(model, "--boxes", "[[2,3,20]]"), "box")
    refused(capsys, describe(model, "--masks", "turned.png"), "turned.png", f"{WIDTH}x{HEIGHT}", f"{HEIGHT}x{WIDTH}")
    refused(capsys, describe(model, "--masks", "black.png"), "black.png", "leave the empty mask out")
    refused(capsys, describe(model, "--boxes", "[[2,3,20,30]]", "--mode", "sing"), "sing")


def test_data_check_prints_a_table(place: Path, capsys: Capture) -> None:
    images, expressions = tiny_records()
    assert main(["data", "check", str(tiny_folder(place / "good"))]) == 0
    assert capsys.readouterr().out == ""
    unknown_target(images, expressions)
    images[0]["instances"][0]["box_xyxy"] = [2, 3, 17, 13]
    expressions.append(expression("e6", "1", "[bold]the dog[/bold] " + "x" * 300, ["98"]))
    write_folder(place / "bad", images, expressions)
    assert main(["data", "check", str(place / "bad")]) == 1
    said = capsys.readouterr()
    head, *rows = said.out.splitlines()
    assert head.split() == ["place", "field", "found", "expected"] and len(rows) == 3 and "\x1b" not in said.out
    places = [row.split()[0] for row in rows]
    assert places == [f"{place / 'bad' / file}" for file in ("images.jsonl:1", "expressions.jsonl:1", "expressions.jsonl:6")]
    assert all(row[head.index("found") - 1] == " " and row[head.index("found")] != " " for row in rows)
    assert "instances[0]" in rows[0] and '"99"' in rows[1] and "3 faults" in said.err


def test_data_stats_and_export(place: Path, capsys: Capture) -> None:
    assert main(["data", "export", "scenes", "--length", "3", "--split", "test", "--seed", "5"]) == 0
    assert "3 scenes" in capsys.readouterr().out
    assert main(["data", "check", "scenes"]) == 0
    capsys.readouterr()
    assert main(["data", "stats", "scenes", "--out", "sheet.png"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert Image.open("sheet.png").size > (100, 100)
    refused(capsys, ["data", "stats", "scenes", "other"], "2 folders", "one folder")
    refused(capsys, ["data", "weigh", "scenes"], '"weigh"', "check | stats | export")
    refused(capsys, ["data", "stats", "nowhere"], "nowhere", "does not exist")


def test_scoring_a_mask_of_another_size(place: Path, capsys: Capture) -> None:
    tiny_folder(place / "d")
    rows = [
        {"expression_id": f"e{n}", "mask_rle": encode_rle(np.zeros((40, 30) if n == 2 else (30, 40), bool)), "status": "ok"}
        for n in (1, 2, 3)
    ]
    (place / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(capsys, ["score", "p.jsonl", "--data", place / "d", "--split", "train", "--out", "r.json"], "e2", "40x30", "30x40")


def scored(place: Path, name: str, lines: Lines, *options: str) -> dict[str, Any]:
    """Score lines on the tiny folder through the command line; return results.json."""
    (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["score", f"{name}.jsonl", "--data", "d", "--split", "train", "--out", f"{name}/results.json", *options]
    assert main(words) == 0
    return json.loads((place / name / "results.json").read_text())


def grounded(*, box: bool) -> Lines:
    """Answers to the three expressions of the tiny split: right ones, or empty ones."""
    wanted = {"e1": [[2, 3, 12, 13]], "e2": [[2, 3, 12, 13], [20, 5, 30, 15]], "e3": []}
    lines = []
    for name, boxes in wanted.items():
        mask = np.zeros((30, 40), bool)
        for x1, y1, x2, y2 in boxes if box else []:
            mask |= rectangle_mask(x1, y1, x2, y2, 30, 40)
        lines.append({"expression_id": name, "mask_rle": encode_rle(mask), "boxes_xyxy": boxes if box else [], "no_target_prob": 0.5})
    return lines


def test_score_compare_and_errors(place: Path, capsys: Capture) -> None:
    tiny_folder(place / "d")
    options = ("--protocol", str(PROTOCOL_FOLDER / "all.yaml"), "--per-sample", "--num-processes")
    for name, box in (("good", True), ("bad", False)):
        lines = [line | {"count": len(line["boxes_xyxy"])} for line in grounded(box=box)]
        one = scored(place, name, lines, *options, "1")
        assert scored(place, name, lines, *options, "2") == one
        assert one["results"]["strict"]["gres"]["gIoU"] == (1.0 if box else pytest.approx(1 / 3))
    capsys.readouterr()
    refused(capsys, ["score", "good.jsonl", "--data", "d", "--split", "train", "--num-processes", "0"], "0 processes")
    both = ["good/results.json", "bad/results.json"]
    assert main(["compare", *both, "--format", "csv", "--no-published"]) == 0
    table = capsys.readouterr().out
    assert "system,N,f0,gIoU" in table and "bad - good" in table and "published" not in table
    assert main(["compare", *both, "--out", "table.tex", "--format", "latex"]) == 0
    assert "\\begin{tabular}" in (place / "table.tex").read_text() and "62.42" in (place / "table.tex").read_text()
    older = json.loads((place / "bad" / "results.json").read_text())
    older["provenance"]["protocol"]["version"] = 99
    (place / "bad" / "results.json").write_text(json.dumps(older))
    refused(capsys, ["compare", *both], "bad: all v99", "--any-protocol")
    assert main(["compare", *both, "--any-protocol", "--no-published"]) == 0
    capsys.readouterr()
    assert main(["errors", "bad/results.json", "--out", "lost", "--data", "d", "--predictions", "bad.jsonl"]) == 0
    assert "| target_rejected | 2 |" in capsys.readouterr().out
    assert {path.name for path in (place / "lost").iterdir()} >= {"errors.json", "target_rejected.png", "calibration.svg"}


def test_round_trip_with_any_model(place: Path, model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of any system: grounding them while scoring gives what lines with recorded round trips give."""
    monkeypatch.setattr(language, "java_missing", lambda: language.NEEDS_JAVA)
    tiny_folder(place / "d")
    net = GrexModel.from_pretrained(model)
    images, expressions = tiny_records()
    images[0]["instances"][0]["segmentation"] = encode_rle(net.ground(place / "d" / "images" / "a.png", "the dog").mask)
    write_folder(place / "d", images, expressions)  # the first target is what this model finds
    lines, recorded = [], []
    for targets, text in ((["11"], "the dog"), (["11", "12"], "the dog and the cat" + " x" * 600)):
        line = {"image_id": "1", "targets": targets, "expression": text, "listener": {"expression": text[:9]}}
        answered = [grounding_fields(net.ground(place / "d" / "images" / "a.png", said[:1000])) for said in (text, text[:9])]
        trips = [{key: trip[key] for key in ("mask_rle", "boxes_xyxy", "box_scores", "no_target")} for trip in answered]
        lines.append(line)
        recorded.append(line | {"round_trip": trips[0], "listener": {"expression": text[:9], "round_trip": trips[1]}})
    greg = ("--protocol", str(PROTOCOL_FOLDER / "greg.yaml"))
    live = scored(place, "live", lines, *greg, "--round-trip", str(model), "--device", "cpu")
    block = live["results"]["strict"]["greg"]
    assert block == scored(place, "recorded", recorded, *greg)["results"]["strict"]["greg"]
    assert {"round_trip_gIoU", "round_trip_Pr@F1"} <= set(block["all"]) and block["single"]["round_trip_gIoU"] > 0.9 > block["all"][
        "round_trip_gIoU"
    ]
    assert block["listener"]["all"]["round_trip_share"] == 1.0
    shown = live["provenance"]["round_trip"]
    assert (shown["model"], shown["num_grounded"], len(shown["sha256"])) == (model.name, 4, 64)
    half = scored(place, "half", [lines[0], recorded[1]], *greg, "--round-trip", str(model), "--device", "cpu")
    assert half["results"]["strict"]["greg"] == block and half["provenance"]["round_trip"]["num_grounded"] == 2
    capsys.readouterr()
    words = ["score", "live.jsonl", "--data", "d", "--split", "train", *greg, "--out", "r.json", "--device", "cpu", "--round-trip"]
    refused(capsys, [*words, "nowhere/at/all"], "nowhere/at/all", "does not exist")
    refused(capsys, [*words, str(model), "--image-root", "elsewhere"], "elsewhere", "--image-root")
    gres = PROTOCOL_FOLDER / "gres.yaml"
    refused(capsys, [*words, str(model), "--protocol", str(gres)], 'protocol "gres"', "greg.yaml")
    (place / "d" / "images" / "a.png").unlink()
    refused(capsys, [*words, str(model)], "round trip, image 1", "a.png")
