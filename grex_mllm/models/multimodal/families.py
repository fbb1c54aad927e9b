"""How each family of multimodal models takes a picture: its image processor, the tokens that stand for the picture, and where they look.

Composed from image processors on Pillow and from tokenizers, because the whole processors of Qwen-VL, InternVL, LLaVA-OneVision and SmolVLM
want torchvision (for video) or other packages. Where a whole processor can be made, tests compare with it.
Qwen2-VL: Wang et al. 2024; Qwen2.5-VL: Bai et al. 2025; InternVL: Chen et al. 2024; LLaVA: Liu et al. 2023, 2024; LLaVA-OneVision: Li et
al. 2024; Gemma 3: 2025; Idefics3: Laurençon et al. 2024; SmolVLM: Marafioti et al. 2025.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Pictures = list[list[np.ndarray]]  # of each chat; uint8 [H, W, 3]


class Encoded(NamedTuple):
    """tensors: what the model gets besides tokens.  tokens: the text of each picture, chat after chat, in the template token's place."""

    tensors: dict[str, Tensor]
    tokens: list[str]


@dataclass(frozen=True)
class Layout:
    """Where the image tokens of one picture look. index: int64 [h, w], number of the token at each place among the picture's tokens.

    box: left, top, right, bottom of the grid as fractions of the original; beyond 0 to 1 where the picture was padded.
    """

    index: Tensor
    box: tuple[float, float, float, float]


WHOLE = (0.0, 0.0, 1.0, 1.0)


class Family(ABC):
    """One family. config: of the model.  processor: its image processor, on Pillow.  settings: of the folder's processor_config.json."""

    name = ""
    image_processor = ""  # class in transformers
    token_types: str | None = None  # name of the input that tells image tokens (1) from text (0), where the model reads one

    def __init__(self, config: Any, processor: Any, settings: dict[str, Any], tokenizer: Any) -> None:
        self.config, self.processor, self.settings, self.tokenizer = config, processor, settings, tokenizer

    @staticmethod
    def adjust(given: dict[str, Any]) -> dict[str, Any]:
        """Return the image processor's settings, given what the folder's file says."""
        return given

    @property
    def image_id(self) -> int:
        """Id of the token whose embeddings the picture's features replace."""
        return int(getattr(self.config, "image_token_id", None) or self.config.image_token_index)

    @property
    def image_token(self) -> str:
        """The token of `image_id`."""
        return str(self.tokenizer.convert_ids_to_tokens(self.image_id))

    @property
    def place(self) -> str:
        """What the chat template writes in a picture's place."""
        return self.image_token

    @abstractmethod
    def encode(self, pictures: Pictures) -> Encoded:
        """Return what the model gets for the pictures of some chats."""

    @abstractmethod
    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of the picture that the model sees of an original of this size, without padding."""

    @abstractmethod
    def layout(self, width: int, height: int) -> Layout:
        """Return where the tokens of a picture of this size look."""

    def parts(self, width: int, height: int) -> int:
        """Return how many entries of the model's image features, along their first axis, are of one picture."""
        return 1


class Qwen(Family):
    """Any size, in patches of which 2 x 2 become one token."""

    name, image_processor, token_types = "qwen", "Qwen2VLImageProcessorPil", "mm_token_type_ids"

    def encode(self, pictures: Pictures) -> Encoded:
        made = self.processor(images=_flat(pictures), return_tensors="pt")
        tokens = [self.image_token * (int(grid.prod()) // self.processor.merge_size**2) for grid in made["image_grid_thw"]]
        return Encoded(dict(made), tokens)

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        limits = self.processor.size
        factor = self.processor.patch_size * self.processor.merge_size
        rows, columns = smart_resize(height, width, factor, limits["shortest_edge"], limits["longest_edge"])
        return columns, rows

    def layout(self, width: int, height: int) -> Layout:
        columns, rows = (side // (self.processor.patch_size * self.processor.merge_size) for side in self.sent_size(width, height))
        return Layout(_grid(rows, columns), WHOLE)


class InternVL(Family):
    """Square tiles, the grid of them with the nearest aspect ratio, and the whole picture as a last tile where there are several."""

    name, image_processor = "internvl", "GotOcr2ImageProcessorPil"

    @staticmethod
    def adjust(given: dict[str, Any]) -> dict[str, Any]:
        return {"crop_to_patches": True} | given | {"crop_to_patches": given.get("crop_to_patches") or True}

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile."""
        return int(self.settings.get("image_seq_length") or self.config.image_seq_length)

    def encode(self, pictures: Pictures) -> Encoded:
        made = self.processor(images=_flat(pictures), return_tensors="pt")
        ends = [getattr(self.tokenizer, f"{end}_image_token", default) for end, default in (("start", "<img>"), ("end", "</img>"))]
        tokens = [f"{ends[0]}{self.image_token * (self.tile_tokens * int(tiles))}{ends[1]}" for tiles in made.pop("num_patches")]
        return Encoded(dict(made), tokens)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of tiles."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        made = self.processor
        if not made.crop_to_patches or made.max_patches < 2:
            return 1, 1
        side = (made.size["height"], made.size["width"])
        columns, rows = get_optimal_tiled_canvas((height, width), side, made.min_patches, made.max_patches)
        return columns, rows

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        columns, rows = self.grid(width, height)
        return columns * self.processor.size["width"], rows * self.processor.size["height"]

    def layout(self, width: int, height: int) -> Layout:
        columns, rows = self.grid(width, height)
        return Layout(_tiled(rows, columns, math.isqrt(self.tile_tokens)), WHOLE)

    def parts(self, width: int, height: int) -> int:
        tiles = math.prod(self.grid(width, height))
        return tiles + (tiles > 1)


class Llava(Family):
    """The picture in the middle of a square of its longer side. The released settings would cut off what is not in the middle."""

    name, image_processor = "llava", "LlavaImageProcessorPil"

    @staticmethod
    def adjust(given: dict[str, Any]) -> dict[str, Any]:
        return given | {"do_pad": True, "do_center_crop": False}

    @property
    def tokens_aside(self) -> int:
        """Tokens of one side of the square."""
        return self.side // int(self.config.vision_config.patch_size)

    @property
    def side(self) -> int:
        """Pixels of one side of the square."""
        size = self.processor.size
        return int(size.get("shortest_edge") or size["height"])

    def encode(self, pictures: Pictures) -> Encoded:
        made = self.processor(images=_flat(pictures), return_tensors="pt")
        extra = 0 if self.config.vision_feature_select_strategy == "default" else int(self.settings.get("num_additional_image_tokens") or 0)
        return Encoded(dict(made), [self.image_token * (self.tokens_aside**2 + extra)] * len(_flat(pictures)))

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        longest = max(width, height)
        return max(1, round(width * self.side / longest)), max(1, round(height * self.side / longest))

    def layout(self, width: int, height: int) -> Layout:
        longest = max(width, height)
        left, top = -((longest - width) // 2) / width, -((longest - height) // 2) / height
        return Layout(_grid(self.tokens_aside, self.tokens_aside), (left, top, left + longest / width, top + longest / height))


class LlavaOneVision(Family):
    """The whole picture squashed to a square, then square tiles of it at a size of its own, padded, without the tokens of the padding."""

    name, image_processor = "llava_onevision", "LlavaOnevisionImageProcessorPil"

    @property
    def side(self) -> int:
        """Pixels of one side of a tile."""
        return int(self.config.vision_config.image_size)

    @property
    def aside(self) -> int:
        """Tokens of one side of a tile."""
        return self.side // int(self.config.vision_config.patch_size)

    def encode(self, pictures: Pictures) -> Encoded:
        made = dict(self.processor(images=[some for some in pictures if some], return_tensors="pt"))
        tokens = []
        for some in pictures:
            for picture in some:
                tokens.append(self.image_token * (self.number(*picture.shape[:2]) if len(some) == 1 else self.aside**2 + 1))
        return Encoded(made, tokens)

    def number(self, height: int, width: int) -> int:
        """Return the tokens of a picture that stands alone in its chat."""
        canvas_height, canvas_width = self._canvas(height, width)
        rows, columns = canvas_height // self.side * self.aside, canvas_width // self.side * self.aside
        if width / height > canvas_width / canvas_height:  # padded above and below
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        most = int(str(self.settings.get("vision_aspect_ratio") or self.config.vision_aspect_ratio).removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.aside**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return self.aside**2 + rows * (columns + 1)  # a token ends each row

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        from transformers.image_processing_utils import select_best_resolution

        found: tuple[int, int] = tuple(select_best_resolution((height, width), self.config.image_grid_pinpoints))  # type: ignore[assignment]
        return found

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        canvas_height, canvas_width = self._canvas(height, width)
        scale = min(canvas_width / width, canvas_height / height)
        if canvas_width / width < canvas_height / height:
            return canvas_width, min(math.ceil(height * scale), canvas_height)
        return min(math.ceil(width * scale), canvas_width), canvas_height

    def layout(self, width: int, height: int) -> Layout:
        return Layout(_grid(self.aside, self.aside), WHOLE)  # of the squashed picture, which comes first


class Gemma3(Family):
    """The picture squashed to a square."""

    name, image_processor, token_types = "gemma3", "Gemma3ImageProcessorPil", "token_type_ids"

    @property
    def place(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(int(self.config.boi_token_index)))

    def encode(self, pictures: Pictures) -> Encoded:
        made = dict(self.processor(images=_flat(pictures), return_tensors="pt"))
        made.pop("num_crops", None)
        end = self.tokenizer.convert_ids_to_tokens(int(self.config.eoi_token_index))
        text = f"\n\n{self.place}{self.image_token * int(self.config.mm_tokens_per_image)}{end}\n\n"
        return Encoded(made, [text] * len(_flat(pictures)))

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        return int(self.processor.size["width"]), int(self.processor.size["height"])

    def layout(self, width: int, height: int) -> Layout:
        side = math.isqrt(int(self.config.mm_tokens_per_image))
        return Layout(_grid(side, side), WHOLE)


class Idefics3(Family):
    """Square tiles of the picture, squashed to a multiple of them, each named by its row and column, and the whole picture at the end."""

    name, image_processor = "idefics3", "Idefics3ImageProcessorPil"

    @property
    def tile_tokens(self) -> int:
        """Tokens of one tile."""
        vision = self.config.vision_config
        return int(self.settings.get("image_seq_len") or (vision.image_size // vision.patch_size // self.config.scale_factor) ** 2)

    def encode(self, pictures: Pictures) -> Encoded:
        made = dict(self.processor(images=pictures, return_tensors="pt", return_row_col_info=True))
        rows, columns = (_flat(made.pop(name)) for name in ("rows", "cols"))
        return Encoded(made, [self._text(int(r), int(c)) for r, c in zip(rows, columns, strict=True)])

    def _text(self, rows: int, columns: int) -> str:
        around, tokens = "<fake_token_around_image>", self.image_token * self.tile_tokens
        lines = ["".join(f"{around}<row_{r + 1}_col_{c + 1}>{tokens}" for c in range(columns)) + "\n" for r in range(rows)]
        start = "\n" if rows else ""
        return "".join(lines) + f"{start}{around}<global-img>{tokens}{around}"

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return columns and rows of tiles, 0 and 0 for the whole picture alone."""
        import importlib

        module = importlib.import_module(type(self.processor).__module__)
        side = int(self.processor.max_image_size["longest_edge"])
        empty = np.broadcast_to(np.zeros(1, np.uint8), (3, height, width))
        high, wide = module.get_resize_output_image_size(empty, int(self.processor.size["longest_edge"]))
        aspect = wide / high
        if wide >= high:
            columns = math.ceil(wide / side)
            rows = math.ceil(int(columns * side / aspect) / side)
        else:
            rows = math.ceil(high / side)
            columns = math.ceil(int(rows * side * aspect) / side)
        return (0, 0) if not self.processor.do_image_splitting or max(rows, columns) < 2 else (columns, rows)

    def sent_size(self, width: int, height: int) -> tuple[int, int]:
        columns, rows = self.grid(width, height)
        side = int(self.processor.max_image_size["longest_edge"])
        return max(1, columns) * side, max(1, rows) * side

    def layout(self, width: int, height: int) -> Layout:
        columns, rows = self.grid(width, height)
        return Layout(_tiled(max(1, rows), max(1, columns), math.isqrt(self.tile_tokens)), WHOLE)


class SmolVLM(Idefics3):
    """As Idefics3."""

    name, image_processor = "smolvlm", "SmolVLMImageProcessorPil"


FAMILIES: dict[str, type[Family]] = {
    "qwen2_vl": Qwen,
    "qwen2_5_vl": Qwen,
    "qwen3_vl": Qwen,
    "qwen3_vl_moe": Qwen,
    "internvl": InternVL,
    "llava": Llava,
    "vipllava": Llava,
    "llava_onevision": LlavaOneVision,
    "gemma3": Gemma3,
    "idefics3": Idefics3,
    "smolvlm": SmolVLM,
}


def _flat(lists: list[list[Any]]) -> list[Any]:
    return [item for part in lists for item in part]


def _grid(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns).view(rows, columns)


def _tiled(rows: int, columns: int, side: int) -> Tensor:
    """Return [rows * side, columns * side]: tokens counted within a tile, tile after tile."""
    tiles = torch.arange(rows * columns * side**2).view(rows, columns, side, side)
    return tiles.transpose(1, 2).reshape(rows * side, columns * side)
