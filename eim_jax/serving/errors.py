"""What a request is refused with: an HTTP status and OpenAI's error form, which its clients raise as exceptions."""

from typing import Any


class RequestError(ValueError):
    """A request that is not answered.

    Args:
      message: names what is wrong, and what to do.
      status: the HTTP status.
      param: the field of the request, "messages[0].content" say.
      code: OpenAI's word for the case, where it has one.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def form(self) -> dict[str, Any]:
        """Returns the body of the answer, as OpenAI writes it."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        return kinds.get(self.status, "invalid_request_error")


def no_such_model(name: str, names: list[str]) -> RequestError:
    """Returns the refusal of a model that is not served."""
    message = f"the model {name!r} is not served here: " + (
        f"this run has {', '.join(names)}" if names else "no arm of this run is finished yet"
    )
    return RequestError(message, status=404, param="model", code="model_not_found")
