"""Repack a part of the recorded run of the released ReLA into `tests/data/rela_parts.npz`, for tests that need nothing else.

The recording (`oracle/rela_nano_swin`: a narrow model with random weights, run by the authors' code) has 25 MB. The part holds what
sample 0 needs to go through the first Swin stage with its pixel-word fusion, the first layer of the pixel decoder and the first layer of
the region decoder, and both samples' last region features, answers and losses with the gradients of the no-target head.

    python tests/repack_oracle.py ../shared/oracle/rela_nano_swin tests/data/rela_parts.npz

Inputs and outputs are the recorded float32 numbers; of long outputs every n-th row. Weights keep the upper 24 of their 32 bits (a relative
error of at most 2^-16), since they would exceed 1 MB otherwise: outputs of spread 1 move by less than 1e-4. Floats are stored as four
planes of bytes [4, *shape], lowest byte first, because the planes compress. The same input gives the same bytes (with the same zlib).
"""

from __future__ import annotations

import io
import lzma
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grex_mllm.convert.rela import map_keys

FILE = Path(__file__).parent / "data" / "rela_parts.npz"
DROPPED_BITS = 8
STAGE = ("vision.stages.0.", "vision.norms.0.")
PIXEL_DECODER = ("pixel_decoder.inputs.", "pixel_decoder.level_embed", "pixel_decoder.layers.0.")
DECODER = tuple(
    f"decoder.language_part.{part}"
    for part in ("region_features.", "region_positions.", "language_weight", "region_image.0.", "region_region.0.",
                 "region_language.0.", "feedforward.0.", "norm.", "heads.mask.", "heads.no_target.")
) + tuple(f"decoder.image_part.{part}" for part in ("level_embed.", "keys.0.", "values.0."))  # fmt: skip
# recorded outputs of sample 0 -> every n-th row is kept
EVERY = {
    "swin.0.blocks_out": 12, "swin.0.pwam_lang": 12, "swin.0.pwam": 12, "swin.0.res_gate": 12, "swin.0.downsample": 4,
    "backbone/res2": 12, "pixel_encoder.0": 4,
    "decoder.0.RIA": 5, "decoder.RLA_lang_att": 5, "decoder.0.RLA_vision": 5, "decoder.0.ffn": 5,
}  # fmt: skip
NO_TARGET_HEAD = "sem_seg_head.predictor.nt_embed."
# the rows and columns of the 24 x 32 mask features that bilinear resizing to the coarsest level, 3 x 4, reads
READ_ROWS = [8 * i + k for i in range(3) for k in (3, 4)]
READ_COLUMNS = [8 * i + k for i in range(4) for k in (3, 4)]


def main(source: Path, target: Path) -> None:
    """Write the part of the recording in folder `source` to `target`."""
    write(pack(source), target)
    print(f"{target}: {target.stat().st_size:,} bytes")


def pack(source: Path) -> dict[str, np.ndarray]:
    """Return name -> array of the part: `weight/` under our names, `recorded/` under the recording's, `gt_masks`, `no_target`."""
    recorded = torch.load(source / "oracle.pt", weights_only=True)
    state = torch.load(io.BytesIO(lzma.decompress((source / "checkpoint.pth.xz").read_bytes())), weights_only=True)["model"]
    weights, _ = map_keys(state, str(source))
    kept = {name: value for name, value in weights.items() if name.startswith(STAGE + PIXEL_DECODER + DECODER)}
    arrays = {f"weight/{name}": planes(value, DROPPED_BITS) for name, value in kept.items()}
    arrays |= {f"recorded/{name}": planes(value) for name, value in (_tensors(recorded) | _training(recorded)).items()}
    arrays["gt_masks"] = np.packbits(torch.cat([s["gt_mask_merged"] for s in recorded["inputs"]]).numpy().astype(bool), axis=-1)
    arrays["no_target"] = np.array([bool(s["empty"]) for s in recorded["inputs"]])
    return arrays


def _tensors(recorded: dict[str, Any]) -> dict[str, Tensor]:
    """Inputs and outputs of the forward pass."""
    found = recorded["eval"]
    num_words = int(recorded["inputs"][0]["lang_mask"].sum())
    maps = found["backbone"]
    tensors = {f"backbone/{name}": maps[name][0] for name in ("res3", "res4", "res5")}
    tensors |= {
        "text_features": found["text_features"][0, :num_words],
        "swin.patch_embed": found["swin.patch_embed"][0],
        "multi_scale_features/0": found["multi_scale_features"][0][0],
        "mask_features": found["mask_features"][0][:, READ_ROWS][:, :, READ_COLUMNS],
        "decoder.lang_proj": found["decoder.lang_proj"][0],
        "decoder.0.attn_mask_head0": found["decoder.0.attn_mask_head0"][0],
        "decoder.8.ffn": found["decoder.8.ffn"].transpose(0, 1),
    }
    tensors |= {f"head_out/{name}": found["head_out"][name] for name in ("pred_logits", "pred_masks", "nt_label")}
    outputs = {name: found[name][0] for name in EVERY if name.startswith(("swin", "pixel"))}
    outputs |= {name: found[name][:, 0] for name in EVERY if name.startswith("decoder")}
    outputs["backbone/res2"] = maps["res2"][0].flatten(1).T
    return tensors | {name: outputs[name][::step] for name, step in EVERY.items()}


def _training(recorded: dict[str, Any]) -> dict[str, Tensor]:
    """Losses, and the gradients of the no-target head under our names: no other parameter's can be had without the whole model."""
    train = recorded["train"]
    numbers = {f"loss/{name}": value for name, value in train["ce_terms_unweighted"].items()}
    numbers["loss/total"] = train["losses"]["loss_mask"]
    tensors = {name: torch.tensor(float(value)) for name, value in numbers.items()}
    for key, value in train["grad_norm"].items():
        if key.startswith(NO_TARGET_HEAD):
            name = key.removeprefix(NO_TARGET_HEAD)
            tensors[f"grad_norm/{name}"], tensors[f"grad_first16/{name}"] = torch.tensor(float(value)), train["grad_first16"][key]
    return tensors


def planes(value: Tensor, dropped_bits: int = 0) -> np.ndarray:
    """Return uint8 [4, *shape]: the bytes of float32 values, lowest first, after rounding off the lowest bits."""
    bits = np.array(value.detach().float().contiguous().numpy().astype("<f4"), ndmin=1).view("<u4")
    if dropped_bits:
        bits = (bits + np.uint32(1 << (dropped_bits - 1))) & ~np.uint32((1 << dropped_bits) - 1)
    return np.stack([(bits >> np.uint32(8 * i)).astype(np.uint8) for i in range(4)]).reshape(4, *value.shape)


def floats(stored: np.ndarray) -> Tensor:
    """Invert `planes`."""
    bits = sum(plane.astype(np.uint32) << np.uint32(8 * i) for i, plane in enumerate(stored))
    return torch.from_numpy(np.array(bits, dtype="<u4", ndmin=1).view("<f4").reshape(stored.shape[1:]).astype(np.float32))


def write(arrays: dict[str, np.ndarray], target: Path) -> None:
    """Write an npz without times of day, in the order of the names."""
    with zipfile.ZipFile(target, "w") as archive:
        for name in sorted(arrays):
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, 9)


def read(path: Path = FILE) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """Return weights, recorded tensors, gt_masks bool [2, 96, 128] and no_target bool [2]."""
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    weights, recorded = (
        {name.removeprefix(kind): floats(value) for name, value in arrays.items() if name.startswith(kind)}
        for kind in ("weight/", "recorded/")
    )
    masks = np.unpackbits(arrays["gt_masks"], axis=-1).astype(bool)
    return weights, recorded, torch.from_numpy(masks), torch.from_numpy(arrays["no_target"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
