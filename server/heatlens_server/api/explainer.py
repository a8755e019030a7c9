"""The two ends of an explanation, the same for one image and for a frame: before the model, and after it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.images import SourceImage, fit_image
from heatlens_server.api.limits import Limits
from heatlens_server.api.plan import ExplainPlan
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.entry import QueueResult, Source
from heatlens_server.scheduling.ticket import Ticket
from heatlens_server.transports.grpc.encode import check_answer_size, encode


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explains images with one model in one way.

    Attributes:
        model: the model.
        plan: how to explain.
        limits: what images and answers are checked against.
    """

    model: ServedModel
    plan: ExplainPlan
    limits: Limits

    async def ensure(self) -> None:
        """Have all loaded that the plan needs; to be awaited before `submit`. Errors: as `ModelQueue.ensure`."""
        await self.model.queue.ensure(self.plan.spec)

    def submit(self, image: SourceImage, *, timeout_s: float | None, source: Source | None = None) -> Ticket:
        """Send an image on its way. Arguments and errors are those of `ModelQueue.submit`."""
        return self.model.queue.submit(
            lambda: self._prepare(image),
            self.plan.target,
            self.plan.spec,
            timeout_s=timeout_s,
            source=source,
            complete=self.plan.complete,
        )

    async def answer(
        self, explained: QueueResult, *, revise: Callable[[QueueResult], QueueResult] | None = None
    ) -> pb.ExplainResponse:
        """Build the answer.

        Args:
            explained: what the model said.
            revise: changes it first; called where the answer is built, which may be another thread.
        """
        if self.plan.place_on_source:
            # Not the preparers' threads: a finished answer does not queue behind images that are yet to be decoded.
            return await asyncio.to_thread(self._encode, explained, revise)
        return self._encode(explained, revise)

    def _prepare(self, image: SourceImage) -> FittedImage:
        """Decode and fit; runs on a preparer thread."""
        fitted = fit_image(image, self.model.preprocess, self.limits)
        # Boxes are counted once they are found.
        least = 1 if self.plan.counts_boxes else self.plan.target_count
        check_answer_size(self.plan, fitted, self.limits, map_count=least)
        return fitted

    def _encode(
        self, explained: QueueResult, revise: Callable[[QueueResult], QueueResult] | None
    ) -> pb.ExplainResponse:
        if self.plan.counts_boxes:
            found = len(explained.result.class_ids)
            check_answer_size(self.plan, explained.image, self.limits, map_count=found)
        return encode(explained if revise is None else revise(explained), self.plan, self.model)
