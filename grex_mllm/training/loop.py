"""The one loop, on one CPU, one GPU, or many of either, with or without DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grex_mllm.config import Config, TrainConfig, to_dict
from grex_mllm.errors import GrexError, fault
from grex_mllm.progress import list_ids
from grex_mllm.training import checkpoint
from grex_mllm.training.average import WeightAverage
from grex_mllm.training.batches import MODEL_STREAM, BatchSource, seed_all, stream
from grex_mllm.training.best import Best, write_best
from grex_mllm.training.compiling import compile_parts
from grex_mllm.training.consolidated import stored_parameters
from grex_mllm.training.engine import (
    agreed_precision,
    determinism,
    failing_together,
    gathered,
    is_deepspeed,
    prepare,
    spare_copy,
    start_accelerator,
    votes,
    whole_copy,
    whole_weights,
    zero_stage,
)
from grex_mllm.training.interrupt import Interrupts, name_of
from grex_mllm.training.log import RunLog, Window
from grex_mllm.training.optim import build_optimizer, build_schedule, clip_gradients, optimized_parameters
from grex_mllm.training.profiling import StepProfile, parts_of
from grex_mllm.training.room import check_room, check_writable
from grex_mllm.training.transfer import to_device
from grex_mllm.training.watch import Watch
from grex_mllm.types import Batch


@dataclass
class TrainResult:
    """steps: finished steps.  resumed_from: finished steps when this call began.  lines: the log lines of this call.

    is_main: this process is the one that writes files.  too_long: expressions that the generator could not learn from because of their
    length, id -> how often one came.  interrupted: the signal that ended the run early, whose model is not published; "" = none.
    best: the best validation, None without any.  out_of_patience: the run ended early because the validations had no gain.
    """

    steps: int
    resumed_from: int
    checkpoint: Path | None
    is_main: bool
    lines: list[dict[str, Any]] = field(default_factory=list)
    too_long: dict[str, int] = field(default_factory=dict)
    interrupted: str = ""
    best: Best | None = None
    out_of_patience: bool = False


class Validating(Protocol):
    """What a training validates with; see `grex_mllm.training.validation.Validation`."""

    higher_is_better: bool

    def __call__(self, step: Any, accelerator: Any, mark: Callable[[], None]) -> dict[str, float]: ...


def train(
    step: nn.Module,
    model: nn.Module,
    batches: BatchSource,
    config: Config,
    *,
    save_model: Callable[[Path], object] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    validation: Validating | None = None,
    accelerator: Any = None,
) -> TrainResult:
    """Train until `train.steps`, with checkpoints on the way, and publish the model.

    step(batch, progress): named loss terms, "total" among them; progress runs from 0 to 1. A module that holds `model`; its attribute
    `precision` is set to what the run computes in.
    save_model(folder): writes the model; called on the main process for the best and the finished one, with the averaged weights if an
    average is kept.
    validation: called every `train.validation.every` steps on all processes, with the step module in evaluation mode and the same weights.
    accelerator: from `join`, where the model had to know it; None = join now.
    on_step(step, losses): called after every optimizer step with the losses of its last batch.
    Whatever the model draws (dropout) depends on (seed, step, process) only. A resumed run gives the losses of an uninterrupted one,
    bit for bit on CPU with the same number of processes and up to rounding with another. SIGTERM or SIGUSR1 on any process ends all of
    them after their step, with a checkpoint.

    Raises:
        GrexError: settings that cannot work, a run in `train.out` already, no room for checkpoints, a loss or gradient of any process that
            is not finite (on all processes).
    """
    if accelerator is None:
        check(config.train)
        accelerator = join(config.train)
    with determinism(accelerator.device):
        run = _Run(step, model, batches, config, accelerator)
        run.validation, run.save_model = validation, save_model
        return run.go(on_step)


def join(config: TrainConfig) -> Any:
    """Meet the other processes and return the Accelerator, whose device is this process's own.

    Raises:
        GrexError: a batch that the processes cannot share; as `start_accelerator`.
    """
    processes = num_processes()
    if config.batch_images % processes:
        raise fault(f"train.batch_images is {config.batch_images}", f"a multiple of the {processes} processes", "change one of them")
    return start_accelerator(config, config.batch_images // processes)


def check(config: TrainConfig) -> None:
    """Raise GrexError for numbers that make no run, and for an output folder that cannot be written or holds one already."""
    for name in ("steps", "batch_images", "accumulation", "log_every", "save_every", "keep"):
        if getattr(config, name) < 1:
            raise fault(f"train.{name} is {getattr(config, name)}", "a number from 1", "fix it")
    if not config.hang_s >= 0:
        raise fault(f"train.hang_s is {config.hang_s:g}", "seconds, or 0 for no limit", "fix it")
    check_writable(config.out)
    found = checkpoint.latest(config.out)
    if found is not None and not config.resume:
        raise fault(
            f"train.out {config.out} holds a run ({found.name})",
            "an empty folder",
            "set train.resume to true to go on, or choose another train.out",
        )


class _Run:
    """The parts of one training run."""

    validation: Validating | None = None
    save_model: Callable[[Path], object] | None = None

    def __init__(self, step: Any, model: nn.Module, batches: BatchSource, config: Config, accelerator: Any) -> None:
        self.config, self.accelerator = config.train, accelerator
        self.precision = agreed_precision(accelerator, config.train)
        step.precision = self.precision.precision
        optimizer = build_optimizer(model, config.train.optim, self.precision.precision, accelerator.device.type)
        chosen = {id(parameter) for parameter in optimized_parameters(optimizer)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        schedule = build_schedule(optimizer, config.train.optim, config.train.steps)
        with failing_together(accelerator):
            check_room(model, config.train)
        found, settings = checkpoint.latest(config.train.out), to_dict(config)
        self.start = checkpoint.restore_weights(accelerator, model, settings, found) if found is not None else checkpoint.Position()
        self.step, validates = step, config.train.validation.every > 0
        self.spare = spare_copy(step) if validates and zero_stage(accelerator) == 3 else None
        compile_parts(parts_of(step), config.train.compile, zero_stage(accelerator))
        wrapped, prepared = prepare(accelerator, step, optimizer)
        best = Best.of(config.train.validation) if validates else None
        self.state = checkpoint.RunState(accelerator, model, wrapped, prepared, schedule, self._average(model), settings, best)
        self.trained = [] if is_deepspeed(accelerator) else optimized_parameters(optimizer)
        self.batches = batches.share(accelerator.process_index, accelerator.num_processes) if accelerator.num_processes > 1 else batches
        self.num_workers, self.first = config.data.num_workers, self.start.step
        if found is not None:
            self.batches = self.batches.going_on(self.start.batches, self.start.images)
            checkpoint.restore(self.state, found)
        self.result = TrainResult(self.first, self.first, found, accelerator.is_main_process, best=best)
        self.interrupts, self.signal = Interrupts(), 0
        self.watch = Watch(config.train.out, accelerator.process_index, accelerator.num_processes, config.train.hang_s)
        if accelerator.is_main_process:
            checkpoint.prune(Path(config.train.out) / checkpoint.FOLDER, config.train.keep)
        accelerator.wait_for_everyone()

    def _average(self, model: nn.Module) -> WeightAverage | None:
        decay = self.config.optim.average_decay
        if decay and zero_stage(self.accelerator) == 3:
            raise fault(
                "train.optim.average_decay is set with ZeRO-3", "0 there: no process holds whole weights", "set it to 0, or use ZeRO-2"
            )
        return WeightAverage(model, decay) if decay else None

    def _after(self, step: int) -> checkpoint.Position:
        """Return where the run stands after a step."""
        return self.start.after(step - self.first, self.config)

    def go(self, on_step: Callable[[int, dict[str, float]], None] | None) -> TrainResult:
        """Run the steps that are left, then publish."""
        settings, rank = self.config, self.accelerator.process_index
        begin, end = self.start.batches, self._after(settings.steps).batches
        numbered = iter(stream(self.batches, begin, end, self.num_workers, seed=settings.seed, rank=rank))
        self.state.wrapped.train()
        log, window = RunLog(settings.out, self.first, settings.steps, self.accelerator.is_main_process), Window()
        log.say(f"precision: {self.precision.precision} on {self.accelerator.device.type} ({self.precision.reason})")
        if self.precision.warning:
            log.say(f"warning: {self.precision.warning}")
        if self.first:
            log.say(f"going on after step {self.first}")
        profile = StepProfile(parts_of(self.step), settings.out, settings.profile if self.accelerator.is_main_process else 0, log.say)
        try:
            with self.interrupts, self.watch:
                self._steps(numbered, log, window, on_step, profile)
        finally:
            profile.close()
            log.close()
        if self.save_model is not None and not self.result.interrupted:
            save = self.save_model
            self._write_model(lambda: checkpoint.publish(save, settings.out))
        return self.result

    def _steps(
        self,
        numbered: Iterator[Batch],
        log: RunLog,
        window: Window,
        on_step: Callable[[int, dict[str, float]], None] | None,
        profile: StepProfile,
    ) -> None:
        """Do the steps that are left, or those until a signal, with log lines and checkpoints."""
        settings, validated = self.config, self.config.validation.every if self.validation is not None else 0
        self.result.out_of_patience = self._out_of_patience()
        for step in range(self.first + 1, (self.first if self.result.out_of_patience else settings.steps) + 1):
            rates = [float(lr) for lr in self.state.schedule.get_last_lr()]
            losses = self._step(step, numbered, window)
            profile.step()
            self.watch.mark(step, "log and checkpoint")
            log.step(step)
            if self.signal and step < settings.steps:
                self.result.interrupted = name_of(self.signal)
            values: dict[str, float] = {}
            if validated and (step % validated == 0 or step == settings.steps):
                values = self._validate(step, log)
            ends = step == settings.steps or bool(self.result.interrupted) or self.result.out_of_patience
            saving = step % settings.save_every == 0 or ends
            if saving or values or step % settings.log_every == 0:
                line = window.close(self.accelerator) | {f"validation/{name}": value for name, value in values.items()}
                self.result.lines.append(log.write(step, line, rates))
            if saving:
                log.sync()
                self.result.checkpoint = checkpoint.save(self.state, settings.out, self._after(step), settings.keep)
            self.result.steps = step
            if on_step is not None:
                on_step(step, {name: float(value.detach()) for name, value in losses.items()})
            if ends:
                self._tell_end(step, log, window)
                return

    def _tell_end(self, step: int, log: RunLog, window: Window) -> None:
        """Say why the run ends here, how to go on, and what was left out."""
        settings, result = self.config, self.result
        if result.interrupted:
            log.say(
                f"stopped by {result.interrupted} after step {step} of {settings.steps}; its checkpoint is {result.checkpoint}; "
                "to go on, give the same command with --train.resume=true"
            )
            return
        if result.out_of_patience and result.best is not None:
            log.say(
                f"stopped after step {step} of {settings.steps}: {settings.validation.metric} did not get better in "
                f"{result.best.without_gain} validations (train.validation.patience); the best is that of step {result.best.step}"
            )
        if window.all_too_long:
            result.too_long = dict(window.all_too_long)
            log.say(self._list_too_long())

    def _out_of_patience(self) -> bool:
        return self.state.best is not None and self.state.best.exhausted(self.config.validation.patience)

    def _validate(self, step: int, log: RunLog) -> dict[str, float]:
        """Validate on all processes, keep the best model, and return the numbers. Nothing of it changes the training."""
        assert self.validation is not None and self.state.best is not None
        state, best, metric = self.state, self.state.best, self.config.validation.metric
        drawn = checkpoint.random_states()
        averaged = state.average.swap(state.model) if state.average is not None else nullcontext()
        with averaged, whole_copy(self.accelerator, self.step, self.spare) as module:
            values = self.validation(module, self.accelerator, lambda: self.watch.mark(step, "validating"))
        gain = best.take(values[metric], step, self.validation.higher_is_better)
        if gain and self.save_model is not None:
            save = self.save_model
            self._write_model(lambda: write_best(save, self.config.out, step, values))
        state.wrapped.train()
        checkpoint.set_random_states(drawn)
        self.result.out_of_patience = self._out_of_patience()
        before = "" if gain or best.value is None else f"; the best is {best.value:.4f} of step {best.step}"
        log.say(f"validation after step {step}: {metric} {values[metric]:.4f}{before}")
        return values

    def _list_too_long(self) -> str:
        times = sum(self.result.too_long.values())
        what = f"expressions with more tokens than model.generator allows were left out of generation ({times} times)"
        return list_ids(what, sorted(self.result.too_long))

    def _step(self, step: int, numbered: Iterator[Batch], window: Window) -> dict[str, Tensor]:
        """Do one optimizer step over `accumulation` batches."""
        settings, accelerator, state = self.config, self.accelerator, self.state
        losses: dict[str, Tensor] = {}
        for micro in range(settings.accumulation):
            self.watch.mark(step, "reading a batch")
            batch = to_device(next(numbered), accelerator.device)
            seed_all(settings.seed, MODEL_STREAM, self._after(step - 1).batches + micro, accelerator.process_index)
            with accelerator.accumulate(state.wrapped):
                self.watch.mark(step, "forward pass")
                losses = state.wrapped(batch, (step - 1) / settings.steps)
                self.watch.mark(step, "meeting the other processes")
                self._meet(losses, step, batch)
                self.watch.mark(step, "backward pass and optimizer")
                accelerator.backward(losses["total"])
                window.add(losses, batch)
                if accelerator.sync_gradients:
                    window.norms.append(self._clip(step, batch))
                state.optimizer.step()
                state.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            state.schedule.step()
            if state.average is not None:
                state.average.update(state.model)
        return losses

    def _clip(self, step: int, batch: Batch) -> Tensor | float:
        """Return the gradient norm, after clipping unless DeepSpeed has done so."""
        if is_deepspeed(self.accelerator):
            norm: Tensor | float = self.state.wrapped.get_global_grad_norm()  # type: ignore[operator]
        else:
            self.accelerator.unscale_gradients()
            norm = clip_gradients(self.trained, self.config.optim.clip)
        if self.precision.precision != "fp16" and not math.isfinite(float(norm)):  # fp16: the scaler skips the step and lowers its factor
            raise self._not_finite(f"gradient norm {float(norm)}", step, batch)
        return norm

    def _meet(self, losses: dict[str, Tensor], step: int, batch: Batch) -> None:
        """Stop all processes together where a loss of one is not finite, and hear whether one of them got a signal."""
        lost = ~torch.isfinite(losses["total"].detach())
        found = votes(self.accelerator, lost, self.interrupts.number)
        if any(row[0] for row in found):
            mine = found[self.accelerator.process_index][0]
            terms = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in losses.items())
            raise self._not_finite(terms if mine else "", step, batch)
        self.signal = max(row[1] for row in found)

    def _not_finite(self, what: str, step: int, batch: Batch) -> GrexError:
        """Return the error that all processes raise; what: what is not finite on this one, "" = nothing. All processes call it."""
        mine = f"{what}; image ids {', '.join(batch.image_ids)}; expression ids {', '.join(batch.expression_ids)}" if what else ""
        found = gathered(self.accelerator, mine)
        given = "; ".join(f"rank {rank}: {text}" if len(found) > 1 else text for rank, text in enumerate(found) if text)
        kept = checkpoint.latest(self.config.out) or "none yet"
        remedy = f"look at these samples, lower train.optim.lr or train.optim.clip; last good checkpoint: {kept}"
        return fault(f"step {step}: not finite: {given}", "finite losses and gradients", remedy)

    def _write_model(self, write: Callable[[], None]) -> None:
        """Let the main process write whole weights, averaged ones if an average is kept; all processes call it."""
        state = self.state
        with whole_weights(self.accelerator, stored_parameters(state.model)):
            if self.accelerator.is_main_process:
                with state.average.swap(state.model) if state.average is not None else nullcontext():
                    write()
        self.accelerator.wait_for_everyone()


def num_processes() -> int:
    """Return the number of processes that the launcher started."""
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
