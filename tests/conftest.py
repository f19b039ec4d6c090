"""Settings every test shares: offline, seeded, Triton interpreted where there is no GPU, threads shared fairly."""

import os
import shutil
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _has_gpu() -> bool:
    """Asks the driver and not torch, because Triton reads its switch before torch may be imported."""
    driver = shutil.which("nvidia-smi")
    return driver is not None and subprocess.run([driver, "-L"], capture_output=True, check=False).returncode == 0


HAS_GPU = _has_gpu()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# two threads that wait for each other on a busy core are far slower than one, so workers share and a user's wish rules
if "OMP_NUM_THREADS" not in os.environ:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, and says what is missing."""
    missing = {
        "gpu": None if HAS_GPU and torch.cuda.is_available() else "needs a CUDA device and a CUDA build of torch",
        "network": None if os.environ["HF_HUB_OFFLINE"] == "0" else "needs weights from the hub (set HF_HUB_OFFLINE=0)",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that forgets its seed still gives the same result every time."""
    torch.manual_seed(0)
