"""What an operator can set. Loads no torch, so that a wrong key is reported at once."""

from heatlens_server.config.load import Config, load_config
from heatlens_server.config.model import (
    EMBEDDED_MODEL,
    EXPORT_PREFIX,
    ONNX_PREFIX,
    WEIGHT_FILE_SUFFIXES,
    BatchingConfig,
    ModelConfig,
    PreprocessConfig,
)
from heatlens_server.config.pixel_classes import find_threshold
from heatlens_server.config.preprocess import (
    IMAGENET_PREPROCESS,
    ResolvedPreprocess,
    given_channels,
    lay_over,
    resized,
    scaled_resize,
)
from heatlens_server.config.server import AdminConfig, ServerConfig, TlsConfig
from heatlens_server.config.telemetry import MetricsConfig, TracingConfig

__all__ = [
    "EMBEDDED_MODEL",
    "EXPORT_PREFIX",
    "IMAGENET_PREPROCESS",
    "ONNX_PREFIX",
    "WEIGHT_FILE_SUFFIXES",
    "AdminConfig",
    "BatchingConfig",
    "Config",
    "MetricsConfig",
    "ModelConfig",
    "PreprocessConfig",
    "ResolvedPreprocess",
    "ServerConfig",
    "TlsConfig",
    "TracingConfig",
    "find_threshold",
    "given_channels",
    "lay_over",
    "load_config",
    "resized",
    "scaled_resize",
]
