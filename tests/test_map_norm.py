"""Batch normalisation of maps, as the papers have it: where it is, what it counts, and that answers do not depend on their batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_decoder_contract import AROUND, SMALL, batch_of, own_tensors, run
from tiny import WORDS, tiny_config
from torch import nn

from grex_mllm.config import load_config
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.norms import map_norm, map_norms
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.optim import build_optimizer
from grex_mllm.training.step import Step


def model_of(name: str) -> GrexModel:
    changes = {f"model__decoder__{field.replace('.', '__')}": value for field, value in SMALL[name].items()}
    config = tiny_config(model__decoder__name=name, model__map_norm="batch", **changes, **AROUND.get(name, {}))
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(WORDS, config.model.text.vocab_size)
    config.model.text.vocab_size = tokenizer.vocab_size
    return GrexModel(config, tokenizer)


@pytest.mark.parametrize("name", ["isfp", "lavt", "vlt", "m3att", "vlt_rela"])
def test_a_system_learns_with_it_and_answers_each_by_itself(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    parts = [*model.grounding.pixel_decoder.modules(), *model.grounding.decoder.modules()]
    norms = [part for part in parts if isinstance(part, nn.BatchNorm2d)]
    assert norms and not any(isinstance(part, nn.GroupNorm) for part in parts)
    step, batch = Step(model, model.config).train(), batch_of(model)
    optimizer = build_optimizer(model, model.config.train.optim)
    step(batch)["total"].backward()
    optimizer.step()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert all(int(norm.num_batches_tracked) == 1 and norm.running_mean.abs().max() > 0 for norm in norms)  # type: ignore[union-attr, arg-type]
    model.eval().double()
    with torch.no_grad():
        together = own_tensors(run(model, batch))
        for e in (0, len(batch.image_index) - 1):
            image = batch.image[batch.image_index[e]][None]
            alone = own_tensors(model.grounding(image, torch.tensor([0]), batch.text_ids[e : e + 1], batch.text_mask[e : e + 1]))
            for field, value in together.items():
                torch.testing.assert_close(alone[field][0], value[e], rtol=0, atol=1e-8)
    model.float().save_pretrained(tmp_path / "m")
    again = GrexModel.from_pretrained(tmp_path / "m").grounding.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.grounding.state_dict().items())


def test_statistics_are_of_all_maps_with_their_padding() -> None:
    with map_norms("batch"):
        norm = map_norm(2)
    maps = torch.randn(3, 2, 4, 4)
    maps[:, :, 3] = 0  # padding counts
    flat = maps.transpose(0, 1).flatten(1)
    wanted = (maps - flat.mean(1)[:, None, None]) / (flat.var(1, correction=0) + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(norm(maps), wanted, atol=1e-5, rtol=1e-5)
    assert isinstance(map_norm(12), nn.GroupNorm)


def test_names_that_do_nothing_are_refused() -> None:
    with pytest.raises(GrexError, match=r'model\.map_norm is "layer"'):
        build_grounding(load_config(None, ["--model.map_norm=layer"]).model)
    small = ["--model.decoder.num_layers=1", "--model.pixel_decoder.num_layers=1", "--model.text.num_layers=1", "--model.map_norm=batch"]
    with pytest.raises(GrexError, match=r"map_norm is batch with deformable and rela"):
        build_grounding(load_config(None, small).model)
