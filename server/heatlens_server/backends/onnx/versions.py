"""The packages that decide what an export is. No torch in here: a cache is asked by these versions without it."""

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("heatlens", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that an export depends on, those that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
