"""Where a cache is read from: a folder, or the same files in a bucket behind a URL."""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from sd3pipe.cache.folder import SUFFIX, CacheFolder
from sd3pipe.cache.segment import read_exactly
from sd3pipe.errors import NetworkError
from sd3pipe.files import open_handle
from sd3pipe.remote import connect, is_address

_MOST_OPEN = 128  # segments a process keeps open; systems allow 1024 files and up


class FolderFiles:
    """A cache folder. Segments stay open per process; one that is missing is looked for among the unused ones.

    Every method may be called in any process and raises FileNotFoundError or EOFError.
    """

    def __init__(self, path: Path) -> None:
        self._folder = CacheFolder(path)
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> Path:
        return self._folder.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def read(self, name: str) -> Any:
        """Returns a whole file's bytes."""
        path = self._folder.path / name
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else b""

    def read_segment(self, plan_id: str, start: int, size: int) -> memoryview:
        """Returns part of a segment as memory that the caller owns."""
        if self._process != os.getpid():  # after a fork: a parent's handles are shared, and closing is not ours
            self._handles, self._process = OrderedDict(), os.getpid()
        handle = self._handles.get(plan_id)
        if handle is None:
            path = self._folder.find_segment(plan_id)
            if path is None:
                raise FileNotFoundError(f"segment {plan_id}{SUFFIX} is neither in the cache nor among its unused rows")
            handle = self._handles[plan_id] = open_handle(path)
            if len(self._handles) > _MOST_OPEN:
                os.close(self._handles.popitem(last=False)[1])
        else:
            self._handles.move_to_end(plan_id)
        return read_exactly(handle, size, start, f"segment {plan_id}")


class UrlFiles:
    """The same behind an fsspec URL such as s3://bucket/caches/latents. Each process makes its own connection."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._files: Any = None
        self._process = 0

    def __getstate__(self) -> str:
        return self._url

    def __setstate__(self, url: str) -> None:
        self.__init__(url)

    def read(self, name: str) -> Any:
        return self._ask(f"{self._url}/{name}")

    def read_segment(self, plan_id: str, start: int, size: int) -> memoryview:
        name = f"{self._url}/segments/{plan_id}{SUFFIX}"
        data = self._ask(name, start=start, end=start + size)
        if len(data) != size:
            raise EOFError(f"{name} ends {size - len(data)} bytes early")
        return memoryview(bytearray(data))

    def _ask(self, path: str, **part: int) -> Any:
        if self._process != os.getpid():
            self._files, self._process = connect(self._url), os.getpid()
        try:
            return self._files.cat_file(path, **part)
        except (FileNotFoundError, EOFError):
            raise
        except OSError as error:
            raise NetworkError(f"{path} cannot be read: {error}") from error


def cache_files(where: str | Path) -> FolderFiles | UrlFiles:
    """Returns the place of a folder or URL. Raises InputError where a URL's file system is not installed."""
    return UrlFiles(str(where)) if is_address(str(where)) else FolderFiles(Path(where))
