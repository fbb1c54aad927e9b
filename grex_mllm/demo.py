"""The main job on the embedded default: data, joint training, prediction, scores and report, all by what any other user calls."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from grex_mllm.config import CONFIG_FOLDER, PROTOCOL_FOLDER, load_config, to_dict
from grex_mllm.errors import fault
from grex_mllm.types import Sample

DEMO_CONFIG = CONFIG_FOLDER / "demo.yaml"
PROTOCOL = PROTOCOL_FOLDER / "all.yaml"
DATA, PREDICTIONS, RESULTS = "data", "predictions.jsonl", "results.json"
TEST_SCENES, EXPRESSIONS_PER_SCENE, LISTENER_CANDIDATES = 250, 8, 16


def run_demo(out: Path, config_file: str | None, overrides: list[str]) -> dict[str, Any]:
    """Run everything into `out` and return the results. A finished training is not repeated; an interrupted one goes on.

    Raises:
        GrexError: what the parts raise.
    """
    from grex_mllm.data.synthetic.export import export
    from grex_mllm.models.grex import WEIGHTS
    from grex_mllm.predict import predict_split
    from grex_mllm.score import score
    from grex_mllm.training.run import train_from_config

    start = time.monotonic()
    config = load_config(config_file or DEMO_CONFIG, [*overrides, f"--train.out={out}", "--train.resume=true"])
    _say(f"1/4 data: {TEST_SCENES} synthetic test scenes with {EXPRESSIONS_PER_SCENE} expressions each into {out / DATA}")
    if not (out / DATA).is_dir():
        export(config.data.synthetic, "test", TEST_SCENES, out / DATA, EXPRESSIONS_PER_SCENE)
    if (out / WEIGHTS).exists():
        _say(f"2/4 training: {out / WEIGHTS} is there already (remove {out} to train anew)")
    else:
        _say("2/4 joint training of grounding (masks, boxes, counts) and generation (group expressions), on scenes drawn on the fly")
        train_from_config(config)
    trained = time.monotonic()
    _say("3/4 prediction of the test split: every expression, every object set, greedy and chosen by listening")
    if not (out / PREDICTIONS).exists():
        predict_split(
            str(out), str(out / DATA), out / PREDICTIONS, "test", ["ground", "generate"], None, LISTENER_CANDIDATES, None, "auto", []
        )
    predicted = time.monotonic()
    _say("4/4 scores and report")
    results = score(out / PREDICTIONS, out / DATA, "test", PROTOCOL, out / RESULTS, per_sample=True, config=to_dict(config), show=True)
    page = report_run(out)
    done = time.monotonic()
    _say(
        f"report: {page}\n"
        f"time: training {trained - start:.0f} s, prediction {predicted - trained:.0f} s, scores and report {done - predicted:.0f} s\n"
        f'ask it: grex ground --model {out} --image {out / DATA}/images/test-0.png --expression "the red circles" --out {out}/answers'
    )
    return results


def report_run(run: Path) -> Path:
    """Write the report of a finished demo (or of any run whose folder holds its test data in `data/`).

    Raises:
        GrexError: no such run, or one without predictions.
    """
    from grex_mllm.data.dataset import FolderDataset
    from grex_mllm.report import write_report

    if not (run / PREDICTIONS).exists() or not (run / DATA).is_dir():
        raise fault(f"{run} without {PREDICTIONS} or {DATA}/", "a finished run", f"run grex demo --out {run}")
    source = FolderDataset(run / DATA, "test", 10**9)
    position = {image_id: n for n, image_id in enumerate(dict.fromkeys(record.image_id for record in source.expressions))}

    @lru_cache(maxsize=64)
    def get_sample(image_id: str) -> Sample:
        return source[position[image_id]]

    return write_report(run, get_sample, list(position))


def _say(text: str) -> None:
    print(text, flush=True)
