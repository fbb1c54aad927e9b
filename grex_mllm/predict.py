"""Model and records -> predictions.jsonl: resumable, and shared out over processes.

Lines are written to `<out>.part` and flushed image by image; an interrupted run goes on from there. The finished file appears under its
own name in one step. Started by `torchrun`, process r of n takes every n-th image and process 0 joins the parts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grex_mllm.ask import pick_device
from grex_mllm.config import Config, load_config, to_dict
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.records import IMAGES
from grex_mllm.data.sources import options_of
from grex_mllm.data.synthetic.export import NUM_SCENES, export_once, is_synthetic
from grex_mllm.data.transforms import instance_mask, selectable_instances
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.answer import check_rules
from grex_mllm.models.describe import Description, describe_encoded
from grex_mllm.models.grex import CONFIG, EncodedImage, GrexModel
from grex_mllm.ops.masks import encode_rle
from grex_mllm.precision import autocast, resolve_precision
from grex_mllm.progress import list_ids, progress_bar
from grex_mllm.types import Geometry, Grounding, Sample

TASKS = ("ground", "generate")
BARRIER_S = 24 * 3600.0
SYNTHETIC = "synthetic"


def predict_split(
    model: str,
    data: str,
    out: Path,
    split: str,
    tasks: list[str],
    image_root: str | None,
    listener: int,
    limit: int | None,
    device: str,
    overrides: list[str],
) -> Path:
    """Predict a split of a dataset folder with a model folder and write `out`.

    data: the folder, or "synthetic": scenes as the model's configuration says, which are written to `synthetic_folder(out)`.
    listener: candidates for the listener-chosen expressions, 0 = greedy only.  limit: only the first images; how many synthetic scenes.

    Raises:
        GrexError: unknown task, model or split; a model without a generator for "generate"; a part file of another model or split; a
            precision or rule of `predict` that does not exist.
    """
    for task in tasks:
        if task not in TASKS:
            raise fault(f'task "{task}"', f"{' or '.join(TASKS)}, or both with a comma", "fix --tasks")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0 and Path(out).exists() and not any(part_file(Path(out), r, world).exists() for r in range(world)):
        raise fault(f"{out} exists", "a new file", "remove it, or choose another --out")
    if limit is not None and limit < 1:
        raise fault(f"--limit {limit}", "at least 1 image", "give another number, or leave it out")
    place = torch.device(pick_device(device))
    if place.index is not None and place.type == "cuda":
        torch.cuda.set_device(place)  # kernels start on the current GPU, wherever their tensors lie
    net = GrexModel.from_pretrained(model, device=str(place))
    if overrides:
        changed = load_config(Path(model) / CONFIG if Path(model).is_dir() else None, overrides)
        data_config = replace(net.config.data, num_workers=changed.data.num_workers, sources=changed.data.sources)
        net.config = replace(net.config, predict=changed.predict, data=data_config)
    check_rules(net.config.predict)
    chosen = resolve_precision(net.config.predict.precision, place)
    if "generate" in tasks and net.generator is None:
        tasks = [t for t in tasks if t != "generate"]
        if not tasks:
            raise fault(f"{model} has no generator", "a model with one for task generate", "use --tasks ground")
    if data == SYNTHETIC:
        data = _synthetic_scenes(net, out, split, image_root, limit, rank)
    source = FolderDataset(data, split, 10**9, num_images=limit, image_root=image_root)
    writer = _Part(out, rank, world, _fingerprint(net, data, split, tasks, listener, limit, chosen.precision))
    mine = range(rank, len(source), world)
    with writer, progress_bar(f"predict {split}") as advance, autocast(chosen.precision, place.type):
        for done, sample in enumerate(_samples(source, mine, net.config.data.num_workers)):
            writer.write(_image_lines(net, sample, tasks, listener, writer.done, is_synthetic(source.dataset.info)))
            advance((done + 1) / len(mine), f"{sample.record.image_id}")
    if rank == 0:
        _tell(net, source, f"predicted {split} in {chosen.precision} on {place} ({chosen.reason})")
    return writer.finish()


def synthetic_folder(out: Path) -> Path:
    """Return where the scenes of predictions on synthetic data are written: runs/x.jsonl -> runs/x.data."""
    return out.with_name(f"{out.stem}.data")


def _synthetic_scenes(net: GrexModel, out: Path, split: str, image_root: str | None, limit: int | None, rank: int) -> str:
    """Write the scenes to predict (process 0; the others wait for them) and return their folder."""
    if image_root is not None:
        raise fault(f"--image-root {image_root} with --data synthetic", "no image root: the scenes are drawn", "leave --image-root out")
    folder = synthetic_folder(out)
    start = time.monotonic()
    while rank != 0 and not folder.exists():
        if time.monotonic() - start > BARRIER_S:
            raise fault(f"no {folder} within a day", "the scenes that process 0 writes there", "look at its output, then run again")
        time.sleep(0.2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_once(options_of(net.config.data, SYNTHETIC), split, limit or NUM_SCENES, folder)
    return str(folder)


def _tell(net: GrexModel, source: FolderDataset, head: str) -> None:
    """Print how the prediction was computed, and which expressions are longer than the model reads."""
    print(head, file=sys.stderr, flush=True)
    records = [record for group in source.groups for record in group]
    most = net.config.model.text.max_tokens
    cut = net.text_tokenizer.too_long([record.raw for record in records], most)
    if cut:
        what = f"expressions of more than model.text.max_tokens = {most} tokens were cut there"
        print(list_ids(what, [records[i].expression_id for i in cut]), file=sys.stderr, flush=True)


def _samples(source: FolderDataset, positions: range, num_workers: int) -> Iterator[Sample]:
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

    def __init__(self, source: FolderDataset, positions: range) -> None:
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


def _image_lines(
    net: GrexModel, sample: Sample, tasks: list[str], listener: int, done: set[str], judged: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, line) of what is not done yet for one image. judged: the synthetic grammar judges the generated expressions.

    All expressions go through the same chunks, done or not, so that a resumed run gives the same numbers.
    """
    wanted = [e for e in sample.expressions if e.expression_id not in done] if "ground" in tasks else []
    sets = object_sets(sample) if "generate" in tasks else []
    sets = [s for s in sets if _set_key(sample, s) not in done]
    if not wanted and not sets:
        return
    masks = object_masks(sample) if sets else None  # first: a fault in it comes before any line of the image
    encoded = net.encode(sample.image)
    if wanted:
        chunk = net.config.predict.batch
        for start in range(0, len(sample.expressions), chunk):
            part = sample.expressions[start : start + chunk]
            if all(e.expression_id in done for e in part):
                continue
            for record, result in zip(part, net.ground(encoded, [e.raw for e in part], chunk), strict=True):
                if record.expression_id not in done:
                    yield record.expression_id, {"expression_id": record.expression_id, **grounding_line(result, net.config.predict.masks)}
    if masks is not None:
        for targets, line in zip(sets, describe_lines(net, sample, encoded, masks, sets, listener), strict=True):
            if judged:
                _judge(line, sample, targets)
            yield _set_key(sample, targets), line


def grounding_line(result: Grounding, masks: bool = True) -> dict[str, Any]:
    """Return the fields of a prediction line (`eval/README.md`).

    `no_target` is what the head alone says, which the official protocol reads.  masks: false leaves them out, so that they are not scored.
    """
    line: dict[str, Any] = {"mask_rle": encode_rle(result.mask)} if masks else {}
    line |= {
        "boxes_xyxy": np.round(result.boxes_xyxy.astype(np.float64), 3).tolist(),
        "box_scores": np.round(result.box_scores.astype(np.float64), 5).tolist(),
        "count": result.count,
        "no_target_prob": round(result.no_target_prob, 6),
        "no_target": result.head_no_target,
        "status": "ok",
    }
    if masks and result.mask_input is not None:
        line["mask_rle_input"] = encode_rle(result.mask_input)
    if result.minimap is not None:
        line["minimap"] = np.round(result.minimap.astype(np.float64), 2).tolist()
    return line


def object_sets(sample: Sample) -> list[tuple[str, ...]]:
    """Return the distinct object sets that the expressions of an image refer to, in order; annotation ids sorted."""
    return list(dict.fromkeys(tuple(sorted(e.targets)) for e in sample.expressions if e.targets))


def object_masks(sample: Sample) -> np.ndarray:
    """Return bool [N, H0, W0]: the masks of the selectable instances of an image.

    Raises:
        GrexError: a segmentation of another size than the image, or a malformed one; names the image and the annotation.
    """
    record, masks = sample.record, []
    whole = Geometry(record.height, record.width, record.height, record.width)
    for instance in selectable_instances(record):
        try:
            masks.append(instance_mask(instance, whole))
        except GrexError as error:
            place = f"{IMAGES}, image {record.image_id}, annotation {instance.annotation_id}, field segmentation"
            raise GrexError(f"{place}: {error}") from None
    return np.stack(masks)


def describe_lines(
    net: GrexModel, sample: Sample, encoded: EncodedImage, masks: np.ndarray, sets: list[tuple[str, ...]], listener: int
) -> list[dict[str, Any]]:
    """Describe object sets greedily and, with `listener` > 0, also by choosing among that many candidates; ground what was written.

    masks: bool [N, H0, W0], as `object_masks` returns them.
    """
    instances = selectable_instances(sample.record)
    place = {instance.annotation_id: n for n, instance in enumerate(instances)}
    positions = [[place[t] for t in targets] for targets in sets]
    greedy = describe_encoded(net, encoded, masks, positions, "greedy", 1, None)
    reranked: list[Description | None] = [None] * len(sets)
    if listener:
        texts = [answer.expression for answer in greedy]
        reranked = list(describe_encoded(net, encoded, masks, positions, "sample", listener, "listener", greedy=texts))
    lines = []
    for targets, first, best in zip(sets, greedy, reranked, strict=True):
        line: dict[str, Any] = {
            "image_id": sample.record.image_id,
            "targets": list(targets),
            **_with_round_trip(net, encoded, first),
        }
        if best is not None:
            line["listener"] = {"score": round(best.score or 0.0, 5), **_with_round_trip(net, encoded, best)}
            line["candidates"] = [t for t, _ in best.candidates]
        lines.append(line)
    return lines


def _with_round_trip(net: GrexModel, encoded: EncodedImage, description: Description) -> dict[str, Any]:
    text = description.expression
    line: dict[str, Any] = {"expression": text, "status": "ok" if text.strip() else "unparsable"}
    if text.strip():
        result = net.ground(encoded, text[:1000])
        found = grounding_line(result, net.config.predict.masks)
        line["round_trip"] = {k: v for k, v in found.items() if k in ("mask_rle", "boxes_xyxy", "box_scores", "no_target")}
    return line


def _judge(line: dict[str, Any], sample: Sample, targets: tuple[str, ...]) -> None:
    """Add what the synthetic grammar makes of the greedy expression and of the listener's choice."""
    from grex_mllm.data.synthetic import check_expression

    for answer in (line, line["listener"]) if "listener" in line else (line,):
        answer["judgement"] = check_expression(answer["expression"], sample, list(targets))


def _set_key(sample: Sample, targets: tuple[str, ...]) -> str:
    return f"set:{sample.record.image_id}:{','.join(targets)}"


def _fingerprint(net: GrexModel, data: str, split: str, tasks: list[str], listener: int, limit: int | None, precision: str) -> str:
    weights = hashlib.sha256()
    for name, value in net.saved_state().items():
        weights.update(name.encode())
        weights.update(value.flatten()[:64].float().numpy().tobytes())
    settings: Config = net.config
    text = json.dumps([weights.hexdigest(), str(data), split, tasks, listener, limit, precision, to_dict(settings.predict)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def part_file(out: Path, rank: int, world: int) -> Path:
    """Return where process `rank` of `world` writes its lines."""
    return out.with_name(out.name + (".part" if world == 1 else f".part{rank}of{world}"))


class _Part:
    """The growing file of one process: first line = fingerprint, then one line per answer."""

    def __init__(self, out: Path, rank: int, world: int, fingerprint: str) -> None:
        self.out, self.rank, self.world, self.fingerprint = Path(out), rank, world, fingerprint
        self.path = self._name(rank)
        self.done: set[str] = set()

    def _name(self, rank: int) -> Path:
        return part_file(self.out, rank, self.world)

    def __enter__(self) -> _Part:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._recover()
        else:
            self.path.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def _recover(self) -> None:
        """Keep the whole lines of an interrupted run; a cut last line is taken off."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8").splitlines()
        if not lines:
            self.path.write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n", encoding="utf-8")
            return
        if json.loads(lines[0]).get("fingerprint") != self.fingerprint:
            raise GrexError(
                f"{self.path} was begun with another model, split or setting; expected the same, to go on from it; remove it to start anew"
            )
        self.done = {json.loads(line)["key"] for line in lines[1:]}
        if len(whole) != len(content):
            os.truncate(self.path, len(whole))

    def write(self, lines: Iterator[tuple[str, dict[str, Any]]]) -> None:
        for key, line in lines:
            self.file.write(json.dumps({"key": key, "line": line}, ensure_ascii=False) + "\n")
        self.file.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is not None and self.path.read_bytes().count(b"\n") == 1:
            self.path.unlink()  # nothing but the fingerprint: no answer to go on from

    def finish(self) -> Path:
        """Join the parts of all processes into the finished file (process 0), in one step."""
        marker = self.path.with_name(self.path.name + ".done")
        if self.world > 1:
            marker.touch()
            if self.rank != 0:
                return self.out
            self._wait()
        work = self.out.with_name(self.out.name + ".joining")
        with work.open("w", encoding="utf-8") as joined:
            for r in range(self.world):
                with self._name(r).open(encoding="utf-8") as part:
                    next(part)
                    for line in part:
                        joined.write(json.dumps(json.loads(line)["line"], ensure_ascii=False) + "\n")
            joined.flush()
            os.fsync(joined.fileno())
        os.replace(work, self.out)
        for r in range(self.world):
            self._name(r).unlink()
            if self.world > 1:
                self._name(r).with_name(self._name(r).name + ".done").unlink()
        return self.out

    def _wait(self) -> None:
        start = time.monotonic()
        while not all(self._name(r).with_name(self._name(r).name + ".done").exists() for r in range(self.world)):
            if time.monotonic() - start > BARRIER_S:
                raise fault("another process did not finish", f"all {self.world} within a day", "look at its output, then run again")
            time.sleep(0.2)
