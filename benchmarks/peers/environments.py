"""`make peers`: other people's published software, each in an environment of its own under .peers/.

They pin versions that cannot live beside ours. An environment that is complete is left alone.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".peers"
PEERS = {
    # its own pins are older than what it runs with; these are the newest that it does
    "streamdiffusion": (
        "streamdiffusion==0.1.1",
        "diffusers==0.24.0",
        "transformers<4.40",
        "huggingface_hub<0.24",
        "peft==0.6.0",
        "accelerate==0.25.0",
        "numpy<2",
        "torch==2.13.0",
    ),
    # these pin nothing, so they get what fastdiff itself is measured with
    "deepcache": ("DeepCache==0.1.1", "diffusers==0.42.1", "transformers>=5,<6", "accelerate", "torch==2.13.0"),
    "torchao": ("torchao==0.18.0", "torch==2.13.0"),
    "cache-dit": ("cache-dit==1.5.3", "diffusers==0.42.1", "transformers>=5,<6", "accelerate", "torch==2.13.0"),
}


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment; FileNotFoundError with the remedy where it is not made."""
    python = FOLDER / peer / "bin" / "python"
    if not (FOLDER / peer / "complete").exists():
        raise FileNotFoundError(f"{peer} is not installed: make peers")
    return python


def make(peer: str) -> None:
    """Creates one environment and installs the peer into it, with uv where this environment has it."""
    home = FOLDER / peer
    if (home / "complete").exists() and (home / "complete").read_text("utf-8") == "\n".join(PEERS[peer]):
        print(f"{peer}: ready")
        return
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    links = (
        os.environ.get("PIP_FIND_LINKS")
        or subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", "global.find-links"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    )
    # a CPU build within pip's reach is meant to be used; else uv looks at the driver and chooses
    local = any(any(Path(folder).glob("torch-*+cpu-*.whl")) for folder in links.split())
    backend = [] if local else ["--torch-backend", "auto"]
    environment = {**os.environ, "UV_FIND_LINKS": ",".join(links.split())} if links else dict(os.environ)
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *backend, *PEERS[peer]]
    subprocess.run(command, env=environment, check=True)
    (home / "complete").write_text("\n".join(PEERS[peer]), "utf-8")
    print(f"{peer}: installed")


if __name__ == "__main__":
    for name in PEERS:
        make(name)
