"""The main job on a dataset folder: training in stages, prediction of a split with fixed rules beside it, scores, report.

Everything is what any other user calls, and nothing is done twice: a part whose result is there is left out, an interrupted one goes on.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grex_mllm.config import PROTOCOL_FOLDER, Config, load_config, read_yaml, to_dict
from grex_mllm.entries import SOURCES
from grex_mllm.errors import fault
from grex_mllm.types import Sample
from grex_mllm.writing import whole_file

if TYPE_CHECKING:
    from grex_mllm.precision import Resolved
    from grex_mllm.training.forecast import Forecast

PROTOCOL = PROTOCOL_FOLDER / "all.yaml"
DATA, PREDICTIONS, RESULTS, TIMES, WEIGHTS = "data", "predictions.jsonl", "results.json", "times.json", "model.safetensors"
STAGES, BASELINES = "stages", "baselines"
TASKS = ["ground", "generate"]
RULES = ("always_empty", "largest", "all", "oracle", "category_side")  # what stands beside a model
SHEET = 48  # generated texts in the report that nobody chose
IMAGE_STEPS = 1.5  # a guess, not yet measured: time of the prediction of an image in joint training steps; for the announcement
SCORING_S = 120.0  # scores of the model and of the rules, and the report; for the announcement


@dataclass(frozen=True)
class TrainingStage:
    """One training of several, each from the weights of the one before. out: its model folder."""

    name: str
    config: Config
    out: Path

    @property
    def done(self) -> bool:
        return (self.out / WEIGHTS).exists()


def run_job(data: Path, files: Sequence[str | Path], out: Path, overrides: Sequence[str] = (), *, candidates: int) -> dict[str, Any]:
    """Train the stages on a dataset folder, predict its test split, score, report; return the results, none where a signal came.

    files: a configuration for each stage; see `plan_stages`.  candidates: of the texts re-ranked by grounding.

    Raises:
        GrexError: what the parts raise.
    """
    from grex_mllm.processes import num_processes

    stages, spent = plan_stages(data, files, out, overrides), dict[str, float]()
    begun, announced = time.monotonic(), announce_stages(stages, data)
    if not train_stages(stages, out):
        return {}
    with timed(out, "prediction"):
        predict_once(out, data, "test", out / PREDICTIONS, candidates, processes=num_processes())
    with timed(out, "baselines"):
        beside = {name: rule_results(name, data, "test", out / BASELINES, listener=out) for name in RULES}
    with timed(out, "scores"):
        results = score_once(out / PREDICTIONS, data, "test", out / RESULTS, beside=beside, config=to_dict(stages[-1].config))
    page = report_run(out, data=data, num_unselected=SHEET)
    spent = json.loads((out / TIMES).read_text(encoding="utf-8"))
    say(f"report: {page}")
    say(f"seconds so far: {', '.join(f'{part} {seconds:.0f}' for part, seconds in spent.items())}{_against(begun, announced)}")
    return results


def plan_stages(data: Path, files: Sequence[str | Path], out: Path, overrides: Sequence[str] = ()) -> list[TrainingStage]:
    """Return the trainings: the last one's model folder is `out`, the others' lie in `out`/stages.

    A stage trains on `data` unless its file names a mixture or drawn scenes, and starts from the stage before unless it names train.start.

    Raises:
        GrexError: no file, two of one name, or one that does not load.
    """
    names = [Path(file).stem for file in files]
    if not names or len(set(names)) < len(names):
        raise fault(f"stages {', '.join(map(str, files)) or 'none'}", "one configuration or more, of different names", "fix --stages")
    stages: list[TrainingStage] = []
    for file, name in zip(files, names, strict=True):
        folder = out if name == names[-1] else out / STAGES / name
        given = read_yaml(file)
        own = (given.get("data") or {}).get("train")
        fields = [] if isinstance(own, list) or own in SOURCES else [f"--data.train={data}"]
        if stages and not (given.get("train") or {}).get("start"):
            fields.append(f"--train.start={stages[-1].out}")
        fields += [*overrides, f"--train.out={folder}", "--train.resume=true"]
        stages.append(TrainingStage(name, load_config(file, fields), folder))
    return stages


def announce_stages(stages: Sequence[TrainingStage], data: Path) -> float | None:
    """Measure the stages that have not begun, say how long they and the prediction will take, and return the seconds; None = unknown."""
    from grex_mllm.data.dataset import FolderDataset
    from grex_mllm.processes import num_processes
    from grex_mllm.training.checkpoint import latest
    from grex_mllm.training.run import forecast_from_config

    if any(stage.done or latest(str(stage.out)) is not None for stage in stages):
        return None  # a run that goes on: its log says how far it is
    say("measuring a few steps of every stage")
    found = [(stage.name, *forecast_from_config(whole_config(stage.config, stages[0].config))) for stage in stages]
    num_images = len(FolderDataset(data, "test", 10**9))
    prediction = num_images * IMAGE_STEPS * found[-1][1].step_s / num_processes()
    say_precision(found[-1][2])
    seconds = sum(forecast.total_s for _, forecast, _ in found) + prediction + SCORING_S
    parts = [f"{name} {forecast.total_s / 60:.1f}" for name, forecast, _ in found]
    parts.append(f"prediction of {num_images} images {prediction / 60:.1f}")
    say(f"expected on this machine: {seconds / 60:.1f} minutes in all: {', '.join(parts)} (measured; other programs make it longer)")
    return seconds


def whole_config(config: Config, first: Config) -> Config:
    """Return a configuration that needs no `train.start`: the pre-trained parts that it takes from there are those of the first stage."""
    whole = copy.deepcopy(config)
    if whole.model.text.path is None and whole.model.text.tokenizer is None:
        whole.model.text.path, whole.model.text.tokenizer = first.model.text.path, first.model.text.tokenizer
        whole.model.vision.weights = first.model.vision.weights
    return whole


def train_stages(stages: Sequence[TrainingStage], out: Path) -> bool:
    """Train what is not trained, one after another; return False where a signal ended it."""
    from grex_mllm.training.run import train_from_config

    for number, stage in enumerate(stages, start=1):
        if stage.done:
            say(f"training {number}/{len(stages)}, {stage.name}: {stage.out / WEIGHTS} is there already (remove {stage.out} to train anew)")
            continue
        say(f"training {number}/{len(stages)}, {stage.name}, into {stage.out}")
        with timed(out, stage.name):
            result = train_from_config(stage.config)
        if result.interrupted:
            return False
    return True


def predict_once(model: str | Path, data: Path, split: str, out: Path, candidates: int = 0, *, processes: int = 1) -> None:
    """Predict a split, every expression and every object set, unless `out` is there. processes: of this machine, which share the images."""
    from grex_mllm.predict import predict_split
    from grex_mllm.processes import predict_in_processes

    if out.exists():
        return
    if processes > 1:
        predict_in_processes(Path(model), data, split, out, tasks=TASKS, listener=candidates, number=processes)
    else:
        predict_split(str(model), str(data), out, split, TASKS, listener=candidates)


def score_once(
    predictions: Path,
    data: Path,
    split: str,
    out: Path,
    *,
    round_trip: Path | None = None,
    beside: Mapping[str, dict[str, Any]] | None = None,
    config: dict[str, Any] | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Return the results `out`, scored unless they are there. round_trip, beside, config, show: as for `score`."""
    from grex_mllm.score import score

    if out.exists():
        return dict(json.loads(out.read_text(encoding="utf-8")))
    options: dict[str, Any] = {"round_trip": round_trip, "beside": beside, "config": config, "show": show}
    return score(predictions, data, split, PROTOCOL, out, per_sample=True, **options)


def rule_results(name: str, data: Path, split: str, folder: Path, *, listener: Path | None = None) -> dict[str, Any]:
    """Return the results of a fixed rule on a split; its files lie in `folder`. listener: the model that grounds what it writes."""
    from grex_mllm.predictors import open_predictor
    from grex_mllm.predictors.protocol import Options

    predictions = folder / f"{name}.jsonl"
    writes = "generate" in open_predictor(name, Options()).can.tasks
    predict_once(name, data, split, predictions)
    return score_once(predictions, data, split, folder / f"{name}.json", round_trip=listener if writes else None, show=False)


def report_run(run: Path, protocol: str | None = None, *, data: Path | None = None, split: str = "test", num_unselected: int = 0) -> Path:
    """Write the report of a finished run.

    protocol: the run's protocol file, where it has metrics that are not in METRICS.  data: its dataset folder; default: `run`/data.
    num_unselected: cases at even distances instead of random ones; see `write_report`.

    Raises:
        GrexError: no such run, or one without predictions.
    """
    from grex_mllm.data.dataset import FolderDataset
    from grex_mllm.report import write_report

    data = data or run / DATA
    if not (run / PREDICTIONS).exists() or not data.is_dir():
        raise fault(f"{run} without {PREDICTIONS} or {DATA}/", "a finished run", f"run grex demo --out {run}")
    source = FolderDataset(data, split, 10**9)
    position = {image_id: n for n, image_id in enumerate(dict.fromkeys(record.image_id for record in source.expressions))}

    @lru_cache(maxsize=64)
    def get_sample(image_id: str) -> Sample:
        return source[position[image_id]]

    return write_report(run, get_sample, list(position), protocol=protocol, num_unselected=num_unselected)


def announce(forecast: Forecast, precision: Resolved, start: float, prediction_steps: float, scoring_s: float) -> float:
    """Say how long a job of one training will take on this machine, and in which precision; return the seconds of all of it.

    start: `time.monotonic()` of the beginning.  prediction_steps: time of the prediction in joint training steps.
    """
    prediction = prediction_steps * forecast.step_s
    total_s = time.monotonic() - start + forecast.total_s + prediction + scoring_s
    say_precision(precision)
    language = sum(forecast.stages_s.values())
    say(
        f"expected on this machine: {total_s / 60:.1f} minutes in all: language model {language / 60:.1f}, "
        f"joint training {forecast.joint_s / 60:.1f}, prediction {prediction / 60:.1f} (measured; other programs make it longer)"
    )
    return total_s


def say_precision(precision: Resolved) -> None:
    """Say in which precision a run computes, and why."""
    say(f"precision: {precision.precision} ({precision.reason})")
    if precision.warning:
        say(f"warning: {precision.warning}")


@contextmanager
def timed(run: Path, part: str) -> Iterator[None]:
    """Add the seconds of the block to those of `part` in `run`/times.json, also where it is interrupted."""
    begun = time.monotonic()
    try:
        yield
    finally:
        file = run / TIMES
        spent = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        spent[part] = round(spent.get(part, 0.0) + time.monotonic() - begun, 1)
        with whole_file(file) as work:
            work.write_text(json.dumps(spent, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def _against(begun: float, announced: float | None) -> str:
    return "" if announced is None else f"; {(time.monotonic() - begun) / 60:.1f} minutes in all, {announced / 60:.1f} were announced"
