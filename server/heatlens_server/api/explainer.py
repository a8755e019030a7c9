"""Explains images with the models of a server, for every transport: one image here, frames by `api.stream`."""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from heatlens_server.api.admission import Admission
from heatlens_server.api.answer import Answer, answer_of, check_answer_size
from heatlens_server.api.calls import current_call
from heatlens_server.api.checks import (
    InspectedImage,
    Limits,
    SourceImage,
    fit_image,
    inspected,
    large_image,
)
from heatlens_server.api.models import known_name
from heatlens_server.api.plan import Plan, plan_query
from heatlens_server.api.query import Query
from heatlens_server.core.events import Observer, Trace
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.served_model import ModelState, ServedModel
from heatlens_server.fleet.versions import point_of
from heatlens_server.scheduling.entry import LargeImage, QueueResult, Source
from heatlens_server.scheduling.ticket import Ticket

T = TypeVar("T")

_COPIES = 3
"""How often an answer is in memory at a time: as arrays, as a message, and as bytes, twice, when those are gone."""


def _owner(peer: str) -> str:
    """Who takes turns with others. Peers on a unix socket have one name, and are not told apart."""
    return "" if peer.startswith("unix") else peer


def _point(query: Query) -> float:
    """Equal images get equal versions, however often they are sent."""
    return point_of(b"" if query.image is None else query.image.data)


class Explainer:
    """Explains images. Belongs to the event loop.

    Attributes:
        fleet: the models.
        limits: what queries and answers are checked against.
        observer: is told of images that are explained, and of frames.
        admission: what frames of streams hold.
    """

    def __init__(self, fleet: Fleet, limits: Limits, observer: Observer, admission: Admission | None = None) -> None:
        """Explain with the models of `fleet`, within `limits`."""
        self.fleet = fleet
        self.limits = limits
        self.observer = observer
        self.admission = admission or Admission()

    def refuse_if_full(self, peer: str) -> None:
        """Refuse a call before it is known which model it is for, if every model would refuse it.

        Args:
            peer: the caller's address.

        Raises:
            QueueFull: they would.
        """
        full = None
        for status in self.fleet:
            if status.state is not ModelState.READY or status.served is None:
                return
            full = status.served.queue.refusal(_owner(peer))
            if full is None:
                return
        if full is not None:
            raise full

    async def explain(
        self,
        query: Query,
        encode: Callable[[Answer], T],
        *,
        timeout_s: float | None,
        turn: Callable[[], Awaitable[object]] | None = None,
        trace: Trace | None = None,
    ) -> T:
        """Explain one image.

        Args:
            query: what is asked for.
            encode: makes the transport's message of the answer; called where the answer is made, see `answer`.
            timeout_s: how long the caller will wait; the model is not run after that. None: for ever.
            turn: awaited before the answer is made; None: nobody is before it.
            trace: that of the frame; None: of the call.

        Raises:
            HeatlensError: a field is wrong, the model is not ready, or whatever `Ticket.result` raises.
        """
        call = current_call()
        told, trace = call.fields, trace or call.trace
        told["model"] = known_name(self.fleet, query.model)
        asked = (query.model, query.model_version, functools.cache(functools.partial(_point, query)))
        await self.fleet.idle.awake(*asked)
        with self.fleet.use(*asked) as model:
            told["model_version"] = model.version
            plan, image = plan_query(query, model, self.limits)
            told["explanation"] = str(plan.method)
            await model.queue.load_for(plan.spec)
            ticket = self.submit(image, plan, model, timeout_s=timeout_s, trace=trace)
            done = await ticket.result()
            told.update(done.timing.told())
            if turn is not None:
                await turn()
            return await self.answer(done, plan, model, encode, trace=trace)

    def submit(
        self,
        image: SourceImage,
        plan: Plan,
        model: ServedModel,
        *,
        timeout_s: float | None,
        trace: Trace,
        source: Source | None = None,
    ) -> Ticket:
        """Send an image on its way, by the connection of the present call; what its plan needs must be loaded.

        Arguments, errors: as `ModelQueue.submit`.
        """
        return model.queue.submit(
            lambda: self._decode(image, plan, model),
            plan.target,
            plan.spec,
            timeout_s=timeout_s,
            source=source,
            peer=_owner(current_call().peer),
            finish_target=plan.finish_target,
            trace=trace,
        )

    async def answer(
        self,
        done: QueueResult,
        plan: Plan,
        model: ServedModel,
        encode: Callable[[Answer], T],
        *,
        trace: Trace | None,
        revise: Callable[[QueueResult], QueueResult] | None = None,
    ) -> T:
        """Make the answer, on another thread if that takes long: if maps are placed on the source image.

        Args:
            done: what the queue gave.
            plan: how the image was explained.
            model: that explained it.
            encode: makes the transport's message of the answer, on the same thread.
            trace: that of the call or frame.
            revise: changes the result before, on the same thread.

        Raises:
            InvalidArgument: more boxes were found than an answer holds.
            BytesInFlight: there is no room for the answer.
        """
        size_bytes = check_answer_size(plan, done.image, self.limits, map_count=len(done.result.class_ids))
        held = current_call().answer
        if held is not None:
            await held.room(_COPIES * size_bytes)

        encode_s = 0.0

        def make() -> T:
            nonlocal encode_s
            started_at = time.monotonic()
            made = encode(answer_of(done if revise is None else revise(done), plan, model))
            encode_s = time.monotonic() - started_at
            return made

        # Not the decoders' threads: a finished answer does not queue behind images that are yet to be decoded.
        made = await asyncio.to_thread(make) if plan.place_on_source else make()
        self.observer.explained(
            model=model.name,
            explanation=plan.method,
            queue_s=done.timing.queue_s,
            compute_s=done.timing.compute_s,
            encode_s=encode_s,
            began_at=done.timing.began_at,
            ended_at=done.timing.ended_at,
            trace=trace,
        )
        return made

    def _decode(self, image: SourceImage, plan: Plan, model: ServedModel) -> FittedImage | LargeImage:
        """Decode and fit, or find that this takes long; runs on a decoder thread."""
        source = inspected(image, model.preprocess, self.limits)
        sources = [source]
        if plan.reference is not None and (reference := plan.reference.inspected()) is not None:
            sources.append(reference)
        fit = functools.partial(self._fit, source, plan, model)
        return large_image(sources, fit) or fit()

    def _fit(self, image: InspectedImage, plan: Plan, model: ServedModel) -> FittedImage:
        fitted = fit_image(image, model.preprocess, self.limits)
        # Boxes are counted once they are found.
        least = 1 if plan.counts_boxes else plan.target_count
        check_answer_size(plan, fitted, self.limits, map_count=least)
        return fitted
