"""`fastdiff demo`: serves the page."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path

from fastdiff_app.console import err
from fastdiff_app.failures import ExitCode, Failure, is_installed, one_line, require_torch

PROMPT = "a big yellow square on a plain black background"
STEPS, STRENGTH = 2, 0.75


def demo(
    host: str,
    port: int,
    auth: str | None,
    https: bool,
    max_users: int,
    model: str | None,
    plan: str | None,
    target_ms: float | None,
    record: Path | None,
    size: tuple[int, int] | None,
) -> None:
    """Runs until it is interrupted."""
    require_torch()
    missing = [one for one in ("gradio", "websockets", "prometheus_client") if not is_installed(one)]
    if https and not is_installed("cryptography"):
        missing.append("cryptography")
    if missing:
        raise Failure(ExitCode.MISSING, f"this needs {', '.join(missing)}: python -m pip install 'fastdiff[demo]'")
    if auth is not None and (auth.count(":") < 1 or auth.startswith(":") or auth.endswith(":")):
        raise Failure(ExitCode.USAGE, "--auth is USER:PASSWORD")
    if not 1 <= max_users <= 1000 or not 0 <= port <= 65535:
        raise Failure(ExitCode.USAGE, "--max-users is 1 to 1000 and --port 0 to 65535")
    if target_ms is not None and not 1 <= target_ms <= 60_000:
        raise Failure(ExitCode.USAGE, "--target-ms is 1 to 60000")
    import uvicorn

    from fastdiff_app.live import pictures
    from fastdiff_app.live.model import LiveModel
    from fastdiff_app.live.server import Serving, build, certificate, is_local
    from fastdiff_pipelines.settings import Settings

    user = None if auth is None else tuple(auth.split(":", 1))
    serving = Serving(host, port, user, https, max_users, record)  # type: ignore[arg-type]
    with ExitStack() as held:
        # before the model is loaded, which may take minutes
        listening = held.enter_context(_listening(host, port))
        port = listening.getsockname()[1]
        settings = Settings(PROMPT, steps=STEPS, strength=STRENGTH)
        try:
            live = held.enter_context(LiveModel(model, settings, plan, size, target_ms))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise Failure(ExitCode.MODEL, f"no live session of this model: {one_line(error)}") from error
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="fastdiff-", ignore_cleanup_errors=True)))
        # what people upload and make is gone when the program ends
        os.environ.setdefault("GRADIO_TEMP_DIR", str(folder / "pictures"))
        options: dict[str, str] = {}
        if https:
            key, made = held.enter_context(certificate(host, folder))
            options = {"ssl_keyfile": key, "ssl_certfile": made}
        _advise(serving.host, port, https, auth is not None, is_local(host))
        config = uvicorn.Config(
            build(live, serving),
            log_level="warning",
            ws_per_message_deflate=False,
            ws_max_size=2 * pictures.MOST_BYTES,
            timeout_graceful_shutdown=3,
            **options,  # type: ignore[arg-type]
        )
        uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that nobody else has; port 0 is any that is free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        # whoever comes before the page is ready waits and is not refused
        made.listen()
    except OSError as error:
        reason = error.strerror or str(error)
        raise Failure(ExitCode.USAGE, f"cannot listen on {host}:{port} ({reason}); choose another --port") from error
    return made


def _advise(host: str, port: int, https: bool, locked: bool, local: bool) -> None:
    scheme = "https" if https else "http"
    err.print(f"{scheme}://{host}:{port}  (Ctrl-C ends it)", markup=False)
    if https:
        err.print("the certificate is signed by this program itself: browsers warn once, then let you go on")
    elif not local:
        err.print("browsers give no camera to plain http from another machine; --https makes a certificate")
    if not local and not locked:
        err.print("anybody who can reach this machine may use it; --auth USER:PASSWORD locks it", style="yellow")
