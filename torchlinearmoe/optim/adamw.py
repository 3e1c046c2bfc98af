"""AdamW over plain tensors and DTensors, over weights that are their own masters and halves of one.

One update takes the clip factor along, and is skipped as a whole on the device where the gradients are broken: the
host does not wait for a GPU, but in the last of the forms below. State entries are those of torch's AdamW (`step`,
`exp_avg`, `exp_avg_sq`), so checkpoints are too. Which form of the update runs is decided by the tensors alone:

    GPU, float32 or halves           one Triton launch over all parameters of a kind
    one type throughout              torch's fused kernel
    anything else                    `kernels.optimizer.definition`, a parameter at a time
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchlinearmoe.initialize import local_boxes
from torchlinearmoe.kernels.optimizer import definition
from torchlinearmoe.kernels.optimizer.definition import Place, Slot
from torchlinearmoe.kernels.optimizer.rounding import tensor_key
from torchlinearmoe.optim.gradients import KERNEL_TYPES, clear_gradients, gradient_parts, summed, types_of
from torchlinearmoe.optim.launches import Launch
from torchlinearmoe.optim.masters import local_part, rest_of

STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Legal values of `optimizer.states`."""


class AdamW(Optimizer):
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

    params: groups with a `weight_decay` each. names: every parameter's name, which with `seed` draws the roundings of
    moments in bfloat16. states: the moments' type, a key of STATES (float64 beside float64 weights).
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        states: str = "float32",
        names: Mapping[Tensor, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._dtype = STATES[states]
        self._keys = {parameter: tensor_key(seed, name) for parameter, name in (names or {}).items()}
        self._launches: dict[Any, Launch] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update by the gradients as they are."""
        assert closure is None
        device = self.param_groups[0]["params"][0].device
        self.update(torch.ones((), device=device), torch.zeros((), device=device))

    @torch.no_grad()
    def update(self, factor: Tensor, skipped: Tensor) -> None:
        """Update by the gradients times `factor`, or change nothing where `skipped` is 1.

        Both are 0-dim float32 tensors on the parameters' device.
        """
        kinds: dict[Any, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    kinds.setdefault(self._kind(parameter, group), []).append((parameter, group))
        skip_on_host: bool | None = None
        for kind, members in kinds.items():
            run, *_ = kind
            if run == "triton":
                gradients = [parts for parameter, _ in members if (parts := gradient_parts(parameter)) is not None]
                self._launch(kind, members).run(gradients, members[0][1], factor, skipped)
            elif run == "torch":
                self._fused(members, factor, skipped)
            else:
                skip_on_host = bool(skipped.item()) if skip_on_host is None else skip_on_host
                if not skip_on_host:
                    self._one_by_one(members, factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, all parts of them."""
        clear_gradients(parameter for group in self.param_groups for parameter in group["params"])

    def load_state_dict(self, state_dict: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refused: torch would cast the moments to the weights' type. Checkpoints load through `checkpoint.load`."""
        raise RuntimeError("AdamW.load_state_dict casts moments; load a checkpoint with CheckpointManager instead")

    def init_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, made where there is none yet."""
        state = self.state[parameter]
        if not state:
            double = parameter.dtype == torch.float64
            dtype = torch.float64 if double else self._dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return state

    def slot(self, parameter: Tensor, group: dict[str, Any]) -> Slot:
        """The local tensors that an update of the parameter touches."""
        state = self.init_state(parameter)
        return Slot(
            local_part(parameter.detach()),
            rest_of(parameter),
            local_part(state["exp_avg"]),
            local_part(state["exp_avg_sq"]),
            group["weight_decay"],
            self._keys.get(parameter, 0),
            place_of(parameter),
        )

    def _kind(self, parameter: Tensor, group: dict[str, Any]) -> tuple[Any, ...]:
        """What can be updated together: the form of the update, then everything that tells two launches apart."""
        moments = self.init_state(parameter)["exp_avg"].dtype
        parts = gradient_parts(parameter)
        assert parts is not None
        (grad, earlier), rest, device = types_of(parts), rest_of(parameter), parameter.device
        numbers = (group["lr"], group["betas"], group["eps"])
        mastered = rest is not None or parameter.dtype == torch.float32
        if device.type == "cuda" and mastered and grad in KERNEL_TYPES and moments in KERNEL_TYPES:
            return ("triton", rest is not None, grad, earlier, moments, device, *numbers)
        plain = rest is None and earlier is None
        if plain and parameter.dtype == grad == moments and device.type in ("cuda", "cpu"):
            return ("torch", device, grad, group["weight_decay"], *numbers)
        return ("definition",)

    def _launch(self, kind: Any, members: list[tuple[Tensor, dict[str, Any]]]) -> Launch:
        """The launch of a kind, made anew where a parameter came or went, or a state was loaded."""
        groups = [id(group) for group in self.param_groups if any(group is own for _, own in members)]
        key = (*kind[:6], *groups)
        states = [self.state[p] for p, _ in members]
        launch = self._launches.get(key)
        if launch is None or not launch.fits(members, states):
            launch = Launch(members, states, [self.slot(*member) for member in members])
            self._launches[key] = launch
        return launch

    def _fused(self, members: list[tuple[Tensor, dict[str, Any]]], factor: Tensor, skipped: Tensor) -> None:
        group = members[0][1]
        parameters = [local_part(p.detach()) for p, _ in members]
        grads = [local_part(p.grad) for p, _ in members if p.grad is not None]
        states = [self.state[p] for p, _ in members]
        steps = [state["step"] for state in states]
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters,
            grads,
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=skipped,
        )
        torch._foreach_sub_(steps, [skipped] * len(steps))

    def _one_by_one(self, members: list[tuple[Tensor, dict[str, Any]]], factor: Tensor) -> None:
        for parameter, group in members:
            step = self.state[parameter]["step"]
            step += 1
            parts = gradient_parts(parameter)
            assert parts is not None
            definition.adamw(
                self.slot(parameter, group),
                summed(parts).contiguous(),
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                factor=factor,
            )


def place_of(parameter: Tensor) -> Place:
    """The `Place` of the local part of a plain tensor or DTensor.

    Part [2:4, 0:3] of [4, 6]: elements 12 13 14 and 18 19 20, so base 12, inner 3, stride 6.
    """
    if not isinstance(parameter, DTensor):
        return Place()
    boxes = list(local_boxes(parameter))
    if not boxes:
        return Place()
    ((region, start),) = boxes
    shape, sizes = tuple(parameter.shape), tuple(r.stop - r.start for r in region)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    base = sum(s * stride for s, stride in zip(start, strides))
    cut = max((dim for dim in range(len(shape)) if sizes[dim] != shape[dim]), default=0)
    if math.prod(sizes[:cut]) == 1:
        return Place(base)
    assert sizes[1:cut] == shape[1:cut], "a part is cut along dim 0 and one other"
    return Place(base, math.prod(sizes[cut:]), strides[cut - 1])
