"""Factories of the operator's: found beside the configuration file, unwrapped, or refused with the way out."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.python_factory import unwrapped
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.config import ModelConfig, load_config
from heatlens_server.core.causes import with_causes
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds

NET = """
import torch
from torch import nn
from {package}_part import width


def make():
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


def late_import():
    from {package}_late import width as late
    return nn.Sequential(nn.Conv2d(3, late, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(late, 2))


def missing_package():
    import no_such_package_xyz


def missing_file():
    return torch.load("/data/models/prod/resnet.pt")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=32), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


class Custom(RuntimeError):
    pass


def own_error():
    raise Custom("set MODEL_DIR to the folder with the weights")
"""


@pytest.fixture
def folder(tmp_path, request, monkeypatch):
    """A folder with a configuration file and modules of names that no other test uses, which are forgotten after it."""
    package = f"net_{abs(hash(request.node.name))}"
    (tmp_path / f"{package}.py").write_text(NET.format(package=package))
    for part in ("part", "late"):
        (tmp_path / f"{package}_{part}.py").write_text("width = 4\n")
    yield tmp_path, package
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)


def configured(folder, factory, more=""):
    path, package = folder
    (path / "server.toml").write_text(f'[[models]]\nname = "m"\nsource = "python:{package}:{factory}"\n{more}')
    (model,) = load_config(path / "server.toml").models
    return model


@pytest.mark.parametrize("factory", ["make", "late_import"])
def test_a_module_beside_the_configuration_file_is_found(folder, factory):
    path = list(sys.path)
    assert load_model(configured(folder, factory)).class_count == 2
    assert sys.path == path


def test_a_module_in_a_named_folder_is_found(folder, tmp_path_factory):
    (modules, package), elsewhere = folder, tmp_path_factory.mktemp("elsewhere")
    config = configured((elsewhere, package), "make", f'source_folder = "{modules}"')
    assert load_model(config).class_count == 2


def test_a_module_of_the_same_name_elsewhere_is_not_taken_for_it(folder, tmp_path_factory):
    _, package = folder
    load_model(configured(folder, "make"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / f"{package}.py").write_text("")
    config = configured((elsewhere, package), "make")
    with pytest.raises(ModelLoadError, match=f"source: another module '{package}' is loaded already: rename this one"):
        load_model(config)


@pytest.mark.parametrize(
    ("factory", "told", "line"),
    [
        (
            "missing_package",
            "ModuleNotFoundError: No module named 'no_such_package_xyz'",
            "line 17, in missing_package",
        ),
        ("missing_file", "FileNotFoundError: [Errno 2] No such file or directory: '/data/", "line 21, in missing_file"),
        ("Net", "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x392 and 8x4)", "line 30, in forward"),
        ("own_error", "Custom: set MODEL_DIR to the folder with the weights", "line 38, in own_error"),
    ],
)
def test_the_operator_reads_why_a_factory_failed_and_the_client_no_path(folder, factory, told, line):
    path, package = folder
    with pytest.raises(ModelLoadError) as raised:
        load_model(configured(folder, factory))
    message, known = str(raised.value), with_causes(raised.value)
    assert told in known
    assert known.endswith(f"({path / package}.py, {line})")
    kind = told.partition(":")[0]
    assert kind in message
    assert "/" not in message
    assert told not in message


def test_a_module_that_is_not_there(folder):
    path, _ = folder
    with pytest.raises(ModelLoadError) as raised:
        load_model(configured((path, "nett"), "own_error"))
    assert with_causes(raised.value) == (
        "source: 'nett:own_error' cannot be imported (ModuleNotFoundError); modules are looked for beside the "
        "configuration file (source_folder) and in PYTHONPATH; ModuleNotFoundError: No module named 'nett'"
    )


def small():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None, num_classes=5).eval()


def in_place():
    network = small()
    network.compile(backend="eager")
    return network


def compiled_inside():
    network = small()
    network.layer3 = torch.compile(network.layer3, backend="eager")
    network.layer4.compile(backend="eager")
    return network


def compiled_forward():
    network = small()
    network.forward = torch.compile(network.forward, backend="eager")
    return network


class CompiledForward(nn.Sequential):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


WRAPPED = {
    "compiled": lambda: torch.compile(small()),
    "compiled_eager": lambda: torch.compile(small(), backend="eager"),
    "in_place": in_place,
    "inside": compiled_inside,
    "forward": compiled_forward,
    "parallel": lambda: nn.DataParallel(small()),
    "parallel_compiled": lambda: nn.DataParallel(torch.compile(small(), backend="eager")),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(small()),
}


@pytest.fixture
def explain(monkeypatch):
    def explain_with(factory):
        monkeypatch.setitem(sys.modules, "zoo", type(sys)("zoo"))
        sys.modules["zoo"].factory = factory
        model = load_model(ModelConfig(name="m", source="python:zoo:factory", preprocess={"crop_px": 64}))
        pixels = torch.randint(0, 256, (1, 64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        engine = TorchEngine(model, device="cpu")
        spec = MapSpec(Method.GRAD_CAM, model.layers[:1], upsample=False)
        try:
            return model, engine.explain(pixels.numpy(), [ClassIds((1,))], spec)[0]
        finally:
            engine.close()

    return explain_with


@pytest.mark.parametrize("form", WRAPPED)
def test_a_wrapped_network_is_explained_as_the_network_itself(explain, form):
    model, result = explain(WRAPPED[form])
    plain, expected = explain(small)
    assert model.layers == plain.layers
    assert weights_version(model.module) == weights_version(plain.module)
    assert result.maps == pytest.approx(expected.maps)
    assert result.logits == pytest.approx(expected.logits)


def test_a_class_whose_forward_is_compiled_is_undone():
    module = unwrapped(CompiledForward(nn.Linear(2, 2)))
    assert not hasattr(module.forward, "_torchdynamo_orig_callable")
    assert module(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.jit.trace(small(), torch.zeros(1, 3, 64, 64)), "returns a TorchScript module"),
        (lambda: torch.jit.script(small()), "returns a TorchScript module"),
        (lambda: torch.export.export(small(), (torch.zeros(1, 3, 64, 64),)).module(), "a module of torch.export"),
    ],
)
def test_what_has_no_layers_is_refused_with_the_way_out(explain, make, said):
    with pytest.raises(ModelLoadError, match=said) as raised:
        explain(make)
    assert "return the network that it was made from" in str(raised.value)
