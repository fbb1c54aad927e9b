"""GrexModel: ground expressions in an image, describe objects of an image. Composition only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from grex_mllm.config import Config, load_config, name_no_parts, save_config
from grex_mllm.data.images import load_image
from grex_mllm.data.transforms import resize_image
from grex_mllm.entries import entry
from grex_mllm.errors import GrexError, fault
from grex_mllm.models import build_grounding
from grex_mllm.models.answer import EncodedImage, answers, check_rules
from grex_mllm.models.contrast import SetContrast
from grex_mllm.models.describe import describe
from grex_mllm.models.grounding import ImageFeatures
from grex_mllm.models.pixel_decoder import NUM_LEVELS
from grex_mllm.models.placement import Placement, placed
from grex_mllm.models.text import TextTokenizer, load_text_tokenizer
from grex_mllm.models.views import mean_of_views, mirrored_all
from grex_mllm.precision import resolve_precision
from grex_mllm.types import Geometry, Grounding, GroundingOutput
from grex_mllm.writing import whole_entries

WEIGHTS, CONFIG, TEXT_TOKENIZER, LM_TOKENIZER = "model.safetensors", "config.yaml", "text_tokenizer", "lm_tokenizer"
MAX_EXPRESSION_CHARACTERS = 1000


class GrexModel(nn.Module, ModelHubMixin):
    """Masks, boxes and counts from expressions; one expression from a set of objects.

    A model folder holds `config.yaml`, `model.safetensors`, `text_tokenizer/` and, with a generator, `lm_tokenizer/`.
    """

    def __init__(self, config: Config, text_tokenizer: TextTokenizer, lm_tokenizer: Any = None) -> None:
        super().__init__()
        self.config = config
        self.text_tokenizer = text_tokenizer
        self.grounding = build_grounding(config.model)
        if config.model.text.name == "bigru" and config.model.text.path is not None:
            self.grounding.text.start_from(config.model.text.path, text_tokenizer.vocabulary)
        config.model.text = replace(config.model.text, **self.grounding.text.sizes())  # known only now where `path` gives them
        if text_tokenizer.vocab_size > config.model.text.vocab_size:
            raise fault(
                f"a text tokenizer of {text_tokenizer.vocab_size} entries",
                f"at most model.text.vocab_size = {config.model.text.vocab_size}",
                "raise model.text.vocab_size, or give the tokenizer that belongs to the model",
            )
        stride = max(self.grounding.vision.strides)  # type: ignore[arg-type, type-var]
        if getattr(self.grounding.decoder, "answers_boxes", False) and config.data.image_size % stride:
            raise fault(
                f"data.image_size = {config.data.image_size} with a model that answers with boxes",
                f"a multiple of the image encoder's coarsest stride {stride}",
                f"use {config.data.image_size // stride * stride + stride}",
            )
        self.generator: Any = None
        if config.model.generator is not None:
            chosen = entry("model.generator", config.model.generator.name)
            self.generator = chosen.Generator(config.model.generator, self.feature_channels, lm_tokenizer)
            self.grounding.shows_image = bool(getattr(self.generator, "reads_image", False))
        self.contrast: SetContrast | None = None  # of use in training alone, so no model folder holds it
        if config.loss.contrast > 0:
            if not hasattr(self.generator, "set_features"):
                given = f"loss.contrast is {config.loss.contrast:g} with a generator that gives no features of object sets"
                raise fault(given, "model.generator.name: region_tokens, or loss.contrast: 0", "change one of them")
            self.contrast = SetContrast(self.generator.set_width, config.model.text.hidden_size)

    @property
    def feature_channels(self) -> list[int]:
        """Channels of the feature maps that the generator reads, fine to coarse."""
        decoder: Any = self.grounding.pixel_decoder
        return [decoder.mask_width, *([decoder.width] * NUM_LEVELS)]

    @property
    def device(self) -> torch.device:
        return self.grounding.pixel_mean.device

    def encode_text(self, expressions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids and mask int64 [E, L], cut to `model.text.max_tokens`."""
        return self.text_tokenizer.encode(list(expressions), self.config.model.text.max_tokens, self.config.model.text.pad)

    @torch.inference_mode()
    def encode(self, image: Any) -> EncodedImage:
        """Encode one image (path, PIL, numpy HWC uint8 or tensor) for any number of questions."""
        array = load_image(image)
        features, geometry = self._encode(array)
        return EncodedImage(features, geometry, features.padded_size, array)

    def _encode(self, array: np.ndarray) -> tuple[ImageFeatures, Geometry]:
        resized, geometry = resize_image(array, self.config.data.image_size, self.config.data.resize)
        pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None].to(self.device)
        return self.grounding.encode_image(pixels, [geometry.seen_size]), geometry

    @torch.inference_mode()
    def look(self, encoded: EncodedImage, expressions: Sequence[str]) -> GroundingOutput:
        """Return what the decoder says of E expressions about an encoded image; with `predict.mirror` and its mirror image, the mean."""
        output, mirrored = self._look(encoded.features, expressions), self.mirror_image(encoded)
        if mirrored is None:
            return output
        swapped, asked = mirrored_all(expressions)
        other = self._look(mirrored, swapped)
        decide = getattr(self.grounding.decoder, "decide", None)
        return mean_of_views(output, other, asked, encoded.geometry, encoded.canvas, decide)

    @torch.inference_mode()
    def mirror_image(self, encoded: EncodedImage) -> ImageFeatures | None:
        """Return the features of an image's mirror image, encoded at the first call; None without `predict.mirror`."""
        if not self.config.predict.mirror or encoded.original is None:
            return None
        if encoded.mirrored is None:
            encoded.mirrored, _ = self._encode(np.ascontiguousarray(encoded.original[:, ::-1]))
        return encoded.mirrored

    def _look(self, features: ImageFeatures, expressions: Sequence[str]) -> GroundingOutput:
        ids, mask = self.encode_text(expressions)
        index = torch.zeros(len(expressions), dtype=torch.int64, device=self.device)
        output: GroundingOutput = self.grounding.ground(features, index, ids.to(self.device), mask.to(self.device))
        return output

    @torch.inference_mode()
    def ground(self, image: Any, expressions: str | Sequence[str], chunk: int = 64, threshold: float | None = None) -> Any:
        """Answer one expression (a `Grounding`) or many (a list of them). The image is encoded once where the model allows.

        image: path, PIL image, numpy uint8 [H, W, 3], tensor, or an `EncodedImage`.  Results are at the original image's size.
        threshold: "no target" is said above this probability, in [0, 1]; None = `predict.no_target_threshold` of the configuration.

        Raises:
            GrexError: an unreadable image; an empty expression or one over 1,000 characters; a threshold outside [0, 1].
        """
        single = isinstance(expressions, str)
        texts = [expressions] if isinstance(expressions, str) else list(expressions)
        for text in texts:
            check_expression(text)
        if self.training:
            raise RuntimeError("call .eval() before .ground(): the model is in training mode")
        rules = self.config.predict if threshold is None else replace(self.config.predict, no_target_threshold=threshold)
        check_rules(rules)
        encoded = image if isinstance(image, EncodedImage) else self.encode(image)
        results: list[Grounding] = []
        for start in range(0, len(texts), chunk):
            part = texts[start : start + chunk]
            results += answers(self.look(encoded, part), part, [encoded.geometry] * len(part), encoded.canvas, rules)
        for result in results:
            result.image = encoded.original
        return results[0] if single else results

    def describe(self, image: Any, masks: Any = None, boxes_xyxy: Any = None, **options: Any) -> Any:
        """Write one expression for a set of objects. See `grex_mllm.models.describe.describe` for the options and the errors."""
        return describe(self, image, masks, boxes_xyxy, **options)

    def saved_state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint: all of the grounding model, and of the generator what is not a hub LLM's own."""
        state = {f"grounding.{k}": v for k, v in self.grounding.state_dict().items()}
        if self.generator is not None:
            state |= {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        return {k: v.detach().to("cpu").contiguous() for k, v in state.items()}

    def load_saved_state(self, state: dict[str, Tensor], source: str) -> None:
        """Load what `saved_state` gave; every key must be there and no other.

        Raises:
            GrexError: missing or unknown keys, or another shape.
        """
        own = self.saved_state()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        shapes = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items() if k in state and state[k].shape != v.shape]
        if missing or unknown or shapes:
            raise GrexError(
                f"{source}: {len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}, "
                f"{len(shapes)} of another shape {shapes[:3]}; "
                f"expected the weights of the model in {CONFIG}; take both files from one folder"
            )
        grounding = {k.removeprefix("grounding."): v for k, v in state.items() if k.startswith("grounding.")}
        self.grounding.load_state_dict(grounding, strict=True)
        if self.generator is not None:
            self.generator.load_state_dict(
                {k.removeprefix("generator."): v for k, v in state.items() if k.startswith("generator.")}, strict=True
            )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the model folder (see the class); each file appears whole or not at all. `push_to_hub` uploads the same files."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_pretrained(folder)
        if kwargs.pop("push_to_hub", False):
            return str(self.push_to_hub(repo_id=kwargs.pop("repo_id", None) or folder.name, **kwargs))
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        with whole_entries(save_directory) as work:
            self.text_tokenizer.save(work / TEXT_TOKENIZER)
            if self.generator is not None and self.generator.tokenizer is not None:
                self.generator.tokenizer.save(work / LM_TOKENIZER)
            save_config(self.config, work / CONFIG)
            save_file(self.saved_state(), str(work / WEIGHTS), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, device: str | None = None, precision: str | None = None, **hub: Any
    ) -> GrexModel:
        """Load a model folder, or a hub id (`hub`: revision, cache_dir, force_download, local_files_only, token). Safetensors only.

        precision: fp32 | bf16 | fp16, in which a frozen language model is held; None = float32 on a CPU, else as `predict.precision` says.

        Raises:
            GrexError: no such folder, files missing or damaged, or weights that do not fit the configuration.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(name)
        if not folder.is_dir():
            if folder.exists() or name.startswith((".", "/")) or name.count("/") != 1:
                raise fault(
                    f"model folder {name} does not exist",
                    f"a folder with {CONFIG} and {WEIGHTS}",
                    "train one (grex train) or fix the path",
                )
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

            try:
                folder = Path(snapshot_download(name, **hub))
            except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise fault(
                    f"model {name} is neither a folder nor to be had from the hub ({reason})", "one of them", "fix the name"
                ) from None
        return cls._from_folder(folder, device, precision)

    @classmethod
    def _from_folder(cls, folder: Path, device: str | None = None, precision: str | None = None) -> GrexModel:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for name in (CONFIG, WEIGHTS, TEXT_TOKENIZER):
            if not (folder / name).exists():
                raise fault(
                    f"model folder {folder} without {name}",
                    f"{CONFIG}, {WEIGHTS} and {TEXT_TOKENIZER}/",
                    "train a model into it, or give another folder",
                )
        try:
            config = load_config(folder / CONFIG, trusted=False)
        except GrexError as error:
            hint = " (a model folder of another version does not load: train or convert it again)" if "unknown key" in str(error) else ""
            raise GrexError(f"{error}{hint}") from None
        name_no_parts(config)  # the checkpoint holds them
        lm_tokenizer = None
        if config.model.generator is not None:
            chosen = entry("model.generator", config.model.generator.name)
            lm_tokenizer = chosen.load_tokenizer(config.model.generator, folder / LM_TOKENIZER)
        place = torch.device(device or "cpu")
        computed = precision or ("fp32" if place.type == "cpu" else resolve_precision(config.predict.precision, place).precision)
        with placed(Placement(place, computed)):
            model = cls(config, load_text_tokenizer(folder / TEXT_TOKENIZER), lm_tokenizer)
        try:
            state = load_file(str(folder / WEIGHTS))
        except (SafetensorError, OSError) as error:
            raise fault(
                f"{folder / WEIGHTS} cannot be read ({error})", "a whole safetensors file", "copy or train the model again"
            ) from None
        model.load_saved_state(state, str(folder / WEIGHTS))
        return model.to(place).eval()


def check_expression(text: Any) -> None:
    """Raise on an expression that no model can answer.

    Raises:
        GrexError: not a string, empty, or over MAX_EXPRESSION_CHARACTERS.
    """
    if not isinstance(text, str):
        raise fault(f"an expression of type {type(text).__name__}", "a string", "pass text")
    if not text.strip():
        raise fault("an empty expression", "a phrase that names objects", "write what to look for")
    if len(text) > MAX_EXPRESSION_CHARACTERS:
        raise fault(f"an expression of {len(text):,} characters", f"at most {MAX_EXPRESSION_CHARACTERS:,}", "shorten it")
