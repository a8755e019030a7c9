"""Clips that tests of `heatlens video` watch, and what the command leaves behind."""

import json
from fractions import Fraction

import av
import cv2
import numpy as np

from heatlens._video.quiet import silence

# The tests open videos themselves.
silence()

FPS = 12.5
SIZE = (65, 49)


def picture(index, size=SIZE):
    """A square that moves over a dark ground."""
    pixels = np.full((size[1], size[0], 3), 40, np.uint8)
    left = 2 * index % (size[0] - 16)
    pixels[20:36, left : left + 16] = (60, 200, 120)
    return pixels


def write_clip(path, frames, size=SIZE):
    # PNG in MOV: exact, and OpenCV's own writer cuts odd sizes.
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=Fraction(FPS))
        stream.width, stream.height = size
        stream.pix_fmt = "rgb24"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, size), format="bgr24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def read_film(path):
    """A film's frames per second and frames."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (found := capture.read())[0]:
        frames.append(found[1])
    return capture.get(cv2.CAP_PROP_FPS), frames


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text.strip()


def statuses(path):
    return [line["status"] for line in lines_of(path.read_text())]
