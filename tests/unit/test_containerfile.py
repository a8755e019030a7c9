"""The recipe of the container images: what hadolint does not check."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heatlens._cli.commands import app as client_app
from heatlens_server.cli import app as server_app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy" / "Containerfile").read_text()
LINES = re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", "").splitlines()
INSTRUCTIONS = [tuple(line.split(maxsplit=1)) for line in LINES if line]
ARGUMENTS = dict(value.split("=", 1) for name, value in INSTRUCTIONS if name == "ARG")


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage by its name, those of the stage that it begins with first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, value in INSTRUCTIONS:
        if name == "FROM":
            base, _, stage = value.partition(" AS ")
            current = found[stage] = [*found.get(base, [("FROM", base)])]
        elif found:
            current.append((name, value))
    return found


IMAGES = {name: stages()[name] for name in ("light", "torch", "gpu")}
EACH_IMAGE = pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)


def last(image, instruction: str) -> str:
    return [value for name, value in image if name == instruction][-1]


@EACH_IMAGE
def test_the_base_is_pinned_to_a_version(image):
    base = re.sub(r"\$\{(\w+)\}", lambda match: ARGUMENTS[match[1]], image[0][1])
    assert re.fullmatch(r"docker\.io/library/python:3\.\d+\.\d+-slim-\w+", base)


@EACH_IMAGE
def test_it_runs_as_a_user_without_rights(image):
    user = last(image, "USER")
    assert int(user) > 0
    assert f"--uid {user}" in " ".join(value for name, value in image if name == "RUN")


@EACH_IMAGE
def test_it_is_probed_and_started_by_commands_that_there_are(image):
    probe = json.loads(last(image, "HEALTHCHECK").partition("CMD ")[2])
    assert probe[:2] == ["heatlens", "health"]
    assert json.loads(last(image, "ENTRYPOINT")) == ["heatlens-server"]
    command = json.loads(last(image, "CMD"))
    assert command[2].endswith(f":{last(image, 'EXPOSE')}")
    assert probe[-1].endswith(f":{last(image, 'EXPOSE')}")
    for app, words in ((client_app, probe[1:]), (server_app, command)):
        shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        assert all(word in shown for word in words[1:] if word.startswith("--"))


def test_each_image_holds_the_extras_of_its_name():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {}
    for name, image in IMAGES.items():
        assert f"--from={name}-packages /opt/heatlens /opt/heatlens" in last(image, "COPY")
        (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", " ".join(value for _, value in stages()[f"{name}-packages"]))
        installed[name] = extras.split(",")
    assert installed == {"light": ["server"], "torch": ["server", "torch"], "gpu": ["gpu"]}
    assert {extra for extras in installed.values() for extra in extras} <= set(known)


def test_what_is_copied_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for name, value in INSTRUCTIONS if name == "COPY" and "--from" not in value
              for source in value.split()[:-1]}  # fmt: skip
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


def test_a_build_without_a_target_makes_the_light_image():
    assert list(stages())[-1] == "light"
