"""The photos that exports are verified on: noise would not tell a good map from a bad one."""

from importlib.resources import files

import numpy as np
import numpy.typing as npt

from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.preprocess import fit

PHOTOS = ("chelsea.jpg", "coffee.jpg", "astronaut.jpg", "rocket.jpg")

_MAX_PIXELS = 1_000_000


def load_photos(preprocess: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Four real photos at a model's input size.

    Args:
        preprocess: of the model.

    Returns:
        uint8 (4, H, W, 3), RGB, C-contiguous; (H, W) is `preprocess.crop_px`.
    """
    folder = files("heatlens_server.backends.torch.export") / "photos"
    images = [decode_image((folder / name).read_bytes(), max_pixels=_MAX_PIXELS) for name in PHOTOS]
    return np.stack([fit(image, preprocess).pixels for image in images])
