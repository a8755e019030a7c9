"""Whether the classes of a pixel exclude each other, as the configuration of a network says or as its output tells."""

from heatlens_server.config.model import ONNX_PREFIX, ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.tasks import Activation, OutputKind, Task

_DEFAULT_THRESHOLD = 0.5


def find_threshold(
    config: ModelConfig, task: Task, class_count: int, *, kind: OutputKind, shown: Activation
) -> tuple[float | None, tuple[str, ...]]:
    """Decide between softmax and sigmoid.

    Probabilities tell which made them. One output channel of logits is one class, by sigmoid: softmax would make it
    certain everywhere. Several exclude each other unless the configuration says otherwise: logits do not tell.

    Args:
        config: the model's.
        task: what the network does.
        class_count: how many channels its output has.
        kind: what its output is.
        shown: what makes that, if it is not logits.

    Returns:
        The sigmoid above which a pixel is predicted as a class, None for softmax; and what was assumed, one sentence
        each, with the key that overrides it.

    Raises:
        ModelLoadError: the configuration does not fit the network; names the key.
    """
    if task is not Task.SEGMENTATION:
        _check_other_task(config, task)
        return None, ()
    activation, assumptions = _activation(config, class_count, kind, None if kind is OutputKind.LOGITS else shown)
    if activation is Activation.SIGMOID:
        return _DEFAULT_THRESHOLD if config.threshold is None else config.threshold, assumptions
    if config.threshold is not None:
        raise ModelLoadError('threshold: is for activation = "sigmoid"')
    return None, assumptions


def _check_other_task(config: ModelConfig, task: Task) -> None:
    own = task.traits.activation
    if config.activation not in {"auto", own}:
        raise ModelLoadError(f"activation: is {own} for {task}; another can be set for segmentation only")
    if config.threshold is not None:
        raise ModelLoadError(f"threshold: is for segmentation, and this model is for {task}")


def _activation(
    config: ModelConfig, class_count: int, kind: OutputKind, shown: Activation | None
) -> tuple[Activation, tuple[str, ...]]:
    """What makes the probabilities of a pixel, and what was assumed."""
    configured = None if config.activation == "auto" else Activation(config.activation)
    if shown is not None and configured not in {None, shown}:
        raise ModelLoadError(
            f'activation: the network returns {kind} by {shown}: set "{shown}", or outputs = '
            f'"{OutputKind.LOGITS}" if what it returns are logits'
        )
    if class_count == 1 and configured is Activation.SOFTMAX:
        raise ModelLoadError(
            'activation: the network has one output channel, and the softmax of one is 1 everywhere: set "sigmoid"'
        )
    if configured is not None:
        return configured, ()
    if class_count == 1 or shown is Activation.SIGMOID:
        threshold = _DEFAULT_THRESHOLD if config.threshold is None else config.threshold
        said = (
            "has one output channel: its sigmoid is the probability of class 0, the only one, and a pixel is predicted "
            f"as it above {threshold:g}"
            if class_count == 1
            else f"ends in a sigmoid: classes may overlap, and a pixel is predicted as each that is above {threshold:g}"
        )
        return Activation.SIGMOID, (f"The network {said}; set threshold for another value.",)
    # Those of torchvision are known to exclude each other.
    if shown is Activation.SOFTMAX or not config.source.startswith(("python:", ONNX_PREFIX)):
        return Activation.SOFTMAX, ()
    exclusive = (
        f"The classes of the network's {class_count} output channels are taken to exclude each other (softmax); if "
        'they may overlap, set activation = "sigmoid".'
    )
    return Activation.SOFTMAX, (exclusive,)
