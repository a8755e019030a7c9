"""Fitting images to a model's input, against torchvision's and timm's own transforms."""

import dataclasses
import time

import numpy as np
import pytest
import timm.data
import torch
import torchvision.transforms as T
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from heatlens_server.core.geometry import place_map
from heatlens_server.core.preprocess import ChannelOrder, Interpolation, PreprocessSpec
from heatlens_server.imaging.preprocess import fit, normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = [Interpolation.BILINEAR, Interpolation.BICUBIC, Interpolation.LANCZOS]


def spec(resize_px=256, crop_px=(224, 224), interpolation=Interpolation.BILINEAR, mean=MEAN, std=STD):
    return PreprocessSpec(resize_px=resize_px, crop_px=crop_px, mean=mean, std=std, interpolation=interpolation)


@pytest.fixture(scope="module")
def photos():
    return {
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "astronaut": data.astronaut(),
        "rocket": data.rocket(),
        "china": load_sample_images().images[0],
    }


def torchvision_fit(image, resize_px, crop_px, interpolation):
    mode = T.InterpolationMode(interpolation.value)
    resize = T.Resize(resize_px, interpolation=mode)
    return np.asarray(T.CenterCrop(crop_px)(resize(Image.fromarray(image))))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("resize_px", "crop_px"), [(256, 224), (224, 224), (342, 299), (40, 32), ((96, 128), (96, 96))]
)
def test_fit_equals_torchvision(photos, interpolation, resize_px, crop_px):
    for photo in photos.values():
        for image in (photo, np.ascontiguousarray(photo.swapaxes(0, 1))):
            crop = (crop_px, crop_px) if isinstance(crop_px, int) else crop_px
            ours = fit(image, spec(resize_px, crop, interpolation)).pixels
            theirs = torchvision_fit(image, resize_px, crop_px, interpolation)
            difference = np.abs(ours.astype(int) - theirs)
            # Rounding of the box's corner: a level on few values, two levels on hardly any.
            assert difference.max() <= 2
            assert (difference > 1).mean() < 1e-5
            # Pillow 13 squashes tall images columns first.
            assert isinstance(resize_px, tuple) or (difference > 0).mean() < 0.02


@pytest.mark.parametrize("interpolation", FILTERS)
def test_fit_equals_torchvision_on_noise_of_any_size(interpolation):
    rng = np.random.default_rng(7)
    for _ in range(20):
        height, width = rng.integers(2, 300, 2)
        height = min(height, 2 * width)  # beyond, Pillow 13 resamples in the other order
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = fit(image, spec(72, (64, 64), interpolation)).pixels
        assert np.abs(ours.astype(int) - torchvision_fit(image, 72, 64, interpolation)).max() <= 2


def test_nearest_reads_the_pixels_that_torchvision_reads(photos):
    for image in photos.values():
        ours = fit(image, spec(256, (224, 224), Interpolation.NEAREST)).pixels
        theirs = torchvision_fit(image, 256, 224, Interpolation.NEAREST)
        assert (ours != theirs).any(axis=2).mean() < 0.01


def test_input_tensor_equals_timm_create_transform(photos):
    for interpolation in ("bilinear", "bicubic"):
        transform = timm.data.create_transform(
            (3, 224, 224), is_training=False, interpolation=interpolation, mean=MEAN, std=STD, crop_pct=0.875
        )
        for image in photos.values():
            own = spec(interpolation=Interpolation(interpolation))
            ours = normalise(fit(image, own).pixels, own)
            theirs = transform(Image.fromarray(image)).numpy()
            assert np.abs(ours - theirs).max() <= 1 / 255 / min(STD) + 1e-5


def test_squashing_equals_timm(photos):
    transform = timm.data.create_transform(
        (3, 128, 128), is_training=False, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=1.0, crop_mode="squash"
    )
    for image in photos.values():
        squashed = spec((128, 128), (128, 128), Interpolation.BICUBIC)
        ours = normalise(fit(image, squashed).pixels, squashed)
        assert np.abs(ours - transform(Image.fromarray(image)).numpy()).max() <= 1 / 255 / min(STD) + 1e-5


def test_normalise_equals_torchvision(photos):
    pixels = fit(photos["chelsea"], spec()).pixels
    theirs = T.Normalize(MEAN, STD)(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255).numpy()
    np.testing.assert_allclose(normalise(pixels, spec()), theirs, atol=1e-6)


def test_region_is_the_crop_in_source_pixels():
    fitted = fit(np.zeros((300, 450, 3), np.uint8), spec(100, (80, 80)))
    # Resized to 100x150, cropped at (top 10, left 35): three source pixels to one.
    region = fitted.region
    assert (region.left, region.top, region.right, region.bottom) == pytest.approx((105, 30, 345, 270))
    assert (fitted.source_width_px, fitted.source_height_px) == (450, 300)


def test_region_tracks_a_marked_pixel():
    image = np.zeros((200, 320, 3), np.uint8)
    image[50:60, 200:210] = 255
    fitted = fit(image, spec(128, (96, 96)))
    rows, columns = np.nonzero(fitted.pixels[..., 0] > 127)
    region = fitted.region
    x = region.left + (columns.mean() + 0.5) * (region.right - region.left) / 96
    y = region.top + (rows.mean() + 0.5) * (region.bottom - region.top) / 96
    assert (x, y) == pytest.approx((205, 55), abs=1.0)


def test_squashed_region_is_the_whole_image():
    region = fit(np.zeros((30, 50, 3), np.uint8), spec((16, 16), (16, 16))).region
    assert (region.left, region.top, region.right, region.bottom) == (0, 0, 50, 30)


@pytest.mark.parametrize("shape", [(1, 1), (10, 20000), (20000, 10), (1, 100_000), (100_000, 1)])
@pytest.mark.parametrize("interpolation", list(Interpolation))
def test_extreme_shapes_cost_no_more_than_a_photo(shape, interpolation):
    image = np.full((*shape, 3), 77, np.uint8)
    times_s = []
    for _ in range(3):  # another test may have the processor's caches
        started = time.process_time()
        fitted = fit(image, spec(interpolation=interpolation))
        times_s.append(time.process_time() - started)
    assert min(times_s) < 0.05
    assert fitted.pixels.shape == (224, 224, 3)
    assert (fitted.pixels == 77).all()


@pytest.mark.parametrize(
    ("resize_px", "max_side_px", "shape", "expected"),
    [
        (None, None, (30, 50), (30, 50)),
        (None, 40, (30, 50), (24, 40)),
        (None, 40, (50, 30), (40, 24)),
        (20, None, (30, 50), (20, 33)),
        (60, None, (30, 50), (60, 100)),
        (60, 90, (30, 50), (54, 90)),
        # What would be no pixels high is one.
        (520, 1333, (10, 20000), (1, 1333)),
    ],
)
def test_inputs_of_any_size_are_the_whole_image(resize_px, max_side_px, shape, expected):
    any_size = PreprocessSpec(resize_px, None, MEAN, STD, Interpolation.BILINEAR, max_side_px)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    fitted = fit(image, any_size)
    assert fitted.pixels.shape == (*expected, 3)
    assert fitted.pixels.flags.c_contiguous
    region = fitted.region
    assert (region.left, region.top, region.right, region.bottom) == (0, 0, shape[1], shape[0])
    if resize_px is not None and min(expected) > 1:
        theirs = np.asarray(T.Resize(resize_px, max_size=max_side_px)(Image.fromarray(image)))
        assert np.abs(fitted.pixels.astype(int) - theirs).max() <= 1


def test_image_of_the_right_size_passes_untouched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(image, spec(32, (32, 32))).pixels, image)


def test_read_only_and_strided_images_are_accepted():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    frozen = image[:, ::-1]
    frozen.flags.writeable = False
    expected = fit(np.ascontiguousarray(frozen), spec(40, (32, 32))).pixels
    fitted = fit(frozen, spec(40, (32, 32))).pixels
    np.testing.assert_array_equal(fitted, expected)
    assert fitted.flags.c_contiguous


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize_px": 200}, "resize_px .* is smaller than crop_px"),
        ({"resize_px": (256, 200)}, "is smaller than crop_px"),
        ({"resize_px": 0, "crop_px": (0, 0)}, "at least 1"),
        ({"resize_px": 0, "crop_px": None}, "at least 1"),
        ({"resize_px": None}, "crop_px needs resize_px"),
        ({"resize_px": (64, 64), "crop_px": None}, "is an exact size"),
        ({"std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "finite"),
    ],
)
def test_impossible_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


@pytest.mark.parametrize("interpolation", list(Interpolation))
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_any_number_of_channels_is_resized_channel_by_channel(photos, interpolation, channels):
    photo = photos["chelsea"]
    image = np.ascontiguousarray(photo[:, :, np.arange(channels) % 3])
    own = dataclasses.replace(spec(256, (224, 224), interpolation), mean=(0.5,) * channels, std=(0.5,) * channels)
    expected = fit(photo, spec(256, (224, 224), interpolation)).pixels[:, :, np.arange(channels) % 3]
    np.testing.assert_array_equal(fit(image, own).pixels, expected)
    # float32 differs by the rounding of uint8 in between.
    floats = fit(image.astype(np.float32), own).pixels
    assert floats.dtype == np.float32
    assert np.abs(floats - expected).max() <= 2.0
    assert 0.0 <= floats.min() <= floats.max() <= 255.0


LETTERBOX = dataclasses.replace(spec((64, 64), (64, 64)), letterbox=True)


@pytest.mark.parametrize(("height_px", "width_px"), [(300, 451), (451, 300), (64, 64), (100, 640), (50, 30)])
def test_an_object_in_a_letterbox_is_where_the_region_says(height_px, width_px):
    image = np.zeros((height_px, width_px, 3), np.uint8)
    # A white rectangle: x from 20 % to 40 %, y from 50 % to 80 % of the image.
    top, bottom, left, right = (
        round(part) for part in np.multiply((0.5, 0.8, 0.2, 0.4), (height_px, height_px, width_px, width_px))
    )
    image[top:bottom, left:right] = 255
    fitted = fit(image, LETTERBOX)
    assert fitted.pixels.shape == (64, 64, 3)
    region = fitted.region
    assert min(region.left, region.top) <= 0
    assert region.right >= width_px
    assert region.bottom >= height_px
    # Pixels are square still: the proportions are kept, up to whole pixels.
    assert (region.right - region.left) / (region.bottom - region.top) == pytest.approx(1.0, rel=0.2)
    weights = np.where(fitted.pixels[..., 0] == 114, 0, fitted.pixels[..., 0]).astype(float)
    rows, columns = weights.sum(1), weights.sum(0)
    centre_y = (rows * (np.arange(64) + 0.5)).sum() / rows.sum()
    centre_x = (columns * (np.arange(64) + 0.5)).sum() / columns.sum()
    scale_y, scale_x = (region.bottom - region.top) / 64, (region.right - region.left) / 64
    assert region.top + centre_y * scale_y == pytest.approx((top + bottom) / 2, abs=0.6 * scale_y)
    assert region.left + centre_x * scale_x == pytest.approx((left + right) / 2, abs=0.6 * scale_x)
    placed = place_map(fitted.pixels[..., 0] / 255.0, region, (width_px, height_px))
    assert np.corrcoef(placed.ravel(), image[..., 0].ravel())[0, 1] > 0.85


def test_the_gray_of_a_letterbox():
    pixels = fit(np.zeros((20, 40, 3), np.uint8), LETTERBOX).pixels
    assert (pixels[:16] == 114).all()
    assert (pixels[48:] == 114).all()
    assert (pixels[16:48] == 0).all()
    assert fit(np.zeros((20, 40, 1), np.float32), LETTERBOX).pixels.dtype == np.float32


@pytest.mark.parametrize("letterbox", [False, True])
def test_bgr_is_rgb_in_reverse(photos, letterbox):
    image = photos["chelsea"]
    rgb = dataclasses.replace(spec((64, 64), (64, 64)), letterbox=letterbox)
    bgr = dataclasses.replace(rgb, channel_order=ChannelOrder.BGR)
    np.testing.assert_array_equal(fit(image, bgr).pixels, fit(image, rgb).pixels[:, :, ::-1])
    rgba = np.dstack([image, image[:, :, 0]])
    four = dataclasses.replace(bgr, mean=(0.0,) * 4, std=(1.0,) * 4)
    np.testing.assert_array_equal(fit(rgba, four).pixels[:, :, 3], fit(image, rgb).pixels[:, :, 0])


def test_values_of_caffe():
    # Mean of ImageNet in BGR, 0 to 255, as Caffe's reference models have it.
    caffe = dataclasses.replace(
        spec(), mean=(103.939, 116.779, 123.68), std=(1.0,) * 3, scale=255.0, channel_order=ChannelOrder.BGR
    )
    values = normalise(np.array([[[0, 128, 255]]], np.uint8), caffe)
    np.testing.assert_allclose(values[:, 0, 0], [-103.939, 11.221, 131.32], rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"letterbox": True, "resize_px": 256},
        {"scale": 0.0},
        {"pad_to_multiple": 4},
        {"channel_order": ChannelOrder.BGR, "mean": (0.5,), "std": (0.5,)},
    ],
)
def test_what_does_not_go_together_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(spec(), **changes)
