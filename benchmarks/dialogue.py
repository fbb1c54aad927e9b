"""Ask a model follow-ups about drawn scenes, and count how many sets of objects are exact, by kind of follow-up.

python benchmarks/dialogue.py --model runs/demo

Scenes of the split `test`; for each scene and operation one dialogue of two turns with known truth
(`grex_mllm/data/synthetic/dialogues.py`). A set is exact where its instances and the true objects are one to one at a mask IoU from 0.5.
"given": the true first set is selected, as if clicked; "own": the model's own answer to the first expression is; "ignored": the follow-up
is asked alone, as a system without a history does; "read": the text encoder gets the first expression as well, where the model was trained
so. "first" counts the exact first sets of "own".
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from grex_mllm.data.history import has_history
from grex_mllm.data.synthetic.dialogues import OPERATIONS, DrawnDialogue, draw_dialogue
from grex_mllm.data.synthetic.scenes import bits, draw_scene
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.dialogue import Dialogue
from grex_mllm.dialogue.objects import overlaps
from grex_mllm.dialogue.phrases import kind_of
from grex_mllm.dialogue.session import MODEL
from grex_mllm.models.grex import GrexModel

SAME = 0.5  # mask IoU


@dataclass(frozen=True)
class Case:
    """A dialogue with the picture and the masks of its scene, bool [N, H, W]."""

    image: np.ndarray
    masks: np.ndarray
    dialogue: DrawnDialogue


def cases(number: int, side: int, seed: int, split: str = "test") -> Iterator[Case]:
    """Yield one dialogue of every operation for each of `number` scenes, where the scene lends itself to one."""
    config = SyntheticConfig(image_size=side)
    for index in range(number):
        drawn = draw_scene(config, split, index)
        for k, operation in enumerate(OPERATIONS):
            found = draw_dialogue(drawn.scene, random.Random(seed + index * len(OPERATIONS) + k), operation)
            if found is not None:
                yield Case(drawn.image, drawn.masks, found)


def is_exact(found: np.ndarray, true: np.ndarray) -> bool:
    """Tell whether masks bool [n, H, W] and [m, H, W] are the same objects, one to one."""
    if len(found) != len(true):
        return False
    same = overlaps(found, true) >= SAME
    return bool((same.sum(0) == 1).all() and (same.sum(1) == 1).all())


def tried(model: GrexModel, case: Case) -> dict[str, bool]:
    """Return for each way of asking whether its answer is exact."""
    told, session = case.dialogue, Dialogue(model, case.image)
    wanted = case.masks[bits(told.result)]
    session.select(list(case.masks[bits(told.targets)]), kind=kind_of(told.first))
    session.say(told.follow_up)
    found = {"given": is_exact(session.selected, wanted)}
    session.clear()
    session.say(told.first)
    found["first"] = is_exact(session.selected, case.masks[bits(told.targets)])
    session.say(told.follow_up)
    found["own"] = is_exact(session.selected, wanted)
    session.clear()
    session.say(told.follow_up)
    found["ignored"] = is_exact(session.selected, wanted)
    if has_history(model.config.data):
        reader = Dialogue(model, session.encoded, resolve=MODEL)
        reader.say(told.first)
        reader.say(told.follow_up)
        found["read"] = is_exact(reader.selected, wanted)
    return found


def measure(model: GrexModel, number: int, side: int, seed: int) -> dict[str, dict[str, float]]:
    """Return for each operation, and for each of its forms, the number of dialogues and the percentage of exact sets."""
    count: Counter[str] = Counter()
    exact: dict[str, Counter[str]] = {}
    for case in cases(number, side, seed):
        results = tried(model, case)
        for name in (case.dialogue.operation, f"{case.dialogue.operation}/{case.dialogue.form}"):
            count[name] += 1
            exact.setdefault(name, Counter()).update({way: int(right) for way, right in results.items()})
    return {
        name: {"dialogues": count[name], **{way: round(100 * right / count[name], 1) for way, right in exact[name].items()}}
        for name in sorted(count)
    }


def main() -> int:
    """Print one JSON object per operation and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--side", type=int, default=96, help="pixels of a scene's side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, row in measure(GrexModel.from_pretrained(given.model), given.scenes, given.side, given.seed).items():
        print(json.dumps({"follow_up": name, **row}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
