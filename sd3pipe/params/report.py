"""Options of `sd3pipe report`."""

from sd3pipe.params.fields import NewFilePath, OptionPath, Params, option


class ReportParams(Params):
    runs: tuple[OptionPath, ...] = option(
        ..., "One run folder, or two to compare.", positional=True, role="path", paths_key="run"
    )
    out: NewFilePath | None = option(
        None, "File to write; default: report.html in the first run's folder.", role="path"
    )
