"""From a configuration to a trained model folder: data, tokenizers, model, language-model start, the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grex_mllm.config import Config
from grex_mllm.data.collate import collate
from grex_mllm.data.dataset import FolderDataset, SampleSource
from grex_mllm.errors import fault
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import LMTokenizer, train_sentencepiece
from grex_mllm.models.text import TextTokenizer, load_text_tokenizer, train_text_tokenizer
from grex_mllm.precision import Resolved, resolve_precision
from grex_mllm.progress import list_ids
from grex_mllm.training import checkpoint
from grex_mllm.training.batches import GENERATE, GROUND, TaskMixture, seed_all
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.engine import is_main_process, training_device, wait_for
from grex_mllm.training.forecast import Forecast, forecast_training
from grex_mllm.training.instance_losses import IGNORED, InstanceLoss
from grex_mllm.training.loop import TrainResult, check, num_processes, train
from grex_mllm.training.losses import ReLALoss
from grex_mllm.training.start import adopt_start, describe_new, start_from
from grex_mllm.types import Batch

TOKENIZERS = "tokenizers"
CORPUS_LINES = 20_000
GENERATION_LINES = 20_000
FORECAST_LINES = 1_000


class JointLossTerms:
    """Loss function of the loop: grounding terms for grounding batches, the language-model term for generation batches."""

    def __init__(self, config: Config) -> None:
        instances = config.model.decoder.name == "instance_selection"
        self.grounding: Callable[[Any, Batch], dict[str, Tensor]] = InstanceLoss(config.loss) if instances else ReLALoss(config.loss)
        self.lm_weight, self.lm_start, self.attribute_weight = config.loss.lm, config.loss.lm_start, config.loss.object_attribute

    def __call__(self, model: nn.Module, batch: Batch, task: str, progress: float) -> dict[str, Tensor]:
        """Return the named terms and "total". progress: share of the training that is done; see `loss.lm_start`."""
        assert isinstance(model, GrexModel)
        sizes = [(g.input_height, g.input_width) for g in batch.geometries]
        if task != GROUND:
            return self._generation(model, model.generator_maps(batch.image, sizes), batch, sizes, progress)
        features = model.grounding.encode_image(batch.image, sizes)
        terms = self.grounding(model.grounding.ground(features, batch.image_index, batch.text_ids, batch.text_mask), batch)
        if batch.lm_ids is None:
            return terms
        generation = self._generation(model, model.generator_features(features), batch, sizes, progress)
        return terms | generation | {"total": terms["total"] + generation["total"]}

    def _generation(
        self, model: GrexModel, maps: list[Tensor], batch: Batch, sizes: list[tuple[int, int]], progress: float
    ) -> dict[str, Tensor]:
        assert batch.lm_ids is not None and batch.lm_mask is not None and batch.lm_index is not None
        valid_sizes = batch.image.new_tensor(sizes, dtype=batch.image_index.dtype)
        terms: dict[str, Tensor] = {}
        if progress < self.lm_start:
            seen = model.generator.region_tokens(maps, batch.instance_masks, valid_sizes, batch.instance_boxes_norm)
            attribute_logits, total = seen.attribute_logits, seen.tokens.float().sum() * 0.0
        else:
            out = model.generator(
                maps,
                batch.instance_masks,
                batch.image_index.index_select(0, batch.lm_index),
                [batch.target_index[e] for e in batch.lm_index.tolist()],
                batch.lm_ids,
                batch.lm_mask,
                valid_sizes,
                batch.instance_boxes_norm,
            )
            attribute_logits, total, terms["lm"] = out.attribute_logits, out.loss * self.lm_weight, out.loss
        for name, logits in attribute_logits.items():
            if batch.instance_attributes is None:
                break
            labels = torch.nn.utils.rnn.pad_sequence(batch.instance_attributes[name], batch_first=True, padding_value=IGNORED)
            if labels.shape[1] == logits.shape[1] and (labels != IGNORED).any():
                terms[f"object_{name}"] = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
                total = total + terms[f"object_{name}"] * self.attribute_weight
        return terms | {"total": total}


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
    check_combinations(config)
    check(config.train)
    seed_all(config.train.seed)
    if config.train.start is not None:
        adopt_start(config)
    sources = training_sources(config)
    text_tokenizer, lm_tokenizer = make_tokenizers(config)
    if config.model.text.path is None and config.train.start is None:
        config.model.text.vocab_size = text_tokenizer.vocab_size
    seed_all(config.train.seed)  # the weights do not depend on what the tokenizers drew
    model = GrexModel(config, text_tokenizer, lm_tokenizer)
    if config.train.start is not None:
        print(f"started from {config.train.start}; {describe_new(start_from(model, config.train.start))}")
    batches, loss_terms = batch_source(config, sources, text_tokenizer, lm_tokenizer), JointLossTerms(config)
    if checkpoint.latest(config.train.out) is None and is_main_process():
        if on_forecast is not None and num_processes() == 1:
            on_forecast(_forecast(model, batches, loss_terms, config), resolve_precision(config.train.precision, training_device()))
        learn_from_text(model, config)  # the other processes get the weights when they meet
    if is_main_process():
        _tell_cut(sources, text_tokenizer, config.model.text.max_tokens)
    return train(model, batches, loss_terms, config, save_model=model.save_pretrained, on_step=on_step)


def _forecast(model: GrexModel, batches: TaskMixture, loss_terms: JointLossTerms, config: Config) -> Forecast:
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    text = config.train.text
    scenes = attribute_batches(config, model) if text.scenes and model.generator is not None else None
    lines = generation_text(config, FORECAST_LINES)[:FORECAST_LINES] if text.steps and model.generator is not None else []
    states = checkpoint.random_states()
    try:
        return forecast_training(model, batches, scenes, lines, loss_terms, config)
    finally:
        checkpoint.set_random_states(states)  # the run is the same with and without


def _tell_cut(sources: dict[str, SampleSource], tokenizer: TextTokenizer, max_tokens: int) -> None:
    """Print how many expressions of a dataset folder the text encoder reads only the first tokens of."""
    source = sources[GROUND]
    if isinstance(source, FolderDataset):
        cut = tokenizer.too_long([record.raw for record in source.expressions], max_tokens)
        if cut:
            what = f"expressions of more than model.text.max_tokens = {max_tokens} tokens are cut there by the text encoder"
            print(list_ids(what, [source.expressions[i].expression_id for i in cut]))


def batch_source(
    config: Config, sources: dict[str, SampleSource], text_tokenizer: TextTokenizer, lm_tokenizer: LMTokenizer | None
) -> TaskMixture:
    """Return the deterministic mixture of grounding and generation batches."""
    encode_text, encode_lm = _encoders(config, text_tokenizer, lm_tokenizer)
    with_generation = {GENERATE, GROUND} if config.train.joint_batches else {GENERATE}
    make = {
        task: partial(_make_batch, source, task, encode_text, encode_lm if task in with_generation else None, config)
        for task, source in sources.items()
    }
    ratio = config.train.ground_ratio if GENERATE in sources else 1.0
    return TaskMixture(make, config.train.batch_images, ratio, config.train.seed)


def _encoders(config: Config, text_tokenizer: TextTokenizer, lm_tokenizer: LMTokenizer | None) -> tuple[Any, Any]:
    """Return the functions that turn expressions into ids for the text encoder and for the language model (None without one)."""
    encode_text = partial(text_tokenizer.encode, max_tokens=config.model.text.max_tokens, pad=config.model.text.pad)
    if lm_tokenizer is None:
        return encode_text, None
    return encode_text, lm_tokenizer.encode


def _make_batch(source: SampleSource, task: str, encode_text: Any, encode_lm: Any, config: Config, positions: list[int]) -> Batch:
    samples, data = [source[position] for position in positions], config.data
    most, longest = data.num_generation_targets if task == GROUND else None, config.model.generator.max_expression_tokens
    return collate(
        samples,
        encode_text,
        encode_lm,
        image_size=data.image_size,
        resize=data.resize,
        task=task,
        num_generation_targets=most,
        max_lm_tokens=longest,
    )


def training_sources(config: Config) -> dict[str, SampleSource]:
    """Return task -> samples by position."""
    data, seed = config.data, config.train.seed
    has_generator = config.model.generator.lm != "none"
    generates = has_generator and config.train.ground_ratio < 1
    joint = has_generator and config.train.joint_batches
    if data.train == "synthetic":
        from grex_mllm.data.synthetic.stream import training_stream

        steps = config.train.steps * config.train.batch_images * config.train.accumulation
        sources: dict[str, SampleSource] = {GROUND: training_stream(data, data.train_split, steps, False, joint)}
        if generates:
            sources[GENERATE] = training_stream(data, data.train_split, steps, True, True)
        return sources
    options: dict[str, Any] = {"training": True, "seed": seed, "image_root": data.image_root}
    sources = {GROUND: FolderDataset(data.train, data.train_split, data.expressions_per_image, **options)}
    if generates:
        sources[GENERATE] = FolderDataset(data.train, data.train_split, data.expressions_per_image, targeted_only=True, **options)
    return sources


def training_text(config: Config) -> list[str]:
    """Return the lines that tokenizers and the tiny language model are trained on: the grammar's corpus, or the training expressions."""
    if config.data.train == "synthetic":
        from grex_mllm.data.synthetic import corpus

        return list(corpus(config.data.synthetic, CORPUS_LINES))
    return [
        record.expression
        for record in FolderDataset(config.data.train, config.data.train_split, image_root=config.data.image_root).expressions
    ]


def make_tokenizers(config: Config) -> tuple[TextTokenizer, LMTokenizer | None]:
    """Read the tokenizers that the configuration names, or train them; trained ones are kept in `train.out` for a resumed run."""
    folder = Path(config.train.out) / TOKENIZERS
    text_place, generator = config.model.text.tokenizer or config.model.text.path, config.model.generator
    if text_place is None:
        raise fault("model.text.tokenizer is not set", "a folder with BERT's vocab.txt, or train", "set model.text.tokenizer")
    trains_text, trains_lm = text_place == "train", generator.lm == "tiny"
    lines: list[str] = []
    if (trains_text and not (folder / "text").is_dir()) or (trains_lm and not (folder / "lm").is_dir()):
        lines = training_text(config)
    if trains_text:
        if lines and not (folder / "text").is_dir():
            _whole(folder / "text", train_text_tokenizer(lines, config.model.text.vocab_size).save)
        text_place = str(folder / "text")
    text = load_text_tokenizer(text_place)
    if generator.lm == "none":
        return text, None
    if not trains_lm:
        return text, LMTokenizer.load(generator.lm)
    if lines and not (folder / "lm").is_dir():
        _whole(folder / "lm", lambda place: train_sentencepiece(lines, place, generator.vocab_size))
    return text, LMTokenizer.load(folder / "lm")


def _whole(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder under another name, then give it its own: nothing half-written is ever read."""
    import shutil

    if not is_main_process():
        return wait_for(folder)
    work = folder.with_name(folder.name + ".writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write(work)
    work.replace(folder)


def learn_from_text(model: GrexModel, config: Config) -> None:
    """Train the tiny language model without images, on lines of text and on attributes of objects; it stands in for pre-trained weights."""
    from grex_mllm.progress import progress_bar
    from grex_mllm.training.attribute_pretraining import pretrain_on_attributes
    from grex_mllm.training.lm import train_language_model

    settings, precision = config.train.text, resolve_precision(config.train.precision, model.device).precision
    if settings.steps and model.generator is not None and config.model.generator.lm == "tiny":
        with model.generator.text_only() as lm, progress_bar("language model on text") as progress:
            train_language_model(
                lm,
                model.generator.tokenizer,
                generation_text(config),
                steps=settings.steps,
                batch=settings.batch,
                lr=settings.lr,
                seed=config.train.seed,
                precision=precision,
                progress=progress,
            )
    if settings.scenes:
        with progress_bar("attribute pre-training") as progress:
            pretrain_on_attributes(model, attribute_batches(config, model), config, progress)


def attribute_batches(config: Config, model: GrexModel) -> TaskMixture:
    """Return the batches of the attribute pre-training: other scenes than the joint training sees, where data is drawn."""
    encoders = _encoders(config, model.text_tokenizer, model.generator.tokenizer if model.generator is not None else None)
    make = partial(_make_batch, attribute_samples(config), GENERATE, *encoders, config)
    return TaskMixture({GENERATE: make}, config.train.batch_images, 0.0, config.train.seed)


def attribute_samples(config: Config) -> SampleSource:
    """Return the samples whose images are not looked at."""
    data = replace(config.data, expressions_per_image=config.train.text.num_generation_targets)
    if data.train == "synthetic":
        from grex_mllm.data.synthetic.stream import PRETRAINING_OFFSET, training_stream

        return training_stream(data, data.train_split, config.train.text.scenes * config.train.batch_images, True, True, PRETRAINING_OFFSET)
    options: dict[str, Any] = {"targeted_only": True, "training": True, "seed": config.train.seed, "image_root": data.image_root}
    return FolderDataset(data.train, data.train_split, data.expressions_per_image, **options)


def generation_text(config: Config, least: int = GENERATION_LINES) -> list[str]:
    """Return the lines that the tiny language model reads: at least so many as the generator shall write, or the training expressions."""
    if config.data.train != "synthetic":
        return training_text(config)
    from grex_mllm.data.synthetic.stream import PRETRAINING_OFFSET, training_stream

    stream = training_stream(config.data, config.data.train_split, 0, True, True, PRETRAINING_OFFSET)
    lines: list[str] = []
    while len(lines) < least:
        lines += [record.expression for record in stream[len(lines)].expressions]
    return lines
