"""Predictor and records -> predictions.jsonl: resumable, and shared out over processes.

Answers are written to `<out>.part` as they come, in any order; an interrupted run goes on from there. The finished file appears under its
own name in one step, in the order of the split. Started by `torchrun`, process r of n takes every n-th image and process 0 joins the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from grex_mllm.config import Config, load_config
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.images import resolve_image
from grex_mllm.data.judges import Judge, find_judge
from grex_mllm.data.sampling import write_sample
from grex_mllm.data.sources import options_of, source_of
from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics.language import OTHER_WAYS
from grex_mllm.predictors import open_predictor
from grex_mllm.predictors.lines import answer_fields
from grex_mllm.predictors.protocol import STATUSES, TASKS, Answer, Item, ObjectSet, Options, Predictor, object_sets, set_key
from grex_mllm.progress import list_ids, progress_bar
from grex_mllm.types import Sample
from grex_mllm.writing import whole_file

BARRIER_S = 24 * 3600.0


def predict_split(
    model: str,
    data: str,
    out: Path,
    split: str,
    tasks: list[str],
    *,
    image_root: str | None = None,
    listener: int = 0,
    limit: int | None = None,
    sample: str | None = None,
    device: str = "auto",
    asked: Mapping[str, str] | None = None,
    dry_run: bool = False,
    overrides: Sequence[str] = (),
) -> Path:
    """Predict a split of a dataset folder with any predictor and write `out`.

    model: what `open_predictor` takes.  data: the folder, or an entry of SOURCES ("synthetic": scenes as the model's configuration says),
    which is written to `synthetic_folder(out)`.
    listener: candidates for the listener-chosen expressions, 0 = greedy only.  limit: only the first images; how many synthetic scenes.
    sample: draw `limit` expressions instead (`data/sampling.py`); they become the dataset folder `synthetic_folder(out)`.
    asked: further options of one kind of predictor, by their names on the command line.  dry_run: print what the predictor would send,
    and write nothing.

    Raises:
        GrexError: unknown task, predictor or split; a predictor that can do none of the tasks, or that answers otherwise than it is asked;
            a part file of another predictor or split; what the predictor raises.
    """
    for task in tasks:
        if task not in TASKS:
            raise fault(f'task "{task}"', f"{' or '.join(TASKS)}, or both with a comma", "fix --tasks")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0 and Path(out).exists() and not any(part_file(Path(out), r, world).exists() for r in range(world)):
        raise fault(f"{out} exists", "a new file", "remove it, or choose another --out")
    if limit is not None and limit < 1:
        raise fault(f"--limit {limit}", "at least 1 image, or expression of a sample", "give another number, or leave it out")
    drawn = source_of(data)
    if sample is not None and (limit is None or drawn is not None):
        raise fault(f"--sample {sample}{'' if limit is None else f' with --data {data}'}", "a dataset folder and --limit", "give both")
    told: dict[str, Any] = {"asked": dict(asked or {}), "data": data, "image_root": image_root, "out": None if dry_run else Path(out)}
    options = Options(device, list(overrides), listener, **told)
    predictor = open_predictor(model, options)
    try:
        tasks = _tasks_of(predictor, model, tasks)
        if drawn is not None:
            config = predictor.can.config or load_config(None, [item for item in overrides if item.startswith("--data.")])
            data = _drawn_scenes(drawn, data, config, out, split, image_root=image_root, limit=limit, rank=rank)
        elif sample is not None:
            data, image_root, limit = _sampled(data, split, limit, sample, out, image_root=image_root, rank=rank), None, None
        source = FolderDataset(data, split, 10**9, num_images=limit, image_root=image_root)
        if dry_run:
            return _preview(predictor, model, source, tasks, Path(out))
        return _predict_all(predictor, model, source, tasks, _Part(out, rank, world, _fingerprint(predictor, data, split, tasks, limit)))
    finally:
        predictor.can.finish()


def _fingerprint(predictor: Predictor, data: str, split: str, tasks: list[str], limit: int | None) -> str:
    text = json.dumps([predictor.fingerprint(), str(data), split, tasks, limit], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _predict_all(predictor: Predictor, model: str, source: FolderDataset, tasks: list[str], writer: _Part) -> Path:
    """Answer what is open, say how it went, and put the finished file together."""
    asked, split = _questions(source, tasks), source.split
    writer.asks_again = predictor.can.asks_again
    with writer, progress_bar(f"predict {split}") as advance:
        _predict(predictor, model, source, tasks, asked, writer=writer, advance=advance)
    if writer.rank == 0:
        remarks = predictor.can.remarks([record for group in source.groups for record in group])
        print(f"predicted {split} {predictor.can.how}", *remarks, sep="\n", file=sys.stderr, flush=True)
    return writer.finish(asked)


def _preview(predictor: Predictor, model: str, source: FolderDataset, tasks: list[str], out: Path) -> Path:
    """Print what the predictor would send for the split."""
    if predictor.can.preview is None:
        raise fault(f"--dry-run with {model}", "a model that is asked (FAMILY:FOLDER, openai:MODEL)", "leave it out")
    items = _items(source, list(range(len(source))), tasks, frozenset(), None)
    print(json.dumps(predictor.can.preview(items, tasks), indent=2, ensure_ascii=False))
    return out


def _sampled(data: str, split: str, number: int | None, way: str, out: Path, *, image_root: str | None, rank: int) -> str:
    """Write the drawn part of the split (process 0; the others wait for it) and return its folder."""
    assert number is not None
    folder = synthetic_folder(Path(out))
    _wait_for([folder] if rank != 0 else [], f"no {folder} within a day", "the sample that process 0 writes there")
    if rank == 0:
        write_sample(data, split, number, way, folder, image_root=image_root)
    return str(folder)


def _tasks_of(predictor: Predictor, model: str, tasks: list[str]) -> list[str]:
    """Return the tasks that the predictor can do."""
    possible = [task for task in tasks if task in predictor.can.tasks]
    why = [predictor.can.lacks[task] for task in tasks if task in predictor.can.lacks]
    if why and not possible:
        raise fault(f"{model} cannot do {tasks[0]} ({why[0]})", "a model that can", f"use --tasks {predictor.can.tasks[0]}")
    for reason in why:
        print(f"left out: {reason}", file=sys.stderr, flush=True)
    if not possible and "generate" in tasks:
        raise fault(f"{model} has no generator", "a model with one for task generate", "use --tasks ground")
    if not possible:
        raise fault(f"{model} does not ground", "a model that does for task ground", "use --tasks generate")
    return possible


def synthetic_folder(out: Path) -> Path:
    """Return where the scenes, or the sample, of predictions on drawn data are written: runs/x.jsonl -> runs/x.data."""
    return out.with_name(f"{out.stem}.data")


def _drawn_scenes(
    source: ModuleType, name: str, config: Config, out: Path, split: str, *, image_root: str | None, limit: int | None, rank: int
) -> str:
    """Write the scenes to predict (process 0; the others wait for them) and return their folder."""
    if image_root is not None:
        raise fault(f"--image-root {image_root} with --data {name}", "no image root: the scenes are drawn", "leave --image-root out")
    folder = synthetic_folder(out)
    _wait_for([folder] if rank != 0 else [], f"no {folder} within a day", "the scenes that process 0 writes there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    source.export_for_prediction(options_of(config.data, name), split, limit, folder)
    return str(folder)


@dataclass(frozen=True)
class _Question:
    """What a key stands for. position: of its image in the split.  targets: of an object set; None = an expression."""

    position: int
    image_id: str
    targets: ObjectSet | None = None


def _questions(source: FolderDataset, tasks: list[str]) -> dict[str, _Question]:
    """Return key -> question of the whole split, in the order of the finished file."""
    asked: dict[str, _Question] = {}
    for position, group in enumerate(source.groups):
        image_id = group[0].image_id
        if "ground" in tasks:
            asked |= {e.expression_id: _Question(position, image_id) for e in group}
        if "generate" in tasks:
            asked |= {set_key(image_id, targets): _Question(position, image_id, targets) for targets in object_sets(group)}
    return asked


def _predict(
    predictor: Predictor, model: str, source: FolderDataset, tasks: list[str], asked: dict[str, _Question], *, writer: _Part, advance: Any
) -> None:
    """Write an answer to every question of this process's images that has none yet."""
    mine = range(writer.rank, len(source), writer.world)
    wanted = {key for key, question in asked.items() if question.position % writer.world == writer.rank} - writer.done
    left = dict.fromkeys(mine, 0)
    for key in wanted:
        left[asked[key].position] += 1
    judge, finished = find_judge(source.dataset.folder, source.dataset.info), sum(not num for num in left.values())
    items = _items(source, [position for position, num in left.items() if num], tasks, frozenset(writer.done), predictor.can.ahead)
    for answer in _answers(predictor, items, tasks):
        if answer.key not in wanted or answer.status not in STATUSES:
            what = f'status "{answer.status}"' if answer.key in wanted else "an answer more"
            raise fault(f'{what} of {model} for "{answer.key}"', "one answer, with a known status, to each open question", "fix it")
        wanted.discard(answer.key)
        question = asked[answer.key]
        writer.write(answer.key, _line(answer, question, source, judge, predictor.can.truth))
        left[question.position] -= 1
        if not left[question.position]:
            finished += 1
            advance(finished / len(mine), question.image_id)
    if wanted:
        given = list_ids(f"questions without an answer of {model}", [key for key in asked if key in wanted])
        raise fault(given, "one for each, with status error where there is none", "fix the predictor")


def _line(answer: Answer, question: _Question, source: FolderDataset, judge: Judge | None, truth: str) -> dict[str, Any]:
    """Return the prediction line of an answer, with what the data's judge makes of each of its expressions."""
    fields = answer_fields(answer)
    if truth:
        fields["reads_truth"] = truth
    if question.targets is None:
        return {"expression_id": answer.key, **fields}
    for said in (fields, *(fields.get(way) for way in OTHER_WAYS)):
        if judge is not None and said and "expression" in said:
            said["judgement"] = judge(said["expression"], source.dataset.images[question.image_id], question.targets)
    return {"image_id": question.image_id, "targets": list(question.targets), **fields}


def _answers(predictor: Predictor, items: Iterator[Item], tasks: list[str]) -> Iterator[Answer]:
    """Yield the answers to all tasks. The one that has taken fewer images goes on, so that a predictor that works image by image has both
    questions about one image in turn; one that looks ahead may do so."""
    taken = [0] * len(tasks)

    def counted(n: int, feed: Iterable[Item]) -> Iterator[Item]:
        for item in feed:
            taken[n] += 1
            yield item

    streams = {
        n: iter(getattr(predictor, TASKS[task])(counted(n, feed))) for n, (task, feed) in enumerate(zip(tasks, tee(items, len(tasks))))
    }
    while streams:
        n = min(streams, key=taken.__getitem__)
        answer = next(streams[n], None)
        if answer is None:
            del streams[n]
        else:
            yield answer


def _items(source: FolderDataset, positions: list[int], tasks: list[str], done: frozenset[str], ahead: int | None) -> Iterator[Item]:
    """Yield an item for each image. ahead: see `Abilities`; then faults of an image come before any answer about it."""
    samples = iter(()) if ahead is None else _samples(source, positions, ahead)
    for position in positions:
        group = source.groups[position]
        if ahead is None:
            record, load = source.dataset.images[group[0].image_id], lambda position=position: source[position].image
        else:
            sample = next(samples)
            record, load = sample.record, lambda image=sample.image: image
        file = resolve_image(source.dataset.image_root, record.file)
        sets = object_sets(group) if "generate" in tasks else []
        item = Item(record, file, load, group, sets, done)
        if ahead is not None and item.open_sets:
            _ = item.masks
        yield item


def _samples(source: FolderDataset, positions: list[int], num_workers: int) -> Iterator[Sample]:
    """Yield the samples in order, read by `num_workers` processes (0: by this one).

    Raises:
        GrexError: what the data raised, with its own message also from a worker.
    """
    if num_workers == 0:
        yield from (source[p] for p in positions)
        return
    from torch.utils.data import DataLoader

    caught: Any = _Caught(source, positions)
    for item in DataLoader(caught, batch_size=None, num_workers=num_workers, collate_fn=_same):
        if isinstance(item, GrexError):
            raise item
        yield item


class _Caught:
    """The samples at some positions; a fault comes as a value, because a loader would wrap what its worker raises in a traceback."""

    def __init__(self, source: FolderDataset, positions: list[int]) -> None:
        self.source, self.positions = source, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample | GrexError:
        try:
            return self.source[self.positions[index]]
        except GrexError as error:
            return error


def _same(item: Any) -> Any:
    return item


def part_file(out: Path, rank: int, world: int) -> Path:
    """Return where process `rank` of `world` writes its lines."""
    return out.with_name(out.name + (".part" if world == 1 else f".part{rank}of{world}"))


class _Part:
    """The growing file of one process: first line = fingerprint, then one line per answer."""

    def __init__(self, out: Path, rank: int, world: int, fingerprint: str) -> None:
        self.out, self.rank, self.world, self.fingerprint = Path(out), rank, world, fingerprint
        self.path = self._name(rank)
        self.done: set[str] = set()
        self.asks_again = False  # a question whose answer is an error is open again; its later line counts

    def _name(self, rank: int) -> Path:
        return part_file(self.out, rank, self.world)

    def __enter__(self) -> _Part:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._recover()
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def _recover(self) -> None:
        """Keep the whole lines of an interrupted run; a cut last line is taken off."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()  # of bytes: U+2028 in a text ends no line
        if not lines:
            self.path.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", encoding="utf-8")
            return
        if json.loads(lines[0]).get("fingerprint") != self.fingerprint:
            raise GrexError(
                f"{self.path} was begun with another model, split or setting; expected the same, to go on from it; remove it to start anew"
            )
        answered = {found["key"]: found["line"].get("status") for found in map(json.loads, lines[1:])}
        self.done = {key for key, status in answered.items() if not (self.asks_again and status == "error")}
        if len(whole) != len(content):
            os.truncate(self.path, len(whole))

    def write(self, key: str, line: dict[str, Any]) -> None:
        self.file.write(json.dumps({"key": key, "line": line}, ensure_ascii=False) + "\n")
        self.file.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is not None and self.path.read_bytes().count(b"\n") == 1:
            self.path.unlink()  # nothing but the fingerprint: no answer to go on from

    def finish(self, order: Iterable[str]) -> Path:
        """Join the parts of all processes into the finished file (process 0), in one step and in the order of the keys."""
        if self.world > 1:
            self._done(self.rank).touch()
            if self.rank != 0:
                return self.out
            done = [self._done(r) for r in range(self.world)]
            _wait_for(done, "another process did not finish", f"all {self.world} within a day")
        with whole_file(self.out) as work, work.open("w", encoding="utf-8") as joined, ExitStack() as opened:
            parts = [opened.enter_context(self._name(r).open("rb")) for r in range(self.world)]
            places = {key: place for part in parts for key, place in _places(part)}
            for key in order:
                part, offset = places[key]
                part.seek(offset)
                joined.write(json.dumps(json.loads(part.readline())["line"], ensure_ascii=False) + "\n")
        for r in range(self.world):
            self._name(r).unlink()
            self._done(r).unlink(missing_ok=True)
        return self.out

    def _done(self, rank: int) -> Path:
        return self._name(rank).with_name(self._name(rank).name + ".done")


def _wait_for(files: list[Path], given: str, expected: str) -> None:
    start = time.monotonic()
    while not all(file.exists() for file in files):
        if time.monotonic() - start > BARRIER_S:
            raise fault(given, expected, "look at its output, then run again")
        time.sleep(0.2)


def _places(part: BinaryIO) -> Iterator[tuple[str, tuple[BinaryIO, int]]]:
    """Yield key and place (file, byte offset) of every answer of a part file."""
    offset = len(part.readline())
    for line in part:
        yield json.loads(line)["key"], (part, offset)
        offset += len(line)
