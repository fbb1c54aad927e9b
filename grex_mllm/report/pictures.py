"""Picture sheets: cards with ground truth, answer and minimap of an expression, or chosen objects and the texts written for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from grex_mllm import draw
from grex_mllm.metrics.truth import target_instances
from grex_mllm.report import cases
from grex_mllm.report.html import data_uri, escape
from grex_mllm.types import MORE_THAN_FIVE, ExpressionRecord, Sample

PANEL_SIDE = 320  # pixels of a picture in the page
MAX_TEXT = 320
MAX_REFERENCES = 6


def truth_picture(sample: Sample, record: ExpressionRecord) -> Image.Image:
    """Return the image with the targets of an expression marked."""
    wanted = target_instances(sample.record, record.targets)
    return draw.overlay(
        sample.image,
        cases.union_mask(sample.record, record.targets),
        [instance.box_xyxy for instance in wanted],
        len(wanted),
        no_target=not wanted,
        colour=draw.TRUTH,
        factor=panel_factor(sample),
        spotlight=True,
    )


def grounding_card(sample: Sample, record: ExpressionRecord, line: dict[str, Any], case: cases.GroundingCase) -> str:
    """Return one card: ground truth, answer and minimap, the expression, and the numbers of the case."""
    wanted = target_instances(sample.record, record.targets)
    answer = cases.answer_mask(sample.record, line)
    none_said = cases.says_none(line, answer)
    truth = truth_picture(sample, record)
    panels = [panel(truth, "ground truth", f"Ground truth: {_objects(len(wanted))} marked")]
    panels.append(panel(draw_answer(sample, line), "answer", f"Answer of the model: {_said(line, none_said)}"))
    if line.get("minimap"):
        size = (sample.record.width * panel_factor(sample), sample.record.height * panel_factor(sample))
        picture = draw.minimap_image(np.asarray(line["minimap"], np.float64), size, sample.image)
        panels.append(panel(picture, "minimap", "Minimap: where the model looks for targets, bright is likely"))
    badges = []
    if case.iou is not None:
        badges.append(badge(f"IoU {100 * case.iou:.0f}", case.iou >= 0.5))
    if case.f1 is not None:
        badges.append(badge(f"F1 {100 * case.f1:.0f}", case.f1 >= 1))
    if "count" in line:
        badges.append(
            badge(
                f"count {draw.count_name(int(line['count']))} of {draw.count_name(len(wanted))}",
                min(int(line["count"]), MORE_THAN_FIVE) == min(len(wanted), MORE_THAN_FIVE),
            )
        )
    if line.get("no_target_prob") is not None:
        badges.append(badge(f"no-target probability {float(line['no_target_prob']):.2f}", none_said == (not wanted)))
    if line.get("status", "ok") != "ok":
        badges.append(badge(f"status {line['status']}", False))
    text = f'<p class="expression" dir="auto">{quote(record.raw or record.expression)}</p>'
    return card(panels, text, badges, record.tags, record.expression_id)


def generation_card(sample: Sample, ways: dict[str, dict[str, Any]], case: cases.GenerationCase) -> str:
    """Return one card: the chosen objects, where the final text leads back to, every text, its judgement, and the references."""
    targets = list(case.key[1])
    chosen = target_instances(sample.record, targets)
    picture = draw.draw_objects(
        sample.image,
        [cases.instance_mask(sample.record, instance) for instance in chosen],
        [instance.box_xyxy for instance in chosen],
        factor=panel_factor(sample),
        spotlight=True,
    )
    panels = [panel(picture, "chosen objects", f"{_objects(len(chosen))} chosen, each with its own colour and number")]
    back = ways[cases.final_way(ways)].get("round_trip")
    if isinstance(back, dict):
        none_said = cases.says_none(back, cases.answer_mask(sample.record, back))
        grounded = draw_answer(sample, back)
        panels.append(panel(grounded, "the text, grounded", f"What the model finds by its own text: {_said(back, none_said)}"))
    texts = "".join(_written(sample, way, line, targets) for way, line in sorted(ways.items()))
    references = [record.raw or record.expression for record in sample.expressions if sorted(record.targets) == sorted(targets)]
    shown = "".join(f'<li dir="auto">{quote(text)}</li>' for text in references[:MAX_REFERENCES])
    texts += f'<p class="way">references</p><ul class="references">{shown}</ul>' if shown else ""
    return card(panels, texts, [], case.tags, f"{case.image_id}: {', '.join(targets)}")


def _written(sample: Sample, way: str, line: dict[str, Any], targets: list[str]) -> str:
    text = str(line.get("expression", ""))
    badges = []
    right = cases.is_right(line)
    if right is not None:
        badges.append(badge("means exactly these" if right else str(line["judgement"]), right))
    iou = cases.round_trip_iou(sample.record, targets, line)
    if iou is not None:
        badges.append(badge(f"round trip {100 * iou:.0f}", iou >= 0.5))
    if line.get("status", "ok") != "ok":
        badges.append(badge(f"status {line['status']}", False))
    return f'<p class="way">{escape(way)}</p><p class="expression" dir="auto">{quote(text)}</p><p class="facts">{"".join(badges)}</p>'


def draw_answer(sample: Sample, line: dict[str, Any]) -> Image.Image:
    """Draw a prediction line on its image."""
    answer = cases.answer_mask(sample.record, line)
    none_said = cases.says_none(line, answer)
    boxes = [] if none_said else line.get("boxes_xyxy", [])
    count = line.get("count")
    return draw.overlay(
        sample.image,
        None if none_said else answer,
        boxes,
        int(count) if count is not None else None,
        box_scores=line.get("box_scores"),
        no_target=none_said,
        factor=panel_factor(sample),
        spotlight=True,
    )


def panel_factor(sample: Sample) -> int:
    return draw.enlarge_factor(sample.record.height, sample.record.width, PANEL_SIDE)


def panel(picture: Image.Image, caption: str, alternative: str) -> str:
    """Return a picture with its caption; large ones are made smaller, so that the page stays light."""
    if max(picture.size) > PANEL_SIDE * 1.4:
        picture = picture.copy()
        picture.thumbnail((round(PANEL_SIDE * 1.4),) * 2, Image.Resampling.LANCZOS)
    return (
        f'<figure><img src="{data_uri(picture)}" alt="{escape(alternative)}" loading="lazy" '
        f'width="{picture.width}" height="{picture.height}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def badge(text: str, good: bool) -> str:
    """Return a judged fact: colour and sign both tell."""
    return f'<span class="badge {"good" if good else "bad"}"><span aria-hidden="true">{"✓" if good else "✗"}</span> {escape(text)}</span>'


def quote(text: str) -> str:
    """Return a quoted expression, cut where it would fill the page."""
    if not text.strip():
        return "<em>(empty)</em>"
    if len(text) > MAX_TEXT:
        return f"<q>{escape(text[:MAX_TEXT])}…</q> <small>({len(text):,} characters)</small>"
    return f"<q>{escape(text)}</q>"


def card(panels: list[str], text: str, badges: list[str], tags: list[str], identifier: str) -> str:
    """Return a card: panels, text (HTML), badges, tags, and what it is about."""
    labels = "".join(f'<span class="tag">{escape(tag.replace("_", " "))}</span>' for tag in tags)
    facts = f'<p class="facts">{"".join(badges)}</p>' if badges else ""
    return (
        f'<article class="case" data-tags="{escape("|".join(tags))}"><div class="panels">{"".join(panels)}</div>{text}{facts}'
        f'<p class="origin">{labels}<code>{escape(identifier[:120])}</code></p></article>'
    )


def sheet(title: str, cards: list[str], lead: str, *, wide: bool = False) -> str:
    """Return a titled grid of cards. wide: one card a row, for many pictures side by side."""
    kind = "cases wide" if wide else "cases"
    return f'<h3>{escape(title)}</h3><p class="lead">{escape(lead)}</p><div class="{kind}">{"".join(cards)}</div>' if cards else ""


def _objects(number: int) -> str:
    return "no object" if number == 0 else f"{number} object{'s' if number > 1 else ''}"


def _said(line: dict[str, Any], none_said: bool) -> str:
    return "nothing is meant" if none_said else f"{len(line.get('boxes_xyxy', []))} boxes, count {line.get('count', 'not given')}"
