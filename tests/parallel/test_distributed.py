"""The same hooks on real processes over gloo: numbers and traffic are the simulator's, and nobody is left waiting.

Every group of processes runs all that needs its size in one go: starting them is what takes the time.
"""

import os
import signal
import time
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

import fastdiff
from fastdiff.parallel.branches import BranchParallel
from fastdiff.parallel.communicator import Communicator, RankFailed, Stopped, using
from fastdiff.parallel.context import ContextParallel
from fastdiff.parallel.controlnet import RemoteControlNet, serve
from fastdiff.parallel.decoder import DecoderParallel
from fastdiff.parallel.distributed import TorchCommunicator, connect, disconnect, launch
from fastdiff.parallel.patch import PatchParallel
from fastdiff.parallel.probe import link
from fastdiff.parallel.simulator import Simulator, replica
from tests.parallel.nets import controlnet, inputs, pipeline, sd, sdxl, vae

PLANS = {
    "sync": PatchParallel(),
    "uneven": PatchParallel(shares=(1, 2, 1, 1)),
    "stale": PatchParallel("stale", warmup=0, few_steps=True),
    "partial": PatchParallel("partial", warmup=0, few_steps=True),
    "resync": PatchParallel("stale", warmup=0, resync=2, few_steps=True),
}


def _same_work(communicator: Communicator) -> dict[str, Any]:
    """What is run on real and on virtual ranks alike: name to (result, traffic)."""
    found = {}
    ranks = communicator.size
    for name, plan in PLANS.items():
        if name == "uneven":
            plan = PatchParallel(shares=plan.shares[:ranks])
        pipe = replica(pipeline(sd()))
        found[name] = _with(pipe, plan, communicator, steps=3, rate=0.3, **inputs("sd"))
    pair = [PatchParallel(groups=2), BranchParallel(2)] if ranks == 4 else BranchParallel(2)
    found["branches"] = _with(replica(pipeline(sdxl())), pair, communicator, **inputs("sdxl", batch=2))
    if ranks == 2:
        found["remote"] = _remote(communicator)
        found["decoder"] = _decoder(communicator)
    return found


def _with(pipe: Any, plan: Any, communicator: Communicator, **arguments: Any) -> tuple[torch.Tensor, Any]:
    before = communicator.traffic.copy()
    with fastdiff.accelerate(pipe, plan):
        result = pipe(**arguments)
    return result, communicator.traffic.since(before)


def _remote(communicator: Communicator) -> tuple[torch.Tensor, Any]:
    pipe = replica(pipeline(sd(), controlnet(sd())))
    before = communicator.traffic.copy()
    if communicator.rank == 1:
        return torch.tensor(serve(pipe.controlnet, communicator)), communicator.traffic.since(before)
    arguments = {**inputs("sd"), "controlnet_cond": torch.ones(1, 3, 32, 32) / 3}
    return _with(pipe, RemoteControlNet(), communicator, steps=2, rate=0.1, **arguments)


def _decoder(communicator: Communicator) -> tuple[torch.Tensor, Any]:
    pipe = pipeline(sd(), vae=replica(vae()))
    before = communicator.traffic.copy()
    torch.manual_seed(3)
    with torch.no_grad(), fastdiff.accelerate(pipe, DecoderParallel()):
        result = pipe.vae.decode(torch.randn(1, 4, 13, 8)).sample
    return result, communicator.traffic.since(before)


def _on_processes(communicator: Communicator, folder: str) -> dict[str, Any]:
    """Everything for one group of processes; the last parts break the group, and each begins with a new one."""
    found: dict[str, Any] = {"same": _same_work(communicator), "network": link(communicator, budget_s=0.5)}
    if communicator.size == 2:
        found["ulysses"] = _ulysses(communicator)
    for name, trouble in TROUBLES.items():
        communicator.drain()
        disconnect()
        place = os.path.join(folder, name)
        os.makedirs(place, exist_ok=True)
        communicator = connect(place, communicator.rank, communicator.size)
        try:
            with using(communicator):
                found[name] = trouble(communicator)
        except Exception as error:
            found[name] = (type(error).__name__, str(error), len(communicator._pending))
    return found


def _ulysses(communicator: Communicator) -> tuple[float, float]:
    """diffusers asks how many accelerators there are and divides by it; one stands in for none here."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    arguments = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 4, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.rand(16, 3).round(),
        "txt_ids": torch.zeros(4, 3),
        # diffusers' hooks split tuples only, as its pipelines ask for
        "return_dict": False,
    }
    pipe = pipeline(model)
    count = torch.accelerator.device_count
    with torch.no_grad():
        truth = model(**arguments)[0]
        try:
            torch.accelerator.device_count = lambda: 1
            with fastdiff.accelerate(pipe, ContextParallel()):
                split = model(**arguments)[0]
        finally:
            torch.accelerator.device_count = count
        after = model(**arguments)[0]
    return float((split - truth).abs().max()), float((after - truth).abs().max())


def _raises_between_steps(communicator: Communicator) -> Any:
    def fail(step: int) -> None:
        if step == 1 and communicator.rank == 1:
            raise ValueError("the callback failed")

    return _with(replica(pipeline(sd())), PatchParallel(), communicator, steps=3, fail=fail, **inputs("sd"))


def _raises_inside_a_forward(communicator: Communicator) -> Any:
    pipe = replica(pipeline(sd()))
    if communicator.rank == 1:

        def fail(*_: Any) -> None:
            raise MemoryError("no memory for this layer")

        pipe.unet.mid_block.register_forward_pre_hook(fail)
    plan = PatchParallel("stale", warmup=0, few_steps=True)
    return _with(pipe, plan, communicator, steps=3, **inputs("sd"))


def _ends_early(communicator: Communicator) -> Any:
    steps = 1 if communicator.rank == 1 else 3
    return _with(replica(pipeline(sd())), PatchParallel(), communicator, steps=steps, **inputs("sd"))


def _is_killed(communicator: Communicator) -> Any:
    def fail(step: int) -> None:
        if step == 1 and communicator.rank == communicator.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return _with(replica(pipeline(sd())), PatchParallel(), communicator, steps=3, fail=fail, **inputs("sd"))


TROUBLES = {
    "between": _raises_between_steps,
    "inside": _raises_inside_a_forward,
    "early": _ends_early,
    "killed": _is_killed,
}


@pytest.fixture(scope="module", params=[2, 4])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(results of processes, run of the simulator) for 2 and for 4 ranks."""
    torch.set_num_threads(1)
    folder = str(tmp_path_factory.mktemp("group"))
    processes = launch(_on_processes, request.param, folder, timeout_s=WATCHDOG_S)
    return processes, Simulator(request.param).run(_same_work)


# a minute on a machine of one's own, longer in proportion where others load it
WATCHDOG_S = 60 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_numbers_and_traffic_are_the_simulators(both: Any):
    processes, run = both
    # the last one was killed at the end, on purpose
    for rank, found in enumerate(processes[:-1]):
        assert not isinstance(found, Exception), found
        for name, (result, traffic) in run.results[rank].items():
            assert torch.equal(found["same"][name][0], result), name
            assert found["same"][name][1] == traffic, name


def test_remote_controlnet_is_the_local_one_bit_for_bit(both: Any):
    processes, run = both
    if "remote" not in run.results[0]:
        pytest.skip("needs two ranks: one denoises, one serves")
    pipe = pipeline(sd(), controlnet(sd()))
    truth = pipe(steps=2, rate=0.1, **{**inputs("sd"), "controlnet_cond": torch.ones(1, 3, 32, 32) / 3})
    assert torch.equal(processes[0]["same"]["remote"][0], truth)
    assert int(run.results[1]["remote"][0]) == 2


def test_context_parallelism_of_diffusers_is_driven_and_taken_off(both: Any):
    processes, _ = both
    if "ulysses" not in processes[0]:
        pytest.skip("run on two ranks")
    split, after = processes[0]["ulysses"]
    assert 0 <= split < 1e-6
    assert after == 0


def test_links_are_measured(both: Any):
    network = both[0][0]["network"]
    assert 0 < network.latency_s < 1
    assert network.bytes_per_s > 0


@pytest.mark.parametrize("name", TROUBLES)
def test_nobody_hangs(both: Any, name: str):
    processes, _ = both
    expected = {"between": "ValueError", "inside": "MemoryError", "early": "Stopped", "killed": ""}[name]
    for rank, found in enumerate(processes[:-1]):
        kind, message, pending = found[name]
        own = rank == 1 and name in ("between", "inside")
        assert kind == (expected if own or name == "early" else "RankFailed"), (rank, message)
        assert pending == 0
        if name == "inside" and not own:
            assert "no memory for this layer" in message
    assert isinstance(processes[-1], RankFailed)
    assert "exit code -9" in str(processes[-1])


def _hangs(communicator: Communicator) -> None:
    time.sleep(600)


@pytest.mark.slow
def test_the_watchdog_ends_a_group_that_hangs():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        launch(_hangs, 2, timeout_s=3)


def test_nothing_is_sent_without_a_group():
    with pytest.raises(RuntimeError, match="not initialised"):
        TorchCommunicator.world()
    assert issubclass(Stopped, RuntimeError)
