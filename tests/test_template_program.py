"""data_prep/coco_templates.py over several sources: what it leaves out, the shares, what the judge needs, and faults of the sources."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import grex_mllm.data.coco as coco
from grex_mllm.cli import main
from grex_mllm.data.check import check_mixture
from grex_mllm.data.judges import find_judge
from grex_mllm.data.records import Dataset, load_dataset
from grex_mllm.data.templates import read_scene
from grex_mllm.data.templates.judge import SCENES
from grex_mllm.errors import GrexError

PLACES = ((5, 10), (40, 50), (76, 14), (20, 74))


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coco_templates", ROOT / "data_prep" / "coco_templates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_source(folder: Path, category: str, first: int, num: int, packed: bool = False) -> str:
    """Write a source of `num` images with 1 to 4 objects each; return what --source says of it."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for n in range(first, first + num):
        name = f"{n:012d}.png"
        pixels = np.full((100, 100, 3), 90, np.uint8)
        pixels[0, 0] = n  # no two files are equal
        for k, (x, y) in enumerate(PLACES[: 1 + n % 4]):
            side = 16 + 3 * k
            pixels[y : y + side, x : x + side] = 10 if k == 0 else 245
            corners = [float(value) for value in (x, y, x + side, y, x + side, y + side, x, y + side)]
            annotations.append(
                {"id": 10 * n + k, "image_id": n, "category_id": 1, "bbox": [x, y, side, side], "segmentation": [corners], "iscrowd": 0}
            )
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": n, "file_name": name, "height": 100, "width": 100})
    value = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": category}]}
    file = folder / ("instances.json.gz" if packed else "instances.json")
    file.write_bytes(gzip.compress(json.dumps(value).encode()) if packed else json.dumps(value).encode())
    return f"{folder.name}={file}:{folder / 'images'}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("sources")
    return root, ["--source", make_source(root / "cats", "cat", 1, 40, packed=True), "--source", make_source(root / "cars", "car", 30, 20)]


def written(program: ModuleType, out: Path, arguments: list[str]) -> Dataset:
    assert program.main([*arguments, "--out", str(out), "--expressions-per-image", "train=16,val=8,test=8"]) == 0
    return load_dataset(out)


def test_several_sources(program: ModuleType, sources: tuple[Path, list[str]], tmp_path: Path) -> None:
    (tmp_path / "left_out.txt").write_text("7\n000000000009.png\nCOCO_val2014_000000000011.jpg\n\n")
    data = written(program, tmp_path / "d", [*sources[1], "--exclude", str(tmp_path / "left_out.txt"), "--name", "two"])
    assert check_mixture([tmp_path / "d"]) == [] and data.name == "two" and data.info["skipped"]["excluded photograph"] == 3
    assert not {"7", "9", "11"} & set(data.images)
    assert {"cats-35", "cars-35", "6", "45"} <= set(data.images)  # ids that both use are told apart
    assert {record.file.split("/")[0] for record in data.images.values()} == {"cats", "cars"} and data.image_root == sources[0].resolve()
    splits = {e.image_id: e.split for e in data.expressions}
    assert all(splits[f"cats-{n}"] == splits[f"cars-{n}"] for n in range(30, 41))  # one photograph, one split
    for e in data.expressions:
        category = {"cats": "cat", "cars": "car"}[e.source]
        assert category in e.raw and {"cat": "car", "car": "cat"}[category] not in e.raw, e.raw
    for source, by_split in data.info["distribution"].items():
        cell = by_split["train"]
        mine = [e for e in data.expressions if e.source == source and e.split == "train"]
        assert cell["expressions"] == len(mine) and sum(cell["kinds"].values()) == len(mine)
        assert cell["no_target_percent"] == pytest.approx(20, abs=2) and cell["multi_target_percent"] >= 39
        assert cell["whole_category_percent"] <= 15
        assert "wrong_count" in cell["kinds"]


def test_a_split_does_not_depend_on_other_photographs(program: ModuleType, sources: tuple[Path, list[str]], tmp_path: Path) -> None:
    whole = written(program, tmp_path / "whole", sources[1])
    part = written(program, tmp_path / "part", sources[1][2:])
    splits = {e.image_id.removeprefix("cars-"): e.split for e in whole.expressions if e.source == "cars"}
    assert {e.image_id: e.split for e in part.expressions}.items() <= splits.items()


def test_the_judge_agrees_and_the_baseline_is_judged(program: ModuleType, sources: tuple[Path, list[str]], tmp_path: Path) -> None:
    data = written(program, tmp_path / "d", sources[1])
    judge = find_judge(data.folder, data.info)
    assert judge is not None
    for e in data.expressions:
        assert judge(e.raw, data.images[e.image_id], e.targets) == "exact", e
        assert judge(e.expression, data.images[e.image_id], e.targets) == "exact", e
    out = tmp_path / "said.jsonl"
    assert main(["predict", "--model", "category_side", "--data", str(data.folder), "--split", "train", "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    judged = {line["judgement"] for line in lines}
    assert "exact" in judged and judged & {"wrong", "ambiguous"} and "unparsable" not in judged
    assert all(line["reads_truth"] == "objects" for line in lines)
    (data.folder / SCENES).write_bytes((data.folder / SCENES).read_bytes().replace(b"black", b"white"))
    with pytest.raises(GrexError, match=r"SHA-256.*write the folder again"):
        find_judge(data.folder, data.info)
    (data.folder / SCENES).unlink()
    with pytest.raises(GrexError, match=f"holds no {SCENES}"):
        find_judge(data.folder, data.info)


def test_colours_travel_to_the_judge(program: ModuleType, sources: tuple[Path, list[str]], tmp_path: Path) -> None:
    data = written(program, tmp_path / "d", sources[1])
    judge = find_judge(data.folder, data.info)
    record = data.images["6"]  # three cats, the first one black
    assert judge is not None and judge("the black cat", record, [record.instances[0].annotation_id]) == "exact"
    assert read_scene(record).things[0].colours is None  # a record alone has none
    assert all(instance.attributes is None for instance in record.instances)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([], "either --instances and --images, or --source"),
        (["--source", "cats"], "NAME=INSTANCES:IMAGES"),
        (["--source", "a=x.json:y", "--source", "a=x.json:y"], "a name of its own"),
        (["--source", "a=none.json:y"], "none.json does not exist"),
        (["--source", "a=broken.json.gz:y"], "is not JSON"),
        (["--source", "a=cut.json.gz:y"], "is not JSON"),
        (["--source", "a=empty.json:y"], "without a category"),
        (["--source", "{good}", "--exclude", "none.txt"], "none.txt does not exist"),
        (["--source", "{good}", "--exclude", "blank.txt"], "names no photograph"),
        (["--source", "{good}", "--exclude", "binary.txt"], "is no text"),
        (["--source", "{good}", "--expressions-per-image", "train=3"], "--expressions-per-image train=3"),
        (["--source", "{good}", "--expressions-per-image", "0"], "a number above 0"),
        (["--source", "{good}", "--no-target-share", "0.7"], "--no-target-share 0.7"),
        (["--source", "{good}", "--multi-target-share", "-0.1"], "--multi-target-share -0.1"),
        (["--source", "{good}", "--whole-share", "2"], "--whole-share 2"),
        (["--source", "{good}", "--instances", "x.json"], "either --instances and --images"),
    ],
)
def test_faults_are_one_line(
    program: ModuleType,
    sources: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    files: dict[str, bytes] = {"broken.json.gz": b"nothing", "cut.json.gz": gzip.compress(b'{"images": []}')[:-9], "blank.txt": b"\n \n"}
    files |= {"binary.txt": b"\xff\xfe\x00", "empty.json": b'{"images": [], "annotations": [], "categories": []}'}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    arguments = [text.replace("{good}", sources[1][1]) for text in changed]
    assert program.main([*arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists(), error


def test_a_packed_file_is_unpacked_to_a_limit(sources: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(GrexError, match="unpacks to more than 1,000 bytes"):
        coco.load_instances(sources[0] / "cats" / "instances.json.gz")


def test_an_image_outside_its_folder_is_refused(program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = make_source(tmp_path / "a" / "cats", "cat", 1, 4)
    file = tmp_path / "a" / "cats" / "instances.json"
    value: dict[str, Any] = json.loads(file.read_text())
    Image.new("RGB", (100, 100)).save(tmp_path / "secret.png")
    value["images"][0]["file_name"] = "../../../secret.png"
    file.write_text(json.dumps(value))
    assert program.main(["--source", given, "--out", str(tmp_path / "out")]) == 2
    assert "without '..'" in capsys.readouterr().err


def test_photographs_of_human_expressions_stay_out(shared: Path) -> None:
    from grex_mllm.data.templates.photographs import read_excluded

    names = read_excluded(shared / "data" / "human_refs" / "instances.json")
    photos = json.loads((shared / "data" / "photos" / "instances.json").read_text())["images"]
    assert sum(str(image["id"]) in names for image in photos) == 47
