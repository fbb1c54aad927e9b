"""The programs of data_prep/ through their real command lines: published formats and their traps."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny_folder import gradient

from grex_mllm.data.check import check_mixture
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.pickles import load_plain_pickle
from grex_mllm.data.records import load_dataset
from grex_mllm.data.refs_program import build_parser, run
from grex_mllm.data.transforms import prepare
from grex_mllm.errors import GrexError


def annotation(name: int, image: int, **changes: Any) -> dict[str, Any]:
    polygon = [2.0, 3.0, 12.0, 3.0, 12.0, 13.0, 2.0, 13.0]
    whole = {"id": name, "image_id": image, "category_id": 18, "bbox": [2, 3, 10, 10], "segmentation": [polygon], "iscrowd": 0, "area": 100}
    return {**whole, **changes}


def ref(name: int, image: int, targets: Any, *sentences: Any, split: str = "train") -> dict[str, Any]:
    generated = [
        {"sent": text.lower(), "raw": text, "sent_id": 10 * name + n, "tokens": []} if isinstance(text, str) else text
        for n, text in enumerate(sentences)
    ]
    return {
        "ref_id": name,
        "image_id": image,
        "ann_id": targets,
        "category_id": 18,
        "split": split,
        "file_name": f"COCO_train2014_{image:012d}_{name}.jpg",
        "sentences": generated,
    }


def instances() -> dict[str, Any]:
    crowd = {"size": [30, 40], "counts": [0, 30 * 40]}
    return {
        "images": [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "height": 30, "width": 40} for n in (1, 2)],
        "categories": [{"id": 18, "name": "dog", "supercategory": "animal"}],
        "annotations": [
            annotation(11, 1),
            annotation(12, 1, segmentation=[[20.0, 5.0, 30.0, 5.0, 30.0, 15.0, 20.0, 15.0], [1.0, 1.0, 5.0, 5.0]], bbox=[20, 5, 10, 10]),
            annotation(13, 1, iscrowd=1, segmentation=crowd, bbox=[0, 0, 40, 30]),
            annotation(14, 1, segmentation=[[1.0, 1.0, 2.0, 2.0]], bbox=[1, 1, 1, 1]),
            annotation(21, 2),
        ],
    }


def good_refs() -> list[dict[str, Any]]:
    return [
        ref(1, 1, 11, "The Dog!", "A dog"),
        ref(2, 1, [11, 12], "Both dogs"),
        ref(2, 1, [12], "Second dog with the same ref id"),
        ref(3, 1, [-1], "The cat"),
        ref(4, 1, [11, 13], "All of them"),
        ref(5, 1, [14], "The speck"),
        ref(6, 2, -1, "A horse", split="val"),
        ref(7, 1, [12, 12], {"sent": "same", "raw": "Same", "sent_id": 10}),
    ]


def sources(folder: Path, refs: Any, changed_instances: dict[str, Any] | None = None) -> list[str]:
    """Write the published files and return the command line."""
    (folder / "train2014").mkdir(parents=True, exist_ok=True)
    for number in (1, 2):
        Image.fromarray(gradient()[:: 3 - 2 * number]).save(folder / "train2014" / f"COCO_train2014_{number:012d}.jpg")
    refs_path = folder / "grefs(unc).json"
    if isinstance(refs, bytes):
        refs_path = folder / "refs(unc).p"
        refs_path.write_bytes(refs)
    else:
        refs_path.write_text(json.dumps(refs))
    (folder / "instances.json").write_text(json.dumps(changed_instances or instances()))
    flags = {"--refs": refs_path, "--instances": folder / "instances.json", "--images": folder / "train2014", "--out": folder / "out"}
    return [str(item) for pair in flags.items() for item in pair]


def convert(arguments: list[str]) -> int:
    return run(build_parser("test", "grefcoco", "none"), "test", arguments)


def program(name: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "data_prep" / name, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_traps_of_grefcoco(tmp_path: Path) -> None:
    assert convert(sources(tmp_path, good_refs())) == 0
    dataset = load_dataset(tmp_path / "out")
    generated = [(e.expression_id, e.ref_id, e.raw, e.targets) for e in dataset.expressions]
    assert generated == [
        ("grefcoco:10", "1", "The Dog!", ["11"]),
        ("grefcoco:11", "1", "A dog", ["11"]),
        ("grefcoco:20", "2", "Both dogs", ["11", "12"]),
        ("grefcoco:2.0", "2", "Second dog with the same ref id", ["12"]),
        ("grefcoco:30", "3", "The cat", []),
        ("grefcoco:60", "6", "A horse", []),
        ("grefcoco:7.0", "7", "Same", ["12"]),
    ]
    assert dataset.expressions[0].expression == "the dog!"
    first = dataset.images["1"]
    assert first.file == "COCO_train2014_000000000001.jpg"
    assert [(i.annotation_id, i.iscrowd) for i in first.instances] == [("11", False), ("12", False), ("13", True)]
    assert first.instances[0].box_xyxy == [2, 3, 12, 13] and len(first.instances[1].segmentation) == 1
    assert dataset.info["skipped"] == {
        "polygon with fewer than 3 points": 2,
        "instance whose mask has no pixel": 1,
        "expression of a ref whose target is a crowd region": 1,
        "expression of a ref whose target is an annotation without a usable mask": 1,
        "annotation id repeated within a ref": 1,
    }
    assert dataset.info["counts"]["train"]["by_num_targets"] == {"0": 1, "1": 4, "2": 1}
    assert dataset.info["counts"]["val"] == {"expressions": 1, "images": 1, "refs": 1, "by_num_targets": {"0": 1}}
    assert [len(source["sha256"]) for source in dataset.info["sources"]] == [64, 64]
    assert check_mixture([tmp_path / "out"]) == []


def changed(position: int, **changes: Any) -> list[dict[str, Any]]:
    refs = good_refs()
    refs[position].update(changes)
    return refs


BAD: dict[str, tuple[Any, dict[str, Any] | None, list[str]]] = {  # refs, instances, words of the message
    "annotation": (changed(0, ann_id=[99]), None, ["ref 1", "ann_id", "99", "instances.json"]),
    "other_image": (changed(0, ann_id=[21]), None, ["ref 1", "annotation 21 lies on image 2", "image 1"]),
    "image": (changed(0, image_id=7), None, ["ref 1", "image_id 7"]),
    "minus_one_and_more": (changed(0, ann_id=[-1, 11]), None, ["ann_id", "-1"]),
    "field": (changed(1, split=None), None, ["ref number 1", "field split", "None"]),
    "empty": (changed(0, sentences=[{"sent": "", "raw": " ", "sent_id": 1}]), None, ["ref 1 sentence 0", "raw is empty", "--skip-bad"]),
    "long": (changed(0, sentences=[{"sent": "a" * 5000, "raw": "b", "sent_id": 1}]), None, ["5,000 characters", "1,000"]),
    "sentence": (changed(0, sentences=["the dog"]), None, ["ref 1 sentence 0", "raw or sent"]),
    "not_a_list": ({"refs": []}, None, ["dict", "a list of refs"]),
    "rle_size": (
        good_refs(),
        {**instances(), "annotations": [annotation(11, 1, segmentation={"size": [40, 30], "counts": [0, 1200]})]},
        ["annotation 11", "40x30", "30x40"],
    ),
    "instances": (good_refs(), {"images": []}, ["instances.json", "annotations"]),
    "twice": (good_refs(), {**instances(), "images": instances()["images"] * 2}, ["twice"]),
    "missing_image": (
        good_refs(),
        {**instances(), "images": [{**i, "file_name": "x.jpg"} for i in instances()["images"]]},
        ["x.jpg", "2 of 2", "--images"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    refs, changed_instances, words = BAD[name]
    arguments = sources(tmp_path, refs, changed_instances)
    before = sorted(tmp_path.rglob("*"))
    assert convert(arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words), message
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_sentences_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    refs = [ref(1, 1, 11, "The dog", "  ", "x" * 1001)]
    assert convert([*sources(tmp_path, refs), "--skip-bad"]) == 0
    dataset = load_dataset(tmp_path / "out")
    assert len(dataset.expressions) == 1 and dataset.info["skipped"]["empty or over-long expression"] == 2


def test_a_finished_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    arguments = sources(tmp_path, good_refs())
    assert convert(arguments) == 0 and convert(arguments) == 2 and convert([*arguments, "--overwrite"]) == 0


def test_pickled_refs_of_python_two(tmp_path: Path) -> None:
    refs = [ref(1, 1, 11, "The dog na\u00efve"), ref(2, 2, 21, "Dog two", split="testA")]
    result = program("refcoco.py", [*sources(tmp_path, pickle.dumps(refs, protocol=2)), "--name", "refcoco+"])
    assert result.returncode == 0, result.stderr
    dataset = load_dataset(tmp_path / "out")
    assert [(e.expression_id, e.raw, e.split, e.source) for e in dataset.expressions] == [
        ("refcoco+:10", "The dog naïve", "train", "refcoco+"),
        ("refcoco+:20", "Dog two", "testA", "refcoco+"),
    ]


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("the pickle ran code",))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(sources(tmp_path, pickle.dumps([Bomb()]))) == 2
    captured = capsys.readouterr()
    assert "builtins.print" in captured.err and "ran code" not in captured.out
    for content in (b"", b"\x80", b"junk", pickle.dumps(good_refs())[:-30], b"cos\nsystem\n(S'true'\ntR."):
        (tmp_path / "x.p").write_bytes(content)
        with pytest.raises(GrexError, match=r"x\.p"):
            load_plain_pickle(tmp_path / "x.p")
    with pytest.raises(GrexError, match="does not exist"):
        load_plain_pickle(tmp_path / "y.p")


def test_byte_strings_of_python_two_without_encoding(tmp_path: Path) -> None:
    (tmp_path / "x.p").write_bytes(b"(lp0\nS'caf\\xe9'\np1\na.")
    assert load_plain_pickle(tmp_path / "x.p") == ["café"]
    (tmp_path / "x.p").write_bytes(b"(lp0\nS'caf\\xc3\\xa9'\np1\na.")
    assert load_plain_pickle(tmp_path / "x.p") == ["café"]


def test_against_the_released_reader(shared: Path, tmp_path: Path) -> None:
    """Order, tokens, images and merged masks of all 72 recorded samples, through the real program and dataset."""
    from transformers import BertTokenizer

    folder = shared / "oracle" / "preprocess"
    expected = json.loads((folder / "expected.json").read_text())
    recorded = np.load(folder / "expected.npz")
    refs, places = folder / "grefcoco" / "grefs(unc).json", {"--images": folder / "images" / "train2014", "--out": tmp_path / "out"}
    flags = {"--refs": refs, "--instances": folder / "grefcoco" / "instances.json", **places}
    result = program("grefcoco.py", [str(item) for pair in flags.items() for item in pair])
    assert result.returncode == 0, result.stderr
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    for split in ("train", "val"):
        samples = list(FolderDataset(tmp_path / "out", split, expressions_per_image=1))
        by_order = {e.expression_id: n for n, e in enumerate(load_dataset(tmp_path / "out").expressions_of(split))}
        samples.sort(key=lambda sample: by_order[sample.expressions[0].expression_id])
        assert len(samples) == len(expected[split]) == 36
        for index, (sample, entry) in enumerate(zip(samples, expected[split], strict=True)):
            (generated,) = sample.expressions
            assert (generated.raw, generated.image_id, generated.ref_id) == (
                entry["sentence"]["raw"],
                str(entry["image_id"]),
                str(entry["sentence"]["ref_id"]),
            )
            assert (not generated.targets) == entry["empty"] and sample.record.file == entry["file_name"]
            assert (sample.record.height, sample.record.width) == (entry["height"], entry["width"])
            tokens = tokenizer.encode(generated.raw, add_special_tokens=True)[:20]
            assert tokens + [0] * (20 - len(tokens)) == entry["lang_tokens"][0]
            assert [1] * len(tokens) + [0] * (20 - len(tokens)) == entry["lang_mask"][0]
            ready = prepare(sample, 480, "squash")
            wanted = [instance.annotation_id in generated.targets for instance in ready.instances]
            truth = np.unpackbits(recorded[f"{split}_{index:02d}_mask"])[: 480 * 480].reshape(480, 480).astype(bool)
            assert np.array_equal(ready.instance_masks[wanted].any(axis=0), truth)
            if index < 6:
                assert np.array_equal(ready.image.transpose(2, 0, 1), recorded[f"{split}_{index:02d}_image"])


def test_real_photographs_and_human_expressions(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "human_refs"
    flags = {"--refs": folder / "grefs_mini.json", "--instances": folder / "instances.json", "--images": folder / "images"}
    assert convert([str(item) for pair in {**flags, "--out": tmp_path / "out"}.items() for item in pair]) == 0
    dataset = load_dataset(tmp_path / "out")
    assert len(dataset.images) == 47 and dataset.info["num_instances"] == 620 and dataset.info["num_crowd_regions"] == 7
    assert dataset.info["counts"]["test"] == {
        "expressions": 133,
        "images": 47,
        "refs": 86,
        "by_num_targets": {"0": 4, "1": 117, "2": 6, "3": 6},
    }
    assert dataset.info["skipped"] == {} and check_mixture([tmp_path / "out"]) == []


@pytest.fixture(scope="module")
def templates_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coco_templates_program", ROOT / "data_prep" / "coco_templates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_templates_over_real_photographs(shared: Path, tmp_path: Path, templates_program: ModuleType) -> None:
    photos = shared / "data" / "photos"
    published = json.loads((photos / "instances.json").read_text())
    published["images"] = published["images"][:60]
    (tmp_path / "instances.json").write_text(json.dumps(published))
    arguments = ["--instances", str(tmp_path / "instances.json"), "--images", str(photos / "images")]
    for name in ("one", "two"):
        assert templates_program.main([*arguments, "--out", str(tmp_path / name)]) == 0
    one = load_dataset(tmp_path / "one")
    assert (tmp_path / "one" / "expressions.jsonl").read_bytes() == (tmp_path / "two" / "expressions.jsonl").read_bytes()
    assert check_mixture([tmp_path / "one"]) == []
    share = sum(not e.targets for e in one.expressions) / len(one.expressions)
    assert len(one.expressions) > 300 and 0.12 < share < 0.28 and set(one.splits) == {"train", "val", "test"}
    assert {e.source for e in one.expressions} == {"coco_templates"} and "synthetic" in one.info["text"]
    for image_id in one.images:
        texts = [e.raw for e in one.expressions if e.image_id == image_id]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("text", ["train=0.5", "train", "train=a", "=1", "train=1.5,val=-0.5"])
def test_bad_split_shares(tmp_path: Path, templates_program: ModuleType, capsys: pytest.CaptureFixture[str], text: str) -> None:
    sources(tmp_path, good_refs())
    arguments = ["--instances", str(tmp_path / "instances.json"), "--images", str(tmp_path / "train2014"), "--out", str(tmp_path / "out")]
    assert templates_program.main([*arguments, "--splits", text]) == 2
    assert "--splits" in capsys.readouterr().err and not (tmp_path / "out").exists()
