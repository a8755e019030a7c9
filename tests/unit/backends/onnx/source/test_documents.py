"""Metadata and files beside a model: what is read, and how hostile ones are refused."""

import json

import pytest
import yaml

from heatlens_server.backends.onnx.source.documents import MAX_BYTES, Section, read_beside
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import Interpolation

ORIGIN = "'config.json'"


def section(**values):
    return Section(ORIGIN, values)


def written(tmp_path, text, name="config.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_entries_are_read_as_values_and_as_text():
    document = section(mean=[0, 0.5], size="[224, 192]", names="{0: 'cat', 1: \"dog's\"}", std=2, crop="{'h': 3}")
    assert document.numbers("mean") == (0.0, 0.5)
    assert document.size_px("size") == (224, 192)
    assert document.labels("names") == ("cat", "dog's")
    assert (document.number("std"), document.size_px("std")) == (2.0, (2, 2))
    assert document.section("crop").number("h") == 3.0
    assert (document.numbers("absent"), document.section("absent"), document.labels("absent")) == (None, None, ())


@pytest.mark.parametrize(
    ("value", "expected"),
    [("bicubic", Interpolation.BICUBIC), ("BILINEAR", Interpolation.BILINEAR), (1, Interpolation.LANCZOS),
     ("random", None), (5, None), (None, None)],
)  # fmt: skip
def test_interpolations_by_name_and_by_pillows_number(value, expected):
    assert section(resample=value).interpolation("resample") is expected


DIGITS = "9" * 4000


@pytest.mark.parametrize(
    ("read", "value", "what"),
    [
        ("numbers", ["a"], "must be finite numbers"),
        ("numbers", [], "must be finite numbers"),
        ("numbers", [True], "must be finite numbers"),
        ("numbers", {"a": 1}, "must be finite numbers"),
        ("numbers", float("nan"), "must be finite numbers"),
        ("numbers", int(DIGITS), "must be finite numbers"),
        ("numbers", DIGITS, "must be finite numbers"),
        ("numbers", "9" * 5000, "cannot be read"),
        ("numbers", "NaN", "must be finite numbers"),
        ("numbers", "__import__('os')", "neither JSON nor a literal"),
        ("numbers", "(" * 100_000, "nested deeper than 32 levels"),
        ("numbers", "[" * 33 + "]" * 33, "nested deeper than 32 levels"),
        ("numbers", "-" * 100_000 + "1", "neither JSON nor a literal"),
        ("numbers", "1" + " " * MAX_BYTES, "larger than 4096 KB"),
        ("number", [1, 2], "must be one number"),
        ("size_px", 0, "must be a size"),
        ("size_px", [224.5, 224], "must be a size"),
        ("size_px", [1, 2, 3], "must be a size"),
        ("size_px", 1 << 20, "must be a size"),
        ("section", [1], "must be a mapping"),
        ("flag", "perhaps", "must be true or false"),
        ("text", 3, "must be text"),
        ("labels", [1, 2], "the names must be strings"),
        ("labels", {"0": "a", "2": "b"}, "class id 1 is missing"),
        ("labels", {None: "a"}, "the keys must be class ids"),
        ("labels", "{1e999: 'a'}", "the keys must be class ids"),
    ],
)  # fmt: skip
def test_wrong_entries_are_refused_by_their_key(read, value, what):
    with pytest.raises(ModelLoadError, match=rf"^'config\.json': outer\.key .*{what}"):
        getattr(Section(ORIGIN, {"key": value}, "outer."), read)("key")


def test_a_file_beside(tmp_path):
    document = read_beside(written(tmp_path, json.dumps({"pretrained_cfg": {"mean": [1]}})))
    assert document.origin == ORIGIN
    assert document.section("pretrained_cfg").path == "pretrained_cfg."
    assert read_beside(written(tmp_path, "[1, 2]")) is None
    assert read_beside(tmp_path / "absent.json") is None
    assert read_beside(tmp_path) is None
    assert read_beside(written(tmp_path, "a: [1, 2]\n", "inference.yml")).numbers("a") == (1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ('{"a": "' + "x" * MAX_BYTES + '"}', "larger than 4096 KB"),
        (b"\xff\xfe\x00", "codec can't decode"),
        ('{"a": ' + "9" * 5000 + "}", "integer string conversion"),
    ],
)
def test_broken_and_hostile_files_are_refused_by_their_name(tmp_path, text, what):
    with pytest.raises(ModelLoadError, match=f"^'config.json' cannot be read: .*{what}") as caught:
        read_beside(written(tmp_path, text))
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [", "no YAML"),
        ("- " * 5000 + "x", "no YAML"),
        ("!!python/object/apply:os.system [true]", "no YAML"),
        ("a: " + "x" * 300_000, "larger than 256 KB"),
    ],
)
def test_broken_and_hostile_yaml_is_refused(tmp_path, text, what):
    with pytest.raises(ModelLoadError, match=f"^'inference.yml' cannot be read: .*{what}"):
        read_beside(written(tmp_path, text, "inference.yml"))


def test_aliases_of_yaml_take_no_memory(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    assert isinstance(yaml.safe_load("\n".join(lines))["a59"], list)
    assert "a59" in read_beside(written(tmp_path, "\n".join(lines), "inference.yml"))
