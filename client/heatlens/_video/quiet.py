"""OpenCV and FFmpeg print what they think of a file on stderr. What matters we say ourselves, in one line."""

import os

import cv2


def silence() -> None:
    """Keep OpenCV and its FFmpeg from writing to stderr, unless the environment asks for it. Idempotent.

    FFmpeg's part only takes effect before OpenCV opens its first video.
    """
    # AV_LOG_QUIET is -8.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
