"""`sd3pipe report`: one page about a run, or about two side by side."""

from sd3pipe.console import say
from sd3pipe.errors import ParameterError
from sd3pipe.files import write_text
from sd3pipe.params.report import ReportParams
from sd3pipe.reporting.collect import read_run
from sd3pipe.reporting.page import render


def main(params: ReportParams) -> None:
    """Writes the page and prints where it is."""
    if not 1 <= len(params.runs) <= 2:
        raise ParameterError(f"report: {len(params.runs)} runs given: it is about one, or compares two")
    out = params.out or params.runs[0] / "report.html"
    write_text(out, render([read_run(folder) for folder in params.runs]))
    say(str(out))
