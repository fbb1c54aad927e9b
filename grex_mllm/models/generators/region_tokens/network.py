"""The generator: feature maps and selected objects in, one expression for the whole set out (group-expression generation, GREG).

Sequence: [text before] [image tokens] [distractors] [targets, left to right] [text after] opener expression EOS, with the set's summary
added to the opener: BOS for `lm: tiny`, for other LLMs what `lm_framing` finds (their BOS stands before everything). Padding lies between
the targets and what follows, is masked, and gets no position, so a batch gives what its members give alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.compat import adapters_folded_once
from grex_mllm.data.transforms import input_masks
from grex_mllm.errors import fault
from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig
from grex_mllm.models.generators.region_tokens.crops import Crops
from grex_mllm.models.generators.region_tokens.found import among_found
from grex_mllm.models.generators.region_tokens.parts import GenerationPart
from grex_mllm.models.generators.region_tokens.sets import membership, positions_of, some_as_boxes
from grex_mllm.models.generators.region_tokens.tokens import ObjectTokens, RegionTokens
from grex_mllm.models.generators.region_tokens.words import check_words, with_words, word_loss
from grex_mllm.models.language_model import (
    base_parameters,
    build_language_model,
    embedding_scale,
    embedding_shape,
    embedding_weight,
    leave_out_named_base,
)
from grex_mllm.models.lm_decoding import Prefix, beam_search, check_mode, decode, stratified_uniforms
from grex_mllm.models.lm_framing import PLACE, Frame, chat_frame, plain_frame, tiny_frame
from grex_mllm.models.lm_loss import token_losses
from grex_mllm.models.lm_packing import Shared
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.models.word_bags import WordList
from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch, Proposals

IGNORED = -100


@dataclass
class GeneratorOutput:
    """loss: float [], mean negative log-likelihood of a token.  log_likelihood: float [E], sum over the tokens of each expression with its
    EOS.  num_tokens: int64 [E].  objects: all those of the images."""

    loss: Tensor
    log_likelihood: Tensor
    num_tokens: Tensor
    objects: ObjectTokens


class RegionTokenGenerator(nn.Module):
    """Describe sets of objects with a frozen causal LM, LoRA adapters and trainable region tokens.

    feature_channels: channels of the feature maps that `forward` gets.  The checkpoint holds the base LM only for `lm: tiny`; other LLMs
    are named in the configuration and read again.
    """

    def __init__(self, cfg: RegionTokensConfig, feature_channels: list[int], tokenizer: LMTokenizer) -> None:
        super().__init__()
        if cfg.prompt and cfg.prompt.count(PLACE) != 1:
            raise fault(f"model.generator.prompt {cfg.prompt!r}", f"{PLACE} once, where the region tokens stand", "fix the prompt")
        self.cfg, self.tokenizer, self.feature_channels = cfg, tokenizer.in_style(cfg.prompt_style), list(feature_channels)
        self.frame = _frame(cfg, self.tokenizer)
        self.lm = build_language_model(cfg, self.tokenizer)
        check_words(cfg, self.lm)
        self.words = WordList(cfg.words) if cfg.words else None
        num_embeddings, width = embedding_shape(self.lm)
        self.crops = Crops(cfg.crops) if cfg.crops.size else None
        self.region_tokens = RegionTokens(
            feature_channels,
            width,
            hidden=cfg.projector_width,
            image_grid=cfg.image_grid,
            max_distractors=cfg.max_distractors if cfg.distractors else 0,
            shape_side=cfg.shape_side,
            context_layers=cfg.context_layers,
            attribute_classes=cfg.attribute_classes,
            distractor_dropout=cfg.distractor_dropout,
            token_scale=embedding_scale(self.lm),
            words=cfg.words,
            ranks=cfg.ranks,
            closer=self.crops.channels if self.crops is not None else (),
        )
        self.reads_proposals = cfg.found_share > 0
        nameless = range(self.tokenizer.num_ids, num_embeddings)  # embeddings that stand for no text
        self.banned = [*self.tokenizer.unwritable, *nameless]
        leave_out_named_base(self)

    @property
    def reads_image(self) -> bool:
        """Tell whether the image itself follows the feature maps."""
        return self.crops is not None

    @property
    def projector(self) -> RegionTokens:
        """What `train.tasks: align` trains alone."""
        return self.region_tokens

    def prefix(
        self,
        features: list[Tensor],
        instance_masks: list[Tensor],
        image_index: Tensor,
        target_index: list[Tensor],
        *,
        valid_sizes: Tensor | None = None,
        instance_boxes_norm: list[Tensor] | None = None,
        weight: Tensor | None = None,
        beside: list[Tensor] | None = None,
    ) -> Prefix:
        """Return what stands before the expression of E object sets; arguments as in `likelihood`.

        beside: E x int64, the objects that may stand beside each set (None: all others).
        """
        masks = some_as_boxes(instance_masks, self.cfg.box_share if self.training else 0.0)
        objects = self.objects(features, masks, valid_sizes, instance_boxes_norm)
        return self.arrange(objects, [len(m) for m in masks], image_index, target_index, weight, beside)

    def objects(
        self, features: list[Tensor], masks: list[Tensor], valid_sizes: Tensor | None = None, boxes_norm: list[Tensor] | None = None
    ) -> ObjectTokens:
        """Return the tokens of all objects of B images, with the words that they are called by; arguments as in `RegionTokens.forward`."""
        objects = self._objects(features, masks, valid_sizes, boxes_norm)
        return objects if self.words is None else with_words(objects, self.lm, self.words.ids, self.region_tokens.kinds)

    def _objects(self, features: list[Tensor], *given: Any) -> ObjectTokens:
        """Call `RegionTokens.forward`; with crops, the last of the maps is the image itself, float [B, 3, H, W]."""
        if self.crops is None:
            return self.region_tokens(features, *given)  # type: ignore[no-any-return]
        return self.region_tokens(features[:-1], *given, partial(self.crops, features[-1]))  # type: ignore[no-any-return]

    def arrange(
        self,
        objects: ObjectTokens,
        num_objects: list[int],
        image_index: Tensor,
        target_index: list[Tensor],
        weight: Tensor | None = None,
        beside: list[Tensor] | None = None,
    ) -> Prefix:
        """Return what stands before the expression of E object sets of objects that are tokens already; arguments as in `prefix`."""
        member = membership(image_index, target_index, objects.present, num_objects, weight)
        return self.framed(objects, image_index, member, None if beside is None else positions_of(beside, member))

    def framed(self, objects: ObjectTokens, image_index: Tensor, member: Tensor, beside: Tensor | None = None) -> Prefix:
        """Return what stands before the expression of E object sets. member, beside: bool [E, N], as `RegionTokens.select` has them."""
        tokens, mask, summary, said = self.region_tokens.select(objects, image_index, member, beside)
        dtype = embedding_weight(self.lm).dtype
        embeds, summary = tokens.to(dtype), summary.to(dtype)
        if self.frame.before or self.frame.after:
            before, after = (self._embeds(ids, embeds.shape[0]) for ids in (self.frame.before, self.frame.after))
            ones = mask.new_ones
            mask = torch.cat([ones(mask.shape[0], before.shape[1]), mask, ones(mask.shape[0], after.shape[1])], 1)
            embeds = torch.cat([before, embeds, after], 1)
        alike = 0 if len(self.region_tokens.context) else objects.image.shape[1]  # in context, image tokens see the set's objects
        return Prefix(embeds, mask, summary, objects, Shared(len(self.frame.before), alike, image_index), said)

    def forward(self, features: list[Tensor], batch: Batch, early: bool = False, proposals: Proposals | None = None) -> dict[str, Tensor]:
        """Return the loss terms of a batch: lm (mean over the tokens), words, object_<attribute>, and their weighted total.

        features: float [B, C_i, h_i, w_i].  batch: its `generation` is what `collate` made.  early: only attributes and words are learned;
        the language model reads one row for nothing, so that every weight takes part in every step.  proposals: of the decoder, from which
        the objects beside a set are taken in a share of the images.
        """
        part: GenerationPart = batch.generation
        seen = part.first() if early and not self.cfg.ranks else part  # without ranks, words are of objects whatever the set
        masks, boxes, beside = batch.instance_masks, batch.instance_boxes_norm, None
        if proposals is not None and self.training:
            masks, boxes, beside = among_found(proposals, batch, seen, self.cfg.found_share)
        prefix = self.prefix(
            features,
            masks,
            seen.image_index,
            seen.target_index,
            valid_sizes=batch.image_index.new_tensor(batch.input_sizes),
            instance_boxes_norm=boxes,
            weight=seen.weight,
            beside=beside,
        )
        if early:
            out = self.score_text(prefix.part(slice(0, 1)), part.lm_ids[:1], part.lm_mask[:1], torch.zeros_like(part.weight[:1]))
        else:
            out = self.score_text(prefix, part.lm_ids, part.lm_mask, part.weight)
        terms = {} if early else {"lm": out.loss}
        total = out.loss
        if self.words is not None:
            terms["words"] = word_loss(out.objects, part, self.words.ids, self.tokenizer.eos_id, prefix.said)
            total = total + terms["words"] * self.cfg.word_loss
        for name, logits in out.objects.attribute_logits.items():
            labels = self._labels(batch, name, logits)
            entropy = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            terms[f"object_{name}"] = entropy / shared_count((labels != IGNORED).sum(), entropy)
            total = total + terms[f"object_{name}"] * self.cfg.attribute_loss
        return terms | {"total": total}

    @property
    def set_width(self) -> int:
        """Channels of `set_features`."""
        return self.cfg.projector_width

    def set_features(self, features: list[Tensor], batch: Batch) -> Tensor:
        """Return float [E, C]: the mean of the region tokens that each expression of a batch means; zero where it means none."""
        sizes = batch.image_index.new_tensor(batch.input_sizes)
        objects = self._objects(features, batch.instance_masks, sizes, batch.instance_boxes_norm)
        nobody = torch.zeros(len(batch.image_index), objects.tokens.shape[1], dtype=torch.bool, device=sizes.device)
        member = positions_of(batch.target_index, nobody).to(objects.tokens.dtype)
        pooled = (member[..., None] * objects.tokens[batch.image_index]).sum(1)
        return pooled / member.sum(1, keepdim=True).clamp(min=1)

    @staticmethod
    def _labels(batch: Batch, name: str, logits: Tensor) -> Tensor:
        """Return int64 [B, N] classes of an attribute, IGNORED where it is unknown."""
        labels = torch.full(logits.shape[:2], IGNORED, dtype=torch.int64, device=logits.device)
        for b, values in enumerate((batch.instance_attributes or {}).get(name, ())):
            labels[b, : len(values)] = values
        return labels

    def likelihood(
        self,
        features: list[Tensor],
        instance_masks: list[Tensor],
        image_index: Tensor,
        target_index: list[Tensor],
        *,
        lm_ids: Tensor,
        lm_mask: Tensor,
        valid_sizes: Tensor | None = None,
        instance_boxes_norm: list[Tensor] | None = None,
        weight: Tensor | None = None,
        beside: list[Tensor] | None = None,
    ) -> GeneratorOutput:
        """Return the likelihood of E expressions for E object sets of B images.

        features: float [B, C_i, h_i, w_i], any order of scales.  instance_masks: B x bool [N_b, H, W], all objects of each image.
        image_index: int64 [E].  target_index: E x int64 [n_e >= 1] into the image's objects.  lm_ids, lm_mask: int64 [E, L], BOS ... EOS,
        right-padded.  valid_sizes: int64 [B, 2] height, width without padding.  instance_boxes_norm: B x float [N_b, 4] cxcywh, drawn where
        a mask is empty.  weight: float [E] of each expression in the loss; one of weight 0 may have no target.  beside: as in `prefix`.

        Raises:
            GrexError: an empty object set, a target that does not exist or has no pixel, masks that do not fit the feature maps.
        """
        drawn = {"valid_sizes": valid_sizes, "instance_boxes_norm": instance_boxes_norm}
        prefix = self.prefix(features, instance_masks, image_index, target_index, **drawn, weight=weight, beside=beside)  # type: ignore[arg-type]
        return self.score_text(prefix, lm_ids, lm_mask, weight)

    def score_text(self, prefix: Prefix, lm_ids: Tensor, lm_mask: Tensor, weight: Tensor | None = None) -> GeneratorOutput:
        """Return the likelihood of E expressions behind their prefixes; arguments as in `likelihood`."""
        text = self.lm.get_input_embeddings()(lm_ids[:, 1:]).to(prefix.embeds.dtype)
        embeds, mask = prefix.open(self.lm, self.frame.opener)
        embeds, mask = torch.cat([embeds, text], 1), torch.cat([mask, lm_mask[:, 1:].bool()], 1)
        self._check_length(int(mask.sum(1).max()))
        real = lm_mask[:, 1:].bool()
        nll = token_losses(self.lm, embeds, mask, lm_ids[:, 1:], real, prefix.shared)
        num_tokens = real.sum(1)
        share = torch.ones_like(num_tokens, dtype=nll.dtype) if weight is None else weight.to(nll.dtype)
        loss = (nll.sum(1) * share).sum() / shared_count((num_tokens * share).sum(), nll)
        return GeneratorOutput(loss, -nll.sum(1), num_tokens, prefix.objects)

    def generate(
        self,
        features: list[Tensor],
        encoded: Any,
        masks: np.ndarray,
        sets: list[list[int]],
        beside: list[list[int]] | None = None,
        **options: Any,
    ) -> list[list[str]]:
        """Return expressions for object sets of one image.

        features: its feature maps, float [1, C_i, h_i, w_i].  encoded: `EncodedImage`.  masks: bool [N, H0, W0], every object that is
        known.  sets: positions in masks.  beside: positions of those that may stand beside each set (None: all others).  options: as
        `generate_batch`.
        """
        device, geometry = features[0].device, encoded.geometry
        return self.generate_batch(
            features,
            [input_masks(masks, geometry, encoded.features.input_size).to(device)],
            torch.zeros(len(sets), dtype=torch.int64, device=device),
            [torch.tensor(s, dtype=torch.int64, device=device) for s in sets],
            valid_sizes=torch.tensor([geometry.seen_size], device=device),
            beside=None if beside is None else [torch.tensor(b, dtype=torch.int64, device=device) for b in beside],
            **options,
        )

    @torch.no_grad()
    def generate_batch(
        self,
        features: list[Tensor],
        instance_masks: list[Tensor],
        image_index: Tensor,
        target_index: list[Tensor],
        *,
        mode: str = "greedy",
        num_candidates: int = 1,
        num_beams: int = 4,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int = 0,
        valid_sizes: Tensor | None = None,
        instance_boxes_norm: list[Tensor] | None = None,
        beside: list[Tensor] | None = None,
    ) -> list[list[str]]:
        """Return `num_candidates` expressions for each of E object sets (greedy: one).

        mode: greedy | beam (best first) | sample (the same seed gives the same answers, whatever else is in the batch).

        Raises:
            GrexError: as `forward`; an unknown mode, fewer than one candidate, temperature not above 0.
        """
        check_mode(mode, num_candidates, temperature)
        steps = self.cfg.max_new_tokens if max_new_tokens is None else max_new_tokens
        was_training = self.training
        self.eval()
        try:
            drawn = {"valid_sizes": valid_sizes, "instance_boxes_norm": instance_boxes_norm}
            prefix = self.prefix(features, instance_masks, image_index, target_index, **drawn, beside=beside)  # type: ignore[arg-type]
            self._check_length(int(prefix.mask.sum(1).max()) + 1 + steps)
            answers: list[list[str]] = []
            copies = max(num_beams, num_candidates) if mode == "beam" else num_candidates
            chunk = max(1, self.cfg.max_rows // copies)
            for start in range(0, len(prefix.embeds), chunk):
                part = prefix.part(slice(start, start + chunk))
                with adapters_folded_once(self.lm):
                    tokens = self._write(
                        part, mode, num_candidates=num_candidates, num_beams=copies, temperature=temperature, steps=steps, seed=seed
                    )
                answers += [[self.tokenizer.decode(row) for row in rows] for rows in tokens.tolist()]
            return answers
        finally:
            self.train(was_training)

    @contextmanager
    def text_only(self) -> Iterator[Any]:
        """Yield the bare LM as `base_training` does, for training on text; afterwards the region tokens get the size of its embeddings."""
        with self.base_training() as lm:
            yield lm
        self.region_tokens.set_token_scale(embedding_scale(self.lm))

    @contextmanager
    def base_training(self) -> Iterator[Any]:
        """Yield the bare LM with its base weights trainable and the adapters off; freeze it again afterwards."""
        if self.cfg.lm != "tiny":
            raise fault(
                f"language-model training of {self.cfg.lm}", "lm: tiny, whose weights start at random", "leave out the text training"
            )
        own = base_parameters(self.lm)
        adapters = self.lm.disable_adapter() if hasattr(self.lm, "disable_adapter") else nullcontext()
        learning = [p for p in self.lm.parameters() if p.requires_grad]
        with adapters:
            for p in self.lm.parameters():
                p.requires_grad_(False)
            for p in own:
                p.requires_grad_(True)
            try:
                yield self.lm
            finally:
                for p in own:
                    p.requires_grad_(False)
                    p.grad = None
        for p in learning:
            p.requires_grad_(True)

    def _write(
        self, prefix: Prefix, mode: str, *, num_candidates: int, num_beams: int, temperature: float, steps: int, seed: int
    ) -> Tensor:
        tok, opener = self.tokenizer, self.frame.opener
        if mode == "beam":
            return beam_search(self.lm, prefix, opener, tok.eos_id, tok.pad_id, self.banned, steps, num_beams, num_candidates)
        uniforms = stratified_uniforms(num_candidates, steps, seed) if mode == "sample" else None
        return decode(self.lm, prefix, opener, tok.eos_id, self.banned, steps, uniforms, temperature)

    def _check_length(self, length: int) -> None:
        limit = getattr(self.lm.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise fault(
                f"a sequence of {length} tokens (regions and expression)",
                f"at most the language model's {limit} positions",
                "select fewer objects, lower max_distractors or max_new_tokens, or raise max_positions of a tiny model",
            )

    def _embeds(self, ids: list[int], rows: int) -> Tensor:
        embed, weight = self.lm.get_input_embeddings(), embedding_weight(self.lm)
        return embed(torch.tensor(ids, dtype=torch.int64, device=weight.device)).to(weight.dtype).expand(rows, -1, -1)


def _frame(cfg: RegionTokensConfig, tokenizer: LMTokenizer) -> Frame:
    if cfg.lm == "tiny":
        return tiny_frame(tokenizer.hf, tokenizer.bos_id, cfg.prompt)
    return (chat_frame if tokenizer.style == "chat" else plain_frame)(tokenizer.hf, cfg.prompt)
