"""The web application: which address is answered by which view, and how failures are shown.

A view is a plain function of the studio and of what was asked; it runs in a thread, and its module is imported when it
is first asked for, so that the studio starts before numpy or Pillow are read.
"""

import functools
import importlib
import logging
import mimetypes
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sd3pipe.child import run_captured
from sd3pipe.config import PROJECT_FILE, Project, read_project
from sd3pipe.documents import parse_json, read_data
from sd3pipe.errors import InputError, ParameterError, Sd3pipeError, of_system
from sd3pipe.fingerprint import hash_bytes
from sd3pipe.pages.render import render
from sd3pipe.studio.places import studio_folder
from sd3pipe.studio.queue import Kind, Queue
from sd3pipe.studio.safety import Access, Guard
from sd3pipe.studio.watch import Watches

log = logging.getLogger(__name__)

_MOST_BODY_BYTES = 4_000_000
_PACKAGE = Path(__file__).parent.parent
_STATIC = {
    "style.css": _PACKAGE / "pages" / "style.css",
    "studio.css": _PACKAGE / "studio" / "studio.css",
    "studio.js": _PACKAGE / "studio" / "studio.js",
}
_ROUTES = (  # method, path, "module:function" below sd3pipe.studio.views
    ("GET", "/", "begin:home"),
    ("GET", "/begin", "begin:page"),
    ("POST", "/begin/init", "begin:init"),
    ("POST", "/begin/from-kohya", "begin:from_kohya"),
    ("GET", "/queue", "queue:page"),
    ("POST", "/queue/change", "queue:change"),
    ("GET", "/p/{project}/pictures", "pictures:page"),
    ("GET", "/p/{project}/pictures/more", "pictures:more"),
    ("GET", "/p/{project}/pictures/rows", "pictures:rows"),
    ("GET", "/p/{project}/pictures/thumb/{key}", "pictures:thumb"),
    ("POST", "/p/{project}/pictures/caption", "pictures:caption"),
    ("POST", "/p/{project}/pictures/tags", "pictures:tags"),
    ("POST", "/p/{project}/pictures/undo", "pictures:undo"),
    ("POST", "/p/{project}/pictures/check", "pictures:check"),
    ("GET", "/p/{project}/plan", "plan:page"),
    ("POST", "/p/{project}/plan/table", "plan:table"),
    ("POST", "/p/{project}/plan/save", "plan:save"),
    ("GET", "/p/{project}/train", "train:page"),
    ("GET", "/p/{project}/train/curves", "train:curves"),
    ("POST", "/p/{project}/train/start", "train:start"),
    ("POST", "/p/{project}/train/stop", "train:stop"),
    ("GET", "/p/{project}/sample/{path:path}", "train:sample"),
    ("GET", "/p/{project}/compare", "compare:page"),
    ("POST", "/p/{project}/compare/draw", "compare:draw"),
    ("POST", "/p/{project}/compare/judge", "compare:judge"),
    ("POST", "/p/{project}/compare/use", "compare:use"),
    ("GET", "/p/{project}/report", "pages:report"),
    ("GET", "/p/{project}/judgement", "pages:judgement"),
    ("GET", "/p/{project}/captions", "pages:captions"),
)
_BODY = TypeAdapter(dict[str, JsonValue])


class FieldError(ParameterError):
    """What stands in one field of a form cannot be used; the page says so there."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Projects:
    """The folders that the studio shows. What lies in them is read anew for each page."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders: dict[str, Path] = {}
        for folder in folders:
            self.add(folder)

    def add(self, folder: Path) -> str:
        """Shows a folder, and returns the name that it has in addresses: the same one after a restart."""
        real = folder.resolve()
        words = re.sub(r"[^a-z0-9]+", "-", real.name.lower()).strip("-") or "project"
        slug = f"{words[:40]}-{hash_bytes(bytes(real))[:6]}"
        self._folders[slug] = real
        return slug

    def read(self, slug: str) -> Project:
        """Returns a project as its file is. Raises InputError for an unknown one, ParameterError for a bad file."""
        folder = self._folders.get(slug)
        if folder is None:
            raise InputError(
                "this studio shows no such project: start it with its folder, or open it on the first page"
            )
        return read_project(folder)

    def listed(self) -> list[dict[str, Any]]:
        """Returns slug, name and folder of each project that is there."""
        return [
            {"slug": slug, "name": folder.name, "folder": str(folder)}
            for slug, folder in self._folders.items()
            if (folder / PROJECT_FILE).is_file()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    access: Access
    projects: Projects
    queue: Queue
    watches: Watches


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What was asked: the project in the path, the rest of the path, the query, and the values of a body."""

    slug: str
    path: Mapping[str, str]
    query: Mapping[str, str]
    values: Mapping[str, Any]
    studio: Studio

    @functools.cached_property
    def project(self) -> Project:
        return self.studio.projects.read(self.slug)

    def text(self, name: str) -> str:
        """Returns a value of the body as text, "" where there is none."""
        value = self.values.get(name)
        return value.strip() if isinstance(value, str) else ""

    def texts(self, name: str) -> list[str]:
        """Returns a value of the body as a list of texts."""
        value = self.values.get(name)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    def run(self, words: Sequence[str], folder: Path) -> str:
        """Runs a command of sd3pipe to its end, and returns what it printed. Raises InputError with its errors."""
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
        code, printed = run_captured(words, folder=folder)
        if code:
            errors = [line.removeprefix("error: ") for line in printed.splitlines() if line.startswith("error: ")]
            raise InputError("\n".join(errors or printed.splitlines()[-3:]))
        return printed

    def queue(self, kind: Kind, title: str, *commands: Sequence[str]) -> dict[str, Any]:
        """Puts a job of the project into the queue, and returns what the page does then. Raises StorageError."""
        logs = studio_folder(self.project).absolute() / "logs"
        self.studio.queue.add(self.project.folder, title, commands, logs, kind=kind)
        return {"message": f"in the queue: {title}", "location": "/queue"}

    def page(self, template: str, **values: Any) -> str:
        """Returns a page of the studio, or a part of one, with what its frame needs."""
        return render(
            f"studio/templates/{template}.html",
            projects=self.studio.projects.listed(),
            slug=self.slug,
            read_only=self.studio.access.read_only,
            **values,
        )


View = Callable[[Ask], str | Response | dict[str, Any]]


def application(studio: Studio) -> Callable[..., Awaitable[None]]:
    """Returns the ASGI application, behind its guard."""
    routes = [Route(path, _endpoint(studio, view), methods=[method]) for method, path, view in _ROUTES]
    routes += [
        Route("/healthz", _healthy, methods=["GET"]),
        Route("/static/{name}", _static, methods=["GET"]),
        Route("/p/{project}/train/live", functools.partial(_live, studio), methods=["GET"]),
    ]
    nowhere = functools.partial(_nowhere, studio)
    return Guard(Starlette(routes=routes, exception_handlers={404: nowhere, 405: nowhere}), studio.access)


def _endpoint(studio: Studio, view: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        path = {name: str(value) for name, value in request.path_params.items()}
        slug = path.pop("project", "")
        is_post = request.method == "POST"
        try:
            values = await _body(request) if is_post else {}
            ask = Ask(slug=slug, path=path, query=dict(request.query_params), values=values, studio=studio)
            found = await run_in_threadpool(_call, view, ask)
        except FieldError as error:
            return JSONResponse({"fields": {error.field: str(error)}}, 422)
        except (Sd3pipeError, OSError) as error:
            known = error if isinstance(error, Sd3pipeError) else of_system(error)
            if known is None:
                raise
            return _failed(studio, slug, str(known), as_json=is_post)
        if isinstance(found, Response):
            return found
        return HTMLResponse(found) if isinstance(found, str) else JSONResponse(found)

    return answer


def _call(view: str, ask: Ask) -> str | Response | dict[str, Any]:
    module, function = view.split(":")
    return getattr(importlib.import_module(f"sd3pipe.studio.views.{module}"), function)(ask)


async def _body(request: Request) -> dict[str, Any]:
    """Returns the values of a JSON body; a form of another site cannot send one. Raises InputError."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise InputError("the body must be JSON")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MOST_BODY_BYTES:
            raise InputError(f"more than {_MOST_BODY_BYTES:,} bytes: this is not what is expected here")
    return parse_json(bytes(data), _BODY, "the body")


def _failed(studio: Studio, slug: str, message: str, *, as_json: bool) -> Response:
    if as_json:
        return JSONResponse({"error": message.splitlines()}, 422)
    return HTMLResponse(_problem(studio, slug, "This cannot be shown", message), 422)


async def _nowhere(studio: Studio, request: Request, _: Exception) -> Response:
    message = f"{request.url.path}: the studio has no such page"
    return HTMLResponse(await run_in_threadpool(_problem, studio, "", "There is no such page", message), 404)


def _problem(studio: Studio, slug: str, title: str, message: str) -> str:
    """Returns a page of what is wrong, in the frame of the project where it is one."""
    known = {project["slug"] for project in studio.projects.listed()}
    ask = Ask(slug=slug if slug in known else "", path={}, query={}, values={}, studio=studio)
    return ask.page("problem", title=title, problems=message.splitlines())


async def _healthy(request: Request) -> Response:
    return PlainTextResponse("ok\n")


async def _static(request: Request) -> Response:
    path = _STATIC.get(request.path_params["name"])
    if path is None:
        return PlainTextResponse("not found\n", 404)
    data = await run_in_threadpool(read_data, path)
    kind = mimetypes.guess_type(path.name)[0] or "text/plain"
    return Response(data, media_type=kind, headers={"cache-control": "no-cache"})


async def _live(studio: Studio, request: Request) -> Response:
    """Streams what happens in a run, from where the page or its last connection left off."""
    try:
        project = await run_in_threadpool(studio.projects.read, request.path_params["project"])
    except Sd3pipeError as error:
        return PlainTextResponse(f"{error}\n", 404)
    since = request.headers.get("last-event-id") or request.query_params.get("since", "")
    watch = studio.watches.of(project, request.query_params.get("run", ""))
    return watch.stream(since)
