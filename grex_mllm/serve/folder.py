"""A folder of images that a server searches. Clients name its images by ids, never by paths; what runs here runs in the worker's thread."""

from __future__ import annotations

import hashlib
from typing import Any

from grex_mllm.data.images import UNREADABLE
from grex_mllm.errors import GrexError, fault
from grex_mllm.search.folder import short_reason
from grex_mllm.search.index import SearchIndex
from grex_mllm.serve.engine import shown
from grex_mllm.serve.pictures import Picture, kept

DIGITS = 24


class Folder:
    """The images of an index, by id. The index is as it was when the server started."""

    def __init__(self, index: SearchIndex) -> None:
        self.index = index
        self._files = {id_of(file): file for file in index.files}

    def __len__(self) -> int:
        return len(self._files)

    def rank(self, asked: list[tuple[str, int]]) -> list[tuple[int, list[dict[str, Any]]]]:
        """Answer (expression, top) pairs: how many images have what is said, and the best of them, without masks."""
        found = {text: self.index.found(text) for text in dict.fromkeys(text for text, _ in asked)}
        answers = []
        for text, top in asked:
            lines = [
                {
                    "rank": place,
                    "id": id_of(hit.file),
                    "file": hit.file,
                    **{name: round(getattr(hit, name), 4) for name in ("score", "no_target_prob", "region_score")},
                }
                for place, hit in enumerate(found[text][:top], start=1)
            ]
            answers.append((len(found[text]), lines))
        return answers

    def picture(self, name: str) -> Picture:
        """Return an image as the server keeps pictures: upright, scaled to a longer side of MAX_SIDE.

        Raises:
            GrexError: an id of no image, or a file that can no longer be read.
        """
        file = self._files.get(name)
        if file is None:
            raise fault("an id that this server's folder does not hold", 'an "id" of POST /search', "search again")
        return kept(self.index.read(file))

    def ground(self, name: str, expression: str) -> dict[str, Any]:
        """Ground an expression in an image: the fields of POST /ground and the size they refer to; or why that image gives none."""
        try:
            picture = self.picture(name)
        except (GrexError, *UNREADABLE) as error:  # it was changed or taken away since the server started
            return {"error": short_reason(error)}
        height, width = picture.pixels.shape[:2]
        return {"width": width, "height": height, **shown(self.index.model.ground(picture.pixels, expression))}


def id_of(file: str) -> str:
    """Return the id of an image: the same in every server of a folder, and no path."""
    return hashlib.blake2b(file.encode(), digest_size=DIGITS // 2).hexdigest()
