"""Templated expressions over photographs with instances: true or false by the annotations, with margins where a person would hesitate.

meaning.py    the tree of meanings            scene.py        what is known of an image
evaluate.py   what a meaning denotes          places.py       where things are       colours.py  colours from pixels
wording.py    meanings to words               parsing.py      words to meanings      lexicon.py  the words
naming.py     sets of objects to meanings     enumeration.py  what can be asked      drawing.py  what is asked
judge.py      texts to exact, wrong, ...      mirror.py       texts of flipped pictures
"""

from grex_mllm.data.templates.drawing import Shares, Statement, count_cooccurrence, draw_statements
from grex_mllm.data.templates.evaluate import evaluate
from grex_mllm.data.templates.mirror import mirrored_text
from grex_mllm.data.templates.naming import canonical_expression
from grex_mllm.data.templates.parsing import parse
from grex_mllm.data.templates.scene import Scene, read_scene
from grex_mllm.data.templates.wording import canonical, wordings

__all__ = [
    "Scene",
    "Shares",
    "Statement",
    "canonical",
    "canonical_expression",
    "count_cooccurrence",
    "draw_statements",
    "evaluate",
    "mirrored_text",
    "parse",
    "read_scene",
    "wordings",
]
