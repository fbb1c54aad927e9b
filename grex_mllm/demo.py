"""The main job on the embedded default: data, joint training, prediction, scores and report, all by what any other user calls.

The verb `grex demo` stands here, too; what is heavy is imported when it runs.
"""

from __future__ import annotations

import time
import webbrowser
from pathlib import Path
from typing import Any

from grex_mllm.config import CONFIG_FOLDER, load_config, to_dict
from grex_mllm.job import DATA, PREDICTIONS, PROTOCOL, RESULTS, WEIGHTS, announce, predict_once, report_run, say

DEMO_CONFIG = CONFIG_FOLDER / "demo.yaml"
TEST_SCENES, EXPRESSIONS_PER_SCENE, LISTENER_CANDIDATES = 250, 8, 10
PREDICTION_STEPS, SCORING_S = 60, 15.0  # time of the prediction in joint training steps, and of scores and report; for the announcement


def demo(out: str = "runs/demo", config: str | None = None, open: bool = False, overrides: list[str] | None = None) -> int:
    """Train the joint model on synthetic scenes, predict and score the test split, and write a report.

    Args:
        out: the run's folder.
        config: another configuration than the demo's own.
        open: show the report in the browser at the end.
        overrides: fields to change, as --a.b=c.
    """
    done = run_demo(Path(out), config, overrides or [])
    if done and open:
        from grex_mllm.report.page import REPORT

        open_report(Path(out) / REPORT)
    return 0


def open_report(page: Path) -> None:
    """Show a page in the browser of this machine; say where it is where there is none."""
    try:
        opened = webbrowser.open(page.resolve().as_uri())
    except (webbrowser.Error, OSError):
        opened = False
    say(f"opened in the browser: {page}" if opened else f"no browser found here; open this file in one: {page.resolve()}")


def run_demo(out: Path, config_file: str | None, overrides: list[str]) -> dict[str, Any]:
    """Run everything into `out` and return the results. A finished training is not repeated; an interrupted one goes on.

    A training that a signal stops ends the demo, too, without results.

    Raises:
        GrexError: what the parts raise.
    """
    from grex_mllm.data.sources import options_of
    from grex_mllm.data.synthetic.export import export
    from grex_mllm.processes import num_processes
    from grex_mllm.score import score
    from grex_mllm.training.run import train_from_config

    start, announced = time.monotonic(), list[float]()
    config = load_config(config_file or DEMO_CONFIG, [*overrides, f"--train.out={out}", "--train.resume=true"])
    say(f"1/4 data: {TEST_SCENES} synthetic test scenes with {EXPRESSIONS_PER_SCENE} expressions each into {out / DATA}")
    if not (out / DATA).is_dir():
        export(options_of(config.data, "synthetic"), "test", TEST_SCENES, out / DATA, EXPRESSIONS_PER_SCENE)
    if (out / WEIGHTS).exists():
        say(f"2/4 training: {out / WEIGHTS} is there already (remove {out} to train anew)")
    else:
        say("2/4 joint training of grounding (masks, boxes, counts) and generation (group expressions), on scenes drawn on the fly")

        def told(forecast: Any, precision: Any) -> None:
            announced.append(announce(forecast, precision, start, PREDICTION_STEPS, SCORING_S))

        result = train_from_config(config, on_forecast=told)
        if result.interrupted:
            return {}
    trained = time.monotonic()
    say("3/4 prediction of the test split: every expression, every object set, greedy and re-ranked by grounding")
    predict_once(out, out / DATA, "test", out / PREDICTIONS, LISTENER_CANDIDATES, processes=num_processes())
    predicted = time.monotonic()
    say("4/4 scores and report")
    results = score(out / PREDICTIONS, out / DATA, "test", PROTOCOL, out / RESULTS, per_sample=True, config=to_dict(config), show=True)
    page = report_run(out)
    done = time.monotonic()
    say(
        f"report: {page}\n"
        f"time: training {trained - start:.0f} s, prediction {predicted - trained:.0f} s, scores and report {done - predicted:.0f} s"
        f"{_against(done - start, *announced)}\n"
        f'ask it: grex ground --model {out} --image {out / DATA}/images/test-0.png --expression "the red circles" --out {out}/answers'
    )
    return results


def _against(spent_s: float, announced_s: float | None = None) -> str:
    return f"; {spent_s / 60:.1f} minutes in all, {announced_s / 60:.1f} were announced" if announced_s is not None else ""
