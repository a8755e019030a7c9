"""Whether the classes of a pixel exclude each other, as the configuration of a network says or as its output tells."""

from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.tasks import Task

_DEFAULT_THRESHOLD = 0.5


def find_threshold(config: ModelConfig, task: Task, class_count: int) -> tuple[float | None, tuple[str, ...]]:
    """Decide between softmax and sigmoid.

    One output channel is one class, by sigmoid: softmax would make it certain everywhere. Several exclude each other
    unless the configuration says otherwise: logits do not tell.

    Args:
        config: the model's.
        task: what it does.
        class_count: how many channels its output has.

    Returns:
        The sigmoid above which a pixel is predicted as a class, None for softmax; and what was assumed, one sentence
        each, with the key that overrides it.

    Raises:
        ModelLoadError: the configuration does not fit the network; names the key.
    """
    if task is not Task.SEGMENTATION:
        for key, is_set in (("activation", config.activation != "auto"), ("threshold", config.threshold is not None)):
            if is_set:
                raise ModelLoadError(f"{key}: is for segmentation, and this model is of {task}")
        return None, ()
    is_single = class_count == 1
    if is_single and config.activation == "softmax":
        raise ModelLoadError(
            'activation: the network has one output channel, and the softmax of one is 1 everywhere: set "sigmoid"'
        )
    if config.activation == "softmax" or (config.activation == "auto" and not is_single):
        if config.threshold is not None:
            raise ModelLoadError('threshold: is for activation = "sigmoid"')
        return None, _assumed_exclusive(config, class_count)
    threshold = _DEFAULT_THRESHOLD if config.threshold is None else config.threshold
    if config.activation == "sigmoid":
        return threshold, ()
    assumption = (
        f"The network has one output channel: its sigmoid is the probability of class 0, the only one, and a pixel is "
        f"predicted as it above {threshold:g}; threshold overrides that."
    )
    return threshold, (assumption,)


def _assumed_exclusive(config: ModelConfig, class_count: int) -> tuple[str, ...]:
    # Those of torchvision are known to.
    if config.activation != "auto" or not config.source.startswith("python:"):
        return ()
    assumption = (
        f"The classes of the network's {class_count} output channels are taken to exclude each other (softmax); if "
        f'they may overlap, set activation = "sigmoid".'
    )
    return (assumption,)
