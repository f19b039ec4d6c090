"""A batch job on a Ray cluster: Ray hands the work out and replaces what dies, the manifest stays the truth.

Needs `pip install "fastdiff[ray]"` on every machine, and a folder they share. Without a cluster (RAY_ADDRESS) a small
one is started on this machine.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdiff_pipelines.batch.job import BatchJob, Summary
from fastdiff_pipelines.batch.maker import Maker, load
from fastdiff_pipelines.batch.progress import Progress
from fastdiff_pipelines.batch.settings import Settings, Work
from fastdiff_pipelines.batch.worker import Worker

# Ray Data's own tasks take logical CPUs beside the workers'; with fewer it can wait for itself for ever
_LOGICAL_CPUS = 4
_OBJECT_STORE_BYTES = 150_000_000


class _Actor:
    """A worker that Ray keeps alive: loads the model once, then takes batches of ids."""

    def __init__(self, path: str, device: str, make: Callable[[Settings, str], Maker]):
        work = Work.load(Path(path))
        self.worker = Worker(work, Path(path).parent.parent, make(work.settings, device), device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        states = self.worker.process(str(name) for name in batch["id"])
        return {"id": list(states), "state": list(states.values())}


@contextmanager
def cluster(workers: int = 1) -> Iterator[None]:
    """A connection to the cluster RAY_ADDRESS names, or a cluster on this machine, for the length of a block."""
    import ray  # pyright: ignore[reportMissingImports]

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=max(_LOGICAL_CPUS, os.cpu_count() or 1, workers + 2),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(
    job: BatchJob,
    make: Callable[[Settings, str], Maker] = load,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Runs a job with Ray Data: one actor for each of the job's workers, each on its own GPU where the job uses GPUs.

    Args:
        make: loads the model inside an actor.

    Raises:
        ModuleNotFoundError: ray is not installed.
    """

    def hand_out(path: Path, names: list[str]) -> Iterator[dict[str, str]]:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        on_gpu = job.settings.devices[0] != "cpu"
        # Ray shows each actor its own GPU as the only one
        options: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
        batch = job.settings.batch
        blocks = max(1, min(-(-len(names) // batch), 4 * job.settings.workers))
        results = ray.data.from_items([{"id": name} for name in names], override_num_blocks=blocks).map_batches(
            _Actor,
            fn_constructor_args=(str(path), "cuda:0" if on_gpu else "cpu", make),
            batch_size=batch,
            compute=ray.data.ActorPoolStrategy(size=min(job.settings.workers, blocks)),
            **options,
        )
        for row in results.iter_rows():
            yield {row["id"]: row["state"]}

    with cluster(job.settings.workers):
        return job.run_with(hand_out, on_progress)
