"""Which method to trust: every method on every image, each map measured on the served model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice, product
from os import PathLike
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeGuard

import numpy as np

from heatlens._calls.client import Client
from heatlens._calls.settings import UNSET, Timeout
from heatlens._evaluation.evaluation import Evaluation, Failure, MethodScores
from heatlens._evaluation.metrics import FLOOR
from heatlens._exceptions import (
    CallCancelledError,
    FailedPreconditionError,
    HeatlensError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from heatlens._results.images import ImageSource, is_file, load_image
from heatlens._results.results import ModelInfo, ModelState, Result
from heatlens._wire.arguments import checked_int
from heatlens._wire.names import METRICS
from heatlens._wire.requests import ALL, OPTIONS, ReferenceSource, metrics_of

_Scores = dict[str, float]

# Random-CAM differentiates nothing and its weights are random: these options do not apply to it.
_FLOOR_OPTIONS = {"target_score": None, "principal_component": False}
_NOTHING_FOUND = "NOTHING_FOUND"
# These end the evaluation; the client has retried already where that may help.
_FATAL = (
    CallCancelledError,
    FailedPreconditionError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)


def evaluate(
    client: Client,
    images: Iterable[ImageSource],
    *,
    model: str | None = None,
    version: str | None = None,
    methods: str | Sequence[str] | None = None,
    metrics: str | Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
    target_score: str | None = None,
    aggregation: str | None = None,
    augment: bool = False,
    principal_component: bool = False,
    top_k: int | None = None,
    reference: ReferenceSource | None = None,
    min_score: float | None = None,
    max_in_flight: int = 8,
    timeout: Timeout = UNSET,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure how faithful methods are: each explains each image, and each map is measured on the served model.

    Random-CAM is always among them where the model supports it: it is the floor that a method must beat. It explains no
    score and has no weighted components: `target_score` and `principal_component` are for the others. An image that
    fails with one method is left out for all of them, so that all are compared on the same images.

    Methods that refuse the options (CAM any `layers` but the default one, for instance) are left out, unless they are
    named; so is Random-CAM even then.

    Args:
        client: a client of the server; it stays open.
        images: as for `Client.explain`, at least one.
        model: name of a served model. None: the server's default.
        version: of the model. None: the default version.
        methods: their names; "all": every one that the model supports. None: those that take a single pass.
        metrics: their names, as in `heatlens.Faithfulness`, with hyphens. None, "all": all that the model's task has.
        layers: as for `Client.explain`; so are those that follow.
        target_score: what is explained about a class.
        aggregation: how the maps of several layers become one.
        augment: average over changed versions of each image.
        principal_component: project on the first principal component.
        top_k: explain the k most probable classes. An image's score is the mean over what is explained of it.
        reference: embedding models: what the images are compared with.
        min_score: detection: explain detections of at least this score.
        max_in_flight: the most calls at a time, so that the server has batches to run.
        timeout: seconds for each call, all retries included; None: no limit. Not given: the client's.
        on_progress: called in this thread with the number of answers so far and of all.

    Returns:
        The scores, which images failed, and which methods were left out.

    Raises:
        InvalidArgumentError: an argument is wrong, or an option does not suit the model, or a method that is named.
        NotFoundError: no model of that name.
        UnavailableError, FailedPreconditionError: the model is loading, or failed to load.
        UnimplementedError: the server is too old to measure.
        HeatlensError: any other failure that is no image's; see `heatlens.HeatlensError` and its subclasses.
    """
    sources = _sources(images)
    if metrics == ALL:
        metrics = None
    if metrics is not None:
        metrics = _each_once("metrics", metrics, METRICS)
    workers = checked_int("max_in_flight", max_in_flight, at_least=1, at_most=1024)
    models = client.models(timeout=timeout)
    served = _served(models, model, version)
    others = {one.name for one in models if one is not served}
    wanted = metrics_of(served.task) if metrics is None else tuple(metrics)
    chosen = _methods(methods, served)
    options: dict[str, Any] = {
        "model": served.name,
        # Else a version that takes a share of the images would be measured along with it.
        "version": served.version if version or served.name in others else None,
        "layers": layers,
        "target_score": target_score,
        "aggregation": aggregation,
        "augment": augment,
        "principal_component": principal_component,
        "top_k": top_k,
        "reference": reference,
        "min_score": min_score,
        "faithfulness": wanted,
        "map_type": "uint8",
        "timeout": timeout,
    }
    failures: dict[str, Failure] = {}
    refusals: dict[str, InvalidArgumentError] = {}
    versions: set[str] = set()

    def explain(name: str, source: ImageSource, method: str) -> _Scores:
        # Skip what is known to fail.
        if name in failures or method in refusals:
            return {}
        result = client.explain(source, method=method, **options | (_FLOOR_OPTIONS if method == FLOOR else {}))
        versions.add(result.model_version)
        return _scores(result, wanted)

    scores: dict[tuple[str, str], _Scores] = {}
    total = len(sources) * len(chosen)
    jobs = ((explain, name, source, method) for (name, source), method in product(sources.items(), chosen))
    for done, ((_, name, _, method), answer) in enumerate(_answers(jobs, workers), start=1):
        try:
            scores[method, name] = answer.result()
        except (HeatlensError, OSError) as error:
            if _is_refusal(error):
                refusals.setdefault(method, error)
                _check_refusals(refusals, chosen, named=methods not in (None, ALL))
            elif _is_fatal(error):
                raise
            else:
                failures.setdefault(name, Failure(image=name, method=method, error=error))
        if on_progress is not None:
            on_progress(done, total)
    kept = tuple(name for name in sources if name not in failures)
    return Evaluation(
        model=served.name,
        model_version=", ".join(sorted(versions)),
        metrics=wanted,
        images=kept,
        rows=tuple(
            _row(method, wanted, [scores[method, name] for name in kept]) for method in chosen if method not in refusals
        ),
        failures=tuple(failures.values()),
        left_out={method: refusals[method].message for method in chosen if method in refusals},
    )


def _sources(images: Iterable[ImageSource]) -> dict[str, ImageSource]:
    """Return the images by name: the path, or "image 3"."""
    single = isinstance(images, str | bytes | bytearray | memoryview | PathLike | np.ndarray) or is_file(images)
    if single or not isinstance(images, Iterable):
        raise InvalidArgumentError.of("images", f"expected a list of images, got {type(images).__name__}")
    found = {
        # Of a file the bytes: every method reads the image, in threads of their own.
        str(Path(image)) if isinstance(image, str | PathLike) else f"image {number}": (
            load_image(image, argument="images") if is_file(image) else image
        )
        for number, image in enumerate(images, start=1)
    }
    if not found:
        raise InvalidArgumentError.of("images", "expected at least one image")
    return found


def _methods(methods: str | Sequence[str] | None, served: ModelInfo) -> tuple[str, ...]:
    """Return the methods in the model's order, the floor last."""
    if methods is None:
        names = tuple(name for name in served.methods if name not in served.methods_in_steps)
    elif methods == ALL:
        names = served.methods
    else:
        names = _each_once("methods", methods, served.methods)
    with_floor = [name for name in names if name != FLOOR]
    return (*with_floor, FLOOR) if FLOOR in served.methods else tuple(with_floor)


def _each_once(argument: str, names: str | Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return the names in the order of those known.

    Raises:
        InvalidArgumentError: none, or one that is not known.
    """
    given = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else []
    known = tuple(known)
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        got = repr(unknown[0]) if unknown else repr(names)
        raise InvalidArgumentError.of(argument, f"expected some of {', '.join(known)}; got {got}")
    return tuple(name for name in known if name in given)


def _served(models: Sequence[ModelInfo], name: str | None, version: str | None) -> ModelInfo:
    """Return the model that is to be evaluated.

    Raises:
        NotFoundError: there is none of that name and version.
        UnavailableError: it is loading, or cannot answer for now.
        FailedPreconditionError: it failed to load.
    """
    default = next((model.name for model in models if model.is_default), "")
    for model in models:
        is_named = model.name == (name or default)
        if is_named and (model.is_default_version if version is None else model.version == version):
            if model.state is ModelState.FAILED:
                raise FailedPreconditionError(
                    f"the model {model.name!r} failed to load: {model.state_message}", reason="MODEL_FAILED"
                )
            if model.state is ModelState.UNAVAILABLE:
                raise UnavailableError(model.state_message)
            if model.state not in {ModelState.READY, ModelState.IDLE}:
                raise UnavailableError(f"the model {model.name!r} is loading", reason="MODEL_LOADING")
            return model
    available = ", ".join(dict.fromkeys(model.name for model in models))
    raise NotFoundError(
        f"the server has no model {name!r}; it has {available}",
        reason="MODEL_NOT_FOUND",
        metadata={"available": available},
    )


def _answers(
    jobs: Iterator[tuple[Any, ...]], max_in_flight: int
) -> Iterator[tuple[tuple[Any, ...], "Future[_Scores]"]]:
    """Run jobs, a function and its arguments each, in threads; yield each with its answer as they come.

    When this is given up or interrupted, it does not wait for running jobs: each ends with its call.
    """
    pool = ThreadPoolExecutor(max_in_flight, thread_name_prefix="evaluate")
    try:
        pending = {pool.submit(*job): job for job in islice(jobs, max_in_flight)}
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for answer in finished:
                yield pending.pop(answer), answer
                pending |= {pool.submit(*job): job for job in islice(jobs, 1)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _scores(result: Result, metrics: Sequence[str]) -> _Scores:
    """Return an image's score by metric: the mean over its explanations.

    Raises:
        FailedPreconditionError: nothing was explained.
        UnimplementedError: the server did not measure.
    """
    measured = [{} if item.faithfulness is None else item.faithfulness.by_metric() for item in result.explanations]
    if not measured:
        raise FailedPreconditionError("nothing to explain was found in it", reason=_NOTHING_FOUND)
    for metric in metrics:
        if not all(metric in one for one in measured):
            raise UnimplementedError(f"the server did not measure {metric}: it is too old", reason="NOT_MEASURED")
    return {metric: fmean(one[metric] for one in measured) for metric in metrics}


def _is_refusal(error: HeatlensError | OSError) -> TypeGuard[InvalidArgumentError]:
    """Return whether the server refuses the options, and not the image. It may refuse them with one method only."""
    # What was never sent has no request id.
    if not isinstance(error, InvalidArgumentError) or not error.field_violations or error.request_id is None:
        return False
    return all(violation.field.partition("[")[0] in OPTIONS for violation in error.field_violations)


def _check_refusals(refusals: Mapping[str, InvalidArgumentError], chosen: Sequence[str], *, named: bool) -> None:
    """Raise if a method that must not be left out refuses the options.

    Raises:
        InvalidArgumentError: the refusal of a method that is named, or one of them if every method but the floor
            refuses.
    """
    others = [method for method in chosen if method != FLOOR] or [FLOOR]
    refused = [method for method in others if method in refusals]
    if refused and (named or refused == others):
        error = refusals[refused[-1]]
        raise InvalidArgumentError(
            f"{refused[-1]}: {error.message}",
            reason=error.reason,
            metadata=error.metadata,
            request_id=error.request_id,
            field_violations=error.field_violations,
        ) from error


def _is_fatal(error: HeatlensError | OSError) -> bool:
    """Return whether every other call would fail in the same way: the error is not about this image."""
    if isinstance(error, InvalidArgumentError):
        return all(violation.field != "image" for violation in error.field_violations)
    return isinstance(error, _FATAL) and error.reason != _NOTHING_FOUND


def _row(method: str, metrics: Sequence[str], scores: Sequence[Mapping[str, float]]) -> MethodScores:
    """Return a method's scores, and what they come to over the images."""
    values = {metric: tuple(one[metric] for one in scores) for metric in metrics}
    return MethodScores(
        method=method,
        means={metric: fmean(of_images) if of_images else math.nan for metric, of_images in values.items()},
        standard_errors={
            metric: stdev(of_images) / math.sqrt(len(of_images)) if len(of_images) > 1 else math.nan
            for metric, of_images in values.items()
        },
        values=values,
    )
