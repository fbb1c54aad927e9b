"""Where samples come from: dataset folders, and drawn sources by name. A source by name registers itself in `SOURCES`.

A source module gives `Config` (a dataclass of its own knobs, `data.sources.<name>`), `training_samples(data, config, purpose, positions,
generates)`, `text(data, config, num_lines, generation)`, and `export_for_prediction(config, split, length, folder)`, which writes samples
as a dataset folder, or finds them there.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from grex_mllm.augmentation import AugmentConfig
from grex_mllm.config import DataConfig, WeightedSource
from grex_mllm.data.augment.source import Augmented
from grex_mllm.data.dataset import EXACT, MIXTURE_BLOCK, RELEASED, SAMPLINGS, FolderDataset, Mixture, SampleSource
from grex_mllm.entries import SOURCES
from grex_mllm.errors import fault

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
    the training where they are drawn; it samples exactly.  generates: a generator learns from them.

    Raises:
        GrexError: folders that cannot be read, weights that make no mixture, a `data.sampling` that does not exist or fit.
    """
    _check_sampling(data, purpose)
    found: list[SampleSource] = []
    parts = weighted(data)
    for part in parts:
        module = source_of(part.train)
        if module is not None:
            found.append(module.training_samples(data, options_of(data, part.train), purpose, positions, generates))
            continue
        folder = FolderDataset(
            part.train,
            part.split or data.train_split,
            data.expressions_per_image,
            training=True,
            seed=seed,
            sampling=EXACT if purpose == PRETRAINING else data.sampling,
            targeted_only=purpose == PRETRAINING,
            image_root=part.image_root or data.image_root,
        )
        varied = purpose == TRAINING and data.augment != AugmentConfig()
        found.append(Augmented(folder, data.augment, seed, data.image_size) if varied else folder)
    return found[0] if len(found) == 1 else Mixture(found, [part.weight for part in parts], seed)


def describe_epochs(samples: SampleSource, samples_per_step: int, steps: int) -> list[str]:
    """Return lines for each dataset folder of a training: how long its epoch is, how many a training of so many steps has, what is varied.

    samples_per_step: of all sources together, over all processes.
    """
    parts = [(samples, 1.0)]
    if isinstance(samples, Mixture):
        parts = [(source, share / MIXTURE_BLOCK) for source, share in zip(samples.sources, samples.shares, strict=True)]
    lines = []
    for given, share in parts:
        source = given.source if isinstance(given, Augmented) else given
        if isinstance(source, FolderDataset):
            expressions, length = sum(len(group) for group in source.groups), len(source) / (samples_per_step * share)
            lines.append(
                f"one epoch of {source.dataset.folder} ({source.split}) = {expressions:,} expressions of {len(source.groups):,} images in "
                f"{len(source):,} samples = {length:,.1f} steps; this run: {steps / length:,.2f} epochs"
            )
        if isinstance(given, Augmented):
            lines.append(given.describe())
    return lines


def _check_sampling(data: DataConfig, purpose: str) -> None:
    if data.sampling not in SAMPLINGS:
        raise fault(f'data.sampling is "{data.sampling}"', f"one of {', '.join(SAMPLINGS)}", "choose one of them")
    if data.sampling == RELEASED and purpose == TRAINING and data.expressions_per_image != 1:
        raise fault(
            f"data.expressions_per_image is {data.expressions_per_image} with data.sampling {RELEASED}",
            "1, because the authors' loader gives every expression an image of its own",
            f"set data.expressions_per_image to 1, or data.sampling to {EXACT}",
        )


def training_text(data: DataConfig, num_lines: int, generation: bool = False, raw: bool = False) -> list[str]:
    """Return lines of text of the training data: all expressions of folders, at least num_lines of each source that is drawn.

    generation: as the generator shall write them.  raw: those of folders as the text encoder reads them.
    """
    lines: list[str] = []
    for part in weighted(data):
        module = source_of(part.train)
        if module is not None:
            lines += module.text(data, options_of(data, part.train), num_lines, generation)
        else:
            folder = FolderDataset(part.train, part.split or data.train_split, image_root=part.image_root or data.image_root)
            lines += [record.raw if raw else record.expression for record in folder.expressions]
    return lines
