"""The torch side of every task, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from heatlens_server.engines.base import Task
from heatlens_server.tasks.base import TaskModel
from heatlens_server.tasks.classification.model import Classification
from heatlens_server.tasks.detection.model import Detection
from heatlens_server.tasks.embedding.model import Embedding
from heatlens_server.tasks.segmentation.model import Segmentation

_MODELS: Mapping[Task, TaskModel] = MappingProxyType(
    {
        Task.CLASSIFICATION: Classification(),
        Task.MULTI_LABEL: Classification(multi_label=True),
        Task.SEGMENTATION: Segmentation(),
        Task.DETECTION: Detection(),
        Task.EMBEDDING: Embedding(),
    }
)


def task_model(task: Task) -> TaskModel:
    """What tells the torch engine how to run networks of a task."""
    return _MODELS[task]
