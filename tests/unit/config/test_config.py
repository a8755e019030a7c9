"""Configuration: layers of sources, and one readable line per mistake."""

import ast
import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from heatlens_server.config import Config, ModelConfig, ServerConfig, load_config
from heatlens_server.core.errors import ConfigError
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation

FULL = """
[server]
listen = "0.0.0.0:8001"
max_queue_length = 7
token_file = "secrets/token"
default_model = "cats"

[[models]]
name = "cats"
source = "torchvision:resnet50"
weights = "weights/cats.pth"
labels = "labels.txt"
layers = ["layer4", "layer3"]
method = "layer-cam"
precision = "fp16"
[models.preprocess]
resize_px = 256
crop_px = [224, 192]
mean = [0.5, 0.5, 0.5]
interpolation = "bicubic"
[models.batching]
max_batch_size = 4

[[models]]
name = "dogs"
source = "python:zoo.dogs:build"
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("HEATLENS_"):
            monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path):
    for name in ("secrets/token", "weights/cats.pth", "labels.txt", "bundle/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("s3cret\n")
    return tmp_path


def write(folder, text):
    path = folder / "heatlens.toml"
    path.write_text(text)
    return path


def errors_of(folder, text, overrides=None):
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides or {})
    assert "pydantic" not in str(caught.value)
    return str(caught.value).split("\n")


def test_defaults_serve_the_embedded_model():
    config = load_config()
    assert config == Config()
    assert [(m.name, m.source) for m in config.models] == [("efficientnet_lite0", "embedded:efficientnet_lite0")]
    assert config.default_model == "efficientnet_lite0"
    assert config.server.listen == "127.0.0.1:50051"
    assert config.server.max_image_pixels == 64_000_000


def test_file_is_read_and_its_paths_are_relative_to_its_folder(folder, monkeypatch):
    monkeypatch.chdir("/")
    config = load_config(write(folder, FULL))
    cats, dogs = config.models
    assert cats.weights == str(folder / "weights/cats.pth")
    assert cats.labels == folder / "labels.txt"
    assert config.server.token_file == folder / "secrets/token"
    assert config.server.read_token().get_secret_value() == "s3cret"
    assert (cats.method, cats.layers, cats.precision) == (Method.LAYER_CAM, ("layer4", "layer3"), "fp16")
    assert (cats.preprocess.resize_px, cats.preprocess.crop_px) == (256, (224, 192))
    assert cats.preprocess.interpolation is Interpolation.BICUBIC
    assert (cats.batching.max_batch_size, cats.batching.max_delay_ms) == (4, 2.0)
    assert dogs == ModelConfig(name="dogs", source="python:zoo.dogs:build", source_folder=folder)
    assert config.default_model == "cats"


GRIDS = """
[[models]]
name = "m"
source = "timm:x"
layers = ["norm", "blocks.3.norm1"]
[models.grids."blocks.3.norm1"]
layout = "tokens"
"""


def test_grids_of_layers(folder):
    size = "prefix = 1\nheight = 3\nwidth = 4\n"
    (found,) = load_config(write(folder, GRIDS + size)).models
    assert {name: grid.grid for name, grid in found.grids.items()} == {
        "blocks.3.norm1": Grid(Layout.TOKENS, prefix=1, height=3, width=4)
    }
    place = "models[0].grids.blocks.3.norm1"
    assert errors_of(folder, GRIDS) == [f'{place}: layout = "tokens" needs height and width']
    assert errors_of(folder, GRIDS.replace("tokens", "map") + size) == [
        f'{place}: prefix, height and width are for layout = "tokens" only'
    ]
    (line,) = errors_of(folder, GRIDS.replace("tokens", "pyramid"))
    assert line.startswith(f"{place}.layout: ")
    (line,) = errors_of(folder, GRIDS.replace('grids."blocks.3', 'grids."blocks.4') + size)
    assert line == "models[0].grids: names 'blocks.4.norm1', which is not in layers"


def test_overrides_beat_environment_beats_file_beats_defaults(folder, monkeypatch):
    path = write(folder, '[server]\nlisten = "a:1"\ngrace_s = 1\nmax_targets = 1')
    monkeypatch.setenv("HEATLENS_SERVER__LISTEN", "b:2")
    monkeypatch.setenv("HEATLENS_SERVER__GRACE_S", "2")
    server = load_config(path, {"server": {"listen": "c:3"}}).server
    assert (server.listen, server.grace_s, server.max_targets, server.max_queue_length) == ("c:3", 2.0, 1, 256)


def test_the_environment_reaches_every_section_and_nested_tables(monkeypatch, folder):
    values = {"ADMIN__ENABLED": "true", "ADMIN__TOKEN": "t", "METRICS__LISTEN": "a:1", "TRACING__ENABLED": "true"}
    values["SERVER__TLS__CERTIFICATE"] = values["SERVER__TLS__PRIVATE_KEY"] = str(folder / "secrets" / "token")
    for name, value in values.items():
        monkeypatch.setenv(f"HEATLENS_{name}", value)
    config = load_config()
    assert (config.admin.enabled, config.metrics.listen, config.tracing.enabled) == (True, "a:1", True)
    assert config.admin.read_token().get_secret_value() == "t"
    assert config.server.tls.certificate == folder / "secrets" / "token"


def test_dotted_overrides():
    server = load_config(overrides={"server.listen": "c:0", "server.log_level": "debug"}).server
    assert (server.listen, server.log_level) == ("c:0", "debug")


def test_models_from_the_environment_replace_the_files(folder, monkeypatch):
    monkeypatch.setenv("HEATLENS_MODELS", '[{"name": "m", "source": "timm:resnet18"}]')
    monkeypatch.setenv("HEATLENS_SERVER__DEFAULT_MODEL", "m")
    assert [m.name for m in load_config(write(folder, FULL)).models] == ["m"]


def test_paths_from_overrides_are_relative_to_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder / "secrets")
    server = load_config(write(folder, ""), {"server": {"token_file": "token"}}).server
    assert server.read_token().get_secret_value() == "s3cret"


def test_mistyped_nested_variable_is_refused(monkeypatch):
    monkeypatch.setenv("HEATLENS_SERVR__TOKEN", "s3cret")
    with pytest.raises(ConfigError, match="HEATLENS_SERVR__TOKEN") as refused:
        load_config()
    assert "s3cret" not in str(refused.value)


def test_other_heatlens_variables_are_left_to_other_programs(monkeypatch):
    monkeypatch.setenv("HEATLENS_TARGET", "localhost:50051")
    assert load_config() == Config()


def test_empty_models_mean_the_embedded_one(folder):
    assert load_config(write(folder, "models = []")).models == Config().models


def test_every_mistake_gets_one_line_with_its_path(folder):
    lines = errors_of(
        folder,
        """
        [server]
        listne = "x"
        max_image_pixels = 100_000_000
        [server.tls]
        certificate = "missing.pem"
        [[models]]
        name = "ok"
        source = "resnet50"
        weights = "missing.pth"
        [[models]]
        name = "no spaces"
        [models.preprocess]
        crop_px = [1, 2, 3]
        std = [1.0, 0.0, 1.0]
        """,
    )
    paths = {line.split(": ", 1)[0] for line in lines}
    assert paths == {
        "server.listne",
        "server.max_image_pixels",
        "server.tls.certificate",
        "server.tls.private_key",
        "models[0].source",
        "models[0].weights",
        "models[1].name",
        "models[1].source",
        "models[1].preprocess.crop_px",
        "models[1].preprocess.std[1]",
    }
    assert len(lines) == len(paths)
    assert "server.listne: unknown key" in lines
    assert "models[1].source: is required" in lines
    assert "server.tls.certificate: the file does not exist" in lines


def versions(*texts: str, keys: str = "") -> str:
    """Models named a, as a TOML list has them."""
    return ", ".join(
        f'{{name = "a", source = "timm:x", version = "{text}"{", " if keys else ""}{keys}}}' for text in texts
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('server.listen = "localhost"', "server.listen: must be"),
        ('server.listen = "localhost:70000"', "server.listen: must be"),
        ('server.listen = ":50051"', "server.listen: must be"),
        ("server.grace_s = -1", "server.grace_s: "),
        ('server.token = ""', "server.token: "),
        ('server.log_level = "loud"', "server.log_level: "),
        ('server.default_model = "x"', "server.default_model: there is no model 'x', only efficientnet_lite0"),
        ("server = 3", "server: "),
        ("surprise = 1", "surprise: unknown key"),
        ('models = [{name = "a", source = "embedded:resnet"}]', "models[0].source: the only embedded model"),
        ('models = [{name = "a", source = "python:os.system"}]', "models[0].source: must be"),
        ('models = [{name = "a", source = "timm:x y"}]', "models[0].source: must be"),
        ('models = [{name = "a", source = "timm:x", method = "cma"}]', "models[0].method: "),
        ('models = [{name = "a", source = "timm:x", device = "gpu"}]', 'models[0].device: must be "auto", "cpu"'),
        ('models = [{name = "a", source = "timm:x", device = ["auto"]}]', 'models[0].device: must be "auto", "cpu"'),
        ('models = [{name = "a", source = "timm:x", device = []}]', 'models[0].device: must be "auto", "cpu"'),
        (
            'models = [{name = "a", source = "timm:x", device = ["cuda:1", "cuda:1"]}]',
            "models[0].device: names a device twice: instances",
        ),
        ('models = [{name = "a", source = "timm:x", instances = 0}]', "models[0].instances: must be a number from 1"),
        ('models = [{name = "a", source = "timm:x", instances = true}]', "models[0].instances: must be a number"),
        (
            'models = [{name = "a", source = "timm:x", isolation = "process", instances = "auto"}]',
            'models[0].instances: must be a number for isolation = "process"',
        ),
        ('models = [{name = "a", source = "timm:x", layers = ["l", "l"]}]', "models[0].layers: names a layer twice"),
        (
            'models = [{name = "a", source = "timm:x", weights = "../x.bin"}]',
            "models[0].weights: the file does not exist",
        ),
        ('models = [{name = "a", source = "timm:x", weights = "../x.zip"}]', "models[0].weights: must be"),
        (
            'models = [{name = "a", source = "timm:x", source_folder = "."}]',
            'models[0].source_folder: is for "python:" sources',
        ),
        (
            'models = [{name = "a", source = "python:x:y", source_folder = "nowhere"}]',
            "models[0].source_folder: the folder does not exist",
        ),
        (
            'models = [{name = "a", source = "timm:x", weights = "none", weights_key = "ema"}]',
            "models[0].weights_key: is for weights that are a file",
        ),
        ('models = [{name = "a", source = "timm:x", engine = "tensorrt"}]', "models[0].engine: "),
        (
            'models = [{name = "a", source = "timm:x", precision = "bf16", engine = "onnxruntime"}]',
            'models[0].engine: "onnxruntime" runs in fp32 and fp16',
        ),
        (
            'models = [{name = "a", source = "timm:x", max_rss_bytes = 9}]',
            "models[0].max_rss_bytes: is for isolation = ",
        ),
        ('models = [{name = "a", source = "timm:x", provider = "cuda"}]', "models[0].provider: is for engine = "),
        ('models = [{name = "a", source = "export:"}]', "models[0].source: the folder does not exist"),
        ('models = [{name = "a", source = "export:nowhere"}]', "models[0].source: the folder does not exist"),
        ('models = [{name = "a", source = "export:weights"}]', "models[0].source: the folder is no export"),
        (
            'models = [{name = "a", source = "export:bundle", weights = "none"}]',
            'models[0].weights: must be "default" for an export',
        ),
        (
            'models = [{name = "a", source = "export:bundle", engine = "torch"}]',
            "models[0].engine: an export is run by",
        ),
        (
            'models = [{name = "a", source = "export:bundle", preprocess = {crop_px = 64}}]',
            "models[0].preprocess: cannot be set for an export",
        ),
        (
            'models = [{name = "a", source = "timm:x", batching = {max_batch_size = 0}}]',
            "models[0].batching.max_batch_size: ",
        ),
        (
            'models = [{name = "a", source = "timm:x", preprocess = {resize_px = true}}]',
            "models[0].preprocess.resize_px: must be a number of pixels",
        ),
        (
            'models = [{name = "a", source = "timm:x"}, {name = "a", source = "timm:y"}]',
            "models: two models are named 'a': each of them needs a version",
        ),
        (
            f"models = [{versions('1', '1')}]",
            "models: two models are named 'a' and have version '1'",
        ),
        (
            f"models = [{versions('1', '2', '3', keys='default = true')}]",
            "models: one version of the model 'a' can be its default, not '1' and '2' and '3'",
        ),
        (
            f"models = [{versions('1', '2', keys='weight = 0.5')}]",
            "models: weight of the model 'a', version '1': it is the default",
        ),
        (
            f"models = [{versions('1')}, {versions('2', '3', keys='weight = 0.6')}]",
            "models: the weights of the versions of the model 'a' make more than 1",
        ),
        (f"models = [{versions('1', keys='weight = 1.0')}]", "models[0].weight: "),
    ],
)
def test_mistakes(folder, text, expected):
    (line,) = errors_of(folder, text)
    assert line.startswith(expected)


def test_an_exports_folder_is_relative_to_the_files(folder, monkeypatch):
    monkeypatch.chdir("/")
    text = 'models = [{name = "a", source = "export:bundle", provider = "cpu"}]\nserver.cache_dir = "kept"'
    config = load_config(write(folder, text))
    assert config.models[0].source == f"export:{folder / 'bundle'}"
    assert config.server.cache_path == folder / "kept"


def test_exports_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ServerConfig().cache_path == tmp_path / "xdg" / "heatlens"
    # A relative one is invalid.
    for base in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert ServerConfig().cache_path == tmp_path / ".cache" / "heatlens"
    assert ServerConfig(cache_dir="~/mine").cache_path == tmp_path / "mine"
    monkeypatch.setenv("HOME", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEATLENS_SERVER__CACHE_DIR", "here")
    assert load_config().server.cache_path == tmp_path / "here"
    assert ServerConfig(cache_dir="~nobody-of-that-name/x").cache_path is None


def test_token_and_token_file_exclude_each_other(folder):
    (line,) = errors_of(folder, '[server]\ntoken = "a"\ntoken_file = "secrets/token"')
    assert line == "server: set token or token_file, not both"


@pytest.mark.parametrize("token", ["two words", "two\nlines", "ümlaut"])
def test_a_token_that_no_client_can_send_is_refused(folder, token):
    (folder / "secrets" / "token").write_text(f"{token}\n")
    server = load_config(write(folder, 'server.token_file = "secrets/token"')).server
    with pytest.raises(ConfigError, match=r"server\.token_file: holds more than one line of printable ASCII"):
        server.read_token()


def test_empty_token_file_is_refused(folder):
    (folder / "secrets/token").write_text("\n")
    server = load_config(write(folder, 'server.token_file = "secrets/token"')).server
    with pytest.raises(ConfigError, match=r"server\.token_file: is empty"):
        server.read_token()


def test_token_is_not_shown():
    server = ServerConfig(token="s3cret")
    assert "s3cret" not in repr(server)
    assert server.read_token().get_secret_value() == "s3cret"
    assert ServerConfig().read_token() is None


def test_broken_toml_names_the_line(folder):
    (line,) = errors_of(folder, "[server\n")
    assert "not valid TOML" in line
    assert "line 1" in line


def test_missing_file():
    with pytest.raises(ConfigError, match="No such file"):
        load_config(Path("/nowhere/heatlens.toml"))


def test_broken_json_in_the_environment(monkeypatch):
    monkeypatch.setenv("HEATLENS_MODELS", "[{")
    with pytest.raises(ConfigError, match=r"^HEATLENS_MODELS: is no JSON$"):
        load_config()


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_config().server.listen = "x:1"


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::]:50051", "unix:/run/heatlens.sock", "host:65535"])
def test_good_addresses(address):
    assert ServerConfig(listen=address).listen == address


def test_every_field_is_documented():
    for section in (Config, ServerConfig, ModelConfig):
        (definition,) = ast.parse(inspect.getsource(section)).body
        documented = {
            field.target.id
            for field, below in itertools.pairwise(definition.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        }
        assert set(section.model_fields) == documented


def test_configuration_and_imaging_load_no_torch():
    code = "import sys, heatlens_server.config, heatlens_server.imaging.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
