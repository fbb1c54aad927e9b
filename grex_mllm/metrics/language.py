"""Entry "greg" of METRICS: text of expression generation, METEOR, CIDEr, BLEU-1..4, ROUGE-L with pycocoevalcap's implementations.

Subsets (single target, multi target, all) are corpora of their own: CIDEr's document frequencies, BLEU's lengths, METEOR's aggregate. The
Java parts still run once for all of them: the PTB tokenizer over all distinct texts, METEOR over all distinct pairs; METEOR's aggregate of
a subset comes from the pairs' statistics in the same process. Any text is safe: line breaks, `|||`, emoji, nothing, 10,000 characters.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics import detection, segmentation
from grex_mllm.metrics.columns import Column
from grex_mllm.metrics.sums import KeptRows, limb_sums, mean
from grex_mllm.metrics.truth import Truth

Tokenizer = Literal["ptb", "whitespace"]
TOKENIZERS = get_args(Tokenizer)
NAMES = ("METEOR", "CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
NEEDS_JAVA = "no Java runtime: install one (Debian, Ubuntu: apt-get install default-jre-headless; macOS: brew install openjdk)"
METEOR_TOKENS = 200  # its alignment search explodes when both sides repeat; referring expressions have under 50 words
JAVA_OPTIONS = ["-XX:+UseSerialGC", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]
PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
SINGLE, MULTI, ALL = "single", "multi", "all"
NOTHING: dict[str, Any] = {"expression": "", "judgement": None, "round_trip": None}
JUDGEMENTS = ("exact", "wrong", "ambiguous", "unparsable")
TITLE = "Group expressions (GREG)"
NEEDS = {"strict": ("expression",)}
UNIT = "object_set"
OTHER_WAYS = ("listener", "among_found")  # fields of a line with answers beside the greedy one: re-ranked, and among the objects found
COLUMNS = (
    Column("METEOR", "METEOR"),
    Column("CIDEr", "CIDEr", format="points"),
    Column("BLEU-1", "BLEU-1", shown=("table",)),
    *(Column(name, name, shown=("table", "compare")) for name in ("BLEU-4", "ROUGE-L", "SPICE")),
    *(Column(f"round_trip_{name}", f"round-trip {name}", shown=("table", "compare")) for name in ("gIoU", "Pr@F1")),
    Column("correct", "exact set", shown=("table", "compare")),
    Column("distinct", "distinct", shown=("table",)),
    Column("all.correct", "exact set, greedy", shown=("report",)),
    Column("listener.all.correct", "exact set, listener", shown=("report",)),
    Column("among_found.all.correct", "exact set, others found", shown=("report",)),
    Column("all.round_trip_gIoU", "round-trip gIoU", shown=("report",)),
    Column("all.METEOR", "METEOR", shown=("report",)),
    Column("all.CIDEr", "CIDEr", format="points", shown=("report",)),
)


@dataclass(frozen=True)
class Rules:
    """group_by: references pooled by "target_set" or "ref_id". tokenizer: "ptb" (needs Java) or "whitespace" (not comparable).

    spice: also SPICE, which needs Java and two CoreNLP 3.6.0 jars.
    """

    group_by: Literal["target_set", "ref_id"] = "target_set"
    tokenizer: Tokenizer = "ptb"
    spice: bool = False


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any]:
    """Return text, references, judgement and round trip of one object set; and the same of its other answers, if any."""
    given = prediction or {}
    return _answer(given, truth) | {way: _answer(given[way], truth) if given.get(way) else None for way in OTHER_WAYS}


def finish(rows: list[dict[str, Any]], rules: Rules) -> dict[str, Any]:
    """Return the block: single, multi, all; the same of the other answers where a row has one. Java runs once for all of them."""
    ways = ["", *(way for way in OTHER_WAYS if any(row[way] for row in rows))]
    kinds = {way: [row | (row[way] or NOTHING) for row in rows] if way else rows for way in ways}
    subsets = {f"{way} {name}": [n * len(rows) + k for k in at] for n, way in enumerate(ways) for name, at in _subsets(rows).items()}
    answers = [row for kind in kinds.values() for row in kind]
    texts = score_texts([a["expression"] for a in answers], [a["references"] for a in answers], subsets, rules.tokenizer, rules.spice)
    blocks: dict[str, dict[str, Any]] = {way: {} for way in ways}
    for key, members in subsets.items():
        way, _, name = key.partition(" ")
        blocks[way][name] = texts[key] | _beside([answers[k] for k in members], kinds[way])
    return blocks.pop("") | blocks | {"group_by": rules.group_by, "tokenizer": rules.tokenizer}


def part(rows: list[dict[str, Any]], every: list[dict[str, Any]], rules: Rules) -> dict[str, Any]:
    """Return the block of a group without its text metrics: corpora of different sizes have different document frequencies."""
    size = {"num_samples": len(rows)}
    blocks: dict[str, Any] = {ALL: size | _beside(rows, every)}
    for way in (way for way in OTHER_WAYS if any(row[way] for row in every)):
        some, whole = ([row[way] or NOTHING for row in group] for group in (rows, every))
        blocks[way] = {ALL: size | _beside(some, whole)}
    return blocks


def _answer(answer: dict[str, Any], truth: Truth) -> dict[str, Any]:
    text, judgement, trip = answer.get("expression"), answer.get("judgement"), answer.get("round_trip")
    if text is not None and not isinstance(text, str):
        raise fault(f"{truth.name}: expression {text!r}", "a string", "fix the line")
    if judgement is not None and judgement not in JUDGEMENTS:
        raise fault(f"{truth.name}: judgement {judgement!r}", f"one of {', '.join(JUDGEMENTS)}", "fix the line")
    found = {"expression": text or "", "references": truth.texts, "num_targets": truth.num_targets, "judgement": judgement}
    return found | {"round_trip": round_trip(trip, truth) if trip else None}


def round_trip(trip: dict[str, Any], truth: Truth) -> dict[str, Any]:
    """Return how well grounding the text gives back the chosen set (strict): iou, None without masks; correct, None without boxes.

    Boxes are chosen by the "grec" rules of the same protocol; one without them takes the answer's own.
    """
    masks = {"mask_rle": trip.get("mask_rle"), "no_target": bool(trip.get("no_target"))}
    found = segmentation.row(masks, truth, segmentation.Rules(), "strict") if "mask_rle" in trip else None
    boxes = {"count": len(trip.get("boxes_xyxy") or [])} | trip
    rules = truth.tasks.get("grec", detection.Rules(select="all"))
    right = detection.row(boxes, truth, rules, "strict")["correct"] if "boxes_xyxy" in trip else None
    return {"iou": found and found["iou"], "correct": right}


def _beside(rows: list[dict[str, Any]], every: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what stands beside the text metrics of some rows; `every`: of all object sets. No answer counts as wrong."""
    written = [row["expression"] for row in rows]
    found: dict[str, Any] = {
        "distinct": len(set(written)) / len(written),
        "mean_words": sum(len(text.split()) for text in written) / len(written),
        "empty": sum(not text.strip() for text in written) / len(written),
    }
    judged = [row["judgement"] for row in rows]
    if any(row["judgement"] is not None for row in every):
        found["correct"] = judged.count("exact") / len(judged)
        found["judgements"] = {j: judged.count(j) for j in JUDGEMENTS} | {"unjudged": judged.count(None)}
    if any(row["round_trip"] for row in every):
        trips = [row["round_trip"] or {"iou": None, "correct": None} for row in rows]
        if any(trip["iou"] is not None for trip in trips):
            found["round_trip_gIoU"] = mean(limb_sums(np.array([trip["iou"] or 0.0 for trip in trips])), len(trips))
        if any(trip["correct"] is not None for trip in trips):
            found["round_trip_Pr@F1"] = sum(bool(trip["correct"]) for trip in trips) / len(trips)
        found["round_trip_share"] = sum(bool(row["round_trip"]) for row in rows) / len(rows)
    return found


class GREG(KeptRows):
    """Accumulate (generated expression, references) pairs; the scores come at the end, as corpora cannot be summed.

    tokenizer: "ptb" (the papers' and pycocoevalcap's; needs Java) or "whitespace" (lower case, no punctuation removed; not comparable).
    spice: also SPICE, where its jars are present (`metrics/spice.py`).
    """

    def __init__(self, tokenizer: Tokenizer = "ptb", spice: bool = False) -> None:
        if tokenizer not in TOKENIZERS:
            raise fault(f'tokenizer "{tokenizer}"', " or ".join(TOKENIZERS), "choose one of them")
        super().__init__(finish, Rules(tokenizer=tokenizer, spice=spice))

    def update(self, expression: str, references: Sequence[str], num_targets: int = 1) -> None:
        """Add one generated expression with at least one reference for a set of num_targets >= 1 objects.

        Raises:
            GrexError: no reference, or no target (no-target expressions are no part of GREG).
        """
        if not references or num_targets < 1:
            raise fault(f"{len(references)} references for {num_targets} targets", "at least one of each", "leave the sample out")
        self.rows.append({"expression": expression, "references": list(references), "num_targets": num_targets})

    def compute(self) -> dict[str, dict[str, Any]]:
        """Return {"single", "multi", "all"}: fractions as pycocoevalcap gives them; subsets without a sample are absent.

        Without Java: None for what needs it (with "ptb" that is everything), and the reason under "not_computed".
        """
        rows = sorted(self.rows, key=itemgetter("expression", "references", "num_targets"))  # sums of floats depend on order
        texts = [row["expression"] for row in rows], [row["references"] for row in rows]
        return score_texts(*texts, _subsets(rows), self.rules.tokenizer, self.rules.spice)


def _subsets(rows: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Return the positions of single targets, several targets and all; those without one are absent."""
    num = [row["num_targets"] for row in rows]
    chosen = {SINGLE: [k for k, n in enumerate(num) if n == 1], MULTI: [k for k, n in enumerate(num) if n > 1], ALL: list(range(len(num)))}
    return {name: at for name, at in chosen.items() if at}


def score_texts(
    expressions: Sequence[str],
    references: Sequence[Sequence[str]],
    subsets: dict[str, list[int]],
    tokenizer: str = "ptb",
    spice: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each subset (positions into the two lists), each scored as a corpus of its own."""
    java = java_missing()
    if java and tokenizer == "ptb":
        names = (*NAMES, "SPICE") if spice else NAMES
        nothing = dict.fromkeys(names) | {"not_computed": {name: f"PTB tokenizer: {java}" for name in names}}
        return {name: {"num_samples": len(members)} | nothing for name, members in subsets.items()}
    texts = list(dict.fromkeys([*expressions, *(r for group in references for r in group)]))
    tokens = dict(zip(texts, ptb_tokens(texts) if tokenizer == "ptb" else [_one_line(t).lower() for t in texts], strict=True))
    hypotheses = [tokens[e] for e in expressions]
    wanted = [[tokens[r] for r in group] for group in references]
    with ThreadPoolExecutor(1) as pool:  # Java aligns on one core while Python counts n-grams on another
        meteor = None if java else pool.submit(meteor_scores, hypotheses, wanted, subsets)
        results = _subset_scores(hypotheses, wanted, subsets)
        scores = {} if meteor is None else meteor.result()
    for name, result in results.items():
        result["METEOR"] = scores.get(name)
        if java:
            result["not_computed"] = {"METEOR": java}
    if spice:
        _add_spice(results, hypotheses, wanted, subsets, java)
    return results


def _add_spice(
    results: dict[str, dict[str, Any]], hypotheses: list[str], references: list[list[str]], subsets: dict[str, list[int]], java: str
) -> None:
    """Add SPICE to every subset, or the reason why it is not there: it is optional, and must not cost the other numbers."""
    from grex_mllm.metrics.spice import spice_missing, spice_scores

    scores: dict[str, float] = {}
    reason = java or spice_missing()
    if not reason:
        try:
            scores = spice_scores(hypotheses, references, subsets)
        except GrexError as error:
            reason = str(error)
    for name, result in results.items():
        result["SPICE"] = scores.get(name)
        if reason:
            result["not_computed"] = result.get("not_computed", {}) | {"SPICE": reason}


def java_missing() -> str:
    """Return "" where a Java runtime works, otherwise what to install."""
    if shutil.which("java") is None:
        return NEEDS_JAVA
    found = subprocess.run(["java", "-version"], capture_output=True, check=False)
    return "" if found.returncode == 0 else NEEDS_JAVA


def ptb_tokens(texts: Sequence[str]) -> list[str]:
    """Tokenise as pycocoevalcap does (Stanford PTB tokenizer 3.4.1, lower case, punctuation removed), one Java run for all texts.

    Raises:
        GrexError: the Java program failed.
    """
    lines = [_one_line(text) for text in texts]
    filled = [k for k, line in enumerate(lines) if line]
    result = [""] * len(lines)
    if not filled:
        return result
    jar = _folder("tokenizer") / "stanford-corenlp-3.4.1.jar"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.txt")
        source.write_text("\n".join(lines[k] for k in filled) + "\n", encoding="utf-8")
        command = ["java", *JAVA_OPTIONS, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(source)]
        run = subprocess.run(command, capture_output=True, check=False)
    found = run.stdout.decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    found = found[:-1] if found and not found[-1] else found
    if run.returncode or len(found) != len(filled):
        tail = run.stderr.decode("utf-8", errors="replace")[-300:].replace("\n", " ")
        raise GrexError(f"PTB tokenizer gave {len(found)} lines for {len(filled)} ({tail}); expected one each; check the Java installation")
    for k, line in zip(filled, found, strict=True):
        result[k] = " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
    return result


def meteor_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]], subsets: dict[str, list[int]]) -> dict[str, float]:
    """Return METEOR 1.5 (English, normalised) of each subset of tokenised texts; one Java process aligns every distinct pair once.

    Sentences are cut after METEOR_TOKENS words.

    Raises:
        GrexError: the Java program failed.
    """
    lines = [
        " ||| ".join(["SCORE", *(_meteor_text(r) for r in group), _meteor_text(h)]) for h, group in zip(hypotheses, references, strict=True)
    ]
    distinct = list(dict.fromkeys(lines))
    jar = _folder("meteor") / "meteor-1.5.jar"
    command = ["java", "-Xmx2G", *JAVA_OPTIONS, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=jar.parent)
        try:
            statistics = dict(zip(distinct, _ask(process, distinct, len(distinct), errors), strict=True))
            scores = {}
            for name, members in subsets.items():
                question = " ||| ".join(["EVAL", *(statistics[lines[k]] for k in members)])
                scores[name] = float(_ask(process, [question], len(members) + 1, errors)[-1])
        finally:
            process.kill()
            process.communicate()
    return scores


def _ask(process: subprocess.Popen[bytes], lines: list[str], num_answers: int, errors: Any) -> list[str]:
    """Write lines while reading answers (neither pipe may fill up), and return the answers."""
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def write() -> None:
        try:
            stdin.write(("\n".join(lines) + "\n").encode("utf-8", "replace"))
            stdin.flush()
        except BrokenPipeError:
            return  # the reader sees the end of the answers and reports it

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    answers: list[str] = []
    for _ in range(num_answers):
        answer = stdout.readline()
        if not answer:
            errors.seek(0)
            tail = errors.read()[-300:].decode("utf-8", errors="replace").replace("\n", " ")
            raise GrexError(
                f"METEOR stopped after {len(answers)} of {num_answers} answers ({tail}); expected all; check Java and its memory"
            )
        answers.append(answer.decode("utf-8").strip())
    writer.join()
    return answers


def _subset_scores(hypotheses: list[str], references: list[list[str]], subsets: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Return the n-gram metrics of each subset; equal subsets (a corpus with single targets only) are computed once."""
    corpora = set(map(tuple, subsets.values()))
    known = {members: _corpus_scores([hypotheses[k] for k in members], [references[k] for k in members]) for members in corpora}
    return {name: {"num_samples": len(members), "METEOR": None} | known[tuple(members)] for name, members in subsets.items()}


def _corpus_scores(hypotheses: list[str], references: list[list[str]]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts, res = dict(enumerate(references)), {k: [h] for k, h in enumerate(hypotheses)}
    some_words = any(r for group in references for r in group)
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0] if some_words and any(hypotheses) else [0.0] * 4
    scores = {"CIDEr": float(Cider().compute_score(gts, res)[0]) if some_words else 0.0}
    scores |= {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return scores | {"ROUGE-L": float(Rouge().compute_score(gts, res)[0])}


def _one_line(text: str) -> str:
    """Return the text on one line that survives UTF-8: every kind of line break, tab and control character becomes a space."""
    kept = "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode("utf-8"))
    return " ".join(kept.split())


def _meteor_text(tokens: str) -> str:
    return " ".join(tokens.replace("|||", " ").split()[:METEOR_TOKENS])


def _folder(part: str) -> Path:
    spec = find_spec(f"pycocoevalcap.{part}")
    if spec is None or not spec.submodule_search_locations:
        raise fault("pycocoevalcap is not installed", "pycocoevalcap 1.2", "pip install pycocoevalcap==1.2")
    return Path(next(iter(spec.submodule_search_locations)))
