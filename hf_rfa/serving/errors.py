"""Requests that cannot be answered, in OpenAI's form: a status, and a body with `error`."""

from typing import Any

from hf_rfa.errors import RFAError


class RequestError(RFAError):
    """A request is refused, or failed.

    Attributes:
        status: Of HTTP.
        kind: OpenAI's `type`.
        param: The field of the request that is at fault.
        code: A word for programs.
        headers: More headers of the response.
    """

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
        code: str | None = None, headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """Status 400: the request itself is wrong."""
    return RequestError(400, message, param=param, code=code)


def busy(waiting: int, seconds: int) -> RequestError:
    """Status 429: as many requests wait as may."""
    return RequestError(
        429, f"{waiting} requests wait already, which is the limit. Try again in {seconds} s.",
        kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(seconds)},
    )  # fmt: skip


def closing() -> RequestError:
    """Status 503: the server is shutting down."""
    return RequestError(
        503, "The server is shutting down. Try again when it is back.", kind="server_error", code="shutting_down",
        headers={"Retry-After": "5"},
    )  # fmt: skip


def broken(error: Exception) -> RequestError:
    """Status 500: answering failed; what happened is in the server's log."""
    if isinstance(error, RequestError):
        return error
    return RequestError(
        500, f"The answer could not be computed ({type(error).__name__}). Other requests are not affected; the "
        "server's log has the details.", kind="server_error", code="internal_error",
    )  # fmt: skip
