"""Hook of mkdocs (mkdocs.yml): makes pages of the repository's other documents and of the notebook, and follows their links.

Documents stay where they belong and link as on any code host (`../configs/README.md`). In the site they are pages under repository/; a link
to a file that is no page becomes its name. A notebook is shown as its texts and code; it is run in a notebook, or by a test.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # a document of the repository -> its page
    "README.md": "repository/readme.md",
    "CONTRIBUTING.md": "repository/contributing.md",
    "CHANGELOG.md": "repository/changelog.md",
    **{
        f"{folder}/README.md": f"repository/{folder.replace('/', '_')}.md"
        for folder in (
            *("configs", "configs/cluster", "deepspeed_configs", "data_prep", "benchmarks"),
            *("eval", "eval/protocols", "eval/prompts", "eval/published"),
        )
    },
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"(^```.*?^```\s*?$)", re.MULTILINE | re.DOTALL)


def page_of(document: str) -> str | None:
    """Return the page of a file of the repository, as a path in the site's sources; None where it has none."""
    if document.endswith(".ipynb") and document.startswith("docs/"):
        return document.removeprefix("docs/").removesuffix(".ipynb") + "_notebook.md"
    if document.startswith("docs/") and not document.endswith(".py"):
        return document.removeprefix("docs/")
    return PAGES.get(document)


def followed(text: str, document: str) -> str:
    """Return Markdown with the links of a document of the repository led to pages of the site.

    Raises:
        FileNotFoundError: a link to a file that is not there.
    """
    own = page_of(document) or document

    def lead(found: re.Match[str]) -> str:
        mark, shown, target = found.groups()
        place, hash_mark, anchor = target.partition("#")
        if "://" in target or not place:
            return found[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(document), place))
        if not (ROOT / wanted).exists():
            raise FileNotFoundError(f"{document} links to {target}, which is not there; fix the link")
        page = page_of(wanted if (ROOT / wanted).is_file() else f"{wanted}/README.md")
        if page is None:
            return shown
        return f"{mark}[{shown}]({posixpath.relpath(page, posixpath.dirname(own) or '.')}{hash_mark}{anchor})"

    parts = FENCE.split(text)
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)


def notebook_page(file: Path) -> str:
    """Return a notebook as Markdown: texts, and code in fences."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    parts = [text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```" for cell, text in zip(cells, texts, strict=True)]
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's documents and of notebooks (event of mkdocs)."""
    from mkdocs.structure.files import File

    for document, page in PAGES.items():
        text = followed((ROOT / document).read_text(encoding="utf-8"), document)
        files.append(File.generated(config, page, content=text))
    for file in sorted((ROOT / "docs").glob("*.ipynb")):
        files.append(File.generated(config, str(page_of(f"docs/{file.name}")), content=notebook_page(file)))
        files.remove(files.get_file_from_path(file.name))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Follow the links of a page in docs/ (event of mkdocs)."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return followed(markdown, f"docs/{page.file.src_uri}")
