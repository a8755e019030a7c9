"""Devices by name, out-of-memory errors, and recording of gradients in any mode of the caller."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from heatlens_server.core.errors import ModelLoadError

_local = threading.local()
_setting = threading.Lock()

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")


def resolve_device(name: str) -> torch.device:
    """Return the device named "auto" (the first GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ModelLoadError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ModelLoadError(f"device: there is no device {name!r}; CUDA devices found: {count}")
        device = torch.device("cuda", device.index or 0)
    return device


@contextmanager
def recording_allowed() -> Iterator[None]:
    """Record gradients, also where the caller is in `no_grad` or `inference_mode`."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def run_on_threads(count: int | None) -> None:
    """Have what this thread runs on a CPU use so many threads; None for as many as other threads use.

    PyTorch keeps that number for each thread. A thread that sets it sets it for those that begin later as well.
    """
    if getattr(_local, "count", None) == count:
        return
    with _setting:
        usual: list[int] = []
        aside = threading.Thread(target=lambda: usual.append(torch.get_num_threads()))
        aside.start()
        aside.join()
        # A thread takes the number of others when it first asks: later that would undo this.
        torch.get_num_threads()
        torch.set_num_threads(count or usual[0])
        aside = threading.Thread(target=torch.set_num_threads, args=usual)
        aside.start()
        aside.join()
    _local.count = count


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given: a GPU's work is begun, and goes on, while Python goes on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's out-of-memory errors into MemoryError, and give a GPU's unused memory back."""
    try:
        yield
    except RuntimeError as error:
        # The CPU's allocator raises plain ones. TorchScript's interpreter wraps torch.OutOfMemoryError in one.
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
            torch.cuda.empty_cache()
            raise MemoryError(str(error)) from None
        raise
