"""The routes: OpenAI's, the page's, and /health."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from eim_jax.serving.chat_request import read_request
from eim_jax.serving.completions import Completion
from eim_jax.serving.conversation import captions, several_turns
from eim_jax.serving.errors import RequestError
from eim_jax.serving.gate import REPORT, STATE, TICKET, Gate, json_body, refusal, ticket
from eim_jax.serving.job import Answered
from eim_jax.serving.service import Answer, Service

# The page's scripts and styles are its own; what a model says is text to it.
_POLICY = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# The report has its styles and pictures inside; the one script is the server's, which renews it.
_REPORT_POLICY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'self'; "
    "connect-src 'self'",
    "Cache-Control": "no-store",
}
_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_GONE = Response(status_code=499)  # nobody reads it


def make_app(service: Service) -> Gate:
    """Returns the ASGI application of a service.

    Args:
      service: whose arms answer.
    """
    routes = Routes(service)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name}", routes.model),
            Route("/v1/chat/completions", _answering(routes.complete), methods=["POST"]),
            Route("/", _page("index.html")),
            Route("/page.js", _page("page.js")),
            Route("/page.css", _page("page.css")),
            Route("/report.js", _page("report.js")),
            Route("/favicon.ico", lambda request: Response(status_code=204)),
            Route(REPORT, _answering(routes.report)),
            Route(STATE, _answering(routes.state)),
            Route("/api/run", _answering(routes.run)),
            Route("/api/likelihood", _answering(routes.likelihood), methods=["POST"]),
            Route("/api/neighbours", _answering(routes.neighbours), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _refuse, RequestError: _refuse},
    )
    return Gate(app, service.options)


class Routes:
    """What stands behind each path.

    Args:
      service: whose arms answer.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """GET /health: whether it answers, and how many requests wait."""
        return JSONResponse({"status": "ok", "waiting": self._service.engine.waiting})

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the arms."""
        listed = [self._model(name) for name in self._service.arms]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/ARM."""
        name = request.path_params["name"]
        self._service.arm(name)
        return JSONResponse(self._model(name))

    async def complete(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = read_request(await json_body(request, self._service.options.max_body))
        answer = await self._service.begin(asked)
        form = Completion(asked, self._service.arm(asked.model).tokenizer)
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(_stream(answer, form), media_type="text/event-stream", headers=headers)
        found = await _unless_gone(request, _answered(answer))
        return _GONE if found is None else JSONResponse(form.whole(found))

    async def run(self, request: Request) -> Response:
        """GET /api/run: what the page needs to know of the run."""
        service, decode = self._service, self._service.config.decode
        progress = await anyio.to_thread.run_sync(service.run.progress)
        arms = [
            {"name": name, "description": service.config.arm[name].description, "most": arm.most}
            for name, arm in service.arms.items()
        ]
        data = service.config.data
        said = {
            "run": service.workdir.name,
            "progress": {**dataclasses.asdict(progress), "over": progress.over},
            "arms": arms,
            "pending": dict(service.pending),
            "captions": captions(data),
            "several_turns": bool(arms) and several_turns(data),
            "decode": {"method": decode.methods[0], "beams": decode.beams, "top_p": decode.top_p},
            "neighbours": service.nearest is not None,
        }
        answer = JSONResponse(said)
        if key := service.options.api_key:
            answer.set_cookie(TICKET, ticket(key), path=REPORT, httponly=True, samesite="strict")
        return answer

    async def report(self, request: Request) -> Response:
        """GET /report: the run's report page, as its files say now."""
        page = await anyio.to_thread.run_sync(self._service.run.report)
        return HTMLResponse(page, headers={**_POLICY, **_REPORT_POLICY})

    async def state(self, request: Request) -> Response:
        """GET /report/state: how far the run is, and whether the report is another one."""
        run = self._service.run
        progress, version = await anyio.to_thread.run_sync(lambda: (run.progress(), run.version()))
        return JSONResponse({"version": version, "words": progress.words, "over": progress.over})

    async def likelihood(self, request: Request) -> Response:
        """POST /api/likelihood {model, messages, text}: nats a token of a text as the answer."""
        asked, text = await self._asked(request, "text")
        if not isinstance(text, str):
            raise RequestError("text must be the answer or caption to be scored", param="text")
        return JSONResponse(await self._service.likelihood(asked.model, asked.turns, text))

    async def neighbours(self, request: Request) -> Response:
        """POST /api/neighbours {model, messages}: the training samples nearest to the picture."""
        asked, _ = await self._asked(request)
        return JSONResponse(await self._service.neighbours(asked.model, asked.turns))

    async def _asked(self, request: Request, extra: str = "") -> tuple[Any, Any]:
        body = await json_body(request, self._service.options.max_body)
        more = body.pop(extra, None) if isinstance(body, dict) else None
        return read_request(body), more

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "eim_jax"}


def _answering(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The route; an error that nobody foresaw is one in OpenAI's form, and in the log."""

    async def answer(request: Request) -> Response:
        try:
            return await route(request)
        except RequestError:
            raise
        except Exception as error:
            logging.getLogger("uvicorn.error").exception("%s %s", request.method, request.url.path)
            return refusal(_internal(error))

    return answer


def _internal(error: Exception) -> RequestError:
    return RequestError(f"the server failed at this request: {type(error).__name__}: {error}", status=500)


def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        error = RequestError(message, status=error.status_code)
    assert isinstance(error, RequestError)
    return refusal(error)


def _page(name: str) -> Callable[[Request], Response]:
    content = resources.files("eim_jax.serving").joinpath("page", name).read_bytes()
    media = _KINDS[name.rpartition(".")[2]]
    return lambda request: Response(content, media_type=media, headers=_POLICY)


async def _answered(answer: Answer) -> Answered:
    async for event in answer.events():
        if isinstance(event, Answered):
            return event
    raise AssertionError("an answer ends, or fails")


async def _unless_gone(request: Request, coming: Any) -> Answered | None:
    """What comes, or None where the client has left before."""
    wanted, gone = asyncio.ensure_future(coming), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        return wanted.result() if wanted.done() else None
    finally:
        for task in (wanted, gone):
            task.cancel()


async def _stream(answer: Answer, form: Completion) -> AsyncIterator[str]:
    """Server-sent events; where the client leaves, the generator is closed, which frees the answer's place."""
    yield _event(form.first())
    try:
        async for event in answer.events():
            if isinstance(event, Answered):
                for chunk in form.last(event):
                    yield _event(chunk)
                break
            yield _event(form.piece(event))
    except Exception as error:  # the status was sent long ago: the error is an event
        logging.getLogger("uvicorn.error").exception("a streamed answer")
        yield _event(_internal(error).form())
    finally:
        answer.cancel()
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
