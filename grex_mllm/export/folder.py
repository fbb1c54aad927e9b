"""`grex export`: a folder of graphs, tokenizer, facts and a script that runs them. What does not answer as torch does is not written."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from grex_mllm import __version__
from grex_mllm.config import TextConfig
from grex_mllm.errors import GrexError, fault
from grex_mllm.export.checking import SAID, check_folder, example_image, torch_answers
from grex_mllm.export.decision import decide_graph, prepare_graph, rules_facts
from grex_mllm.export.graphs import (
    IMAGE,
    TEXT_IDS,
    TEXT_MASK,
    Graph,
    ImageGraph,
    LanguageGraph,
    WholeGraph,
    check_exportable,
    names_of,
)
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import TextTokenizer
from grex_mllm.ops.paths import as_on_gpu
from grex_mllm.writing import whole_folder

FORMATS = ("onnx", "torch")
TASKS = ("all", "ground")
HERE = Path(__file__).parent
TOKENIZER = "tokenizer.json"
Writer = Callable[[Path, Graph, bool], list[str]]  # returns the inputs that the written graph reads


def export_model(model_name: str, out: str, form: str = "onnx", task: str = "all") -> dict[str, Any]:
    """Write the folder and return its facts (export.json).

    Raises:
        GrexError: unknown format, a task or model that does not leave, packages that are missing, or answers that differ from torch's.
    """
    if form not in FORMATS:
        raise fault(f"grex export --format {form}", " or ".join(FORMATS), "choose one of them")
    if task not in TASKS:
        raise fault(f"grex export --task {task}", " or ".join(TASKS), "choose one of them")
    writer = _writer(form)  # what is missing is said before a model is loaded
    model = GrexModel.from_pretrained(model_name)
    check_exportable(model)
    speaks = task == "all" and model.generator is not None
    if speaks:
        _check_generator(model, form)
    facts = facts_of(model, form)
    with whole_folder(out) as work:
        _save_tokenizer(model.text_tokenizer, work / TOKENIZER, model.config.model.text)
        for script in ("ground.py", *(["ground_torch.py"] if form == "torch" else [])):
            shutil.copy(HERE / script, work / script)
        for varies in (True, False):
            facts["any_size"] = varies
            try:
                with torch.no_grad(), as_on_gpu():
                    facts["graphs"] = write_graphs(model, work, writer, varies)
                    if speaks:
                        facts["generator"] = _write_generator(model, work, varies)
                (work / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
                facts["largest_difference"] = check_folder(model, work, facts)
                break
            except GrexError:
                raise
            except Exception as error:  # of any depth of three libraries
                if not varies:
                    reason = str(error).strip().splitlines()
                    given = f"{model_name}: {form} fails with {type(error).__name__} ({reason[0] if reason else ''})"
                    raise fault(given, "a model that it can record", "use another format, or the model in Python") from error
        (work / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def facts_of(model: GrexModel, form: str) -> dict[str, Any]:
    """Return what the script must know beside the graphs."""
    config = model.config
    return {
        "format": form,
        "grex_mllm": __version__,
        "decoder": config.model.decoder.name,
        "image_size": config.data.image_size,
        "resize": config.data.resize,
        "stride": int(max(model.grounding.vision.strides)),
        "max_tokens": config.model.text.max_tokens,
        "rules": rules_facts(config.predict),
        "left_out": ["predict.mirror: the graphs see the image as it is alone"] if config.predict.mirror else [],
    }


def write_graphs(model: GrexModel, work: Path, writer: Writer, varies: bool) -> dict[str, dict[str, list[str]]]:
    """Write the model's graphs and return their inputs and outputs by name, in the order in which they run."""
    ids, mask = model.encode_text(SAID[:1] if model.grounding.fuses_language else SAID[:2])
    image = example_image(model, 0)
    said = torch_answers(model.grounding, image, ids, mask)
    names = names_of(said)
    graphs = {}

    def write(graph: Graph) -> None:
        graphs[graph[0]] = {"inputs": writer(work, graph, varies), "outputs": graph[-1]}

    write(prepare_graph(model))
    if model.grounding.fuses_language:
        write(("whole", WholeGraph(model.grounding).eval(), (image, ids, mask), [IMAGE, TEXT_IDS, TEXT_MASK], names))
    else:
        first = ImageGraph(model.grounding).eval()
        tensors = first(image)
        between = [f"features_{i}" for i in range(len(tensors))]
        language = ("language", LanguageGraph(first).eval(), (ids, mask, *tensors), [TEXT_IDS, TEXT_MASK, *between], names)
        read = writer(work, language, varies)
        first.kept = [i for i, name in enumerate(between) if name in read]
        write(("image", first, (image,), [IMAGE], [between[i] for i in first.kept]))
        graphs["language"] = {"inputs": read, "outputs": names}
    write(decide_graph(model, image, said))
    return graphs


def _save_tokenizer(tokenizer: TextTokenizer, file: Path, config: TextConfig) -> None:
    """Write a tokenizer that pads as the model is used to, and does not cut: a cut that spares the end would be another one."""
    own = copy.deepcopy(tokenizer.tokenizer)
    own.no_truncation()
    own.no_padding()
    if config.pad != "longest":
        own.enable_padding(length=config.max_tokens)
    own.save(str(file))


def _writer(form: str) -> Writer:
    if form == "onnx":
        from grex_mllm.export.onnx_graphs import check_installed, write_onnx

        check_installed()
        return write_onnx
    from grex_mllm.export.programs import write_program

    return write_program


def _check_generator(model: GrexModel, form: str) -> None:
    from grex_mllm.export.generator_graphs import check_generator_exportable

    if form != "onnx":
        raise fault(f"grex export --format {form} of a model with a generator", "--task ground: its cache leaves as ONNX alone", "add it")
    check_generator_exportable(model)


def _write_generator(model: GrexModel, work: Path, varies: bool) -> dict[str, Any]:
    from grex_mllm.export.generator_folder import write_generator

    return write_generator(model, work, example_image(model, 0), varies)
