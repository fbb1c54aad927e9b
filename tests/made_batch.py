"""A batch made of masks and boxes, and the released loss weights, for several test files."""

from __future__ import annotations

import torch

from grex_mllm.models.decoders.rela.config import RelaConfig, RelaLossConfig
from grex_mllm.types import Batch, Geometry

RELEASED = RelaConfig(
    loss=RelaLossConfig(mask=5.0, minimap=0.5, no_target=0.5, box_l1=0, box_giou=0, box_score=0, count=0, minimap_target="truncated")
)


def make_batch(masks: torch.Tensor, boxes: list[torch.Tensor]) -> Batch:
    """Wrap masks [E, H, W] and boxes as a batch of one image per expression."""
    count = torch.tensor([len(b) for b in boxes])
    num, height, width = masks.shape
    return Batch(
        image=torch.zeros(num, 3, height, width, dtype=torch.uint8),
        image_index=torch.arange(num),
        text_ids=torch.zeros(num, 4, dtype=torch.int64),
        text_mask=torch.ones(num, 4, dtype=torch.int64),
        gt_masks=masks,
        gt_boxes_norm=boxes,
        gt_count=count,
        no_target=count == 0,
        target_index=[torch.arange(int(n)) for n in count],
        instance_masks=[torch.zeros(int(n), height, width, dtype=torch.bool) for n in count],
        instance_boxes_norm=boxes,
        geometries=[Geometry(height, width, height, width)] * num,
        expression_ids=[str(i) for i in range(num)],
        image_ids=[str(i) for i in range(num)],
    )
