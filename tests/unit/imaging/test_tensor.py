"""Raw pixels of requests: what is accepted, and what is refused."""

import numpy as np
import pytest

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.tensor import pixels_from_tensor


def test_is_a_view():
    payload = bytes(range(24))
    pixels = pixels_from_tensor(data_type="UINT8", shape=(2, 4, 3), data=payload, max_pixels=8).values
    assert pixels.shape == (2, 4, 3)
    assert pixels[1, 3].tolist() == [21, 22, 23]
    assert not pixels.flags.owndata


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"data_type": "FLOAT16"}, "data_type", "TENSOR_TYPE_UNSUPPORTED"),
        ({"data_type": "7"}, "data_type", "TENSOR_TYPE_UNSUPPORTED"),
        ({"data_type": "FLOAT32"}, "data", "TENSOR_SIZE_MISMATCH"),
        ({"data_type": "UINT16"}, "data", "TENSOR_SIZE_MISMATCH"),
        ({"shape": ()}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (24,)}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (8, 3)}, "shape", "IMAGE_TOO_LARGE"),
        ({"shape": (8, 3), "channels": 4}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"channels": 2}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (1, 2, 4, 3)}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (2, 3, 4)}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (0, 4, 3)}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (-2, -4, 3)}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": [1] * 1000}, "shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (2, 5, 3)}, "shape", "IMAGE_TOO_LARGE"),
        ({"shape": (2**62, 2**62, 3)}, "shape", "IMAGE_TOO_LARGE"),
        ({"data": bytes(23)}, "data", "TENSOR_SIZE_MISMATCH"),
        ({"data": bytes(25)}, "data", "TENSOR_SIZE_MISMATCH"),
        ({"data": b""}, "data", "TENSOR_SIZE_MISMATCH"),
    ],
)
def test_refusals_name_the_field(changes, field, reason):
    arguments = {"data_type": "UINT8", "shape": (2, 4, 3), "data": bytes(24), "max_pixels": 9} | changes
    with pytest.raises(InvalidArgument) as caught:
        pixels_from_tensor(**arguments)
    assert caught.value.violations[0].field == f"image.pixels.{field}"
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("data_type", "dtype", "highest"), [("UINT8", "u1", 255.0), ("UINT16", "<u2", 65_535.0), ("FLOAT32", "<f4", 1.0)]
)
@pytest.mark.parametrize(
    ("shape", "channels", "whole"),
    [((2, 3), 1, (2, 3, 1)), ((2, 3), 3, (2, 3, 1)), ((2, 3, 1), 3, (2, 3, 1)), ((2, 3, 3), 1, (2, 3, 3)),
     ((2, 3, 5), 5, (2, 3, 5)), ((2, 3, 4), 4, (2, 3, 4))],
)  # fmt: skip
def test_every_type_and_number_of_channels(data_type, dtype, highest, shape, channels, whole):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    found = pixels_from_tensor(data_type=data_type, shape=shape, data=values.tobytes(), max_pixels=6, channels=channels)
    assert found.highest == highest
    np.testing.assert_array_equal(found.values, values.reshape(whole))
