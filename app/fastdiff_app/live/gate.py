"""Who may come in: names this server answers to, a password where one is asked for, and pages of ours only.

Browsers let any page open a WebSocket to any host, with cookies, so a password alone protects nothing: the page's
origin must be this server, and the socket must show the cookie that this server's page was given.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

COOKIE = "fastdiff"
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health"})


class Gate:
    """ASGI middleware in front of everything, Gradio's own routes included.

    Args:
        app: what it protects.
        auth: user and password, None for none.
        hosts: names besides this machine's own that `Host` may show; None answers to every name, which is right only
            where the server is meant to be reached by names it does not know.
        secure: whether the page is served over HTTPS.
    """

    def __init__(self, app: Any, auth: tuple[str, str] | None, hosts: frozenset[str] | None, secure: bool):
        self.app, self.auth, self.secure = app, auth, secure
        self.hosts = None if hosts is None else hosts | LOCAL
        self.key = secrets.token_urlsafe(24)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        wrong = self._refusal(scope, headers)
        if wrong is None:
            # what anybody may read must not hand out the key to what only some may
            shown = scope["type"] == "http" and scope["path"] not in OPEN_PATHS
            await self.app(scope, receive, self._with_cookie(send) if shown else send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": wrong[1]})
        else:
            await _answer(send, *wrong)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            return 421, "this server does not answer to that name; start it with --host NAME"
        if scope["type"] == "websocket":
            if _origin(headers) != headers.get("host", "").lower():
                return 403, "only a page of this server may open this socket"
            return None if self._has_cookie(headers) else (403, "open the page first")
        if self.auth is None or scope["path"] in OPEN_PATHS or self._has_password(headers):
            return None
        return 401, "a user and a password are needed"

    def _has_cookie(self, headers: dict[str, str]) -> bool:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self.key.encode())

    def _has_password(self, headers: dict[str, str]) -> bool:
        kind, _, word = headers.get("authorization", "").partition(" ")
        if kind.lower() != "basic" or self.auth is None:
            return False
        try:
            given = base64.b64decode(word, validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(given, ":".join(self.auth).encode())

    def _with_cookie(self, send: Any) -> Any:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                flags = "; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if self.secure else "")
                cookie = (b"set-cookie", f"{COOKIE}={self.key}{flags}".encode())
                message = {**message, "headers": [*message.get("headers", []), cookie]}
            await send(message)

        return sending


def _origin(headers: dict[str, str]) -> str | None:
    """Host and port of the page that asks; None where no page says so."""
    try:
        return urlsplit(headers.get("origin", "")).netloc.lower() or None
    except ValueError:
        return None


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="fastdiff"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
