"""The web application: serves the page's three files, and answers its requests to the taught set."""

from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pml_fewshot.app.pictures import Picture, PictureEmbedder
from pml_fewshot.app.saved_sets import SavedSets
from pml_fewshot.app.taught_set import ConflictError, TaughtSet, TooMuchError, UnknownExampleError, checked_name
from pml_fewshot.checks import ExistingFileError, MissingFileError, UsageError
from pml_fewshot.data.images import BrokenImageError
from pml_fewshot.io.atomic import CannotWriteError

PAGE = Path(__file__).with_name("page")
FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
MOST_FILES = 100  # per request; the page sends a folder in several
MOST_FIELDS = 10
STATUS: tuple[tuple[type[Exception], int], ...] = (
    (BrokenImageError, 415),
    (TooMuchError, 413),
    (ConflictError, 409),
    (ExistingFileError, 409),
    (UnknownExampleError, 404),
    (MissingFileError, 404),
    (CannotWriteError, 507),
    (UsageError, 400),
)
HEADERS = {
    # nothing from elsewhere, nothing inline; pictures that the page itself makes are blob: and data:
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def application(
    embedder: PictureEmbedder,
    sets: Path,
    host: str = "127.0.0.1",
    most_megabytes: float = 20,
    most_examples: int = 2000,
) -> Starlette:
    """The app, with nothing taught yet.

    Args:
        embedder: embeds the pictures.
        sets: folder of saved sets.
        host: where it is served, the only name except the loopback's that a request may give.
        most_megabytes: the limit of a request.
        most_examples: the limit in total.
    """
    service = Service(TaughtSet(most_examples), embedder, SavedSets(sets, embedder), most_megabytes)
    guard = Middleware(Guard, host=host, most_bytes=int(most_megabytes * 2**20))
    handlers: dict[Any, Any] = {HTTPException: _http_error, UsageError: _usage_error, Exception: _bug}
    return Starlette(routes=service.routes(), middleware=[guard], exception_handlers=handlers)


class Fields(dict[str, Any]):
    """The fields of a request by name; a missing one is the sender's mistake."""

    def __missing__(self, name: str) -> Any:
        raise UsageError(f"expected {name!r} in the request, got none; add it")


class Service:
    """The requests; each one that changes something returns the whole state, from which the page is drawn."""

    def __init__(self, taught: TaughtSet, embedder: PictureEmbedder, sets: SavedSets, most_megabytes: float) -> None:
        self.taught, self.embedder, self.sets, self.most_megabytes = taught, embedder, sets, most_megabytes
        self.session = token_hex(8)  # shows a page that was left open that the program was restarted
        self.saved: tuple[str, int] | None = None  # name and version of the set last saved or loaded

    def routes(self) -> list[Route]:
        posts = {
            "classes/rename": lambda given: self.taught.rename(given["name"], given["to"]),
            "classes/remove": lambda given: self.taught.remove_class(given["name"]),
            "examples/move": lambda given: self.taught.move(given["example"], given["to"]),
            "examples/remove": lambda given: self.taught.remove(given["example"]),
            "clear": self._clear,
            "sets/save": self._save,
            "sets/load": self._load,
            "sets/delete": lambda given: self.sets.delete(given["name"]),
        }
        return [
            *(Route(path, _file(*about)) for path, about in FILES.items()),
            Route("/api/state", self._state),
            Route("/api/examples", self._teach, methods=["POST"]),
            Route("/api/classify", self._classify, methods=["POST"]),
            Route("/api/examples/{number:int}", self._picture),
            *(Route(f"/api/{path}", self._changing(change), methods=["POST"]) for path, change in posts.items()),
        ]

    def state(self) -> dict[str, Any]:
        known, saved = self.taught.known, self.saved
        return {
            "session": self.session,
            "version": known.version,
            "embedder": self.embedder.name,
            "reads_ink": self.embedder.reads_ink,
            "classes": [{"name": name, "examples": [e.number for e in own]} for name, own in known.classes.items()],
            "advice": known.advice,
            "sets": self.sets.names(),
            "saved_as": saved[0] if saved else None,
            "changed": bool(known.examples) and (saved is None or saved[1] != known.version),
            "most_megabytes": self.most_megabytes,
            "most_examples": self.taught.most_examples,
            "most_files": MOST_FILES,
        }

    async def _state(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.state))

    async def _teach(self, request: Request) -> Response:
        """Teaches examples of one class; of several files the readable ones are taught, the others named."""
        label, files = await _form(request)

        def teach() -> dict[str, Any]:
            checked_name(label)
            self.taught.check_room(len(files))  # before they are embedded, which takes longest
            seen, refused = [], []
            for name, content in files:
                try:
                    seen.append(self._seen(name, content))
                except UsageError as error:
                    refused.append(error)
            if not seen:
                raise refused[0]
            numbers = self.taught.add(label, *zip(*seen, strict=True))
            return {**self.state(), "added": numbers, "refused": [str(error) for error in refused]}

        return JSONResponse(await run_in_threadpool(teach))

    async def _classify(self, request: Request) -> Response:
        _, files = await _form(request)
        return JSONResponse(await run_in_threadpool(lambda: self.taught.answer(self._seen(*files[0])[1])))

    def _seen(self, name: str, content: bytes) -> tuple[Picture, np.ndarray]:
        picture = self.embedder.picture(content, name)
        return picture, self.embedder(picture)

    async def _picture(self, request: Request) -> Response:
        picture: Picture = self.taught.example(request.path_params["number"]).picture
        return Response(picture.content, media_type=picture.media_type)

    def _changing(self, change: Callable[[dict[str, Any]], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            given = await _json(request)

            def run() -> dict[str, Any]:
                change(Fields(given))
                return self.state()

            return JSONResponse(await run_in_threadpool(run))

        return answer

    def _clear(self, given: dict[str, Any]) -> None:
        self.taught.replace([], [], [])
        self.saved = None

    def _save(self, given: dict[str, Any]) -> None:
        known = self.taught.known
        self.saved = self.sets.save(given["name"], known, given.get("replace") is True), known.version

    def _load(self, given: dict[str, Any]) -> None:
        labels, pictures, embeddings, name = self.sets.load(given["name"])
        self.saved = name, self.taught.replace(labels, pictures, embeddings)


class Guard:
    """Wraps the app and decides whose requests are answered, and how long they may be.

    A page elsewhere can send requests to this machine through its visitor's browser. Its name is then in Origin or, if
    it makes its name resolve to this machine (DNS rebinding), in Host. Programs other than browsers send no Origin.
    """

    def __init__(self, app: ASGIApp, host: str, most_bytes: int) -> None:
        self.app, self.host, self.most_bytes = app, host, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            body = await self._body(receive)
        except ClientDisconnect:  # nobody is there to answer
            return None
        refusal = self._refusal(scope["method"], Headers(scope=scope), body)
        if refusal is not None:
            return await refusal(scope, receive, sealed)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, sealed)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, or None if it is too long: it is still read to its end, because a browser that is still
        sending shows a broken connection in place of the answer."""
        parts: list[bytes] = []
        total, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part, more = message.get("body", b""), message.get("more_body", False)
            total += len(part)
            parts.append(part)
            if total > self.most_bytes:
                parts.clear()
        return b"".join(parts) if total <= self.most_bytes else None

    def _refusal(self, method: str, headers: Headers, body: bytes | None) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            return _error(
                400, f"expected a request to {self.host}, got one to {host[:100]!r}; open the printed address"
            )
        if method not in ("GET", "HEAD") and origin is not None and origin != f"http://{host}":
            return _error(
                400, f"expected a request of this page, got one of {origin[:100]!r}; open the printed address"
            )
        if body is None:
            most = f"{self.most_bytes / 2**20:.3g} MB"
            return _error(
                413, f"expected a request of at most {most}, got a longer one; send fewer or smaller pictures"
            )
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name == self.host.lower() or is_loopback(name):
            return True
        if is_loopback(self.host):
            return False
        try:  # served to other machines: they have no name for it, and an address cannot be rebound
            ip_address(name)
        except ValueError:
            return False
        return True


def is_loopback(host: str) -> bool:
    """Whether a name or an address can only be that of this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _file(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = (PAGE / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return answer


async def _form(request: Request) -> tuple[str, list[tuple[str, bytes]]]:
    """The class's name, empty if there is none, and the name and content of each file."""
    _check_type(request, "multipart/form-data")
    async with request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS) as form:
        label = form.get("name", "")
        given = [value for key, value in form.multi_items() if key == "picture" and isinstance(value, UploadFile)]
        files = [(each.filename or "the picture", await each.read()) for each in given]
    if not files:
        raise HTTPException(400, "expected a picture, got none; attach one")
    return label if isinstance(label, str) else "", files


async def _json(request: Request) -> dict[str, Any]:
    _check_type(request, "application/json")
    try:
        given = await request.json()
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise HTTPException(400, f"expected JSON, got something else ({error}); correct it") from error
    if not isinstance(given, dict):
        raise HTTPException(400, "expected a JSON object, got something else; correct it")
    return given


def _check_type(request: Request, wanted: str) -> None:
    got = request.headers.get("content-type", "nothing")
    if not got.startswith(wanted):
        raise HTTPException(415, f"expected {wanted}, got {got[:100]}; send that")


def _error(status: int, text: str) -> Response:
    return JSONResponse({"error": text}, status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    text = error.detail
    if not text.startswith("expected"):  # starlette's own
        text = f"expected a request that can be answered, got {request.method} {request.url.path}: {text}; look it up"
    return _error(error.status_code, text)


async def _usage_error(request: Request, error: UsageError) -> Response:
    return _error(next(status for kind, status in STATUS if isinstance(error, kind)), str(error))


async def _bug(request: Request, error: Exception) -> Response:
    return _error(500, "expected to answer, got an error in the program; its terminal shows it")
