"""`CheckpointManager` in one process without a process group: what is saved, when, and what is loaded back."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from torchlinearmoe.checkpoint import CheckpointError, CheckpointManager, load_model_weights, read_extra, read_file
from torchlinearmoe.checkpoint.storage import Writer


class Net(nn.Module):
    """Two layers, a persistent and a transient buffer, a parameter that gets no gradient."""

    def __init__(self, width: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("bias_of_experts", torch.randn(4))
        self.register_buffer("cache", torch.randn(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def adamw(model: nn.Module, **options: object) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{entry}"] = value.clone()
    return tensors


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("fused", [False, True])
def test_a_round_trip_restores_model_optimizer_extra_and_files(tmp_path: Path, fused: bool) -> None:
    model = Net()
    optimizer = adamw(model, fused=fused)
    train(model, optimizer, 3)
    manager = CheckpointManager(tmp_path / "run/checkpoints", keep=2)
    extra = {"tokens": 2**40, "counters": [1, 2], "loss": 0.1}
    files = {"recipe.toml": "[model]\nname = 'Füße'\n", "tokenizer/ranks": b"\x00\xff"}
    manager.save(3, model, optimizer, extra, files, blocking=True)
    saved = snapshot(model, optimizer)

    latest = manager.latest()
    assert latest is not None and latest == tmp_path / "run/checkpoints/step-3"
    other = Net()
    restored = adamw(other, fused=fused)
    assert manager.load(latest, other, restored) == extra | {"step": 3}
    assert_same(snapshot(other, restored), saved)
    assert read_extra(latest) == extra | {"step": 3}
    assert read_file(latest, "recipe.toml").decode() == files["recipe.toml"]
    assert read_file(latest, "tokenizer/ranks") == b"\x00\xff"

    x = torch.randn(5, 8)  # both go on alike
    for m, o in ((model, optimizer), (other, restored)):
        m(x).sum().backward()
        o.step()
    assert_same(snapshot(other, restored), snapshot(model, optimizer))


def test_optimizer_state_follows_parameter_names_not_groups(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer, 2)
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(2, model, optimizer, {}, blocking=True)
    other = Net()
    named = dict(reversed(list(other.named_parameters())))
    groups = [
        {"params": [p for p in named.values() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.dim() != 2], "weight_decay": 0.0},
    ]
    regrouped = torch.optim.AdamW(groups, lr=3e-4)
    manager.load(tmp_path / "step-2", other, regrouped)
    assert_same(snapshot(other, regrouped), snapshot(model, optimizer))
    assert [(g["lr"], g["weight_decay"]) for g in regrouped.param_groups] == [(3e-4, 0.1), (3e-4, 0.0)]


def test_wrappers_do_not_change_the_names(tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    wrapped = Net()
    for i, layer in enumerate(wrapped.layers):
        compiled = torch.compile(layer, backend="eager")
        wrapped.layers[i] = checkpoint_wrapper(compiled, preserve_rng_state=False)  # type: ignore[arg-type]
    optimizer = adamw(wrapped)
    train(wrapped, optimizer, 1)
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, wrapped, optimizer, {}, blocking=True)
    plain_optimizer = adamw(model)
    manager.load(tmp_path / "step-1", model, plain_optimizer)
    for p, q in zip(model.parameters(), wrapped.parameters()):
        assert torch.equal(p, q)
        assert plain_optimizer.state[p].keys() == optimizer.state[q].keys()
        for entry, value in optimizer.state[q].items():
            assert torch.equal(plain_optimizer.state[p][entry], value)
    manager.save(2, model, plain_optimizer, {}, blocking=True)
    manager.load(tmp_path / "step-2", wrapped, optimizer)


def test_parts_share_one_namespace_and_equal_names(tmp_path: Path) -> None:
    """Two pipeline stages on one rank that share a table, as against the whole model."""
    whole = nn.ModuleDict({"a": nn.Linear(4, 4), "table": nn.Linear(2, 2), "b": nn.Linear(4, 4)})
    stages = [
        nn.ModuleDict({"a": nn.Linear(4, 4), "table": nn.Linear(2, 2)}),
        nn.ModuleDict({"b": nn.Linear(4, 4), "table": nn.Linear(2, 2)}),
    ]
    optimizer = adamw(whole)
    sum(p.sum() for p in whole.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    manager = CheckpointManager(tmp_path, keep=2)
    manager.save(1, whole, optimizer, {}, blocking=True)
    staged = torch.optim.AdamW([p for stage in stages for p in stage.parameters()])
    manager.load(tmp_path / "step-1", stages, staged)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            original = whole.get_parameter(name)
            assert torch.equal(parameter, original)
            assert torch.equal(staged.state[parameter]["exp_avg"], optimizer.state[original]["exp_avg"])
    tables = [staged.state[stage.get_parameter("table.weight")]["exp_avg"] for stage in stages]
    assert tables[0].data_ptr() != tables[1].data_ptr()

    manager.save(2, stages, staged, {}, blocking=True)
    saved = snapshot(whole, optimizer)
    for parameter in whole.parameters():
        parameter.data.zero_()
    manager.load(tmp_path / "step-2", whole, optimizer)
    assert_same(snapshot(whole, optimizer), saved)


def test_saved_values_are_those_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    go = threading.Event()
    write_data = FileSystemWriter.write_data

    def late_write(self: Writer, *args: object) -> object:
        assert go.wait(20)
        return write_data(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Writer, "write_data", late_write)
    model = Net()
    optimizer = adamw(model)
    manager = CheckpointManager(tmp_path, keep=3)
    for step in (1, 2):  # the second save reuses the staging memory of the first
        train(model, optimizer, 1)
        saved = snapshot(model, optimizer)
        extra = {"list": [step]}
        go.clear()
        manager.save(step, model, optimizer, extra)
        assert [p.name for p in tmp_path.glob(f"step-{step}*")] in ([], [f"step-{step}.tmp"])
        extra["list"].append(99)
        train(model, optimizer, 1)
        with torch.no_grad():
            model.get_buffer("bias_of_experts").add_(1.0)
        go.set()
        manager.wait()
        other = Net()
        restored = adamw(other)
        assert manager.load(tmp_path / f"step-{step}", other, restored)["list"] == [step]
        assert_same(snapshot(other, restored), saved)


def test_only_the_last_keep_checkpoints_stay(tmp_path: Path) -> None:
    model = Net()
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        manager.save(step, model, None, {})
    manager.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-15", "step-20"]


def test_the_newest_is_the_last_saved_not_the_highest_step(tmp_path: Path) -> None:
    model = Net()
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (100, 200, 150):  # went back to 100 by hand, left 200 behind
        manager.save(step, model, None, {}, blocking=True)
    assert manager.latest() == tmp_path / "step-150"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-150", "step-200"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=2)
    first, second, loaded = Net(), Net(), Net()
    manager.save(7, first, None, {"run": 1}, {"only_in_first": "x"}, blocking=True)
    manager.save(7, second, None, {"run": 2}, blocking=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]
    assert load_model_weights(tmp_path / "step-7", loaded) == {"run": 2, "step": 7}
    assert torch.equal(loaded.unused, second.unused)
    assert not (tmp_path / "step-7/only_in_first").exists()


def test_a_model_only_load_converts_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    model, half = Net(), Net().bfloat16()
    optimizer = adamw(model)
    train(model, optimizer, 1)
    CheckpointManager(tmp_path, keep=1).save(1, model, optimizer, {}, blocking=True)
    load_model_weights(tmp_path / "step-1", half)
    assert torch.equal(half.layers[0].weight, model.layers[0].weight.bfloat16())  # type: ignore[union-attr]


def narrow() -> nn.Module:
    return Net(width=6)


def shallow() -> nn.Module:
    return Net(layers=1)


def deep() -> nn.Module:
    return Net(layers=3)


@pytest.mark.parametrize(
    "build, message",
    [
        (deep, "it has no 'model.layers.2.weight'"),
        (shallow, "it holds 'model.layers.1.bias' and 7 more, which the model has not"),
        (narrow, "'model.layers.0.weight' has shape [8, 8], the model's has [6, 6]"),
    ],
)
def test_a_different_model_is_one_line_that_names_the_key(tmp_path: Path, build, message: str) -> None:
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer, 1)
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, model, optimizer, {}, blocking=True)
    other = build()
    before = snapshot(other, adamw(other))
    with pytest.raises(ValueError) as caught:
        manager.load(tmp_path / "step-1", other, adamw(other))
    assert str(caught.value) == f"checkpoint {tmp_path}/step-1: {message}"
    assert_same(snapshot(other, adamw(other)), before)


def test_missing_optimizer_state_is_named(tmp_path: Path) -> None:
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer, 1)
    manager = CheckpointManager(tmp_path, keep=2)
    manager.save(1, model, None, {}, blocking=True)
    with pytest.raises(CheckpointError, match="step-1: it was saved without optimizer state; start"):
        manager.load(tmp_path / "step-1", model, optimizer)
    partial = torch.optim.AdamW(model.layers[0].parameters())
    train(model, partial, 1)
    manager.save(2, model, partial, {}, blocking=True)
    with pytest.raises(CheckpointError, match="step-2: no optimizer state of 'unused'$"):
        manager.load(tmp_path / "step-2", model, optimizer)


def test_a_fresh_optimizer_is_saved_and_loaded_as_fresh(tmp_path: Path) -> None:
    model = Net()
    used = adamw(model)
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(0, model, used, {}, blocking=True)
    train(model, used, 1)
    manager.load(tmp_path / "step-0", model, used)
    assert len(used.state) == 0


def test_a_failed_save_is_raised_once_by_the_next_call_and_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, model, None, {}, blocking=True)

    def full_disk(self: Writer, *args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_data", full_disk)
        manager.save(2, model, None, {})
        pattern = r"checkpoint .*step-2 was not saved: OSError: \[Errno 28\] No space left on device \(rank 0\)"
        with pytest.raises(CheckpointError, match=pattern) as caught:
            manager.save(3, model, None, {})
        assert "\n" not in str(caught.value)
    assert manager.latest() == tmp_path / "step-1"
    manager.save(3, model, None, {}, blocking=True)
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


def test_leaving_the_context_finishes_the_save(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(1, Net(), None, {})
    assert (tmp_path / "step-1/state.json").exists()
    with pytest.raises(KeyError), CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(2, Net(), None, {})
        raise KeyError
    assert (tmp_path / "step-2/state.json").exists()


def test_resume_choices(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "checkpoints", keep=2)
    assert manager.resume_from("latest") is None
    assert manager.resume_from("never") is None
    for step in (1, 2):
        manager.save(step, Net(), None, {}, blocking=True)
    assert manager.resume_from("latest") == tmp_path / "checkpoints/step-2"
    older = str(tmp_path / "checkpoints/step-1")
    assert manager.resume_from(older) == Path(older)
    with pytest.raises(CheckpointError, match="checkpoint.resume = 'never' needs an unused folder"):
        manager.resume_from("never")
    with pytest.raises(CheckpointError, match="checkpoint.resume = '/nowhere' is not 'latest', 'never' or a complete"):
        manager.resume_from("/nowhere")


@pytest.mark.parametrize("name", ["../recipe.toml", "/etc/x", "state.json", ".metadata", "__0_0.distcp", ""])
def test_file_names_stay_inside_the_checkpoint_and_off_its_own(tmp_path: Path, name: str) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match=f"files: '{re.escape(name)}' is not a free name"):
        manager.save(1, Net(), None, {}, {name: "x"})
    with pytest.raises(CheckpointError, match="extra must hold only what JSON does"):
        manager.save(1, Net(), None, {"tensor": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        CheckpointManager(tmp_path, keep=0)
