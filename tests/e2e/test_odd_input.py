"""Unusual but right input, and every option: answers compared with what the pixels themselves give."""

import io
from collections.abc import Iterator

import cv2
import grpc
import numpy as np
import pytest
from PIL import Image

from heatlens import PixelBox, place_map
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from image_files import ORIENTATION, saved
from messages import distinct, map_of, pixels

DTYPES = {pb.DATA_TYPE_FLOAT32: "<f4", pb.DATA_TYPE_FLOAT16: "<f2", pb.DATA_TYPE_UINT8: "u1"}

# No symmetry, and not square, so that a wrong turn shows.
PHOTO = np.ascontiguousarray(distinct(1, 128)[0][:, :96])


@pytest.fixture(scope="module")
def stub(server) -> Iterator[explain_pb2_grpc.ExplainServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield explain_pb2_grpc.ExplainServiceStub(channel)


@pytest.fixture
def explain(stub):
    """Explain bytes of a file or an array of pixels with tiny_mlp, whose maps differ from pixel to pixel."""

    def explain(image: bytes | np.ndarray, *, model: str = "tiny_mlp", **options) -> pb.ExplainResponse:
        options.setdefault("method", method_pb2.METHOD_HI_RES_CAM)
        sent = pb.Image(encoded=image) if isinstance(image, bytes) else pixels(image)
        request = pb.ExplainRequest(model=model, image=sent, options=pb.ExplainOptions(**options))
        return stub.Explain(request, timeout=30)

    return explain


def values_of(explanation: pb.Explanation) -> np.ndarray:
    """A map in [0, 1], whatever its type."""
    stored = np.frombuffer(explanation.map.data, DTYPES[explanation.map.data_type])
    values = stored.reshape(tuple(explanation.map.shape)).astype(np.float32)
    return values / 255 if explanation.map.data_type == pb.DATA_TYPE_UINT8 else values


def box(region: pb.PixelBox) -> tuple[float, float, float, float]:
    return region.left, region.top, region.right, region.bottom


def assert_same(answer: pb.ExplainResponse, expected: pb.ExplainResponse, atol: float = 1e-5) -> None:
    for one, other in zip(answer.explanations, expected.explanations, strict=True):
        assert one.class_id == other.class_id
        assert one.logit == pytest.approx(other.logit, abs=max(atol, 1e-4))
        assert values_of(other).max() > 0.9  # a flat map would prove nothing
        np.testing.assert_allclose(values_of(one), values_of(other), atol=atol)
    assert box(answer.source_region) == box(expected.source_region)


GRAY = PHOTO[..., :1]
ALPHA = distinct(2, 128)[1][:, :96, :1]
PALETTE = Image.fromarray(PHOTO).quantize(7)
# tests/unit/imaging/test_decode.py has every kind of file; these show that a map is that of the pixels.
EXACT = {
    "gray and alpha png": (saved(np.concatenate([GRAY, ALPHA], -1), "PNG"), GRAY),
    "transparent palette png": (saved(PALETTE, "PNG", transparency=2), np.asarray(PALETTE.convert("RGB"))),
    "lossless rgba webp": (saved(np.concatenate([PHOTO, ALPHA], -1), "WEBP", lossless=True, exact=True), PHOTO),
}


@pytest.mark.parametrize(("encoded", "decoded"), EXACT.values(), ids=EXACT)
def test_lossless_files_of_every_kind(explain, encoded, decoded):
    rgb = np.ascontiguousarray(np.broadcast_to(decoded, (128, 96, 3)).astype(np.uint8))
    assert_same(explain(encoded), explain(rgb))


DEEP = np.random.default_rng(2).integers(0, 65_536, (128, 96, 3), dtype=np.uint16)


@pytest.mark.parametrize("values", [DEEP, DEEP[..., 0]], ids=["rgb", "gray"])
def test_16_bit_files_are_as_their_values(explain, values):
    encoded = cv2.imencode(".png", values if values.ndim == 2 else values[..., ::-1])[1].tobytes()
    by_file = explain(encoded)
    assert not by_file.warnings
    assert_same(by_file, explain(values))
    assert_same(by_file, explain((values / np.float32(65_535)).astype(np.float32)))


def test_12_bit_values_in_a_file_of_16_are_warned_about(explain):
    (warning,) = explain(cv2.imencode(".png", PHOTO.astype(np.uint16) * 16)[1].tobytes()).warnings
    assert "set window of [models.preprocess]" in warning


LOSSY = {
    "progressive jpeg": saved(PHOTO, "JPEG", quality=90, progressive=True),
    "cmyk jpeg": saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=90),
}


@pytest.mark.parametrize("encoded", LOSSY.values(), ids=LOSSY)
def test_lossy_files_of_every_kind(explain, encoded):
    # What another decoder reads: a level or two apart.
    decoded = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    assert_same(explain(encoded), explain(decoded), atol=0.03)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}
"""By EXIF orientation: from the upright pixels to those that are stored (EXIF 2.32, tag 0x0112)."""


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(explain, orientation, file_format):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    if file_format == "JPEG":
        options = {"quality": 100, "subsampling": 0}
    stored = np.ascontiguousarray(TURNS[orientation](PHOTO))
    encoded = saved(stored, file_format, exif=exif, **options)
    answer = explain(encoded, map_size=pb.MAP_SIZE_SOURCE)
    assert list(answer.explanations[0].map.shape) == [128, 96]
    atol = 0.05 if file_format == "JPEG" else 1e-5
    upright = explain(PHOTO, map_size=pb.MAP_SIZE_SOURCE)
    assert_same(answer, upright, atol)
    if orientation > 1:
        as_stored = explain(stored, map_size=pb.MAP_SIZE_SOURCE).explanations[0]
        turned = cv2.resize(values_of(as_stored), (96, 128))
        assert np.abs(turned - values_of(upright.explanations[0])).max() > 0.3


# tiny_mlp resizes the shorter side to 64 pixels and crops 64x64 from the middle: the source's middle square.
SIZES = {
    (1, 1): (0, 0, 1, 1),
    (20_000, 10): (9995, 0, 10_005, 10),
    (10, 20_000): (0, 9995, 10, 10_005),
    (64, 64): (0, 0, 64, 64),
    (63, 65): (0, 1, 63, 64),
    (1500, 1000): (250, 0, 1250, 1000),
}


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "pixels"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_size(explain, size, as_file):
    width_px, height_px = size
    rng = np.random.default_rng(5)
    image = cv2.resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), size)
    answer = explain(
        saved(image, "PNG") if as_file else image, map_size=pb.MAP_SIZE_SOURCE, map_type=pb.DATA_TYPE_UINT8
    )
    # The resized length is a whole number of pixels: the region is off by less than one of them.
    resized_pixel = min(size) / 64
    assert box(answer.source_region) == pytest.approx(SIZES[size], abs=resized_pixel)
    assert list(answer.explanations[0].map.shape) == [height_px, width_px]


def test_top_k_and_predictions_are_in_order(explain):
    answer = explain(PHOTO, top_k=3, top_predictions=10)
    listed = [(score.class_id, score.logit, score.probability) for score in answer.predictions]
    assert sorted(class_id for class_id, _, _ in listed) == list(range(10))
    logits = np.array([logit for _, logit, _ in listed], np.float64)
    assert (np.diff(logits) <= 0).all()
    probabilities = np.array([probability for *_, probability in listed])
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(probabilities, np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
    assert [(e.class_id, e.logit, e.probability) for e in answer.explanations] == listed[:3]
    assert [score.class_id for score in explain(PHOTO, top_predictions=4).predictions] == [i for i, *_ in listed[:4]]
    assert not explain(PHOTO).predictions


@pytest.mark.parametrize("map_size", [pb.MAP_SIZE_LAYER, pb.MAP_SIZE_INPUT, pb.MAP_SIZE_SOURCE])
@pytest.mark.parametrize(("map_type", "atol"), [(pb.DATA_TYPE_FLOAT16, 2**-12), (pb.DATA_TYPE_UINT8, 0.5 / 255)])
def test_map_types_are_the_float32_map_rounded(explain, map_size, map_type, atol):
    exact = explain(PHOTO, map_size=map_size, map_type=pb.DATA_TYPE_FLOAT32, top_k=3)
    rounded = explain(PHOTO, map_size=map_size, map_type=map_type, top_k=3)
    for one, other in zip(exact.explanations, rounded.explanations, strict=True):
        assert other.map.data_type == map_type
        assert len(other.map.data) == np.prod(other.map.shape) * np.dtype(DTYPES[map_type]).itemsize
        assert one.map.shape == other.map.shape
        np.testing.assert_allclose(values_of(one), values_of(other), atol=atol + 1e-6, rtol=0)
        assert (one.map_scale, one.map_offset) == pytest.approx((other.map_scale, other.map_offset), rel=1e-6)


def test_map_sizes(explain):
    wide = PHOTO[:48].repeat(2, 0).repeat(2, 1)
    unset, layer, at_input, at_source = (
        explain(wide, map_size=size).explanations[0]
        for size in (pb.MAP_SIZE_UNSPECIFIED, pb.MAP_SIZE_LAYER, pb.MAP_SIZE_INPUT, pb.MAP_SIZE_SOURCE)
    )
    assert [list(e.map.shape) for e in (unset, layer, at_input, at_source)] == [[8, 8], [8, 8], [64, 64], [96, 192]]
    assert unset.map.data == layer.map.data
    region = explain(wide).source_region
    placed = place_map(map_of(at_input), PixelBox(*box(region)), (192, 96))
    np.testing.assert_array_equal(map_of(at_source), placed)
    # 96x192 is resized to 64x128 and cropped to the middle 64.
    assert box(region) == (48, 0, 144, 96)
    assert not placed[:, :48].any()
    assert not placed[:, 144:].any()
    assert placed[:, 48:144].any()


@pytest.mark.parametrize("map_size", [pb.MAP_SIZE_LAYER, pb.MAP_SIZE_INPUT])
def test_scale_and_offset_give_the_raw_map(explain, map_size):
    answer = explain(PHOTO, map_size=map_size, top_k=10)
    flat = 0
    for explanation in answer.explanations:
        values = map_of(explanation)
        assert values.min() == 0
        raw = values * explanation.map_scale + explanation.map_offset
        assert (raw >= 0).all()  # after ReLU
        flat += not values.any()
    assert flat < 10


def test_raw_map_of_grad_cam_is_that_of_its_layer(explain):
    # Bilinear upsampling repeats the layer's extreme corner values at most: the raw range cannot grow.
    layer = explain(PHOTO, model="tiny", method=method_pb2.METHOD_GRAD_CAM, top_k=1).explanations[0]
    at_input = explain(PHOTO, model="tiny", method=method_pb2.METHOD_GRAD_CAM, map_size=pb.MAP_SIZE_INPUT).explanations[
        0
    ]
    assert layer.map_scale > 0
    low, high = layer.map_offset, layer.map_offset + layer.map_scale
    assert at_input.map_offset >= low - 1e-6
    assert at_input.map_offset + at_input.map_scale <= high + 1e-6


def test_timing_and_names_are_told(explain):
    answer = explain(saved(PHOTO, "PNG"))
    for name in ("queue_duration", "preprocess_duration", "compute_duration"):
        assert answer.timing.HasField(name)
        assert 0 <= getattr(answer.timing, name).ToTimedelta().total_seconds() < 30
    assert answer.timing.preprocess_duration.ToMicroseconds() > 0
    assert answer.timing.compute_duration.ToMicroseconds() > 0
    assert answer.timing.batch_size == 1
    assert answer.model == "tiny_mlp"
    assert answer.model_version
    assert not answer.explanations[0].HasField("box")


def test_no_name_is_the_default_model(explain):
    answer = explain(PHOTO, model="", method=method_pb2.METHOD_CAM)
    assert answer.model == "tiny"
    assert_same(answer, explain(PHOTO, model="tiny", method=method_pb2.METHOD_CAM))
