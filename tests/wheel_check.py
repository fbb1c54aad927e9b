"""Use an installed grex_mllm as its user would: run in an EMPTY folder, with nothing of the repository on the path.

    python wheel_check.py

Runs `grex --help`, `python -m grex_mllm`, a shrunken `grex demo`, and `grex score` with every shipped protocol. It imports nothing of the
tests, so that the interpreter of an empty environment can run it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# The demo's own configuration with few steps; the scenes and candidates of its test split are module constants.
SHRUNKEN = [
    "--train.steps=2", "--train.batch_images=2", "--train.save_every=2", "--train.pretraining.steps=1", "--train.pretraining.scenes=1",
    "--train.precision=fp32", "--model.decoder.image_layers=1", "--model.decoder.language_layers=1", "--model.generator.num_layers=1",
    "--model.generator.max_new_tokens=6", "--train.optim.average_decay=0",
]  # fmt: skip
CONSTANTS = {"demo": {"TEST_SCENES": 3, "EXPRESSIONS_PER_SCENE": 2, "LISTENER_CANDIDATES": 2}, "training.run": {"CORPUS_LINES": 400}}
CONSTANTS["training.pretraining"] = {"TEXT_LINES": 400}
SHRINK = f"""
import importlib, sys
for name, constants in {CONSTANTS!r}.items():
    module = importlib.import_module("grex_mllm." + name)
    for constant, value in constants.items():
        getattr(module, constant)
        setattr(module, constant, value)
importlib.import_module("grex_mllm.metrics.language").java_missing = lambda: "left out: it takes seconds"
from grex_mllm.cli import main
sys.exit(main(sys.argv[1:]))
"""
# The demo's predictions, scored with protocols that are given by their names in the repository; METEOR, which takes seconds, with one.
SCORE = """
import sys
from grex_mllm.cli import main
from grex_mllm.metrics import language
java_missing = language.java_missing
for name in sys.argv[1:]:
    language.java_missing = java_missing if name == "greg.yaml" else lambda: "left out: it takes seconds"
    words = ["score", "demo/predictions.jsonl", "--data", "demo/data", "--split", "test", "--protocol", "eval/protocols/" + name]
    if main([*words, "--out", name + ".json"]):
        sys.exit(name)
"""


def run(*words: str) -> str:
    """Run a program of this interpreter; return what it printed. Raises where it fails."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    """Do everything and say so."""
    assert not any(Path.cwd().iterdir()), f"{Path.cwd()} is not empty"
    place = run("-c", "import grex_mllm; print(grex_mllm.__file__)").strip()
    print(f"package: {place}")
    from grex_mllm.shipped import CONFIG_FOLDER, PROMPT_FOLDER, PROTOCOL_FOLDER, ROOT

    assert ROOT.is_relative_to(Path(place).parent), f"the files at {ROOT} are not those of the package"
    assert run("-m", "grex_mllm", "--help") == run("-m", "grex_mllm")
    assert "usage: grex VERB" in run("-m", "grex_mllm")
    script = Path(sys.executable).parent / ("grex.exe" if sys.platform == "win32" else "grex")
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout if script.exists() else ""
    print(f"grex --help: {'as python -m grex_mllm' if 'usage: grex VERB' in shown else 'no script in this environment'}")
    prompts = {path.parent.name for path in PROMPT_FOLDER.rglob("*.yaml")}
    assert prompts == {"grec", "gres", "greg", "count", "exists", "generator"}, prompts
    run("-m", "grex_mllm", "data", "export", "scenes", "--length", "2", "--split", "test")
    run("-m", "grex_mllm", "data", "check", "scenes")
    names = [f"configs/{file.name}" for file in sorted(CONFIG_FOLDER.glob("*.yaml"))[::4]]
    shown = run("-c", "import sys; from grex_mllm.config import load_config; [load_config(name) for name in sys.argv[1:]]", *names)
    assert len(names) > 20 and all(f"{name} is not in this folder; taking" in shown for name in names), shown
    shown = run("-c", SHRINK, "demo", "--out", "demo", *SHRUNKEN)
    page = Path("demo/report.html").read_text(encoding="utf-8")
    assert "<style>" in page and "<script>" in page and "published" in page.lower(), shown
    print("a shrunken demo ran")
    protocols = sorted(PROTOCOL_FOLDER.glob("*.yaml"))
    assert len(protocols) >= 8
    shown = run("-c", SCORE, *(protocol.name for protocol in protocols))
    assert shown.count("taking the one that comes with grex_mllm") == len(protocols), shown
    assert all(Path(f"{protocol.name}.json").stat().st_size > 100 for protocol in protocols)
    assert shutil.which("java") is None or '"METEOR": 0.' in Path("greg.yaml.json").read_text(encoding="utf-8")
    print(f"{len(protocols)} protocols scored")


if __name__ == "__main__":
    main()
