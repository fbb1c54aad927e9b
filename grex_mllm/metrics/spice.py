"""SPICE (Anderson et al., ECCV 2016) with the jar that pycocoevalcap ships. It needs two CoreNLP jars; nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from grex_mllm.errors import GrexError

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
MAX_WORDS = 200  # the parser's time grows with the cube of the length; referring expressions have under 50 words


def spice_missing() -> str:
    """Return "" where SPICE's jars stand, otherwise which are missing and the remedy (Java itself is `language.java_missing`)."""
    folder = _folder()
    if folder is None or not (folder / "spice-1.0.jar").is_file():
        return "SPICE: pycocoevalcap is not installed: pip install pycocoevalcap==1.2"
    absent = [name for name in JARS if not (folder / "lib" / name).is_file()]
    if not absent:
        return ""
    return (
        f"SPICE: {' and '.join(absent)} missing in pycocoevalcap's spice/lib: put them there from Stanford CoreNLP 3.6.0 "
        "(stanford-corenlp-full-2015-12-09.zip), or set spice: false in the protocol"
    )


def spice_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]], subsets: dict[str, list[int]]) -> dict[str, float]:
    """Return SPICE of each subset of tokenised texts: the mean F of its pairs. One Java process parses every distinct pair once.

    Texts are cut after MAX_WORDS words; a pair without a word on either side scores 0, as does one whose F is not defined.

    Raises:
        GrexError: the Java program failed.
    """
    pairs = [(_cut(h), tuple(dict.fromkeys(filter(None, map(_cut, group))))) for h, group in zip(hypotheses, references, strict=True)]
    distinct = [pair for pair in dict.fromkeys(pairs) if pair[0] and pair[1]]
    found = dict(zip(distinct, _run(distinct), strict=True)) if distinct else {}
    return {name: sum(found.get(pairs[k], 0.0) for k in members) / len(members) for name, members in subsets.items()}


def _run(pairs: list[tuple[str, tuple[str, ...]]]) -> list[float]:
    folder = _folder()
    assert folder is not None
    with tempfile.TemporaryDirectory() as place:
        source, result = Path(place, "pairs.json"), Path(place, "scores.json")
        rows = [{"image_id": k, "test": text, "refs": list(group)} for k, (text, group) in enumerate(pairs)]
        source.write_text(json.dumps(rows), encoding="utf-8")
        command = ["java", "-Xmx8G", "-jar", str(folder / "spice-1.0.jar"), str(source), "-out", str(result), "-subset", "-silent"]
        run = subprocess.run(command, cwd=place, capture_output=True, check=False)
        if run.returncode or not result.is_file():
            tail = run.stderr.decode("utf-8", errors="replace").strip()[-300:].replace("\n", " ")
            raise GrexError(f"SPICE stopped ({tail}); expected scores of {len(pairs)} pairs; try Java 8, or set spice: false")
        scores = {int(row["image_id"]): row["scores"]["All"]["f"] for row in json.loads(result.read_text(encoding="utf-8"))}
    if set(scores) != set(range(len(pairs))):
        raise GrexError(f"SPICE gave scores of {len(scores)} pairs; expected {len(pairs)}; check Java and its memory, or set spice: false")
    return [_number(scores[k]) for k in range(len(pairs))]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and value == value else 0.0


def _cut(text: str) -> str:
    return " ".join(text.split()[:MAX_WORDS])


def _folder() -> Path | None:
    try:
        spec = find_spec("pycocoevalcap.spice")
    except ModuleNotFoundError:
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
