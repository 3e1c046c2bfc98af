"""Quadratic attention by our Triton kernels.

The stream is cut into stretches of a few chunks of 64 tokens, all at once. Inside a stretch tokens read each other
directly, by the polynomial of q . k; what is before the stretch they read through features, which no memory ever holds:

    1. b = phi(k)^T [v, 1] over each stretch, of the document that goes on             `written`
    2. S = what comes into each: sums of b, since nothing decays                       `join`
    3. o = (sum over the stretch so far of f(q . k) v + phi(q)^T S) r                  `outputs`

    4. R = what comes into each stretch from behind: the same of phi(q)^T [r do, -r delta]
    5. dv as 3, of (k, q, do) and R; dq, dk by f' and by the features' gradient        `gradients`

Final states, and the gradients of initial ones, are what comes into the stretch in which a document ends and its own
writes there (`written` once more). Nothing waits for more than a stretch but `join`, which adds one number a step.

Budget of a token and head, forward: pairs, on average half a stretch of L tokens, L / 2 * 2 (K + V) FLOPs; reads and
writes of a state 2 * 2 F V, and 3 * 4 K F to make features: with K = 16, V = 128, F = 153 and L = 512 that is 74, 78
and 29 thousand. `group_of` has stretches grow with F, so that pairs and states cost alike. Backward: dv as o, two more
of that for dq and dk, and one sum more. Bytes: q, k, v, o once, and states, 4 F (V + 1) a stretch, about as many as v.
Saved: inputs, o, which the caller keeps anyway, r [T, H], and a state a stretch.

Products take the type of the inputs (float32 without TF32) and add up in float32; states and the denominator are
float32. Bit for bit the same on every run.

Legend: T tokens, H heads, K query/key width, F features, V value width, Y = V + 1 with a normaliser, else V,
N segments, M places for chunks, S stretches of chunks.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunk_table import CHUNK, table_of
from torchlinearmoe.kernels.linear.walk import contiguous, given, or_nothing, precision, rows_ready, strides, tile
from torchlinearmoe.kernels.operator import HOPPER, NARROW, Backend, Call, Defect
from torchlinearmoe.kernels.quadratic.features import KINDS, feature_width
from torchlinearmoe.segments import Segments

WIDEST = 128
"""Channels of queries and keys."""


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    scale: float,
    normalize: bool,
    eps: float,
    segments: Segments,
    initial_state: Tensor | None,
    want_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `definition.quadratic_attention`."""
    table = table_of(segments)
    stream = table.start_M, table.end_M, table.segment_M, table.first_N1
    k, v = k.to(q.dtype), v.to(q.dtype)
    taylor = kind == "taylor"
    o, final, *_ = quadratic(q, k, v, initial_state, *stream, taylor, scale, normalize, eps, want_final)
    return o, final if want_final else None


def group_of(features: int) -> int:
    """Chunks of a stretch: its pairs cost about what a state does, which has hardly more rows than it has tokens."""
    return max(4, min(128, 1 << (features // 32).bit_length()))


@dataclass(frozen=True)
class _Problem:
    """One call's sizes and what all of its kernels take."""

    q: Tensor
    """[T, H, K]"""
    v: Tensor
    """[T, H, V]"""
    stream: tuple[Tensor, Tensor, Tensor, Tensor]
    """start, end, segment: [M], first: [N + 1], a `ChunkTable`."""
    taylor: bool
    scale: float
    normalize: bool

    @property
    def F(self) -> int:
        return feature_width("taylor" if self.taylor else "square", self.q.shape[2])

    @property
    def group(self) -> int:
        return group_of(self.F)

    @property
    def M(self) -> int:
        return self.stream[0].shape[0]

    @property
    def N(self) -> int:
        return self.stream[3].shape[0] - 1

    @property
    def S(self) -> int:
        return -(-self.M // self.group)

    @property
    def Y(self) -> int:
        return self.v.shape[2] + self.normalize

    @property
    def wide(self) -> bool:
        """Products are of float32, whose parts take more registers: tiles are smaller."""
        return self.q.dtype == torch.float32

    @property
    def stages(self) -> int:
        """Loads ahead."""
        return 1 if self.wide else 2

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the states of documents, and of stretches, whose rows begin where the hardware reads 16 bytes at once."""
        H = self.q.shape[1]
        return (self.N, H, self.F, self.Y), (self.S, H, self.F, -(-self.Y // 16) * 16)

    def options(self, reverse: bool, *, block: int, columns: int) -> dict[str, Any]:
        """Constants of a kernel with blocks of so many features, tiles of so many values."""
        K = self.q.shape[2]
        return {
            "K": K, "F": self.F, "GROUP": self.group, "C": CHUNK, "BK": tile(K, 128), "BF": tile(self.F, block),
            "BV": tile(self.v.shape[2], columns), "TAYLOR": self.taylor, "NORMALIZE": self.normalize,
            "REVERSE": reverse, "PRECISION": precision(self.q),
        }  # fmt: skip

    def states(
        self, w: Tensor, u: Tensor, r: Tensor | None, delta: Tensor | None, enter: Tensor | None, reverse: bool
    ) -> Tensor | None:
        """What comes into stretches, [S, H, F, Y and more]; None of a single stretch."""
        if self.S == 1:
            return None
        states = self.q.new_empty(self.shapes[1], dtype=torch.float32)
        self._write(states, w, u, r, delta, None, None, reverse, documents=False)
        H, pitch, B = self.q.shape[1], states.shape[3], 512
        kernels().join[-(-self.F * pitch // B), H](
            states, given(enter, states), *self.stream[2:], self.N, self.S, H, pitch, self.Y,
            F=self.F, GROUP=self.group, B=B, REVERSE=reverse, HAS_GIVEN=enter is not None, num_warps=4,
        )  # fmt: skip
        return states

    def left(
        self,
        w: Tensor,
        u: Tensor,
        r: Tensor | None,
        delta: Tensor | None,
        states: Tensor | None,
        enter: Tensor | None,
        reverse: bool,
    ) -> Tensor:
        """The states that documents leave, [N, H, F, Y]."""
        final = self.q.new_empty(self.shapes[0], dtype=torch.float32)
        self._write(final, w, u, r, delta, states, enter, reverse, documents=True)
        return final

    def _write(
        self,
        sums: Tensor,
        w: Tensor,
        u: Tensor,
        r: Tensor | None,
        delta: Tensor | None,
        states: Tensor | None,
        enter: Tensor | None,
        reverse: bool,
        documents: bool,
    ) -> None:
        count, H, _, pitch = sums.shape
        options = self.options(reverse, block=32 if self.wide else 64, columns=64)
        tiles = -(-self.F // options["BF"]) * -(-u.shape[2] // options["BV"])
        kernels().written[count, H, tiles](
            w, u, given(r, w), given(delta, w), given(states, sums), given(enter, sums), sums, *self.stream, self.N,
            self.scale, *strides(w), *strides(u), H, u.shape[2], self.shapes[1][3], self.Y, pitch, **options,
            DOCUMENTS=documents, HAS_STATES=states is not None, HAS_GIVEN=enter is not None, num_stages=self.stages,
            num_warps=4,
        )  # fmt: skip

    def outputs(
        self,
        x: Tensor,
        w: Tensor,
        u: Tensor,
        r: Tensor | None,
        states: Tensor | None,
        enter: Tensor | None,
        eps: float,
        reverse: bool,
    ) -> Tensor:
        """y [T, H, V]; forward r is written, if there is one."""
        T, H, V = u.shape
        y = torch.empty(T, H, V, dtype=u.dtype, device=u.device)
        options = self.options(reverse, block=32, columns=64 if self.wide else 128)
        kernels().outputs[self.M, H, -(-V // options["BV"])](
            x, w, u, given(r, x), given(states, x), given(enter, x), y, *self.stream, self.N, self.scale, eps,
            *strides(x), *strides(w), *strides(u), H, V, self.shapes[1][3], self.Y, **options,
            HAS_STATES=states is not None, HAS_GIVEN=enter is not None, num_stages=self.stages,
            num_warps=4,
        )  # fmt: skip
        return y

    def gradients(
        self,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        u: Tensor,
        r: Tensor | None,
        delta: Tensor | None,
        states: Tensor | None,
        enter: Tensor | None,
        reverse: bool,
    ) -> Tensor:
        """dx [T, H, K]."""
        (_, H, V), dx = u.shape, torch.empty(x.shape, dtype=x.dtype, device=x.device)
        options = self.options(reverse, block=32, columns=32 if self.wide else 128)
        kernels().gradients[self.M, H](
            x, w, a, u, given(r, x), given(delta, x), given(states, x), given(enter, x), dx, *self.stream, self.N,
            self.scale, *strides(x), *strides(w), *strides(a), *strides(u), H, V, self.shapes[1][3], self.Y, **options,
            PARTS=-(-V // options["BV"]), HAS_STATES=states is not None, HAS_GIVEN=enter is not None,
            num_stages=self.stages, num_warps=4,
        )  # fmt: skip
        return dx


@functools.cache
def kernels() -> Any:  # Triton turns numbers into its own constants
    """The module of kernels."""
    return importlib.import_module("torchlinearmoe.kernels.quadratic.triton_kernels")


@torch.library.custom_op("torchlinearmoe::quadratic", mutates_args=())
def quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    taylor: bool,
    scale: float,
    normalize: bool,
    eps: float,
    want_final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [T, H, V], the final states [N, H, F, Y], empty where they are not wanted, what comes into stretches, [S, H, F,
    Y and more], empty of a single one, and r = 1 / (denominator + eps), [T, H], empty without `normalize`.

    q, k: [T, H, K]; v: [T, H, V] of one type; initial: [N, H, F, Y] in fp32; start, end, segment: [M],
    first: [N + 1], a `ChunkTable`.
    """
    q, k, v, initial = rows_ready(q), rows_ready(k), rows_ready(v), contiguous(initial)
    problem = _Problem(q, v, (start, end, segment, first), taylor, scale, normalize)
    states = problem.states(k, v, None, None, initial, False)
    r = q.new_empty(q.shape[:2], dtype=torch.float32) if normalize else None
    o = problem.outputs(q, k, v, r, states, initial, eps, False)
    final = problem.left(k, v, None, None, states, initial, False) if want_final else None
    return o, or_nothing(final, q), or_nothing(states, q), or_nothing(r, q)


@torch.library.custom_op("torchlinearmoe::quadratic_backward", mutates_args=())
def quadratic_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    entered: Tensor,
    o: Tensor,
    r: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    start: Tensor,
    end: Tensor,
    segment: Tensor,
    first: Tensor,
    taylor: bool,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and initial (empty without one)."""
    q, k, v, do = rows_ready(q), rows_ready(k), rows_ready(v), rows_ready(do)
    initial, dfinal = contiguous(initial), contiguous(dfinal)
    problem = _Problem(q, v, (start, end, segment, first), taylor, scale, normalize)
    (T, H, V), states = v.shape, entered if entered.numel() else None
    inverse, delta = None, None
    if normalize:
        inverse, delta = r, torch.empty_like(r)
        kernels().products_of_outputs[-(-T // CHUNK), H](
            do, o.contiguous(), delta, T, *strides(do), H, V, C=CHUNK, BV=tile(V, 64), num_warps=4
        )
    dstates = problem.states(q, do, inverse, delta, dfinal, True)
    dq = problem.gradients(q, k, do, v, inverse, delta, states, initial, False)
    dk = problem.gradients(k, q, v, do, inverse, delta, dstates, dfinal, True)
    dv = problem.outputs(k, q, do, inverse, dstates, dfinal, 0.0, True)
    dinitial = None if initial is None else problem.left(q, do, inverse, delta, dstates, dfinal, True)
    return dq, dk, dv, or_nothing(dinitial, q)


@quadratic.register_fake
def _(q, k, v, initial, start, end, segment, first, taylor, scale, normalize, eps, want_final):
    problem = _Problem(q, v, (start, end, segment, first), taylor, scale, normalize)
    documents, stretches = problem.shapes
    return (
        v.new_empty(v.shape),
        q.new_empty(documents if want_final else (0,), dtype=torch.float32),
        q.new_empty(stretches if problem.S > 1 else (0,), dtype=torch.float32),
        q.new_empty(q.shape[:2] if normalize else (0,), dtype=torch.float32),
    )


@quadratic_backward.register_fake
def _(q, k, v, initial, entered, o, r, do, dfinal, start, end, segment, first, taylor, scale, normalize):
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, q.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.taylor, ctx.scale, ctx.normalize, _, ctx.want_final = inputs
    o, _, entered, r = output
    ctx.mark_non_differentiable(entered, r)
    ctx.save_for_backward(*tensors, o if ctx.normalize else None, entered, r)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, initial, *stream, o, entered, r = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do.to(v.dtype)
    dfinal = None if dfinal is None or not ctx.want_final else dfinal.float()
    dq, dk, dv, dinitial = quadratic_backward(
        q, k, v, initial, entered, v if o is None else o, r, do, dfinal, *stream, ctx.taylor, ctx.scale, ctx.normalize
    )
    return dq, dk, dv, None if initial is None else dinitial, *(None,) * 9


quadratic.register_autograd(_backward, setup_context=_save)


def _refuses(call: Call) -> str | None:
    return f"it takes keys of at most {WIDEST} channels" if call.channels > WIDEST else None


WIDE_KEYS = Defect(
    dtypes=frozenset((torch.bfloat16, torch.float16)),
    kinds=frozenset(KINDS),
    capability=HOPPER,
    triton=((0, 0, 0), (3, 8, 0)),
    backward_only=True,
    # Wrong on a GPU with Triton 3.6.0, keys of 64 channels: its code makes addresses with a flag that nothing has set.
    # So does that of 3.7.0 and 3.7.1, of the ptxas of CUDA 12.8; that of 3.8.0 (CUDA 12.9) does not.
    reason="Triton before 3.8.0 miscompiles its backward pass for keys of more than 32 channels on Hopper GPUs",
    way_out="install Triton 3.8.0 or newer, or use 'auto' or 'torch'",
    above=32,
)

BACKEND = Backend(
    "triton",
    quadratic_attention,
    KINDS,
    order=40,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    refuses=_refuses,
    defects=(WIDE_KEYS,),
    graphed=True,
    prepare=table_of,
)
