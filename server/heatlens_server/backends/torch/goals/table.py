"""The torch side of every task, by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from heatlens_server.backends.torch.goals.base import TaskModel
from heatlens_server.backends.torch.goals.classification import Classification
from heatlens_server.backends.torch.goals.detection import Detection
from heatlens_server.backends.torch.goals.embedding import Embedding
from heatlens_server.backends.torch.goals.regression import Regression
from heatlens_server.backends.torch.goals.segmentation import Segmentation
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.tasks import Task


def _classification(model: LoadedModel) -> TaskModel:
    return Classification(model.reading, model.task.traits.activation)


_MAKERS: Mapping[Task, Callable[[LoadedModel], TaskModel]] = MappingProxyType(
    {
        Task.CLASSIFICATION: _classification,
        Task.MULTI_LABEL: _classification,
        Task.BINARY: _classification,
        Task.REGRESSION: lambda model: Regression(model.reading),
        Task.SEGMENTATION: lambda model: Segmentation(model.reading, threshold=model.threshold),
        Task.DETECTION: lambda _: Detection(),
        Task.EMBEDDING: lambda model: Embedding(model.reading),
    }
)


def task_model(model: LoadedModel) -> TaskModel:
    """What tells the torch engine how to run a model, and what can be explained about it."""
    return _MAKERS[model.task](model)
