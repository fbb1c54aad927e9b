"""Compose the page: `write_report(run_dir)` -> report.html, self-contained, readable without script, light or dark, on screen or paper."""

from __future__ import annotations

import base64
import hashlib
import random
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grex_mllm.metrics import METRICS
from grex_mllm.report import cases, curves, pictures, tables
from grex_mllm.report.html import Section, definition_list, escape, number_text
from grex_mllm.report.run_files import RunFiles, flatten, is_number, read_run
from grex_mllm.score.protocol import load_protocol
from grex_mllm.shipped import PUBLISHED_FOLDER
from grex_mllm.writing import whole_file

HERE = Path(__file__).parent
REPORT = "report.html"
MAX_IMAGES = 2000
MAX_VALUE_CHARACTERS = 90
BREAKDOWN_LEAD = "Strict protocol, in percent; the weakest phenomena first."
SERVED_AT = "http://127.0.0.1:8000/"  # of `grex serve`, where no other place is given
CURVES_LEAD = "Pale: as logged. Strong: smoothed, with its last value beside the name."


def write_report(
    run_dir: str | Path,
    get_sample: cases.GetSample | None = None,
    image_ids: Iterable[str] | None = None,
    *,
    published: Path | None = PUBLISHED_FOLDER,
    protocol: str | Path | None = None,
    num_cases: int = 12,
    num_unselected: int = 0,
    seed: int = 0,
) -> Path:
    """Write `run_dir`/report.html and return its path.

    Reads config.yaml, log.jsonl, results.json and predictions*.jsonl; what is missing is named on the page.
    get_sample: image id -> Sample with all expressions of the image; without it there are no pictures.
    image_ids: which images; by default those that the prediction lines name ("image_id").
    protocol: the protocol file of the run, whose metrics are imported beside METRICS; of others the raw numbers are shown.
    num_cases: cards of each sheet.  num_unselected: so many generated texts (and half as many expressions) at even distances in the order
    of the split instead of random ones: a sheet to read, in which nobody chose.

    Raises:
        GrexError: `run_dir` is no run folder.
    """
    run_dir = Path(run_dir)
    modules = {*METRICS, *(load_protocol(protocol).tasks if protocol is not None else ())}
    run = read_run(run_dir, published)
    sheets = _sheets(run, get_sample, image_ids, (num_cases, num_unselected), seed)
    provenance = run.results.get("provenance")
    run.notes += [str(note) for note in (provenance.get("notes") or [] if isinstance(provenance, dict) else [])]
    notes = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    sections = [
        Section("summary", "Summary", tables.tiles(run.results, modules) + _data_line(run.results) + _ask_line(run_dir), _lead(run)),
        Section("results", "Results", tables.result_tables(run.results, run.published, modules), "In percent, except counts and errors."),
        Section("breakdown", "By targets and phenomenon", _breakdowns(run.results, modules), BREAKDOWN_LEAD),
        *sheets,
        Section("curves", "Training", curves.training_section(run.losses, run.rates), CURVES_LEAD),
        Section("configuration", "Configuration", _configuration(run)),
        Section("notes", "Notes", f"<ul>{notes}</ul>" if notes else ""),
    ]
    with whole_file(run_dir / REPORT) as work:  # a lone surrogate in an expression must not stop the report
        work.write_text(compose(run.name, sections), encoding="utf-8", errors="replace")
    return run_dir / REPORT


def compose(name: str, sections: Iterable[Section]) -> str:
    """Return the whole page of the sections that have something to say."""
    sections = [part for part in sections if part.body]
    style, script = ((HERE / file).read_text(encoding="utf-8") for file in ("style.css", "page.js"))
    # Nothing is fetched, and no script runs but ours: what an expression smuggles in stays text.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    links = "".join(part.link() for part in sections)
    body = "".join(part.html() for part in sections)
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} – grex-mllm report</title><style>{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><header><h1>{escape(name)}</h1><p>grex-mllm report</p></header>'
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main><script>{script}</script></body></html>\n'
    )


def _sheets(run: RunFiles, get_sample: Any, image_ids: Iterable[str] | None, numbers: tuple[int, int], seed: int) -> list[Section]:
    if get_sample is None or not (run.grounding or run.generation):
        return []
    if image_ids is None:
        image_ids = [*(line["image_id"] for line in run.grounding.values() if "image_id" in line), *(key[0] for key in run.generation)]
    found = cases.scan(run, get_sample, image_ids, MAX_IMAGES, seed)
    run.notes += found.notes
    if found.num_images < found.num_images_all:
        run.notes.append(f"Cases were chosen from {found.num_images:,} of {found.num_images_all:,} images.")
    dice, (number, unselected) = random.Random(seed), numbers

    def ground(case: cases.GroundingCase) -> str:
        sample = get_sample(case.image_id)
        record = next(record for record in sample.expressions if record.expression_id == case.expression_id)
        return pictures.grounding_card(sample, record, run.grounding[case.expression_id], case)

    def generate(case: cases.GenerationCase) -> str:
        return pictures.generation_card(get_sample(case.image_id), run.generation[case.key], case)

    parts: list[Section] = []
    for identifier, title, all_cases, card, evenly in (
        ("grounding", "Grounding, case by case", found.grounding, ground, unselected // 2),
        ("generation", "Group expressions, case by case", found.generation, generate, unselected),
    ):
        chosen: list[Any] = list(all_cases)
        picked = cases.spread(chosen, evenly) if evenly else dice.sample(chosen, min(number, len(chosen)))
        bad = cases.worst([case for case in chosen if case not in picked], number)
        lowest = f"The lowest scores among {len(chosen):,} cases, spread over the phenomena."
        drawn = f"Drawn from the same {len(chosen):,} cases with a fixed seed, not chosen."
        even = f"{len(picked)} of the same {len(chosen):,} cases at even distances in the order of the split, not chosen."
        body = pictures.sheet("Worst", [card(case) for case in bad], lowest)
        body += pictures.sheet("Unselected" if evenly else "Random", [card(case) for case in picked], even if evenly else drawn)
        parts.append(Section(identifier, title, _filter(picked + bad) + body if body else ""))
    return parts


def _filter(shown: list[Any]) -> str:
    """Return a choice of phenomena; the script shows it, so that it is not there without one."""
    tags = sorted({tag for case in shown for tag in case.tags})
    if len(tags) < 2:
        return ""
    options = "".join(f'<option value="{escape(tag)}">{escape(tag.replace("_", " "))}</option>' for tag in tags)
    return f'<label class="filter" hidden>show <select><option value="">all</option>{options}</select></label>'


def _lead(run: RunFiles) -> str:
    provenance = run.results.get("provenance", {}) if isinstance(run.results.get("provenance"), dict) else {}
    flat = flatten(provenance)
    named = [str(flat[name]) for name in ("dataset", "dataset.name", "dataset.split", "split") if isinstance(flat.get(name), str)]
    text = f"Run <b>{escape(run.name)}</b>"
    return (
        text
        + (f", scored on {escape(', '.join(dict.fromkeys(named)))}." if named else ".")
        + " Fractions in percent; the marks on the bars are the dummies."
    )


def _data_line(results: dict[str, Any]) -> str:
    block = tables.protocol_block(results)
    size, shares = tables.size_of(block), [found for inner in block.values() if is_number(found := inner.get("no_target_share"))]
    if not is_number(size):
        return ""
    none = f", {100 * shares[0]:.1f} % of them without target" if shares else ""
    return f'<p class="note">{number_text("num_samples", size)} expressions{none}.</p>'


def _ask_line(run_dir: Path) -> str:
    """Say how the model of the run is asked on a page of its own, where the run has one. No path of this machine stands in the report."""
    if not (run_dir / "model.safetensors").is_file():
        return ""
    folder = shlex.quote(run_dir.name if run_dir.is_absolute() else run_dir.as_posix())
    return (
        f'<p class="note">Ask this model about pictures of your own: run <code>grex serve --model {escape(folder)}</code>, '
        f'then open <a href="{SERVED_AT}">{SERVED_AT}</a>.</p>'
    )


def _breakdowns(results: dict[str, Any], modules: set[str]) -> str:
    sources, systems = results.get("by_source") or {}, dict(results.get("mean_of_sources") or {})
    means = {"this run": systems.pop("strict", None)} | {name: block for name, block in systems.items() if name != "official"}
    return (
        tables.breakdown(results.get("by_num_targets"), "by number of targets", modules)
        + tables.breakdown(results.get("by_tag"), "by phenomenon", modules, worst_first=True)
        + (tables.breakdown(sources, "by source", modules) if len(sources) > 1 else "")
        + tables.breakdown({name: block for name, block in means.items() if block}, "mean of the sources, each counting the same", modules)
    )


def _configuration(run: RunFiles) -> str:
    boxes = []
    for name, block in _config_blocks(run.config):
        boxes.append(
            f"<div><h4>{escape(name)}</h4>{definition_list([(key, _short(value)) for key, value in block.items()], 'knobs')}</div>"
        )
    configuration = f'<h3>Configuration</h3><div class="blocks">{"".join(boxes)}</div>' if boxes else ""
    provenance = run.results.get("provenance")
    if not isinstance(provenance, dict):
        return configuration
    rows = [(name.replace("_", " "), _short(value)) for name, value in flatten(provenance).items() if not name.startswith("config.")]
    return configuration + "<h3>Provenance of the results</h3>" + definition_list(rows, "provenance")


def _config_blocks(config: dict[str, Any], prefix: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Divide the configuration into the blocks of its sections, each with its own plain values."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    blocks = [(prefix or "general", plain)] if plain else []
    for key, value in config.items():
        if isinstance(value, dict):
            blocks += _config_blocks(value, f"{prefix}.{key}" if prefix else str(key))
    return blocks


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"
