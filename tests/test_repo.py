"""Enforce CONTRIBUTING.md: sizes, names, safety, light import, import arrows, links."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "grex_mllm"
CODE_FOLDERS = ("grex_mllm", "data_prep", "tests", "benchmarks")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".json", ".toml", ".css", ".js", ".cfg", ".txt", ""}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
BANNED_NAMES = {"utils", "util", "misc", "helpers", "helper", "manager", "legacy", "common", "v2"}
# One number per room: an import never goes to a higher number. Rooms of one number may meet, without a circle, except those APART.
LAYERS = {
    "errors": 0,
    "arguments": 0,
    "augmentation": 0,
    "compat": 0,
    "encoders": 0,
    "shipped": 0,
    "config": 0,
    "entries": 0,
    "types": 0,
    "ops": 0,
    "draw": 0,
    "marks": 0,
    "progress": 0,
    "precision": 0,
    "writing": 0,
    "data": 1,
    "metrics": 1,
    "models": 2,
    "predictors": 2,
    "zeroshot": 2,
    "ask": 3,
    "dialogue": 3,
    "convert": 3,
    "exchange": 3,
    "export": 3,
    "predict": 3,
    "score": 3,
    "search": 3,
    "training": 4,
    "estimate": 4,
    "report": 4,
    "compare": 4,
    "error_analysis": 4,
    "processes": 4,
    "job": 5,
    "serve": 3,
    "demo": 5,
    "cli": 5,
    "__main__": 6,
    "__init__": 6,
}
APART = {"data", "metrics"}
RUNS_CODE = {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "os.system"}


def python_files() -> list[Path]:
    return sorted(file for folder in CODE_FOLDERS for file in (ROOT / folder).rglob("*.py") if "__pycache__" not in file.parts)


def text_files() -> list[Path]:
    """Every file that git tracks or would track; all of the tree where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        files = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        files = [file for file in ROOT.rglob("*") if not any(part.startswith(".venv") for part in file.parts)]
    return [file for file in files if file.is_file() and file.suffix in TEXT_SUFFIXES]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_files_are_short() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in python_files()}
    assert len(lengths) > 5, "no code found: the folders of this test are wrong"
    assert {name: count for name, count in lengths.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for file in python_files():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    long[f"{name_of(file)}:{node.lineno} {node.name}"] = count
    assert long == {}


def test_modules_say_what_they_are() -> None:
    silent = [name_of(file) for file in python_files() if file.read_text(encoding="utf-8").strip() and not ast.get_docstring(tree_of(file))]
    assert silent == []


def test_names_say_what_they_hold() -> None:
    vague = [name_of(file) for file in python_files() if BANNED_NAMES & {part.removesuffix(".py") for part in file.relative_to(ROOT).parts}]
    assert vague == []


def test_no_bare_except() -> None:
    bare = [
        f"{name_of(file)}:{node.lineno}"
        for file in python_files()
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


def test_no_silent_except() -> None:
    """`except ...: pass` hides a fault, unless what follows raises: count it, report it, or suppress the expected with contextlib."""
    silent = []
    for file in python_files():
        bodies = [getattr(node, name, None) for node in ast.walk(tree_of(file)) for name in ("body", "orelse", "finalbody")]
        for body in (body for body in bodies if isinstance(body, list)):
            for line, following in zip(body, [*body[1:], None]):
                if isinstance(line, ast.Try) and not isinstance(following, ast.Raise):
                    passed = [handler for handler in line.handlers if all(isinstance(step, ast.Pass) for step in handler.body)]
                    silent += [f"{name_of(file)}:{handler.lineno}" for handler in passed]
    assert silent == []


def test_no_unfinished_marks() -> None:
    marks = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"]) + r")\b")
    found = [f"{name_of(file)}: {hit.group()}" for file in text_files() if (hit := marks.search(file.read_text(encoding="utf-8")))]
    assert found == []


def test_no_paths_of_one_machine() -> None:
    machine = re.compile(r"(?<![\w.}~-])/(?:root|home|work|tmp|mnt|opt|scratch|Users|media)/[\w.]|[A-Z]:\\\\Users")
    found = [f"{name_of(file)}: {hit.group()}" for file in text_files() if (hit := machine.search(file.read_text(encoding="utf-8")))]
    assert found == []


def test_nothing_loads_code_from_files() -> None:
    """A pickle or a checkpoint from the net runs code: torch.load needs weights_only=True, pickle a restricted Unpickler."""
    unsafe = []
    for file in python_files():
        for function, call in calls(tree_of(file)):
            weights_only = {word.arg: ast.unparse(word.value) for word in call.keywords}.get("weights_only")
            loads = function == "torch.load" and weights_only != "True"
            own = function == "pickle.loads" and file.is_relative_to(ROOT / "tests")  # of bytes that the test itself made
            if loads or weights_only == "False" or (function in RUNS_CODE and not own):
                unsafe.append(f"{name_of(file)}:{call.lineno} {function}")
    assert unsafe == []


def test_no_device_is_fixed() -> None:
    fixed = [
        f"{name_of(file)}:{call.lineno}"
        for file in PACKAGE.rglob("*.py")
        for function, call in calls(tree_of(file))
        if function.endswith(".cuda")
    ]
    assert fixed == []


def test_private_names_of_libraries_stand_in_compat_only() -> None:
    nodes = [(file, node) for file in sorted(PACKAGE.rglob("*.py")) for node in ast.walk(tree_of(file))]
    own = {"_exit"} | {node.name for _, node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}  # os._exit is public
    own |= {node.attr for _, node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}
    private = re.compile(r"_(?!_)|__compatible_ops__")
    found = [(file, node) for file, node in nodes if isinstance(node, ast.Attribute) and private.match(node.attr) and node.attr not in own]
    assert [f"{name_of(file)}:{node.lineno} {ast.unparse(node)}" for file, node in found if file.name != "compat.py"] == []


def imported_rooms(file: Path) -> set[str]:
    """Names of the package's rooms that a file imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("grex_mllm.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno} imports relatively; write the full name"
            if node.module == "grex_mllm":
                rooms |= {alias.name for alias in node.names} & set(LAYERS)
            elif node.module and node.module.startswith("grex_mllm."):
                rooms.add(node.module.split(".")[1])
    return rooms


def test_import_arrows_run_downwards() -> None:
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert room in LAYERS, f"{name_of(file)} is a room without a place; give it one in LAYERS"
        for other in imported_rooms(file) - {room}:
            assert other in LAYERS, f"{name_of(file)} imports grex_mllm.{other}, which has no place in LAYERS"
            if LAYERS[other] > LAYERS[room] or (room in APART and other in APART):
                wrong.append(f"{name_of(file)} -> {other}")
    assert wrong == []


def test_rooms_form_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if not room.startswith("__"):
            arrows.setdefault(room, set()).update(imported_rooms(file) - {room})
    refuse_circles(arrows)


def test_modules_form_no_circle() -> None:
    """Imports within functions and for type checking count; a package's `__init__` is a module like the others."""
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in PACKAGE.rglob("*.py")}
    arrows: dict[str, set[str]] = {}
    for module, file in files.items():
        others = arrows[module] = set()
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Import):
                others |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                others |= {name if name in files else str(node.module) for name in names}
        others.intersection_update(files)
    refuse_circles(arrows)


def refuse_circles(arrows: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        raise AssertionError(f"these import each other in a circle: {' <- '.join(error.args[1])}") from None


def seconds_of(code: str, repeats: int = 3) -> float:
    """Least CPU time of a fresh interpreter, less that of an empty one: the wall clock tells more about a busy machine."""

    def least(text: str) -> float:
        times = []
        for _ in range(repeats):
            before = os.times()
            subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True, capture_output=True)
            after = os.times()
            times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        return min(times)

    return least(code) - least("pass")


HEAVY = ("torch", "transformers", "deepspeed", "numpy", "PIL", "pycocotools", "pycocoevalcap", "jsonargparse")


@pytest.mark.parametrize("module", ["grex_mllm", "grex_mllm.types", "grex_mllm.config", "grex_mllm.errors"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_import_is_fast() -> None:
    assert seconds_of("import grex_mllm") < 0.3


def test_help_is_fast_and_light() -> None:
    code = "import sys; sys.argv = ['grex', '--help']\nfrom grex_mllm.cli import main\n"
    code += "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    assert seconds_of(code) < 1.0
    run = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = (3, 9); $2"\n')
    old.chmod(0o755)
    run = subprocess.run(["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode != 0 and not (tmp_path / ".venv").exists()
    assert "is Python 3.9; expected 3.11 or newer; run: make setup PYTHON=" in run.stderr


def test_readme_links_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_shipped_yaml_opens_with_a_comment() -> None:
    """Command, hardware, time and result, or "not yet run at this scale"; protocols and prompts say what they are."""
    bare = [
        name_of(file)
        for folder in ("configs", "eval")
        for file in (ROOT / folder).rglob("*.yaml")
        if not file.read_text(encoding="utf-8").startswith("#")
    ]
    assert bare == []


def test_shipped_configs_load() -> None:
    from grex_mllm.config import load_config

    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        load_config(file)


@pytest.mark.parametrize("given", [None, "0"])
def test_torch_asks_for_huge_pages_unless_told_otherwise(given: str | None) -> None:
    name = "THP_MEM_ALLOC_ENABLE"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({} if given is None else {name: given})
    code = f"import os, grex_mllm; print(os.environ[{name!r}])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (given or "1")
