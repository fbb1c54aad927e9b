"""From a configuration to a trained model folder: data, tokenizers, model, pre-training, the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from grex_mllm.config import Config
from grex_mllm.data.collate import collate
from grex_mllm.data.dataset import FolderDataset, SampleSource
from grex_mllm.data.sources import PRETRAINING, describe_epochs, training_samples, training_text, weighted
from grex_mllm.entries import SOURCES, entry
from grex_mllm.errors import fault
from grex_mllm.models.grex import WEIGHTS, GrexModel
from grex_mllm.models.language_model import describe_base
from grex_mllm.models.lm_loading import partitioned_lm
from grex_mllm.models.placement import Placement, placed
from grex_mllm.models.text import TextTokenizer, load_text_tokenizer, train_text_tokenizer
from grex_mllm.models.words import make_word_tokenizer
from grex_mllm.ops.losses import alone
from grex_mllm.precision import Resolved, resolve_precision
from grex_mllm.progress import list_ids, progress_bar
from grex_mllm.training import checkpoint
from grex_mllm.training.batches import BatchStream, seed_all
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.engine import is_main_process, own_placement, training_device, wait_for
from grex_mllm.training.forecast import Forecast, forecast_training
from grex_mllm.training.loop import TrainResult, check, join, num_processes, train
from grex_mllm.training.stages import Stage
from grex_mllm.training.start import adopt_start, describe_new, start_from
from grex_mllm.training.step import GENERATE, Step, tasks_of
from grex_mllm.training.validation import Repeated, Subset, Validation
from grex_mllm.training.word_choice import choose_words
from grex_mllm.types import Batch, Sample
from grex_mllm.writing import whole_folder

TOKENIZERS = "tokenizers"
CORPUS_LINES = 20_000


def train_from_config(
    config: Config,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_forecast: Callable[[Forecast, Resolved], None] | None = None,
) -> TrainResult:
    """Train what the configuration says and write the model folder `train.out`.

    on_forecast: called before a run that begins in one process, with the expected times and the precision that was chosen; measuring them
    takes about fifteen steps.

    Raises:
        GrexError: settings that do not fit the data, an output folder that holds another run, losses that are not finite.
    """
    samples, tokenizers, generates = _materials(config)
    accelerator = join(config.train)
    seed_all(config.train.seed)  # the weights do not depend on what the tokenizers drew
    with placed(own_placement(accelerator, config.train)):
        model = GrexModel(config, *tokenizers)
    if is_main_process() and hasattr(model.generator, "lm"):
        print(describe_base(model.generator.lm))
    choose_words(model, config, *tokenizers)
    if config.train.start is not None:
        print(f"started from {config.train.start}; {describe_new(start_from(model, config.train.start))}")
    batches = batch_stream(config, samples, *tokenizers, generates=generates)
    validation = _validation(config, tokenizers, generates)
    if checkpoint.latest(config.train.out) is None and is_main_process():
        stages = pretraining_stages(config, tokenizers)
        if on_forecast is not None and num_processes() == 1 and partitioned_lm(model) is None:
            on_forecast(_forecast(model, batches, stages, config), resolve_precision(config.train.precision, training_device()))
        for stage in stages:  # the other processes get the weights when they meet
            with alone(), progress_bar(stage.name) as progress:
                stage.run(model, stage.steps, progress)
    if is_main_process():
        _report_cut(config, tokenizers[0])
        for line in describe_epochs(samples, config.train.batch_images * config.train.accumulation, config.train.steps):
            print(line)
    step = Step(model, config)
    hooks: dict[str, Any] = {"save_model": model.save_pretrained, "on_step": on_step, "validation": validation}
    return train(step, model, batches, config, accelerator=accelerator, **hooks)


def forecast_from_config(config: Config) -> tuple[Forecast, Resolved]:
    """Measure how long a training in one process would take, and in which precision, without beginning it; about fifteen steps.

    A `train.start` that is not there yet changes no time and is left out; tokenizers that are trained stay in `train.out`.

    Raises:
        GrexError: what `train_from_config` raises before its first step.
    """
    config = copy.deepcopy(config)
    if config.train.start is not None and not Path(config.train.start, WEIGHTS).is_file():
        config.train.start = None
    samples, tokenizers, generates = _materials(config)
    device = training_device()
    precision = resolve_precision(config.train.precision, device)
    with placed(Placement(device, precision.precision)):
        model = GrexModel(config, *tokenizers)
    stages = pretraining_stages(config, tokenizers)
    return _forecast(model, batch_stream(config, samples, *tokenizers, generates=generates), stages, config), precision


def _materials(config: Config) -> tuple[SampleSource, tuple[TextTokenizer, Any], bool]:
    """Check a configuration and return its samples, its tokenizers, and whether expressions are generated."""
    check_combinations(config)
    check(config.train)
    seed_all(config.train.seed)
    if config.train.start is not None:
        adopt_start(config)
    done = checkpoint.position_of(config.train.out)
    positions = done.after(config.train.steps - done.step, config.train).images
    generates = GENERATE in tasks_of(config)
    samples = training_samples(config.data, config.train.seed, positions, generates=generates)
    tokenizers = make_tokenizers(config)
    if (config.model.text.path is None or config.model.text.name == "bigru") and config.train.start is None:
        config.model.text.vocab_size = tokenizers[0].vocab_size
    return samples, tokenizers, generates


def _validation(config: Config, tokenizers: tuple[TextTokenizer, Any], generates: bool) -> Validation | None:
    """Return what `train.validation` asks for; None where it asks for nothing."""
    if config.train.validation.every == 0:
        return None
    subset = Subset(config)
    source = Repeated(subset, config.data.expressions_per_image)
    return Validation(config, subset, batch_stream(config, source, *tokenizers, generates=generates))


def pretraining_stages(config: Config, tokenizers: tuple[TextTokenizer, Any]) -> list[Stage]:
    """Return what `train.pretraining` asks for; nothing where it is not set.

    Raises:
        GrexError: a pre-training that does not fit the model.
    """
    if config.train.pretraining is None:
        return []

    def make_batches(num_generation_targets: int, number: int) -> BatchStream:
        positions = number * config.train.batch_images
        data = replace(config.data, expressions_per_image=num_generation_targets)
        samples = training_samples(data, config.train.seed, positions, PRETRAINING, generates=True)
        return batch_stream(config, samples, *tokenizers, num_generation_targets=None)

    return entry("train.pretraining", config.train.pretraining.name).stages(config, make_batches)


def _forecast(model: GrexModel, batches: BatchStream, stages: list[Stage], config: Config) -> Forecast:
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    states = checkpoint.random_states()
    try:
        return forecast_training(model, batches, stages, config)
    finally:
        checkpoint.set_random_states(states)  # the run is the same with and without


def _report_cut(config: Config, tokenizer: TextTokenizer) -> None:
    """Print how many expressions of the dataset folders the text encoder reads only the first tokens of."""
    most = config.model.text.max_tokens
    for part in weighted(config.data):
        if part.train in SOURCES:
            continue
        split, root = part.split or config.data.train_split, part.image_root or config.data.image_root
        records = FolderDataset(part.train, split, image_root=root).expressions
        cut = tokenizer.too_long([record.raw for record in records], most)
        if cut:
            what = f"expressions of more than model.text.max_tokens = {most} tokens are cut there by the text encoder"
            print(list_ids(what, [records[i].expression_id for i in cut]))


def batch_stream(
    config: Config,
    samples: SampleSource,
    text_tokenizer: TextTokenizer,
    lm_tokenizer: Any,
    *,
    generates: bool = True,
    num_generation_targets: int | None = -1,
) -> BatchStream:
    """Return the batches of samples by number.

    generates: with a generation part.  num_generation_targets: expressions of an image in it, at most; None = all, -1 = as configured.
    """
    encode = partial(text_tokenizer.encode, max_tokens=config.model.text.max_tokens, pad=config.model.text.pad)
    generation = None
    if generates and config.model.generator is not None:
        chosen = entry("model.generator", config.model.generator.name)
        generation = partial(chosen.collate, config.model.generator, lm_tokenizer)
    criterion = entry("model.decoder", config.model.decoder.name).Criterion
    targets_only = generation is None and getattr(criterion, "reads_targets_only", False)
    data = config.data
    most = data.num_generation_targets if num_generation_targets == -1 else num_generation_targets
    options: dict[str, Any] = {"image_size": data.image_size, "resize": data.resize, "num_generation_targets": most,
                               "targets_only": targets_only}  # fmt: skip
    return BatchStream(partial(_make_batch, samples, partial(collate, encode_text=encode, collate_generation=generation, **options)),
                       config.train.batch_images)  # fmt: skip


def _make_batch(samples: SampleSource, gather: Callable[[list[Sample]], Batch], positions: list[int]) -> Batch:
    return gather([samples[position] for position in positions])


def make_tokenizers(config: Config) -> tuple[TextTokenizer, Any]:
    """Read the tokenizers of the text encoder and of the generator (None without one), or train them on the training data.

    Trained ones are kept in `train.out` for a resumed run.
    """
    folder = Path(config.train.out) / TOKENIZERS
    place, generator = config.model.text.tokenizer or config.model.text.path, config.model.generator
    if place is None:
        raise fault("model.text.tokenizer is not set", "a folder with BERT's vocab.txt, or train", "set model.text.tokenizer")
    lines = cache(lambda: training_text(config.data, CORPUS_LINES))
    words = config.model.text.name == "bigru"
    if place == "train" or (words and config.model.text.tokenizer is None):
        if not (folder / "text").is_dir():
            text_config = config.model.text
            made = (
                (lambda: make_word_tokenizer(text_config, lines))
                if words
                else (lambda: train_text_tokenizer(lines(), text_config.vocab_size))
            )
            _whole(folder / "text", lambda work: made().save(work))
        place = str(folder / "text")
    text = load_text_tokenizer(place)
    if generator is None:
        return text, None
    chosen = entry("model.generator", generator.name)
    if not (folder / "lm").is_dir():
        _whole(folder / "lm", lambda work: chosen.make_tokenizer(generator, lines, work))
    return text, chosen.load_tokenizer(generator, folder / "lm")


def _whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder under another name, then give it its own: nothing half-written is ever read."""
    if not is_main_process():
        return wait_for(folder)
    with whole_folder(folder) as work:
        write(work)
