"""The page served to this machine alone: FastAPI behind a token and a check of the Host header."""

import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response

from hifusion.errors import InputError
from hifusion.viewer.pages import KINDS, Site, assets

ADDRESS = "127.0.0.1"
# Nothing is loaded from elsewhere and nothing inline runs, whatever a name in a file holds.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, max-age=3600",  # the token is another one at the next start
}


def serve(site: Site, port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; ``say`` is told the address, token included, as soon as it answers.

    Parameters
    ----------
    port
        On 127.0.0.1; any free one where 0.

    Raises
    ------
    InputError
        The port is taken or not allowed.
    """
    listening = socket.socket()
    try:
        listening.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"--port {port}: cannot be used ({error}); leave it out for any free one") from error
    listening.listen()  # whoever is told the address may knock at once
    port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
    app = make_app(site, token, port)
    # Whoever ends it does not wait for browsers that keep their connections.
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    with listening, suppress(KeyboardInterrupt):  # Ctrl-C is the way to end it
        say(f"http://{ADDRESS}:{port}/{token}/")
        uvicorn.Server(config).run(sockets=[listening])


def make_app(site: Site, token: str, port: int) -> FastAPI:
    """The application: every address begins with the token, and every file in it is named by numbers alone."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    hosts = {f"{ADDRESS}:{port}", f"localhost:{port}"}

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.headers.get("host") not in hosts:  # another site's name that was made to lead here
            return Response("this page is for this machine alone\n", 403, _HEADERS, "text/plain")
        given = request.scope["path"].removeprefix("/").partition("/")[0]
        if not hmac.compare_digest(given.encode(), token.encode()):
            return Response("wrong token; open the address that `hifusion view` printed\n", 403, _HEADERS, "text/plain")
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    @app.exception_handler(InputError)
    async def unreadable(request: Request, error: InputError) -> Response:
        return Response(f"{error}\n", 500, media_type="text/plain; charset=utf-8")  # a slide that is damaged there

    app.include_router(_routes(site), prefix=f"/{token}")
    return app


def _routes(site: Site) -> APIRouter:
    routes, own = APIRouter(), assets()

    def sent(content: bytes | None, kind: str) -> Response:
        if content is None:
            raise HTTPException(404)
        return Response(content, media_type=KINDS[kind])

    def numbered(items: list[Any], number: int) -> Any:
        if not 0 <= number < len(items):
            raise HTTPException(404)
        return items[number]

    @routes.get("/data/sections.json")
    def sections() -> Response:
        return sent(site.sections(), ".json")

    @routes.get("/data/{i:int}/section.json")
    def section(i: int) -> Response:
        numbered(site.contents, i)
        return sent(site.section(i), ".json")

    @routes.get("/data/{i:int}/spots.json")
    def spots(i: int) -> Response:
        numbered(site.contents, i)
        return sent(site.spots(i), ".json")

    @routes.get("/data/{i:int}/centres.bin")
    def centres(i: int) -> Response:
        return sent(numbered(site.contents, i).centres(), ".bin")

    @routes.get("/data/{i:int}/{m:int}/{b:int}.bin")
    def block(i: int, m: int, b: int) -> Response:
        its = numbered(numbered(site.contents, i).maps, m)
        return sent(its.block(b) if b < its.blocks else None, ".bin")

    @routes.get("/data/{i:int}/{m:int}.geojson")
    def geojson(i: int, m: int, gene: int | None = None) -> Response:
        content = numbered(site.contents, i)
        numbered(content.maps, m)
        if gene is not None:
            numbered(content.genes, gene)
        return sent(content.geojson(m, gene), ".geojson")

    @routes.get("/data/{i:int}/tiles/{level:int}/{column:int}_{row:int}.jpeg")
    def tile(i: int, level: int, column: int, row: int) -> Response:
        numbered(site.contents, i)
        return sent(site.tile(i, level, column, row), ".jpeg")

    @routes.get("/{name}")
    def asset(name: str) -> Response:
        return sent(own.get(name), Path(name).suffix if name in own else ".html")

    @routes.get("/")
    def page() -> Response:
        return sent(own["index.html"], ".html")

    return routes
