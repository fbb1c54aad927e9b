"""Predictions + protocol -> results.json and a table. Whoever made the predictions, the same scorer reads them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics import entry
from grex_mllm.score.formats import as_jsonl
from grex_mllm.score.generation import score_generation, set_tasks
from grex_mllm.score.grounding import evaluate_in_processes, plan_tasks
from grex_mllm.score.protocol import Protocol, load_protocol
from grex_mllm.score.reading import PredictionFiles, index_predictions, match_ids
from grex_mllm.score.results import assemble, describe_run, write_results
from grex_mllm.score.round_trip import RoundTrip
from grex_mllm.score.table import print_results
from grex_mllm.score.tally import ALL, Plan, Tally
from grex_mllm.score.truth import TruthFolder, open_truth

__all__ = ["Protocol", "load_protocol", "print_results", "score"]


def score(
    predictions_path: str | Path | Sequence[str | Path],
    data_folder: str | Path,
    split: str,
    protocol_path: str | Path,
    out: str | Path | None = None,
    *,
    allow_missing: bool = False,
    per_sample: bool = False,
    num_processes: int = 1,
    round_trip: str | Path | None = None,
    image_root: str | Path | None = None,
    device: str = "auto",
    config: dict[str, Any] | None = None,
    show: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Score predictions on a split of a dataset folder; return the results and write them to `out` (results.json).

    predictions_path: one or several of our files, COCO results, folders of PNG masks, ReLA's .pth (`score/formats.py`).
    allow_missing: expressions without a prediction count as wrong instead of being an error.
    per_sample: also write `<out>.samples.jsonl`, one line for each expression (compare and errors need it). config: kept in the provenance.
    round_trip: a model folder that grounds generated texts without a `round_trip` of their own, on `device`; image_root: their images.
    show: print the table. progress: called with the number of expressions finished.

    Raises:
        GrexError: predictions, dataset or protocol at fault (three parts: given, expected, remedy). Nothing is written then.
    """
    if per_sample and out is None:
        raise fault("per-sample rows without an output file", "a path for results.json", "give out")
    if num_processes < 1:
        raise fault(f"{num_processes} processes", "at least one", "fix --num-processes")
    protocol = load_protocol(protocol_path)
    given = [Path(p) for p in ([predictions_path] if isinstance(predictions_path, str | Path) else predictions_path)]
    truth = open_truth(data_folder, split)
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [as_jsonl(path, truth, Path(folder), notes) for path in given]
        index = index_predictions(paths)
        rows_path = Path(folder, "rows.jsonl") if per_sample else None
        trip = _open_round_trip(round_trip, truth, image_root, device, protocol, index)
        results = _score_index(truth, index, protocol, notes, allow_missing, num_processes, rows_path, config, progress, trip)
        if out is not None:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            if rows_path is not None and rows_path.is_file():
                results["provenance"]["samples"] = samples_path(Path(out)).name
                shutil.move(rows_path, samples_path(Path(out)))
            write_results(results, Path(out))
    if show:
        print_results(results)
    return results


def _score_index(
    truth: TruthFolder,
    index: PredictionFiles,
    protocol: Protocol,
    notes: list[str],
    allow_missing: bool,
    num_processes: int,
    rows_path: Path | None,
    config: dict[str, Any] | None,
    progress: Callable[[int], None],
    trip: RoundTrip | None,
) -> dict[str, Any]:
    plan = plan_tasks(protocol, index, notes)
    of_sets = set_tasks(protocol) if index.num_generation else []
    if not plan.tasks and not of_sets:
        raise GrexError(
            f"{', '.join(p.name for p in index.paths)} answers none of {', '.join(protocol.tasks)}; expected fields of a task of protocol "
            f'"{protocol.name}"; {"; ".join(notes) or "the file is empty or holds other lines"}'
        )
    num_missing = match_ids(index, truth, allow_missing) if plan.tasks else 0
    if num_missing:
        notes.append(f"{num_missing} of {len(truth)} expressions have no prediction and count as wrong")
    unknown = {key: count for key, count in sorted(index.unknown_keys.items()) if not plan.needs(key)}
    if unknown:
        named = ", ".join(f"{key} ({count})" for key, count in unknown.items())
        notes.append(f"fields that were not understood and are ignored: {named}")
    tally = Tally(plan)
    if plan.tasks:
        tally = evaluate_in_processes(truth, index, plan, num_processes, rows_path, progress)
    _tell_left_out(tally, plan, len(truth), notes)
    _drop_maskless(tally, plan, notes)
    blocks = {task: score_generation(truth, index, protocol, task, allow_missing, notes, trip) for task in of_sets}
    provenance = describe_run(protocol, truth, index, num_missing, config, notes)
    if trip is not None:
        provenance["round_trip"] = trip.provenance()
    return assemble(tally, blocks, provenance)


def _open_round_trip(
    model: str | Path | None,
    truth: TruthFolder,
    image_root: str | Path | None,
    device: str,
    protocol: Protocol,
    index: PredictionFiles,
) -> RoundTrip | None:
    """Load the model before the long part, so that its faults come at once.

    Raises:
        GrexError: nothing to ground: the predictions hold no generated text, or the protocol does not ask for it.
    """
    if model is None:
        return None
    if not set_tasks(protocol) or not index.num_generation:
        given = f'a round trip with {index.num_generation} generated texts under protocol "{protocol.name}"'
        raise fault(
            given, "generation lines and a protocol with a metric of texts", "leave --round-trip out, or take eval/protocols/greg.yaml"
        )
    return RoundTrip(model, truth, image_root, device)


def samples_path(out: Path) -> Path:
    """Return where the per-sample rows of a results file stand."""
    return out.with_name(f"{out.stem}.samples.jsonl")


def _tell_left_out(tally: Tally, plan: Plan, num_expressions: int, notes: list[str]) -> None:
    """Say how many expressions a metric leaves out that has words for it (`LEFT_OUT`)."""
    for protocol, task in plan.tasks:
        sums, words = tally.sums.get((ALL, protocol, task)), getattr(entry(task), "LEFT_OUT", "")
        left_out = num_expressions - (sums.compute()["num_samples"] if words and sums is not None else 0)
        if words and left_out:
            notes.append(f"{task}: {left_out} of {num_expressions} expressions {words} and are left out")


def _drop_maskless(tally: Tally, plan: Plan, notes: list[str]) -> None:
    """Take the metrics of masks out of box-only data.

    Raises:
        GrexError: some targets have segmentations and others do not.
    """
    absent, found = tally.num_masks["absent"], tally.num_masks["found"]
    if absent and found:
        given = f"{absent} of {absent + found} targeted expressions whose targets have no segmentation"
        raise fault(given, "masks for all or for none", "fix the data")
    if absent:
        notes.append("masks: the dataset has no segmentations; not scored")
        tally.drop(plan.needs("gt_mask"))
