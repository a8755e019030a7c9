"""What images take before they are decoded: which are large, and which take more than there is."""

import cv2
import numpy as np
import pytest
from PIL import Image

from explain_requests import LIMITS, TINY
from heatlens_server.api.checks import Limits, inspected, large_image
from heatlens_server.core.errors import InvalidArgument
from image_files import saved

SPEC = TINY.preprocess
ROOMY = Limits(
    max_message_bytes=1, max_image_pixels=64_000_000, max_queue_length=1, max_targets=1, max_streams=1, max_in_flight=1
)


def header_of(width_px, height_px, file_format="JPEG", **options):
    """A file's header, with the size of a larger image written into it."""
    whole = bytearray(saved(Image.new("RGB", (16, 16)), file_format, **options))
    at = whole.index(b"\xff\xc0") + 5
    whole[at : at + 4] = height_px.to_bytes(2, "big") + width_px.to_bytes(2, "big")
    return bytes(whole)


def fit():
    raise AssertionError("nothing is decoded")


def test_a_photo_of_twelve_megapixels_is_small_and_larger_ones_are_large():
    photo = inspected(header_of(4000, 3000, subsampling=2), SPEC, ROOMY)
    assert large_image([photo], fit) is None
    # What takes long and little memory leaves that to others.
    long = large_image([inspected(header_of(4000, 3000, subsampling=0), SPEC, ROOMY)], fit)
    assert long is not None
    assert long.decoded_bytes == 0
    assert long.decode_s == pytest.approx(36e6 * 2.5e-9, rel=0.01)
    file = inspected(header_of(8000, 8000), SPEC, ROOMY)
    large = large_image([file], fit)
    assert large is not None
    assert large.decoded_bytes == file.decoded_bytes > 8000 * 8000 * 3
    # The image and its reference together.
    both = large_image([photo, photo], fit)
    assert both is not None
    assert both.decoded_bytes == 2 * photo.decoded_bytes > 128 << 20


def test_a_sample_of_other_formats_takes_longer_than_one_of_jpeg():
    gray = Image.new("RGB", (2000, 1200))
    files = [inspected(saved(gray, file_format), SPEC, ROOMY) for file_format in ("JPEG", "PNG")]
    assert [large_image([file], fit) is None for file in files] == [True, False]


def test_an_image_that_takes_more_than_all_the_memory_is_refused_for_good():
    deep = cv2.imencode(".tiff", np.zeros((50, 60, 4), np.float32))[1].tobytes()
    few = Limits(
        max_message_bytes=1,
        max_image_pixels=5000,
        max_queue_length=1,
        max_targets=1,
        max_streams=1,
        max_in_flight=1,
        max_decoding_bytes=50 * 60 * 4 * 12 - 1,
    )
    with pytest.raises(InvalidArgument) as caught:
        inspected(deep, SPEC, few, field="reference_image")
    assert caught.value.reason == "IMAGE_TOO_COMPLEX"
    assert caught.value.metadata == {"max_decoding_bytes": str(few.max_decoding_bytes)}
    assert caught.value.violations[0].field == "reference_image.encoded"
    assert inspected(deep, SPEC, LIMITS).decoded_bytes == few.max_decoding_bytes + 1
