"""Training data from folders, drawn sources, and mixtures of both by weight."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tiny_folder import tiny_folder

from grex_mllm.config import DataConfig, WeightedSource, load_config, save_config
from grex_mllm.data.dataset import MIXTURE_BLOCK, FolderDataset, Mixture
from grex_mllm.data.sources import PRETRAINING, TRAINING, options_of, training_samples, training_text
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError


def test_a_list_with_weights_reaches_the_training(tmp_path: Path) -> None:
    """From YAML and from a flag to samples: two thirds of the positions from the folder, each part in its own order."""
    folder = tiny_folder(tmp_path / "d")
    file = tmp_path / "c.yaml"
    file.write_text(f"data:\n  train:\n  - {{train: {folder}, weight: 2, split: val}}\n  - {{train: synthetic}}\n", encoding="utf-8")
    config = load_config(file)
    assert config.data.train == [WeightedSource(str(folder), 2.0, "val"), WeightedSource("synthetic")]
    samples = training_samples(config.data, seed=3, positions=100)
    assert isinstance(samples, Mixture)
    drawn = Counter(samples[position].record.image_id.startswith("train-") for position in range(MIXTURE_BLOCK))
    assert drawn[True] == pytest.approx(MIXTURE_BLOCK / 3, abs=1)
    alone = FolderDataset(folder, "val", config.data.expressions_per_image, training=True, seed=3)
    mine = [s for s in (samples[p] for p in range(30)) if not s.record.image_id.startswith("train-")]
    assert [[e.expression_id for e in s.expressions] for s in mine] == [
        [e.expression_id for e in alone[p].expressions] for p in range(len(mine))
    ]
    lines = training_text(config.data, 50)
    assert "the cat" in lines and len(lines) >= 50
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    flag = load_config(None, [f"--data.train=[{{train: {folder}, weight: 2}}, {{train: synthetic}}]"])
    assert [(part.train, part.weight) for part in flag.data.train] == [(str(folder), 2.0), ("synthetic", 1.0)]


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    data = DataConfig(train=[WeightedSource("synthetic", 0.0), WeightedSource("synthetic")])
    with pytest.raises(GrexError, match="weight"):
        training_samples(data, seed=0, positions=10)
    with pytest.raises(GrexError, match=r"data\.sources\.drawn; expected one of synthetic"):
        load_config(None, ["--data.sources.drawn.seed=3"])
    with pytest.raises(GrexError, match=r'data\.sources\.synthetic\.sede"; .*did you mean "seed"'):
        load_config(None, ["--data.sources.synthetic.sede=3"])


def test_a_drawn_source_has_knobs_of_its_own() -> None:
    assert options_of(DataConfig(), "synthetic") == SyntheticConfig()
    data = load_config(None, ["--data.sources.synthetic.image_size=64", "--data.expressions_per_image=4"]).data
    assert options_of(data, "synthetic").image_size == 64
    first, before = (training_samples(data, 0, 10, purpose) for purpose in (TRAINING, PRETRAINING))
    assert first[0].image.shape == (64, 64, 3) and first[0].record.image_id != before[0].record.image_id
    assert all(e.targets for p in range(20) for e in before[p].expressions)
    assert any(not e.targets for p in range(20) for e in first[p].expressions)
