"""What is wrong with a body that is no request: the field at fault, and a sentence."""

from collections.abc import Sequence
from typing import Any


class FieldError(ValueError):
    """A field is at fault, as only a validator of all fields together can tell.

    Attributes:
        field: Its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(_text(message))
        self.field = _text(field)


def fault_of(errors: Sequence[Any], body: Any, inside: str = "") -> tuple[str | None, str]:
    """The first field at fault, None if it is the whole body, and what is wrong with it.

    Args:
        errors: As pydantic lists them, with the places in `body`.
        body: What was validated.
        inside: What stands in front of the names of fields.
    """
    kinds = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    # Of a value that may be of several kinds pydantic lists what each of them lacks; the one that fits best is meant.
    error = max(kinds, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    place = _place(error, body)
    field = inside + ".".join(map(str, place)) if place else None
    if error["type"] == "value_error":
        cause = error["ctx"]["error"]
        return (cause.field if isinstance(cause, FieldError) else field), str(cause)
    if error["type"] == "extra_forbidden":
        return field, f"`{field}` is unknown. Leave it out."
    return field, f"`{field or 'body'}`: {error['msg']}."


def _place(error: Any, body: Any) -> list[Any]:
    """Where an error is in a body. Pydantic's own place also names the kinds that a value was tried as."""
    found = []
    for part in error["loc"]:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            found.append(part)
    return [*found, error["loc"][-1]] if error["type"] == "missing" and error["loc"] else found


def _text(found: str) -> str:
    """JSON may hold halves of characters (`\\ud800`), which no answer and not even pydantic takes: here as escapes."""
    return found.encode(errors="backslashreplace").decode()
