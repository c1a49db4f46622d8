"""A local server that speaks S3, where the environment says that S3 is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import s3fs
from moto.server import ThreadedMotoServer

from sd3pipe import remote


@contextmanager
def local_s3(monkeypatch) -> Iterator[s3fs.S3FileSystem]:
    """Yields the file system of a server with one bucket, called `bucket`."""
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name, value in (settings | {"DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"))  # servers of a process share their buckets
    remote._connected.cache_clear()
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    try:
        yield files
    finally:
        server.stop()


def put(files: s3fs.S3FileSystem, source: Path, name: str) -> str:
    """Copies a file or folder into the bucket and returns its address."""
    files.put(str(source), f"bucket/{name}", recursive=source.is_dir())
    return f"s3://bucket/{name}"
