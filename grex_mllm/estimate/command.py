"""What `grex estimate` does: count, and print a table or JSON."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from grex_mllm.config import Config, load_config
from grex_mllm.errors import fault
from grex_mllm.estimate.fitting import Case, memory_with, smallest_change
from grex_mllm.estimate.memory import OFFLOADS, ROWS, Memory, Plan, memory

GIB = 2**30
QUANTISATIONS = ("none", "int8", "nf4")


@dataclass(frozen=True)
class Machine:
    """gpus: all of them.  gpu_memory_gb: of one, in units of 2^30 bytes.  samples_per_s: all together; or tflops of one and the used share.

    device: cuda or cpu.
    """

    gpus: int = 1
    gpu_memory_gb: float = 80.0
    samples_per_s: float | None = None
    tflops: float | None = None
    utilisation: float = 0.35
    device: str = "cuda"


def run_estimate(
    config: str | None, overrides: list[str], machine: Machine, *, samples: int | None, objects: int, tokens: int, as_json: bool
) -> int:
    """Print what a configuration needs on a machine, and return the exit status.

    samples: image-expression pairs of an epoch.  objects: of an image.  tokens: of an expression to generate, with BOS and EOS.

    Raises:
        GrexError: numbers that make no training, a configuration that cannot be built.
    """
    settings = load_config(config, overrides)
    _check(settings, machine)
    found = estimate(settings, machine, samples=samples, objects=objects, tokens=tokens)
    print(json.dumps(found, indent=1) if as_json else _text(found))
    return 0


def estimate(settings: Config, machine: Machine, *, samples: int | None = None, objects: int = 8, tokens: int = 16) -> dict[str, Any]:
    """Return everything that is printed, as plain numbers: bytes, parameters, floating-point operations, seconds."""
    from grex_mllm.estimate.count import count
    from grex_mllm.estimate.model import Load, standing_alone

    alone, notes = standing_alone(settings)
    load = Load(settings.train.batch_images // machine.gpus, objects, tokens)
    precision = _precision(settings, machine.device)
    generator = alone.model.generator
    has_lm = getattr(generator, "lm", "tiny") != "tiny"
    checkpointing = bool(getattr(generator, "gradient_checkpointing", False))
    counted = {}
    for on in (False, True) if has_lm else (checkpointing,):
        some = deepcopy(alone)
        if has_lm:
            some.model.generator.gradient_checkpointing = on
        counted[on] = count(some, load, device=machine.device, precision=precision)
    case = Case(
        replace(_plan(settings), quantisation=getattr(generator, "quantisation", "none")), machine.gpus, load.images, checkpointing, has_lm,
        counted.get(True, counted[checkpointing]), counted.get(False, counted[checkpointing]),
    )  # fmt: skip
    asked = counted[checkpointing]
    each = settings.data.expressions_per_image
    per_sample = asked.flops / (load.images * each)
    need = memory_with(case, ())
    fits = smallest_change(case, machine.gpu_memory_gb * GIB)
    return {
        "notes": [*notes, f"{precision}, {load.images} images of {objects} objects, {each} expressions an image, {tokens} tokens each"],
        "gpus": machine.gpus,
        "gpu_memory_bytes": int(machine.gpu_memory_gb * GIB),
        "parameters": {name: {"total": part.total, "trainable": part.trainable} for name, part in asked.parts.items()},
        "as_configured": _row(need) | {"plan": _name(case.plan)},
        "by_stage": _by_stage(case),
        "by_option": _by_option(case),
        "flops": {"forward_per_sample": asked.forward_flops / (load.images * each), "per_sample": per_sample},
        "time": _time(settings, machine, per_sample, samples),
        "fits": None if fits is None else {"changes": [change.name for change in fits[0]], **_row(fits[1])},
    }  # fmt: skip


def _check(settings: Config, machine: Machine) -> None:
    if machine.gpus < 1 or settings.train.batch_images % machine.gpus:
        raise fault(f"--gpus {machine.gpus}", f"a number that divides train.batch_images {settings.train.batch_images}", "change one")
    if machine.device not in ("cuda", "cpu"):
        raise fault(f"--device {machine.device}", "cuda or cpu", "choose one of them")
    if not 0 < machine.utilisation <= 1:
        raise fault(f"--utilisation {machine.utilisation}", "a share above 0, at most 1", "fix it")


def _precision(settings: Config, device: str) -> str:
    """Return the precision that a training would compute in: on GPUs `auto` is bf16, on a CPU what this machine multiplies fast."""
    if device == "cpu":
        from grex_mllm.precision import resolve_precision

        return resolve_precision(settings.train.precision, device).precision
    return "bf16" if settings.train.precision == "auto" else settings.train.precision


def _plan(settings: Config) -> Plan:
    """Return the plan that `train.deepspeed` stands for."""
    if settings.train.deepspeed is None:
        return Plan()
    from grex_mllm.training.engine import check_deepspeed

    zero = check_deepspeed(settings.train.deepspeed)["zero_optimization"]
    weights, optimizer = "offload_param" in zero, "offload_optimizer" in zero
    plan = Plan(stage=zero["stage"], offload="all" if weights else "optimizer" if optimizer else "none")
    bucket, prefetch = zero.get("reduce_bucket_size", "auto"), zero.get("stage3_prefetch_bucket_size", "auto")
    if bucket != "auto":
        plan = replace(plan, bucket=bucket)
    if prefetch != "auto":
        plan = replace(plan, prefetch=prefetch)
    plan = replace(plan, live=zero.get("stage3_max_live_parameters", plan.live))
    return replace(plan, overlap=bool(zero.get("overlap_comm", False)))


def _by_stage(case: Case) -> list[dict[str, Any]]:
    counted = case.with_checkpointing if case.checkpointing else case.without_checkpointing
    rows = []
    for stage in (None, 1, 2, 3):
        for offload in OFFLOADS:
            plan = replace(case.plan, stage=stage, offload=offload, quantisation="none" if stage == 3 else case.plan.quantisation)
            if (offload == "optimizer" and stage is None) or (offload == "all" and stage != 3):
                continue
            rows.append({"plan": _name(plan)} | _row(memory(counted, plan, case.gpus)))
    return rows


def _by_option(case: Case) -> list[dict[str, Any]]:
    """Return rows of quantisation and checkpointing under the configured engine; without a language model of a folder there are none."""
    rows = []
    for quantisation in QUANTISATIONS if case.has_lm else ():
        for on, counted in ((False, case.without_checkpointing), (True, case.with_checkpointing)):
            plan = replace(case.plan, quantisation=quantisation)
            if quantisation == "none" or plan.stage != 3:
                rows.append({"plan": f"{_name(plan)}{', checkpointing' if on else ''}"} | _row(memory(counted, plan, case.gpus)))
    return rows


def _name(plan: Plan) -> str:
    engine = "no ZeRO" if plan.stage is None else f"ZeRO-{plan.stage}"
    offload = {"none": "", "optimizer": " + optimizer on CPU", "all": " + all on CPU"}[plan.offload]
    return engine + offload + ("" if plan.quantisation == "none" else f", {plan.quantisation}")


def _row(need: Memory) -> dict[str, int]:
    return {name: getattr(need, name) for name in ROWS} | {"total": need.total}


def _time(settings: Config, machine: Machine, flops: float, samples: int | None) -> dict[str, float | None]:
    """Return pairs a second and seconds of an epoch and of the whole training; None where nothing was given to compute them from."""
    rate = machine.samples_per_s
    if rate is None and machine.tflops is not None:
        rate = machine.gpus * machine.tflops * 1e12 * machine.utilisation / flops
    images = settings.train.steps * settings.train.batch_images * settings.train.accumulation
    pairs = images * settings.data.expressions_per_image
    return {
        "samples_per_s": rate,
        "epoch_s": samples / rate if rate and samples else None,
        "training_s": pairs / rate if rate else None,
    }


def _text(found: dict[str, Any]) -> str:
    lines = [*found["notes"], "", f"{'parameters':24}{'total':>16}{'trainable':>16}"]
    parts = found["parameters"]
    lines += [f"{name:24}{part['total']:16,}{part['trainable']:16,}" for name, part in parts.items()]
    lines.append(f"{'all':24}" + "".join(f"{sum(part[kind] for part in parts.values()):16,}" for kind in ("total", "trainable")))
    lines += ["", f"GiB of one of {found['gpus']} GPUs" + " " * 20 + "".join(f"{name:>12}" for name in (*ROWS, "total"))]
    rows = [found["as_configured"] | {"plan": f"as configured: {found['as_configured']['plan']}"}, *found["by_stage"], *found["by_option"]]
    lines += [f"{row['plan']:40}" + "".join(f"{row[name] / GIB:12.2f}" for name in (*ROWS, "total")) for row in rows]
    flops, time = found["flops"], found["time"]
    lines += ["", f"a sample (image and expression): {flops['forward_per_sample'] / 1e9:,.0f} GFLOP forward, "
                  f"{flops['per_sample'] / 1e9:,.0f} GFLOP with the backward pass"]  # fmt: skip
    if time["samples_per_s"]:
        epoch = "" if time["epoch_s"] is None else f"{time['epoch_s'] / 3600:,.1f} hours an epoch, "
        lines.append(f"at {time['samples_per_s']:,.1f} samples/s: {epoch}{time['training_s'] / 3600:,.1f} hours for train.steps")
    lines.append(_fit_text(found))
    return "\n".join(lines)


def _fit_text(found: dict[str, Any]) -> str:
    fits, size = found["fits"], f"{found['gpu_memory_bytes'] / GIB:g} GiB"
    if fits is None:
        return f"does not fit {size} with any of the changes that are tried: take more or larger GPUs, smaller images or a smaller model"
    if not fits["changes"]:
        return f"fits {size} as configured ({fits['total'] / GIB:.1f} GiB, 1.5 GiB left for CUDA and fragmentation)"
    return f"smallest change that fits {size} ({fits['total'] / GIB:.1f} GiB): {'; '.join(fits['changes'])}"
