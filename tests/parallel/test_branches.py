"""Rows of the batch on different ranks."""

import pytest
import torch

import fastdiff
from fastdiff.miniature import untrained
from fastdiff.parallel.branches import BranchParallel
from fastdiff.parallel.patch import PatchParallel
from tests.parallel.nets import inputs, largest, pipeline, sd, sdxl, simulate


def test_two_branches_are_two_calls_bit_for_bit():
    pipe, arguments = pipeline(sdxl()), inputs("sdxl", batch=2)
    run = simulate(pipe, BranchParallel(), 2, **arguments)
    rows = [_row(arguments, row) for row in range(2)]
    apart = torch.cat([pipe(**row) for row in rows])
    assert all(torch.equal(result, apart) for result in run.results)
    assert largest(run, pipe(**arguments)) < 2e-6 * apart.abs().max().clamp(min=1)
    assert run.traffic[0].received["output"] == apart[0].numel() * 4


def _row(value, row: int):
    if isinstance(value, torch.Tensor):
        return value[row : row + 1]
    if isinstance(value, dict):
        return {key: _row(part, row) for key, part in value.items()}
    return value


def test_slots_of_a_stream_and_strips_of_branches():
    pipe, arguments = pipeline(sd()), inputs("sd", batch=3)
    arguments["timestep"] = torch.tensor([3, 400, 900])
    assert largest(simulate(pipe, BranchParallel(2), 2, **arguments), pipe(**arguments)) < 5e-6
    arguments = inputs("sd", batch=2)
    both = [PatchParallel(groups=2), BranchParallel(2)]
    assert largest(simulate(pipe, both, 4, **arguments), pipe(**arguments)) < 5e-6


def test_fewer_rows_than_branches_run_whole_and_the_report_says_so():
    pipe, arguments = pipeline(sd()), inputs("sd")
    from fastdiff.parallel.simulator import Simulator, replica

    def one(communicator):
        twin = replica(pipe)
        with fastdiff.accelerate(twin, BranchParallel()) as handle:
            return twin(**arguments), str(handle.report())

    for result, report in Simulator(2).run(one).results:
        assert torch.equal(result, pipe(**arguments))
        assert "a call with 1 rows ran whole" in report


def test_a_whole_pipeline_with_guidance():
    pipe = untrained()
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": "a red circle", "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt"}

    def draw(pipe, **more):
        return pipe(**settings, **more, generator=torch.Generator().manual_seed(1)).images

    from fastdiff.parallel.simulator import Simulator, replica

    def one(communicator):
        twin = replica(pipe)
        with fastdiff.accelerate(twin, [PatchParallel(groups=2), BranchParallel()]):
            return draw(twin)

    truth = draw(pipe)
    for result in Simulator(4).run(one).results:
        torch.testing.assert_close(result, truth, rtol=0, atol=1e-4)


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(fastdiff.Unsupported, match="3 ranks cannot form 2"):
        simulate(pipeline(sd()), BranchParallel(), 3, **inputs("sd"))
