"""The region-token generator as three graphs: one sees an image, one reads its objects and the chosen ones, one goes on by a token.

What the language model has read (keys and values of each layer) leaves the second graph and goes in and out of the third, so that a token
costs one step. They take any number of object sets, objects and tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grex_mllm.compat import attention_of, cache_name, cache_of
from grex_mllm.errors import fault
from grex_mllm.export.decision import EXAMPLE, PLACE, AtImageGraph, AtInputGraph, example_place
from grex_mllm.export.graphs import CHOSEN, IMAGE, MASKS, SEEN, Graph
from grex_mllm.models.describe import MAX_OVERLAP, SURE
from grex_mllm.models.generators.region_tokens.network import RegionTokenGenerator
from grex_mllm.models.grounding import GroundingModel, ImageFeatures
from grex_mllm.models.lm_packing import PACKED_FAMILIES, position_ids
from grex_mllm.ops.recordable import stable_order

SEE, PREFIX, STEP = "see", "prefix", "step"
AT_IMAGE, AT_INPUT = "at_image", "at_input"  # of masks: to the image's own size, and to the network's input
FOUND = "object_logits"
TOKEN, LOGITS, READ, NEXT = "token", "logits", "read", "next_"
Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class SeeGraph(nn.Module):
    """A normalised image float [1, 3, H, W] -> the maps that the generator reads, and, where the decoder finds objects without an
    expression, the mask logits [K, h, w] in front of those that it is sure of, surest first."""

    def __init__(self, grounding: GroundingModel) -> None:
        super().__init__()
        self.grounding = grounding
        self.proposes = not grounding.fuses_language and hasattr(grounding.decoder, "proposals")

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = ImageFeatures(image, (0, 0))
        if not self.proposes:
            return tuple(self.grounding.language_free(features))
        found = self.grounding.proposals(self.grounding.encode_normalised(features))
        assert found is not None
        order, scores = stable_order(found.scores[0], descending=True), found.scores[0]
        return found.mask_logits[0][order[scores[order] >= SURE]], *self.grounding.language_free(features)


class PrefixGraph(nn.Module):
    """Masks bool [N, H, W] of an image's objects, chosen bool [E, N], the size int64 [1, 2] of the image without padding, and its maps ->
    the first token int64 [E], the likeliest that may begin an expression, its logits [E, V], which tokens were real (bool [E, S]), and keys
    and values of each layer."""

    def __init__(self, generator: RegionTokenGenerator) -> None:
        super().__init__()
        self.generator = generator
        self.never = [*generator.banned, generator.tokenizer.eos_id]

    def forward(self, masks: Tensor, chosen: Tensor, seen: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        objects = self.generator.objects(list(maps), [masks], seen)
        prefix = self.generator.framed(objects, torch.zeros_like(chosen[:, 0], dtype=torch.int64), chosen)
        lm = self.generator.lm
        embeds, mask = prefix.open(lm, self.generator.frame.opener)
        place = torch.arange(mask.shape[1], device=mask.device)
        earlier, itself = place[None] < place[:, None], place[None] == place[:, None]
        visible = (mask[:, None] & earlier) | itself  # padding sees itself: no row is empty
        out = lm(inputs_embeds=embeds, attention_mask=_as_bias(lm, visible[:, None]), position_ids=position_ids(mask), use_cache=True)
        return *_chosen(out.logits[:, -1], self.never), mask, *_flat(cache_of(out))


class StepGraph(nn.Module):
    """Tokens int64 [E] and what `PrefixGraph` or this graph returned beside logits -> the same, one token later."""

    def __init__(self, generator: RegionTokenGenerator) -> None:
        super().__init__()
        self.lm, self.never = generator.lm, list(generator.banned)

    def forward(self, token: Tensor, read: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        mask = torch.cat([read, torch.ones_like(read[:, :1])], 1)
        held = DynamicCache()
        for number in range(len(cache) // 2):
            held.update(cache[2 * number], cache[2 * number + 1], number)
        positions = mask.long().sum(1, keepdim=True) - 1
        out = self.lm(
            input_ids=token[:, None],
            attention_mask=_as_bias(self.lm, mask[:, None, None]),
            position_ids=positions,
            use_cache=True,
            **{cache_name(): held},
        )
        return *_chosen(out.logits[:, -1], self.never), mask, *_flat(cache_of(out))


def _chosen(logits: Tensor, never: list[int]) -> tuple[Tensor, Tensor]:
    """Return the likeliest token int64 [E] but for those that never come, and the logits [E, V]."""
    kept = torch.ones(logits.shape[1], dtype=torch.bool)
    kept[never] = False
    return torch.where(kept, logits, -torch.inf).argmax(-1), logits


def _as_bias(lm: Any, visible: Tensor) -> Tensor:
    """Return bool [E, 1, Q, S] as what the model's attention adds to its logits."""
    dtype = next(lm.parameters()).dtype
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def _flat(cache: Any) -> tuple[Tensor, ...]:
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def check_generator_exportable(model: Any) -> None:
    """Raise on a generator that does not leave.

    Raises:
        GrexError: none at all, one on a multimodal model, one with crops, a chat model, another precision, or a language model of an
            unknown kind.
    """
    generator, without = model.generator, "export the grounding alone (--task ground), and describe objects with grex describe"
    if not isinstance(generator, RegionTokenGenerator):
        given = f"model.generator.name: {model.config.model.generator.name}"
        raise fault(given, "region_tokens: a multimodal model leaves with its own project's exporter", without)
    if generator.crops is not None:
        raise fault("model.generator.crops", "a generator without: enlarging each object's crop was not checked outside torch", without)
    lm = generator.lm
    if generator.tokenizer.style == "chat":
        given = f"the chat model {generator.cfg.lm} as generator"
        raise fault(given, "a language model without a chat template: its turns were not checked outside torch", without)
    kinds = {p.dtype for p in lm.parameters()}
    if kinds != {torch.float32}:
        raise fault(f"a language model in {', '.join(sorted(map(str, kinds)))}", "float32, without quantisation", without)
    config = lm.config
    if config.model_type not in PACKED_FAMILIES or getattr(config, "sliding_window", None) or attention_of(lm) not in ("eager", "sdpa"):
        given = f"a language model of type {config.model_type} with attention {attention_of(lm)}"
        raise fault(given, f"one of {', '.join(PACKED_FAMILIES)}, without a sliding window, with eager or sdpa", without)


def generator_facts(generator: RegionTokenGenerator) -> dict[str, Any]:
    """Return what the script must know beside the graphs.

    eos ends an expression.  most_overlap: with others, of objects that the model finds beside the given ones.
    """
    return {
        "eos": generator.tokenizer.eos_id,
        "max_new_tokens": generator.cfg.max_new_tokens,
        "most_overlap": MAX_OVERLAP,
    }


def generator_graphs(model: Any, image: Tensor, varies: bool) -> list[tuple[Graph, dict[str, dict[int, str]]]]:
    """Return the graphs, to be recorded on one image, each with its axes that vary. varies: whether the image's size is one of them."""
    see, prefix = SeeGraph(model.grounding).eval(), PrefixGraph(model.generator).eval()
    size = model.config.data.image_size
    masks, chosen, seen = example_objects((size, size), 0)
    place = example_place(model, image)
    given = see(image)
    maps = [f"map_{n}" for n in range(len(given) - see.proposes)]
    made = prefix(masks, chosen, seen, *given[see.proposes :])
    cache = [f"{kind}_{number}" for number in range((len(made) - 3) // 2) for kind in ("keys", "values")]
    answers = [TOKEN, LOGITS, READ, *cache]
    step = StepGraph(model.generator).eval()
    of_prefix = {MASKS: {0: "objects"}, CHOSEN: {0: "sets", 1: "objects"}}
    if varies:
        of_prefix[MASKS] |= {1: "height", 2: "width"}
        of_prefix |= {name: {2: f"{name}_height", 3: f"{name}_width"} for name in maps}
    of_step = {TOKEN: {0: "sets"}, READ: {0: "sets", 1: "tokens"}} | {name: {0: "sets", 2: "tokens"} for name in cache}
    open_sizes = {0: "height", 1: "width"}
    graphs: list[tuple[Graph, dict[str, dict[int, str]]]] = [
        ((SEE, see, (image,), [IMAGE], [*([FOUND] if see.proposes else []), *maps]), {IMAGE: {2: "height", 3: "width"}} if varies else {}),
        ((PREFIX, prefix, (masks, chosen, seen, *given[see.proposes :]), [MASKS, CHOSEN, SEEN, *maps], answers), of_prefix),
        ((STEP, step, (made[0], *made[2:]), [TOKEN, READ, *cache], [NEXT + name for name in answers]), of_step),
        (
            (AT_INPUT, AtInputGraph(), (torch.ones(EXAMPLE, dtype=torch.bool), place), ["mask", PLACE], ["network_mask"]),
            {"mask": open_sizes},
        ),
    ]
    if see.proposes:
        graphs += [((AT_IMAGE, AtImageGraph(), (torch.ones(9, 9), place), ["logits", PLACE], ["mask"]), {"logits": open_sizes})]
    return graphs


def example_objects(size: tuple[int, int], seed: int, num: int = 5, sets: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks bool [num, H, W] of rectangles, chosen bool [sets, num] and the size int64 [1, 2]. size: of the image before padding."""
    height, width = size
    random = np.random.default_rng(seed)
    masks, chosen = np.zeros((num, height, width), bool), random.random((sets, num)) < 0.4
    for mask in masks:
        top, left = int(random.integers(0, height - 8)), int(random.integers(0, width - 8))
        mask[top : top + int(random.integers(4, height // 2)), left : left + int(random.integers(4, width // 2))] = True
    chosen[np.arange(sets), random.integers(0, num, sets)] = True
    return torch.from_numpy(masks), torch.from_numpy(chosen), torch.tensor([[height, width]])
