"""Clips for tests of `heatlens video`, and what the command leaves behind."""

import json
from fractions import Fraction

import av
import cv2
import numpy as np

FPS = 12.5
SIZE = (65, 49)


def picture(index, size=SIZE):
    """A square that moves over a dark ground, in OpenCV's order of colours."""
    pixels = np.full((size[1], size[0], 3), 40, np.uint8)
    left = 2 * index % (size[0] - 16)
    pixels[20:36, left : left + 16] = (60, 200, 120)
    return pixels


def write_clip(path, frames, size=SIZE):
    """PNG in MOV: exact, and of any size."""
    pictures = [picture(index, size) for index in range(frames)]
    return write_video(path, pictures, codec="png", pix_fmt="rgb24", order="bgr24")


def write_video(
    path, pictures, fps=FPS, *, codec="mpeg4", pix_fmt="yuv420p", order="rgb24", times_s=None, rotation=0, sound_s=0
):
    """Write pictures, shown at constant rate or at their times, maybe turned by whole degrees, maybe with silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.pix_fmt = pix_fmt
        stream.height, stream.width = pictures[0].shape[:2]
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound_s else None
        if rotation:
            stream.set_display_rotation(rotation)
        for second in range(sound_s):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.sample_rate, silence.pts = 8000, 8000 * second
            container.mux(sound.encode(silence))
        tick_s = 1 / Fraction(fps) if times_s is None else Fraction(1, 1000)
        stream.codec_context.time_base = tick_s
        for index, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format=order)
            frame.pts, frame.time_base = index if times_s is None else round(times_s[index] * 1000), tick_s
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def break_off(path, share):
    """Damage a Motion JPEG film from a part of it on; the index that tells how many frames there are stays."""
    data = bytearray(path.read_bytes())
    start, end = round(len(data) * share), data.rindex(b"idx1") - 8
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def read_film(path):
    """A film's frames per second and its frames, in OpenCV's order of colours: by another reader than ours."""
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
