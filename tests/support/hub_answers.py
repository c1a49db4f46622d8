"""What huggingface_hub's errors carry, for hubs that are no more than a folder."""

import inspect
import sys
from typing import Any

from huggingface_hub import errors


def response(status: int) -> Any:
    """Returns an answer of the hub, built by the HTTP library that this huggingface_hub uses."""
    library = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]
    assert "response" in inspect.signature(errors.HfHubHTTPError.__init__).parameters
    return library.Response(status, request=library.Request("GET", "https://hub.invalid/x"))
