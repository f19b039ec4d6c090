"""Where live pictures go: folders, transport streams, an RTMP server, a virtual camera."""

import contextlib
import io
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from fastdiff_app import images
from fastdiff_app.failures import ExitCode, Failure
from fastdiff_app.live.sinks import sink


def test_raw_pictures_and_folders_are_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    with sink(str(tmp_path / "out"), 30, 8, 8) as write:
        write(picture)
    assert np.array_equal(np.asarray(images.read_image(tmp_path / "out" / "000000.png")), picture)
    monkeypatch.delenv("DISPLAY", raising=False)
    for wrong in ("ftp://x", "file.gif", "window", "virtual"):
        with pytest.raises(Failure), sink(wrong, 30, 8, 8):
            pass


def test_pictures_travel_as_a_transport_stream() -> None:
    received = bytearray()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        with sink(f"udp://127.0.0.1:{listening.getsockname()[1]}", 30, 64, 64) as write:
            for level in range(0, 200, 20):
                write(np.full((64, 64, 3), level, np.uint8))
        listening.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                received += listening.recv(65536)
    with av.open(io.BytesIO(bytes(received)), "r", format="mpegts") as container:
        means = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert len(means) == 10
    assert means == sorted(means)


def _command(name: str, number: float, *values: object) -> bytes:
    """A command as RTMP has it, small enough to be one chunk: AMF0 strings, numbers, None and dictionaries."""

    def amf(value: object) -> bytes:
        if value is None:
            return b"\x05"
        if isinstance(value, dict):
            parts = [struct.pack(">H", len(key)) + key.encode() + amf(one) for key, one in value.items()]
            return b"\x03" + b"".join(parts) + b"\x00\x00\x09"
        if isinstance(value, str):
            return b"\x02" + struct.pack(">H", len(value)) + value.encode()
        assert isinstance(value, float)
        return b"\x00" + struct.pack(">d", value)

    body = b"".join(map(amf, (name, number, *values)))
    return b"\x03" + bytes(3) + len(body).to_bytes(3, "big") + b"\x14" + bytes(4) + body


def _serve_rtmp(listening: socket.socket, received: bytearray) -> None:
    """As much of a server as a sender needs to hear: every answer when its question has come."""
    published = {"level": "status", "code": "NetStream.Publish.Start"}
    answers = [
        (b"createStream", _command("_result", 4.0, None, 1.0)),
        (b"publish", _command("onStatus", 0.0, None, published)),
    ]
    line, _ = listening.accept()
    with line:
        while len(received) < 1 + 1536:
            received += line.recv(65536)
        line.sendall(b"\x03" + bytes(1536) + received[1:1537])
        del received[:]
        waiting = [(b"connect", _command("_result", 1.0, None, {"code": "NetConnection.Connect.Success"})), *answers]
        while data := line.recv(65536):
            received += data
            while waiting and waiting[0][0] in received:
                line.sendall(waiting.pop(0)[1])


def test_pictures_are_sent_to_an_rtmp_server(clip: Path) -> None:
    received = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=_serve_rtmp, args=(listening, received))
        server.start()
        address = f"rtmp://127.0.0.1:{listening.getsockname()[1]}/live/x"
        words = ["stream", "--model", "identity", "--size", "64", "--source", str(clip), "--sink", address]
        # a process of its own, as PyAV keeps the interpreter to itself while it opens an address
        ran = subprocess.run([sys.executable, "-m", "fastdiff_app.cli", *words], capture_output=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        server.join()
    # H.264 in FLV: the decoder's settings, then a key frame
    assert received.find(b"\x17\x00\x00\x00\x00\x01") < received.find(b"\x17\x01\x00\x00\x00")
    assert b"\x17\x00\x00\x00\x00\x01" in received


def test_an_address_that_ffmpeg_does_not_know_says_which_ones_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*words: object, **options: object) -> None:
        raise av.ProtocolNotFoundError(1, "Protocol not found")

    monkeypatch.setattr(av, "open", unknown)
    with pytest.raises(Failure, match="knows no srt; send to rtmp or udp"), sink("srt://127.0.0.1:9", 30, 64, 64):
        pass


def _virtual_camera(folder: Path, send: str) -> None:
    (folder / "pyvirtualcam.py").write_text(
        "class Camera:\n"
        "    closed = False\n"
        "    def __init__(self, width, height, fps):\n"
        "        if fps > 100: raise RuntimeError('no loopback device')\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): Camera.closed = True\n"
        f"    def send(self, picture): {send}\n"
    )


def test_a_virtual_camera_answers_for_its_own_errors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _virtual_camera(tmp_path, "raise RuntimeError('unplugged')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Failure, match="no virtual camera: no loopback"), sink("virtual", 200, 8, 8):
        pass
    with pytest.raises(Failure, match="takes no picture: unplugged") as caught, sink("virtual", 25, 8, 8) as write:
        write(np.zeros((8, 8, 3), np.uint8))
    assert caught.value.code == ExitCode.OUTPUT
    with pytest.raises(RuntimeError, match="out of memory"), sink("virtual", 25, 8, 8):
        raise RuntimeError("CUDA out of memory")
    assert sys.modules.pop("pyvirtualcam").Camera.closed


@pytest.mark.parametrize("error", [OSError("the source is gone"), ValueError("a mistake")])
def test_an_address_answers_for_its_own_errors_only(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, sink("udp://127.0.0.1:9", 30, 64, 64):
        raise error
    assert caught.value is error


def test_an_address_that_goes_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", _gone)
    with pytest.raises(Failure, match="cannot send to udp"), sink("udp://127.0.0.1:9", 30, 64, 64) as write:
        write(np.zeros((64, 64, 3), np.uint8))


def _gone(*words: object, **options: object) -> None:
    raise BrokenPipeError(32, "Broken pipe")


def test_a_virtual_camera_gets_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyvirtualcam.py").write_text(
        "class Camera:\n"
        "    sent = []\n"
        "    def __init__(self, width, height, fps): Camera.asked = (width, height, fps)\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): pass\n"
        "    def send(self, picture): Camera.sent.append(picture)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    picture = np.zeros((8, 16, 3), np.uint8)
    with sink("virtual", 25, 8, 16) as write:
        write(picture)
    camera = sys.modules.pop("pyvirtualcam").Camera
    assert camera.asked == (16, 8, 25)
    assert camera.sent[0] is picture
