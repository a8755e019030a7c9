"""Explain a camera with the SDK: `python examples/webcam.py [CAMERA] [ADDRESS]`, Ctrl-C ends it.

CAMERA is a number, 0 if not given, or anything else that OpenCV opens. The newest explained frame is always in
out/webcam.jpg, for a picture viewer that reloads: this needs no screen of its own.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from heatlens import Client

PICTURE = Path("out/webcam.jpg")


def frames(camera: str) -> Iterator[np.ndarray]:
    """Yield a camera's frames: uint8 (H, W, 3), RGB."""
    capture = cv2.VideoCapture(int(camera) if camera.isdigit() else camera)
    try:
        while True:
            read, picture = capture.read()
            if not read:
                return
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def show(picture: np.ndarray) -> None:
    """Put a picture where a viewer looks, all at once."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    unfinished = PICTURE.with_suffix(".new.jpg")
    cv2.imwrite(str(unfinished), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    unfinished.replace(PICTURE)


def main(camera: str = "0", address: str = "localhost:50051") -> None:
    """Explain frames until the camera ends."""
    with (
        Client(address) as client,
        client.stream(overflow="drop-oldest", smooth=0.6, max_in_flight=4, jpeg_quality=85) as stream,
    ):
        for item in stream.map(frames(camera)):
            if item.result is None:
                continue  # dropped: a newer frame is on its way
            top = item.result.explanations[0]
            print(f"{item.latency_ms:6.0f} ms  {top.probability:4.0%}  {top.label}")
            show(top.heatmap.overlay(item.frame))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
