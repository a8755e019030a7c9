"""What happens around every call, whatever the transport: request id, token, the count of calls, and the call's end."""

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from heatlens_server.api.admission import Admission
from heatlens_server.api.byte_budget import Held
from heatlens_server.core.errors import HeatlensError, InternalError, PermissionDenied, ServerDraining, Unauthenticated
from heatlens_server.core.events import CallEnd, Observer, Trace

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Call:
    """One call that is being handled.

    Attributes:
        method: what is called, as the transport names it.
        request_id: the caller's, or a random one.
        peer: the caller's address.
        answer: what the call's answer, or a stream's present one, holds of the budget for answers; None: nobody counts.
        fields: what the handler adds to what observers are told.
        trace: what observers keep of it.
        started_at: on `time.perf_counter`, in seconds.
    """

    method: str
    request_id: str
    peer: str
    answer: Held | None = None
    fields: dict[str, object] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    started_at: float = field(default_factory=time.perf_counter)


_current: ContextVar[Call] = ContextVar("heatlens_call")


def current_call() -> Call:
    """The call that this task handles; outside of calls an empty one."""
    return _current.get(None) or Call(method="", request_id="", peer="")


def is_fault(error: BaseException) -> bool:
    """Whether an exception is a fault of ours: it is logged with its traceback, and callers get a request id only."""
    return not isinstance(error, HeatlensError) or isinstance(error, InternalError)


@dataclass(frozen=True, slots=True)
class Administrators:
    """Who may change models.

    Attributes:
        token: what they send as bearer token; None: none has one.
        client_names: of certificates that need no token.
    """

    token: str | None = field(default=None, repr=False)
    client_names: frozenset[str] = frozenset()


class CallGate:
    """Lets calls in while the server serves, and tells the observer how each ended. Belongs to the event loop.

    Attributes:
        admission: what calls hold.
    """

    def __init__(
        self,
        observer: Observer,
        *,
        token: str | None = None,
        admission: Admission | None = None,
        administrators: Administrators | None = None,
    ) -> None:
        """Make an open gate.

        Args:
            observer: is told of the end of every call.
            token: what callers must send; None lets everybody in.
            admission: see the attribute; None: without limits.
            administrators: who may make calls that change models; None: nobody.
        """
        self._observer = observer
        self.admission = admission or Admission()
        self._token = None if token is None else token.encode()
        self._administrators = administrators
        self._in_flight = 0
        self._ended = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self, method: str, *, peer: str, request_id: object, headers: Mapping[str, object] | None = None) -> Call:
        """A call has come: from now on this task, and the tasks that it starts, handle it. `end` must follow.

        Args:
            method: what is called, as the transport names it.
            peer: the caller's address.
            request_id: what the caller sent for one. Anything but 1 to 64 of A-Z a-z 0-9 . _ - is replaced.
            headers: what the caller sent beside its message, for observers.
        """
        known = isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id)
        call = Call(method, str(request_id) if known else uuid.uuid4().hex, peer, self.admission.answers.hold(peer))
        _current.set(call)
        self._observer.call_began(method=method, request_id=call.request_id, headers=headers or {}, trace=call.trace)
        return call

    def end(self, call: Call, code: str, *, error: Exception | None = None) -> None:
        """A call is over, and its answer taken.

        Args:
            call: from `begin`.
            code: the status in the transport's terms; "OK" if the call ended well.
            error: what it failed with; None if it did not, or was cancelled.
        """
        if call.answer is not None:
            call.answer.release()
        end = CallEnd(
            method=call.method,
            request_id=call.request_id,
            peer=call.peer,
            code=code,
            duration_s=time.perf_counter() - call.started_at,
            fields=call.fields,
            error=error,
            is_fault=error is not None and is_fault(error),
            trace=call.trace,
        )
        if code == "OK":
            self._observer.answered(end)
        else:
            self._observer.refused(end)

    @contextmanager
    def admit(
        self, authorization: object, *, changes_models: bool = False, client_names: Iterable[str] = ()
    ) -> Iterator[None]:
        """Count a call in, until the end of the block.

        Args:
            authorization: what the caller sent as such: "Bearer <token>".
            changes_models: whether the call is for administrators.
            client_names: those of the caller's certificate.

        Raises:
            Unauthenticated: a token is required, and this is another.
            PermissionDenied: the call is for administrators, and this is none.
            ServerDraining: the gate is closed.
        """
        if changes_models:
            self._check_administrator(str(authorization), client_names)
        else:
            self._authenticate(str(authorization))
        if self._draining:
            raise ServerDraining
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            self._ended += 1
            if self._in_flight == 0:
                self._idle.set()

    @property
    def in_flight(self) -> int:
        """How many calls are being answered."""
        return self._in_flight

    def work(self) -> int | None:
        """How many calls have ended so far; None while some are in flight."""
        return None if self._in_flight else self._ended

    async def close(self, timeout_s: float, *, hurry: asyncio.Event | None = None) -> bool:
        """Refuse new calls from now on, and wait for those in flight.

        Args:
            timeout_s: how long to wait, in seconds.
            hurry: ends the wait when it is set.

        Returns:
            False if some are still in flight then.
        """
        self._draining = True
        waits = [asyncio.create_task(event.wait()) for event in (self._idle, hurry) if event is not None]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self._idle.is_set()

    def _check_administrator(self, authorization: str, client_names: Iterable[str]) -> None:
        known = self._administrators
        if known is None:
            raise PermissionDenied("models are changed by the server's operator alone: admin.enabled is not set")
        has_token = known.token is not None and _is_token(authorization, known.token.encode())
        if not has_token and known.client_names.isdisjoint(client_names):
            raise PermissionDenied("only administrators change models: send their token, or their certificate")

    def _authenticate(self, authorization: str) -> None:
        if self._token is not None and not _is_token(authorization, self._token):
            sent = "this is not the server's token" if authorization else "the server wants a token"
            raise Unauthenticated(f"{sent}: send it as metadata `authorization: Bearer <token>`")


def _is_token(authorization: str, token: bytes) -> bool:
    scheme, _, sent = authorization.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.encode(), token)
