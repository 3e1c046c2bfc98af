"""A trace becomes pieces that know what they were launched for, in the forward and in the backward."""

import json

import torch
from torch.profiler import ProfilerActivity, profile

from torchlinearmoe.benchmark.labels import label, labelled
from torchlinearmoe.benchmark.profile import tally
from torchlinearmoe.benchmark.trace import busy, device_pieces, host_pieces, load_events


def _event(kind: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def _operation(name: str, ts: float, dur: float, tid: int = 1, sequence: int = -1, forward: int = 0) -> dict:
    marks = {"Sequence number": sequence, "Fwd thread id": forward} if sequence >= 0 else {}
    return _event("cpu_op", name, ts, dur, tid, **marks)


EVENTS = [
    # forward, thread 1
    _operation("aten::empty", 5, 1, sequence=7),  # sees the number, does not use it up
    _event("user_annotation", "benchmark/recurrence", 10, 80),
    _operation("CompiledFunction", 20, 50, sequence=7),
    _operation("aten::bmm", 30, 10),
    _event("cuda_runtime", "cudaLaunchKernel", 32, 2, correlation=1),
    _event("cuda_driver", "cuLaunchKernel", 50, 2, correlation=2),
    _operation("aten::add", 100, 10, sequence=8),
    _event("cuda_runtime", "cudaLaunchKernel", 102, 2, correlation=3),
    # backward, thread 2
    _operation("autograd::engine::evaluate_function: AddBackward0", 190, 5, 2, sequence=8, forward=1),
    _event("cuda_runtime", "cudaMemsetAsync", 191, 2, 2, correlation=4),
    _operation("autograd::engine::evaluate_function: CompiledFunctionBackward", 200, 60, 2, sequence=7, forward=1),
    _operation("CompiledFunctionBackward", 205, 50, 2, sequence=7, forward=1),
    _event("cuda_driver", "cuLaunchKernelEx", 210, 2, 2, correlation=5),
    # device
    _event("gpu_user_annotation", "benchmark/recurrence", 40, 100, 9),
    _event("kernel", "sgemm", 40, 20, 9, correlation=1),
    _event("kernel", "triton_poi_fused_exp_0", 60, 30, 9, correlation=2),
    _event("kernel", "elementwise_kernel", 110, 5, 9, correlation=3),
    _event("gpu_memset", "Memset (Device)", 195, 5, 9, correlation=4),
    _event("kernel", "triton_red_fused_exp_1", 220, 40, 9, correlation=5),
    _event("kernel", "elementwise_kernel", 250, 20, 10, correlation=99),
]


def test_kernels_have_the_label_of_their_launch_or_of_its_forward():
    found = [(piece.name, piece.around[:1], piece.label) for piece in device_pieces(EVENTS)]
    assert found == [
        ("sgemm", ("aten::bmm",), "recurrence"),
        ("triton_poi_fused_exp_0", ("CompiledFunction",), "recurrence"),
        ("elementwise_kernel", ("aten::add",), None),
        ("Memset (Device)", ("autograd::engine::evaluate_function: AddBackward0",), None),
        ("triton_red_fused_exp_1", ("CompiledFunctionBackward",), "recurrence"),
        ("elementwise_kernel", (), None),
    ]


def test_time_is_tallied_by_category_and_what_nothing_tells_is_named():
    own, number, unlabelled = tally(device_pieces(EVENTS))
    assert own == {"recurrence": 90, "other": 30} and number == {"recurrence": 3, "other": 3}
    assert unlabelled == 30


def test_the_device_is_busy_where_any_kernel_runs():
    assert busy(device_pieces(EVENTS)) == 20 + 30 + 5 + 5 + 50


def test_an_operation_on_the_host_has_its_own_time():
    own = {piece.name: piece.own for piece in host_pieces(EVENTS)}
    assert own["CompiledFunction"] == 40 and own["aten::bmm"] == 10
    assert own["autograd::engine::evaluate_function: CompiledFunctionBackward"] == 10


def test_a_real_backward_finds_the_label_of_its_forward(tmp_path):
    layer = torch.nn.Linear(8, 8)
    label(layer, "forward", "recurrence")
    sine = labelled(torch.sin, "attention")
    x = torch.randn(4, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        (sine(layer(x)).exp() * 2).sum().backward()
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    labels = {piece.name: piece.label for piece in host_pieces(load_events(path))}
    assert labels["aten::addmm"] == labels["AddmmBackward0"] == "recurrence"
    assert labels["aten::sin"] == labels["SinBackward0"] == labels["aten::cos"] == "attention"
    assert labels["aten::exp"] is labels["ExpBackward0"] is None


def test_a_trace_is_read_from_its_file(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *EVENTS]}))
    assert load_events(path) == EVENTS
