"""The reference image of a request or stream: decoded once, for however many frames are compared with it."""

import threading

from heatlens_server.api.checks import InspectedImage, Limits, SourceImage, fit_image, inspected
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import FittedImage, PreprocessSpec
from heatlens_server.core.targets import Similarity

_FIELD = "reference_image"


class ReferenceImage:
    """Makes the target once the reference is decoded. Thread-safe."""

    def __init__(self, image: SourceImage, preprocess: PreprocessSpec, limits: Limits) -> None:
        """Decode nothing yet.

        Args:
            image: as `check_image` let it pass.
            preprocess: of the model that is asked.
            limits: what it is checked against.
        """
        self._image: SourceImage | None = image
        self._preprocess = preprocess
        self._limits = limits
        self._lock = threading.Lock()
        self._found: Similarity | InvalidArgument | None = None

    def inspected(self) -> InspectedImage | None:
        """What decoding it will take; None if it is decoded.

        Raises:
            InvalidArgument: it is no image, too large, or too complex.
        """
        image = self._image
        return None if image is None else inspected(image, self._preprocess, self._limits, field=_FIELD)

    def __call__(self, _image: FittedImage) -> Similarity:
        """The target, for an image that is decoded.

        Raises:
            InvalidArgument: the reference cannot be decoded.
        """
        with self._lock:
            if self._found is None:
                assert self._image is not None
                try:
                    self._found = Similarity(
                        fit_image(self._image, self._preprocess, self._limits, field=_FIELD).pixels
                    )
                except InvalidArgument as error:
                    self._found = error
                self._image = None
            if isinstance(self._found, InvalidArgument):
                raise self._found.with_traceback(None)
            return self._found
