"""Who may ask: whoever has the token, by a name of this server, from a page of its own.

Loopback alone keeps nobody out: other users of the machine reach it, and so does any page that a browser shows, by a
form, an image, or a name that is made to lead to 127.0.0.1.
"""

import contextlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_ONLY_ASKS = "/plan/table"  # with the card in its body, and writes nothing
_OPEN = {"/healthz", "/static/style.css", "/static/studio.css", "/static/studio.js"}  # tell nothing of the user's
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a request has to show. `host` is what the server is bound to, `origin` its public address, if any."""

    token: str
    host: str
    port: int
    origin: str | None = None
    read_only: bool = False

    @property
    def cookie(self) -> str:
        return f"sd3pipe_{self.port}"  # cookies do not tell ports apart

    def refusal(self, method: str, path: str, headers: Mapping[str, str], query: str) -> str:
        """Returns why a request is refused, "" where it is not."""
        if not self._is_ours(_host_name(headers.get("host", ""))):
            return "this name is none of the studio's: start it with --origin URL to reach it by another"
        if not self._may_come_from(headers):
            return "another site's page asked for this"
        if path in _OPEN:
            return ""
        if not self._has_token(headers, query):
            return "the token is missing or another: open the address that the studio printed when it started"
        if self.read_only and method not in ("GET", "HEAD") and not path.endswith(_ONLY_ASKS):
            return "the studio was started with --read-only"
        return ""

    def takes_token(self, query: str) -> bool:
        """Whether the address itself brought the token, so that a cookie is to be set."""
        return any(self._is_token(token) for token in parse_qs(query).get("token", ()))

    def _is_ours(self, name: str) -> bool:
        named = {self.host, urlsplit(self.origin).hostname} if self.origin else {self.host}
        if name in _LOOPBACK | named:
            return True
        return self.host not in _LOOPBACK and _is_address(name)  # no name leads here, so none is rebound

    def _may_come_from(self, headers: Mapping[str, str]) -> bool:
        origin = headers.get("origin")
        if origin is not None:
            schemes = ("http", "https") if self.origin else ("http",)  # a proxy may keep the name and add TLS
            return origin == self.origin or origin in {f"{scheme}://{headers.get('host')}" for scheme in schemes}
        site = headers.get("sec-fetch-site", "none")
        return site in ("none", "same-origin") or headers.get("sec-fetch-mode") == "navigate"

    def _has_token(self, headers: Mapping[str, str], query: str) -> bool:
        if self.takes_token(query):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return True
        cookies: SimpleCookie = SimpleCookie()
        with contextlib.suppress(CookieError):
            cookies.load(headers.get("cookie", ""))
        return self.cookie in cookies and self._is_token(cookies[self.cookie].value)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.token.encode())


class Guard:
    """Asks `Access` before the application sees a request, and adds the headers that bind the browser."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets here
        headers, query = Headers(scope=scope), scope["query_string"].decode("latin-1")
        reason = self._access.refusal(scope["method"], scope["path"], headers, query)
        sets_cookie = not reason and self._access.takes_token(query)

        async def send_bound(message: Message) -> None:
            if message["type"] == "http.response.start":
                bound = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    bound.setdefault(name, value)  # a page that stands alone brings a policy of its own
                bound.setdefault("cache-control", "no-store")
                if sets_cookie:
                    bound.append("set-cookie", self._set_cookie(headers))
            await send(message)

        app = PlainTextResponse(f"{reason}\n", 403) if reason else self._app
        await app(scope, receive, send_bound)

    def _set_cookie(self, headers: Mapping[str, str]) -> str:
        public = urlsplit(self._access.origin or "")
        is_public = public.scheme == "https" and _host_name(headers.get("host", "")) == public.hostname
        secure = "; Secure" if is_public else ""
        return f"{self._access.cookie}={self._access.token}; Path=/; HttpOnly; SameSite=Strict{secure}"


def _host_name(host: str) -> str:
    """Returns the name in a Host header, which may have a port, and brackets around an IPv6 address."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
