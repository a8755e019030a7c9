"""The torch side of every task, by name."""

from heatlens_server.engines.base import Task
from heatlens_server.tasks.base import TaskModel
from heatlens_server.tasks.classification.model import Classification


def task_model(task: Task) -> TaskModel:
    """What tells the torch engine how to run networks of a task."""
    return Classification(multi_label=task is Task.MULTI_LABEL)
