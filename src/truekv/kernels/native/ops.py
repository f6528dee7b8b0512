"""Linear maps, norms, gates, rotary positions, routers and experts by the native library."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.kernels.native import arguments as native
from truekv.kernels.native.library import run
from truekv.kernels.native.linear import NativeExperts, NativeHeads, NativeMatrix, activate, dense, is_bf16
from truekv.kernels.reference.ops import OPS as REFERENCE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from truekv.core.ops import Activation, Expert, Ops, Part, Routing

_MOST_EXPERTS: Final = 4096


class NativeOps:
    """Every operation of core/ops.py, by the native library."""

    apart: ClassVar[bool] = False

    def matrix(self, parts: Seq[Part]) -> NativeMatrix:
        """Pack the parts as one map."""
        return NativeMatrix(parts)

    def head_matrices(self, weight_HOI: torch.Tensor) -> NativeHeads:
        """Pack one map per head."""
        return NativeHeads(weight_HOI)

    def experts(self, count: int, experts: Iterable[Expert], activation: Activation) -> NativeExperts:
        """Pack the experts."""
        return NativeExperts(count, experts, activation)

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
        """Normalise the last dimension of [T, D] or [T, H, D]."""
        x = dense(x)
        out = torch.empty(x.shape, dtype=x.dtype)
        outer, inner, dim = (x.shape[0], 1, x.shape[1]) if x.ndim == 2 else x.shape
        pointers = (x.data_ptr(), None, None if gain is None else gain.data_ptr(), None, out.data_ptr())
        run("rms_norm", native.RmsNorm(*pointers, outer, inner, dim, x.stride(0), x.stride(-2), eps, is_bf16(x)))
        return out

    def add_norm(
        self, x: torch.Tensor, change: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + change and its norm."""
        x, change = dense(x), change.contiguous()
        assert x.dtype == change.dtype
        rows, dim = x.shape
        total, out = torch.empty(rows, dim, dtype=x.dtype), torch.empty(rows, dim, dtype=x.dtype)
        pointers = (x.data_ptr(), change.data_ptr(), gain.data_ptr(), total.data_ptr(), out.data_ptr())
        run("rms_norm", native.RmsNorm(*pointers, rows, 1, dim, x.stride(0), dim, eps, is_bf16(x)))
        return total, out

    def gated_norm(
        self, x: torch.Tensor, gate: torch.Tensor, gain: torch.Tensor, eps: float, *, gate_first: bool
    ) -> torch.Tensor:
        """Normalise rows [T, H, D] before or after they are multiplied by silu(gate)."""
        assert x.dtype == torch.float32
        x, gate = x.contiguous(), dense(gate)
        outer, inner, dim = x.shape
        out = torch.empty(outer, inner * dim, dtype=gate.dtype)
        run(
            "gated_norm",
            native.GatedNorm(
                x.data_ptr(),
                gate.data_ptr(),
                gain.data_ptr(),
                out.data_ptr(),
                outer,
                inner,
                dim,
                gate.stride(0),
                0 if gain.shape[0] == dim else dim,
                eps,
                gate_first,
                is_bf16(gate),
            ),
        )
        return out

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Apply an activation."""
        return activate(x, activation)

    def gate(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """X * sigmoid(by), in by's dtype."""
        x, by = dense(x), dense(by)
        outer, inner, dim = x.shape
        out = torch.empty(outer, inner, dim, dtype=by.dtype)
        run(
            "gate",
            native.Gate(
                x.data_ptr(),
                by.data_ptr(),
                out.data_ptr(),
                outer,
                inner,
                dim,
                x.stride(0),
                x.stride(1),
                by.stride(0),
                by.stride(1),
                by.shape[2] == 1,
                is_bf16(x),
                is_bf16(by),
            ),
        )
        return out

    def softplus(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """log(1 + exp(x + bias)) in float32."""
        x = dense(x)
        rows, dim = x.shape
        out = torch.empty(rows, dim)
        pointers = (x.data_ptr(), bias.data_ptr(), out.data_ptr())
        run("softplus", native.Softplus(*pointers, rows, dim, x.stride(0), is_bf16(x)))
        return out

    def delta_gates(
        self, b: torch.Tensor, a: torch.Tensor, bias: torch.Tensor, rate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sigmoid(b) and rate * softplus(a + bias) in float32."""
        b, a = dense(b), dense(a)
        assert b.dtype == a.dtype
        rows, heads = b.shape
        beta, decay = torch.empty(rows, heads), torch.empty(rows, heads)
        pointers = (tensor.data_ptr() for tensor in (b, a, bias, rate, beta, decay))
        run("delta_gates", native.DeltaGates(*pointers, rows, heads, b.stride(0), a.stride(0), is_bf16(b)))
        return beta, decay

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, amplitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of position times frequency."""
        positions = positions.to(torch.int64).contiguous()
        out = torch.empty(2, positions.shape[0], frequencies.shape[0])
        pointers = (positions.data_ptr(), frequencies.data_ptr(), out[0].data_ptr(), out[1].data_ptr())
        run("angles", native.Angles(*pointers, positions.shape[0], frequencies.shape[0], amplitude))
        return out[0], out[1]

    def norm_rotate(
        self,
        heads: Seq[torch.Tensor],
        gains: Seq[torch.Tensor | None],
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        interleaved: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Norm what has a gain, then turn it."""
        return tuple(
            _rotated(x if gain is None else self.rms_norm(x, gain, eps), cos, sin, interleaved=interleaved)
            for x, gain in zip(heads, gains, strict=True)
        )

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the experts of each token and keep the best; of equals the first."""
        logits = logits.contiguous()
        tokens, experts = logits.shape
        if experts > _MOST_EXPERTS:
            raise Refused(
                f"native routing takes up to {_MOST_EXPERTS} experts, not {experts}; use the reference backend"
            )
        weights_TK = torch.empty(tokens, routing.per_token)
        chosen_TK = torch.empty(tokens, routing.per_token, dtype=torch.int64)
        run(
            "route",
            native.Route(
                logits.data_ptr(),
                None if bias is None else bias.data_ptr(),
                weights_TK.data_ptr(),
                chosen_TK.data_ptr(),
                tokens,
                experts,
                routing.per_token,
                routing.groups,
                routing.kept_groups,
                routing.scale,
                routing.score == "sigmoid",
                routing.normalised,
            ),
        )
        return weights_TK, chosen_TK

    def finite(self, *parts: torch.Tensor, rows: torch.Tensor | None = None) -> bool:
        """Whether every number is finite."""
        flat = [dense(part.flatten(1)) for part in parts]
        rows = None if rows is None else rows.contiguous()
        arguments = native.Finite(
            native.Parts(*((part.data_ptr(), part.shape[1], part.stride(0), is_bf16(part)) for part in flat)),
            None if rows is None else rows.data_ptr(),
            len(flat),
            len(flat[0] if rows is None else rows),
        )
        run("finite", arguments)
        return bool(arguments.finite)

    def best(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the reference returns: whole rows are drawn from here."""
        return REFERENCE.best(x, count)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Where each row's largest number is, of equal ones the first; -1 where one is not finite."""
        x = dense(x)
        places = torch.empty(len(x), dtype=torch.int64)
        run("largest", native.Largest(x.data_ptr(), places.data_ptr(), *x.shape, x.stride(0), is_bf16(x)))
        return places


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Turn planes (i, i + P) of [T, H, D], or (2i, 2i + 1) if interleaved."""
    x = dense(x)
    outer, inner, dim = x.shape
    out = torch.empty(outer, inner, dim, dtype=x.dtype)
    run(
        "rotate",
        native.Rotate(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            outer,
            inner,
            dim,
            cos.shape[1],
            x.stride(0),
            x.stride(1),
            interleaved,
            is_bf16(x),
        ),
    )
    return out


OPS: Final[Ops] = NativeOps()
