"""The server places maps as the SDK does: the two functions are held against each other, bit for bit."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import heatlens
from heatlens_server.core import geometry

EDGE = st.floats(-50, 80, width=32)
SIDE = st.integers(1, 40)


@given(EDGE, EDGE, EDGE, EDGE, SIDE, SIDE, SIDE, SIDE)
def test_client_and_server_place_maps_alike(left, top, width, height, rows, columns, width_px, height_px):
    values = np.random.default_rng(rows * 41 + columns).random((rows, columns), dtype=np.float32)
    edges = (left, top, left + abs(width) + 1e-3, top + abs(height) + 1e-3)
    placed = geometry.place_map(values, geometry.PixelBox(*edges), (width_px, height_px))
    np.testing.assert_array_equal(placed, heatlens.place_map(values, heatlens.PixelBox(*edges), (width_px, height_px)))
