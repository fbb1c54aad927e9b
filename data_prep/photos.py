"""From a folder of photographs to a trained model and its report: parts, data, training in stages, prediction, scores.

python data_prep/photos.py --coco FOLDER --out runs/photos

FOLDER holds images and a COCO-format instance file (instances*.json or .json.gz), or sub-folders of that form: each of them is a source,
which is scored by itself, and whose categories are labelled exhaustively in its photographs. --human FOLDER has refs in gRefCOCO's format
(grefs*.json or refs*.json) beside its instances and images: a test set of people's words, whose photographs no training sees.

Fields of the configurations are flags for every stage, as for grex train (--train.seed=1). What is there already stays, and what was cut
off goes on: give the same command again. This program is no verb of grex, because it writes data; what it calls is in the package.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coco_templates
import grefcoco
import weights
import yaml

from grex_mllm.config import read_yaml
from grex_mllm.data.coco import describe_file
from grex_mllm.data.records import load_dataset, read_info
from grex_mllm.data.refs_program import status_of
from grex_mllm.data.templates.photographs import COCO_NUMBER
from grex_mllm.errors import GrexError, fault
from grex_mllm.job import DATA, PREDICTIONS, RESULTS, SHEET, predict_once, report_run, run_job, say, score_once, timed
from grex_mllm.processes import num_processes

PROGRAM = "data_prep/photos.py"
NAMES = ("photos_ground", "photos_finer", "photos_larger", "photos_words", "photos_align", "photos_write", "photos")
STAGES = [f"configs/{name}.yaml" for name in NAMES]
SPLITS, EXPRESSIONS = "train=0.8,val=0.05,test=0.15", "train=24,val=24,test=24"
HUMAN, CONFIGS = "human", "configs"
PARTS = "models"  # where the configurations look for the pre-trained parts
LAYOUT = "instances*.json or .json.gz, and a folder images; or sub-folders of that form, one for each source"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", required=True, type=Path, help="folder with photographs and COCO-format instances")
    parser.add_argument("--out", type=Path, default=Path("runs/photos"), help="the run's folder (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path(PARTS), help="where the pre-trained parts lie, or will (default: %(default)s)")
    parser.add_argument(
        "--stages", nargs="+", default=STAGES, help="configurations, one for each training in turn (default: configs/photos*)"
    )
    parser.add_argument("--human", type=Path, help="folder with human expressions in gRefCOCO's format, to be tested on")
    parser.add_argument("--expressions-per-image", default=EXPRESSIONS, help="of an image, at most (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=8, help="texts to choose from by grounding (default: %(default)s)")
    options, overrides = parser.parse_known_args(arguments)
    return status_of(PROGRAM, lambda: run(options, overrides))


def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Do all that is not done yet and return the results; nothing where a signal ended it.

    Raises:
        GrexError: a folder of another layout, data of other photographs in --out, and what the parts raise.
    """
    strange = [item for item in overrides if not re.match(r"--\w+(\.\w+)+=", item)]
    if strange:
        raise fault(f"the argument {strange[0]}", "an option of this program, or a field as --train.seed=1", "see --help")
    sources = find_sources(options.coco)
    human = None if options.human is None else make_human(options.human, options.out / HUMAN / DATA)
    say(f"parts: {options.models}")
    if weights.main(["--out", str(options.models)]):
        raise GrexError(
            f"the parts of {options.models} are not all there; expected three; see the message above, or put them there yourself"
        )
    data = make_data(sources, options.out, human, options.expressions_per_image)
    stages = stages_with(options.models, options.stages, options.out / CONFIGS)
    results = run_job(data, stages, options.out, overrides, candidates=options.candidates)
    if results and human is not None:
        answer_human(options.out, human, options.candidates)
    if results:
        say(f"ask it: grex ground --model {options.out} --image photo.jpg --expression 'the two people on the left'")
    return results


def find_sources(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return name -> (instance file, folder of its images) of every source of a folder.

    Raises:
        GrexError: no such folder, or none of that form in it.
    """
    if not folder.is_dir():
        raise fault(f"--coco {folder} is no folder", f"a folder with {LAYOUT}", "give another path")
    places = [folder] if source_of(folder) is not None else sorted(place for place in folder.iterdir() if place.is_dir())
    found = {place.resolve().name: source for place in places if (source := source_of(place)) is not None}
    if not found:
        raise fault(f"--coco {folder} without instances", LAYOUT, "lay the files so, or write the data with data_prep/coco_templates.py")
    return found


def source_of(folder: Path) -> tuple[Path, Path] | None:
    """Return the instance file and the images of one source; None for a folder that is none.

    COCO's own layout will do, too: annotations/instances_val2017.json beside val2017.

    Raises:
        GrexError: several instance files, or no images beside one.
    """
    files = sorted(file for place in (folder, folder / "annotations") for file in place.glob("instances*.json*") if file.is_file())
    if not files:
        return None
    if len(files) > 1:
        raise fault(f"{folder} with {files[0].name} and {files[1].name}", "one instance file a source", "keep one of them there")
    named = files[0].name.partition(".")[0].removeprefix("instances").strip("_")
    places = [folder / name for name in ("images", named) if name]
    images = next((place for place in places if place.is_dir()), None)
    if images is None:
        raise fault(f"{files[0]} without images beside it", f"a folder {folder / 'images'}", "put the photographs there")
    return files[0], images


def make_data(sources: dict[str, tuple[Path, Path]], out: Path, human: Path | None, expressions: str) -> Path:
    """Write templated expressions about every source, without the photographs of the human expressions, unless they are there.

    Raises:
        GrexError: data of other sources there, or with photographs of the human expressions; faults of the sources.
    """
    folder = out / DATA
    if folder.is_dir():
        say(f"data: {folder} is there already")
    else:
        say(f"data: templated expressions about {', '.join(sources)} into {folder}")
        words = [part for name, (file, images) in sources.items() for part in ("--source", f"{name}={file}:{images}")]
        words += ["--out", str(folder), "--splits", SPLITS, "--expressions-per-image", expressions]
        if human is not None:
            words += ["--exclude", str(list_photographs(human, out / "excluded.txt"))]
        if coco_templates.main(words):
            raise GrexError(f"{folder} was not written; expected photographs with instances; see the message above")
    given = sorted(describe_file(file)["sha256"] for file, _ in sources.values())
    if sorted(source["sha256"] for source in read_info(folder)["sources"]) != given:
        raise fault(f"{folder} of other instance files than --coco", "the same ones, to go on", "choose another --out")
    check_apart(folder, human)
    return folder


def stages_with(models: Path, files: Sequence[str], folder: Path) -> list[str]:
    """Return the configurations of the stages; where the parts lie elsewhere than in `models`, copies in a folder that say where."""
    if models == Path(PARTS):
        return list(files)

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(each) for key, each in value.items()}
        return str(models / value.removeprefix(f"{PARTS}/")) if isinstance(value, str) and value.startswith(f"{PARTS}/") else value

    folder.mkdir(parents=True, exist_ok=True)
    copies = [folder / Path(file).name for file in files]
    for file, copy in zip(files, copies, strict=True):
        copy.write_text(yaml.safe_dump(moved(read_yaml(file)), sort_keys=False), encoding="utf-8")
    return [str(copy) for copy in copies]


def list_photographs(dataset: Path, file: Path) -> Path:
    """Write the file names of a dataset folder's images, one a line, and return the list's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}\n" for name in sorted(file_names(dataset))), encoding="utf-8")
    return file


def file_names(dataset: Path) -> set[str]:
    """Return the names of a dataset folder's image files, without folders."""
    return {Path(record.file).name for record in load_dataset(dataset).images.values()}


def photographs(dataset: Path) -> set[str]:
    """Return a dataset folder's photographs by COCO number, whatever stands before it in the name; those without one by file name."""
    return {COCO_NUMBER.findall(name)[-1] if COCO_NUMBER.search(name) else name for name in file_names(dataset)}


def check_apart(data: Path, human: Path | None) -> None:
    """Raise GrexError where a photograph of the human expressions is among those of the training."""
    shared = sorted(photographs(data) & photographs(human)) if human is not None else []
    if shared:
        given = f"{data} with {len(shared)} photographs of --human (first: {shared[0]})"
        raise fault(given, "none of them in the training", "choose another --out, so that the data is written anew")


def make_human(folder: Path, out: Path) -> Path:
    """Write the human expressions of a folder as a dataset folder, unless it is there.

    Raises:
        GrexError: no refs or no instances in the folder; faults of them.
    """
    place = source_of(folder) if folder.is_dir() else None
    refs = sorted(file for pattern in ("grefs*.json", "refs*.json") for file in folder.glob(pattern))
    if place is None or len(refs) != 1:
        given = f"--human {folder} with {len(refs)} files of refs and {'no ' if place is None else ''}instances"
        raise fault(given, "grefs*.json, instances*.json and a folder images", "lay the files so")
    if not out.is_dir():
        say(f"data: human expressions of {refs[0]} into {out}")
        words = ["--refs", str(refs[0]), "--instances", str(place[0]), "--images", str(place[1]), "--out", str(out), "--name", HUMAN]
        if grefcoco.main(words):
            raise GrexError(f"{out} was not written; expected refs in gRefCOCO's format; see the message above")
    return out


def answer_human(run: Path, data: Path, candidates: int) -> None:
    """Predict every split of people's words, score it by itself, and write its report; nobody can judge these texts but by round trip."""
    for split in load_dataset(data).splits:
        folder = run / HUMAN / split
        with timed(run, f"{HUMAN} {split}"):
            predict_once(run, data, split, folder / PREDICTIONS, candidates, processes=num_processes())
            results = score_once(folder / PREDICTIONS, data, split, folder / RESULTS)
        strict = results["results"]["strict"]
        say(json.dumps({HUMAN: split} | {task: {k: v for k, v in strict[task].items() if type(v) is float} for task in strict}))
        say(f"report of people's words ({split}): {report_run(folder, data=data, split=split, num_unselected=SHEET)}")


if __name__ == "__main__":
    sys.exit(main())
