"""The photos that exports are verified on."""

from importlib.resources import files

import numpy as np

import export_networks
from export_networks import make
from heatlens_server.backends.torch.export.photos import PHOTOS, load_photos
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec

FOLDER = files("heatlens_server.backends.torch.export") / "photos"


def test_photos_are_small_and_their_licences_are_told():
    told = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in PHOTOS:
        assert len((FOLDER / name).read_bytes()) <= 30_000
        assert f"`{name}`" in told


def test_photos_come_at_the_model_s_size_and_differ():
    images = load_photos(make(export_networks.Staged).preprocess)
    assert images.shape == (4, export_networks.PX, export_networks.PX, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert all(images[a].std() > 20 and (a == b or np.any(images[a] != images[b])) for a in range(4) for b in range(4))


def test_oblong_inputs():
    spec = PreprocessSpec((300, 200), (299, 180), (0.5,) * 3, (0.5,) * 3, Interpolation.BICUBIC)
    assert load_photos(spec).shape == (4, 299, 180, 3)
