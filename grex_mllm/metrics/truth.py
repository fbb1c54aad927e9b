"""What is true of one expression, or of one set of objects: the half of a sample that every metric gets beside the prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from grex_mllm.errors import fault
from grex_mllm.ops.rle import Rle, empty_rle, segmentation_to_rle, union
from grex_mllm.types import ImageRecord, Instance

Size = tuple[int, int]


@dataclass
class Truth:
    """name: expression id, or image and targets, for messages. targets: annotation ids; none: no target.

    find_image: gives the image's record, when it is needed. texts: the expression, or all references of the set of objects.
    tasks: rules of all metrics of the protocol. find_mask: (image id, targets, size) -> `target_mask`, by one that remembers.
    """

    name: str
    targets: list[str]
    find_image: Callable[[], ImageRecord]
    texts: list[str] = field(default_factory=list)
    ref_id: str = ""
    tasks: dict[str, Any] = field(default_factory=dict)
    find_mask: Callable[[str, list[str], Size | None], Rle | None] | None = None

    @property
    def num_targets(self) -> int:
        return len(self.targets)

    @cached_property
    def image(self) -> ImageRecord:
        """The image's record: size and all instances."""
        return self.find_image()

    @property
    def boxes(self) -> list[list[float]]:
        """Boxes xyxy of the targets."""
        return [instance.box_xyxy for instance in target_instances(self.image, self.targets)]

    def mask(self, size: Size | None = None) -> Rle | None:
        """Return the union of the targets' masks at original size or at `size` = (height, width); None in box-only data."""
        if self.find_mask is not None:
            return self.find_mask(self.image.image_id, self.targets, size)
        return target_mask(self.image, self.targets, size)


def target_instances(image: ImageRecord, targets: Iterable[str]) -> list[Instance]:
    """Return the instances with these annotation ids, in the order of the ids.

    Raises:
        GrexError: a target that the image does not have.
    """
    known = {instance.annotation_id: instance for instance in image.instances}
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise fault(f'target "{unknown[0]}" of image {image.image_id}', "an annotation id of that image", "run grex data check")
    return [known[target] for target in targets]


def target_mask(image: ImageRecord, targets: list[str], size: Size | None = None) -> Rle | None:
    """Return the union of the targets' masks as run-length code; None where a target has none (box-only data)."""
    from grex_mllm.ops.masks import encode_rle

    found = [i.segmentation if i.mask is None else encode_rle(i.mask) for i in target_instances(image, targets)]
    if any(segmentation is None for segmentation in found):
        return None
    height, width = size or (image.height, image.width)
    codes = [segmentation_to_rle(segmentation, image.height, image.width, height, width) for segmentation in found]
    return union(codes) if codes else empty_rle(height, width)
