"""Which onnxruntime is installed, and where its sessions run. Falling back to another provider is never silent.

onnxruntime itself is imported by `load_runtime`, once it is known that there is exactly one: the packages `onnxruntime`
and `onnxruntime-gpu` both install a folder of that name, and the second one installed overwrites half of the first.
"""

import ctypes
import importlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from heatlens_server.core.cores import usable_cores
from heatlens_server.core.errors import ModelLoadError

_log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

# onnxruntime has no types.
Runtime = ModuleType
Session = Any
SessionOptions = Any

_PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}

_NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"

# All of these install the import package `onnxruntime`.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)

# Creating two sessions at once is not safe in every version (onnxruntime issue 27089); running them is.
_creation = threading.Lock()

# Idle threads of a run look for work this long before they sleep, in microseconds. With onnxruntime's default they burn
# the cores that requests are decoded and answered on. Measured on 2 cores, efficientnet_lite0 at batch 1: 7 ms with
# either while both cores are free, 23 ms instead of 36 ms while another process wants one.
_SPIN_US = 50

SIGNED_STAYS = ("session.qdqisint8allowed", "1")
"""A session's entry without which onnxruntime 1.32 makes signed quantisers unsigned on x86.

It forgets those that it has put in itself behind a Transpose, as backward passes have them, and then refuses the graph.
"""


# In the messages of onnxruntime's allocators, CUDA, cuBLAS and cuDNN.
_OUT_OF_MEMORY = ("failed to allocate memory", "bad_alloc", "bad allocation", "out of memory", "alloc_failed")


@dataclass(frozen=True, slots=True)
class Choice:
    """Where sessions run.

    Attributes:
        name: the provider wanted.
        device: "cpu", "cuda:0".
        required: True if it was asked for; False if the CPU will do.
        providers: for `InferenceSession`, with their options, the wanted one first.
    """

    name: str
    device: str
    required: bool
    providers: tuple[tuple[str, dict[str, str]], ...]


ON_CPU = Choice(name=CPU, device="cpu", required=False, providers=((CPU, {}),))


def load_runtime() -> Runtime:
    """Import onnxruntime, without its telemetry unless `ORT_DISABLE_TELEMETRY` says otherwise.

    From 1.32 on it keeps an identifier of the machine in a file and sends events about sessions over HTTPS, which is
    for the operator to want; its Privacy.md says how to turn that off.

    Returns:
        The module.

    Raises:
        ModelLoadError: it is not installed, or more than once.
    """
    os.environ.setdefault(_NO_TELEMETRY, "1")
    installed = installed_distributions()
    if len(installed) > 1:
        raise ModelLoadError(
            f"{' and '.join(installed)} are installed, and overwrite each other: uninstall all of them "
            f"(pip uninstall {' '.join(installed)}), then install one, "
            "onnxruntime-gpu for NVIDIA GPUs or else onnxruntime"
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        _log.debug("onnxruntime cannot be imported", exc_info=error)
        how = "pip install 'heatlens[server]', or 'heatlens[gpu]' for NVIDIA GPUs"
        state = f"{installed[0]} is damaged" if installed else "onnxruntime is not installed"
        raise ModelLoadError(f"{state}: {how}") from error


def installed_distributions() -> tuple[str, ...]:
    """The installed distributions that bring the package `onnxruntime`."""
    found = []
    for name in _DISTRIBUTIONS:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return tuple(found)


def cuda_device_count() -> int:
    """The number of NVIDIA GPUs that the driver shows to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    # CUDA driver API; 0 is CUDA_SUCCESS.
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def choose(
    *, device: str, provider: str, precision: str, available: Sequence[str], gpu_count: int, cache: Path | None = None
) -> Choice:
    """Choose a provider.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        provider: "auto", "cpu", "cuda" or "tensorrt".
        precision: of the network, "fp32" or "fp16".
        available: the providers that this onnxruntime was built with.
        gpu_count: how many GPUs there are.
        cache: where TensorRT may keep its engines; None for nowhere.

    Raises:
        ModelLoadError: device and provider contradict each other, or are missing.
    """
    wants_cpu, wants_gpu = device == "cpu", device.startswith("cuda")
    if (wants_cpu and provider in {"cuda", "tensorrt"}) or (wants_gpu and provider == "cpu"):
        raise ModelLoadError(f"provider {provider!r} does not run on device {device!r}")
    if wants_cpu or provider == "cpu":
        return ON_CPU
    required = wants_gpu or provider != "auto"
    name = CUDA if provider == "auto" else _PROVIDERS[provider]
    device_id = int(device.partition(":")[2] or 0)
    missing = ""
    if gpu_count <= device_id:
        missing = f"there is no device 'cuda:{device_id}'; CUDA devices found: {gpu_count}"
    elif name not in available:
        missing = (
            f"this onnxruntime has no {name}: pip uninstall {' '.join(installed_distributions())}, "
            f"then pip install 'heatlens[gpu]'"
        )
    if missing and required:
        raise ModelLoadError(missing)
    if missing:
        # A machine without a GPU lacks nothing.
        if gpu_count:
            _log.warning("onnxruntime runs on the CPU although there is a GPU: %s", missing)
        return ON_CPU
    cuda = (CUDA, _cuda_options(device_id, precision))
    providers = [cuda, (CPU, {})]
    if name == TENSORRT:
        providers.insert(0, (TENSORRT, _tensorrt_options(device_id, precision, cache)))
    return Choice(name=name, device=f"cuda:{device_id}", required=required, providers=tuple(providers))


def choose_for(runtime: Runtime, *, device: str, provider: str, precision: str, cache: Path | None = None) -> Choice:
    """Choose a provider on this machine; see `choose`.

    Raises:
        ModelLoadError: device and provider contradict each other, or are missing.
    """
    if "cpu" in {device, provider} and {device, provider} <= {"cpu", "auto"}:
        # Not even asking the driver: that alone takes memory on a GPU.
        return ON_CPU
    return choose(
        device=device,
        provider=provider,
        precision=precision,
        available=runtime.get_available_providers(),
        gpu_count=cuda_device_count(),
        cache=cache,
    )


def session_options(runtime: Runtime, *, threads: int | None) -> SessionOptions:
    """Options for every session.

    Args:
        runtime: the onnxruntime module.
        threads: for one run on a CPU; None for as many as there are cores for this process.
    """
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # onnxruntime's own count is the machine's.
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    # Errors only: warnings are about the graph, which users did not write.
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(*SIGNED_STAYS)
    return options


def open_session(
    runtime: Runtime, graph: Path | bytes, options: SessionOptions, choice: Choice
) -> tuple[Session, Choice]:
    """Open a session and make sure that it runs where it should.

    Args:
        runtime: the onnxruntime module.
        graph: the ONNX file, or what is in one.
        options: from `session_options`.
        choice: from `choose`.

    Returns:
        The session, and where it runs: `choice`, or the CPU if that was allowed to happen.

    Raises:
        ModelLoadError: the provider asked for does not work; the reason is in the message.
    """
    with _creation:
        if choice.name != CPU and hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()
        providers = list(choice.providers)
        # onnxruntime's own fallback prints to the terminal and goes on.
        session = runtime.InferenceSession(
            graph if isinstance(graph, bytes) else os.fspath(graph), options, providers=providers, enable_fallback=0
        )
    if choice.name in session.get_providers():
        return session, choice
    reason = f"{choice.name} does not work here: {missing_library(runtime, choice.name) or 'see the log for its error'}"
    if choice.required:
        raise ModelLoadError(reason)
    _log.warning("onnxruntime runs on the CPU although there is a GPU: %s", reason)
    return session, ON_CPU


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of onnxruntime's says that a device has no memory left."""
    text = str(error).lower()
    return any(words in text for words in _OUT_OF_MEMORY)


def missing_library(runtime: Runtime, provider: str) -> str:
    """Return the library that the dynamic linker misses when it loads a provider; "" if none is known."""
    kind = "tensorrt" if provider == TENSORRT else "cuda"
    library = Path(str(runtime.__file__)).parent / "capi" / f"libonnxruntime_providers_{kind}.so"
    if not library.exists():
        return f"this onnxruntime comes without {library.name}"
    try:
        ctypes.CDLL(os.fspath(library))
    except OSError as error:
        # The linker begins with the name of the library that it misses.
        return f"{Path(str(error).partition(':')[0]).name} cannot be loaded"
    return ""


def _cuda_options(device_id: int, precision: str) -> dict[str, str]:
    return {
        "device_id": str(device_id),
        "prefer_nhwc": "1",
        # An exhaustive search takes seconds for every new batch size, while callers wait.
        "cudnn_conv_algo_search": "HEURISTIC",
        # fp32 means fp32: TF32 has fp16's mantissa.
        "use_tf32": "0" if precision == "fp32" else "1",
    }


def _tensorrt_options(device_id: int, precision: str, cache: Path | None) -> dict[str, str]:
    options = {"device_id": str(device_id), "trt_fp16_enable": "1" if precision == "fp16" else "0"}
    if cache is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": os.fspath(cache),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": os.fspath(cache),
        }
    return options
