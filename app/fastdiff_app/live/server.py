"""One process for everything: Gradio's page, the live WebSocket, /health and /metrics."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, WebSocket
from fastapi.responses import JSONResponse, Response

import fastdiff
from fastdiff_app.live import pictures
from fastdiff_app.live.gate import LOCAL, Gate
from fastdiff_app.live.metrics import exposition
from fastdiff_app.live.model import NO_REPLAY, LiveModel
from fastdiff_app.live.socket import BUSY, Viewer
from fastdiff_pipelines.live import LiveSession, LiveWorker, Recording
from fastdiff_pipelines.live.energy import energy_meter


@dataclass(frozen=True)
class Serving:
    """How a server is reached and what it allows.

    Attributes:
        auth: user and password, None for none.
        max_users: viewers at a time.
        recordings: folder for recordings; None refuses them.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    auth: tuple[str, str] | None = None
    https: bool = False
    max_users: int = 4
    recordings: Path | None = None


class Live:
    """The sessions of one model, and what the routes say about them."""

    def __init__(self, model: LiveModel, serving: Serving):
        self.model, self.serving = model, serving
        self.worker = LiveWorker(energy=energy_meter())
        self.started = time.time()
        self.viewers = 0
        self.refused = 0
        # Gradio's handlers run in threads, the WebSocket's in the event loop
        self._lock = threading.Lock()

    def session(self, **options: Any) -> LiveSession:
        """A new viewer's session."""
        usual = {"unpack": pictures.decode, "pack": pictures.encode, "acknowledged": True}
        return LiveSession(
            self.model.open,
            self.model.controls(),
            controller=self.model.controller(),
            lora=self.model.lora,
            **(usual | options),
        )

    def enter(self) -> None:
        """Take one of the places, or ValueError where there is none."""
        with self._lock:
            if self.viewers < self.serving.max_users:
                self.viewers += 1
                return
            self.refused += 1
        raise ValueError(f"{self.viewers} people are here already, which is all this server allows; try again later")

    def leave(self) -> None:
        """Give a place back."""
        with self._lock:
            self.viewers -= 1

    def record(self, session: LiveSession, on: bool) -> str | None:
        """Start or end a recording; the file's name."""
        if self.serving.recordings is None:
            raise ValueError("recording is off here; start with --record FOLDER")
        if on and not self.model.replays:
            raise ValueError(NO_REPLAY)
        current = session.recording
        if not on:
            session.record(None)
            return current.path.name if current is not None else None
        if current is not None:
            raise ValueError("this session is being recorded already")
        self.serving.recordings.mkdir(parents=True, exist_ok=True)
        path = self.serving.recordings / f"{time.strftime('%Y%m%d-%H%M%S')}-{id(session) % 10000:04}.fdrec"
        about = {"model": self.model.name, "plan": self.model.plan, "size": self.model.size}
        session.record(Recording(path, about | {"settings": self.model.options()}))
        return path.name

    async def serve(self, socket: WebSocket) -> None:
        """A viewer's WebSocket, from hello to goodbye."""
        await socket.accept()
        try:
            self.enter()
        except ValueError as error:
            await socket.send_json({"type": "error", "fatal": True, "message": str(error)})
            await socket.close(BUSY, "busy")
            return
        try:
            viewer = Viewer(socket, self.worker, self.session, self.record, self.model.size or (512, 512))
            await socket.send_json(self.hello())
            await viewer.serve()
        finally:
            self.leave()

    def hello(self) -> dict[str, Any]:
        """What a page must know before it begins."""
        height, width = self.model.size or (0, 0)
        return {
            "type": "hello",
            "model": self.model.title,
            "height": height,
            "width": width,
            "fps": round(1000 / self.model.interval_ms, 3),
            "settings": {"prompt": self.model.settings.prompt, **self.model.options()},
            "video": self.model.rollout is not None,
            "adapters": self.model.lora.scales if self.model.lora is not None else {},
            "conditions": self.model.conditions,
            "target_ms": self.model.target_ms,
            "records": self.serving.recordings is not None and self.model.replays,
        }

    def health(self) -> dict[str, Any]:
        """Ready, on what, and how long ago the last frame was."""
        last = self.worker.last_frame
        return {
            "ready": True,
            "model": self.model.title,
            "version": fastdiff.__version__,
            "viewers": self.viewers,
            "last_frame_age_s": None if last is None else round(self.worker.clock() - last, 3),
        }


def build(model: LiveModel, serving: Serving, page: bool = True) -> Any:
    """The ASGI application. Without `page` there is only the transport.

    Attributes of the result's `state`: `live`.
    """
    live = Live(model, serving)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        # a collection over everything that torch and Gradio made would hold the loop up for a tenth of a second
        gc.collect()
        gc.freeze()
        with live.worker:
            yield
        gc.unfreeze()

    app = FastAPI(lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.live = live

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse(live.health())

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(live), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/ledger")
    def ledger() -> JSONResponse:
        return JSONResponse([session.summary() for session in live.worker.sessions])

    @app.websocket("/live")
    async def socket(socket: WebSocket) -> None:
        await live.serve(socket)

    if page:
        from fastdiff_app.live.page import mount

        app = mount(app, live)
    hosts = None if serving.host in ("0.0.0.0", "::") else frozenset({serving.host})
    gated = Gate(app, serving.auth, hosts, serving.https)
    gated.live = live  # type: ignore[attr-defined]
    return gated


def is_local(host: str) -> bool:
    """Whether only this machine can reach a host."""
    return host in LOCAL


@contextmanager
def certificate(host: str, folder: Path) -> Iterator[tuple[str, str]]:
    """A key and a certificate for this host, signed by itself, good for a year: files that vanish with the block."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fastdiff")])
    alternatives: list[x509.GeneralName] = [
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    try:
        alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
    except ValueError:
        alternatives.append(x509.DNSName(host))
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=365))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    parts = {
        "key.pem": key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain),
        "certificate.pem": made.public_bytes(serialization.Encoding.PEM),
    }
    paths = [folder / file for file in parts]
    try:
        for path, data in zip(paths, parts.values(), strict=True):
            path.touch(mode=0o600)
            path.write_bytes(data)
        yield str(paths[0]), str(paths[1])
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
