"""Refuse what other sites send to the page that this machine serves: cross-site requests, and DNS rebinding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

_NAMES = ("127.0.0.1", "localhost")


class SameSiteOnly:
    """Answer 403, as ASGI middleware, unless a request names this machine and comes from its page or from no page.

    A browser hides the answer to a cross-site request from the site, but sends the request; and a site whose name
    points to this machine is not another site to a browser.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or is_own(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page answers only itself"})


def is_own(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Check that the Host is this machine, and that an Origin is the same host and port.

    Example:
        >>> is_own([(b"host", b"127.0.0.1:7860"), (b"origin", b"http://127.0.0.1:7860")])
        True
        >>> is_own([(b"host", b"127.0.0.1:7860"), (b"origin", b"https://example.org")])
        False
        >>> is_own([(b"host", b"example.org:7860"), (b"origin", b"http://example.org:7860")])
        False
    """
    found = {name.lower(): value.decode("latin-1") for name, value in headers}
    host, origin = found.get(b"host", ""), found.get(b"origin")
    try:
        is_here = urlsplit(f"//{host}").hostname in _NAMES
        return is_here and (origin is None or urlsplit(origin).netloc == host)
    except ValueError:  # a malformed address
        return False
