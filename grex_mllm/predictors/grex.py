"""`GrexModel` as a predictor: an image is encoded once for all that is asked about it, and expressions are answered in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grex_mllm.config import load_config, to_dict
from grex_mllm.data.transforms import input_masks
from grex_mllm.errors import fault
from grex_mllm.models.answer import EncodedImage, check_rules
from grex_mllm.models.describe import Description, check_reranker, describe_among_found, describe_encoded
from grex_mllm.models.grex import CONFIG, MAX_EXPRESSION_CHARACTERS, GrexModel
from grex_mllm.precision import autocast, pick_device, resolve_precision
from grex_mllm.predictors.lines import round_trip_fields
from grex_mllm.predictors.protocol import Abilities, Answer, Item, ObjectSet, Options, set_key
from grex_mllm.progress import list_ids
from grex_mllm.types import ExpressionRecord


class GrexPredictor:
    """A trained model on a device, in one precision.

    Raises:
        GrexError: no such model or device; a precision or rule of `predict` that does not exist.
    """

    def __init__(self, name: str, options: Options) -> None:
        place = torch.device(pick_device(options.device))
        if place.index is not None and place.type == "cuda":
            torch.cuda.set_device(place)  # kernels start on the current GPU, wherever their tensors lie
        changed, precision = None, options.precision
        if options.overrides:
            changed = load_config(Path(name) / CONFIG if Path(name).is_dir() else None, options.overrides, trusted=False)
            precision = precision or changed.predict.precision
        computed = None if precision is None else resolve_precision(precision, place).precision
        self.net, self.listener = GrexModel.from_pretrained(name, device=str(place), precision=computed), options.listener
        config = self.net.config
        if changed is not None:
            data = replace(config.data, num_workers=changed.data.num_workers, sources=changed.data.sources)
            config = replace(config, predict=changed.predict, data=data)
        given: dict[str, Any] = {"precision": options.precision, "no_target_threshold": options.threshold}
        self.rules = replace(config.predict, **{key: value for key, value in given.items() if value is not None})
        config = self.net.config = replace(config, predict=self.rules)
        check_rules(self.rules)
        if self.net.generator is not None:
            check_reranker(self.net, self.rules.rerank)
        self.chosen = resolve_precision(self.rules.precision, place)
        tasks = ("ground",) if self.net.generator is None else ("ground", "generate")
        how = f"in {self.chosen.precision} on {place} ({self.chosen.reason})"
        self._check_oracle()
        truth = "" if self.rules.oracle == "none" else "targets"
        self.can = Abilities(tasks, truth, how, config.data.num_workers, config, self._remarks)
        self.speech = options.speech
        self._last: tuple[Item, EncodedImage] | None = None

    def fingerprint(self) -> str:
        """Return a hash of weights, rules, precision, listener and the wording of the generator's instruction."""
        weights = hashlib.sha256()
        for name, value in self.net.saved_state().items():
            weights.update(name.encode())
            weights.update(value.flatten()[:64].float().numpy().tobytes())
        settings = [weights.hexdigest(), self.listener, self.chosen.precision, to_dict(self.rules)]
        settings += [wording] if (wording := getattr(self.net.generator, "wording", "")) else []
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def ground(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Answer the expressions of one image after another.

        All expressions go through the same batches, done or not, so that a resumed run gives the same numbers.
        """
        size = self.rules.batch
        for item in items:
            for start in range(0, len(item.expressions), size):
                part = item.expressions[start : start + size]
                if all(e.expression_id in item.done for e in part):
                    continue
                with autocast(self.chosen.precision, self.net.device.type), self._given(item, part):
                    results = self.net.ground(self._encoded(item), [e.raw for e in part], size)
                for record, result in zip(part, results, strict=True):
                    if record.expression_id not in item.done:
                        yield Answer(record.expression_id, result, masks=self.rules.masks)

    def describe(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Describe the object sets of one image after another."""
        for item in items:
            if not item.complete:
                yield from (_described(self.net, item, targets, self.speech) for targets in item.open_sets)
            elif item.open_sets:
                with autocast(self.chosen.precision, self.net.device.type):
                    answers = describe_sets(self.net, item, self._encoded(item), item.open_sets, self.listener)
                yield from answers

    def _check_oracle(self) -> None:
        kind, decoder = self.rules.oracle, self.net.grounding.decoder
        known = ("none", *getattr(decoder, "oracles", ()))
        if kind not in known:
            name = self.net.config.model.decoder.name
            raise fault(f"predict.oracle is {kind} with model.decoder.name {name}", " or ".join(known), "change one of them")
        if kind != "none" and self.net.grounding.fuses_language:
            raise fault(f"predict.oracle is {kind} with an image encoder that reads language", "one without fusion", "set it to none")

    @contextmanager
    def _given(self, item: Item, part: list[ExpressionRecord]) -> Iterator[None]:
        """Give the decoder the ground truth of these expressions where `predict.oracle` asks for it."""
        if self.rules.oracle == "none":
            yield
            return
        encoded, place = self._encoded(item), {instance.annotation_id: n for n, instance in enumerate(item.instances)}
        masks = input_masks(item.masks, encoded.geometry, encoded.canvas).to(self.net.device)
        targets = [torch.tensor([place[target] for target in record.targets], dtype=torch.int64) for record in part]
        with self.net.grounding.decoder.given(self.rules.oracle, masks, targets):
            yield

    def _encoded(self, item: Item) -> EncodedImage:
        """Encode the image of an item; both tasks ask for the same one in turn, so the last one is kept."""
        if self._last is None or self._last[0] is not item:
            self._last = item, self.net.encode(item.image)
        return self._last[1]

    def _remarks(self, records: list[ExpressionRecord]) -> list[str]:
        """Tell which expressions are longer than the model reads."""
        most = self.net.config.model.text.max_tokens
        cut = self.net.text_tokenizer.too_long([record.raw for record in records], most)
        what = f"expressions of more than model.text.max_tokens = {most} tokens were cut there"
        return [list_ids(what, [records[i].expression_id for i in cut])] if cut else []


def describe_sets(net: GrexModel, item: Item, encoded: EncodedImage, sets: list[ObjectSet], listener: int) -> list[Answer]:
    """Describe object sets greedily and, with `listener` > 0, also by choosing among that many candidates; ground what was written."""
    place = {instance.annotation_id: n for n, instance in enumerate(item.instances)}
    positions = [[place[t] for t in targets] for targets in sets]
    greedy = describe_encoded(net, encoded, item.masks, positions, mode="greedy", candidates=1, rerank=None)
    reranked: list[Description | None] = [None] * len(sets)
    if listener:
        texts, rerank = [answer.expression for answer in greedy], net.config.predict.rerank
        reranked = list(
            describe_encoded(net, encoded, item.masks, positions, mode="sample", candidates=listener, rerank=rerank, greedy=texts)
        )
    among_found: Sequence[str | None] = describe_among_found(net, encoded, item.masks, positions) or [None] * len(sets)
    written = [answer.expression for answer in (*greedy, *reranked) if answer is not None]
    said = _said(net, encoded, [*written, *(text for text in among_found if text is not None)])
    answers = []
    for targets, first, best, other in zip(sets, greedy, reranked, among_found, strict=True):
        fields = dict(said[first.expression])
        if other is not None:
            fields["among_found"] = said[other]
        if best is not None:
            fields["listener"] = {"score": round(best.score or 0.0, 5), **said[best.expression]}
            fields["candidates"] = [text for text, _ in best.candidates]
            fields |= {"listener_costs": best.costs} if best.costs else {}
        answers.append(Answer(set_key(item.record.image_id, targets), expression=first.expression, status=fields["status"], fields=fields))
    return answers


def _described(net: GrexModel, item: Item, targets: ObjectSet, speech: dict[str, Any]) -> Answer:
    """Describe objects that a user pointed at; the model finds the others itself."""
    chosen = [instance for instance in item.instances if instance.annotation_id in targets]
    boxes = [instance.box_xyxy for instance in chosen if instance.mask is None]
    result = net.describe(item.image, boxes_xyxy=boxes or None, masks=None if boxes else [i.mask for i in chosen], details=True, **speech)
    fields = {"score": result.score, "candidates": result.candidates, "costs": result.costs}
    return Answer(set_key(item.record.image_id, targets), expression=result.expression, fields=fields)


def _said(net: GrexModel, encoded: EncodedImage, texts: list[str]) -> dict[str, dict[str, Any]]:
    """Return generated expressions of an image, each once, with their status and, where they say anything, their grounding."""
    rules, different = net.config.predict, list(dict.fromkeys(texts))
    asked = [text for text in different if text.strip()]
    results = net.ground(encoded, [text[:MAX_EXPRESSION_CHARACTERS] for text in asked], rules.batch) if asked else []
    found = {text: round_trip_fields(Answer("", result, masks=rules.masks)) for text, result in zip(asked, results, strict=True)}
    silent = {"status": "unparsable"}
    return {text: {"expression": text, **({"status": "ok", "round_trip": found[text]} if text in found else silent)} for text in different}


def build(argument: str, options: Options) -> GrexPredictor:
    """Return the predictor of a model folder or hub id."""
    return GrexPredictor(argument, options)
