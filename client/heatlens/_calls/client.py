# Generated from heatlens/_calls/async_client.py by client/unasync.py; do not edit.
"""The client for threads."""

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self, Unpack

from heatlens._calls.connection import Connection
from heatlens._calls.settings import DEFAULT_MAX_MESSAGE_BYTES, TLS, UNSET, Retry, Timeout, make_settings
from heatlens._exceptions import NotFoundError
from heatlens._results.images import ImageSource, may_block
from heatlens._results.results import Health, ModelInfo, Result, ServerInfo
from heatlens._stream.calls import run
from heatlens._stream.link import Link
from heatlens._stream.stream import Stream
from heatlens._wire import answers
from heatlens._wire.requests import (
    ALL,
    ExplainOptions,
    explain_request,
    health_request,
    keep_metrics_of,
    model_name,
    version_name,
)
from heatlens._wire.status import unknown_model
from heatlens._wire.streams import StreamOptions, stream_plan
from heatlens.v1 import model_pb2


class Client:
    """Asks a heatlens server why its models say what they say. Thread-safe; create it after forking, not before.

    The first call makes the connection; all calls share it, and it restores itself.
    Use the client as a context manager, or call `close`.

    Args:
        address: "host:port", or a gRPC target: "dns:///models.example:50051" spreads calls over all its addresses.
            A list of "host:port": calls are spread over these servers, but not to those that are not ready, and not for
            a while to those whose calls fail. Their names are resolved once.
        timeout: seconds for a call that names none, all retries included; None: no limit.
        token: bearer token. Never sent in plaintext, except to this machine.
        tls: TLS settings; True: the default ones; False: plaintext. None: encrypt if a token goes to another machine.
        retry: when calls are tried again.
        wait_for_ready: whether calls wait, within their timeout, for a server that is not there yet.
        max_message_bytes: largest request and answer.
        model_key: a key of gRPC metadata, under which calls that name a model carry its name for proxies that go by it:
            "multiplexed_model_id" or "application" for Ray's. None: none.

    Raises:
        InvalidArgumentError: an argument is wrong, or a token would travel in plaintext to another machine.
        FileNotFoundError: a certificate file does not exist.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "localhost:50051",
        *,
        timeout: float | None = 30.0,
        token: str | None = None,
        tls: TLS | bool | None = None,
        retry: Retry = Retry(),  # noqa: B008 - frozen
        wait_for_ready: bool = False,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        model_key: str | None = None,
    ) -> None:
        self._settings = make_settings(
            address,
            timeout=timeout,
            token=token,
            tls=tls,
            retry=retry,
            wait_for_ready=wait_for_ready,
            max_message_bytes=max_message_bytes,
            model_key=model_key,
        )
        self._connection = Connection(self._settings)

    def __repr__(self) -> str:
        return self._settings.describe(type(self).__name__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls still open in other threads fail with CallCancelledError. Idempotent."""
        self._connection.close()

    def explain(
        self,
        image: ImageSource,
        *,
        model: str | None = None,
        version: str | None = None,
        timeout: Timeout = UNSET,
        **options: Unpack[ExplainOptions],
    ) -> Result:
        """Explain one image: which of its pixels made the model give a class its score.

        Args:
            image: a path, the bytes of an image file, a file opened in binary mode, a PIL image, or an array of pixels
                (height, width, channels) or (height, width): uint8, uint16 or floats in [0, 1]; of any values if the
                model has a window.
            model: name of a served model. None: the server's default.
            version: of the model. None: the server chooses, the same for equal images; `Result.model_version` tells.
            top_k: explain the k most probable classes, k >= 1. Not with `class_ids`. Neither: the most probable one.
            class_ids: explain this class or these classes, by id or label, in this order, but ids before labels.
            method: how the map is made: "grad-cam", "layer-cam", ... None: the model's default.
            layers: the layer or layers to explain. None: the model's default.
            map_size: "layer" (default): the layer's own resolution. "input": enlarged to the model's input, then
                min-max. "source": the map of "input", placed on the whole source image. `Heatmap.on` and `overlay`
                place maps of the first two; a layer's map placed so has fewer bytes and slightly other values.
            map_type: "float32" (default), "float16" or "uint8" on the wire; `Heatmap.values` is always float32.
            top_predictions: how many of the most probable classes to return in `predictions`. None: none.
            target_score: what is explained about a class: its "logit" (default), "probability" or "log-probability", or
                its "contrast" to the classes that look like it.
            aggregation: how the maps of several layers become one: "mean" (default), "max" or "product".
            augment: average the maps of the image and its mirror image, each darker and brighter.
            principal_component: project weighted activations on their first principal component, do not sum them.
            direction: regression: what is explained about a value: its "increase" (default) or "decrease".
            faithfulness: measure how faithful each map is: True for deletion and insertion, or "road-combined",
                "sparseness", ..., or a list of them: see `heatlens.Faithfulness`; "all": those that the model's task
                has, for which the server is asked about the model first. Costs many runs of the model.
            mask: segmentation: explain these pixels, not those predicted as the class: bools or integers (height,
                width) of the upright source image, or an image file; what is not 0 counts.
            reference: embedding models, required there: what the image is compared with: an embedding, such as
                `Result.embedding`, or another image.
            min_score: detection: explain detections of at least this score, in [0, 1]. None: 0.5.
            return_mask: segmentation: return the predicted mask.
            timeout: seconds for this call, all retries included; None: no limit. Not given: the client's.

        Returns:
            The maps, scores and timing.

        Raises:
            InvalidArgumentError: an argument is wrong; found before the call where possible.
            FileNotFoundError: there is no such file (another OSError if it cannot be read).
            NotFoundError: no model of that name and version.
            UnavailableError, ResourceExhaustedError: still failing after all retries.
            DeadlineExceededError: no answer within the timeout.
            HeatlensError: any other failure; see `heatlens.HeatlensError` and its subclasses.
        """
        build = partial(explain_request, image, "Client.explain", model=model, version=version, **options)
        sources = (image, options.get("mask"), options.get("reference"))
        request = run(build, blocks=any(may_block(one) for one in sources))
        if isinstance(metrics := options.get("faithfulness"), str) and metrics == ALL:
            keep_metrics_of(self.models(timeout=timeout), request)
        response = self._connection.call(self._connection.stubs.explain.Explain, request, timeout)
        return answers.result_of(response, placed=options.get("map_size") == "source")

    def stream(
        self, *, model: str | None = None, version: str | None = None, **options: Unpack[StreamOptions]
    ) -> Stream:
        """Explain the frames of a video, in order. See `heatlens.Stream`.

        The stream opens with its `with` statement or first use, within the client's timeout, and raises then what
        is wrong with its configuration. From there on it has no time limit. Opening is not tried again by itself: a
        model that is loading (UnavailableError) and too many streams (ResourceExhaustedError) raise at once, with
        `retry_after_s`.

        Args:
            model: name of a served model. None: the server's default.
            version: of the model. None: the server chooses, for the whole stream; `model_version` tells.
            max_in_flight: the window: most unanswered frames. None: the server's choice; it may grant less.
            overflow: when frames come faster than they are explained: "block": wait, none is lost; "drop-oldest":
                drop the oldest that wait, answers stay fresh.
            every: explain the first of so many frames, of those that reach the server, and answer the others
                `skipped`. A frame that the client itself refuses or drops does not count.
            max_fps: explain at most so many frames per second, by capture time, and answer the others `skipped`.
            smooth: weight of the past in the moving average of a class's maps, in [0, 1); 0: none.
            frame_timeout: seconds that a frame may wait in the server; after that it fails. None: no limit.
            on_replace: when the model is replaced: "finish": go on with the one that the stream began with, as long as
                the server keeps it; "end": end with UnavailableError, reason MODEL_REPLACED.
            resume: when the server drains, is gone or gives up a frame (UnavailableError), the stream goes on by
                another call, to another server where the address has several, with the frames that have no answer. It
                gives up once no frame was answered for the client's timeout. What it sent is kept until it is answered.
                `smooth` and the count of `max_fps` begin anew then.
            jpeg_quality: 1 to 100: pixels travel as JPEG of this quality. None: as they are. Files do in any case.
            top_k: explain the k most probable classes of each frame, as for `explain`; so are all that follow.
            class_ids: explain this class or these classes, by id or label.
            method: how the map is made.
            layers: the layer or layers to explain.
            map_size: "layer", "input" or "source".
            map_type: "float32", "float16" or "uint8" on the wire.
            top_predictions: how many of the most probable classes to return in `predictions`.
            target_score: what is explained about a class.
            aggregation: how the maps of several layers become one.
            augment: average over changed versions of each frame.
            principal_component: project on the first principal component.
            direction: regression: explain the "increase" (default) or the "decrease" of a value.

        Raises:
            InvalidArgumentError: an argument is wrong.
        """
        limit = self._settings.max_message_bytes
        plan = stream_plan("Client.stream", model=model, version=version, max_message_bytes=limit, **options)
        start = partial(self._connection.start_stream, model=plan.config.model)
        return Stream(Link(start, plan, timeout_s=self._settings.timeout))

    def models(self, *, timeout: Timeout = UNSET) -> tuple[ModelInfo, ...]:
        """List the served models, whatever their state. Raises HeatlensError if the call fails."""
        request = model_pb2.ListModelsRequest()
        return answers.models_of(self._connection.call(self._connection.stubs.models.ListModels, request, timeout))

    def server_info(self, *, timeout: Timeout = UNSET) -> ServerInfo:
        """Return the server's version and limits. Raises HeatlensError if the call fails."""
        request = model_pb2.GetServerInfoRequest()
        return answers.server_info_of(
            self._connection.call(self._connection.stubs.models.GetServerInfo, request, timeout)
        )

    def load_model(self, name: str, *, version: str | None = None, timeout: Timeout = UNSET) -> None:
        """Load a model of the server's configuration that is not loaded, or has failed; for administrators.

        Args:
            name: of the model.
            version: of the model; None: the only one.
            timeout: seconds until it is ready; when they have passed the server goes on loading it.

        Raises:
            PermissionDeniedError: the client's token and certificate are no administrator's.
            NotFoundError: the configuration has no such model.
            FailedPreconditionError: the model is loaded already, cannot be loaded, or the configuration is wrong; or
                there are several versions, and none is named.
            HeatlensError: any other failure.
        """
        request = model_pb2.LoadModelRequest(name=model_name(name), version=version_name(version))
        self._connection.call(self._connection.stubs.models.LoadModel, request, timeout)

    def reload_model(self, name: str, *, version: str | None = None, timeout: Timeout = UNSET) -> None:
        """Load a model again, as the configuration and its files are by now, beside the one that serves.

        Arguments and errors are those of `load_model`; if the new one cannot be loaded, the old one goes on.
        """
        request = model_pb2.ReloadModelRequest(name=model_name(name), version=version_name(version))
        self._connection.call(self._connection.stubs.models.ReloadModel, request, timeout)

    def unload_model(self, name: str, *, version: str | None = None, timeout: Timeout = UNSET) -> None:
        """Take a model out of the server, once its running calls are finished; for administrators.

        Arguments are those of `load_model`.

        Raises:
            PermissionDeniedError: the client's token and certificate are no administrator's.
            NotFoundError: the server has no such model.
            HeatlensError: any other failure.
        """
        request = model_pb2.UnloadModelRequest(name=model_name(name), version=version_name(version))
        self._connection.call(self._connection.stubs.models.UnloadModel, request, timeout)

    def health(self, model: str | None = None, *, timeout: Timeout = UNSET) -> Health:
        """Return whether the server, or one model, serves. Never retried: it says how things are now.

        Raises:
            NotFoundError: no model of that name.
            UnavailableError: no server answers.
            HeatlensError: any other failure.
        """
        request = health_request(model)
        try:
            return answers.health_of(self._connection.call(self._connection.stubs.health.Check, request, timeout))
        except NotFoundError as error:
            raise unknown_model(error, model) from None
