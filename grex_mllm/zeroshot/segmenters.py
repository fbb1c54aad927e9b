"""Masks from answers: filled boxes, polygons, or a promptable segmenter (SAM, SAM 2) that a box or a point points to.

Which one it was is part of a result's name: the outlines are its work, not the language model's. SAM: Kirillov et al. 2023; SAM 2: Ravi et
al. 2024. SAM 2 gets its picture as transformers' processor makes it (squashed to a square), on Pillow, because that one wants torchvision.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from grex_mllm.errors import fault
from grex_mllm.ops.masks import mask_to_box_xyxy, segmentation_to_mask
from grex_mllm.zeroshot.base import Picture
from grex_mllm.zeroshot.parsing import Parsed

SEGMENTERS = ("none", "box", "polygon", "mask", "sam:PATH")
KEPT_PICTURES = 8  # whose encodings are kept: conversations about a few images run side by side
PROMPTS_AT_ONCE = 16  # masks of 1024 x 1024 before they are brought to the original size


class Segmented(NamedTuple):
    """mask: bool [H, W], the union.  boxes_xyxy: float64 [N, 4]; where points were answered, the extents of their masks.  flags: more."""

    mask: np.ndarray
    boxes_xyxy: np.ndarray
    flags: tuple[str, ...] = ()


class Segmenter(Protocol):
    """name: as it stands in a result's name.  answers: kinds of answer that it can turn into masks: boxes, points, polygons."""

    name: str
    answers: tuple[str, ...]

    def fingerprint(self) -> str:
        """Name all that decides its masks."""

    def segment(self, picture: Picture, parsed: Parsed) -> Segmented:
        """Return the mask of an answer that has targets."""


def open_segmenter(name: str, device: str = "auto") -> Segmenter | None:
    """Return the segmenter of a name: "none" (boxes alone), "box", "polygon", "mask", or "sam:" with a folder or hub id.

    Raises:
        GrexError: an unknown name, or a segmenter that cannot be read.
    """
    kind, _, path = name.partition(":")
    if name == "none":
        return None
    if name == "box":
        return Boxes()
    if name == "polygon":
        return Polygons()
    if name == "mask":
        return Masks()
    if kind == "sam" and path:
        return Prompted(path, device)
    raise fault(f'segmenter "{name}"', f"one of {', '.join(SEGMENTERS)}", "fix the name")


def check_segmenter(segmenter: Segmenter | None, answer: str) -> None:
    """Refuse a segmenter that cannot work with a kind of answer (boxes, points, polygons).

    Raises:
        GrexError: points without a segmenter that takes them, or any other combination without a meaning.
    """
    if answer not in (("boxes", "polygons", "masks") if segmenter is None else segmenter.answers):
        given = f"answers with {answer} and segmenter {'none' if segmenter is None else segmenter.name}"
        raise fault(given, "a segmenter that takes them: sam:PATH for points, mask for masks", "choose another segmenter or another prompt")


def box_mask(boxes_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return bool [height, width]: the pixels whose centre lies in one of the boxes [N, 4], left and top edges included."""
    mask = np.zeros((height, width), bool)
    for box in boxes_xyxy:
        left, top, right, bottom = (int(np.ceil(edge - 0.5)) for edge in box)
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    return mask


class Boxes:
    """Fills the boxes."""

    name = "box"
    answers: tuple[str, ...] = ("boxes", "polygons", "masks")

    def fingerprint(self) -> str:
        return self.name

    def segment(self, picture: Picture, parsed: Parsed) -> Segmented:
        return Segmented(box_mask(parsed.boxes_xyxy, *picture.pixels.shape[:2]), parsed.boxes_xyxy)


class Polygons:
    """Fills the polygons, as COCO's tools do; an object that was answered with a box alone is filled as a box (flag "filled_box")."""

    name = "polygon"
    answers: tuple[str, ...] = ("polygons",)

    def fingerprint(self) -> str:
        return self.name

    def segment(self, picture: Picture, parsed: Parsed) -> Segmented:
        height, width = picture.pixels.shape[:2]
        flat = [np.asarray(polygon, np.float64).reshape(-1).tolist() for polygon in parsed.polygons]
        mask = segmentation_to_mask(flat, height, width)
        bounds = [_bounds(polygon) for polygon in parsed.polygons]
        alone = [box for box in parsed.boxes_xyxy if not any(np.abs(box - bound).max() <= 1 for bound in bounds)]
        if alone:
            mask |= box_mask(np.stack(alone), height, width)
        return Segmented(mask, parsed.boxes_xyxy, ("filled_box",) if alone else ())


class Masks:
    """Takes the masks that the model itself wrote (Gemini 2.5); a box without one is filled (flag "filled_box")."""

    name = "mask"
    answers: tuple[str, ...] = ("masks",)

    def fingerprint(self) -> str:
        return self.name

    def segment(self, picture: Picture, parsed: Parsed) -> Segmented:
        height, width = picture.pixels.shape[:2]
        alone = [box for box, mask in zip(parsed.boxes_xyxy, parsed.masks, strict=True) if mask is None]
        union = box_mask(np.asarray(alone, np.float64).reshape(-1, 4), height, width)
        for mask in parsed.masks:
            if mask is not None:
                union |= mask.placed(height, width)
        return Segmented(union, parsed.boxes_xyxy, ("filled_box",) if alone else ())


class Prompted:
    """SAM or SAM 2: a mask for every box, or for every point; a picture is encoded once for all that is asked about it."""

    answers: tuple[str, ...] = ("boxes", "points", "polygons")

    def __init__(self, path: str, device: str = "auto") -> None:
        from grex_mllm.precision import pick_device

        self.device = pick_device(device)
        self.kind, self.model, self.processor = _load(path)
        self.model.to(self.device)
        self.name = f"sam:{Path(path).name}"
        self._kept: OrderedDict[str, tuple[Any, dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()  # conversations of a server's client end in threads

    def fingerprint(self) -> str:
        """Return a hash of the name, the settings of its pictures and the beginning of every weight."""
        found = hashlib.sha256(
            f"{self.name} {self.kind} {self.processor.image_processor.to_dict() if self.kind == 'sam' else self.processor}".encode()
        )
        for key, value in self.model.state_dict().items():
            found.update(key.encode())
            found.update(value.flatten()[:64].float().cpu().numpy().tobytes())
        return found.hexdigest()

    def segment(self, picture: Picture, parsed: Parsed) -> Segmented:
        height, width = picture.pixels.shape[:2]
        pointed = len(parsed.points) > 0
        masks = self.masks(picture, parsed.points if pointed else parsed.boxes_xyxy)
        union = np.logical_or.reduce(masks, axis=0) if len(masks) else np.zeros((height, width), bool)
        if not pointed:
            return Segmented(union, parsed.boxes_xyxy)
        tight = np.asarray([mask_to_box_xyxy(mask) for mask in masks if mask.any()], np.float64).reshape(-1, 4)
        return Segmented(union, tight, ("empty_mask",) if len(tight) < len(masks) else ())

    def masks(self, picture: Picture, prompts: np.ndarray) -> np.ndarray:
        """Return bool [N, H, W]: what each of N boxes [N, 4] or points [N, 2], in pixels of the picture, points to. Some may be empty."""
        with self._lock:
            return self._masks(picture, prompts, pointed=prompts.shape[1] == 2)

    def _masks(self, picture: Picture, prompts: np.ndarray, pointed: bool) -> np.ndarray:
        import torch

        encoded, sizes = self._encoded(picture)
        found = [np.zeros((0, *picture.pixels.shape[:2]), bool)]
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            part = torch.from_numpy(np.asarray(prompts[start : start + PROMPTS_AT_ONCE], np.float32)).to(self.device)
            part = part * torch.tensor(sizes["scale"] * (part.shape[1] // 2), device=self.device)
            given = {"input_points": part[None, :, None]} if pointed else {"input_boxes": part[None]}
            with torch.no_grad():
                low = self.model(image_embeddings=encoded, **given, multimask_output=False).pred_masks  # [1, N, 1, h, w]
            found.append(self._to_original(low[0, :, 0].float(), sizes))
        return np.concatenate(found)

    def _encoded(self, picture: Picture) -> tuple[Any, dict[str, Any]]:
        import torch

        if picture.digest in self._kept:
            self._kept.move_to_end(picture.digest)
            return self._kept[picture.digest]
        pixels, sizes = self._prepared(picture.pixels)
        with torch.no_grad():
            made = self.model.get_image_embeddings(pixels.to(self.device))
        self._kept[picture.digest] = made, sizes
        if len(self._kept) > KEPT_PICTURES:
            self._kept.popitem(last=False)
        return made, sizes

    def _prepared(self, pixels: np.ndarray) -> tuple[Any, dict[str, Any]]:
        """Return the network's input [1, 3, S, S], and how it lies there: original and inner size (height, width), scale of x and y."""
        import torch

        height, width = pixels.shape[:2]
        if self.kind == "sam":
            made = self.processor(images=pixels, return_tensors="pt")
            inner = tuple(int(side) for side in made["reshaped_input_sizes"][0])
            tensor = made["pixel_values"]
        else:
            side, inner = self.processor["size"], (self.processor["size"],) * 2
            squashed = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
            normed = (squashed - np.float32(self.processor["image_mean"])) / np.float32(self.processor["image_std"])
            tensor = torch.from_numpy(normed).permute(2, 0, 1)[None]
        return tensor.to(self.model.dtype), {"original": (height, width), "inner": inner, "scale": [inner[1] / width, inner[0] / height]}

    def _to_original(self, low: Any, sizes: dict[str, Any]) -> np.ndarray:
        """Bring mask logits [N, h, w] to the original size, bilinear, without the padding; True above 0."""
        from torch.nn.functional import interpolate

        if self.kind == "sam":
            given = ([sizes["original"]], [sizes["inner"]])
            masks = self.processor.image_processor.post_process_masks([low[:, None]], *given)[0]
        else:
            masks = interpolate(low[:, None], sizes["original"], mode="bilinear", align_corners=False) > 0
        return np.asarray(masks[:, 0].cpu().numpy(), bool)


def _bounds(polygon: Sequence[Any] | np.ndarray) -> np.ndarray:
    points = np.asarray(polygon, np.float64).reshape(-1, 2)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _load(path: str) -> tuple[str, Any, Any]:
    """Return the kind (sam, sam2), the model in evaluation mode, and SAM's processor or SAM 2's settings of pictures; safetensors only."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = "sam2" if config.model_type in ("sam2", "sam2_video") else config.model_type
        if kind == "sam":
            pictures = transformers.SamImageProcessorPil.from_pretrained(path)
            return kind, transformers.SamModel.from_pretrained(path, use_safetensors=True).eval(), transformers.SamProcessor(pictures)
        if kind == "sam2":
            given, _ = transformers.SamImageProcessorPil.get_image_processor_dict(path)  # reads the folder's settings, of any processor
            settings = {name: given[name] for name in ("image_mean", "image_std")} | {"size": int(given["size"]["height"])}
            return kind, transformers.Sam2Model.from_pretrained(path, use_safetensors=True).eval(), settings
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise fault(f"segmenter {path}: {reason}", "a folder or hub id of SAM or SAM 2 with safetensors", "fix the path") from None
    raise fault(f"segmenter {path} of type {config.model_type}", "SAM or SAM 2", "use sam:PATH of such a model")
