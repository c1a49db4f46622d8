"""The pages that `report`, `judge` and `check-captions` write, made anew from what they found: no HTML is read."""

import re

from starlette.responses import HTMLResponse, Response

from sd3pipe.caption_findings import read_findings
from sd3pipe.judgement import read_judgement
from sd3pipe.judging.caption_page import render_findings
from sd3pipe.judging.page import render as render_judgement
from sd3pipe.reporting.collect import read_run
from sd3pipe.reporting.page import render as render_report
from sd3pipe.studio.app import Ask
from sd3pipe.studio.gallery import caption_check_file
from sd3pipe.studio.places import judge_folder
from sd3pipe.studio.runs import RunView, run_place

_POLICY = re.compile(r'http-equiv="Content-Security-Policy"\s+content="([^"]+)"')


def report(ask: Ask) -> Response:
    return _shown(render_report([read_run(RunView(run_place(ask.project, ask.query.get("run", ""))).folder)]))


def judgement(ask: Ask) -> Response:
    folder = judge_folder(ask.project, run_place(ask.project, ask.query.get("run", "")))
    return _shown(render_judgement(read_judgement(folder), folder))


def captions(ask: Ask) -> Response:
    return _shown(render_findings(read_findings(caption_check_file(ask.project))))


def _shown(page: str) -> Response:
    """Returns a page under its own policy: its one style and script, known by their hashes, instead of the studio's."""
    found = _POLICY.search(page)
    assert found is not None, "the frame of pages has a policy"
    policy = f"{found[1]}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return HTMLResponse(page, headers={"content-security-policy": policy})
