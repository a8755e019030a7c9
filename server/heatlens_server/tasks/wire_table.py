"""The wire side of every task, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from heatlens_server.engines.base import Task
from heatlens_server.tasks.classification.wire import ClassificationWire
from heatlens_server.tasks.detection.wire import DetectionWire
from heatlens_server.tasks.embedding.wire import EmbeddingWire
from heatlens_server.tasks.segmentation.wire import SegmentationWire
from heatlens_server.tasks.wire_base import TaskWire

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
