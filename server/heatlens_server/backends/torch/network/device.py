"""From a device's name in the configuration to torch's device."""

import torch

from heatlens_server.core.errors import ModelLoadError


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
            raise ModelLoadError(f"there is no device {name!r}; CUDA devices found: {count}")
        device = torch.device("cuda", device.index or 0)
    return device
