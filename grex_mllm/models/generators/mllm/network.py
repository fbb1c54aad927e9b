"""The generator: an image and selected objects in, one expression for the whole set out, by a multimodal language model with LoRA.

The model sees the image through its own encoder, and the selected objects as tokens in its sequence ([others] [selected] [summary of the
set], as `region_tokens` makes them), as marks on the picture or as coordinates in the text. The question is a chat in the model's own
template, and the loss is on the answer alone. The image is encoded once for all of its object sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.compat import cache_of
from grex_mllm.data.transforms import input_masks
from grex_mllm.errors import fault
from grex_mllm.models.generators.mllm.adapters import adapted_layers
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.models.generators.mllm.instructions import INSTRUCTION
from grex_mllm.models.generators.mllm.parts import MllmPart, Questions, SetOf, questions_of
from grex_mllm.models.generators.mllm.pooling import pool_objects
from grex_mllm.models.generators.region_tokens.sets import membership, positions_of
from grex_mllm.models.generators.region_tokens.tokens import ObjectTokens, RegionTokens
from grex_mllm.models.language_model import embedding_scale, embedding_shape, freeze_base, leave_out_named_base, with_lora
from grex_mllm.models.lm_decoding import check_mode, draw, stratified_uniforms
from grex_mllm.models.lm_packing import rows_alone
from grex_mllm.models.lm_shapes import shape_of, weights_are_left_out
from grex_mllm.models.multimodal.chat import Chat
from grex_mllm.models.multimodal.decoding import beam_search, positions
from grex_mllm.models.multimodal.features import PictureFeatures, check_features, embedded, encode, features_input
from grex_mllm.models.multimodal.loading import load_multimodal
from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch


class MllmGenerator(nn.Module):
    """Describe sets of objects with a frozen multimodal model, LoRA adapters and, for `objects: tokens`, trainable object tokens.

    feature_channels: channels of the grounding model's maps.  The checkpoint holds no weight of the model that `lm` names; it is read
    again.
    """

    def __init__(self, cfg: MllmConfig, feature_channels: list[int], tokenizer: Chat) -> None:
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        model = shape_of(cfg) if weights_are_left_out() else load_multimodal(cfg)
        check_features(model)
        freeze_base(model, cfg, len(tokenizer.tokenizer))
        self.lm = with_lora(model, cfg, adapted_layers(model, cfg)) if cfg.lora_rank else model
        num_embeddings, width = embedding_shape(self.lm)
        self.region_tokens: RegionTokens | None = None
        if cfg.objects == "tokens":
            self.region_tokens = RegionTokens(
                feature_channels if cfg.maps == "grounding" else [width],
                width,
                hidden=cfg.projector_width,
                image_grid=0,
                max_distractors=cfg.max_distractors if cfg.distractors else 0,
                shape_side=cfg.shape_side,
                context_layers=cfg.context_layers,
                distractor_dropout=cfg.distractor_dropout,
                token_scale=embedding_scale(self.lm),
            )
        if self.region_tokens is None and not cfg.lora_rank:
            raise fault("a generator that learns nothing (lora_rank 0)", "adapters, or objects: tokens", "raise lora_rank")
        nameless = range(len(tokenizer.tokenizer), num_embeddings)  # embeddings that stand for no text
        self.banned = sorted({*tokenizer.unwritable, *nameless})
        leave_out_named_base(self)

    @property
    def base(self) -> Any:
        """The multimodal model itself, with the adapters in its layers."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def wording(self) -> str:
        """The text of the instruction's file."""
        return self.tokenizer.extras.get(INSTRUCTION, "")

    @property
    def projector(self) -> RegionTokens | None:
        """What `train.tasks: align` trains alone; None where objects are no tokens."""
        return self.region_tokens

    def forward(self, features: list[Tensor], batch: Batch, early: bool = False) -> dict[str, Tensor]:
        """Return the loss terms of a batch: lm (mean over the tokens), and total.

        features: float [B, C_i, h_i, w_i] of the grounding model.  batch: its `generation` is what `collate` made.  early: nothing is
        learned; one row is read for nothing, so that every weight takes part in every step.
        """
        part: MllmPart = batch.generation
        if early:
            one = slice(0, 1)
            part = part._replace(
                questions=part.questions.rows(one), answers=part.answers[one], answer_mask=part.answer_mask[one],
                image_index=part.image_index[one], target_index=part.target_index[:1], weight=torch.zeros_like(part.weight[one]),
            )  # fmt: skip
        nll, nothing = self.losses(features, batch, part)
        num_tokens = part.answer_mask.sum(1)
        loss = (nll.sum(1) * part.weight).sum() / shared_count((num_tokens * part.weight).sum(), nll) + nothing
        return {"total": loss} if early else {"lm": loss, "total": loss}

    def losses(self, features: list[Tensor], batch: Batch, part: MllmPart) -> tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of each token of the answers, float [G, T], 0 behind their ends; and zero with a gradient.

        Zero comes from everything that may have had no part in it: another generation task, an empty object set.
        """
        values, places = None, part.questions.spaces
        seen = encode(self.base, part.questions.tensors)
        nothing = sum(
            (feature.float().sum() * 0.0 for feature in features if feature.requires_grad), start=torch.zeros(()).to(places.device)
        )
        if self.region_tokens is not None:
            sizes = part.image_index.new_tensor(batch.input_sizes)
            objects = self._objects(features, seen, part.questions, batch.instance_masks, sizes, batch.instance_boxes_norm)
            numbers = [len(m) for m in batch.instance_masks]
            values, filled = self._set_tokens(objects, numbers, part.image_index, part.target_index, part.weight, places)
            nothing = nothing + values.float().sum() * 0.0 + objects.tokens.float().sum() * 0.0
            places = filled
        return self.answer_losses(part.questions, seen, places, values, part.answers, part.answer_mask), nothing

    def answer_losses(
        self, questions: Questions, seen: PictureFeatures, places: Tensor, values: Tensor | None, answers: Tensor, real: Tensor
    ) -> Tensor:
        """Return the negative log-likelihood of each token of G answers, float [G, T]; 0 where `real` is 0."""
        length, real = answers.shape[1], real.bool()
        ids, mask = torch.cat([questions.ids, answers], 1), torch.cat([self._read(questions, places), real.long()], 1)
        predicting = torch.zeros_like(mask, dtype=torch.bool)
        predicting[:, -length - 1 : -1] = real
        places = F.pad(places, (0, length))
        with rows_alone(self.lm.get_output_embeddings(), predicting.flatten().nonzero()[:, 0]):
            logits = self._forward(questions, seen, ids, mask, places, values, use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.new_zeros(real.shape).masked_scatter(real, F.cross_entropy(logits, answers[real], reduction="none"))

    def generate(
        self,
        features: list[Tensor],
        encoded: Any,
        masks: np.ndarray,
        sets: list[list[int]],
        beside: list[list[int]] | None = None,
        *,
        mode: str = "greedy",
        num_candidates: int = 1,
        num_beams: int = 4,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> list[list[str]]:
        """Return `num_candidates` expressions for each object set of one image (greedy: one).

        features: maps of the grounding model, float [1, C_i, h_i, w_i].  encoded: `EncodedImage`.  masks: bool [N, H0, W0], every object
        that is known.  sets: positions in masks.  beside: positions of those that may stand beside each set (None: all others).
        mode: greedy | beam (best first) | sample (the same seed gives the same answers, whatever else is in the batch).

        Raises:
            GrexError: an empty set, an unknown mode, fewer than one candidate, temperature not above 0.
        """
        check_mode(mode, num_candidates, temperature)
        steps = self.cfg.max_new_tokens if max_new_tokens is None else max_new_tokens
        copies = max(num_beams, num_candidates) if mode == "beam" else num_candidates
        uniforms = stratified_uniforms(num_candidates, steps, seed) if mode == "sample" else None
        answers: list[list[str]] = []
        with self._evaluated():
            for part in _chunks(len(sets), max(1, self.cfg.max_rows // copies)):
                chosen, others = sets[part], None if beside is None else beside[part]
                questions, seen, places, values = self._asked(features, encoded, masks, chosen, others)
                mask = self._read(questions, places)
                self._check_length(int(mask.sum(1).max()) + steps)
                out = self._forward(questions, seen, questions.ids, mask, places, values, use_cache=True, logits_to_keep=1)
                given = (self.base, cache_of(out), out.logits[:, -1], mask)
                deltas, end = getattr(self.base.model, "rope_deltas", None), self.tokenizer.ends[0]
                if mode == "beam":
                    tokens = beam_search(
                        *given, end=end, banned=self.banned, steps=steps, num_beams=copies, num_candidates=num_candidates, deltas=deltas
                    )
                else:
                    tokens = draw(*given, end, self.banned, steps, uniforms, temperature, deltas)
                answers += [[self.tokenizer.decode(row) for row in rows] for rows in tokens.tolist()]
        return answers

    def log_likelihoods(self, features: list[Tensor], encoded: Any, masks: np.ndarray, sets: list[list[int]], texts: list[str]) -> Tensor:
        """Return float [G]: the log-likelihood of each text, with its end, as the answer for the set at its place.

        sets, and what stands before them, as in `generate`.
        """
        found = []
        with self._evaluated():
            for part in _chunks(len(sets), self.cfg.max_rows):
                questions, seen, places, values = self._asked(features, encoded, masks, sets[part], None)
                rows = [[*self.tokenizer.answer_ids(text), self.tokenizer.ends[0]] for text in texts[part]]
                answers = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(places.device)
                lengths = torch.tensor([len(row) for row in rows], device=places.device)
                real = torch.arange(answers.shape[1], device=places.device) < lengths[:, None]
                found.append(-self.answer_losses(questions, seen, places, values, answers, real).sum(1))
        return torch.cat(found)

    def agreements(
        self, features: list[Tensor], encoded: Any, masks: np.ndarray, sets: list[list[int]], texts: list[list[str]]
    ) -> list[list[float]]:
        """Return, for each text of each set, how well it tells that set from others: a probability in (0, 1).

        The model's own likelihood of the text given the set, against that given every set that differs in one object, and every other
        single object, all equally likely before. Arguments as in `generate`.
        """
        found = []
        for chosen, options in zip(sets, texts, strict=True):
            rivals = rival_sets(chosen, len(masks))
            pairs = [(some, text) for text in options for some in [chosen, *rivals]]
            values = self.log_likelihoods(features, encoded, masks, [some for some, _ in pairs], [text for _, text in pairs])
            found.append(values.view(len(options), -1).double().softmax(1)[:, 0].tolist())
        return found

    def _asked(
        self, features: list[Tensor], encoded: Any, masks: np.ndarray, sets: list[list[int]], beside: list[list[int]] | None
    ) -> tuple[Questions, PictureFeatures, Tensor, Tensor | None]:
        """Return the questions about object sets of one image, the features of their pictures, and their object tokens with the places."""
        device, geometry = features[0].device, encoded.geometry
        for n, chosen in enumerate(sets):
            if not chosen:
                raise fault(f"object set {n} is empty", "at least one object", "leave no-target samples out of generation")
        drawn = self.cfg.objects != "tokens" or self.cfg.crops > 0
        wanted = [
            SetOf(
                0, [masks[m] for m in chosen] if drawn else [], len(chosen), len(masks) - len(chosen) if beside is None else len(beside[n])
            )
            for n, chosen in enumerate(sets)
        ]
        questions = on_device(questions_of(self.cfg, self.tokenizer, [encoded.original], wanted), device)
        seen = encode(self.base, questions.tensors)
        if self.region_tokens is None:
            return questions, seen, questions.spaces, None
        at_input = input_masks(masks, geometry, encoded.features.input_size).to(device)
        size = torch.tensor([[geometry.input_height, geometry.input_width]], device=device)
        objects = self._objects(features, seen, questions, [at_input], size, None)
        index = torch.zeros(len(sets), dtype=torch.int64, device=device)
        targets = [torch.tensor(chosen, device=device) for chosen in sets]
        others = None if beside is None else [torch.tensor(b, dtype=torch.int64, device=device) for b in beside]
        values, places = self._set_tokens(objects, [len(masks)], index, targets, None, questions.spaces, others)
        return questions, seen, places, values

    def _objects(
        self, features: list[Tensor], seen: PictureFeatures, questions: Questions, masks: list[Tensor], sizes: Tensor, boxes: Any
    ) -> ObjectTokens:
        """Return the tokens of all objects of the images. sizes: int64 [B, 2], height and width of each without padding."""
        assert self.region_tokens is not None
        if self.cfg.maps == "grounding":
            return self.region_tokens(features, masks, sizes, boxes)
        own = questions.own_group.tolist()
        starts, lengths = self._group_tokens(questions)
        tokens = [seen.tokens[starts[g] : starts[g] + lengths[g]] for g in own]
        layouts = [self.tokenizer.layout(int(w), int(h)) for w, h in questions.sizes.tolist()]
        return pool_objects(self.region_tokens, tokens, layouts, masks, [(int(h), int(w)) for h, w in sizes.tolist()])

    def _set_tokens(
        self,
        objects: ObjectTokens,
        num_objects: list[int],
        image_index: Tensor,
        target_index: list[Tensor],
        weight: Tensor | None,
        spaces: Tensor,
        beside: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens of all object sets, float [n, D], one set after the other, and bool [G, L], which spaces they fill."""
        assert self.region_tokens is not None
        member = membership(image_index, target_index, objects.present, num_objects, weight)
        others = None if beside is None else positions_of(beside, member)
        tokens, mask, summary, _ = self.region_tokens.select(objects, image_index, member, others)
        tokens, mask = torch.cat([tokens, summary[:, None]], 1), F.pad(mask, (0, 1), value=True)
        room, number = spaces.sum(1, keepdim=True), mask.sum(1, keepdim=True)
        place = spaces.long().cumsum(1)  # from 1
        filled = spaces & (place > room - number)  # the last ones, next to what follows
        return tokens[mask], filled

    def _forward(
        self, questions: Questions, seen: PictureFeatures, ids: Tensor, mask: Tensor, places: Tensor, values: Tensor | None, **options: Any
    ) -> Any:
        """Run the model on questions, with or without answers behind them. places: bool [G, S], filled with `values`."""
        base, family = self.base, self.tokenizer.family
        starts, lengths = self._group_tokens(questions)
        groups = questions.group.tolist()
        index = torch.cat([torch.arange(starts[g], starts[g] + lengths[g], device=ids.device) for g in groups])
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **positions(base, mask), **features_input(seen, index)}
        if family.token_types:
            given[family.token_types] = (ids == family.image_id).long() * mask
        if "image_grid_thw" in questions.tensors:
            of_group = questions.tensors["image_grid_thw"].split(questions.number.tolist())
            given["image_grid_thw"] = torch.cat([of_group[g] for g in groups])
        if values is None:
            return base(**given, **options)
        with embedded(base, places, values):
            return base(**given, **options)

    @staticmethod
    def _group_tokens(questions: Questions) -> tuple[list[int], list[int]]:
        """Return where the image tokens of each group begin among all, and how many there are."""
        lengths: list[int] = questions.tokens.tolist()
        return [0, *accumulate(lengths)][:-1], lengths

    @staticmethod
    def _read(questions: Questions, places: Tensor) -> Tensor:
        """Return int64 [G, L], what is read of the questions: no padding, and no space that no token fills."""
        return questions.mask * (~questions.spaces | places)

    def _check_length(self, length: int) -> None:
        limit = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise fault(
                f"a sequence of {length} tokens (pictures, objects and expression)",
                f"at most the language model's {limit} positions",
                "lower max_pixels, max_tiles, crops, max_distractors or max_new_tokens",
            )

    @contextmanager
    def without_adapters(self) -> Iterator[Any]:
        """Give the multimodal model as its makers trained it: adapters off, nothing learned."""
        with self._evaluated(), self.lm.disable_adapter() if self.cfg.lora_rank else nullcontext():
            yield self.base

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)


def rival_sets(chosen: list[int], number: int) -> list[list[int]]:
    """Return the sets of `number` objects with which a set is confused most easily: one object more, one less, another single one."""
    others = [n for n in range(number) if n not in chosen]
    more = [[*chosen, n] for n in others]
    less = [[n for n in chosen if n != left] for left in chosen] if len(chosen) > 1 else []
    single = [[n] for n in others]
    return list({tuple(sorted(some)): some for some in [*more, *less, *single]}.values())


def on_device(questions: Questions, device: torch.device) -> Questions:
    """Return the questions with all tensors on a device."""
    moved: list[Any] = [{k: v.to(device) for k, v in part.items()} if isinstance(part, dict) else part.to(device) for part in questions]
    return Questions(*moved)


def _chunks(number: int, size: int) -> Iterator[slice]:
    for start in range(0, number, size):
        yield slice(start, start + size)
