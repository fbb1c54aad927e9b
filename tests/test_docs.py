"""The documentation: links lead somewhere, names exist, snippets and the notebook run, the site builds strictly and fetches nothing.

Commands of the pages are run by tests/test_commands.py. Snippets of a page are run in order, as one program, in a folder with a tiny random
model, pictures, and a dataset folder under the names that the pages use.
"""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT
from PIL import Image
from test_search import scenes
from tiny import tiny_speaker
from tiny_folder import tiny_folder

from grex_mllm.config import load_config, save_config
from grex_mllm.metrics import METRICS, entry
from grex_mllm.models.grex import GrexModel

DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "quick_start.ipynb"
PAGES = sorted(DOCS.glob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SNIPPETS = [file for file in (ROOT / "README.md", *PAGES) if PYTHON.search(file.read_text(encoding="utf-8"))]


def site_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", DOCS / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> GrexModel:
    return tiny_speaker(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def place(speaker: GrexModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the pages name."""
    speaker.save_pretrained(tmp_path / "runs" / "demo")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(tmp_path / "scene.png")
    scenes(tmp_path / "photographs", 4)
    tiny_folder(tmp_path / "data" / "grefcoco")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as the site makes them."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}


@pytest.mark.parametrize("file", [*PAGES, NOTEBOOK], ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    site, text = site_pages(), file.read_text(encoding="utf-8")
    text = site.notebook_page(file) if file == NOTEBOOK else text
    site.followed(text, f"docs/{file.name}")
    for _, _, target in site.LINK.findall(text):
        page, _, anchor = target.partition("#")
        if anchor and "://" not in target:
            other = (DOCS / page if page else file).read_text(encoding="utf-8")
            assert anchor in slugs(other), f"{target} names no heading"


def test_a_dead_link_is_noticed() -> None:
    site = site_pages()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.md"):
        site.followed("see [that](nowhere.md)", "docs/index.md")
    assert site.followed("[a](../configs/README.md) [b](../LICENSE) [c](quick_start.ipynb)", "docs/x.md") == (
        "[a](repository/configs.md) b [c](quick_start_notebook.md)"
    )
    assert site.followed("[a](configs/README.md#x) ![p](docs/demo.png)", "README.md") == "[a](configs.md#x) ![p](../demo.png)"
    assert site.followed("```\n[a](nowhere)\n```\n", "docs/x.md") == "```\n[a](nowhere)\n```\n"


def test_every_page_stands_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = [place for part in yaml.safe_load(text)["nav"] for entries in part.values() for one in entries for place in _places(one)]
    assert len(named) == len(set(named))
    assert set(named) == {file.name for file in PAGES} | {"quick_start_notebook.md"} | set(site_pages().PAGES.values())


def _places(one: Any) -> list[str]:
    return [one] if isinstance(one, str) else list(one.values())


def test_names_of_the_api_page_exist_and_are_told() -> None:
    names = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) > 30
    for name in names:
        module, _, attribute = name.rpartition(".")
        told = getattr(import_module(module), attribute).__doc__
        assert told and len(told.split()) > 3, name


def test_every_metric_stands_on_its_page() -> None:
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    other = {"bal-acc": "balanced acc", "count acc": "accuracy", "count MAE": "MAE", "REC Pr@0.5": "Classic REC"}
    for name in METRICS:
        for column in entry(name).COLUMNS:
            title = other.get(column.name, re.sub(r"^Pr@0\.\d$", "Pr@X", column.name))
            assert title.split(",")[0].replace("BLEU-1", "BLEU-n").replace("BLEU-4", "BLEU-n") in text, f"{name}: {column.name}"


@pytest.mark.parametrize("file", SNIPPETS, ids=lambda file: file.name)
def test_python_snippets_run(file: Path, place: Path, speaker: GrexModel, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = PYTHON.findall(file.read_text(encoding="utf-8"))
    program = place / "snippets.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    if any("httpx2" in block for block in blocks):
        serve_in_process(speaker, place, monkeypatch)
    runpy.run_path(str(program))


def serve_in_process(model: GrexModel, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients of the server's usual address reach an application in this process, with the folder `photographs`."""
    pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")
    import httpx2
    from starlette.testclient import TestClient

    from grex_mllm.search import open_index
    from grex_mllm.serve.app import make_app
    from grex_mllm.serve.folder import Folder

    app = make_app(model, "tiny", folder=Folder(open_index(model, place / "photographs")))
    monkeypatch.setattr(httpx2, "Client", lambda base_url, timeout: TestClient(app, base_url=base_url))


def test_the_notebook_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From drawn scenes to scores, with a model that is there; its numbers are in the cell with the tag `parameters`."""
    run_notebook(place, {"MODEL": "runs/demo", "SCENES": 2})
    scored(place, capsys.readouterr().out)


@pytest.mark.long
def test_the_notebook_trains_where_there_is_no_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shrink import shrink_run

    monkeypatch.setattr("grex_mllm.training.run.CORPUS_LINES", 300)
    (place / "configs").mkdir()
    save_config(shrink_run(load_config(ROOT / "configs" / "demo.yaml")), place / "configs" / "demo.yaml")
    run_notebook(place, {"MODEL": "none", "STEPS": 1, "LANGUAGE_STEPS": 1, "SCENES": 2})
    scored(place, capsys.readouterr().out)
    assert (place / "runs" / "notebook" / "model" / "model.safetensors").is_file()


def scored(place: Path, said: str) -> None:
    assert "parameters" in said and "always_empty" in said.replace(" ", "_")
    results = json.loads((place / "runs" / "notebook" / "results.json").read_text(encoding="utf-8"))
    assert results["results"]["strict"]["gres"]["num_samples"] == 12


def run_notebook(place: Path, parameters: dict[str, Any]) -> None:
    """Run the cells in order as one program, with other parameters. What a cell ends with must be an expression that shows itself."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "clear the outputs before it is committed"
    texts = []
    for cell in cells:
        text = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            names = set(re.findall(r"\b([A-Z_]{2,})\b(?=[^#\n]*=)", text))
            assert parameters.keys() <= names, names
            text += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        texts.append(text)
    (place / "notebook.py").write_text("\n\n".join(texts), encoding="utf-8")
    runpy.run_path(str(place / "notebook.py"))


def test_the_gallery_is_what_its_program_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DOCS / "gallery.py"), "--out", str(tmp_path)], check=True, cwd=ROOT, timeout=120)
    for file in sorted((DOCS / "gallery").iterdir()):
        kept, drawn = (np.asarray(Image.open(folder / file.name), np.int16) for folder in (DOCS / "gallery", tmp_path))
        assert kept.shape == drawn.shape and np.abs(kept - drawn).mean() < 2, f"{file.name} is old: run docs/gallery.py"


class Loads(HTMLParser):
    """Collect what a page fetches by itself: sources, style sheets, scripts; not what a reader may click."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = [given.get("src"), given.get("srcset"), given.get("poster"), given.get("data") if tag == "object" else None]
        if tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            fetched.append(given.get("href"))
        self.found += [place for place in fetched if place]


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        if importlib.util.find_spec(package.split(".")[0]) is None:
            pytest.skip("needs the extra docs: pip install 'grex-mllm[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) + 8
    for page in pages:
        outside = [place for place in Loads(page.read_text(encoding="utf-8")).found if re.match(r"(?:https?:)?//", place)]
        assert outside == [], page.name
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert 'id="grex_mllm.models.grex.GrexModel.ground"' in api and "threshold" in api
