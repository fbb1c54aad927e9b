"""One page for several models on one split: numbers, what asking cost, and pictures of where they disagree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from grex_mllm import draw
from grex_mllm.compare import NUM_DRAWS, Bootstrap, Run, Table, compare_tables, published_tables, read_runs, spread_tables
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.records import read_lines
from grex_mllm.errors import fault
from grex_mllm.metrics import METRICS, entry, in_order
from grex_mllm.metrics.columns import columns
from grex_mllm.metrics.truth import target_instances
from grex_mllm.report import cases, pictures
from grex_mllm.report.html import Section, escape
from grex_mllm.report.page import compose
from grex_mllm.types import Sample
from grex_mllm.writing import whole_file

KINDS = {"boxes": "boxes", "no_target": "no target", "text": "text", "refused": "refused", "unparsable": "unparsable", "error": "error"}
TASKS = {"ground": "grounding", "generate": "group expressions"}
SAME = 0.05  # answers whose IoU differ by less do not disagree


def write_models_page(
    results: Sequence[str | Path],
    out: str | Path,
    *,
    data: str | Path | None = None,
    published: bool = True,
    any_protocol: bool = False,
    metrics: Sequence[str] = (),
    num_cases: int = 12,
    num_draws: int = NUM_DRAWS,
) -> Path:
    """Write the page `out` about results.json files of one dataset and split: models as rows, tasks and metrics as columns.

    data: the dataset folder, for the pictures; the predictions are looked for beside each results.json.  published, any_protocol,
    metrics: as for `compare`.  num_cases: pictures of disagreements, of each task.

    Raises:
        GrexError: a file that is no results.json, other protocols, or results of several datasets or splits.
    """
    runs, known = read_runs(results, metrics, any_protocol)
    places = sorted({(str(d["name"]), str(d["split"])) for d in (run.results["provenance"]["dataset"] for run in runs)})
    if len(places) > 1:
        given = ", ".join(f"{name} {split}" for name, split in places)
        raise fault(f"results of {given}", "one dataset and split", "write a page for each, or use --format markdown")
    notes: list[str] = []
    lead = f"{len(runs)} models on <b>{escape(' '.join(places[0]))}</b>. Fractions in percent; the best of each column is marked."
    draws = Bootstrap(runs, num_draws, 0, known) if all(run.rows for run in runs) else None
    tables = spread_tables([run for run in runs if run.results["provenance"]["predictions"].get("by")], known)
    tables += compare_tables(runs, known, draws)
    sections = [
        Section("summary", "Models", _summary(runs, known), lead),
        Section("asked", "How they answered, and what it cost", _asked(runs)),
        *_disagreements(runs, results, data, places[0][1], num_cases, notes),
        Section("numbers", "Every number", "".join(map(_html, tables)), "Strict and official protocol; intervals where rows were kept."),
        Section("published", "Published rows", _published(runs) if published else "", "Other data, unless the runs were scored on it."),
    ]
    sections.append(Section("notes", "Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""))
    with whole_file(out) as work:
        work.write_text(compose(" · ".join(run.name for run in runs), sections), encoding="utf-8", errors="replace")
    return Path(out)


def _summary(runs: list[Run], known: Collection[str]) -> str:
    """Return one row for each model and one column for each number, over all, and the first of each task by number of targets."""
    blocks = [(label(run), run.results["results"]["strict"]) for run in runs]
    whole = _matrix(blocks + [(f"dummy: {name}", block) for name, block in runs[0].results["baselines"].items()], known)
    parts = []
    for task in in_order({task for run in runs for block in run.results["by_num_targets"].values() for task in block if task in known}):
        column = entry(task).COLUMNS[0]
        buckets = [b for b in ("0", "1", "2", "3+") if any(task in run.results["by_num_targets"].get(b, {}) for run in runs)]
        rows = [
            [label(run), *(column.text(column.find(run.results["by_num_targets"].get(b, {}).get(task))) for b in buckets)] for run in runs
        ]
        if all(cell == "-" for row in rows for cell in row[1:]):
            continue
        parts.append(_html(Table(f"{task} {column.name} by number of targets", ["model", *buckets], rows)))
    return whole + f'<div class="tables">{"".join(parts)}</div>'


def label(run: Run) -> str:
    """Return the name of a run, with the name that its predictions give themselves."""
    by = ", ".join(run.results["provenance"]["predictions"].get("by") or [])
    return f"{run.name} ({by})" if by and not by.startswith(f"{run.name},") else by or run.name


def _matrix(rows: list[tuple[str, dict[str, Any]]], known: Collection[str]) -> str:
    tasks = in_order({task for _, block in rows for task in block if task in known})
    shown = [(t, c) for t in tasks for c in columns(entry(t), "report") if any(c.find(block.get(t)) is not None for _, block in rows)]
    best: dict[int, float] = {}
    for n, (task, column) in enumerate(shown):
        values = [v for name, block in rows if not name.startswith("dummy") and isinstance(v := column.find(block.get(task)), int | float)]
        if len(values) > 1 and len(set(values)) > 1:
            best[n] = max(values) if column.higher_is_better else min(values)
    head = "".join(f'<th scope="col">{escape(c.name if t in c.name.lower() else f"{t} {c.name}")}</th>' for t, c in shown)
    body = ""
    for name, block in rows:
        cells = ""
        for n, (task, column) in enumerate(shown):
            value = column.find(block.get(task))
            text = escape(column.text(value, 1)) if value is not None else "–"
            cells += f"<td>{f'<b>{text}</b>' if n in best and value == best[n] and not name.startswith('dummy') else text}</td>"
        kind = ' class="dummy"' if name.startswith("dummy") else ""
        body += f'<tr{kind}><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _asked(runs: list[Run]) -> str:
    """Return the shares of answers by kind, with calls, tokens, time and cost of each sample, where models were asked in words."""
    rows: dict[str, list[list[str]]] = {}
    for run in runs:
        for task, block in (run.results["provenance"]["predictions"].get("asked") or {}).items():
            number = max(int(block["num_samples"]), 1)
            shares = [f"{100 * block['shares'].get(kind, 0.0):.1f}" for kind in KINDS]
            spent = block.get("spent", {})
            each = [block["num_calls"], block.get("num_prompt_tokens", 0), block.get("num_completion_tokens", 0)]
            cells = [f"{value / number:.1f}" for value in each]
            flags = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in block["flags"].items()) or "–"
            calls = max(spent.get("calls", 0.0), 1.0)  # asked again: the mean of a call, times the calls of a sample
            seconds, money = (
                f"{spent[name] / calls * block['num_calls'] / number:.{places}f}" if spent.get(name) else "–"
                for name, places in (("seconds", 2), ("cost", 6))
            )
            rows.setdefault(task, []).append([label(run), str(number), *shares, *cells, seconds, money, flags])
    header = [
        "model",
        "N",
        *KINDS.values(),
        "calls",
        "prompt tokens",
        "answer tokens",
        "seconds",
        "cost",
        "rules of the parser that were needed",
    ]
    note = '<p class="note">Calls, tokens, seconds and cost are means of one sample; an unparsable answer counts as wrong.</p>'
    return "".join(_html(Table(TASKS.get(task, task), header, found)) for task, found in rows.items()) + (note if rows else "")


def _disagreements(
    runs: list[Run], results: Sequence[str | Path], data: str | Path | None, split: str, number: int, notes: list[str]
) -> list[Section]:
    if data is None:
        notes.append("No pictures: the dataset folder was not given (--data).")
        return []
    lines = [_lines_of(run, Path(path), notes) for run, path in zip(runs, results, strict=True)]
    source = FolderDataset(data, split, 10**9)
    position = {record.image_id: n for n, record in enumerate({record.image_id: record for record in source.expressions}.values())}

    @lru_cache(maxsize=64)
    def sample(image_id: str) -> Sample:
        return source[position[image_id]]

    grounding, names = _that_answer(runs, lines, False)
    spread: list[tuple[float, str, str]] = []
    for record in source.expressions if len(grounding) > 1 else ():
        found = [line.get(record.expression_id) for line in grounding]
        if any(one is None for one in found):
            continue
        judged = [cases.judge_grounding(sample(record.image_id), record, one).score for one in found if one is not None]
        if max(judged) - min(judged) > SAME:
            spread.append((max(judged) - min(judged), record.image_id, record.expression_id))
    mixed = sorted(spread, key=lambda item: (-item[0], hashlib.sha256(item[2].encode()).digest()))  # of equals, from anywhere in the split
    chosen = _no_more_than_one_of_an_image(mixed, number)
    ground = [_grounding_card(sample(image), expression, grounding, names) for _, image, expression in chosen]
    texts_of, names = _that_answer(runs, lines, True)
    asked = [key for key in texts_of[0] if key.startswith("set:") and all(key in line for line in texts_of)] if len(texts_of) > 1 else []
    differ = [key for key in asked if len({str(line[key].get("expression", "")).strip().lower() for line in texts_of}) > 1]
    generate = [_generation_card(sample(texts_of[0][key]["image_id"]), key, texts_of, names) for key in cases.spread(differ, number)]
    share = f"{len(spread):,} of {len(source.expressions):,} expressions are answered differently; the widest differences, one of an image."
    texts = (
        f"{len(differ):,} of {len(asked):,} object sets are described differently; at even distances in the order of the split, not chosen."
    )
    return [
        Section("disagreements", "Where they disagree", pictures.sheet("Grounding", ground, share, wide=len(grounding) > 2)),
        Section("texts", "What they write", pictures.sheet("Group expressions", generate, texts)),
    ]


def _that_answer(runs: list[Run], lines: list[dict[str, dict[str, Any]]], sets: bool) -> tuple[list[dict[str, dict[str, Any]]], list[str]]:
    """Return the lines and names of the runs that describe object sets, or that ground expressions."""
    found = [(line, run.name) for run, line in zip(runs, lines, strict=True) if any(key.startswith("set:") == sets for key in line)]
    return [line for line, _ in found], [name for _, name in found]


def _no_more_than_one_of_an_image(ranked: list[tuple[float, str, str]], number: int) -> list[tuple[float, str, str]]:
    first: dict[str, tuple[float, str, str]] = {}
    for item in ranked:
        first.setdefault(item[1], item)
    return list(first.values())[:number]


def _lines_of(run: Run, results: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Return expression id, or "set:...", -> prediction line of a run; files that do not lie beside its results.json are noted."""
    found: dict[str, dict[str, Any]] = {}
    for name in run.results["provenance"]["predictions"]["files"]:
        path = next((p for p in (results.parent / Path(name).name, results.parent.parent / Path(name).name) if p.is_file()), None)
        if path is None:
            notes.append(f"{run.name}: no pictures, {name} does not lie beside {results.name}.")
            continue
        for _, _, line in read_lines(path):
            if "expression_id" in line:
                found[str(line["expression_id"])] = line
            elif "image_id" in line and "targets" in line:
                found[f"set:{json.dumps([line['image_id'], sorted(line['targets'])])}"] = line
    return found


def _grounding_card(sample: Sample, expression_id: str, lines: list[dict[str, Any]], names: list[str]) -> str:
    record = next(found for found in sample.expressions if found.expression_id == expression_id)
    wanted = target_instances(sample.record, record.targets)
    truth = pictures.truth_picture(sample, record)
    panels, badges = [pictures.panel(truth, "ground truth", f"Ground truth: {len(wanted)} objects")], []
    for name, line in zip(names, (line[expression_id] for line in lines), strict=True):
        score = cases.judge_grounding(sample, record, line).score
        panels.append(pictures.panel(pictures.draw_answer(sample, line), name, f"Answer of {name}"))
        status = "" if line.get("status", "ok") == "ok" else f", {line['status']}"
        badges.append(pictures.badge(f"{name}: {100 * score:.0f}{status}", score >= 0.5))
    text = f'<p class="expression" dir="auto">{pictures.quote(record.raw or record.expression)}</p>'
    return pictures.card(panels, text, badges, record.tags, expression_id)


def _generation_card(sample: Sample, key: str, lines: list[dict[str, Any]], names: list[str]) -> str:
    targets = [str(target) for target in lines[0][key]["targets"]]
    wanted = target_instances(sample.record, targets)
    masks = [cases.instance_mask(sample.record, instance) for instance in wanted]
    boxes = [instance.box_xyxy for instance in wanted]
    picture = draw.draw_objects(sample.image, masks, boxes, factor=pictures.panel_factor(sample), spotlight=True)
    texts = ""
    for name, line in zip(names, (line[key] for line in lines), strict=True):
        texts += (
            f'<p class="way">{escape(name)}</p><p class="expression" dir="auto">{pictures.quote(str(line.get("expression") or ""))}</p>'
        )
    references = [record.raw or record.expression for record in sample.expressions if sorted(record.targets) == sorted(targets)]
    shown = "".join(f'<li dir="auto">{pictures.quote(text)}</li>' for text in references[: pictures.MAX_REFERENCES])
    texts += f'<p class="way">references</p><ul class="references">{shown}</ul>'
    return pictures.card([pictures.panel(picture, "chosen objects", f"{len(wanted)} objects chosen")], texts, [], [], f"{key[4:]}")


def _html(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header[1:])
    body = "".join(
        f'<tr{_dummy(row[0])}><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    frame = f"<caption>{escape(table.title)}</caption><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{frame}</table></div>{notes}'


def _dummy(name: str) -> str:
    return ' class="dummy"' if name.startswith("dummy") else ""


def _published(runs: list[Run]) -> str:
    tasks = {task for run in runs for block in run.results["results"].values() for task in block if task in METRICS}
    return "".join(map(_html, published_tables(tasks)))
