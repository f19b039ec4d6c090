"""Blocks on several ranks, moved while a video runs."""

import gc

import pytest
import torch

from fastdiff.acceleration import Unsupported
from fastdiff.parallel.communicator import Alone
from fastdiff.parallel.simulator import Simulator, replica
from fastdiff.parallel.stages import rebalanced
from fastdiff.video.causal import CausalWan
from fastdiff.video.text import Text
from fastdiff_pipelines.rollout.stages import StagedCausal
from tests.video.nets import latents, prompts, wan

TIMES = torch.tensor([[900.0, 700.0, 500.0, 300.0, 100.0, 50.0]])


def test_the_published_rule() -> None:
    assert rebalanced((11, 11, 10), (2, 1, 1), (2, 1, 1)) == (6, 13, 13)


def _chunks(causal, storage: str, between) -> torch.Tensor:
    x, text = latents(2, 6), Text(prompts(2))
    cache = causal.cache(2, 3, 2, 2, sinks=1, storage=storage)
    made = []
    for frame in range(6):
        part = slice(frame, frame + 1)
        made.append(causal(x[:, :, part], TIMES[:, part].expand(2, -1), text, cache=cache, commit=True))
        between(frame)
    return torch.cat(made, dim=2)


def _compare(storage: str) -> None:
    model = wan(layers=5)
    with torch.no_grad(), CausalWan(model) as causal:
        truth = _chunks(causal, storage, lambda frame: None)

    @torch.no_grad()
    def rank(communicator):
        with CausalWan(replica(model)) as causal, StagedCausal(causal, communicator, (3, 1, 1)) as staged:
            counts = [staged.counts]

            def between(frame: int) -> None:
                if frame in (2, 4):
                    times = ((3.0, 1.0, 1.0), (3.0, 1.0, 1.0))[frame == 4]
                    counts.append(staged.rebalance(times[communicator.rank], times[communicator.rank]))

            return _chunks(staged, storage, between), counts

    for made, counts in Simulator(3).run(rank).results:
        assert torch.equal(made, truth)
        assert counts[0] == (3, 1, 1) and counts[1] != counts[0] and sum(counts[1]) == sum(counts[2]) == 5


def test_a_video_over_three_ranks_is_one_device_while_blocks_and_their_keys_move() -> None:
    _compare("native")


def test_the_same_with_keys_in_one_byte() -> None:
    _compare("int8")


def test_blocks_are_timed_and_sinks_by_likeness_refused() -> None:
    ticks = iter(range(1000))
    with CausalWan(wan(layers=2)) as causal, StagedCausal(causal, Alone(), clock=lambda: float(next(ticks))) as staged:
        causal(latents(1, 1), TIMES[:, :1], Text(prompts()))
        assert staged.block_s == 2.0
        cache = staged.cache(1, 3, 2, 2)
        assert list(staged._caches.values()) == [cache]
        del cache
        gc.collect()
        assert not staged._caches
        with pytest.raises(Unsupported, match="disagree"):
            staged.cache(1, 3, 2, 2, sinks=1, evict_below=0.3)
