"""What an error means to the operator: what caused it, and where in code that is not ours.

Clients see an error's message alone: causes hold paths.
"""

import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from heatlens_server.core.errors import ModelLoadError

_OURS = str(Path(__file__).parents[1])
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_SHOWN_CHARACTERS = 2000
"""How much of a cause's text is repeated: those of torch may list every entry of a network."""


def with_causes(error: BaseException) -> str:
    """Return an error's message with its notes, and of what caused it the types, messages and place.

    The place is the innermost file and line that is neither heatlens' nor a library's: the operator's own code, of
    which the error tells. Without any it is left out.
    """
    # What an error of ours was made of, word for word, is said already.
    causes = [one for one in _causes(error) if not (isinstance(one, ModelLoadError) and str(one) in str(error))]
    told = [str(error), *getattr(error, "__notes__", ())]
    # In one line, as a log's and a command's are.
    told += [f"{type(cause).__name__}: {' '.join(str(cause).split())[:_SHOWN_CHARACTERS]}" for cause in causes]
    places = [place for cause in reversed(causes or [error]) if (place := _own_place(cause))]
    return "; ".join(told) + (f" ({places[0]})" if places else "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _own_place(error: BaseException) -> str:
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        # Code in angle brackets is no file: "<frozen importlib._bootstrap>".
        if not frame.filename.startswith(("<", _OURS, *_LIBRARIES)):
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return ""
