"""Networks without a classifier, as timm and torchvision make them: what they return are features, not logits."""

from typing import Any

from torch import nn

from heatlens_server.core.tasks import Task

_LIBRARIES = ("timm.", "torchvision.")

# What these libraries call the last part of a network.
_HEADS = ("fc", "head", "heads", "classifier")

# The projections of timm's CLIP towers have 384 to 1280 elements; 1000 are the classes of those that were fine-tuned.
_PROJECTIONS = range(256, 2049)
_IMAGENET_CLASSES = 1000


def features_of(module: nn.Module) -> str:
    """What a network of timm's or torchvision's returns in place of classes; empty if it has a classifier."""
    if not type(module).__module__.startswith(_LIBRARIES):
        return ""
    heads = [getattr(module, name, None) for name in _HEADS]
    is_cut = any(isinstance(head, nn.Identity) for head in heads) and not any(_has_weights(head) for head in heads)
    if is_cut or getattr(module, "num_classes", None) == 0:
        return "features"
    return "CLIP's projection of its features" if has_projection(module) else ""


def task_of(module: nn.Module, task: Task | None) -> tuple[Task, tuple[str, ...]]:
    """The configured task, or what a network of one score per class is for; and what was assumed."""
    if task is not None:
        return task, ()
    features = features_of(module)
    if not features:
        return Task.CLASSIFICATION, ()
    assumption = f'The network returns {features}: it is taken as task = "embedding"; set task if it is another.'
    return Task.EMBEDDING, (assumption,)


def has_projection(module: nn.Module) -> bool:
    """Whether the last layer of a network of timm's makes the embedding that CLIP compares with a text's."""
    configuration: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    width = getattr(module, "num_classes", None)
    if not width:
        return False
    own = configuration.get("num_classes")
    if "clip" not in f"{configuration.get('architecture')}.{configuration.get('tag')}":
        # A classifier of its own classes, of somebody's hub, says their number as a tower says its projection's width.
        return False
    # A file may be of another of the architecture's weights than the network was made for.
    return width in {own, projection_width(str(configuration.get("architecture")))} and _is_projection(int(width))


def projection_width(architecture: str) -> int | None:
    """The number of elements that weights of an architecture of timm's project to; None if none of them do."""
    from timm.models import get_pretrained_cfg, list_pretrained  # noqa: PLC0415 - takes seconds

    for name in list_pretrained(f"{architecture}.*"):
        configuration = get_pretrained_cfg(name)
        if configuration is not None and _is_projection(configuration.num_classes):
            return int(configuration.num_classes)
    return None


def _is_projection(width: int) -> bool:
    return width in _PROJECTIONS and width != _IMAGENET_CLASSES


def _has_weights(head: object) -> bool:
    return isinstance(head, nn.Module) and next(head.parameters(), None) is not None
