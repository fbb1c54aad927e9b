"""Predictions + protocol -> results.json and a table. Whoever made the predictions, the same scorer reads them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grex_mllm.errors import fault
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
    beside: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Score predictions on a split of a dataset folder; return the results and write them to `out` (results.json).

    predictions_path: one or several of our files, COCO results, folders of PNG masks, ReLA's .pth (`score/formats.py`).
    allow_missing: expressions without a prediction count as wrong instead of being an error.
    per_sample: also write `<out>.samples.jsonl`, one line for each expression (compare and errors need it). config: kept in the provenance.
    round_trip: a model folder that grounds generated texts without a `round_trip` of their own, on `device`; image_root: their images.
    show: print the table.  beside: name -> results of other systems on the same split, to stand among the baselines.

    Raises:
        GrexError: predictions, dataset or protocol at fault (three parts: given, expected, remedy). Nothing is written then.
    """
    if per_sample and out is None:
        raise fault("per-sample rows without an output file", "a path for results.json", "give out")
    if num_processes < 1:
        raise fault(f"{num_processes} processes", "at least one", "fix --num-processes")
    protocol, truth, notes = load_protocol(protocol_path), open_truth(data_folder, split), list[str]()
    given = [predictions_path] if isinstance(predictions_path, str | Path) else predictions_path
    with tempfile.TemporaryDirectory() as folder:
        index = index_predictions([as_jsonl(Path(path), truth, Path(folder), notes) for path in given])
        of_sets = set_tasks(protocol) if index.num_generation else []
        if round_trip is not None and not of_sets:
            what = f'a round trip with {index.num_generation} generated texts under protocol "{protocol.name}"'
            remedy = "leave --round-trip out, or take eval/protocols/greg.yaml"
            raise fault(what, "generation lines and a protocol with a metric of texts", remedy)
        trip = None if round_trip is None else RoundTrip(round_trip, truth, image_root, device)  # early, so that its faults come at once
        plan = plan_tasks(protocol, index, notes)
        rows_path = Path(folder, "rows.jsonl") if per_sample and plan.tasks else None
        tally, num_missing = _score_expressions(truth, index, plan, notes, allow_missing, num_processes, rows_path)
        rest: dict[str, Any] = {"allow_missing": allow_missing, "notes": notes, "round_trip": trip}
        blocks = {task: score_generation(truth, index, protocol, task, **rest) for task in of_sets}
        provenance = describe_run(protocol, truth, index, num_missing, config=config, notes=notes)
        provenance |= {"round_trip": trip.provenance()} if trip is not None else {}
        results = assemble(tally, blocks, provenance, beside)
        if out is not None:
            out = Path(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            if rows_path is not None:
                provenance["samples"] = f"{out.stem}.samples.jsonl"
                shutil.move(rows_path, out.with_name(provenance["samples"]))
            write_results(results, out)
    if show:
        print_results(results)
    return results


def _score_expressions(
    truth: TruthFolder,
    index: PredictionFiles,
    plan: Plan,
    notes: list[str],
    allow_missing: bool,
    num_processes: int,
    rows_path: Path | None,
) -> tuple[Tally, int]:
    """Return the sums and how many expressions have no prediction; what is left out, or not understood, goes into the notes.

    Raises:
        GrexError: ids that do not fit; some targets have segmentations and others do not.
    """
    num_missing = match_ids(index, truth, allow_missing) if plan.tasks else 0
    if num_missing:
        notes.append(f"{num_missing} of {len(truth)} expressions have no prediction and count as wrong")
    unknown = [f"{key} ({count})" for key, count in sorted(index.unknown_keys.items()) if not plan.needs(key)]
    if unknown:
        notes.append(f"fields that were not understood and are ignored: {', '.join(unknown)}")
    tally = evaluate_in_processes(truth, index, plan, num_processes, rows_path) if plan.tasks else Tally(plan)
    for protocol, task in plan.tasks:
        sums, words = tally.sums.get((ALL, protocol, task)), getattr(entry(task), "LEFT_OUT", "")
        left_out = len(truth) - (sums.compute()["num_samples"] if words and sums is not None else 0)
        if words and left_out:
            notes.append(f"{task}: {left_out} of {len(truth)} expressions {words} and are left out")
    absent, found = tally.num_masks["absent"], tally.num_masks["found"]
    if absent and found:
        given = f"{absent} of {absent + found} targeted expressions whose targets have no segmentation"
        raise fault(given, "masks for all or for none", "fix the data")
    if absent:
        notes.append("masks: the dataset has no segmentations; not scored")
        tally.drop(plan.needs("gt_mask"))
    return tally, num_missing
