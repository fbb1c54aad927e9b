"""Pictures (SVG) of the no-target probability: calibration, and what answering only where the model is sure would give."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

SIDE, MARGIN, GAP = 240, 46, 40
INK, GRID, LINE, DIAGONAL = "#14161a", "#d9dce1", "#0072b2", "#9aa0a8"

Panel = tuple[str, str, str, list[tuple[float | None, float | None]], bool]  # title, names of the axes, points, diagonal


def write_calibration_plot(calibration: dict[str, Any], path: Path) -> Path:
    """Write the three plots of the `calibration` block of results.json; axes run from 0 to 1."""
    bins = [b for b in calibration["reliability"] if b["num_samples"]]
    curve = calibration["curve"]
    panels: list[Panel] = [
        ("reliability", "mean probability", "share without target", [(b["mean_probability"], b["no_target_share"]) for b in bins], True),
        ("threshold curve", "T-acc", "N-acc", [(c["T_acc"], c["N_acc"]) for c in curve], False),
        ("rejection", "coverage", "risk", [(c["coverage"], c["risk"]) for c in curve], False),
    ]
    return _write(panels, f"no-target probability: {calibration['num_samples']} expressions, ECE {100 * calibration['ECE']:.2f} %", path)


def write_risk_coverage_plot(chances: dict[str, Any], path: Path) -> Path:
    """Write the curves of `error_analysis.selection`: risk against coverage, and N-acc against T-acc over the thresholds."""
    names = {"decision": "wrong no-target decisions", "mask": "1 - IoU"}
    panels: list[Panel] = [
        (f"{words} (area {100 * chances[name]['AURC']:.1f} %)", "coverage", "risk",
         [(c["coverage"], c["risk"]) for c in chances[name]["curve"]], False)
        for name, words in names.items()
        if name in chances
    ]  # fmt: skip
    panels.append(("no-target thresholds", "T-acc", "N-acc", [(c["T_acc"], c["N_acc"]) for c in chances["thresholds"]], False))
    return _write(panels, f"the surest answers first: {chances['num_samples']} expressions", path)


def _write(panels: list[Panel], words: str, path: Path) -> Path:
    width = len(panels) * (SIDE + MARGIN + GAP)
    style = f'font-family="sans-serif" font-size="12" fill="{INK}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{SIDE + 2 * MARGIN + 20}" {style}>',
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{MARGIN}" y="16">{escape(words)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts.append(_panel(MARGIN + number * (SIDE + MARGIN + GAP), *panel))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
    return path


def _panel(left: int, title: str, across: str, up: str, points: list[tuple[float | None, float | None]], diagonal: bool) -> str:
    top = MARGIN
    known = [(left + SIDE * x, top + SIDE * (1 - y)) for x, y in points if x is not None and y is not None]
    lines = [f'<text x="{left + SIDE / 2}" y="{top - 8}" text-anchor="middle" font-weight="bold">{escape(title)}</text>']
    for step in range(5):
        at = SIDE * step / 4
        lines.append(f'<path d="M{left} {top + at}h{SIDE}M{left + at} {top}v{SIDE}" stroke="{GRID}" fill="none"/>')
        lines.append(f'<text x="{left + at}" y="{top + SIDE + 16}" text-anchor="middle">{step / 4:g}</text>')
        lines.append(f'<text x="{left - 6}" y="{top + SIDE - at + 4}" text-anchor="end">{step / 4:g}</text>')
    if diagonal:
        lines.append(f'<path d="M{left} {top + SIDE}L{left + SIDE} {top}" stroke="{DIAGONAL}" stroke-dasharray="4 4"/>')
    if known:
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in known)
        lines.append(f'<path d="{path}" stroke="{LINE}" stroke-width="2" fill="none"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{LINE}"/>' for x, y in known]
    lines.append(f'<text x="{left + SIDE / 2}" y="{top + SIDE + 34}" text-anchor="middle">{escape(across)}</text>')
    middle = top + SIDE / 2
    lines.append(
        f'<text x="{left - 32}" y="{middle}" text-anchor="middle" transform="rotate(-90 {left - 32} {middle})">{escape(up)}</text>'
    )
    return "\n".join(lines)
