"""The main job on the embedded default: data, joint training, prediction, scores and report, all by what any other user calls."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grex_mllm.config import CONFIG_FOLDER, PROTOCOL_FOLDER, load_config, to_dict
from grex_mllm.errors import fault
from grex_mllm.types import Sample

if TYPE_CHECKING:
    from grex_mllm.precision import Resolved
    from grex_mllm.training.forecast import Forecast

DEMO_CONFIG = CONFIG_FOLDER / "demo.yaml"
PROTOCOL = PROTOCOL_FOLDER / "all.yaml"
DATA, PREDICTIONS, RESULTS = "data", "predictions.jsonl", "results.json"
TEST_SCENES, EXPRESSIONS_PER_SCENE, LISTENER_CANDIDATES = 250, 8, 16
PREDICTION_STEPS, SCORING_S = 120, 15.0  # time of the prediction in joint training steps, and of scores and report; for the announcement


def run_demo(out: Path, config_file: str | None, overrides: list[str]) -> dict[str, Any]:
    """Run everything into `out` and return the results. A finished training is not repeated; an interrupted one goes on.

    A training that a signal stops ends the demo, too, without results.

    Raises:
        GrexError: what the parts raise.
    """
    from grex_mllm.data.sources import options_of
    from grex_mllm.data.synthetic.export import export
    from grex_mllm.models.grex import WEIGHTS
    from grex_mllm.predict import predict_split
    from grex_mllm.score import score
    from grex_mllm.training.run import train_from_config

    start, announced = time.monotonic(), dict[str, float]()
    config = load_config(config_file or DEMO_CONFIG, [*overrides, f"--train.out={out}", "--train.resume=true"])
    _print(f"1/4 data: {TEST_SCENES} synthetic test scenes with {EXPRESSIONS_PER_SCENE} expressions each into {out / DATA}")
    if not (out / DATA).is_dir():
        export(options_of(config.data, "synthetic"), "test", TEST_SCENES, out / DATA, EXPRESSIONS_PER_SCENE)
    if (out / WEIGHTS).exists():
        _print(f"2/4 training: {out / WEIGHTS} is there already (remove {out} to train anew)")
    else:
        _print("2/4 joint training of grounding (masks, boxes, counts) and generation (group expressions), on scenes drawn on the fly")
        result = train_from_config(config, on_forecast=lambda forecast, precision: announce(forecast, precision, start, announced))
        if result.interrupted:
            return {}
    trained = time.monotonic()
    _print("3/4 prediction of the test split: every expression, every object set, greedy and re-ranked by grounding")
    if not (out / PREDICTIONS).exists():
        tasks = ["ground", "generate"]
        predict_split(str(out), str(out / DATA), out / PREDICTIONS, "test", tasks, listener=LISTENER_CANDIDATES)
    predicted = time.monotonic()
    _print("4/4 scores and report")
    results = score(out / PREDICTIONS, out / DATA, "test", PROTOCOL, out / RESULTS, per_sample=True, config=to_dict(config), show=True)
    page = report_run(out)
    done = time.monotonic()
    _print(
        f"report: {page}\n"
        f"time: training {trained - start:.0f} s, prediction {predicted - trained:.0f} s, scores and report {done - predicted:.0f} s"
        f"{_against(done - start, announced)}\n"
        f'ask it: grex ground --model {out} --image {out / DATA}/images/test-0.png --expression "the red circles" --out {out}/answers'
    )
    return results


def announce(forecast: Forecast, precision: Resolved, start: float, announced: dict[str, float]) -> None:
    """Say how long the demo will take on this machine, and in which precision it computes and why.

    start: `time.monotonic()` of the beginning.  announced: gets the expected seconds of the whole demo under "total_s".
    """
    prediction = PREDICTION_STEPS * forecast.step_s
    announced["total_s"] = time.monotonic() - start + forecast.total_s + prediction + SCORING_S
    _print(f"precision: {precision.precision} ({precision.reason})")
    if precision.warning:
        _print(f"warning: {precision.warning}")
    language = sum(forecast.stages_s.values())
    _print(
        f"expected on this machine: {announced['total_s'] / 60:.1f} minutes in all: language model {language / 60:.1f}, "
        f"joint training {forecast.joint_s / 60:.1f}, prediction {prediction / 60:.1f} (measured; other programs make it longer)"
    )


def _against(spent_s: float, announced: dict[str, float]) -> str:
    return f"; {spent_s / 60:.1f} minutes in all, {announced['total_s'] / 60:.1f} were announced" if announced else ""


def report_run(run: Path, protocol: str | None = None) -> Path:
    """Write the report of a finished demo (or of any run whose folder holds its test data in `data/`).

    protocol: the run's protocol file, where it has metrics that are not in METRICS.

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

    return write_report(run, get_sample, list(position), protocol=protocol)


def _print(text: str) -> None:
    print(text, flush=True)
