"""Options of `sd3pipe studio`."""

from sd3pipe.params.fields import OptionPath, Params, option

_SERVING = "Serving"


class StudioParams(Params):
    projects: tuple[OptionPath, ...] = option(
        (), "Folders of projects; default: the one around the current folder, and those opened before.",
        positional=True, role="path",
    )  # fmt: skip
    port: int = option(8400, "Port; the next free one where it is taken.", panel=_SERVING, ge=0, le=65535)
    host: str = option("127.0.0.1", "Address to bind; others than loopback are open to the network.", panel=_SERVING)
    origin: str | None = option(
        None, "Public address behind a tunnel or proxy, such as https://studio.example.org.",
        panel=_SERVING, pattern=r"^https?://[^/\s]+$",
    )  # fmt: skip
    read_only: bool = option(False, "Show everything, change nothing and start nothing.", panel=_SERVING)
    open: bool = option(True, "Open the page in a browser.", panel=_SERVING)
    queue_only: bool = option(
        False, "Serve nothing: work off the queue, then end.", panel=_SERVING, advanced=True, trust="typed"
    )
