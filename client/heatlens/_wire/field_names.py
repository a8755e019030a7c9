"""From a field's path in the protocol, as errors of the server name it, to the argument that the caller knows."""

import re

from heatlens._wire.requests import OPTIONS

# What a path begins with, and what the SDK calls it: the options of `explain` and `stream`, then the rest.
_ARGUMENTS = {
    **{f"options.{option.field}": name for name, option in OPTIONS.items() if option.field},
    "options.reference_embedding": "reference",
    "options.reference_image": "reference",
    "image": "image",
    "frame.image": "frame",
    "frame.frame_id": "frame_id",
    "frame.capture_time": "capture_time",
    "explain_every": "every",
    "max_frames_per_second": "max_fps",
    "overflow_policy": "overflow",
    "replacement_policy": "on_replace",
    "temporal_smoothing": "smooth",
    "max_in_flight": "max_in_flight",
    "frame_timeout": "frame_timeout",
    "model": "model",
    "model_version": "version",
}
# The lists whose elements are the caller's own, in the caller's order.
_ELEMENT = re.compile(r"(?:\.values|\.metrics)?(\[\d+\])$")


def argument_of(path: str) -> str:
    """Return the argument that a path stands for: "options.layers[1]" is "layers[1]"; an unknown path as it is."""
    of_call = path.removeprefix("config.")
    for field, name in _ARGUMENTS.items():
        rest = of_call.removeprefix(field)
        if of_call.startswith(field) and (not rest or rest[0] in ".["):
            element = _ELEMENT.match(rest)
            return name + (element[1] if element else "")
    return path
