"""What `heatlens explain -o DIR` writes for an image: overlays, maps, masks, an embedding."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.answer_json import AnswerFiles, MapFiles
from heatlens._results.geometry import place_mask
from heatlens._results.images import ImageSource, UInt8Array, decode_image, write_image, write_mask
from heatlens._results.results import Explanation, Result
from heatlens._video.draw import Annotation, annotation_of, draw, one_annotation


@dataclass(frozen=True, slots=True)
class AnswerFolder:
    """Where answers are written, and how their overlays look.

    Attributes:
        path: an existing folder.
        colormap: name of an OpenCV colour map.
        alpha: opacity of the maps, in [0, 1].
    """

    path: Path
    colormap: str
    alpha: float

    def write(self, result: Result, image: ImageSource, stem: str) -> AnswerFiles:
        """Write all that an answer holds, under names that begin with `stem`.

        Where the image cannot be drawn here, though the server could read it, an overlay is the map alone.

        Raises:
            OSError: a file cannot be written.
        """
        try:
            pixels = decode_image(image)
        except InvalidArgumentError:
            pixels = None
        seen: Counter[int] = Counter()
        explanations = []
        for item in result.explanations:
            # Detections may be several of one class.
            seen[item.class_id] += 1
            number = seen[item.class_id]
            name = f"{stem}-{item.class_id}" + (f"-{number}" if number > 1 else "")
            explanations.append(self._write_one(result, item, pixels, name))
        overlay = mask = embedding = None
        if pixels is not None and any(item.box is not None for item in result.explanations):
            overlay = self.path / f"{stem}-all.png"
            self._draw(overlay, pixels, annotation_of(result, pixels.shape[1::-1]))
        if result.predicted_mask is not None:
            mask = self._write_mask(result, result.predicted_mask, stem)
        if result.embedding is not None:
            embedding = self.path / f"{stem}-embedding.npy"
            np.save(embedding, result.embedding, allow_pickle=False)
        return AnswerFiles(tuple(explanations), overlay=overlay, predicted_mask=mask, embedding=embedding)

    def _write_one(self, result: Result, item: Explanation, pixels: UInt8Array | None, name: str) -> MapFiles:
        overlay, values = self.path / f"{name}.png", self.path / f"{name}.npy"
        item.heatmap.save(values)
        if pixels is None:
            item.heatmap.save(overlay, colormap=self.colormap)
        else:
            self._draw(overlay, pixels, one_annotation(item, pixels.shape[1::-1]))
        mask = None if item.predicted_mask is None else self._write_mask(result, item.predicted_mask, name)
        return MapFiles(overlay=overlay, map=values, predicted_mask=mask)

    def _draw(self, path: Path, pixels: UInt8Array, annotation: Annotation) -> None:
        write_image(path, draw(pixels, annotation, colormap=self.colormap, alpha=self.alpha))

    def _write_mask(self, result: Result, mask: UInt8Array, name: str) -> Path:
        """Write a mask of the source image's size, which `mask` of another call must have, whatever the maps' size."""
        path = self.path / f"{name}-mask.png"
        size = result.source_size
        if size is not None and mask.shape != size[::-1]:
            mask = place_mask(mask, result.source_region, size)
        write_mask(path, mask)
        return path
