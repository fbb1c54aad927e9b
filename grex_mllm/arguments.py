"""How the signature and docstring of a verb's function become its options on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

from grex_mllm.errors import fault

POSITIONAL = "positional"  # given without a flag
AS_WRITTEN = "as written"  # read by the verb itself, not as YAML
Place = Annotated[str, POSITIONAL]
Places = Annotated[list[str], POSITIONAL]


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Take the dotted flags (--a.b=c, --a.b c) out; they belong to the configuration. Returns the others, and those as --a.b=c."""
    own, overrides = [], []
    items = iter(arguments)
    for item in items:
        if item.startswith("--") and "." in item.split("=", 1)[0]:
            value = None if "=" in item else next(items, None)
            if "=" not in item and value is None:
                raise fault(f"{item} without a value", f"{item}=VALUE", "give the value")
            overrides.append(item if "=" in item else f"{item}={value}")
        else:
            own.append(item)
    return own, overrides


def _underscores(item: str) -> str:
    name, equals, value = item.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") and " " not in name else item


def parsed(verb: str, function: Callable[..., int], arguments: list[str]) -> dict[str, Any]:
    """Return the arguments of a verb's function by name.

    Raises:
        GrexError: an option that the verb does not have, one that is missing, or a value of the wrong type.
    """
    from jsonargparse import ArgumentError

    try:
        return vars(_parser(verb, function).parse_args([_underscores(item) for item in arguments]))
    except ArgumentError as error:
        raise fault(f"{error}".rstrip("."), "the options of this verb", f"see grex {verb} --help") from None


def _parser(verb: str, function: Callable[..., int]) -> Any:
    import inspect

    from jsonargparse import ArgumentParser

    description = (function.__doc__ or "").split("Args:")[0].strip()
    parser = ArgumentParser(prog=f"grex {verb}", description=description, exit_on_error=False)
    parameters, hints = inspect.signature(function).parameters, get_type_hints(function, include_extras=True)
    texts = _argument_texts(function)
    special: set[str | int] = {"overrides"}
    for name, parameter in parameters.items():
        marks, required = getattr(hints[name], "__metadata__", ()), parameter.default is inspect.Parameter.empty
        many = "list[" in str(hints[name])
        options: dict[str, Any] = {"help": texts.get(name, "")} | ({"nargs": "+"} if many else {})
        if name == "overrides" or not (marks or many or parameter.default is False):
            continue
        special.add(name)
        if parameter.default is False:
            parser.add_argument(f"--{name}", action="store_true", **options)
        elif POSITIONAL in marks:
            parser.add_argument(name, **options)
        else:
            options["required" if required else "default"] = True if required else None
            parser.add_argument(f"--{name}", **options)
    parser.add_function_arguments(function, as_group=False, skip=special)
    return parser


def _argument_texts(function: Callable[..., int]) -> dict[str, str]:
    lines = (line.strip().partition(": ") for line in (function.__doc__ or "").partition("Args:")[2].splitlines())
    return {name: text for name, colon, text in lines if colon}
