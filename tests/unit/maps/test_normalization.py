import pytest
import torch

from heatlens_server.maps.normalization import normalize

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(dtype):
    # ReLU: [[0, 1], [3, 5]]: offset 0, scale 5. Second map: nothing to cut, offset 2, scale 4.
    raw = torch.tensor([[[[-2.0, 1.0], [3.0, 5.0]], [[2.0, 3.0], [4.0, 6.0]]]], dtype=dtype)
    result = normalize(raw)
    expected = torch.tensor([[[[0.0, 0.2], [0.6, 1.0]], [[0.0, 0.25], [0.5, 1.0]]]], dtype=wide_of(dtype))
    torch.testing.assert_close(result.values, expected)
    assert result.scale.tolist() == [[5.0, 4.0]]
    assert result.offset.tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_offset_lead_back(dtype):
    raw = (torch.randn(4, 3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1).to(dtype)
    result = normalize(raw)
    assert result.values.dtype == result.scale.dtype == result.offset.dtype == wide_of(dtype)
    assert result.values.shape == (4, 3, 7, 5)
    assert result.scale.shape == result.offset.shape == (4, 3)
    assert torch.equal(result.values.amin(dim=(-2, -1)), torch.zeros(4, 3, dtype=wide_of(dtype)))
    assert torch.equal(result.values.amax(dim=(-2, -1)), torch.ones(4, 3, dtype=wide_of(dtype)))
    back = result.values * result.scale[..., None, None] + result.offset[..., None, None]
    torch.testing.assert_close(back, raw.to(wide_of(dtype)).relu(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -3.0, 2.5, 1e-5])
def test_a_flat_map_is_zeros(dtype, value):
    raw = torch.full((2, 1, 3, 3), value, dtype=dtype)
    result = normalize(raw)
    assert torch.equal(result.values, torch.zeros_like(result.values))
    assert torch.equal(result.scale, torch.zeros(2, 1, dtype=result.scale.dtype))
    assert torch.equal(result.offset, raw[..., 0, 0].to(result.offset.dtype).relu())


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 2.0**-149),  # the smallest float32 above zero
        (torch.float64, 2.0**-1074),  # the smallest float64 above zero
        (torch.bfloat16, 2.0**-133),  # the smallest bfloat16 above zero
        (torch.float16, 2.0**-24),  # the smallest float16 above zero
        (torch.float16, 16376.0),  # 4 units are float16's largest numbers
        (torch.float32, 8e37),
    ],
)
def test_extreme_ranges_are_divided_out_in_full(dtype, unit):
    raw = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]], dtype=torch.float64).mul(unit).to(dtype)
    result = normalize(raw)
    expected = torch.tensor([[[[0.0, 0.25], [0.5, 1.0]]]], dtype=wide_of(dtype))
    torch.testing.assert_close(result.values, expected)
    assert result.scale.item() == pytest.approx(4 * unit, rel=1e-6, abs=0)


def test_a_tiny_range_on_a_large_offset():
    step = 2.0**-23  # the spacing of float32 at 1
    raw = torch.tensor([[[[1.0, 1.0 + step], [1.0 + 2 * step, 1.0 + 4 * step]]]])
    result = normalize(raw)
    assert result.values.tolist() == [[[[0.0, 0.25], [0.5, 1.0]]]]
    assert result.offset.item() == 1.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_input_stays_visible_and_alone(bad, dtype):
    raw = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    clean = normalize(raw)
    raw[1, 0, 2, 2] = bad
    result = normalize(raw)
    assert result.values[1, 0].isnan().any()
    assert not result.scale[1, 0].isfinite()
    others = torch.ones(3, 2, dtype=torch.bool)
    others[1, 0] = False
    assert torch.equal(result.values[others], clean.values[others])
    assert torch.equal(result.scale[others], clean.scale[others])


def test_minus_infinity_is_a_negative_value():
    result = normalize(torch.tensor([[[[-torch.inf, 1.0], [2.0, 4.0]]]]))
    assert result.values.tolist() == [[[[0.0, 0.25], [0.5, 1.0]]]]


def test_input_stays_as_it_was():
    raw = torch.tensor([[[[-1.0, 1.0], [2.0, 4.0]]]])
    normalize(raw)
    assert raw.tolist() == [[[[-1.0, 1.0], [2.0, 4.0]]]]
