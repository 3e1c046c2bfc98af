"""Shared by the kernel tests: random inputs of every family, and one call with all its gradients.

Legend: B rows, T tokens, H heads, K/V key/value head dim, N documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.kernels import ops

LINEAR = ("identity", "constant", "scalar", "diagonal", "bonus")
FAMILIES = (*LINEAR, "delta", "gated_delta", "grouped_delta", "kda", "grouped_kda", "dplr")
AWKWARD_LENGTHS = (1, 63, 64, 65, 130, 0, 5, 7, 3, 0)
"""Borders on, before and after a chunk border, several documents in a chunk, documents without tokens."""


@dataclass
class Call:
    """One call of an operator: `inputs` are differentiable, `options` are not."""

    operator: str
    inputs: dict[str, Tensor]
    options: dict

    def run(self, backend: str = "torch", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The output, the final state, and the gradient of every input under fixed random cotangents."""
        inputs = {name: _leaf(name, x, dtype) for name, x in self.inputs.items()}
        o, final = getattr(ops, self.operator)(**inputs, **self.options, backend=backend)
        generator = torch.Generator().manual_seed(11)
        loss = (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum()
        results = {"o": o}
        if final is not None:
            loss = loss + (final * torch.randn(final.shape, generator=generator, dtype=torch.float64)).sum()
            results["final"] = final
        loss.backward()
        for name, x in inputs.items():
            assert x.grad is not None, f"no gradient for {name}"
            results[f"d_{name}"] = x.grad
        return {name: x.detach() for name, x in results.items()}


def _leaf(name: str, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        x = x.to(dtype if name in ("q", "k", "v", "a", "b") or dtype == torch.float64 else torch.float32)
    return x.detach().clone().requires_grad_()


def random_call(
    family: str,
    *,
    B: int = 2,
    T: int = 150,
    H: int = 2,
    K: int = 16,
    V: int = 24,
    lengths: tuple[int, ...] | None = None,
    initial: bool = False,
    final: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Call:
    """A call with fresh random inputs; `lengths` packs documents into one row."""
    options: dict = {"output_final_state": final}
    if lengths is not None:
        B, T = 1, sum(lengths)
        options["cu_seqlens"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    N = B if lengths is None else len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    inputs = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    HV = H
    if family.endswith(("delta", "kda")):
        HV = 2 * H if family.startswith("grouped") else H
        inputs["v"] = normal(B, T, HV, V)
        inputs["k"] = F.normalize(inputs["k"], dim=-1)
        inputs["beta"] = 2 * torch.rand(B, T, HV, dtype=dtype)
        if family != "delta":
            width = (K,) if family.endswith("kda") else ()
            inputs["log_decay"] = F.logsigmoid(normal(B, T, HV, *width) + 2)
    elif family == "constant":
        inputs["log_decay"] = -torch.rand(H, dtype=dtype) / 4
    elif family == "scalar":
        inputs["log_decay"] = F.logsigmoid(normal(B, T, H) + 2)
    elif family in ("diagonal", "bonus"):
        inputs["log_decay"] = F.logsigmoid(normal(B, T, H, K) + 2)
        if family == "bonus":
            inputs["bonus"] = normal(H, K)
    elif family == "dplr":
        removal = F.normalize(normal(B, T, H, K), dim=-1)
        inputs |= {"a": -removal, "b": removal * torch.rand(B, T, H, K, dtype=dtype)}
        inputs["log_decay"] = F.logsigmoid(normal(B, T, H, K) + 2)
    if initial:
        inputs["initial_state"] = normal(N, HV, K, V)
    operator = "delta_rule" if "beta" in inputs else "dplr_rule" if "a" in inputs else "linear_recurrence"
    return Call(operator, inputs, options)


def relative_error(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected| in the L2 norm; inf where x is not finite."""
    error = (x.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(error) if bool(error.isfinite()) else float("inf")


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every result is within `tolerance` in relative L2 norm."""
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < tolerance, errors
