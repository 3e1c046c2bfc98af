"""What counts as equal, and what of a gather as hidden."""

import math

import pytest

from torchlinearmoe.benchmark.multi.overlap import STATES, gathers
from torchlinearmoe.benchmark.multi.rows import compared, rated
from torchlinearmoe.benchmark.trace import Piece

WHOLE = {"losses": [7.0, 6.9, 6.8], "gradients": {"a": 2.0, "b": 1e-3}}


def test_small_differences_are_equal_and_told():
    found = {"losses": [7.0, 6.9, 6.8001], "gradients": {"a": 2.0 * (1 + 1e-6), "b": 1e-3}, "max_load": 2.0}
    row = compared("case", found, WHOLE, cuda=False)
    assert row["result"] == "equal" and row["max_load"] == 2.0
    assert row["loss_difference"] == pytest.approx(0.0001 / 6.8)
    assert row["gradient_difference"] == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"losses": [7.0, 6.9, 6.7]}, "losses differ by 1.5e-02"),
        ({"losses": [7.0, 6.9]}, "2 steps where 3"),
        ({"losses": [7.0, math.nan, 6.8]}, "losses differ by inf"),
        ({"gradients": {"a": 2.0, "b": 1.1e-3}}, "gradient of b by 8.3e-02"),
        ({"gradients": {"a": 2.0}}, "gradient of b by inf"),
        ({"error": "hung"}, "hung"),
    ],
)
def test_what_differs_fails_and_is_named(changed, named):
    row = compared("case", WHOLE | changed, WHOLE, cuda=False)
    assert row["result"] == "failed" and named in row["error"]


def test_a_resumed_run_is_held_to_the_steps_that_it_takes():
    whole = {"losses": [7.0, 6.9, 6.8], "grad_norms": [3.0, 2.0, 1.0]}
    resumed = {"losses": [6.9, 6.8], "grad_norms": [2.0, 1.0]}
    assert compared("case", resumed, whole, cuda=False, start=1)["result"] == "equal"
    row = compared("case", resumed | {"grad_norms": [3.0, 1.0]}, whole, cuda=False, start=1)
    assert row["result"] == "failed" and "all parameters" in row["error"]


def test_a_speed_is_a_share_of_another():
    fast, slow = {"tokens_per_second_per_gpu": 200.0}, {"tokens_per_second_per_gpu": 50.0}
    row = rated("case", slow, fast, "fast")
    assert (row["result"], row["share"], row["of"]) == ("timed", 0.25, "fast")
    assert "share" not in rated("case", slow, {"error": "hung"}, "fast")
    assert rated("case", {"error": "hung"})["result"] == "failed"


def test_gathers_of_states_are_hidden_where_other_kernels_run():
    def piece(name: str, start: float, end: float, *around: str) -> Piece:
        return Piece(name, start, end, end - start, around)

    pieces = [
        piece("ncclDevKernel_AllGather", 0, 100, "cudaLaunchKernel", STATES[0]),
        piece("gemm", 10, 40),
        piece("gemm", 30, 50),  # with the one before: 40 of 100
        piece("ncclDevKernel_AllGather", 60, 90, "FSDP::all_gather"),  # neither counted nor hiding
        piece("ncclDevKernel_ReduceScatter", 200, 260, STATES[1] + "_out"),
        piece("gemm", 190, 210),
        piece("copy", 250, 300),  # 20 of 60
    ]
    assert gathers(pieces) == (160, 60)
    assert gathers(pieces[1:4]) == (0, 0)
