"""The JSON object that the command line writes of an answer for an image or a frame: see docs/json.md."""

from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from heatlens._exceptions import HeatlensError
from heatlens._results.results import ClassScore, Explanation, Result


@dataclass(frozen=True, slots=True)
class MapFiles:
    """What was written for one explanation; None: nothing."""

    overlay: Path | None = None
    map: Path | None = None
    predicted_mask: Path | None = None


@dataclass(frozen=True, slots=True)
class AnswerFiles:
    """What was written for one image.

    Attributes:
        explanations: for each explanation, in their order; empty: nothing.
        overlay: a picture of all detections.
        predicted_mask: the predicted classes.
        embedding: the image's embedding.
    """

    explanations: tuple[MapFiles, ...] = ()
    overlay: Path | None = None
    predicted_mask: Path | None = None
    embedding: Path | None = None


NO_FILES = AnswerFiles()


def answer_json(
    result: Result | None,
    *,
    status: str = "explained",
    path: str | None = None,
    frame_id: int | None = None,
    time_s: float | None = None,
    error: HeatlensError | None = None,
    latency_ms: float | None = None,
    files: AnswerFiles = NO_FILES,
) -> dict[str, Any]:
    """Return an answer as an object of JSON, which always has the same keys.

    Args:
        result: the answer; None: there is none.
        status: what became of the image: "explained", or of a frame also "skipped", "dropped" or "failed".
        path: what the user called the image.
        frame_id: the frame's place among those of its source.
        time_s: when the frame is shown, in seconds from the first one.
        error: why there is no answer.
        latency_ms: from when the frame was sent to its answer.
        files: what was written.
    """
    explanations: list[dict[str, Any]] = []
    if result is not None:
        written = files.explanations or repeat(MapFiles())
        explanations = [_explanation_json(*pair) for pair in zip(result.explanations, written, strict=False)]
    return {
        "path": path,
        "frame_id": frame_id,
        "time_s": None if time_s is None else round(time_s, 6),
        "status": status,
        "error": None if error is None else {"code": error.code, "reason": error.reason, "message": error.message},
        "model": result and result.model,
        "model_version": result and result.model_version,
        "source_size": result and result.source_size,
        "source_region": result and asdict(result.source_region),
        "predictions": [] if result is None else [_score_json(item) for item in result.predictions],
        "explanations": explanations,
        "overlay": _name(files.overlay),
        "predicted_mask": _name(files.predicted_mask),
        "embedding": _name(files.embedding),
        "warnings": [] if result is None else list(result.warnings),
        "latency_ms": None if latency_ms is None else round(latency_ms, 3),
        "timing": result and asdict(result.timing),
    }


def _score_json(item: ClassScore | Explanation) -> dict[str, Any]:
    """Return what both a prediction and an explanation say of a class. A regression has a value and no probability."""
    scored = item.value is None
    return {
        "class_id": item.class_id,
        "label": item.label,
        "logit": item.logit if scored else None,
        "probability": item.probability if scored else None,
        "value": item.value,
    }


def _explanation_json(item: Explanation, files: MapFiles) -> dict[str, Any]:
    height_px, width_px = item.heatmap.values.shape
    return _score_json(item) | {
        "scale": item.heatmap.scale,
        "offset": item.heatmap.offset,
        "flat": item.heatmap.is_flat,
        "map_height": height_px,
        "map_width": width_px,
        "area": item.area,
        "box": item.box and asdict(item.box),
        "faithfulness": item.faithfulness and item.faithfulness.by_metric(),
        "overlay": _name(files.overlay),
        "map": _name(files.map),
        "predicted_mask": _name(files.predicted_mask),
    }


def _name(path: Path | None) -> str | None:
    return None if path is None else str(path)
