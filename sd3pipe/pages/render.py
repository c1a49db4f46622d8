"""Pages as one HTML file that needs nothing else. What a template prints is escaped, whoever wrote it."""

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sd3pipe.console import version


def render(template: str, **values: Any) -> str:
    """Returns the page that a template below sd3pipe/ makes; bytes of a file name that are no UTF-8 show as \\udcNN."""
    page = _ENVIRONMENT.get_template(template).render(version=version(), **values)
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def data_url(picture: bytes, kind: str) -> str:
    """Returns a picture of a kind ('png', 'jpeg', 'webp') as an address that holds the picture itself."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def _shown(value: Any) -> Any:
    """Returns a value as a page shows it: five digits, lists and tables in words, nothing for None."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return ", ".join(str(_shown(item)) for item in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return "" if value is None else value


def _csp_hash(text: str) -> str:
    """Returns the name by which a page's policy allows this very style or script, and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("sd3pipe", ""),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=_shown,
    extensions=["jinja2.ext.do"],
)
_ENVIRONMENT.filters["csp_hash"] = _csp_hash
