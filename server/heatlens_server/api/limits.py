"""The limits that requests are checked against, as GetServerInfo reports them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits in force.

    Attributes:
        max_message_bytes: largest message accepted and sent.
        max_image_pixels: largest image accepted, width times height.
        max_queue_length: most Explain calls admitted per model and not running.
        max_targets: most classes explained in one request.
        max_streams: most streams open at a time.
        max_in_flight: largest window of a stream, in frames.
    """

    max_message_bytes: int
    max_image_pixels: int
    max_queue_length: int
    max_targets: int
    max_streams: int
    max_in_flight: int
