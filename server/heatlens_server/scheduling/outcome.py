"""What an engine gave or raised, as callers get it."""

import numpy as np

from heatlens_server.core.errors import DeviceOutOfMemory, HeatlensError, InternalError
from heatlens_server.core.results import ImageResult


def checked(result: ImageResult) -> ImageResult | Exception:
    """The result; an error in its place if a score or map is not finite."""
    if not (np.isfinite(result.logits).all() and np.isfinite(result.maps).all()):
        return InternalError("the model gave a score or map that is not finite")
    return result


def as_domain_error(error: BaseException) -> HeatlensError:
    """What an engine raised on a single image, in the house's terms."""
    if isinstance(error, HeatlensError):
        return error
    if isinstance(error, MemoryError):
        return DeviceOutOfMemory("the device has not enough memory for this image", retry_after_s=1.0)
    return InternalError(f"the engine failed: {error!r}")
