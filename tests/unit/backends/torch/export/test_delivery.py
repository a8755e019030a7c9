"""An export is in its folder whole, or the folder is as it was."""

import json
import stat

import pytest

import export_networks
import tiny_models
from export_networks import make
from heatlens_server.backends.onnx.delivery import check_folder
from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.backends.torch.export import delivery
from heatlens_server.backends.torch.export.delivery import export_model, methods_of
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec
from heatlens_server.core.methods import CLOSED_FORMS, Method
from loaded_models import hook_count, loaded

QUIET = lambda _: None  # noqa: E731


def export(folder, *, kind=export_networks.Staged, verify=False, report=QUIET):
    return export_model(
        make(kind),
        GraphSpec("last"),
        file_format=Format.TORCHSCRIPT,
        source="x",
        folder=folder,
        verify=verify,
        report=report,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_with_missing_parents(tmp_path):
    lines = []
    manifest = export(tmp_path / "a" / "b", verify=True, report=lines.append)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a" / "b") == ["manifest.json", "test.ts"]
    assert read_manifest(tmp_path / "a" / "b") == manifest
    assert manifest.parity["informative_maps"] > 0
    assert [line.split(" ")[0] for line in lines] == ["differentiating", "writing", "running", "verifying"]
    (tmp_path / "plain").mkdir()
    permissions = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "plain", tmp_path / "a" / "b")}
    assert len(permissions) == 1


def test_empty_folder(tmp_path):
    assert export(tmp_path).parity == {}
    assert names(tmp_path) == ["manifest.json", "test.ts"]


def test_an_earlier_export_is_replaced_and_what_people_put_beside_it_stays(tmp_path):
    export(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "test.ts").rename(tmp_path / "old.ts")
    content["files"] = {"old.ts": content["files"]["test.ts"]}
    content["graphs"][0]["file"] = "old.ts"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "notes.txt").write_text("mine")
    export(tmp_path)
    assert names(tmp_path) == ["manifest.json", "notes.txt", "test.ts"]
    read_manifest(tmp_path)


@pytest.mark.parametrize("damage", [True, False])
def test_a_failing_export_leaves_the_folder_as_it_was(tmp_path, damage):
    export(tmp_path / "out")
    if damage:
        (tmp_path / "out" / "test.ts").write_bytes(b"damaged")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    with pytest.raises(ExportError, match="the network cannot be recorded"):
        export(tmp_path / "out", kind=export_networks.Baked)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")} == before
    with pytest.raises(ExportError, match="the network cannot be recorded"):
        export(tmp_path / "new" / "folder", kind=export_networks.Baked)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ExportError("wrong map"), KeyboardInterrupt(), SystemExit(143)])
def test_an_export_that_is_stopped_or_wrong_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(delivery, "verify_export", fail)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(type(error)):
            export(folder, verify=True)
    assert names(tmp_path) == ["empty"]
    assert names(tmp_path / "empty") == []


def test_a_move_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    kind = type(tmp_path)
    replace = kind.replace

    def fail_on_manifest(self, target):
        if self.name == "manifest.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(kind, "replace", fail_on_manifest)
    with pytest.raises(ExportError, match="cannot be written \\(No space left on device\\)"):
        export(tmp_path)
    assert names(tmp_path) == []


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="is not empty and holds no earlier export"):
        export(tmp_path)
    with pytest.raises(ExportError, match="is not a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(ExportError, match="file is not a folder"):
        check_folder(tmp_path / "file" / "child" / "grandchild")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("content", ["{}", '{"manifest_version": 3, "name": "an app"}', "[]", "no json", ""])
def test_somebody_else_s_manifest_is_not_overwritten(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ExportError, match=r"holds a manifest\.json that is not of a heatlens export"):
        export(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content
    assert names(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file", "/elsewhere/table.txt"), "the export failed .FileNotFoundError: No such"),
        (OSError("odd"), "the export failed .OSError: OSError"),
        (OSError(28, "No space left on device"), "out cannot be written .No space"),
    ],
)
def test_only_the_folder_s_own_faults_are_called_so(tmp_path, monkeypatch, error, message):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(delivery, "verify_export", fail)
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "out", verify=True)
    assert names(tmp_path) == []


def test_faults_in_the_folder_are_known_by_their_file(tmp_path, monkeypatch):
    def fail(_model, _spec, *, folder, **_options):
        (folder / "missing" / "graph").write_text("x")

    monkeypatch.setattr(delivery, "export_graph", fail)
    with pytest.raises(ExportError, match=r"out cannot be written .No such file"):
        export(tmp_path / "out")


def test_methods_are_those_of_the_reference_engine():
    model = loaded(tiny_models.tiny())
    strides = [parameter.stride() for parameter in model.module.parameters()]
    assert methods_of(model) == CLOSED_FORMS
    assert [parameter.stride() for parameter in model.module.parameters()] == strides
    assert hook_count(model.module) == 0
    assert Method.CAM not in methods_of(loaded(tiny_models.tiny_mlp()))


class Scaling(export_networks.Staged):
    """Calls an operator in a way that ONNX has no translation of."""

    def forward(self, x):
        return super().forward(x) * x.amax()


def test_what_onnx_does_not_know_is_named_by_its_operator(tmp_path):
    with pytest.raises(ExportError, match=r"translated to ONNX \(\w+: torch\.ops\.aten\.amax\.default\)$"):
        export_model(
            make(Scaling),
            GraphSpec("last"),
            file_format=Format.ONNX,
            source="x",
            folder=tmp_path,
            verify=False,
            report=QUIET,
        )
    assert names(tmp_path) == []
