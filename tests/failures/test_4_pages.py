"""Failure 4: pages on a hybrid. Layers share indices, never sizes, and compression always buys context."""

from __future__ import annotations

import pytest

from truekv.core.errors import DoesNotFit
from truekv.formats.choice import choose_formats, names
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint
from truekv.serve.demo import pages
from truekv.serve.demo.unified import PagesDoNotUnify, unify

pytestmark = pytest.mark.xdist_group("hybrid")
SPEC = Checkpoint.open(str(pages.SHAPE), weights=False).architecture.spec
BUDGET = 8 << 30


@pytest.mark.parametrize("seed", [0, 1])
def test_the_case_ends_as_it_should(seed: int) -> None:
    case = pages.run(seed)
    assert "do not divide" in case.naive.answer
    assert case.truekv.correct
    assert case.passed


def test_the_peers_arithmetic_gives_the_figures_they_report() -> None:
    """800-token blocks with three drafts, 1,600 in fp8, and 0.68 GB for ten tokens whatever the format."""
    sizes = {"native_row_bytes": 4096, "state_bytes": 3_268_608, "attention_layers": 16, "recurrent_layers": 48}
    bf16, fp8 = (unify(row_bytes=row, pad=True, **sizes) for row in (4096, 2048))
    assert (bf16.block_tokens, fp8.block_tokens) == (800, 1600)
    assert {round(unify(row_bytes=row, pad=True, **sizes).request_bytes(10, 3) / 1e9, 2) for row in (4096, 1048)} == {
        0.68
    }
    with pytest.raises(PagesDoNotUnify):
        unify(row_bytes=1048, pad=False, **sizes)
    assert pages.peers(SPEC, "bf16", pad=True).block_tokens == 800


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("drafts", [0, 3])
def test_every_format_plans_on_the_reported_model(name: str, drafts: int) -> None:
    formats = choose_formats(SPEC, name, "", "bfloat16")
    planned = plan(SPEC, formats, memory=BUDGET, max_num_seqs=1, drafts=drafts, dtype="bfloat16")
    assert planned.max_tokens >= (48_000 if name == "f32" else 96_000)
    assert planned.total_bytes <= BUDGET


@pytest.mark.parametrize("context", [1, 10, 500, 2_000, 32_000, 125_000])
def test_capacity_grows_with_compression_at_every_context(context: int) -> None:
    order = ("bf16", "int8", "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc")
    held = [pages.layout(SPEC, name, BUDGET).bytes_for_prompt(context) for name in order]
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == len(held)


def test_ten_tokens_hold_one_page_and_one_state() -> None:
    planned = pages.layout(SPEC, "int8", BUDGET)
    assert planned.bytes_for_prompt(10) == planned.page_bytes + planned.state_bytes_per_sequence
    assert planned.bytes_for_prompt(10) < 0.165e9


def test_what_does_not_fit_is_told_before_any_weight_is_read() -> None:
    formats = choose_formats(SPEC, "turboquant_4bit_nc", "", "bfloat16")
    with pytest.raises(DoesNotFit, match="max_model_len"):
        plan(SPEC, formats, memory=1 << 30, max_model_len=125_000, max_num_seqs=1, dtype="bfloat16")


def test_mutant_one_page_size_for_all_layers_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pages as large as a state, a 10-token request costs what the peers' costs."""
    true_layout = pages.layout

    def unified(spec: object, name: str, budget: int) -> object:
        planned = true_layout(spec, name, budget)  # type: ignore[arg-type]
        peer = pages.peers(spec, name, pad=True)  # type: ignore[arg-type]

        class Unified:
            max_tokens = planned.max_tokens

            @staticmethod
            def bytes_for_prompt(tokens: int) -> int:
                return peer.request_bytes(tokens, pages.DRAFTS)

        return Unified()

    monkeypatch.setattr(pages, "layout", unified)
    assert not pages.run(0).passed
