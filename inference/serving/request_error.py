"""Why a request gets no text, in one line and in the form of OpenAI's errors."""

from data.foreign_json import shown

_TYPES = {500: "server_error", 503: "server_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is refused, or that failed.

    Args:
        status: Of HTTP.
        message: One line, `field: value, remedy` where a field is wrong.
        code: A word for programs; None: the message is all there is.
        retry_after: Seconds after which to try again; None: trying again is of no use.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after
        self.message = " ".join(message.split())

    def content(self) -> dict[str, object]:
        """Return the error as JSON holds it."""
        field, colon, _ = self.message.partition(": ")
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": field if colon and field.isidentifier() else None,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return what HTTP adds to it; the body may not be read yet, and never is."""
        found = {"connection": "close"}
        found |= {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def wrong(field: str, value: object, remedy: str) -> RequestError:
    """Return the refusal of a field's value, which may be anything that JSON holds."""
    return RequestError(400, f"{field}: {shown(value)}, {remedy}")
