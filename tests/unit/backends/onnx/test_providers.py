"""Which onnxruntime, and where it runs: nothing falls back unsaid."""

import logging
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import onnxruntime
import pytest

from heatlens_server.backends.onnx import providers as providers_module
from heatlens_server.backends.onnx.providers import (
    CPU,
    CUDA,
    ON_CPU,
    TENSORRT,
    choose,
    installed_distributions,
    load_runtime,
    missing_library,
    open_session,
    session_options,
)
from heatlens_server.core.cores import usable_cores
from heatlens_server.core.errors import ModelLoadError

EVERYTHING = (TENSORRT, CUDA, CPU)


def choice_of(device="auto", provider="auto", *, precision="fp32", available=EVERYTHING, gpu_count=2, cache=None):
    return choose(
        device=device, provider=provider, precision=precision, available=available, gpu_count=gpu_count, cache=cache
    )


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these distributions are installed."""

    def pretend(*names: str) -> None:
        def distribution(name: str):
            if name not in names:
                raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(providers_module.metadata, "distribution", distribution)

    return pretend


def test_the_one_onnxruntime_here_is_found():
    assert installed_distributions() == ("onnxruntime",)
    assert load_runtime() is onnxruntime


def test_two_onnxruntimes_are_refused_with_the_way_out(installed):
    installed("onnxruntime", "onnxruntime-gpu")
    with pytest.raises(ModelLoadError, match=r"pip uninstall onnxruntime onnxruntime-gpu.*then install one"):
        load_runtime()


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "onnxruntime is not installed: pip install"), (("onnxruntime-gpu",), "onnxruntime-gpu is damaged")],
)
def test_no_onnxruntime_is_said(installed, monkeypatch, names, message):
    installed(*names)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelLoadError, match=message):
        load_runtime()


@pytest.mark.parametrize(
    ("device", "provider", "name", "where", "required"),
    [
        ("auto", "auto", CUDA, "cuda:0", False),
        ("auto", "cuda", CUDA, "cuda:0", True),
        ("auto", "tensorrt", TENSORRT, "cuda:0", True),
        ("cuda", "auto", CUDA, "cuda:0", True),
        ("cuda:1", "auto", CUDA, "cuda:1", True),
        ("cuda:1", "tensorrt", TENSORRT, "cuda:1", True),
        ("cpu", "auto", CPU, "cpu", False),
        ("auto", "cpu", CPU, "cpu", False),
        ("cpu", "cpu", CPU, "cpu", False),
    ],
)
def test_device_and_provider_choose_together(device, provider, name, where, required):
    choice = choice_of(device, provider)
    assert (choice.name, choice.device, choice.required) == (name, where, required)
    assert choice.providers[0][0] == name
    assert choice.providers[-1] == (CPU, {})
    options = dict(choice.providers)
    assert all(options[gpu]["device_id"] == where[-1] for gpu in options if gpu != CPU)


@pytest.mark.parametrize(
    ("device", "provider"), [("cpu", "cuda"), ("cpu", "tensorrt"), ("cuda", "cpu"), ("cuda:1", "cpu")]
)
def test_contradictions_are_refused(device, provider):
    with pytest.raises(ModelLoadError, match=f"provider '{provider}' does not run on device '{device}'"):
        choice_of(device, provider)


@pytest.mark.parametrize(
    ("asked", "there", "message"),
    [
        ({"device": "cuda"}, {"gpu_count": 0}, "no device 'cuda:0'; CUDA devices found: 0"),
        ({"device": "cuda:2"}, {"gpu_count": 2}, "no device 'cuda:2'; CUDA devices found: 2"),
        ({"provider": "tensorrt"}, {"gpu_count": 0}, "no device 'cuda:0'"),
        ({"device": "cuda"}, {"available": (CPU,)}, "no CUDAExecutionProvider.*heatlens\\[gpu\\]"),
        ({"provider": "tensorrt"}, {"available": (CUDA, CPU)}, "no TensorrtExecutionProvider"),
    ],
)
def test_what_was_asked_for_and_is_not_there_fails(asked, there, message):
    with pytest.raises(ModelLoadError, match=message):
        choice_of(**asked, **there)


def test_auto_on_a_machine_without_a_gpu_is_the_cpu_and_nothing_to_warn_of(caplog):
    assert choice_of(gpu_count=0) == ON_CPU
    assert choice_of(gpu_count=0, available=(CPU,)) == ON_CPU
    assert caplog.records == []


def test_auto_that_leaves_a_gpu_idle_warns_of_what_is_missing(caplog):
    assert choice_of(available=(CPU,)) == ON_CPU
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no CUDAExecutionProvider" in record.message


def test_options_follow_the_precision(tmp_path):
    full, half = (dict(choice_of("cuda:1", precision=precision).providers)[CUDA] for precision in ("fp32", "fp16"))
    assert full["device_id"] == half["device_id"] == "1"
    assert (full["use_tf32"], half["use_tf32"]) == ("0", "1")
    kept = dict(choice_of(provider="tensorrt", precision="fp16", cache=tmp_path).providers)
    assert kept[TENSORRT]["trt_fp16_enable"] == "1"
    assert kept[TENSORRT]["trt_engine_cache_path"] == str(tmp_path)
    assert CUDA in kept
    lost = dict(choice_of(provider="tensorrt").providers)[TENSORRT]
    assert lost["trt_fp16_enable"] == "0"
    assert "trt_engine_cache_enable" not in lost


def test_threads_are_the_cores_of_this_process_unless_given():
    assert session_options(onnxruntime, threads=None).intra_op_num_threads == usable_cores()
    assert session_options(onnxruntime, threads=3).intra_op_num_threads == 3


class Runtime(SimpleNamespace):
    """An onnxruntime whose sessions run on the CPU whatever was asked for, as the real one does."""

    def __init__(self, folder) -> None:
        self.asked = []
        self.preloaded = 0
        (folder / "capi").mkdir()
        super().__init__(__file__=str(folder / "__init__.py"))

    def preload_dlls(self):
        self.preloaded += 1

    def InferenceSession(self, graph, options, *, providers, enable_fallback):
        assert enable_fallback == 0
        assert providers_module._creation.locked()  # one at a time in the whole process
        self.asked.append(providers)
        return SimpleNamespace(get_providers=lambda: [CPU])


def test_a_session_that_is_not_where_it_was_asked_to_be_is_refused(tmp_path):
    runtime = Runtime(tmp_path)
    with pytest.raises(ModelLoadError, match=r"CUDAExecutionProvider does not work here.*comes without lib"):
        open_session(runtime, tmp_path / "a.onnx", None, choice_of("cuda"))
    assert runtime.preloaded == 1
    assert str(tmp_path) not in missing_library(runtime, CUDA)


def test_a_session_that_was_free_to_fall_back_says_so(tmp_path, caplog):
    runtime = Runtime(tmp_path)
    _, where = open_session(runtime, tmp_path / "a.onnx", None, choice_of())
    assert where == ON_CPU
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "CUDAExecutionProvider does not work here" in record.message


def test_a_session_on_the_cpu_loads_nothing_for_gpus(tmp_path, caplog):
    runtime = Runtime(tmp_path)
    _, where = open_session(runtime, tmp_path / "a.onnx", None, ON_CPU)
    assert where == ON_CPU
    assert runtime.preloaded == 0
    assert caplog.records == []


def test_the_missing_library_is_named_without_its_path(tmp_path):
    runtime = Runtime(tmp_path)
    library = tmp_path / "capi" / "libonnxruntime_providers_cuda.so"
    library.write_bytes(b"not a library")
    assert missing_library(runtime, CUDA) == "libonnxruntime_providers_cuda.so cannot be loaded"


@pytest.mark.parametrize("wanted", [False, True])
def test_onnxruntime_keeps_no_identifier_of_the_machine_and_sends_nothing_unless_it_is_told_to(tmp_path, wanted):
    program = """
from onnx import TensorProto, helper
from heatlens_server.backends.onnx.providers import load_runtime
value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
same = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [same])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
runtime = load_runtime()
runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
"""
    # Little of this process' environment: onnxruntime sends nothing where a variable such as CI says that tests run.
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    # What is wanted is sent nowhere: no certificate is trusted.
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "SSL_CERT_FILE": os.devnull}
    if wanted:
        environment["ORT_DISABLE_TELEMETRY"] = "0"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=60)
    assert (tmp_path / "cache").exists() == wanted
