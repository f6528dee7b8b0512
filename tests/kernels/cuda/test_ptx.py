"""The interpreter itself: what it computes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.cuda.ptx import Launch, Program, Wrong
from kernels.triton.test_lookups import prmt

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f2, %f3, %f4, %f5},"
HEAD = """
.visible .entry k(
	.param .u64 k_param_0
)
.maxntid 64, 1, 1
{
	.shared .align 4 .b8 held[256];
	mov.u32 %r1, %tid.x;
	ld.param.u64 %rd1, [k_param_0];
	mul.wide.u32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	mov.u32 %r2, held;
	shl.b32 %r3, %r1, 2;
	add.s32 %r4, %r2, %r3;
	and.b32 %r5, %r1, 31;
	setp.lt.u32 %p1, %r1, 16;
"""


COPY = """
	and.b32 %r6, %r1, 60;
	mul.wide.u32 %rd4, %r6, 4;
	add.s64 %rd5, %rd1, %rd4;
	shl.b32 %r7, %r6, 2;
	add.s32 %r8, %r2, %r7;
	and.b32 %r10, %r1, 3;
	setp.eq.s32 %p4, %r10, 0;
	@%p4 cp.async.cg.shared.global [%r8], [%rd5], 16;
	cp.async.commit_group;
"""
"""Every fourth thread copies the numbers of four."""
AWAIT = "cp.async.wait_group 0; bar.warp.sync -1;"
NEXT = "st.shared.u32 [%r4], %r9; bar.warp.sync -1; xor.b32 %r6, %r4, 4; ld.shared.u32 %r9, [%r6];"
EXCHANGE = "st.shared.u32 [%r4], %r9; bar.sync 0; xor.b32 %r6, %r4, 128; ld.shared.u32 %r9, [%r6];"


def run(body: str, numbers: torch.Tensor | None = None) -> torch.Tensor:
    """64 threads with a number each; %r9 is written back."""
    out = torch.arange(64, dtype=torch.int32) if numbers is None else numbers
    text = f"{HEAD} ld.global.nc.u32 %r9, [%rd3]; {body} st.global.u32 [%rd3], %r9; $L__end: ret; }}"
    Launch(Program.read(text), (1, 1, 1), (out,)).run()
    return out


def test_branches_part_threads_and_they_meet_again() -> None:
    assert run("@!%p1 bra $L__a; mov.u32 %r9, 7; $L__a:\n add.s32 %r9, %r9, 1;").tolist() == [8] * 16 + [*range(17, 65)]


def test_a_loop_of_different_lengths() -> None:
    body = (
        "mov.u32 %r6, %r1; $L__a:\n add.s32 %r9, %r9, 1; add.s32 %r6, %r6, -1; setp.gt.s32 %p2, %r6, 0; @%p2 bra $L__a;"
    )
    assert run(body).tolist() == [place + max(place, 1) for place in range(64)]


def test_shuffles_and_votes() -> None:
    assert run("shfl.sync.bfly.b32 %r9|%p3, %r9, 4, 31, -1;").tolist() == [place ^ 4 for place in range(64)]
    body = "vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;"
    assert run(body).tolist() == [1] * 32 + [0] * 32


def test_bytes_are_permuted() -> None:
    numbers = torch.randint(-(2**31), 2**31 - 1, (64,), generator=torch.Generator().manual_seed(0)).int()
    got = run("prmt.b32 %r9, %r9, 305419896, %r9;", numbers.clone())
    mask = 0xFFFFFFFF
    wanted = [prmt(number & mask, 305419896, number & 0xFFFF) for number in numbers.tolist()]
    assert [number & mask for number in got.tolist()] == wanted


def test_matrices_are_transposed() -> None:
    halves = torch.arange(128, dtype=torch.int16)
    got = run("movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r9;", halves.clone().view(torch.int32)).view(torch.int16)
    assert torch.equal(got.view(2, 8, 8), halves.view(2, 8, 8).transpose(1, 2))


def test_products_of_matrices() -> None:
    """Thread 4 r + c holds numbers (r, 2 c), (r, 2 c + 1) of 8 x 8 parts; here all parts are alike."""
    halves = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    body = f"""mov.f32 %f1, 0f3F800000;
    {MMA} {{%r9, %r9, %r9, %r9}}, {{%r9, %r9}}, {{%f1, %f1, %f1, %f1}};
    mov.b32 %r9, %f3;"""
    got = run(body, halves.view(-1).view(torch.int32).clone()).view(torch.float32).view(2, 8, 4)
    wanted = 1 + 2 * halves.double() @ halves.double().transpose(1, 2)
    assert float((got - wanted[..., 1::2]).abs().max()) < 5e-6


def test_tensor_cores_cut_what_lies_below_the_largest_number() -> None:
    one, tiny = np.array([1.0, 1.0], np.float16), np.array([0.0, 2.0**-24], np.float16)
    words = torch.zeros(64, dtype=torch.int32)
    words[:32] = int(tiny.view(np.uint32)[0])
    body = f"""mov.u32 %r8, {int(one.view(np.uint32)[0])}; mov.f32 %f1, 0f3F800000; mov.u32 %r7, 0;
    {MMA} {{%r9, %r7, %r9, %r7}}, {{%r8, %r8}}, {{%f1, %f1, %f1, %f1}};
    mov.b32 %r9, %f2;"""
    # Eight numbers of 2^-24 beside 1 are lost one by one.
    assert run(body, words).view(torch.float32).tolist() == [1.0] * 64


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("add.rz.f32 %f1, %f1, %f1;", "not known: add.rz.f32"),
        ("sin.approx.f32 %f1, %f1;", "not known: sin.approx.f32"),
        ("@%p1 shfl.sync.bfly.b32 %r9, %r9, 4, 31, -1;", "part of a warp reaches"),
        ("shfl.sync.bfly.b32 %r9, %r9, 4, 31, 15;", "15 is not -1 in all threads"),
        ("ld.shared.u32 %r9, [%r4];", "that nobody wrote"),
        ("ld.shared.u32 %r9, [%r4+256];", "outside of shared memory"),
        ("st.shared.u32 [%r4], %r9; xor.b32 %r6, %r4, 128; ld.shared.u32 %r9, [%r6];", "since the last barrier"),
        (
            f"{EXCHANGE} st.shared.u32 [%r4], %r9;",
            "that another warp read since the last barrier",
        ),
        ("st.shared.u32 [%r4], %r9; xor.b32 %r6, %r4, 4; ld.shared.u32 %r9, [%r6];", "since its warp has met"),
        (f"{NEXT} st.shared.u32 [%r4], %r9;", "that another thread read since its warp has met"),
        ("@%p1 bar.warp.sync -1;", "part of a warp reaches"),
        (f"{COPY} ld.shared.u32 %r9, [%r4];", "is read before what is copied there has arrived"),
        (f"{COPY} bar.sync 0; st.shared.u32 [%r4], %r9;", "is written before what is copied there has arrived"),
        (f"{COPY} cp.async.wait_group 0; ld.shared.u32 %r9, [%r4];", "another thread wrote since its warp has met"),
        (f"{COPY} {AWAIT} ld.shared.u32 %r9, [%r4]; {COPY}", "that another thread read since its warp has met"),
        (COPY.replace("[%rd5]", "[%rd5+16]"), "outside of every tensor"),
        ("cp.async.ca.shared.global [%r4], [%rd3], 16;", "not known: cp.async.ca"),
        ("ld.global.nc.u32 %r9, [%rd3+4];", "outside of every tensor"),
        ("ld.global.nc.v2.u32 {%r9, %r8}, [%rd3];", "no multiples of 8"),
        ("setp.lt.u32 %p2, %r1, 32; @%p2 bra $L__end; bar.sync 0;", "wait for others that have returned"),
    ],
)
def test_what_no_device_would_do_is_refused(body: str, sentence: str) -> None:
    with pytest.raises(Wrong, match=sentence):
        run(body)


def test_shuffles_from_any_lane() -> None:
    got = run("shl.b32 %r6, %r1, 1; shfl.sync.idx.b32 %r9|%p3, %r9, %r6, 31, -1;").tolist()
    assert got == [place // 32 * 32 + 2 * place % 32 for place in range(64)]


def test_copies_arrive_when_they_are_waited_for() -> None:
    numbers = torch.randint(0, 1 << 30, (64,), generator=torch.Generator().manual_seed(0)).int()
    body = f"{COPY} {AWAIT} xor.b32 %r6, %r4, 20; ld.shared.u32 %r9, [%r6];"
    assert run(body, numbers.clone()).tolist() == [int(numbers[place ^ 5]) for place in range(64)]


def test_a_group_may_be_under_way_while_the_one_before_it_is_read() -> None:
    other = COPY.replace("[%r8]", "[%r8+256]")
    body = f"{COPY} {other} cp.async.wait_group 1; bar.warp.sync -1; ld.shared.u32 %r9, [%r4%s];"
    text = HEAD.replace("held[256]", "held[512]")
    out = torch.arange(64, dtype=torch.int32)
    for offset, sentence in (("", None), ("+256", "before what is copied there has arrived")):
        whole = f"{text} {body.replace('%s', offset)} st.global.u32 [%rd3], %r9; ret; }}"
        launch = Launch(Program.read(whole), (1, 1, 1), (out,))
        if sentence is None:
            launch.run()
            assert out.tolist() == [*range(64)]
        else:
            with pytest.raises(Wrong, match=sentence):
                launch.run()


def test_what_a_launch_gives_to_a_block_lies_behind_what_is_declared() -> None:
    text = ".extern .shared .align 16 .b8 more[];" + HEAD.replace("%r2, held", "%r2, more")
    out = torch.arange(64, dtype=torch.int32)
    program = Program.read(f"{text} mov.u32 %r9, %r1; {EXCHANGE} st.global.u32 [%rd3], %r9; ret; }}")
    assert program.shared == {"held": 0, "more": 256}
    Launch(program, (1, 1, 1), (out,), shared_bytes=256).run()
    assert out.tolist() == [place ^ 32 for place in range(64)]
    with pytest.raises(Wrong, match="outside of shared memory"):
        Launch(program, (1, 1, 1), (out,), shared_bytes=128).run()


def test_halves_of_words_are_stored() -> None:
    body = "st.shared.u32 [%r4], %r9; st.shared.u16 [%r4+2], %r9; ld.shared.u32 %r9, [%r4];"
    assert run(body).tolist() == [place << 16 | place for place in range(64)]


def test_a_meeting_lets_threads_read_what_others_of_their_warp_wrote() -> None:
    assert run(NEXT).tolist() == [place ^ 1 for place in range(64)]


def test_a_barrier_lets_warps_read_what_others_wrote() -> None:
    assert run(EXCHANGE).tolist() == [place ^ 32 for place in range(64)]
