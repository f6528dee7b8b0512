"""Linear maps, norms, gates, rotary positions, routers and experts by the native library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.kernels.native import arguments as native
from truekv.kernels.native.library import run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from truekv.core.ops import Activation, Expert, Ops, Part, Routing

_LANES: Final = 16
_MOST_EXPERTS: Final = 4096


def is_bf16(x: torch.Tensor) -> bool:
    """Whether x is bfloat16; anything else must be float32."""
    if x.dtype == torch.bfloat16:
        return True
    if x.dtype != torch.float32:
        raise Refused(f"native operations take float32 and bfloat16, not {x.dtype}; choose one of them as --dtype")
    return False


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy of it whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Packed:
    """`count` weights [out, in] of one shape, each packed as native/linear.cpp describes."""

    def __init__(self, count: int, out: int, into: int, dtype: torch.dtype) -> None:
        """Allocate them; every weight is to be filled in with `put`."""
        depth = into + into % 2 if dtype == torch.bfloat16 else into
        self.out, self.into = out, into
        self.data = torch.empty(count, depth * (-(-out // _LANES) * _LANES), dtype=dtype)
        self.bf16 = is_bf16(self.data)

    def put(self, index: int, parts: Iterable[torch.Tensor]) -> None:
        """Fill in one weight: parts [n, in], whose outputs lie side by side."""
        first = 0
        for part in parts:
            weight = dense(part)
            at = self.data[index].data_ptr()
            run(
                "pack",
                native.Pack(weight.data_ptr(), at, self.into, len(part), weight.stride(0), first, self.out, self.bf16),
            )
            first += len(part)
        assert first == self.out


class NativeMatrix:
    """y = x W^T + b; each output is summed over the inputs in order, however many rows there are."""

    def __init__(self, parts: Seq[Part]) -> None:
        """Pack the parts."""
        weights = [part.weight for part in parts]
        self.packed = Packed(1, sum(map(len, weights)), weights[0].shape[1], weights[0].dtype)
        self.packed.put(0, weights)
        self.bias: torch.Tensor | None = None
        if any(part.bias is not None for part in parts):
            zeros = [weight.new_zeros(len(weight)) for weight in weights]
            biases = [zero if part.bias is None else part.bias for part, zero in zip(parts, zeros, strict=True)]
            self.bias = torch.cat(biases).float()

    def __call__(self, x: torch.Tensor, *, widened: bool = False) -> torch.Tensor:
        """Map [T, in] to [T, out]."""
        packed, x = self.packed, dense(x)
        assert x.dtype == packed.data.dtype
        assert x.shape[1] == packed.into
        rows, out_bf16 = len(x), packed.bf16 and not widened
        out = torch.empty(rows, packed.out, dtype=torch.bfloat16 if out_bf16 else torch.float32)
        run(
            "linear",
            native.Linear(
                x.data_ptr(),
                packed.data.data_ptr(),
                None if self.bias is None else self.bias.data_ptr(),
                out.data_ptr(),
                rows=rows,
                into=packed.into,
                out_features=packed.out,
                groups=1,
                x_row=x.stride(0),
                out_row=packed.out,
                bf16=packed.bf16,
                out_bf16=out_bf16,
            ),
        )
        return out

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return rows of the weight; NaN for an index that has none, so that nothing is read on the host."""
        packed, indices = self.packed, indices.contiguous()
        out = torch.empty(len(indices), packed.into, dtype=packed.data.dtype)
        run(
            "rows",
            native.Rows(
                packed.data.data_ptr(),
                indices.data_ptr(),
                out.data_ptr(),
                len(indices),
                packed.into,
                packed.out,
                packed.bf16,
            ),
        )
        return out


class NativeHeads:
    """One packed map per head."""

    def __init__(self, weight_HOI: torch.Tensor) -> None:
        """Pack them."""
        heads, out, into = weight_HOI.shape
        self.packed = Packed(heads, out, into, weight_HOI.dtype)
        for index, weight in enumerate(weight_HOI):
            self.packed.put(index, [weight])

    def __call__(self, x_THI: torch.Tensor) -> torch.Tensor:
        """Map [T, H, in] to [T, H, out]."""
        packed, x_THI = self.packed, dense(x_THI)
        assert x_THI.dtype == packed.data.dtype
        tokens, heads = x_THI.shape[:2]
        out_THO = torch.empty(tokens, heads, packed.out, dtype=x_THI.dtype)
        run(
            "linear",
            native.Linear(
                x_THI.data_ptr(),
                packed.data.data_ptr(),
                None,
                out_THO.data_ptr(),
                rows=tokens,
                into=packed.into,
                out_features=packed.out,
                groups=heads,
                x_row=x_THI.stride(0),
                x_group=x_THI.stride(1),
                out_row=heads * packed.out,
                out_group=packed.out,
                bf16=packed.bf16,
                out_bf16=packed.bf16,
            ),
        )
        return out_THO


class NativeExperts:
    """Every expert runs on the tokens that chose it; each token sums its experts in the order of its choice."""

    def __init__(self, count: int, experts: Iterable[Expert], activation: Activation) -> None:
        """Pack them one after the other, so that originals can be let go."""
        self.activation: Activation = activation
        first: Packed | None = None
        down: Packed | None = None
        for index, expert in enumerate(experts):
            if first is None or down is None:
                width, inner = expert.down.shape
                first = Packed(count, sum(map(len, expert.first)), width, expert.down.dtype)
                down = Packed(count, width, inner, expert.down.dtype)
            first.put(index, expert.first)
            down.put(index, [expert.down])
        assert first is not None
        assert down is not None
        self.first, self.down = first, down

    def __call__(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Sum each token's chosen experts: [T, C]."""
        tokens, per_token = chosen_TK.shape
        experts = len(self.first.data)
        places = torch.empty(experts + 1 + 2 * tokens * per_token, dtype=torch.int64)
        starts, sources, places = torch.split(places, [experts + 1, tokens * per_token, tokens * per_token])
        chosen_TK, weights_TK, x_TC = chosen_TK.contiguous(), weights_TK.contiguous(), dense(x_TC)
        pointers = (starts.data_ptr(), sources.data_ptr(), places.data_ptr())
        run("arrange", native.Arrange(chosen_TK.data_ptr(), *pointers, tokens, per_token, experts))
        inner = self._run(self.first, x_TC, starts, sources, tokens * per_token, widened=False)
        inner = activate(inner, self.activation)
        rows = self._run(self.down, inner, starts, None, tokens * per_token, widened=True)
        out_TC = torch.empty(tokens, self.down.out, dtype=x_TC.dtype)
        run(
            "combine",
            native.Combine(
                rows.data_ptr(),
                places.data_ptr(),
                weights_TK.data_ptr(),
                out_TC.data_ptr(),
                tokens,
                per_token,
                self.down.out,
                self.down.bf16,
            ),
        )
        return out_TC

    @staticmethod
    def _run(
        packed: Packed, x: torch.Tensor, starts: torch.Tensor, sources: torch.Tensor | None, rows: int, *, widened: bool
    ) -> torch.Tensor:
        """Multiply rows sorted by expert, each with its expert's weight: [rows, out]."""
        assert x.dtype == packed.data.dtype
        out_bf16 = packed.bf16 and not widened
        out = torch.empty(rows, packed.out, dtype=torch.bfloat16 if out_bf16 else torch.float32)
        run(
            "linear",
            native.Linear(
                x.data_ptr(),
                packed.data.data_ptr(),
                None,
                out.data_ptr(),
                starts.data_ptr(),
                None if sources is None else sources.data_ptr(),
                rows=rows,
                into=packed.into,
                out_features=packed.out,
                groups=len(packed.data),
                x_row=x.stride(0),
                out_row=packed.out,
                bf16=packed.bf16,
                out_bf16=out_bf16,
            ),
        )
        return out


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply an activation: [T, 2 I] or [T, I] to [T, I]."""
    x = dense(x)
    relu2 = activation == "relu2"
    dim = x.shape[1] if relu2 else x.shape[1] // 2
    out = torch.empty(len(x), dim, dtype=x.dtype)
    run("activate", native.Activate(x.data_ptr(), out.data_ptr(), len(x), dim, x.stride(0), relu2, is_bf16(x)))
    return out


class NativeOps:
    """Every operation of core/ops.py, by the native library."""

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
        gain_at = None if gain is None else gain.data_ptr()
        arguments = native.RmsNorm(
            x.data_ptr(), gain_at, out.data_ptr(), outer, inner, dim, x.stride(0), x.stride(-2), eps, is_bf16(x)
        )
        run("rms_norm", arguments)
        return out

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
                0 if len(gain) == dim else dim,
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

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sigmoid of [T, H] in float32."""
        return self._squash(x, None)

    def softplus(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """log(1 + exp(x + bias)) in float32."""
        return self._squash(x, bias)

    def _squash(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = dense(x)
        out = torch.empty(x.shape, dtype=torch.float32)
        rows, dim = x.shape
        bias_at = None if bias is None else bias.data_ptr()
        run("squash", native.Squash(x.data_ptr(), bias_at, out.data_ptr(), rows, dim, x.stride(0), is_bf16(x)))
        return out

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, amplitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of position times frequency."""
        positions = positions.to(torch.int64).contiguous()
        out = torch.empty(2, len(positions), len(frequencies))
        pointers = (positions.data_ptr(), frequencies.data_ptr(), out[0].data_ptr(), out[1].data_ptr())
        run("angles", native.Angles(*pointers, len(positions), len(frequencies), amplitude))
        return out[0], out[1]

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
        """Turn planes (i, i + P), or (2i, 2i + 1) if interleaved."""
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

    def finite(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> bool:
        """Whether every number is finite."""
        x = dense(x.flatten(1))
        answer = torch.empty(1, dtype=torch.int32)
        rows = None if rows is None else rows.contiguous()
        run(
            "finite",
            native.Finite(
                x.data_ptr(),
                None if rows is None else rows.data_ptr(),
                answer.data_ptr(),
                len(x) if rows is None else len(rows),
                x.shape[1],
                x.stride(0),
                is_bf16(x),
            ),
        )
        return bool(answer)


OPS: Final[Ops] = NativeOps()
