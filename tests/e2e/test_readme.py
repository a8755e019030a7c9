"""The README is true: its Python runs, its TOML is the defaults, its commands, options, reasons and links exist."""

import ast
import collections.abc
import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
import types
import typing
from pathlib import Path

import cv2
import numpy as np
import pytest
import trustme
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

import heatlens
from heatlens import _exceptions as exceptions
from heatlens._cli.commands import app as client_app
from heatlens._cli.health import parser as health_parser
from heatlens._wire.requests import ExplainOptions
from heatlens_server.cli import app as server_app
from heatlens_server.config import Config, load_config
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation
from heatlens_server.transports.grpc.status import _CODES
from server_process import start_server_process, wait_settled
from video_files import picture, write_video

ROOT = Path(__file__).parents[2]
# The README and the pages that go on where it ends.
PAGES = (
    "README.md",
    "docs/configuration.md",
    "docs/client.md",
    "docs/streams.md",
    "docs/maps.md",
    "docs/operations.md",
)
README = "\n".join((ROOT / page).read_text() for page in PAGES)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
TOMLS = [code for language, code in BLOCKS if language == "toml"]
OWN_MODELS = [code for code in TOMLS if not code.startswith("[server]")]
(TOML,) = (code for code in TOMLS if code not in OWN_MODELS)
(PRINTED,) = [code for language, code in BLOCKS if language == "text"]
ADDRESS = "localhost:50051"
UNSET_LINE = re.compile(r"^# (?=\[|\w+ = )", re.MULTILINE)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server without models in its configuration, as in the README."""
    running = start_server_process(tmp_path_factory.mktemp("readme"), '[server]\nlisten = "127.0.0.1:0"\n')
    wait_settled(running.address)
    yield running.address
    running.process.terminate()
    assert running.process.wait(30) == 0, running.log()


@pytest.fixture(scope="module")
def cat(tmp_path_factory):
    """The cat.jpg that the README's own line copies."""
    (line,) = [line for line in SHELL if line.startswith("cp ")]
    copy = tmp_path_factory.mktemp("cat") / "cat.jpg"
    subprocess.run(["cp", shlex.split(line)[1], copy], cwd=ROOT, check=True)
    assert line.endswith(" cat.jpg")
    return copy.read_bytes()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A film, which the README calls clip.mp4."""
    pictures = [picture(index, (320, 240)) for index in range(30)]
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", pictures)


@pytest.fixture
def folder(tmp_path, monkeypatch, cat, clip):
    """A working directory with every file that the README names."""
    (tmp_path / "cat.jpg").write_bytes(cat)
    (tmp_path / "clip.mp4").symlink_to(clip)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    me = authority.issue_cert("me")
    me.private_key_pem.write_to_path(tmp_path / "me.key")
    me.cert_chain_pems[0].write_to_path(tmp_path / "me.pem")
    keys = ("token", "server.pem", "server.key", "clients.pem", "labels.txt")
    for name in (*keys, "parts.pth", "parts.txt", "parts.onnx"):
        (tmp_path / name).write_text("x")
    (tmp_path / "server.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("HEATLENS_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def free_port():
    """Return ports that nobody listens on."""

    def free() -> int:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            return bound.getsockname()[1]

    return free


def run_python(code, address):
    """Execute a block against the server; returns its names."""
    names = {"__name__": "__main__"}
    exec(compile(code.replace(ADDRESS, address), "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_python_blocks_run(folder, address, index):
    client = run_python(PYTHON[index], address).get("client")
    if isinstance(client, heatlens.Client):
        client.close()


def test_sdk_example_prints_and_writes_what_it_says(folder, address, capsys):
    names = run_python(PYTHON[0], address)
    for said, printed in zip(PRINTED.splitlines(), capsys.readouterr().out.splitlines(), strict=True):
        (label, percentage), (real_label, real_percentage) = (line.rstrip("%").split(": ") for line in (said, printed))
        assert label == real_label
        # The file is the README's own: what is left is the rounding of another CPU.
        assert float(percentage) == pytest.approx(float(real_percentage), abs=0.15)
    assert cv2.imread("why.png").shape == (288, 433, 3)
    assert (names["values"].dtype, names["values"].shape) == (np.float32, (288, 433))


def test_error_example_prints_its_comment(folder, address, capsys):
    (code,) = [code for code in PYTHON if "IMAGE_UNDECODABLE" in code]
    run_python(code, address)
    assert capsys.readouterr().out.strip() == re.search(r"# (IMAGE_.*)", code)[1]


@pytest.mark.timeout(300)
def test_the_setup_with_tls_and_tokens_runs_as_it_stands(folder, free_port):
    """In a shell that ends at the first command that fails."""
    (setup,) = [code for language, code in BLOCKS if language == "bash"]
    for port in ("50051", "9090"):
        setup = setup.replace(port, str(free_port()))
    # The commands of the tests' own interpreter.
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(
        ["bash", "-e", "-m", "-c", setup], capture_output=True, text=True, timeout=280, check=False, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "photos is reloaded" in done.stdout
    assert re.search(r"^Explain +photos ", done.stdout, re.MULTILINE)
    assert [path.suffix for path in (folder / "maps").iterdir()]


def test_sdk_and_raw_stubs_agree(folder, address):
    (code,) = [code for code in PYTHON if "ExplainServiceStub" in code]
    raw = run_python(code, address)["values"]
    with heatlens.Client(address) as client:
        assert np.abs(client.explain("cat.jpg").explanations[0].heatmap.values - raw).max() < 1e-5


def test_toml_block_is_the_defaults(folder):
    assert load_config(folder / "server.toml") == load_config() == Config()


def test_the_examples_of_own_networks_are_configurations(folder):
    models = []
    for toml in OWN_MODELS:
        (folder / "own.toml").write_text(toml)
        models += load_config(folder / "own.toml").models
    network, file, old, new, rare = models
    assert (network.source, network.weights) == ("torchvision:resnet50", str(folder / "parts.pth"))
    assert network.labels == folder / "parts.txt"
    assert file.source == f"onnx:{folder / 'parts.onnx'}"
    assert [(one.key, one.default, one.weight) for one in (old, new)] == [
        ("photos:1", True, 0.0),
        ("photos:2", False, 0.1),
    ]
    assert rare.idle_unload_s == 600


def model_of(annotation):
    """The pydantic model in an annotation such as TlsConfig | None or tuple[ModelConfig, ...], or None."""
    if typing.get_origin(annotation) is collections.abc.Mapping:
        return None  # a table of the user's own names
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((model for argument in typing.get_args(annotation) if (model := model_of(argument))), None)


def keys(model, prefix=""):
    """Every key of a configuration: its dotted path and its field."""
    for name, field in model.model_fields.items():
        section = model_of(field.annotation)
        if section is None:
            yield prefix + name, field
        else:
            yield from keys(section, f"{prefix}{name}.")


def at(table, path):
    """The value at a dotted path, through the first model; KeyError if it is not there."""
    for part in path.split("."):
        table = table[0][part] if isinstance(table, list) else table[part]
    return table


def test_every_key_is_documented_with_its_default():
    active, all_keys = tomllib.loads(TOML), tomllib.loads(UNSET_LINE.sub("", TOML))
    found = dict(keys(Config))
    assert {"server.tls.client_ca", "models.batching.max_delay_ms", "models.preprocess.mean"} <= set(found)
    for path, field in found.items():
        at(all_keys, path)  # documented at all
        if field.is_required():
            continue
        default = field.get_default(call_default_factory=True)
        if default is None:
            with pytest.raises(KeyError):
                at(active, path)
        else:
            value = at(active, path)
            assert (tuple(value) if isinstance(value, list) else value) == default, path


def test_every_choice_is_documented():
    lines = {line.removeprefix("# ").split(" = ")[0]: line for line in TOML.splitlines()}
    checked = 0
    for path, field in keys(Config):
        choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
        if Interpolation in typing.get_args(field.annotation):
            choices = tuple(Interpolation)
        for choice in choices:
            assert f'"{choice}"' in lines[path.rpartition(".")[2]], path
            checked += 1
    assert checked >= 10


def test_unset_keys_of_the_toml_block_are_valid(folder):
    lines = UNSET_LINE.sub("", TOML).splitlines()
    # A token or its file, not both; and a folder of modules is for Python factories.
    kept = [line for line in lines if not line.startswith(("token =", "source_folder ="))]
    (folder / "full.toml").write_text("\n".join(kept))
    config = load_config(folder / "full.toml")
    assert config.server.tls.client_ca == folder / "clients.pem"
    (model,) = config.models
    assert None not in dict(model.preprocess).values()
    assert model.labels == folder / "labels.txt"


def split_command(line):
    """(environment, words) of a shell line."""
    words = shlex.split(line)
    count = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def options_of(app):
    """Option names by command of a typer application."""
    group = typer.main.get_command(app)
    return {
        name: {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for name, command in group.commands.items()
    }


OPTIONS = {"heatlens": options_of(client_app), "heatlens-server": options_of(server_app)}
# Its parser is not typer's.
OPTIONS["heatlens"]["health"] = set(health_parser()._option_string_actions)


@pytest.mark.parametrize("line", SHELL)
def test_shell_lines_exist(line, folder, monkeypatch):
    environment, (program, *arguments) = split_command(line)
    if program == "make":
        done = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True)
        assert re.search(rf"^  {arguments[0]} ", done.stdout, re.MULTILINE)
    elif program == ".":
        (script,) = arguments
        assert "VENV := .venv\n" in (ROOT / "Makefile").read_text()
        assert script == ".venv/bin/activate"
    elif program == "cp":
        assert (ROOT / arguments[0]).is_file()
    elif program == "python":
        assert arguments[0] == "-c" or (ROOT / arguments[0]).is_file()
    elif program == "pip":
        verb, target = arguments
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert verb == "install"
        assert target == "." or set(target[2:-1].split(",")) <= set(extras)
    else:
        used = {word for word in arguments[1:] if word.startswith("-")}
        assert used <= OPTIONS[program][arguments[0]]
    if program == "heatlens-server":
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        config = load_config(folder / "server.toml" if "--config" in arguments else None)
        assert not environment or config != Config()


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("heatlens ")])
def test_client_commands_run(line, folder, address):
    line = line.replace("--duration 30", "--duration 3")  # the same, sooner
    done = CliRunner(env={"HEATLENS_ADDRESS": address}).invoke(client_app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert done.output


def test_options_named_in_prose_exist():
    everywhere = set().union(*(options for commands in OPTIONS.values() for options in commands.values()))
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", prose))
    assert {"--rate", "--tls", "--config"} <= named <= everywhere


def test_every_method_and_option_has_a_row():
    def rows(page):
        lines = re.findall(r"^\| `.*", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        return set(re.findall(r"`([\w-]+)`", "\n".join(lines)))

    assert set(Method) <= rows("methods.md")
    assert ExplainOptions.__optional_keys__ <= rows("client.md")


def test_make_help_is_the_truth():
    done = subprocess.run(["make", "-C", ROOT, "help"], capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^  ([a-z-]+) ", done.stdout, re.MULTILINE))
    assert {
        "help",
        "setup",
        "demo",
        "test",
        "lint",
        "format",
        "type",
        "proto",
        "proto-check",
        "bench",
        "clean",
    } <= listed
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert listed == set(phony.split())


def table_rows(heading):
    """Cells of the rows of the last table under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?:^##? |\Z)", README, re.MULTILINE | re.DOTALL)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_error_table_is_the_mapping():
    by_code = {code: (exception.strip("`"), reasons) for code, exception, reasons in table_rows("Errors")}
    for code, (exception, _) in by_code.items():
        assert exceptions.error_class(exceptions.StatusCode(code)).__name__ == exception
    assert {row[0] for row in by_code.values()} == {kind.__name__ for kind in exceptions.HeatlensError.__subclasses__()}
    for error, code in _CODES.items():
        if error is not InvalidArgument:  # its reason is always given where it is raised
            assert error.reason in by_code[code.name][1], error


def reasons_in(folder):
    """Every reason that the sources pass as a literal."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "reason" and isinstance(node.value, ast.Constant):
                yield node.value.value


def test_every_reason_is_documented():
    reasons = set(reasons_in(ROOT / "client" / "heatlens")) | set(reasons_in(ROOT / "server"))
    assert {"IMAGE_UNDECODABLE", "CLIENT_CLOSED"} <= reasons
    assert {reason for reason in reasons if not re.search(rf"\b{reason}\b", README)} == set()


def test_limits_table_names_every_limit(address):
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in table_rows("Limits"))))
    with heatlens.Client(address) as client:
        info = client.server_info()
    assert named == set(type(info).__dataclass_fields__) - {"version"}
    assert (info.max_message_bytes, info.max_image_pixels, info.max_queue_length) == (16 << 20, 64_000_000, 256)
    assert (info.max_targets, info.max_batch_size, info.max_queue_delay_ms, info.max_in_flight) == (32, 16, 2.0, 64)


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
