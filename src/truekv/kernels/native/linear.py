"""Linear maps of the native library: packed weights, one or one per head or per expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.untouched import untouched
from truekv.kernels.native import arguments as native
from truekv.kernels.native.library import run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from truekv.core.ops import Activation, Expert, Part

_LANES: Final = 16


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
        # On large pages where the system has them, which are read faster.
        self.data = untouched((count, depth * (-(-out // _LANES) * _LANES)), dtype, "cpu")
        self.bf16 = is_bf16(self.data)

    def put(self, index: int, parts: Iterable[torch.Tensor]) -> None:
        """Fill in one weight: parts [n, in], whose outputs lie side by side."""
        first = 0
        for part in parts:
            weight = dense(part)
            at = self.data[index].data_ptr()
            run(
                "pack",
                native.Pack(
                    weight.data_ptr(), at, self.into, part.shape[0], weight.stride(0), first, self.out, self.bf16
                ),
            )
            first += part.shape[0]
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
            zeros = [weight.new_zeros(weight.shape[0]) for weight in weights]
            biases = [zero if part.bias is None else part.bias for part, zero in zip(parts, zeros, strict=True)]
            self.bias = torch.cat(biases).float()

    def __call__(self, x: torch.Tensor, *, widened: bool = False) -> torch.Tensor:
        """Map [T, in] to [T, out]."""
        packed, x = self.packed, dense(x)
        assert x.dtype == packed.data.dtype
        assert x.shape[1] == packed.into
        rows, out_bf16 = x.shape[0], packed.bf16 and not widened
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
        out = torch.empty(indices.shape[0], packed.into, dtype=packed.data.dtype)
        run(
            "rows",
            native.Rows(
                packed.data.data_ptr(),
                indices.data_ptr(),
                out.data_ptr(),
                indices.shape[0],
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
    out = torch.empty(x.shape[0], dim, dtype=x.dtype)
    run("activate", native.Activate(x.data_ptr(), out.data_ptr(), x.shape[0], dim, x.stride(0), relu2, is_bf16(x)))
    return out
