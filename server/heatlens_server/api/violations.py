"""Everything that is wrong with a request, collected so that a caller learns it at once."""

from heatlens_server.core.errors import FieldViolation, InvalidArgument

_SHOWN_CHARACTERS = 80


class Violations:
    """Collects what is wrong, so that a caller learns everything at once."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self._violations: list[FieldViolation] = []
        self._reason = ""
        self._metadata: dict[str, str] = {}

    def add(self, field: str, description: str, *, reason: str = "INVALID_OPTION") -> None:
        """A field is wrong. The error's reason is the first one given."""
        self._violations.append(FieldViolation(field, description))
        self._reason = self._reason or reason

    def add_error(self, error: InvalidArgument) -> None:
        """All fields of an error are wrong."""
        self._violations.extend(error.violations)
        self._reason = self._reason or error.reason
        self._metadata |= error.metadata

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with everything that was added, if anything was."""
        if self._violations:
            raise InvalidArgument(self._violations, reason=self._reason, metadata=self._metadata)


def shown(text: str) -> str:
    """A caller's text, as it may be repeated in an error: short, and quoted."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
