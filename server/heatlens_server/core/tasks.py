"""What a model does."""

from enum import StrEnum


class Task(StrEnum):
    """What a model does. The value is its name in configuration files and on the wire."""

    CLASSIFICATION = "classification"
    MULTI_LABEL = "multi-label-classification"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"
    EMBEDDING = "embedding"
