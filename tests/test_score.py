"""Scoring files: the layout of results.json, known numbers, strict reading, sharding."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from score_case import (
    HEIGHT,
    NUM_IMAGES,
    PROTOCOLS,
    WIDTH,
    answer,
    generation,
    make_dataset,
    object_mask,
    read_lines,
    right_answers,
    write_lines,
)

from grex_mllm.compare import compare
from grex_mllm.error_analysis import errors
from grex_mllm.errors import GrexError
from grex_mllm.metrics import language
from grex_mllm.ops.masks import encode_rle
from grex_mllm.score import score
from grex_mllm.score.protocol import load_protocol
from grex_mllm.score.table import table_rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


def run(data: Path, lines: list[dict[str, Any]], protocol: str = "all", **options: Any) -> dict[str, Any]:
    path = write_lines(data.parent / "predictions.jsonl", lines)
    return score(path, data, "val", PROTOCOLS / f"{protocol}.yaml", **options)


def test_right_answers_score_one_everywhere_and_dummies_stand_beside(data: Path, tmp_path: Path) -> None:
    results = run(data, right_answers(), out=tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    strict, official = results["results"]["strict"], results["results"]["official"]
    assert set(strict) == {"gres", "grec", "count"}
    assert set(official) == {"gres", "grec"}
    names = {"num_samples", "no_target_share", "gIoU", "cIoU", "N_acc", "T_acc", "balanced_acc", *(f"Pr@0.{n}" for n in range(5, 10))}
    assert set(strict["gres"]) == set(official["gres"]) == names
    assert (strict["gres"]["num_samples"], strict["gres"]["no_target_share"]) == (20, 0.25)
    for block in (strict, official, results["baselines"]["oracle"], *results["by_tag"].values()):
        assert block["gres"]["gIoU"] == block["gres"]["cIoU"] == block["grec"]["Pr@F1"] == 1.0
    assert strict["count"]["accuracy"] == 1.0
    empty = results["baselines"]["always_empty"]
    assert (empty["gres"]["gIoU"], empty["gres"]["N_acc"], empty["gres"]["T_acc"]) == (0.25, 1.0, 0.0)
    assert (empty["grec"]["Pr@F1"], empty["count"]["accuracy"]) == (0.25, 0.25)
    assert list(results["by_num_targets"]) == ["0", "1", "2", "3+"]
    assert results["by_num_targets"]["3+"]["gres"]["num_samples"] == 5
    assert set(results["by_source"]["refcoco"]) == {"strict", "official"}
    provenance = results["provenance"]
    assert (provenance["protocol"]["name"], provenance["dataset"]["name"], provenance["dataset"]["num_expressions"]) == ("all", "made", 20)
    assert len(provenance["dataset"]["sha256"]["expressions.jsonl"]) == len(provenance["predictions"]["sha256"][0]) == 64
    labels = [label for label, _ in table_rows(results)]
    assert labels[:4] == ["strict", "official", "always_empty", "oracle"]
    cells = dict(table_rows(results))["strict"]
    assert {"N", "f0", "T-acc"} <= set(cells)


def test_known_mistakes(data: Path) -> None:
    lines = right_answers()
    lines[1] = answer(0, 1, [])  # target rejected
    lines[4] = answer(1, 0, [0])  # no-target missed
    lines[6] = answer(1, 2, [0])  # one of two
    lines[11] = answer(2, 3, [0, 1, 2]) | {"count": 2}  # the third box falls away
    results = run(data, lines)
    gres, grec = results["results"]["strict"]["gres"], results["results"]["strict"]["grec"]
    assert gres["gIoU"] == pytest.approx((20 - 2.5) / 20)
    assert (gres["N_acc"], gres["T_acc"]) == (0.8, 14 / 15)
    assert grec["Pr@F1"] == 16 / 20
    assert grec["mean_F1"] == pytest.approx((16 + 0 + 0 + 2 / 3 + 0.8) / 20)
    pixels = 64 * 30
    assert gres["cIoU"] == (pixels - 64 - 64) / (pixels + 64)
    assert results["results"]["official"]["grec"]["Pr@F1"] == 17 / 20  # all three boxes stand above the threshold
    assert results["results"]["strict"]["count"]["mae"] == (1 + 1 + 1 + 1) / 20


def test_official_needs_the_mask_at_input_size(data: Path) -> None:
    lines = [{k: v for k, v in line.items() if k != "mask_rle_input"} for line in right_answers()]
    results = run(data, lines, "gres")
    assert results["results"]["official"] == {}
    assert any("mask_rle_input" in note for note in results["provenance"]["notes"])


def test_a_probability_is_read_by_argmax_where_no_decision_is_given(data: Path) -> None:
    lines = [{k: v for k, v in line.items() if k != "no_target"} for line in right_answers()]
    lines[1]["no_target_prob"], lines[2]["no_target_prob"] = 0.5, 0.51
    results = run(data, lines, "gres")["results"]
    for protocol in ("strict", "official"):
        assert (results[protocol]["gres"]["T_acc"], results[protocol]["gres"]["gIoU"]) == (14 / 15, 19 / 20)
    for line in lines:
        del line["no_target_prob"]
    results = run(data, lines, "gres")
    assert results["results"]["official"] == {}
    assert results["results"]["strict"]["gres"]["gIoU"] == 1.0


def test_official_ground_truth_is_rasterised_at_the_input_size(data: Path) -> None:
    lines = right_answers()
    for line in lines:
        k = int(line["expression_id"][-1])
        mask = np.zeros((HEIGHT * 2, WIDTH * 2), bool)
        for n in range(k):
            mask |= np.kron(object_mask(n), np.ones((2, 2))).astype(bool)
        line["mask_rle_input"] = encode_rle(mask)
    assert run(data, lines, "gres")["results"]["official"]["gres"]["cIoU"] == 1.0


def test_unanswered_lines_are_wrong_everywhere(data: Path) -> None:
    lines = right_answers()
    for n in (0, 1):
        lines[n] = {"expression_id": lines[n]["expression_id"], "status": ("refused", "unparsable")[n]}
    results = run(data, lines)
    for block in results["results"].values():
        assert block["gres"]["gIoU"] == block["grec"]["Pr@F1"] == 18 / 20
        assert (block["gres"]["N_acc"], block["gres"]["T_acc"]) == (0.8, 14 / 15)
    assert results["results"]["strict"]["count"]["accuracy"] == 18 / 20
    assert results["provenance"]["predictions"]["unanswered_share"] == 0.1
    missing = run(data, [line for n, line in enumerate(right_answers()) if n not in (0, 1)], allow_missing=True)
    assert missing["results"] == results["results"]
    assert missing["provenance"]["predictions"]["num_missing"] == 2
    assert any("2 of 20" in note for note in missing["provenance"]["notes"])


def test_faults_name_counts_and_the_first_five(data: Path) -> None:
    good = right_answers()
    with pytest.raises(GrexError, match=r"12 expressions without a prediction \(first: made:2-0, made:2-1, made:2-2, made:2-3, made:3-0\)"):
        run(data, good[:8])
    with pytest.raises(GrexError, match=r"2 repeated expression ids \(first: made:0-0, made:0-1\)"):
        run(data, good + good[:2])
    with pytest.raises(GrexError, match=r"1 predictions not in the dataset \(first: who\)"):
        run(data, [*good, good[0] | {"expression_id": "who"}])
    other = [answer(NUM_IMAGES - 1, k) for k in range(4)]
    with pytest.raises(GrexError, match=r"4 predictions of another split"):
        run(data, other, allow_missing=True)
    with pytest.raises(GrexError, match="swapped"):
        run(data, [good[0] | {"mask_rle": encode_rle(np.zeros((WIDTH, HEIGHT), bool))}, *good[1:]])
    with pytest.raises(GrexError, match="1 of 20 answered predictions have no boxes_xyxy"):
        run(data, [{k: v for k, v in good[0].items() if k != "boxes_xyxy"}, *good[1:]])
    with pytest.raises(GrexError, match="status"):
        run(data, [good[0] | {"status": "fine"}, *good[1:]])
    with pytest.raises(GrexError, match="no_target"):
        run(data, [good[0] | {"no_target": "yes"}, *good[1:]])


def test_truncated_nan_and_foreign_lines(data: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", right_answers())
    whole = path.read_text()
    for text, words in [
        (whole[:-30], "line 20.*cut off"),
        (whole.replace("0.9]", "NaN]", 1), "NaN is not JSON"),
        (whole + '{"a": 1}\n', "line 21 with fields a"),
        (whole + "[]\n", "line 21"),
        ("", "answers none of"),
    ]:
        path.write_text(text)
        with pytest.raises(GrexError, match=words):
            score(path, data, "val", PROTOCOLS / "all.yaml", tmp_path / "out" / "results.json")
        with pytest.raises(GrexError):
            score(path, data, "val", PROTOCOLS / "all.yaml", tmp_path / "out" / "results.json", per_sample=True)
    bad = right_answers()
    bad[-1]["count"] = -1  # found only when the last line is scored
    write_lines(path, bad)
    with pytest.raises(GrexError, match="made:4-3: count -1"):
        score(path, data, "val", PROTOCOLS / "all.yaml", tmp_path / "out" / "results.json", per_sample=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(GrexError, match="one of its splits: val"):
        score(path, data, "test", PROTOCOLS / "all.yaml")


def test_splits_with_one_kind_of_expression_only(data: Path) -> None:
    """All without a target, or none: null where there is nothing to be a share of, and a file that JSON readers accept."""
    whole = read_lines(data / "expressions.jsonl")
    for targeted, n_acc, t_acc in ((False, 1.0, None), (True, None, 1.0)):
        kept = [record for record in whole if bool(record["targets"]) == targeted]
        write_lines(data / "expressions.jsonl", kept)
        names = {record["expression_id"] for record in kept}
        with warnings.catch_warnings(record=not targeted):  # cIoU: no pixel anywhere
            results = run(
                data, [line for line in right_answers() if line["expression_id"] in names], out=data.parent / "r" / "results.json"
            )
        strict = results["results"]["strict"]
        for task in ("gres", "grec"):
            assert (strict[task]["N_acc"], strict[task]["T_acc"]) == (n_acc, t_acc)
        assert strict["gres"]["gIoU"] == strict["grec"]["Pr@F1"] == results["results"]["official"]["gres"]["gIoU"] == 1.0
        assert json.loads((data.parent / "r" / "results.json").read_text()) == results


def test_calibration_and_curves_stand_in_the_results(data: Path) -> None:
    found = run(data, right_answers())["calibration"]
    assert (found["num_samples"], len(found["reliability"]), len(found["curve"])) == (20, 10, 21)
    assert found["ECE"] == pytest.approx((5 * 0.1 + 15 * 0.2) / 20)  # 0.9 where there is none, 0.2 elsewhere
    middle = next(point for point in found["curve"] if point["threshold"] == 0.5)
    assert middle == {"threshold": 0.5, "N_acc": 1.0, "T_acc": 1.0, "coverage": 0.75, "risk": 0.0}
    assert "calibration" not in run(data, [{k: v for k, v in line.items() if k != "no_target_prob"} for line in right_answers()])


def test_unknown_fields_are_named(data: Path) -> None:
    results = run(data, [line | {"logit": 1} for line in right_answers()])
    assert any("logit (20)" in note for note in results["provenance"]["notes"])


def test_processes_give_the_same_file(data: Path, tmp_path: Path) -> None:
    lines = right_answers()
    lines[3] = answer(0, 3, [2])
    path = write_lines(tmp_path / "p.jsonl", lines[::-1])
    written = []
    for number in (1, 4):
        out = tmp_path / str(number) / "results.json"
        score(path, data, "val", PROTOCOLS / "all.yaml", out, per_sample=True, num_processes=number)
        written.append((out.read_text(), (out.parent / "results.samples.jsonl").read_text()))
    assert written[0] == written[1]
    rows = read_lines(tmp_path / "1" / "results.samples.jsonl")
    assert [row["expression_id"] for row in rows] == [line["expression_id"] for line in right_answers()]
    results = json.loads(written[0][0])["results"]
    for protocol in ("strict", "official"):
        blocks = [row[protocol] for row in rows]
        assert np.mean([b["iou"] for b in blocks]) == pytest.approx(results[protocol]["gres"]["gIoU"])
        assert sum(b["intersection"] for b in blocks) / sum(b["union"] for b in blocks) == results[protocol]["gres"]["cIoU"]
        assert np.mean([b["correct"] for b in blocks]) == results[protocol]["grec"]["Pr@F1"]


def test_box_only_data_has_no_gres(data: Path) -> None:
    images = read_lines(data / "images.jsonl")
    for image in images:
        for instance in image["instances"]:
            instance["segmentation"] = None
    write_lines(data / "images.jsonl", images)
    results = run(data, right_answers())
    assert set(results["results"]["strict"]) == {"grec", "count"}
    images[0]["instances"][0]["segmentation"] = encode_rle(object_mask(0))
    write_lines(data / "images.jsonl", images)
    with pytest.raises(GrexError, match="masks for all or for none"):
        run(data, right_answers())


def test_res_and_rvos_protocols(data: Path) -> None:
    classic = run(data, right_answers(), "res")
    assert classic["provenance"]["notes"] == ["res: 5 of 20 expressions have no target and are left out"]
    res = classic["results"]["strict"]["res"]
    assert (res["num_samples"], res["mIoU"], res["Pr@0.9"]) == (15, 1.0, 1.0)
    rvos = run(data, right_answers(), "rvos")["results"]["strict"]["rvos"]
    assert (rvos["num_expressions"], rvos["J"], rvos["F"], rvos["J&F"]) == (20, 1.0, 1.0, 1.0)


def test_rec_protocol_scores_the_best_box_of_single_targets(data: Path, tmp_path: Path) -> None:
    lines = right_answers()
    lines[1] = answer(0, 1, [0, 2]) | {"box_scores": [0.8, 0.9]}  # the best box lies elsewhere
    lines[5] = answer(1, 1, [])
    lines[9] = answer(2, 1, [0, 2]) | {"box_scores": [0.3, 0.2]}  # right in spite of low scores and a box too many
    lines[13] = {"expression_id": lines[13]["expression_id"], "status": "refused"}
    out = tmp_path / "rec" / "results.json"
    path = write_lines(tmp_path / "p.jsonl", lines)
    results = score(path, data, "val", PROTOCOLS / "rec.yaml", out, per_sample=True)
    assert results["results"] == {"strict": {"rec": {"num_samples": 5, "Pr@0.5": 2 / 5}}, "official": {}}
    assert results["by_num_targets"] == {"1": {"rec": {"num_samples": 5, "Pr@0.5": 2 / 5}}}
    assert [results["baselines"][name]["rec"]["Pr@0.5"] for name in ("always_empty", "oracle")] == [0.0, 1.0]
    rows = read_lines(out.parent / "results.samples.jsonl")
    assert [row["strict"]["rec_correct"] for row in rows if "strict" in row] == [False, False, True, False, True]
    assert results["provenance"]["notes"] == ["rec: 15 of 20 expressions have no or several targets and are left out"]
    assert dict(table_rows(results))["strict"]["REC Pr@0.5"] == "40.00"
    text = compare([out, out], published=False, num_draws=50)
    assert "made val: rec, strict" in text and "| 40.00 [" in text
    assert errors(out, tmp_path / "e").count("| wrong_instance | 2 |") == 1


def test_generation_without_java(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "java_missing", lambda: language.NEEDS_JAVA)
    sets = [(i, k) for i in range(NUM_IMAGES - 1) for k in (1, 2, 3)]
    lines = []
    for i, k in sets:
        generated = generation(i, k, f"the {k} squares", "exact" if k < 3 else "wrong")
        trip = {key: v for key, v in answer(i, k, [0]).items() if key in ("mask_rle", "boxes_xyxy", "box_scores", "no_target")}
        second = generation(i, k, f"the {k} squares", "exact")
        lines.append(generated | {"round_trip": trip, "listener": {k2: second[k2] for k2 in ("expression", "judgement")} | {"score": 1.0}})
        if k == 1:
            lines[-1]["among_found"] = {"expression": "the square", "judgement": "exact"}
    results = run(data, lines)
    greg = results["results"]["strict"]["greg"]
    assert set(results["results"]["strict"]) == {"greg"}
    assert (greg["single"]["num_samples"], greg["multi"]["num_samples"], greg["all"]["num_samples"]) == (5, 10, 15)
    assert greg["all"]["METEOR"] is None
    assert "apt-get install" in greg["all"]["not_computed"]["METEOR"]
    assert greg["all"]["correct"] == pytest.approx(10 / 15)
    assert greg["listener"]["all"]["correct"] == 1.0
    assert greg["among_found"]["all"]["correct"] == 5 / 15 and greg["among_found"]["single"]["correct"] == 1.0
    assert greg["all"]["round_trip_gIoU"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert greg["all"]["round_trip_Pr@F1"] == pytest.approx(1 / 3)
    assert greg["all"]["distinct"] == 3 / 15
    with pytest.raises(GrexError, match=r"1 object sets without one \(first: 4:4.0:4.1:4.2\)"):
        run(data, lines[:-1])
    with pytest.raises(GrexError, match="1 generated expressions for object sets that the split does not name"):
        run(data, [*lines, generation(5, 1, "x")])
    assert run(data, lines[:-1], allow_missing=True)["results"]["strict"]["greg"]["statuses"] == {"missing": 1, "ok": 14}


def test_round_trips_count_the_answers_own_boxes_under_every_protocol(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`greg.yaml` has no rules for boxes: boxes of low scores are part of the answer there, as where the answer's count chooses them."""
    monkeypatch.setattr(language, "java_missing", lambda: language.NEEDS_JAVA)
    lines = []
    for i in range(NUM_IMAGES - 1):
        for k in (1, 2, 3):
            trip = {key: v for key, v in answer(i, k, list(range(k))).items() if key in ("mask_rle", "boxes_xyxy", "no_target")}
            lines.append(generation(i, k, "these", "exact") | {"round_trip": trip | {"box_scores": [0.4] * k}})
    found = [run(data, lines, protocol)["results"]["strict"]["greg"]["all"]["round_trip_Pr@F1"] for protocol in ("greg", "all")]
    assert found == [1.0, 1.0]


@pytest.mark.parametrize("path", sorted(PROTOCOLS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_protocols_load(path: Path) -> None:
    protocol = load_protocol(path)
    assert (protocol.name, protocol.version >= 1) == (path.stem, True)
    assert "--protocol" in path.read_text().splitlines()[0]


def test_protocol_faults(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, words in [
        ("name: x\nversion: 1\ntasks: {gress: {}}", 'did you mean "gres"'),
        ("name: x\nversion: 1\ntasks: {grec: {selct: all}}", 'did you mean "select"'),
        ("name: x\nversion: 1\ntasks: {grec: {select: best}}", "one of threshold"),
        ("name: x\ntasks: {}", "version"),
        ("a: [", "YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(GrexError, match=words):
            load_protocol(path)


def test_a_run_without_any_answer_is_wrong_in_every_task(tmp_path: Path) -> None:
    """Nothing but unparsable and refused lines: no "no target" comes of them, and no task is left out."""
    data = make_dataset(tmp_path / "data")
    lines = [
        {"expression_id": line["expression_id"], "status": ("unparsable", "refused", "error")[n % 3]}
        for n, line in enumerate(right_answers())
    ]
    results = score(write_lines(tmp_path / "p.jsonl", lines), data, "val", PROTOCOLS / "all.yaml")
    strict = results["results"]["strict"]
    assert strict["gres"]["gIoU"] == strict["gres"]["N_acc"] == strict["gres"]["T_acc"] == 0
    assert strict["grec"]["Pr@F1"] == strict["count"]["accuracy"] == 0 and strict["grec"]["num_samples"] == 20
    assert (
        results["results"]["official"] == {}
        and "no expression is answered (status): every task counts as wrong" in results["provenance"]["notes"]
    )
