"""The round trip as a loss: an expression that is generated for a set of objects, grounded, must return that set.

Self-critical sequence training (Rennie et al. 2017): for every set one expression is drawn from the generator, and its likelihood rises by
as much as the model's own grounding picks out the set better from it than from the greedy expression, or falls by as much as it does worse.
The grounding listens as it is: its text encoder and its decoder learn nothing from it; what the generator reads, the image's maps, does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.describe import agreements
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch, GroundingOutput

if TYPE_CHECKING:
    from grex_mllm.models.grex import GrexModel

AT_ONCE = 64  # expressions that are grounded together
SEEDS = 1 << 31
SOME_WORD = "a"


def round_trip(model: GrexModel, features: list[Tensor], batch: Batch) -> Tensor:
    """Compute minus the mean over G sets of (reward of the drawn expression - reward of the greedy one) * its log-likelihood per token.

    features: float [B, C_i, h_i, w_i], as the generator reads them.  The reward is the agreement of `describe.agreements`, in [0, 1], 0 for
    an expression without a word.  The value says little, its gradient is what counts; the stand-in of an empty part weighs 0.
    """
    generator, part = model.generator, batch.generation
    sizes = batch.image_index.new_tensor(batch.input_sizes)
    shown = (features, batch.instance_masks, part.image_index, part.target_index)
    drawn = {"valid_sizes": sizes, "instance_boxes_norm": batch.instance_boxes_norm}
    with torch.no_grad(), _listening(model):
        real = [int(row) for row in part.weight.nonzero().flatten()]
        texts, rewards = [""] * len(part.weight), part.weight.new_zeros(2, len(part.weight))
        if real:
            index, targets = part.image_index[real], [part.target_index[row] for row in real]
            options = {"temperature": 1.0, "seed": int(torch.randint(SEEDS, ())), **drawn}
            sampled = [one[0] for one in generator.generate_batch(*shown[:2], index, targets, mode="sample", **options)]
            greedy = [one[0] for one in generator.generate_batch(*shown[:2], index, targets, mode="greedy", **drawn)]
            found = heard(model, batch, [*sampled, *greedy], index.repeat(2), [*targets, *targets])
            rewards[:, real] = found.view(2, -1).to(rewards)
            for row, text in zip(real, sampled, strict=True):
                texts[row] = text
        gain = (rewards[0] - rewards[1]) * part.weight
    ids, mask = (tensor.to(gain.device) for tensor in written(generator.tokenizer, texts))
    out = generator.score_text(generator.prefix(*shown, **drawn, weight=part.weight), ids, mask, part.weight)
    return -(gain * out.log_likelihood / out.num_tokens).sum() / shared_count(part.weight.sum(), out.log_likelihood)


def written(tokenizer: LMTokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return ids and mask int64 [E, L] with BOS and EOS, also of texts without a word, which end at once."""
    ids, mask = tokenizer.encode([text if text.strip() else SOME_WORD for text in texts])
    for row, text in enumerate(texts):
        if not text.strip():
            ids[row, 1], mask[row, 2:] = tokenizer.eos_id, 0
    return ids, mask


def heard(model: GrexModel, batch: Batch, texts: Sequence[str], image_index: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """Return float [E]: how well the grounding of each text picks out its targets among the objects of its image; 0 for a blank text."""
    grounding = model.grounding
    features = grounding.encode_image(batch.image, batch.input_sizes)
    result = torch.zeros(len(texts))
    for image in sorted(set(image_index.tolist())):
        rows = [row for row, own in enumerate(image_index.tolist()) if own == image and texts[row].strip()]
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            ids, mask = (tensor.to(image_index.device) for tensor in model.encode_text([texts[row] for row in some]))
            output: GroundingOutput = grounding.ground(features, image_index[some], ids, mask)
            sets = [targets[row].tolist() for row in some]
            values = agreements(output, batch.instance_masks[image], sets, features.padded_size, features.input_size)
            result[some] = torch.from_numpy(values).diagonal().float()
    return result


@contextmanager
def _listening(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_round_trip(loss: Any, generator: Any, tasks: Sequence[str], stage: int) -> None:
    """Raise on a round trip that cannot be. loss: its configuration.  generator: its class.  stage: of ZeRO, 0 without DeepSpeed.

    Raises:
        GrexError: a weight below 0 or a start outside [0, 1); not both parts learned; a generator that cannot; ZeRO-3.
    """
    if not loss.round_trip >= 0 or not 0 <= loss.round_trip_start < 1:
        given = f"loss.round_trip is {loss.round_trip:g} from {loss.round_trip_start:g} of the training on"
        raise fault(given, "a weight from 0, and loss.round_trip_start from 0 to below 1", "fix the number")
    if loss.round_trip == 0:
        return
    if len(tasks) < 2:
        raise fault(f"loss.round_trip is {loss.round_trip:g} with one part that learns", "train.tasks: all", "learn both, or set it to 0")
    if not hasattr(generator, "score_text"):
        given = f"loss.round_trip is {loss.round_trip:g} with a generator that does not score texts"
        raise fault(given, "model.generator.name: region_tokens, or loss.round_trip: 0", "change one of them")
    if stage == 3:
        raise fault(
            f"loss.round_trip is {loss.round_trip:g} with ZeRO-3",
            "whole weights on every process: each writes expressions of other lengths",
            "use ZeRO-2, or set loss.round_trip to 0",
        )
