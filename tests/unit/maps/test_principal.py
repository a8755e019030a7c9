import pytest
import torch
from sklearn.decomposition import KernelPCA
from torch.fx.experimental.proxy_tensor import make_fx

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.principal import check_places, eigen_cam, eigen_grad_cam, kpca_cam, principal_projection

METHODS = [Method.EIGEN_CAM, Method.EIGEN_GRAD_CAM, Method.KPCA_CAM]


def random_case(n=3, k=2, c=16, h=5, w=4, dtype=torch.float64, seed=7):
    """Activations with a structure: a bright blob in many channels over weaker noise, as networks have."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(h, dtype=torch.float64)[:, None] * w + torch.arange(w, dtype=torch.float64)
    centres = torch.rand(n, 1, 1, 1, generator=generator, dtype=torch.float64) * h * w
    blob = torch.exp(-(((place - centres) / 4) ** 2))
    directions = torch.rand(n, c, 1, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    activations = (2 * blob * directions + 0.3 * noise).relu() + 0.01
    # Of a class: what it thinks of each channel, little different from pixel to pixel.
    gradients = torch.rand(n, k, c, 1, 1, generator=generator, dtype=torch.float64)
    gradients = 1e-2 * (gradients + 0.1 * torch.randn(n, k, c, h, w, generator=generator, dtype=torch.float64))
    return activations.to(dtype), gradients.to(dtype)


def by_svd(points, like):
    """The first principal component of (P, C), signed to correlate with (P,)."""
    points = points - points.mean(dim=0)
    projected = points @ torch.linalg.svd(points, full_matrices=False).Vh[0]
    return projected if (projected * (like - like.mean())).sum() >= 0 else -projected


def points_of(features):
    return features.flatten(1).T


def relative(actual, expected):
    return ((actual.double() - expected.double()).abs().amax() / expected.double().abs().amax()).item()


# More pixels than channels, and fewer: either Gram matrix.
@pytest.mark.parametrize(("c", "h", "w"), [(7, 6, 5), (64, 3, 4), (1, 4, 4), (5, 1, 2)])
def test_against_singular_value_decomposition(c, h, w):
    activations, gradients = random_case(c=c, h=h, w=w)
    eigen, weighted = eigen_cam(activations), eigen_grad_cam(activations, gradients)
    assert eigen.shape == (3, 1, h, w)
    assert weighted.shape == (3, 2, h, w)
    for n in range(3):
        energy = activations[n].square().sum(0).sqrt().flatten()
        assert relative(eigen[n].flatten(), by_svd(points_of(activations[n]), energy)) < 1e-9
        for k in range(2):
            product = gradients[n, k] * activations[n]
            expected = by_svd(points_of(product), product.sum(0).flatten())
            assert relative(weighted[n, k].flatten(), expected) < 1e-9


def test_eigenvalues_that_are_close_are_told_apart():
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(49, 32, generator=generator, dtype=torch.float64)
    left, _, right = torch.linalg.svd(points - points.mean(dim=0), full_matrices=False)
    # Eigenvalues of the Gram matrix: 1 and 0.9975.
    values = torch.cat([torch.tensor([1.0, 0.9975**0.5]), torch.linspace(0.9, 0.0, 30)]).double()
    made = (left * values) @ right
    projected = eigen_cam(made.T.reshape(1, 32, 7, 7)).flatten()
    assert min(relative(projected, left[:, 0]), relative(projected, -left[:, 0])) < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_kernel_against_scikit_learn(scale):
    activations = random_case()[0] * scale
    maps = kpca_cam(activations)
    for n in range(3):
        points = points_of(activations[n])
        theirs = KernelPCA(n_components=1, kernel="sigmoid").fit_transform(points - points.mean(dim=0))
        theirs = torch.from_numpy(theirs).flatten()
        assert min(relative(maps[n].flatten(), theirs), relative(maps[n].flatten(), -theirs)) < 1e-7
        energy = activations[n].square().sum(0).sqrt().flatten()
        assert (maps[n].flatten() * (energy - energy.mean())).sum() > 0


def test_a_kernel_of_many_pixels_is_not_squared():
    """Above 512 pixels: power steps, which say the same where eigenvalues are as far apart as networks' are."""
    activations, _ = random_case(n=1, h=26, w=20)
    points = points_of(activations[0])
    theirs = KernelPCA(n_components=1, kernel="sigmoid", eigen_solver="dense")
    theirs = torch.from_numpy(theirs.fit_transform(points - points.mean(dim=0))).flatten()
    ours = kpca_cam(activations).flatten()
    assert min(relative(ours, theirs), relative(ours, -theirs)) < 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-12), (torch.float32, 1e12), (torch.float16, 1e-3)])
def test_float32_against_float64(method, dtype, scale):
    activations, gradients = random_case(c=256, h=7, w=7)
    # Squares of such numbers are no float32, fourth powers less still.
    activations, gradients = (activations * (1 if dtype is torch.float16 else scale)).to(dtype), gradients.to(dtype)
    if method is Method.KPCA_CAM and scale > 1:
        activations = activations * 1e-12
    actual = raw_map(method, activations, gradients)
    assert actual.dtype is torch.float32
    expected = raw_map(method, activations.double(), gradients.double())
    assert expected.abs().max() > 0
    assert relative(actual, expected) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_images_and_classes_one_by_one(method):
    activations, gradients = random_case()
    together = raw_map(method, activations, gradients)
    assert together.shape == (3, 2, 5, 4)
    for n in range(3):
        for k in range(2):
            alone = raw_map(method, activations[n : n + 1], gradients[n : n + 1, k : k + 1])
            torch.testing.assert_close(together[n : n + 1, k : k + 1], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
def test_what_does_not_vary_gives_zeros(method, dtype, value):
    """Whatever the mean of many equal numbers is rounded to."""
    activations = torch.full((2, 33, 7, 7), value, dtype=dtype) * (torch.arange(1, 34) / 33).to(dtype)[:, None, None]
    gradients = torch.full((2, 1, 33, 7, 7), 0.3, dtype=dtype)
    assert not raw_map(method, activations, gradients).any()


def test_no_gradient_no_map():
    activations, gradients = random_case()
    assert not eigen_grad_cam(activations, gradients * 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_stays_in_its_own_image(method):
    activations, gradients = random_case()
    activations[1, 3, 2, 2] = torch.nan
    maps = raw_map(method, activations, gradients)
    assert maps[1].isnan().any()
    assert maps[[0, 2]].isfinite().all()


def test_smoothing_has_the_sign_of_the_sum():
    activations, gradients = random_case()
    weighted = activations.unsqueeze(1) * gradients.mean((-2, -1), keepdim=True)
    projected = principal_projection(weighted).flatten(2)
    plain = weighted.sum(dim=2).flatten(2)
    assert ((projected * (plain - plain.mean(dim=2, keepdim=True))).sum(dim=2) > 0).all()
    # A class that the object speaks against: its sum is low there, and so is the component.
    torch.testing.assert_close(principal_projection(-weighted).flatten(2), -projected)


@pytest.mark.parametrize("method", [Method.EIGEN_GRAD_CAM, Method.KPCA_CAM])
def test_traces_with_any_batch_size(method):
    traced = make_fx(lambda a, g: raw_map(method, a, g), tracing_mode="symbolic")(*random_case(n=2, k=3))
    for n, k in [(5, 2), (1, 4)]:
        case = random_case(n=n, k=k)
        torch.testing.assert_close(traced(*case), raw_map(method, *case))


def test_wrong_shapes():
    for make in (eigen_cam, kpca_cam):
        with pytest.raises(ValueError, match=r"activations: must be \(N, C, h, w\), not \(3, 5, 4\)"):
            make(torch.zeros(3, 5, 4))
    with pytest.raises(ValueError, match="gradients: must be"):
        eigen_grad_cam(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4))
    with pytest.raises(ValueError, match="weighted: must be"):
        principal_projection(torch.zeros(2, 3, 5, 4))


def test_kpca_of_a_layer_with_too_many_places_is_refused_by_the_layers_name():
    large = torch.zeros(1, 2, 40, 41)
    check_places(Method.EIGEN_CAM, 0, "stem", large)
    check_places(Method.KPCA_CAM, 0, "stem", large[..., :40])
    with pytest.raises(InvalidArgument, match="'stem' has 40x41") as refused:
        check_places(Method.KPCA_CAM, 1, "stem", large)
    assert refused.value.violations[0].field == "layers[1]"
