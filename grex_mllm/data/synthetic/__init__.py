"""Synthetic scenes with expressions whose truth is computed: endless, seeded, the same bytes on every machine."""

from grex_mllm.data.synthetic.dataset import SyntheticDataset, corpus
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.expressions import KINDS
from grex_mllm.data.synthetic.grammar import to_text, vocabulary
from grex_mllm.data.synthetic.meaning import check_expression, evaluate, scene_from_record
from grex_mllm.data.synthetic.parser import parse
from grex_mllm.data.synthetic.references import references_for
from grex_mllm.data.synthetic.scenes import SPLITS, Scene, draw_scene
from grex_mllm.data.synthetic.shapes import ATTRIBUTES

__all__ = [
    "ATTRIBUTES",
    "KINDS",
    "SPLITS",
    "Scene",
    "SyntheticDataset",
    "check_expression",
    "corpus",
    "draw_scene",
    "evaluate",
    "export",
    "parse",
    "references_for",
    "scene_from_record",
    "to_text",
    "vocabulary",
]
