"""The one rule by which a documented command is run at tiny size.

A command runs as it is written, in a folder (`stage`) where every file that our documents name exists under that name, but tiny: shrunken
copies of all configurations and DeepSpeed files, tiny data, weights, checkpoints and models. A name that no stand-in has is a fault of
the document. These things alone are replaced, by `shrunken` and `launched`:

1. PLACEHOLDERS in capitals (FOLDER, SPLIT, ...) become the name of a stand-in; `$k` becomes 0.
2. A number of training steps over 2 becomes 2 (STEPS), and so do those of GPUs of `grex estimate` and of a sample (`--limit`).
3. What the command is to write (--out, --train.out; with --sample its data) is removed first if the stage has it; `grex ground --out` is a
   folder of many.
4. `grex demo` without --config takes the stage's configs/demo.yaml and the few scenes of DEMO_SIZES.
5. Launchers: their own parsers read their flags. Then two processes on CPU are started; commands for several machines run on one.
6. What asks a server (`--base-url`) asks one on loopback that finds nothing and calls everything a thing. `grex serve` takes a free
   port, answers two requests, and is interrupted.
7. `make TARGET` is `make -n TARGET`, without doing it; long programs get BENCHMARK_SIZES; what `pip` does is done in tests/test_wheel.py.

What a shrunken copy hides is checked on the original: precision and number of processes (`check_original`).
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT
from fake_server import completion, last_text
from made_photos import made_coco, made_human
from PIL import Image
from safetensors.torch import save_file
from test_convert_swin import spelled
from test_data_prep import annotation, instances, ref
from tiny import tiny_speaker
from tiny_folder import tiny_folder
from tiny_llms import write_llm
from tiny_mllms import write_mllm

from grex_mllm.config import Config, VisionConfig, load_config, name_no_parts, save_config
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.models.generators.region_tokens.crops import CropsConfig
from grex_mllm.ops.masks import encode_rle

PROGRAMS = ("grex", "python", "torchrun", "deepspeed", "accelerate", "make", "pip")
PLACEHOLDERS = {"FOLDER": "data/grefcoco", "SPLIT": "val", "MODEL_FOLDER": "runs/demo", "X.yaml": "gres.yaml"}
PLACEHOLDERS |= {"PREDICTIONS": "runs/mine/predictions.jsonl", "GENERATED.jsonl": "runs/mine/predictions.jsonl", "$k": "0"}
STEPS = re.compile(r"(--train\.(?:text\.)?(?:steps|scenes)=)(\d+)")
DEMO_SIZES = {"demo.TEST_SCENES": 3, "demo.EXPRESSIONS_PER_SCENE": 2, "demo.LISTENER_CANDIDATES": 2, "training.run.CORPUS_LINES": 300}
DEMO_SIZES["training.pretraining.TEXT_LINES"] = 300
BENCHMARK_SIZES = {"rela_forward.py": ["--models", "r50", "--size", "64", "--repeats", "1", "--inner", "1", "--baseline", str(ROOT)]}
BENCHMARK_SIZES["train_step.py"] = ["--batch", "1", "--steps", "1", "--repeats", "1", "--set=--data.image_size=64"]
LANGUAGE_MODELS = {"Qwen2.5-0.5B-Instruct": "qwen2", "Qwen2.5-1.5B-Instruct": "qwen2", "Qwen2.5-7B-Instruct": "qwen2"}
LANGUAGE_MODELS |= {"Llama-3.1-8B-Instruct": "llama", "vicuna-7b-v1.5": "llama"}
LANGUAGE_MODELS |= {"smollm2-135m-instruct": "llama"}
MULTIMODAL_MODELS = {"Qwen2.5-VL-3B-Instruct": "qwen2.5-vl", "Qwen2.5-VL-7B-Instruct": "qwen2.5-vl"}
WORDS = ["the two red circles on the left", "a dog and the blue square"]
BENCHMARK_SIZES["shared_image.py"] = ["--size", "64", "--repeats", "1", "--small-text", "--model.decoder.grid_side=4"]
BENCHMARK_SIZES["photos.py"] = ["--candidates", "2", "--expressions-per-image", "3"]
BENCHMARK_SIZES["photo_comparison.py"] = ["--seconds", "0.01", "--seeds", "0", "--variants", "without geometry"]
BENCHMARK_SIZES["race.py"] = ["--seconds", "0.01", "--threads", "1", "--seeds", "0", "--scenes", "2", "--systems", "LAVT"]
BENCHMARK_SIZES["propagation.py"] = ["--side", "5", "--width", "16", "--repeats", "1"]
BENCHMARK_SIZES["joint_ablation.py"] = ["--steps", "2", "--scenes", "2", "--seeds", "0", "--variants", "contrast"]
BENCHMARK_SIZES["dialogue.py"] = ["--scenes", "2"]
BENCHMARK_SIZES["serve_load.py"] = ["--clients", "3", "--seconds", "3"]
BENCHMARK_SIZES["search.py"] = ["--images", "12", "--queries", "2"]
DECODER_SIZES = {"num_layers": 3, "kept_regions": 6, "roi_channels": 8, "grid_side": 4, "segmentation_width": 16, "refinement_width": 8}
DECODER_SIZES |= {"encoder_feedforward": 16, "words": 150}
CHECKPOINTS = ("swin_base_patch4_window12_384_22k.pth", "swin_tiny_patch4_window7_224.pth", "resnet50.pth")


def commands(file: Path) -> list[str]:
    """Return the commands of a document, without comments and with continued lines joined.

    YAML: the first line, every command in backticks of the head, and the first line with what stands behind "instead: ".
    Markdown: lines of fenced or indented blocks that start with one of PROGRAMS, and commands with an option in backticks.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        head = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        added = [f"{head[0]} {hit}" for line in head for hit in re.findall(r"instead: (--\S+ [^\s,;)]+)", line)]
        return list(dict.fromkeys([head[0], *added, *(hit for line in head for hit in re.findall(r"`(grex [^`]+)`", line))]))
    text, lines = text.replace("\\\n", " "), []
    for block in re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL):
        lines += block.splitlines()
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines += [line for line in plain.splitlines() if line.startswith("    ")]
    lines += [hit.replace("\n", " ") for hit in re.findall(r"(?<!`)`([^`]+ --?[^`]+)`", plain)]
    lines = [part.strip() for line in lines for part in line.split("&&")]
    lines = [re.split(r"\s+# ", line.strip().removeprefix("$ ").removeprefix(".venv/bin/"))[0] for line in lines]
    return list(dict.fromkeys(line for line in lines if line.split(" ")[0] in PROGRAMS))


def shrunken(command: str) -> list[str]:
    """Return the words of a command after rules 1, 2 and 4."""
    words = []
    for word in shlex.split(command):
        for placeholder, stand_in in PLACEHOLDERS.items():
            word = re.sub(rf"(?<![\w.]){re.escape(placeholder)}(?!\w)", lambda _, stand_in=stand_in: stand_in, word)
        words.append(STEPS.sub(lambda hit: f"{hit[1]}{min(int(hit[2]), 2)}", word))
    if words[:2] == ["grex", "estimate"] and "--gpus" in words:
        words[words.index("--gpus") + 1] = "2"
    if "--limit" in words:
        words[words.index("--limit") + 1] = "2"
    if words[:2] == ["grex", "demo"] and "--config" not in words:
        words += ["--config", "configs/demo.yaml"]
    return words


def clear_outputs(words: list[str], stage: Path) -> None:
    """Remove what a command is to write (rule 3)."""
    items = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in pairwise(items):
        target = stage / value
        if flag in ("--out", "--train.out") and "ground" not in words and target.exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        if flag == "--out" and "--sample" in words:
            shutil.rmtree(target.with_suffix(".data"), ignore_errors=True)


def launched(words: list[str]) -> tuple[str, list[str], int]:
    """Read a launcher's command by its own parser; return module or file, its words, and the number of all processes."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        assert given.module, "without -m"
        return given.training_script, given.training_script_args, int(given.nproc_per_node) * int(given.nnodes.split(":")[-1])
    if words[0] == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        given = parse_args(words[1:])
        assert given.module and given.no_local_rank, "without --module or --no_local_rank"
        return given.user_script, given.user_args, given.num_gpus if given.num_gpus > 0 else 16
    from accelerate.commands.launch import launch_command_parser

    assert words[:2] == ["accelerate", "launch"], words
    given = launch_command_parser().parse_args(words[2:])
    assert given.module, "without -m or --module"
    return given.training_script, given.training_script_args, int(given.num_processes)


def check_original(words: list[str], num_processes: int) -> None:
    """Check of a `train` command what its shrunken configuration hides: precision on a GPU, number of images, DeepSpeed with Muon."""
    from grex_mllm.training.engine import check_precision, wanted_precision

    items = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    fields = {flag: value for flag, value in pairwise(items) if flag.startswith("--")}
    overrides = [f"{flag}={value}" for flag, value in fields.items() if "." in flag]
    settings = load_config(ROOT / fields["--config"], overrides).train
    check_precision(wanted_precision(settings), "cuda")
    assert settings.batch_images % num_processes == 0, f"{settings.batch_images} images over {num_processes} processes"
    assert not (settings.deepspeed and settings.optim.muon), "DeepSpeed has no Muon"


def shrink(config: Config) -> Config:
    """Make every width tiny and leave every choice as it is."""
    model = config.model
    name_no_parts(config)
    if model.vision.name == "swin":
        model.vision.embed_width, model.vision.window = 8, 4
        model.vision.swin_depths, model.vision.swin_heads = [1, 1, 1, 1], [1, 1, 2, 2]
    elif model.vision.name == "darknet53":
        model.vision.darknet_width, model.vision.darknet_depths = 2, [1, 1, 1, 1, 1]
    else:
        model.vision.stem_width, model.vision.depths = 8, [1, 1, 1, 1]
        model.vision.widths, model.vision.bottleneck_widths = [8, 16, 16, 24], [8, 8, 8, 8]
    model.text.vocab_size, model.text.hidden_size, model.text.num_layers = 200, 16, 12 if config.train.optim.text != "all" else 2
    model.text.num_heads, model.text.intermediate_size, model.text.max_positions, model.text.word_width = 2, 16, 32, 8
    model.pixel_decoder.width = model.pixel_decoder.mask_width = model.decoder.width = 16
    model.pixel_decoder.num_heads = model.decoder.num_heads = 2
    model.pixel_decoder.num_layers = model.pixel_decoder.num_points = 1
    model.pixel_decoder.feedforward = model.decoder.feedforward = 16
    for name, value in DECODER_SIZES.items():
        if hasattr(model.decoder, name):
            setattr(model.decoder, name, min(getattr(model.decoder, name), value))
    if hasattr(model.decoder, "mask_widths"):
        model.decoder.mask_widths = [8 for _ in model.decoder.mask_widths]
    return config


def shrink_run(config: Config) -> Config:
    """Shrink a configuration with its training, for a process on CPU; the files that it names stay named."""
    named, crops = (config.model.vision.weights, config.model.text.path), getattr(config.model.generator, "crops", None)
    weights = crops.vision.weights if isinstance(crops, CropsConfig) else None
    config = shrink(config)
    config.model.vision.weights, config.model.text.path = named
    if isinstance(crops, CropsConfig):
        crops.vision.weights, crops.size = weights, min(crops.size, 32)
    if config.model.text.tokenizer == "train":
        config.model.text.vocab_size, config.model.text.max_positions = 300, 64
    generator, train = config.model.generator, config.train
    if generator is not None:
        if generator.name == "region_tokens":
            generator.vocab_size, generator.hidden_size, generator.num_heads, generator.num_layers = 300, 16, 2, 1
            generator.intermediate_size, generator.words = 32, min(generator.words, 150)
        else:
            generator.min_pixels, generator.max_pixels = 56**2, 112**2
        generator.projector_width, generator.max_new_tokens = 16, 6
        generator.lora_rank = min(generator.lora_rank, 4)
    config.data.image_size = 64
    scenes = config.data.sources.setdefault("synthetic", SyntheticConfig())
    scenes.image_size = 64
    config.data.expressions_per_image, config.data.num_workers = min(config.data.expressions_per_image, 3), 0
    train.steps, train.batch_images, train.accumulation, train.precision, train.save_every = 1, 2, 1, "fp32", 1
    train.num_threads = min(train.num_threads, 1)
    if train.pretraining is not None:
        stages = train.pretraining
        stages.steps, stages.scenes, stages.batch = min(stages.steps, 1), min(stages.scenes, 1), 8
    return config


def make_stage(stage: Path) -> Path:
    """Write every stand-in that the documents name."""
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        (stage / "configs").mkdir(parents=True, exist_ok=True)
        save_config(shrink_run(load_config(file)), stage / "configs" / file.name)
    (stage / "deepspeed_configs").mkdir()
    on_cpu = json.loads((ROOT / "deepspeed_configs" / "zero2_cpu.json").read_text(encoding="utf-8"))
    for file in (ROOT / "deepspeed_configs").glob("*.json"):
        zero = {**on_cpu["zero_optimization"], "stage": json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]["stage"]}
        (stage / "deepspeed_configs" / file.name).write_text(json.dumps({**on_cpu, "zero_optimization": zero}), encoding="utf-8")
    for name in ("data/grefcoco", "data/refcoco", "data/coco_templates", "data/mini"):
        tiny_folder(stage / name)
    for name in ("grefcoco", "refcoco", "refcocoplus"):
        tiny_folder(stage / "datasets" / name)
    tested = tiny_folder(stage / "data" / "photos") / "expressions.jsonl"
    tested.write_text(tested.read_text(encoding="utf-8").replace('"split": "val"', '"split": "test"'), encoding="utf-8")
    _raw_files(stage)
    made_human(stage / "human_refs", made_coco(stage / "photographs"))
    _weights(stage)
    _models(stage)
    write_language_models({lm: stage / "models" / lm for lm in (*LANGUAGE_MODELS, *MULTIMODAL_MODELS)})
    _asked(stage)
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stage / "scene.png")
    for number, name in enumerate(("first.png", "second.png")):
        mask = np.zeros((96, 96), np.uint8)
        mask[10 + 40 * number : 40 + 40 * number, 10:40] = 255
        Image.fromarray(mask).save(stage / name)
    submitted = [{"data": {"expression_id": "e4"}, "annotations": [{"result": []}]}]
    (stage / "corrections.json").write_text(json.dumps(submitted), encoding="utf-8")
    (stage / "hosts").write_text("node0 slots=8\nnode1 slots=8\n", encoding="utf-8")
    return stage


def write_language_models(folders: dict[str, Path]) -> None:
    """Write a tiny model of the family of each named language model into its folder."""
    for lm, folder in folders.items():
        if lm in LANGUAGE_MODELS:
            write_llm(LANGUAGE_MODELS[lm], folder, WORDS * 5)
        else:
            write_mllm(MULTIMODAL_MODELS[lm], folder, [*WORDS * 5, "[10, 20]"], max_position_embeddings=700)


def _raw_files(stage: Path) -> None:
    """Write published annotation files of two images."""
    refs = [ref(1, 1, 11, "The dog"), ref(2, 1, [11, 12], "Both dogs"), ref(3, 1, [-1], "The cat"), ref(6, 2, 21, "A dog", split="val")]
    (stage / "grefs(unc).json").write_text(json.dumps(refs), encoding="utf-8")
    single = [line for line in refs if isinstance(line["ann_id"], int) and line["ann_id"] > 0]
    (stage / "refs(unc).p").write_bytes(pickle.dumps(single, protocol=2))
    shown = instances()
    shown["annotations"] = [annotation(11, 1), shown["annotations"][1], annotation(21, 2)]
    for name, folder in (("instances.json", "train2014"), ("instances_val2017.json", "val2017")):
        (stage / name).write_text(json.dumps(shown), encoding="utf-8")
        (stage / folder).mkdir()
        for image in shown["images"]:
            Image.new("RGB", (image["width"], image["height"]), (90, 120, 60)).save(stage / folder / image["file_name"])


def _weights(stage: Path) -> None:
    """Write tiny checkpoints under their authors' names, what `grex convert` makes of them, and a tiny BERT."""
    from transformers import BertConfig, BertModel

    from grex_mllm.convert.resnet import convert_resnet
    from grex_mllm.convert.swin import convert_swin
    from grex_mllm.models.vision import build_vision

    nets: dict[str, Any] = {}
    for name in ("gres_rela_swin_base", "gres_rela_r50"):
        vision = shrink(load_config(ROOT / "configs" / f"{name}.yaml")).model.vision
        vision.fusion = "none"
        nets[name] = build_vision(vision, 16)
    swin = {key: tensor for key, tensor in spelled(nets["gres_rela_swin_base"], "original").items() if "attn_mask" not in key}
    for name, made in ((CHECKPOINTS[0], "swin_base_22k"), (CHECKPOINTS[1], "swin_tiny")):
        torch.save({"model": swin}, stage / name)
        convert_swin(stage / name, stage / "models" / f"{made}.safetensors")
    torch.save(torchvision_names(nets["gres_rela_r50"].state_dict()), stage / CHECKPOINTS[2])
    convert_resnet(stage / CHECKPOINTS[2], stage / "models" / "resnet50.safetensors")
    darknet = shrink(load_config(ROOT / "configs" / "res_vlt_darknet53.yaml")).model
    save_file(build_vision(darknet.vision, 16).state_dict(), str(stage / "models" / "darknet53.safetensors"))
    vectors = [f"{word} {' '.join(['0.5', '-0.25'] * (darknet.text.word_width // 2))}" for word in ("the", "dog", "cat", "and", "a")]
    (stage / "models" / "glove.840B.300d.txt").write_text("\n".join(vectors), encoding="utf-8")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "cat", "and", *"abcdefghijklmnopqrstuvwxyz"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    bert = BertConfig(vocab_size=200, **sizes)
    BertModel(bert, add_pooling_layer=False).save_pretrained(stage / "models" / "bert-base-uncased")
    (stage / "models" / "bert-base-uncased" / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    shutil.copytree(stage / "models" / "bert-base-uncased", stage / "models" / "all-minilm-l6-v2")
    lite = build_vision(VisionConfig(name="efficientnet_lite0"), 16)
    save_file(lite.state_dict(), str(stage / "models" / "efficientnet_lite0.safetensors"))


def _asked(stage: Path) -> None:
    """Write a sample of a split, predictions of it, and their results."""
    from grex_mllm.score import score

    look = stage / "runs" / "zeroshot"
    tiny_folder(look / "look.data")
    shutil.copy(stage / "runs" / "mine" / "predictions.jsonl", look / "look.jsonl")
    score(look / "look.jsonl", look / "look.data", "val", ROOT / "eval" / "protocols" / "all.yaml", look / "look.json", per_sample=True)
    shutil.copy(look / "look.json", stage / "runs" / "mine" / "results.json")


def answer_nothing(body: dict[str, Any]) -> Any:
    """Answer a request of chat completions: no box, and "the thing" for objects to describe."""
    return completion("[]" if "JSON" in last_text(body) or "json" in last_text(body) else "the thing")


def torchvision_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a ResNet's weights as torchvision does."""
    renamed = {}
    for key, tensor in state.items():
        name = key.replace("stem.conv.", "conv1.").replace("stem.norm.", "bn1.")
        name = re.sub(r"stages\.(\d)", lambda hit: f"layer{int(hit[1]) + 1}", name)
        name = name.replace("shortcut.conv.", "downsample.0.").replace("shortcut.norm.", "downsample.1.")
        renamed[re.sub(r"\.norm(\d)\.", r".bn\1.", name)] = tensor
    return renamed


def _models(stage: Path) -> None:
    """Write model folders: a tiny one that can do everything, with predictions, and released ones of the shrunken sizes."""
    from grex_mllm.models.grex import GrexModel
    from grex_mllm.models.text import train_text_tokenizer

    tiny_speaker(stage / "work").save_pretrained(stage / "runs" / "demo")
    shutil.rmtree(stage / "work")
    for name in ("mine", "dialogue"):
        shutil.copytree(stage / "runs" / "demo", stage / "runs" / name)
    nothing = encode_rle(np.zeros((40, 30), bool))
    answers: list[dict[str, Any]] = [
        {"expression_id": name, "mask_rle": nothing, "mask_rle_input": nothing, "boxes_xyxy": [], "box_scores": [], "count": 0}
        for name in ("e4", "e5")
    ]
    texts: list[dict[str, Any]] = [{"image_id": "2", "targets": ["21"], "expression": "the cat"}]
    lines = [json.dumps({**line, "status": "ok"}) + "\n" for line in [*answers, *texts]]
    (stage / "runs" / "mine" / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = train_text_tokenizer(["two red circles", "the blue square"], 200)
    for name in ("r50", "swin_tiny", "swin_base"):
        config = shrink(load_config(ROOT / "configs" / f"gres_rela_{name}.yaml"))
        GrexModel(config, tokenizer).save_pretrained(stage / "models" / f"rela-{name.replace('_', '-')}")


def python_words(words: list[str]) -> list[str] | None:
    """Return the arguments of a command that is the command line of grex, or None."""
    if words[0] == "grex":
        return words[1:]
    if words[0] == "python" and words[1] == "-m" and words[2] in ("grex_mllm", "grex_mllm.cli"):
        return words[3:]
    return None


def interpreter(words: list[str]) -> list[str]:
    """Return the words of a program of the repository, as they are run."""
    assert words[0] == "python" and (ROOT / words[1]).is_file(), f"{words[1]} is no program of the repository"
    return [sys.executable, str(ROOT / words[1]), *words[2:], *BENCHMARK_SIZES.get(Path(words[1]).name, [])]
