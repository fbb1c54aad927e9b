"""Prediction files: same answers for any batch, worker and process count; resumable; nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_config, tiny_speaker

from grex_mllm.config import PROTOCOL_FOLDER
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.ops.masks import decode_rle
from grex_mllm.predict import predict_split
from grex_mllm.predictors.grex import GrexPredictor
from grex_mllm.predictors.protocol import object_sets
from grex_mllm.score import score


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny random model with a generator (`m`) and a dataset of six scenes (`d`)."""
    root = tmp_path_factory.mktemp("predict")
    export(SyntheticConfig(image_size=64), "test", 6, root / "d", 5)
    tiny_speaker(root / "t").save_pretrained(root / "m")
    return root


def run(place: Path, out: str, tasks=("ground", "generate"), listener=0, limit=None, overrides=(), data="d") -> list[dict]:
    where = (str(place / "m"), str(place / data), place / out, "test", list(tasks))
    path = predict_split(*where, listener=listener, limit=limit, device="cpu", overrides=list(overrides))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").strip().split("\n")]


def same(first: list[dict], second: list[dict]) -> None:
    """Equal decisions, boxes and scores within rounding."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name in ("boxes_xyxy", "box_scores", "no_target_prob", "minimap"):
                np.testing.assert_allclose(np.asarray(a[name], float), np.asarray(b[name], float), atol=2e-2 if name == "minimap" else 2e-3)
            else:
                assert a[name] == b[name], name


def test_one_line_for_every_expression_and_object_set(place):
    lines = run(place, "all.jsonl", listener=2)
    grounded = [line for line in lines if "expression_id" in line]
    generated = [line for line in lines if "targets" in line]
    assert len(grounded) == 30 and len({line["expression_id"] for line in grounded}) == 30
    assert generated and all(
        {"image_id", "targets", "expression", "status", "listener", "candidates", "among_found"} <= line.keys() for line in generated
    )
    assert {line["judgement"] for line in generated} <= {"exact", "wrong", "ambiguous", "unparsable"}
    for line in grounded:
        assert decode_rle(line["mask_rle"]).shape == (64, 64) and 0 <= line["no_target_prob"] <= 1
        assert len(line["boxes_xyxy"]) == len(line["box_scores"])
        if line["no_target"]:
            assert not decode_rle(line["mask_rle"]).any() and line["boxes_xyxy"] == []
    assert any(decode_rle(line["mask_rle"]).any() for line in grounded)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batch_size_does_not_matter(place, batch):
    expected = place / "batch64.jsonl"
    if not expected.exists():
        run(place, "batch64.jsonl", tasks=["ground"])
    lines = [json.loads(line) for line in expected.read_text().splitlines()]
    same(run(place, f"batch{batch}.jsonl", tasks=["ground"], overrides=[f"--predict.batch={batch}"]), lines)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_matter(place, workers):
    same(run(place, f"w{workers}.jsonl", overrides=[f"--data.num_workers={workers}"]), run(place, f"w0for{workers}.jsonl"))


def test_a_fault_of_the_data_has_the_same_words_from_a_worker(place):
    shutil.copytree(place / "d", place / "broken")
    first = next((place / "broken" / "images").iterdir())
    for image in (place / "broken" / "images").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    said = []
    for workers in (0, 2):
        with pytest.raises(GrexError) as caught:
            predict_split(str(place / "m"), str(place / "broken"), place / "b.jsonl", "test", ["ground"], device="cpu",
                          overrides=[f"--data.num_workers={workers}"])  # fmt: skip
        said.append(str(caught.value))
    assert said[0] == said[1] and "images.jsonl line 1" in said[0] and first.suffix in said[0] and "Traceback" not in said[0]
    assert not list(place.glob("b.jsonl*"))


def test_boxes_alone_have_no_masks_in_the_file(place):
    for line in run(place, "boxes.jsonl", tasks=["ground"], overrides=["--predict.masks=false"]):
        assert "mask_rle" not in line and "mask_rle_input" not in line and len(line["boxes_xyxy"]) == len(line["box_scores"])


def test_interrupted_run_goes_on_where_it_stopped(place):
    whole = run(place, "whole.jsonl")
    part = place / "cut.jsonl.part"
    with pytest.raises(ZeroDivisionError):
        _interrupt(place, "cut.jsonl", after=4)
    assert part.exists() and not (place / "cut.jsonl").exists()
    done = part.read_text().count("\n") - 1
    with part.open("a") as file:
        file.write('{"key": "x", "line": {"expre')  # cut in the middle of a line
    assert 0 < done < len(whole)
    assert run(place, "cut.jsonl") == whole and not part.exists()


def test_a_resumed_run_reads_ids_that_hold_a_line_separator(place):
    """U+2028 ends a line for `str.splitlines`, but not in a JSONL file."""
    shutil.copytree(place / "d", place / "odd")
    records = [json.loads(line) for line in (place / "d" / "expressions.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | {"expression_id": f"e\u2028{n}"}) + "\n" for n, record in enumerate(records)]
    (place / "odd" / "expressions.jsonl").write_text("".join(lines))
    with pytest.raises(ZeroDivisionError):
        _interrupt(place, "odd.jsonl", after=2, data="odd")
    lines = run(place, "odd.jsonl", tasks=["ground"], data="odd")
    assert len(lines) == len(records) and lines[7]["expression_id"] == "e\u20287"


def _interrupt(place: Path, out: str, after: int, data: str = "d") -> None:
    """Let the prediction fail at the image after so many."""
    with pytest.MonkeyPatch.context() as patch:
        original, items = GrexPredictor._encoded, []

        def failing(self, item):
            items.append(item)
            if len({id(one) for one in items}) > after:
                raise ZeroDivisionError
            return original(self, item)

        patch.setattr(GrexPredictor, "_encoded", failing)
        run(place, out, tasks=["ground"] if data != "d" else ("ground", "generate"), data=data)


def test_part_of_another_run_and_existing_output_are_refused(place):
    run(place, "one.jsonl", limit=2)
    with pytest.raises(GrexError, match="exists"):
        run(place, "one.jsonl", limit=2)
    (place / "two.jsonl.part").write_text('{"fingerprint": "other"}\n')
    with pytest.raises(GrexError, match="another model"):
        run(place, "two.jsonl")
    with pytest.raises(GrexError, match="task"):
        run(place, "three.jsonl", tasks=["sing"])
    assert not (place / "three.jsonl").exists()


def test_processes_share_the_work(place):
    exact = ["--predict.precision=fp32"]  # in bfloat16 the number of threads may round a pixel otherwise
    expected = {line["expression_id"]: line for line in run(place, "alone.jsonl", tasks=["ground"], overrides=exact)}
    code = (
        "import sys; from pathlib import Path; from grex_mllm.predict import predict_split\n"
        f"predict_split({str(place / 'm')!r}, {str(place / 'd')!r}, Path({str(place / 'shared.jsonl')!r}), "
        f"'test', ['ground'], device='cpu', overrides={exact})"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    lines = [json.loads(line) for line in (place / "shared.jsonl").read_text().splitlines()]
    assert len(lines) == len(expected)
    same(lines, [expected[line["expression_id"]] for line in lines])
    assert not list(place.glob("shared.jsonl.*"))


def test_object_sets_are_distinct(place):
    from grex_mllm.data.dataset import FolderDataset

    for sample in FolderDataset(place / "d", "test", 10**9):
        sets = object_sets(sample.expressions)
        assert len(sets) == len(set(sets)) and set(sets) == {tuple(sorted(e.targets)) for e in sample.expressions if e.targets}


def test_a_model_of_masks_alone_is_scored_on_masks_alone(tmp_path: Path) -> None:
    """As a converted GRES checkpoint: no box, no count and nothing that could be scored as one."""
    changes = {"name": "rela", "num_layers": 2, "minimap_side": 4, "boxes": "false", "count": "false"}
    config = tiny_config(**{f"model__decoder__{name}": value for name, value in changes.items()})
    tokenizer = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = tokenizer.vocab_size
    model = GrexModel(config, tokenizer).eval()
    with torch.no_grad():  # something is found, and there is a target
        model.grounding.decoder.language_part.heads.no_target.layers[-1].bias.copy_(torch.tensor([9.0, -9.0]))
    model.save_pretrained(tmp_path / "m")
    export(SyntheticConfig(image_size=64), "test", 2, tmp_path / "d", 3)
    out = predict_split(str(tmp_path / "m"), str(tmp_path / "d"), tmp_path / "p.jsonl", "test", ["ground"], device="cpu")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 6 and not any({"boxes_xyxy", "box_scores", "count"} & line.keys() for line in lines)
    results = score(out, tmp_path / "d", "test", PROTOCOL_FOLDER / "all.yaml")["results"]["strict"]
    assert "gres" in results and "grec" not in results and "count" not in results
