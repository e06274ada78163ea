"""What every request passes first: who may ask, whether the server is about to end, how large a body may be."""

import hmac
import json
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from eim_jax.serving.errors import RequestError
from eim_jax.serving.service import Options

# Without a key: they hold nothing of the run.
OPEN = ("/health", "/", "/page.js", "/page.css", "/report.js", "/favicon.ico")
REPORT = "/report"  # a link, which carries no header: the page has a cookie for it, and for what is below it
STATE = f"{REPORT}/state"
TICKET = "eim_jax_report"
_RETRY = {429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}, 401: {"WWW-Authenticate": "Bearer"}}


class Gate:
    """An ASGI application around another one.

    Args:
      app: the application.
      options: the operator's.

    Attributes:
      draining: the server ends: requests under way go on, new ones are refused with 503.
      active: requests under way.
    """

    def __init__(self, app: Any, options: Options) -> None:
        self._app, self._options = app, options
        self.draining, self.active = False, 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(Request(scope))
        except RequestError as error:
            await refusal(error)(scope, receive, send)
            return
        self.active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.active -= 1

    def _check(self, request: Request) -> None:
        if self.draining:
            raise RequestError("the server is about to end: it takes no new requests", status=503)
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if self._options.hosts and name not in self._options.hosts:
            hosts = ", ".join(self._options.hosts)
            raise RequestError(f"this server answers as {hosts}, not as {name!r}; --host opens it", status=403)
        key = self._options.api_key
        path = request.url.path
        if key and path in (REPORT, STATE) and _same(request.cookies.get(TICKET, ""), ticket(key)):
            return
        if key and path not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not _same(given, key):
                message = "wrong or missing API key: send Authorization: Bearer KEY"
                raise RequestError(message, status=401, code="invalid_api_key")


def ticket(key: str) -> str:
    """Returns the cookie's value that opens the report, and nothing else, to a page that had the key."""
    return hmac.digest(key.encode(), REPORT.encode(), "sha256").hex()


def _same(given: str, wanted: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), wanted.encode())


async def json_body(request: Request, limit: int) -> Any:
    """Returns a request's body, parsed.

    Args:
      request: a POST.
      limit: most bytes.

    Raises:
      RequestError: it is larger, no JSON, or not sent as JSON (which a web page of another origin may do unasked).
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("send the body as Content-Type: application/json", status=415)
    body, received = bytearray(), 0
    too_large = RequestError(f"the body is larger than {limit:,} bytes: send a smaller picture", status=413)
    if int(request.headers.get("content-length") or 0) > 4 * limit:
        raise too_large
    try:
        async for part in request.stream():
            received += len(part)
            if received > 4 * limit:
                raise too_large
            if received <= limit:  # one that is somewhat too large is read to its end, or its sender saw no answer
                body += part
    except ClientDisconnect:
        raise RequestError("the request ended before its body did") from None
    if received > limit:
        raise too_large
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from None


def refusal(error: RequestError) -> JSONResponse:
    """Returns the answer that says why a request is refused."""
    return JSONResponse(error.form(), error.status, _RETRY.get(error.status))
