"""Batch generation that loses nothing: job files in, pictures and clips out, kill it whenever you like.

In reading order: `items` (what is asked for, ids, seeds), `reading` (job files), `claims` and `manifest` (who works on
what, what is finished), `outputs`, `maker` (the model), `backoff` and `attempts` (memory, retries), `worker` (one
process), `crew` and `job` (all of them).
"""

from fastdiff_pipelines.batch.errors import JobError
from fastdiff_pipelines.batch.items import Adapter, Item
from fastdiff_pipelines.batch.job import BatchJob, Summary
from fastdiff_pipelines.batch.progress import Progress
from fastdiff_pipelines.batch.reading import Jobs, read_jobs
from fastdiff_pipelines.batch.stop import Stop

__all__ = ["Adapter", "BatchJob", "Item", "JobError", "Jobs", "Progress", "Stop", "Summary", "read_jobs"]
