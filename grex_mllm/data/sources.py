"""Where samples come from: dataset folders, and drawn sources by name. A source by name registers itself in `SOURCES`.

A source module gives `Config` (a dataclass of its own knobs, `data.sources.<name>`), `training_samples(data, config, purpose, positions,
generates)`, `text(data, config, num_lines, generation)`, and `export_for_prediction(config, split, length, folder)`, which writes samples
as a dataset folder, or finds them there.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from grex_mllm.config import DataConfig, WeightedSource
from grex_mllm.data.dataset import FolderDataset, Mixture, SampleSource
from grex_mllm.entries import SOURCES

TRAINING, PRETRAINING = "training", "pretraining"


def source_of(name: str) -> ModuleType | None:
    """Return the module of a source by name; None for a dataset folder."""
    return import_module(SOURCES[name]) if name in SOURCES else None


def options_of(data: DataConfig, name: str) -> Any:
    """Return the knobs of a source by name, as configured or as they start."""
    module = source_of(name)
    assert module is not None
    return data.sources[name] if name in data.sources else module.Config()


def weighted(data: DataConfig) -> list[WeightedSource]:
    """Return what `data.train` names, one entry for a lone folder or source."""
    return [WeightedSource(data.train)] if isinstance(data.train, str) else list(data.train)


def training_samples(data: DataConfig, seed: int, positions: int, purpose: str = TRAINING, generates: bool = False) -> SampleSource:
    """Return the samples of a training by position; several sources are mixed by their weights.

    positions: how many the whole training will read.  purpose: "pretraining" reads expressions with a target only, and other images than
    the training where they are drawn.  generates: a generator learns from them.
    """
    found: list[SampleSource] = []
    parts = weighted(data)
    for part in parts:
        module = source_of(part.train)
        if module is not None:
            found.append(module.training_samples(data, options_of(data, part.train), purpose, positions, generates))
            continue
        found.append(
            FolderDataset(
                part.train,
                part.split or data.train_split,
                data.expressions_per_image,
                training=True,
                seed=seed,
                targeted_only=purpose == PRETRAINING,
                image_root=part.image_root or data.image_root,
            )
        )
    return found[0] if len(found) == 1 else Mixture(found, [part.weight for part in parts], seed)


def training_text(data: DataConfig, num_lines: int, generation: bool = False) -> list[str]:
    """Return lines of text of the training data: all expressions of folders, at least num_lines of each source that is drawn.

    generation: as the generator shall write them.
    """
    lines: list[str] = []
    for part in weighted(data):
        module = source_of(part.train)
        if module is not None:
            lines += module.text(data, options_of(data, part.train), num_lines, generation)
        else:
            folder = FolderDataset(part.train, part.split or data.train_split, image_root=part.image_root or data.image_root)
            lines += [record.expression for record in folder.expressions]
    return lines
