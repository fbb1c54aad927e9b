"""What pyproject.toml cannot say: a built package carries the data folders of the repository as grex_mllm/files/."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOLDERS = ("configs", "deepspeed_configs", "eval")


class BuildWithFiles(build_py):
    """Copy the data folders beside the built modules. An editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(Path(self.build_lib, "grex_mllm", "files"), ignore_errors=True)  # what an earlier build left
        for source, target in self._copies():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else [str(target) for _, target in self._copies()])]

    def _copies(self) -> list[tuple[Path, Path]]:
        files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*")) if file.is_file()]
        return [(file, Path(self.build_lib, "grex_mllm", "files", file.relative_to(ROOT))) for file in files]


setup(cmdclass={"build_py": BuildWithFiles})
