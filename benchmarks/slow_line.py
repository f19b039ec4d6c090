"""A line that takes its time: TCP through a process of its own, every byte delayed by the same time each way.

It is a process because its delays must not depend on who else wants this interpreter, and it has threads that sleep
instead of an event loop, whose timers are whole milliseconds and always late. What it adds by itself is measured by
`alone_ms`, so that it is not taken for anybody else's delay.
"""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK = 64 * 1024


@contextmanager
def slow_line(port: int, delay_s: float) -> Iterator[int]:
    """Gives a port of this machine from which everything reaches `port` this much later, and the answers too."""
    words = [sys.executable, "-P", __file__, str(port), str(delay_s)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            # it ends when nobody holds the other end any more, so also when this process is killed
            process.stdin.close()
            process.wait(30)


def alone_ms(delay_s: float, size: int, fps: float, times: int) -> list[float]:
    """How long messages of this size take there and back over a line with nothing but an echo behind it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo, args=(server,), daemon=True).start()
        with slow_line(server.getsockname()[1], delay_s) as port, _connected(port) as line:
            sent: queue.SimpleQueue[float] = queue.SimpleQueue()
            threading.Thread(target=_send, args=(line, sent, size, fps, times), daemon=True).start()
            found = []
            for _ in range(times):
                began = sent.get()
                left = size
                while left:
                    left -= len(line.recv(min(left, CHUNK)))
                found.append(1000 * (time.perf_counter() - began))
    return found


def _send(line: socket.socket, sent: queue.SimpleQueue[float], size: int, fps: float, times: int) -> None:
    data, began = bytes(size), time.perf_counter()
    for number in range(times):
        time.sleep(max(0.0, began + number / fps - time.perf_counter()))
        sent.put(time.perf_counter())
        line.sendall(data)


def _echo(server: socket.socket) -> None:
    line, _ = server.accept()
    with line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := line.recv(CHUNK):
            line.sendall(data)


def _connected(port: int) -> socket.socket:
    line = socket.create_connection(("127.0.0.1", port))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def _carry(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """Everything from one end to the other, in order; what is on its way is not what holds the next byte up."""
    way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def collect() -> None:
        data = b"begin"
        while data:
            try:
                data = source.recv(CHUNK)
            except OSError:
                data = b""
            way.put((time.perf_counter() + delay_s, data))

    threading.Thread(target=collect, daemon=True).start()
    while True:
        due, data = way.get()
        time.sleep(max(0.0, due - time.perf_counter()))
        try:
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)
        except OSError:
            with suppress(OSError):
                source.shutdown(socket.SHUT_RD)
            return


def main() -> None:
    """``slow_line.py PORT SECONDS`` prints the port it listens on, and ends when its standard input does."""
    port, delay_s = int(sys.argv[1]), float(sys.argv[2])
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    # an answer that is short must not wait behind a thread that has nothing to do but to keep the interpreter
    sys.setswitchinterval(0.0005)

    def accept() -> None:
        while True:
            near, _ = server.accept()
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far = _connected(port)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=_carry, args=(*ends, delay_s), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
