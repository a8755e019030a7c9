"""The torch side of every task, by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from heatlens_server.backends.torch.goals.base import TaskModel
from heatlens_server.backends.torch.goals.classification import Classification
from heatlens_server.backends.torch.goals.detection import Detection
from heatlens_server.backends.torch.goals.embedding import Embedding
from heatlens_server.backends.torch.goals.segmentation import Segmentation
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.tasks import Task

_MAKERS: Mapping[Task, Callable[[LoadedModel], TaskModel]] = MappingProxyType(
    {
        Task.CLASSIFICATION: lambda _: Classification(),
        Task.MULTI_LABEL: lambda _: Classification(multi_label=True),
        Task.SEGMENTATION: lambda model: Segmentation(threshold=model.threshold),
        Task.DETECTION: lambda _: Detection(),
        Task.EMBEDDING: lambda _: Embedding(),
    }
)


def task_model(model: LoadedModel) -> TaskModel:
    """What tells the torch engine how to run a model, and what can be explained about it."""
    return _MAKERS[model.task](model)
