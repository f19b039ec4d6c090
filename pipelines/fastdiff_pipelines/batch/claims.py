"""Who works on what: leases as files, so that any number of processes on any machines sharing a folder can share a job.

The claim of generation g on a key is the file `<key>.<g>`, a hard link to its owner's card, so that making it is one
step which fails where the name is taken. Stealing from a dead owner is making `<key>.<g+1>`: of several thieves exactly
one succeeds, and nothing alive is ever renamed or removed by others. So g counts how many workers died with the key in
hand. Whoever got a claim looks into the manifest again before working:
an owner writes there first and releases afterwards.
"""

import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def host_identity() -> str:
    """Names the machine, its boot and its process namespace; a process id means something only inside all three."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "|".join(parts)


def started_at(process: int) -> str | None:
    """When a process of this machine started, as the kernel counts; None when it is gone or nobody can tell."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    # the name in brackets may hold spaces; state and start time are fields 3 and 22
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def tidy(folder: Path, settled: Container[str]) -> None:
    """Removes what killed workers left: claims on settled keys, which mean nothing, and cards without any claim."""
    for path in [*folder.glob("*.*"), *folder.glob("card-*")]:
        if path.stem in settled or (path.name.startswith("card-") and path.stat().st_nlink == 1):
            path.unlink(missing_ok=True)


def worker_name() -> str:
    """A name no process had before."""
    host = "".join(letter if letter.isalnum() else "-" for letter in socket.gethostname())[:32]
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Claims:
    """The claims of one worker, and its view of those of others.

    Args:
        folder: shared by all workers of the job.
        worker: this worker's name.
        lease_s: an owner that does not show a sign of life for so long has lost its claims. Longer than the clock of
            the file system needs to reach other machines; on one machine a dead process is noticed at once.
        clock: seconds, of this process only: clocks of different machines are never compared.
    """

    def __init__(self, folder: Path, worker: str, lease_s: float = 60.0, clock: Callable[[], float] = time.monotonic):
        if not lease_s > 0:
            raise ValueError(f"lease_s must be above 0, not {lease_s}")
        self.folder, self.worker, self.lease_s, self.clock = folder, worker, lease_s, clock
        self.held: dict[str, int] = {}
        self._host = host_identity()
        self._card = json.dumps(
            {
                "worker": worker,
                "host": self._host,
                "process": os.getpid(),
                "started": started_at(os.getpid()),
            }
        )
        self._card_path = folder / f"card-{worker}"
        self._latest: dict[str, int] = {}
        self._sign: dict[str, tuple[int, float]] = {}

    def look(self) -> None:
        """Reads which claims there are."""
        latest: dict[str, int] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                key, _, generation = entry.name.rpartition(".")
                if key and generation.isdecimal():
                    latest[key] = max(latest.get(key, 0), int(generation))
        self._latest = latest
        names = {f"{key}.{generation}" for key, generation in latest.items()}
        self._sign = {name: sign for name, sign in self._sign.items() if name in names}

    def generation(self, key: str) -> int | None:
        """The generation `take` would try to get, or None while somebody else is at it."""
        if key not in self._latest:
            return 0
        generation = self._latest[key]
        return generation + 1 if self._is_stale(f"{key}.{generation}") else None

    def take(self, key: str) -> int | None:
        """Claims a key; its generation where that succeeded, None where somebody else has it."""
        generation = self.generation(key)
        if generation is None or key in self.held:
            return None
        path = self._path(key, generation)
        try:
            self._make(path)
        except FileExistsError:
            self._latest[key] = max(self._latest.get(key, 0), generation)
            return None
        self._latest[key] = self.held[key] = generation
        return generation

    def _make(self, path: Path) -> None:
        if not self._card_path.exists():
            self._card_path.write_text(self._card, "utf-8")
        try:
            os.link(self._card_path, path)
            return
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        # two steps where the file system knows no links; whoever dies between them is told by time alone
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            os.write(handle, self._card.encode())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    def is_lost(self, key: str) -> bool:
        """Whether somebody has taken a held claim over, which happens to a process that was stopped for too long."""
        return key not in self.held or self._path(key, self.held[key] + 1).exists()

    def release(self, keys: Iterable[str]) -> None:
        """Gives claims back, with those of dead owners before them."""
        for key in list(keys):
            generation = self.held.pop(key, -1)
            for earlier in range(generation + 1):
                with suppress(FileNotFoundError):
                    self._path(key, earlier).unlink()
            self._latest.pop(key, None)

    def close(self) -> None:
        """Gives everything back; the worker is gone without a trace."""
        self.release(self.held)
        self._card_path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leaves all claims lying, as dying would."""
        self.held.clear()

    def beat(self) -> None:
        """Shows a sign of life for everything held."""
        for key, generation in list(self.held.items()):
            with suppress(FileNotFoundError):
                os.utime(self._path(key, generation))

    def _path(self, key: str, generation: int) -> Path:
        return self.folder / f"{key}.{generation}"

    def _is_stale(self, name: str) -> bool:
        path = self.folder / name
        try:
            stamp, text = path.stat().st_mtime_ns, path.read_bytes()
        except FileNotFoundError:
            return False
        # where there are no links, an owner may be between making and signing its claim, or have died there
        card = json.loads(text) if text.endswith(b"}") else {}
        ours = card.get("host") == self._host and card.get("started") is not None
        if ours and started_at(card["process"]) != card["started"]:
            return True
        seen, since = self._sign.get(name, (None, 0.0))
        if seen != stamp:
            self._sign[name] = (stamp, self.clock())
            return False
        return self.clock() - since > self.lease_s
