"""Errors of the API, in OpenAI's form."""

from typing import Any


class RequestError(Exception):
    """A request that is refused, with its HTTP status.

    Attributes:
        status: HTTP status.
        code: Machine-readable name of the error.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        if self.status >= 429:
            kind = "rate_limit_error" if self.status == 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        return {"Retry-After": "1"} if self.status == 429 else {}
