"""`sd3pipe studio`: one local web application on the files that the stages write."""

import importlib.util
import os
import secrets
import sys
import threading
import webbrowser
from pathlib import Path

from sd3pipe.config import find_project, read_project
from sd3pipe.console import say
from sd3pipe.errors import ParameterError
from sd3pipe.params.studio import StudioParams
from sd3pipe.studio.queue import Queue, queue_folder
from sd3pipe.studio.worker import work_off

_LIBRARIES = ("starlette", "uvicorn")


def main(params: StudioParams) -> None:
    """Serves until Ctrl-C. Raises ParameterError for a folder without a project, and where the extra is missing."""
    queue = Queue(queue_folder())
    if params.queue_only:
        work_off(queue)
        return
    if any(importlib.util.find_spec(name) is None for name in _LIBRARIES):
        raise ParameterError('studio: its libraries are not installed: pip install "sd3pipe[studio]"')
    folders = [read_project(folder).folder for folder in params.projects]
    if not folders:  # those that were opened before, and the one around the current folder
        here = find_project(Path.cwd())
        folders = [*queue.projects(), *([here.folder] if here else [])]
    if not params.read_only:
        queue.work()
    _serve(params, folders, queue)


def _serve(params: StudioParams, folders: list[Path], queue: Queue) -> None:
    from sd3pipe.studio.app import (  # the libraries of the extra, which --queue-only does without
        Projects,
        Studio,
        application,
    )
    from sd3pipe.studio.safety import Access
    from sd3pipe.studio.serving import bind, serve
    from sd3pipe.studio.watch import Watches

    sock = bind(params.host, params.port)
    host, port, *_ = sock.getsockname()
    token = secrets.token_urlsafe(24)
    access = Access(token=token, host=params.host, port=port, origin=params.origin, read_only=params.read_only)
    studio = Studio(access=access, projects=Projects(folders), queue=queue, watches=Watches(queue))
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/?token={token}"
    say(f"studio: {address}")
    if params.origin:
        say(f"behind the tunnel or proxy: {params.origin}/?token={token}")
    if params.open and _has_screen():
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
    serve(application(studio), sock, studio.watches.close)


def _has_screen() -> bool:
    """Whether a browser would open in a window, not in the terminal, or nowhere."""
    on_linux = sys.platform.startswith("linux")
    return os.isatty(1) and (not on_linux or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))))
