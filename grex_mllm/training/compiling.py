"""`train.compile`: torch.compile for named parts of the model, block by block."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from grex_mllm.errors import fault


def compile_parts(parts: dict[str, nn.Module], names: list[str], zero_stage: int | None) -> None:
    """Compile the named parts in place when they first run; names of weights stay.

    A part that repeats blocks is compiled block by block: one compilation serves all blocks of one shape, and what stands between them may
    be any Python.

    Raises:
        GrexError: a part that does not exist; ZeRO-3, whose hooks fetch weights inside the blocks.
    """
    unknown = [name for name in names if name not in parts]
    if unknown:
        raise fault(f"train.compile names {', '.join(unknown)}", f"parts of this model: {', '.join(parts)}", "fix the names")
    if names and zero_stage == 3:
        raise fault("train.compile with ZeRO-3", "ZeRO-1, ZeRO-2 or none: ZeRO-3 fetches weights within", "set train.compile to []")
    for name in names:
        for block in list(_blocks(parts[name])) or [parts[name]]:
            block.compile()


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules with a forward of their own among those that stand in lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for entry in child:
                yield from [entry] if type(entry).forward is not nn.Module.forward else _blocks(entry)
        else:
            yield from _blocks(child)
