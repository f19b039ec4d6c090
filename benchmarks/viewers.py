"""People who look at a live server, each in a process of its own, over real sockets: steady ones, and one who never
reads what comes back."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Origin

from fastdiff_app.live import messages, pictures

ROOT = Path(__file__).parents[1]
SIDE = 64
AFTER_S = 2.0


@dataclass(frozen=True)
class Person:
    """Somebody with a camera.

    Attributes:
        fps: frames sent a second.
        seconds: how long for.
        skip_s: what was seen before that is left out.
        reads: whether pictures are received at all.
    """

    fps: float
    seconds: float
    skip_s: float = 0.0
    reads: bool = True


def watch(address: str, people: Sequence[Person]) -> list[list[float]]:
    """Ages of the pictures that each of them saw, in milliseconds by their own clocks; all begin together."""
    with ExitStack() as held:
        words = [sys.executable, "-m", "benchmarks.viewers", address]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        processes = [held.enter_context(subprocess.Popen([*words, json.dumps(asdict(one))], **pipes)) for one in people]
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a viewer could not connect")
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.communicate(timeout=120)[0]) for process in processes]


@contextmanager
def visit(address: str, **options: Any) -> Iterator[Any]:
    """A WebSocket as the page opens it, with the cookie that the page is given."""
    cookie = urllib.request.urlopen(f"http://{address}/metrics").headers["set-cookie"].split(";")[0]
    with connect(f"ws://{address}/live", origin=Origin(f"http://{address}"), additional_headers={"Cookie": cookie},
                 max_size=None, **options) as socket:  # fmt: skip
        yield socket


def _look(socket: Any, who: Person) -> list[float]:
    picture = pictures.encode(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
    taken: list[float] = []
    ages: list[float] = []
    began = time.perf_counter()

    def shoot() -> None:
        # who is shown out need not go on
        with contextlib.suppress(ConnectionClosed, OSError):
            for number in range(int(who.fps * who.seconds)):
                time.sleep(max(0.0, began + number / who.fps - time.perf_counter()))
                taken.append(time.perf_counter())
                # on one machine all processes read the same clock
                socket.send(messages.frame_in(number, 1000 * taken[-1], picture))

    thread = threading.Thread(target=shoot, daemon=True)
    thread.start()
    end = began + who.seconds + AFTER_S
    while who.reads and (left := end - time.perf_counter()) > 0:
        with contextlib.suppress(TimeoutError):
            data = socket.recv(timeout=left)
            if isinstance(data, str) or isinstance(found := messages.read_frame_out(data), int):
                continue
            now = time.perf_counter()
            age = 1000 * (now - taken[found[0]])
            socket.send(messages.painted(found[0], age))
            if now - began >= who.skip_s:
                ages.append(age)
    thread.join()
    return ages


def main() -> None:
    """``python -m benchmarks.viewers ADDRESS PERSON`` says ready, waits for a line, looks, and prints the ages."""
    who = Person(**json.loads(sys.argv[2]))
    # somebody who does not read has no room either
    with visit(sys.argv[1], **({} if who.reads else {"max_queue": 1})) as socket:
        while json.loads(socket.recv())["type"] != "hello":
            pass
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(_look(socket, who)), flush=True)
        if not who.reads:
            # a goodbye would wait for what is not read
            os._exit(0)


if __name__ == "__main__":
    main()
