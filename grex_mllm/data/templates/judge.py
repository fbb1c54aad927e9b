"""What a text says about a photograph of a templated dataset: parsed, evaluated by the annotations, and compared with the objects meant.

Colours and the exhaustively labelled categories are no part of a record; the program that writes the data puts them into SCENES beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from grex_mllm.data.templates.evaluate import evaluate
from grex_mllm.data.templates.parsing import parse_once
from grex_mllm.data.templates.scene import Scene, read_scene
from grex_mllm.errors import fault
from grex_mllm.types import ImageRecord

SCENES = "template_scenes.json"
SCENES_HASH = "template_scenes_sha256"  # in dataset.json
SCENES_KEPT = 512
REMEDY = "write the folder again with data_prep/coco_templates.py"


class TemplateJudge:
    """Judges texts about the images of one dataset folder.

    labelled: source -> categories that are exhaustively labelled in it.  source_of: image id -> source.
    colours: image id -> annotation id -> names that its pixels allow.
    """

    def __init__(
        self,
        labelled: Mapping[str, Sequence[str]],
        source_of: Mapping[str, str],
        colours: Mapping[str, Mapping[str, Sequence[str]]],
    ) -> None:
        self.labelled, self.source_of, self.colours = labelled, source_of, colours
        self.categories = tuple(sorted(set().union(*labelled.values()))) if labelled else ()
        self._scenes: dict[str, Scene] = {}

    def scene(self, record: ImageRecord) -> Scene:
        """Return the scene of an image of the folder; the last SCENES_KEPT are kept by image id."""
        found = self._scenes.get(record.image_id)
        if found is None:
            labelled = self.labelled.get(self.source_of.get(record.image_id, ""))
            found = read_scene(record, labelled, self.colours.get(record.image_id))
            if len(self._scenes) >= SCENES_KEPT:
                del self._scenes[next(iter(self._scenes))]
            self._scenes[record.image_id] = found
        return found

    def __call__(self, text: str, record: ImageRecord, targets: Sequence[str]) -> str:
        """Return "exact", "wrong" (another set, or nothing), "ambiguous" (undecided, or readings that differ) or "unparsable"."""
        return judge_text(text, self.scene(record), targets, self.categories)


def judge_text(text: str, scene: Scene, targets: Iterable[str], categories: Sequence[str] = ()) -> str:
    """Judge a text as a reference to a set of objects of a scene, as `TemplateJudge`. categories: that can be named, beside the scene's."""
    named = tuple(sorted({*categories, *scene.present, *(scene.labelled or ())}))
    found = denoted(text, scene, named)
    if isinstance(found, str):
        return found
    return "exact" if found == frozenset(targets) else "wrong"


def denoted(text: str, scene: Scene, categories: tuple[str, ...]) -> frozenset[str] | str:
    """Return the annotation ids that a text denotes, or "ambiguous" or "unparsable"."""
    readings = parse_once(text, categories)
    if not readings:
        return "unparsable"
    found = {evaluate(reading, scene) for reading in readings} - {None}
    if len(found) != 1:
        return "ambiguous"
    (ids,) = found
    assert ids is not None
    return ids


def judge_of(folder: Path, info: Mapping[str, Any]) -> TemplateJudge:
    """Return the judge of a folder that data_prep/coco_templates.py wrote.

    Raises:
        GrexError: the folder's file of colours and labelled categories is missing, altered, or of another form.
    """
    path = folder / SCENES
    if not path.is_file():
        raise fault(
            f"{folder} holds no {SCENES}", "the file beside images.jsonl", "write the folder again with data_prep/coco_templates.py"
        )
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != info.get(SCENES_HASH):
        given = f"{path} has another SHA-256 than dataset.json says"
        raise fault(given, str(info.get(SCENES_HASH)), REMEDY)
    return _read(data, str(path))


@lru_cache(maxsize=4)
def _read(data: bytes, name: str) -> TemplateJudge:
    try:
        value = json.loads(data)
        return TemplateJudge(value["labelled"], value["source_of"], value["colours"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fault(f"{name} cannot be read ({error})", "labelled, source_of and colours", "write the folder again") from None


def scenes_json(
    labelled: Mapping[str, Iterable[str]], source_of: Mapping[str, str], colours: Mapping[str, Mapping[str, Sequence[str]]]
) -> bytes:
    """Return the bytes of SCENES."""
    value = {"labelled": {name: sorted(found) for name, found in labelled.items()}, "source_of": source_of, "colours": colours}
    return (json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
