"""From a raw answer to a prediction: a pure step, so that a better parser never costs a second run. Nothing here knows the ground truth."""

from grex_mllm.zeroshot.parsing.count import parse_count, parse_yes_no
from grex_mllm.zeroshot.parsing.expression import ParsedExpression, parse_expression
from grex_mllm.zeroshot.parsing.grounding import Parsed, parse_grounding

__all__ = ["Parsed", "ParsedExpression", "parse_count", "parse_expression", "parse_grounding", "parse_yes_no"]
