"""The report room: one run folder -> one self-contained HTML page."""

from grex_mllm.report.page import write_report

__all__ = ["write_report"]
