"""A captured step is a function of its Step alone; whatever the host decided stays decided."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import pytest
import torch

from truekv.core.batch import Step
from truekv.core.errors import Refused
from truekv.engine.capture import Captured, _token_counts
from truekv.engine.recording import _writing


def step(position: int, tokens: list[int]) -> Step:
    count = len(tokens)
    zero = torch.zeros(count, dtype=torch.int64)
    one = torch.tensor([0])
    return Step(
        tokens=torch.tensor(tokens),
        positions=torch.arange(position, position + count),
        owner=zero,
        offset=torch.arange(count),
        gather=torch.arange(count)[None],
        position=torch.tensor([position]),
        count=torch.tensor([count]),
        certain=torch.tensor([count]),
        replay=one,
        slot=one,
        pages=torch.tensor([[0]]),
        page=zero,
        line=zero,
    )


def test_replay_computes_with_the_new_contents() -> None:
    captured = Captured(lambda at: (at.tokens * 2 + at.positions).float(), step(0, [1, 2]))
    assert captured(step(10, [5, 6])).tolist() == [20.0, 23.0]
    assert captured(step(0, [1, 2])).tolist() == [2.0, 5.0]


def test_replay_writes_memory_in_place() -> None:
    memory = torch.zeros(4)

    def forward(at: Step) -> torch.Tensor:
        memory[at.tokens] += at.positions.float()
        return memory[at.tokens] * 1.0

    captured = Captured(forward, step(1, [0, 1]))
    assert memory.tolist() == [1.0, 2.0, 0.0, 0.0]
    assert captured(step(5, [2, 1])).tolist() == [5.0, 8.0]
    assert memory.tolist() == [1.0, 8.0, 5.0, 0.0]


def test_views_and_shared_buffers_are_followed() -> None:
    def forward(at: Step) -> torch.Tensor:
        grown = torch.cat([at.tokens, at.positions]).float()
        left, right = grown.chunk(2)
        left.mul_(3)
        return grown.view(2, -1).sum(0) + right

    captured = Captured(forward, step(0, [1, 2]))
    assert torch.equal(captured(step(7, [4, 9])), forward(step(7, [4, 9])))


def test_operations_write_straight_to_their_buffers_where_they_can() -> None:
    aten = torch.ops.aten
    assert _writing(aten.add.Tensor) is aten.add.out
    assert _writing(aten.where.self) is aten.where.self_out
    assert _writing(aten.max.dim) is None, "it makes two"

    def forward(at: Step) -> torch.Tensor:
        top, place = torch.stack((at.tokens, at.positions * 2)).max(0)
        kept = top.masked_fill((at.tokens > 5).logical_not(), -1) % 7
        return torch.where(place == 0, kept, at.tokens // 2).gather(0, at.offset).to(torch.float32)

    captured = Captured(forward, step(0, [1, 9]))
    for base, tokens in ((7, [4, 9]), (1, [30, 2]), (20, [3, 50])):
        assert torch.equal(captured(step(base, tokens)), forward(step(base, tokens)))


def test_recording_imports_no_compiler() -> None:
    program = """
        import sys
        import torch
        from truekv.engine.recording import Recording
        assert Recording(lambda: torch.ones(3) + 1).replay().tolist() == [2.0, 2.0, 2.0]
        assert not {"torch._dynamo", "sympy"} & sys.modules.keys(), "which take 100 MiB"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


def test_a_length_read_by_the_host_is_baked() -> None:
    def forward(at: Step) -> torch.Tensor:
        longest = int(at.position.max()) + 1
        return at.tokens.float() * longest

    captured = Captured(forward, step(0, [3, 4]))
    assert captured(step(9, [3, 4])).tolist() == [3.0, 4.0]
    assert forward(step(9, [3, 4])).tolist() == [30.0, 40.0]


def test_another_shape_is_refused() -> None:
    captured = Captured(lambda at: at.tokens.float(), step(0, [1, 2]))
    with pytest.raises(Refused, match=r"a step of 3 tokens.*captured for 2 tokens"):
        captured(step(0, [1, 2, 3]))


def test_the_step_given_is_not_kept() -> None:
    given = step(0, [1, 2])
    captured = Captured(lambda at: at.tokens.float(), given)
    captured(step(0, [8, 9]))
    assert given.tokens.tolist() == [1, 2]
    assert [field.name for field in dataclasses.fields(given)]


@pytest.mark.parametrize(
    ("cpu", "counts"),
    [
        (False, [1, 2, 4, 8, 16, 24, 32, 40]),
        (True, [*range(1, 17), 18, 20, 22, 24, 27, 30, 33, 37, 40]),
    ],
)
def test_a_step_on_a_cpu_is_padded_by_an_eighth_at_most(counts: list[int], *, cpu: bool) -> None:
    assert _token_counts(40, cpu=cpu) == counts
    assert _token_counts(1, cpu=cpu) == [1]
