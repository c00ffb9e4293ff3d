"""Grouped-GEMM LoRA: one pool of frozen experts with a low-rank update of each weight.

A row is a pair of a token and one of its experts; rows are sorted by expert, so that the rows of an expert are
contiguous. Every product is `y = x·Wᵀ + s·(x·Aᵀ)·B` (LoRA: Hu et al. 2021, arXiv:2106.09685, equation 3), expert by
expert. Neither W + BA nor a gradient of its size is computed. Products and sums are in the order of transformers'
`grouped_mm` kernel, so that an update of zero changes no bit.

The backward pass is written by hand to save memory and time. It keeps one activation, the up-projection, and the (S, r)
inner products, and recomputes the rest. Sums over a token's experts are reshapes both ways, where autograd would
scatter row by row. On a CPU, temporary tensors use buffers that the next pool reuses, because getting fresh pages from
the system takes time.

Legend: N tokens of the pool, k experts per token, S = N·k rows, E experts, H hidden width, I expert width, r rank.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm


class LoraFactors(NamedTuple):
    """LoRA factors of a weight (E, out, in): a (E, r, in), b (E, r, out), both contiguous; scaling (r,), float32."""

    a: Tensor
    b: Tensor
    scaling: Tensor


class ExpertRows(NamedTuple):
    """The S rows, sorted by expert.

    pair (S,): the index of each row's pair among the N·k pairs; row (S,): the row of each pair; token (S,): each row's
    token; ends (E,) int32: the end of each expert's rows.
    """

    pair: Tensor
    row: Tensor
    token: Tensor
    ends: Tensor

    @classmethod
    def by_expert(cls, top_k_index: Tensor, num_experts: int) -> ExpertRows:
        """Sort the pairs of top_k_index (N, k), the experts of each token."""
        expert, pair = torch.sort(top_k_index.reshape(-1))
        row = torch.empty_like(pair)
        row[pair] = torch.arange(len(pair), device=pair.device)
        # histc, as in transformers: it has deterministic kernels, for floats on the CPU and for integers elsewhere
        values = expert.float() if expert.device.type in ("cpu", "mps") else expert.int()
        counts = torch.histc(values, bins=num_experts, min=0, max=num_experts - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        return cls(pair, row, pair // top_k_index.shape[-1], ends)

    def sum_by_token(self, values: Tensor, tokens: int) -> Tensor:
        """(S, H) -> (N, H): sum the k rows of each token. Overwrites the buffer `rows`."""
        by_token = torch.index_select(values, 0, self.row, out=_buffers.get("rows", values, values.shape))
        return by_token.view(tokens, -1, values.shape[-1]).sum(dim=1)


class _Buffers(threading.local):
    """CPU buffers by purpose, reused from pool to pool. On a GPU, torch's caching allocator does the same."""

    def __init__(self):
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return uninitialized memory, which the next call with this name overwrites."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size, key = math.prod(shape), (name, like.dtype)
        if key not in self.held or self.held[key].numel() < size:
            self.held.pop(key, None)  # free it before allocating the larger one
            self.held[key] = like.new_empty(size)
        return self.held[key][:size].view(shape)


_buffers = _Buffers()


def lora_experts_forward(
    experts: nn.Module,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    gate_up: LoraFactors | None,
    down: LoraFactors | None,
) -> Tensor:
    """Run a pool of frozen experts with LoRA on its tokens. Returns (N, H).

    experts: transformers' module with gate_up_proj (E, 2I, H) and down_proj (E, H, I); hidden: (N, H); top_k_index,
    top_k_weights: (N, k). Differentiable, once, with respect to hidden, top_k_weights and the factors.
    """
    rows = ExpertRows.by_expert(top_k_index, experts.num_experts)
    none = (None, None, None)
    return _LowRankExperts.apply(experts, rows, hidden, top_k_weights, *(gate_up or none), *(down or none))


class _LowRankExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, experts, rows, hidden, top_k_weights, *factors):
        # read here: with expert parallelism the module holds this rank's experts only during its forward
        gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
        x = _gather_tokens(hidden.to(gate_up_proj.dtype), rows)
        gate_up, gate_up_inner = _product(x, gate_up_proj, *factors[:3], rows.ends)
        del x  # here and below, to lower the peak memory on a GPU
        activated = _activate(gate_up)
        y, down_inner = _product(activated, down_proj, *factors[3:], rows.ends, buffer="out")
        del activated
        weighted = y.mul_(_gather_weights(top_k_weights, rows))
        ctx.rows = rows
        inner = (gate_up_inner, down_inner)
        ctx.save_for_backward(hidden, top_k_weights, gate_up_proj, down_proj, gate_up, *inner, *factors)
        return rows.sum_by_token(weighted, len(hidden)).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, top_k_weights, gate_up_proj, down_proj, gate_up, *inner_and_factors = ctx.saved_tensors
        gate_up_inner, down_inner, *factors = inner_and_factors
        rows = ctx.rows
        hidden_needs_grad, weights_need_grad = ctx.needs_input_grad[2:4]
        grad_weights = grad_hidden = None

        value = _activate(gate_up)
        # A row's gradient is its token's gradient times its routing weight w. With w omitted here and multiplied into
        # the thin products instead, the result is the gradient of y / w, and gives the one of w too: <grad, y> =
        # <grad·W, activated>. So y need not be kept, and the wide gradient need not be multiplied.
        w = _gather_weights(top_k_weights, rows)
        grad_y = _gather_tokens(grad.to(value.dtype), rows)
        grad_value, *grad_down = _gradients(
            grad_y, value, down_proj, down_inner, *factors[3:], rows.ends, buffer="grad_activated", row_weights=w
        )
        del grad_y
        if weights_need_grad:
            grad_pairs = torch.linalg.vecdot(grad_value, value).index_select(0, rows.row)
            grad_weights = grad_pairs.view_as(top_k_weights).to(top_k_weights.dtype)
        grad_gate_up = _gate_gradient(gate_up, grad_value.mul_(w))
        del value, grad_value, gate_up

        x = None if factors[0] is None else _gather_tokens(hidden.to(grad_gate_up.dtype), rows)
        buffer = "out" if hidden_needs_grad else None
        grad_x, *grad_gate_up_factors = _gradients(
            grad_gate_up, x, gate_up_proj, gate_up_inner, *factors[:3], rows.ends, buffer=buffer
        )
        if hidden_needs_grad:
            grad_hidden = rows.sum_by_token(grad_x, len(hidden)).to(hidden.dtype)
        return None, None, grad_hidden, grad_weights, *grad_gate_up_factors, None, *grad_down, None


def _gather_tokens(values: Tensor, rows: ExpertRows) -> Tensor:
    """(N, H) -> (S, H), in the buffer `rows`."""
    out = _buffers.get("rows", values, (len(rows.token), values.shape[-1]))
    return torch.index_select(values, 0, rows.token, out=out)


def _gather_weights(top_k_weights: Tensor, rows: ExpertRows) -> Tensor:
    """Routing weights (N, k) -> (S, 1)."""
    return top_k_weights.reshape(-1).index_select(0, rows.pair).unsqueeze(-1)


def _activate(gate_up: Tensor) -> Tensor:
    """silu(gate)·up of [gate | up] (S, 2I) -> (S, I), in the buffer `activated`."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = _buffers.get("activated", gate, gate.shape)
    return torch.ops.aten.silu.out(gate, out=out).mul_(up)


def _gate_gradient(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of silu(gate)·up with respect to [gate | up] (S, 2I), in the buffer `grad_gate_up`.

    Overwrites grad (S, I).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = _buffers.get("grad_gate_up", gate_up, gate_up.shape)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
    return grad_gate_up


def _product(x: Tensor, weight: Tensor, a: Tensor | None, b, scaling, ends: Tensor, *, buffer: str | None = None):
    """x (S, in) -> y (S, out), and s·x·Aᵀ (S, r) for the backward pass. buffer: the buffer to use for y, if any."""
    weight = weight.transpose(-2, -1)
    if a is None:
        return grouped_mm(x, weight, offs=ends), None
    inner = _inner(x, a, ends).mul_(scaling)
    return _fused_products(x, weight, inner, b, ends, buffer), inner


def _fused_products(
    x: Tensor, weight: Tensor, inner: Tensor, factor: Tensor, ends: Tensor, buffer: str | None
) -> Tensor:
    """x (S, n) by weight (E, n, m), plus inner (S, r) by factor (E, r, m) -> (S, m)."""
    if x.device.type != "cpu":
        return grouped_mm(inner, factor, offs=ends).add_(grouped_mm(x, weight, offs=ends))
    shape = (len(x), weight.shape[-1])
    y = _buffers.get(buffer, x, shape) if buffer else x.new_empty(shape)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    by_expert = (y.split(sizes), inner.split(sizes), factor.unbind(), x.split(sizes), weight.unbind())
    for y_rows, inner_rows, expert_factor, x_rows, expert_weight in zip(*by_expert, strict=True):
        torch.mm(inner_rows, expert_factor, out=y_rows)
        y_rows.addmm_(x_rows, expert_weight)  # rounds after the sum, and reads y once
    return y


def _inner(x: Tensor, factor: Tensor, ends: Tensor) -> Tensor:
    """x (S, m) by factor (E, r, m) -> (S, r)."""
    if x.device.type == "cpu":
        # a third faster with the thin factor first; on a GPU the kernel requires each group to start at 16 bytes
        return grouped_mm(factor, x.t(), offs=ends).t().contiguous()
    return grouped_mm(x, factor.transpose(-2, -1), offs=ends)


def _gradients(grad_y, x, weight, inner, a, b, scaling, ends, *, buffer: str | None, row_weights=None):
    """Return the gradients of x, a and b in `_product`; inner: its s·x·Aᵀ; buffer: for the first, None to skip it.

    row_weights (S, 1): factors of grad_y in the gradients of a and b only.
    """
    if a is None:
        return grouped_mm(grad_y, weight, offs=ends) if buffer else None, None, None
    grad_inner = _inner(grad_y, b, ends).mul_(scaling)
    grad_x = _fused_products(grad_y, weight, grad_inner, a, ends, buffer) if buffer else None
    if row_weights is not None:
        grad_inner, inner = grad_inner.mul_(row_weights), inner * row_weights
    grad_a = grouped_mm(grad_inner.t(), x, offs=ends)
    grad_b = grouped_mm(inner.t(), grad_y, offs=ends)
    return grad_x, grad_a, grad_b
