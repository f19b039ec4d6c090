"""Pictures on demand with Ray Serve: requests that arrive together are made together.

```console
$ serve run fastdiff_pipelines.batch.serving:build model=stabilityai/sd-turbo plan=exact
$ curl localhost:8000 -d '{"prompt": "a red circle", "seed": 1}' -o circle.png
```
The keys are those of a job file; the answer is the same file, byte for byte, that a batch job would write at the same
batch size, its id in the header `x-fastdiff-id`.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from fastdiff_pipelines.batch.attempts import Attempts, Done, Failed
from fastdiff_pipelines.batch.backoff import Caps
from fastdiff_pipelines.batch.identity import resolve_model
from fastdiff_pipelines.batch.items import Common, Item, identity, with_seeds
from fastdiff_pipelines.batch.maker import Maker, load
from fastdiff_pipelines.batch.notes import Notes
from fastdiff_pipelines.batch.outputs import encode
from fastdiff_pipelines.batch.reading import read_item
from fastdiff_pipelines.batch.settings import Settings

TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}


@dataclass(frozen=True)
class Answer:
    """What a request gets: a file, or the reason why not and an HTTP status."""

    id: str
    data: bytes = b""
    error: str = ""
    status: int = 200


class Kitchen:
    """Makes what waits; knows nothing of Ray or HTTP.

    Items of one bucket share a call, others follow: a dynamic batch is cut by bucket and never mixed.
    """

    def __init__(self, settings: Settings, make: Maker, device: str):
        self.settings = settings
        self.notes = Notes(settings, device, "serve")
        self.attempts = Attempts(make, Caps(settings.batch), lambda item: str(item.bucket), settings.attempts)

    def read(self, row: Any) -> Item:
        """An item with its seed.

        Raises:
            ValueError: the request asks for nothing possible, or for a file of this machine.
        """
        if not isinstance(row, dict):
            raise ValueError('not an object; send {"prompt": "..."}')
        if row.get("adapters") or row.get("count"):
            raise ValueError("adapters and count are not for requests")
        return with_seeds([read_item(row)], 0)[0]

    def make(self, items: list[Item]) -> list[Answer]:
        """An answer for each item, in their order."""
        answers: dict[int, Answer] = {}
        # two requests may ask for the same; each item object here stands for one request
        items = [replace(item) for item in items]
        for bucket in dict.fromkeys(item.bucket for item in items):
            for one in self.attempts.run([item for item in items if item.bucket == bucket]):
                answers[id(one.item)] = self._answer(one)
        return [answers[id(item)] for item in items]

    def _answer(self, one: Done | Failed) -> Answer:
        name = identity(one.item, self.settings.common)
        if isinstance(one, Failed):
            return Answer(name, error=f"{one.error}: {one.message}", status=500)
        about = self.notes.about(name, one.item)
        try:
            return Answer(name, encode(one.pixels, self.settings.common.format, about, one.item.fps))
        except ValueError as error:
            return Answer(name, error=str(error), status=400)


def build(arguments: dict[str, str]) -> Any:
    """The application `serve run` starts.

    Args:
        arguments: model, plan, format, batch (8), wait_s (0.05), queue (64), replicas (1), gpus (1 where there is one).
    """
    import torch
    from ray import serve  # pyright: ignore[reportMissingImports]

    from fastdiff import Plan

    where, name = resolve_model(arguments.get("model"))
    common = Common(name, Plan.of(arguments.get("plan", "exact")).to_json(), format=arguments.get("format", "png"))
    settings = Settings(str(where), common, batch=int(arguments.get("batch", 8)))
    gpus = float(arguments.get("gpus", torch.cuda.is_available()))
    return deployment(
        serve,
        settings,
        "cuda:0" if gpus else "cpu",
        float(arguments.get("wait_s", 0.05)),
        int(arguments.get("queue", 64)),
        num_replicas=int(arguments.get("replicas", 1)),
        ray_actor_options={"num_gpus": gpus} if gpus else {"num_cpus": 1},
    )


def deployment(
    serve: Any, settings: Settings, device: str, wait_s: float, queue: int, make: Any = load, **options: Any
) -> Any:
    """The deployment itself; `options` go to `serve.deployment`.

    Args:
        wait_s: how long the first of a batch waits for others.
        queue: requests that may wait; more are turned away with 503.
        make: loads the model inside a replica.
    """
    from starlette.requests import Request  # pyright: ignore[reportMissingImports]
    from starlette.responses import JSONResponse, Response  # pyright: ignore[reportMissingImports]

    @serve.deployment(max_queued_requests=queue, max_ongoing_requests=4 * settings.batch, **options)
    class Pictures:
        def __init__(self) -> None:
            self.kitchen = Kitchen(settings, make(settings, device), device)

        @serve.batch(max_batch_size=settings.batch, batch_wait_timeout_s=wait_s)
        async def together(self, items: list[Item]) -> list[Answer]:
            return await asyncio.to_thread(self.kitchen.make, items)

        # Serve's own adapter resolves this annotation by name, which a local import does not satisfy
        async def __call__(self, request: Any) -> Any:
            assert isinstance(request, Request)
            try:
                item = self.kitchen.read(await request.json())
            except ValueError as error:
                return JSONResponse({"error": str(error)}, 400)
            answer = await self.together(item)
            if answer.error:
                return JSONResponse({"error": answer.error, "id": answer.id}, answer.status)
            headers = {"x-fastdiff-id": answer.id, "x-fastdiff-seed": str(item.seed)}
            return Response(answer.data, media_type=TYPES[settings.common.format], headers=headers)

    return Pictures.bind()
