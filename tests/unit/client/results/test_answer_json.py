"""What the command line writes as JSON is what docs/json.md says, key by key and type by type."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from heatlens import (
    ClassScore,
    Explanation,
    Faithfulness,
    Heatmap,
    InternalError,
    PixelBox,
    Result,
    Timing,
)
from heatlens._results.answer_json import AnswerFiles, MapFiles, answer_json

PAGE = (Path(__file__).parents[4] / "docs" / "json.md").read_text()
TYPES = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "list": list,
    "null": type(None),
}
BOX = PixelBox(1, 2, 3, 4)


def table(title):
    """The keys of a section, each with the types that it may have."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE)
    return {key: words.split(" or ") for keys, words in rows for key in re.findall(r"`(\w+)`", keys)}


PREDICTION = table("A prediction")
TABLES = {"answer": table("The answer"), "prediction": PREDICTION, "explanation": PREDICTION | table("An explanation")}


def check(told, name):
    assert list(told) == list(TABLES[name])
    for key, kinds in TABLES[name].items():
        allowed = tuple(kind for word in kinds for kind in np.atleast_1d(TYPES[word]))
        assert isinstance(told[key], allowed), key
        assert not (isinstance(told[key], bool) and "boolean" not in kinds), key
    return told


def explanation(**fields):
    heatmap = Heatmap(
        values=np.array([[0, 1]], np.float32), scale=2.0, offset=0.5, region=BOX, placed=False, source_size=(8, 6)
    )
    return Explanation(**{"class_id": 3, "label": "cat", "logit": 1.5, "probability": 0.5, "heatmap": heatmap} | fields)


def result(*explanations, predictions=(), warnings=()):
    return Result(
        explanations=explanations,
        predictions=predictions,
        source_region=BOX,
        source_size=(8, 6),
        model="tiny",
        model_version="1",
        timing=Timing(queue_ms=1, preprocess_ms=2, compute_ms=3, batch_size=4),
        warnings=warnings,
    )


def written(*arguments, **options):
    """As a reader of the line sees it."""
    told = check(json.loads(json.dumps(answer_json(*arguments, **options), allow_nan=False)), "answer")
    for item in told["predictions"]:
        check(item, "prediction")
    for item in told["explanations"]:
        check(item, "explanation")
    return told


def test_an_image():
    items = (
        explanation(area=0.25, box=BOX, faithfulness=Faithfulness(deletion=0.1, road_lerf=0.2)),
        explanation(logit=0.0, probability=0.0, value=12.5),
    )
    files = AnswerFiles(
        (MapFiles(Path("o.png"), Path("m.npy"), Path("k.png")), MapFiles()),
        overlay=Path("all.png"),
        predicted_mask=Path("mask.png"),
        embedding=Path("e.npy"),
    )
    answered = result(*items, predictions=(ClassScore(1, "dog", -1.0, 0.25),), warnings=("dark",))
    told = written(answered, path="cat.jpg", files=files)
    assert (told["path"], told["status"], told["model"], told["warnings"]) == ("cat.jpg", "explained", "tiny", ["dark"])
    assert (told["source_size"], told["source_region"]["right"]) == ([8, 6], 3)
    assert (told["overlay"], told["predicted_mask"], told["embedding"]) == ("all.png", "mask.png", "e.npy")
    first, second = told["explanations"]
    assert (first["logit"], first["probability"], first["value"]) == (1.5, 0.5, None)
    assert (first["scale"], first["offset"], first["flat"]) == (2.0, 0.5, False)
    assert (first["map_height"], first["map_width"], first["area"]) == (1, 2, 0.25)
    assert first["box"] == {"left": 1, "top": 2, "right": 3, "bottom": 4}
    assert first["faithfulness"] == {"deletion": 0.1, "road-lerf": 0.2}
    assert (first["overlay"], first["map"], first["predicted_mask"]) == ("o.png", "m.npy", "k.png")
    # A regression has no probabilities, not those of 0.
    assert (second["logit"], second["probability"], second["value"]) == (None, None, 12.5)
    assert second["overlay"] is None
    assert told["predictions"][0]["label"] == "dog"


@pytest.mark.parametrize("status", ["skipped", "dropped", "failed"])
def test_a_frame_without_an_answer(status):
    error = InternalError("oh", reason="OOPS") if status == "failed" else None
    told = written(None, status=status, frame_id=7, time_s=1.23456789, latency_ms=1.23456, error=error)
    assert (told["status"], told["frame_id"], told["time_s"], told["latency_ms"]) == (status, 7, 1.234568, 1.235)
    assert (told["explanations"], told["model"], told["timing"]) == ([], None, None)
    expected = {"code": "INTERNAL", "reason": "OOPS", "message": "oh"} if error else None
    assert told["error"] == expected


def test_a_detector_that_found_nothing():
    assert written(result(), path="a.jpg")["explanations"] == []
