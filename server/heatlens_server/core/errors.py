"""Every error that the server raises on purpose, as one tree. A transport maps it to its own statuses.

* HeatlensError
  * InvalidArgument       the request is wrong, whatever the state of the server; names the fields
  * Unauthenticated       the token is missing or wrong
  * ModelNotFound         there is no model of that name
    * VersionNotFound     there is one, and not in that version
  * ModelLoading          the model is not ready yet: try again
  * ModelFailed           the model could not be loaded
  * ModelUnloaded         the model was unloaded or replaced while the caller waited
  * ModelInterrupted      the model served, and cannot for now: it hangs, or its process has ended
  * ModelFilesChanged     the model answers, but what this request needs is read from a file that was overwritten
  * CompanionFailed       the model answers, but PyTorch, which this request needs, could not be loaded
  * ServerDraining        the server is shutting down: try another server
  * QueueFull             too many requests are waiting
  * StreamLimit           too many streams are open
  * BytesInFlight         requests or answers take all the memory that they may
  * PeerTooSlow           the request's message took too long to come
  * FrameDropped          a newer frame of its stream took its place
  * ImageMemoryFull       there is too little memory for an image now
  * DeadlineExpired       the caller's deadline passed before the model ran
  * DeviceOutOfMemory     the device has no memory for a single image
  * InternalError         a fault in the server; the log has the text, callers get a request id only

The messages of all but InternalError reach the client: they hold no paths, no tracebacks, nothing internal.
Clients see the message of a `ModelLoadError` in a `ModelFailed`; they never see a `ConfigError`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_SHOWN_CHARACTERS = 80
"""How much of a caller's text an error repeats."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request: its path as in the proto ("options.top_k") and what is wrong with it.

    The path is empty if the message as a whole is wrong.
    """

    field: str
    description: str


class HeatlensError(Exception):
    """Base of all errors that a client may see.

    Attributes:
        reason: UPPER_SNAKE_CASE and stable: programs switch on it.
        metadata: the variable parts of the message, for programs.
        retry_after_s: in how many seconds to try again; None if retrying does not help.
    """

    reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        """From process to process an error is its attributes: constructors differ."""
        return _unpickled, (type(self), self.args, self.__dict__)


def _unpickled(kind: type[HeatlensError], args: tuple[object, ...], state: dict[str, object]) -> HeatlensError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class InvalidArgument(HeatlensError):
    """The request is wrong. Reasons: IMAGE_UNDECODABLE, IMAGE_TOO_COMPLEX, TENSOR_SIZE_MISMATCH, INVALID_OPTION, ..."""

    reason = "INVALID_REQUEST"

    def __init__(
        self,
        violations: Sequence[FieldViolation],
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        message = "; ".join(
            f"{wrong.field}: {wrong.description}" if wrong.field else wrong.description for wrong in violations
        )
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations = tuple(violations)

    @classmethod
    def of(cls, field: str, description: str, *, reason: str, **metadata: object) -> "InvalidArgument":
        """Make the error for a single wrong field."""
        return cls(
            [FieldViolation(field, description)],
            reason=reason,
            metadata={key: str(value) for key, value in metadata.items()},
        )

    def within(self, path: Callable[[str], str]) -> "InvalidArgument":
        """Return the same error, about a part of a larger message.

        Args:
            path: takes a field's path in the part, and returns its path in the larger message.
        """
        return InvalidArgument(
            [FieldViolation(path(wrong.field), wrong.description) for wrong in self.violations],
            reason=self.reason,
            metadata=self.metadata,
        )


class Unauthenticated(HeatlensError):
    """The bearer token is missing or wrong."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(HeatlensError):
    """The call is for administrators."""

    reason = "ADMIN_REQUIRED"


class ModelChangeRefused(HeatlensError):
    """A model cannot be loaded, unloaded or replaced as things are. Reasons: MODEL_CHANGE_REFUSED, CONFIG_INVALID."""

    reason = "MODEL_CHANGE_REFUSED"


class ModelNotFound(HeatlensError):
    """No model of that name is configured, or not in that version. Reasons: MODEL_NOT_FOUND, VERSION_NOT_FOUND."""

    reason = "MODEL_NOT_FOUND"

    def __init__(self, name: str, available: Sequence[str]) -> None:
        available = list(dict.fromkeys(available))
        name = name[:_SHOWN_CHARACTERS]
        super().__init__(
            f"there is no model {name!r}; this server has: {', '.join(available) or 'none'}",
            metadata={"model": name, "available": ",".join(available)},
        )
        self.name = name


class VersionNotFound(ModelNotFound):
    """There is a model of that name, and not in that version."""

    reason = "VERSION_NOT_FOUND"

    def __init__(self, name: str, version: str, available: Sequence[str]) -> None:
        super().__init__(name, available)
        version = version[:_SHOWN_CHARACTERS]
        self.message = f"there is no version {version!r} of the model {name!r}; this server has: {', '.join(available)}"
        self.args = (self.message,)
        self.metadata["version"] = version


class ModelLoading(HeatlensError):
    """The model is being loaded or warmed up."""

    reason = "MODEL_LOADING"


class ModelFailed(HeatlensError):
    """The model could not be loaded."""

    reason = "MODEL_FAILED"

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"model {name!r} could not be loaded: {why}", metadata={"model": name})
        self.name = name


class ModelUnloaded(HeatlensError):
    """The model was unloaded or replaced while a call waited for it or a stream used it.

    Reasons: MODEL_UNLOADED, MODEL_REPLACED.
    """

    reason = "MODEL_UNLOADED"

    def __init__(self, name: str, what: str, *, reason: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(f"model {name!r} {what}", reason=reason, metadata={"model": name}, retry_after_s=retry_after_s)
        self.name = name

    @classmethod
    def by_another(cls, name: str) -> "ModelUnloaded":
        """The error of what used a model that was replaced, and may have the new one at once."""
        return cls(name, "was replaced; the new one answers", reason="MODEL_REPLACED", retry_after_s=0.0)


class ModelInterrupted(HeatlensError):
    """The model served, and cannot for now. Reasons: MODEL_HUNG, MODEL_CRASHED, DEVICES_FAILED."""

    reason = "MODEL_HUNG"

    def __init__(self, name: str, what: str, *, reason: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(f"model {name!r} {what}", reason=reason, metadata={"model": name}, retry_after_s=retry_after_s)
        self.name = name


class ModelFilesChanged(HeatlensError):
    """The model answers other requests, but a file that this one needs first was overwritten since it was loaded."""

    reason = "MODEL_FILES_CHANGED"

    def __init__(self, file: str) -> None:
        super().__init__(f"{file} is not the file that was there when the model was loaded; reload the model")


class CompanionFailed(HeatlensError):
    """The model answers other requests, but PyTorch, which this one needs, could not be loaded."""

    reason = "COMPANION_FAILED"

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"model {name!r} is run by an exported graph, and torch, which this request needs beside it, could not be "
            f"loaded: {why}",
            metadata={"model": name},
        )
        self.name = name


class ServerDraining(HeatlensError):
    """The server is shutting down."""

    reason = "SERVER_DRAINING"

    def __init__(self, message: str = "the server is shutting down", *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class QueueFull(HeatlensError):
    """Too many requests are waiting for this model."""

    reason = "QUEUE_FULL"


class StreamLimit(HeatlensError):
    """Too many streams are open."""

    reason = "STREAM_LIMIT"


class BytesInFlight(HeatlensError):
    """The requests or answers in flight, of the caller's connection or of all, hold as many bytes as they may."""

    reason = "BYTES_IN_FLIGHT"


class PeerTooSlow(HeatlensError):
    """The request's message took too long to come, or others needed the room that was kept for it."""

    reason = "MESSAGE_TOO_SLOW"


class FrameDropped(HeatlensError):
    """A newer frame of the same stream took its place (OVERFLOW_POLICY_DROP_OLDEST)."""

    reason = "FRAME_DROPPED"


class ImageMemoryFull(HeatlensError):
    """There is too little memory to decode an image beside those that are being decoded."""

    reason = "IMAGE_MEMORY_FULL"


class DeadlineExpired(HeatlensError):
    """The caller's deadline passed before the model ran, or, of an explanation in steps, before its last run."""

    reason = "DEADLINE_EXPIRED"


class DeviceOutOfMemory(HeatlensError):
    """The device ran out of memory on a single image."""

    reason = "DEVICE_OUT_OF_MEMORY"


class InternalError(HeatlensError):
    """A fault in the server. Its message is logged and never sent."""

    reason = "INTERNAL"


class ConfigError(Exception):
    """The configuration is wrong. The message names the key."""


class ModelLoadError(Exception):
    """A model cannot be loaded. Clients see the message: it names no path of this machine."""


class ExportError(Exception):
    """A model cannot be turned into a static graph. The message names no path of this machine."""
