"""Opens a page in a headless Chromium, in a frame of any width (a window has a least one), and asks it something."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=2000",
)  # fmt: skip
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def ask(page: str, script: str, folder: Path, *, width: int = 1200, dark: bool = False) -> Any:
    """Returns what `script`, the body of a function of the loaded page's `document`, returns as JSON.

    `folder` gets the browser's files, among them net.json, the log of what it asked the network for.
    """
    frame = f'<iframe id="page" width="{width}" height="900" style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
    answer = f"((document) => {{ {script} }})(window.page.contentDocument)"
    outer = f"<title></title>{frame}<script>onload = () => {{ document.title = JSON.stringify({answer}); }}</script>"
    file = folder / "outer.html"
    file.write_text(f'<!doctype html><meta charset="utf-8">{outer}', encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    places = (f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}", scheme)
    command = [str(CHROMIUM), *FLAGS, *places, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stdout
    return json.loads(html.unescape(title[1]))
