"""Bugs of the kernels for GPUs, put into their source: Triton's run in its interpreter, that in CUDA C++ as its PTX."""

from __future__ import annotations

import inspect
import linecache
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest
import torch
from kernels.cuda import emulated as emulated_module
from kernels.cuda import test_attend, test_latent
from kernels.cuda.emulated import Emulated
from kernels.native.cache import formats
from kernels.triton import test_frames, test_largest, test_ops, test_paged, test_scans, test_store
from memory.toys import gdn, gqa
from mutants.mutant import Mutant, Patch

from truekv.kernels.cuda import compiler, kernel, trial
from truekv.kernels.cuda import paged as cuda
from truekv.kernels.triton import attention, encode, frames, largest, paged, rows
from truekv.kernels.triton import gdn as gdn_module
from truekv.kernels.triton import mamba2 as mamba2_module
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.kernels.triton.tiles import SPAN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

NO_INTERPRETER: Final = "" if INTERPRETED else "Triton's interpreter is off: TRITON_INTERPRET=1"
NO_COMPILER: Final = NO_INTERPRETER or ("" if compiler.nvcc() else "there is no nvcc")


@contextmanager
def interpreted() -> Iterator[Mapping[str, Any]]:
    """What the tests of Triton's kernels run in: memory of torch.empty is NaN, and infinities are numbers."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield {}
    finally:
        torch.use_deterministic_algorithms(mode=before)


@contextmanager
def emulated() -> Iterator[Mapping[str, Any]]:
    """The same, with the CUDA kernel's PTX where a device would run it."""
    found = Emulated()
    with interpreted(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuda, "load", found.load)
        patched.setattr(trial, "load", found.load)
        yield {"emulated": found}


def changed(source: str, old: str, new: str) -> str:
    """The source with one place changed, which must be there once."""
    if source.count(old) != 1:
        raise ValueError(f"{old!r} is there {source.count(old)} times")
    return source.replace(old, new)


def in_triton(user: ModuleType, name: str, old: str, new: str) -> Callable[[], list[Patch]]:
    """A kernel of other source, for the module that uses it; what it calls is what the original calls."""

    def patches() -> list[Patch]:
        function = getattr(user, name).fn
        source = changed(inspect.getsource(function), old, new)
        # The interpreter reads the lines of the file.
        file, namespace = f"<{name} with a bug>", dict[str, Any]()
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        exec(compile(source, file, "exec"), function.__globals__, namespace)  # noqa: S102 (our own source)
        return [Patch(user, name, namespace[name])]

    return patches


def in_cuda(old: str, new: str) -> Callable[[], list[Patch]]:
    """The CUDA kernel of other source."""

    def ptx(kind: kernel.Kind) -> str:
        found = compiler.nvcc()
        assert found is not None
        return found.ptx(kind.file, changed(kind.text, old, new), compiler.options(kind.definitions))

    return lambda: [Patch(emulated_module, "ptx", ptx)]


def triton(
    name: str, breaks: str, test: Callable[..., None], bug: Callable[[], list[Patch]], /, **given: object
) -> Mutant:
    return Mutant(name, breaks, test, bug, given, interpreted, NO_INTERPRETER)


def cpp(
    name: str, breaks: str, test: Callable[..., None], bug: Callable[[], list[Patch]], /, **given: object
) -> Mutant:
    return Mutant(f"{name} (CUDA)", breaks, test, bug, given, emulated, NO_COMPILER)


_HEADS: Final[dict[str, object]] = {
    "tokens": 2,
    "dim": 24,
    "planes": 3,
    "gained": (True, True),
    "interleaved": False,
    "dtype": torch.bfloat16,
}

MUTANTS: Final = (
    triton(
        "table read a page off",
        "attention takes each page from the entry before its own",
        test_paged.test_groups_and_query_lengths,
        in_triton(paged, "attend_kernel", "first_G // PAGE_TOKENS,", "tl.maximum(first_G // PAGE_TOKENS - 1, 0),"),
        group=2,
        counts=[1, 1],
    ),
    triton(
        "causal edge off by one",
        "a token sees the draft that follows it",
        test_paged.test_groups_and_query_lengths,
        in_triton(paged, "attend_kernel", "tl.minimum(position_M, end - 1)", "tl.minimum(position_M + 1, end - 1)"),
        group=2,
        counts=[3, 1],
    ),
    triton(
        "unwritten lines read",
        "lines beyond the last token meet a weight of zero, which NaN does not mind",
        test_paged.test_lines_that_nobody_wrote_are_never_read_as_numbers,
        in_triton(paged, "attend_kernel", "[None, :] < end", "[None, :] < end + PAGE_TOKENS"),
        name="int8",
        garbage=0xFF,
    ),
    triton(
        "window's edge off by one",
        "a windowed token sees one key more than its window has",
        test_paged.test_windows,
        in_triton(paged, "attend_kernel", "position_M - window, ACROSS", "position_M - window - 1, ACROSS"),
        window=33,
    ),
    triton(
        "heads of a group strided",
        "query head h belongs to kv head h % kv heads instead of h // group",
        test_paged.test_groups_and_query_lengths,
        in_triton(attention, "_query_rows", "head * GROUP + place_M % GROUP", "place_M % GROUP * HEADS + head"),
        group=5,
        counts=[1, 1],
    ),
    triton(
        "scale of the next row",
        "a row is multiplied by the scale of the line after it",
        test_paged.test_groups_and_query_lengths,
        in_triton(
            attention,
            "read_rows",
            "scales_G[:, None] + line_L[None, :]",
            "scales_G[:, None] + ((line_L + 1) % ROW.page_tokens)[None, :]",
        ),
        group=1,
        counts=[1, 1],
    ),
    triton(
        "merge forgets the largest",
        "spans are merged relative to the largest score of the span before, not of all before",
        test_paged.test_lengths_at_the_edges_of_blocks_and_spans,
        in_triton(frames, "fold", "return mean, raised_M,", "return mean, top_M,"),
        length=2 * SPAN + 1,
    ),
    triton(
        "spans run into one another",
        "a program of several spans adds up their keys one by one, not span by span",
        test_paged.test_a_program_of_several_spans_leaves_the_same_bits,
        in_triton(paged, "attend_kernel", "block % span_keys == 0", "block < 0"),
        layer=gqa(2, 64),
        keys="int8",
        values="kv4",
        group=4,
        new=2,
    ),
    triton(
        "padded tokens stored",
        "a token of no line is written to the first line of its page",
        test_store.test_a_token_of_no_line_is_stored_nowhere,
        in_triton(
            encode,
            "_store",
            "line_R = tl.load(line + token_R, mask=inside_R, other=-1)",
            "line_R = tl.where(inside_R, tl.maximum(tl.load(line + token_R, mask=inside_R, other=-1), 0), -1)",
        ),
    ),
    triton(
        "tiles of the second field",
        "the programs of a second field count their rows from where those of the first end",
        test_store.test_fields_of_other_codes_frames_and_heads_are_stored_in_one_launch,
        in_triton(paged, "store_kernel", "*(tile - tiles, data2,", "*(tile, data2,"),
        kinds=test_store.KINDS[0],
    ),
    triton(
        "frame of the other field",
        "the rotary part of a latent query is scaled as the latent part is",
        test_frames.test_queries_enter_both_frames_of_a_latent_row_in_one_launch,
        in_triton(paged, "query_kernel", "*(query2, scale2,", "*(query2, scale,"),
        names=("int8", "turboquant_fp8"),
        tokens=1,
    ),
    triton(
        "gain of the queries",
        "keys are normed by the gain of the queries",
        test_ops.test_queries_and_keys_are_normed_and_turned_in_one_launch,
        in_triton(rows, "_norm_rotate", "+ other) * dim, gain2)", "+ other) * dim, gain)"),
        **_HEADS,
    ),
    triton(
        "norms not rounded",
        "what is normed is turned before it is rounded, unlike where a norm is a launch of its own",
        test_ops.test_queries_and_keys_are_normed_and_turned_in_one_launch,
        in_triton(rows, "_normed", "other=0.0), out).to(tl.float32)", "other=0.0), gain)"),
        **_HEADS,
    ),
    triton(
        "drafts folded in Triton",
        "the state of a delta rule is saved after the drafts, before they are verified",
        test_scans.test_outputs_states_and_logs_are_the_references,
        in_triton(gdn_module, "carry", "old + count, old + certain", "old + count, old + count"),
        layer=gdn(),
        dtype=torch.float32,
    ),
    triton(
        "second half alone",
        "the second half of a chunk does not find what the first has written",
        test_scans.test_long_rows_are_the_references,
        in_triton(gdn_module, "solve", "v_LV -= tl.dot(between_LL", "v_LV -= 0.0 * tl.dot(between_LL"),
        layer=test_scans.TALL[0],
    ),
    triton(
        "state not faded",
        "a state enters the next chunk as if nothing in this one had decayed",
        test_scans.test_long_rows_are_the_references,
        in_triton(mamba2_module, "advance", "h_PS * left", "h_PS"),
        layer=test_scans.TALL[1],
    ),
    triton(
        "decays subtracted",
        "what decays between two tokens is the difference of two sums, which has lost it after a strong one",
        test_scans.test_strong_decays_and_keys_that_repeat_lose_nothing,
        in_triton(
            gdn_module,
            "fade",
            "tl.exp(tl.cumsum(added_NN, 0))",
            "tl.exp(tl.cumsum(decay_N, 0)[:, None] - tl.cumsum(decay_N, 0)[None, :])",
        ),
        layer=test_scans.TALL[0],
    ),
    triton(
        "last of equal logits",
        "a greedy token is the last of the largest logits of a block, not the first",
        test_largest.test_it_is_the_first_of_equal_ones,
        in_triton(largest, "span_kernel", "x_B > most_B", "x_B >= most_B"),
        dim=2 * SPAN + 1,
        dtype=torch.float32,
    ),
    cpp(
        "causal edge off by one",
        "a token sees the draft that follows it",
        test_attend.test_groups_and_query_lengths,
        in_cuda("smaller(seen, end - 1)", "smaller(seen + 1, end - 1)"),
        group=2,
        counts=[4, 1],
        rows=formats("kv4", "kv4"),
    ),
    cpp(
        "unwritten lines read",
        "values of lines beyond the last token meet a weight of zero, which NaN does not mind",
        test_attend.test_lines_that_nobody_wrote_are_never_read_as_numbers,
        in_cuda("if (token >= end) value_scale[t][u] = 0;", ""),
        garbage=0xFF,
        rows=formats("kv4", "kv4"),
    ),
    cpp(
        "unwritten blocks read",
        "blocks of lines beyond the last token meet a weight of zero, which NaN does not mind",
        test_attend.test_lines_that_nobody_wrote_are_never_read_as_numbers,
        in_cuda("if (lane >= written) each[b] = 0;", ""),
        garbage=0xFF,
        rows=formats("q4_0", "q4_0"),
    ),
    cpp(
        "scale of the block before it",
        "values of a block have the share of a scale that the block before it has",
        test_attend.test_groups_and_query_lengths,
        in_cuda("held + shares + 2 * (b * PAGE + 16 * t", "held + shares + 2 * (b / 2 * 2 * PAGE + 16 * t"),
        group=1,
        counts=[1, 1],
        rows=formats("q4_0", "q4_0"),
    ),
    cpp(
        "scales of blocks without a sign",
        "q4_0 has scales of either sign",
        test_attend.test_groups_and_query_lengths,
        in_cuda("narrow(each[b] * inverse, 0)", "narrow(fabsf(each[b]) * inverse, 0)"),
        group=1,
        counts=[1, 1],
        rows=formats("q4_0", "q4_0"),
    ),
    cpp(
        "warps forget the largest",
        "the warps' sums of weights are added up as if all had the same largest score",
        test_attend.test_lengths_at_the_edges_of_pages_and_spans,
        in_cuda("sums[w][threadIdx.x % 8] * power(tops[w][threadIdx.x % 8] - most)", "sums[w][threadIdx.x % 8]"),
        length=129,
        rows=formats("kv4", "kv4"),
    ),
    cpp(
        "scale of the row beside it",
        "two keys that lie side by side have each other's scale",
        test_attend.test_groups_and_query_lengths,
        in_cuda("j < 2 ? key_scales[t]", "j >= 2 ? key_scales[t]"),
        group=1,
        counts=[1, 1],
        rows=formats("kv4", "kv4"),
    ),
    cpp(
        "causal edge of a latent row off by one",
        "a token sees the draft that follows it",
        test_latent.test_heads_and_query_lengths,
        in_cuda("token > smaller(seen, end - 1)", "token > smaller(seen + 1, end - 1)"),
        heads=5,
        counts=[3, 7],
        blocks=2,
        code="int8",
    ),
    cpp(
        "causal edge of a latent row of bf16 off by one",
        "a token sees the draft that follows it",
        test_latent.test_heads_and_query_lengths,
        in_cuda("> smaller(seen[i % 2], end - 1)", "> smaller(seen[i % 2] + 1, end - 1)"),
        heads=5,
        counts=[3, 7],
        blocks=2,
        code="bf16",
    ),
    cpp(
        "unwritten tokens copied",
        "values of lines beyond the last token meet a weight of zero, which NaN does not mind",
        test_latent.test_lines_that_nobody_wrote_are_never_read_as_numbers,
        in_cuda("(int)threadIdx.x / 64 + 2 * k < left", "true"),
        garbage=0xFF,
        code="bf16",
    ),
    cpp(
        "averages of bf16 are not scaled",
        "where the largest score rises, what was averaged before keeps its weight",
        test_latent.test_lengths_at_the_edges_of_pages_and_spans,
        in_cuda("mean[m][j][i] *= i % 2 ? old.y : old.x;", ""),
        length=96,
        code="bf16",
    ),
    cpp(
        "half of a rotary key",
        "the second half of a rotary key meets the first half of its query",
        test_latent.test_every_number_in_every_place,
        in_cuda("rope_queries[j][1][lane], page.rope.z", "rope_queries[j][0][lane], page.rope.z"),
        kind=kernel.LATENTS[0],
    ),
    cpp(
        "what bytes add is not scaled",
        "where the largest score rises, averages are scaled, but not what is taken off in the end",
        test_latent.test_lengths_at_the_edges_of_pages_and_spans,
        in_cuda("offset[0] *= old.x;", ""),
        length=96,
        code="int8",
    ),
    cpp(
        "spans before are forgotten",
        "a block of several spans leaves what it has of the last one",
        test_latent.test_many_query_rows_leave_no_more_sums_than_are_planned_for,
        in_cuda("span ? *at : make_float2(0, 0)", "make_float2(0, 0)"),
        code="int8",
    ),
)
