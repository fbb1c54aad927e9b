"""Small pieces of HTML. Everything that comes from data passes through `escape`: expressions are written by strangers."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from grex_mllm.report.run_files import is_number

NOT_PERCENT = ("num_", "mae", "length", "words", "count_error", "seconds", "_s", "version", "threshold", "_bytes")
NAMES = {
    "num_samples": "N",
    "no_target_share": "no-target share",
    "N_acc": "N-acc",
    "T_acc": "T-acc",
    "balanced_acc": "balanced acc",
}
JPEG_QUALITY = 84
ALLOWED_CONTROLS = "\n\t\u200c\u200d"  # joiners: several scripts and emoji need them


def escape(value: Any) -> str:
    """Return text that is safe between tags and in quoted attributes. Control characters, which turn writing around, become a sign."""
    text = "".join(c if c.isprintable() or c in ALLOWED_CONTROLS else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return html.escape(text, quote=True)


def metric_name(key: str) -> str:
    """Return how a metric's key is written for a reader."""
    return NAMES.get(key, key.replace("_", " "))


def is_share(key: str, value: Any) -> bool:
    """Tell whether a number is a fraction that is printed in percent."""
    if not is_number(value) or any(key.startswith(mark) or key.endswith(mark) or mark in key.split("_") for mark in NOT_PERCENT):
        return False
    return not isinstance(value, int) or value in (0, 1)


def number_text(key: str, value: Any) -> str:
    """Return a number as it stands in a table: fractions in percent with one decimal, counts grouped, what is missing as a dash."""
    if value is None:
        return "–"
    if not is_number(value):
        return str(value)
    if is_share(key, value):
        return f"{100 * value:.1f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI. JPEG without colour subsampling, which would smear thin coloured lines."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass
class Section:
    """One part of the page; `body` is empty where there is nothing to say. lead: HTML."""

    identifier: str
    title: str
    body: str
    lead: str = ""

    def html(self) -> str:
        opening = f'<p class="lead">{self.lead}</p>' if self.lead else ""
        heading = f'<h2 id="{self.identifier}-title">{escape(self.title)}</h2>'
        return f'<section id="{self.identifier}" aria-labelledby="{self.identifier}-title">{heading}{opening}{self.body}</section>'

    def link(self) -> str:
        return f'<a href="#{self.identifier}">{escape(self.title)}</a>'


def definition_list(pairs: list[tuple[str, str]], css_class: str) -> str:
    """Return a <dl> of plain texts."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="{css_class}">{rows}</dl>' if rows else ""
