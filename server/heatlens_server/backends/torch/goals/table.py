"""The torch side of every task, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from heatlens_server.backends.torch.goals.base import TaskModel
from heatlens_server.backends.torch.goals.classification import Classification
from heatlens_server.backends.torch.goals.detection import Detection
from heatlens_server.backends.torch.goals.embedding import Embedding
from heatlens_server.backends.torch.goals.segmentation import Segmentation
from heatlens_server.core.tasks import Task

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
