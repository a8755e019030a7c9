"""The wire side of every task, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from heatlens_server.api.tasks.base import TaskWire
from heatlens_server.api.tasks.classification import ClassificationWire
from heatlens_server.api.tasks.detection import DetectionWire
from heatlens_server.api.tasks.embedding import EmbeddingWire
from heatlens_server.api.tasks.segmentation import SegmentationWire
from heatlens_server.core.tasks import Task

_WIRES: Mapping[Task, TaskWire] = MappingProxyType(
    {
        Task.CLASSIFICATION: ClassificationWire(Task.CLASSIFICATION),
        Task.MULTI_LABEL: ClassificationWire(Task.MULTI_LABEL),
        Task.SEGMENTATION: SegmentationWire(),
        Task.DETECTION: DetectionWire(),
        Task.EMBEDDING: EmbeddingWire(),
    }
)


def task_wire(task: Task) -> TaskWire:
    """How requests to and answers of models of a task look."""
    return _WIRES[task]
