"""A line that takes its time: TCP through this process, every byte delayed by the same time each way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK = 64 * 1024


@contextmanager
def slow_line(port: int, delay_s: float) -> Iterator[int]:
    """Gives a port of this machine from which everything reaches `port` this much later, and the answers too."""
    loop = asyncio.new_event_loop()
    started = threading.Event()
    found: list[int] = []
    stop = asyncio.Event()

    async def serve() -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            # at the end everything is cancelled, which the server that began this need not hear of
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(_carry(reader, far_writer, delay_s), _carry(far_reader, writer, delay_s))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        found.append(server.sockets[0].getsockname()[1])
        started.set()
        await stop.wait()
        server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    started.wait()
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Everything from one end to the other, in order; what is on its way is not what holds the next byte up."""
    loop = asyncio.get_running_loop()
    way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await way.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    async def collect() -> None:
        while data := await reader.read(CHUNK):
            way.put_nowait((loop.time() + delay_s, data))
        way.put_nowait((loop.time() + delay_s, b""))

    try:
        await asyncio.gather(collect(), deliver())
    except OSError:
        writer.close()
