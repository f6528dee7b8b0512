"""Failure 4: a compressed page that must be as large as a recurrent state, and a plan where it need not be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from truekv.core.spec import Paged, Recurrent
from truekv.formats.choice import choose_formats
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint
from truekv.serve.demo.case import Case, Outcome
from truekv.serve.demo.questions import ask, draw, outcome
from truekv.serve.demo.stage import Stage
from truekv.serve.demo.unified import PagesDoNotUnify, UnifiedPages, unify

if TYPE_CHECKING:
    from truekv.core.spec import ModelSpec
    from truekv.memory.plan import MemoryPlan

FORMAT: Final = "turboquant_4bit_nc"
SHAPE: Final = Path(__file__).parent / "qwen3.6-27b"
"""The reported model's config.json: a plan needs no weights."""
DRAFTS: Final = 3
MEMORY: Final = 24 << 30
WEIGHT_BITS: Final = 4.25
"""4-bit weights with a 16-bit scale for 64 of them, as the reports ran."""
CONTEXTS: Final = (10, 2_000, 32_000, 125_000)
WANTED: Final = {"secret": 1, "arithmetic": 1}


def run(seed: int) -> Case:
    """Plan the reported model and the embedded hybrid both ways, then answer through the format on the hybrid."""
    stage = Stage("tiny-hybrid")
    checkpoint = Checkpoint.open(str(SHAPE), weights=False)
    spec = checkpoint.architecture.spec
    budget = MEMORY - int(checkpoint.parameters * WEIGHT_BITS / 8)
    refusal = _refusal(spec)
    padded = peers(spec, FORMAT, pad=True)
    native, ours = layout(spec, "bf16", budget), layout(spec, FORMAT, budget)
    grows = all(sequences(ours, budget, context) >= sequences(native, budget, context) for context in CONTEXTS)
    questions = draw(stage, WANTED, seed)
    told = ask(stage, stage.arena(FORMAT, sequences=len(questions)), questions)
    detail = (
        f"Qwen3.6-27B in 24 GiB: {ours.max_tokens:,} tokens of context in {FORMAT}, {native.max_tokens:,} in bf16; "
        f"a 10-token request holds {ours.bytes_for_prompt(10) / 1e9:.2f} GB"
    )
    return Case(
        case=4,
        title="TurboQuant pages on a hybrid",
        model=f"{stage.name}, and the shape of Qwen3.6-27B",
        question=questions[0].text,
        reference=Outcome(stage.text(questions[0].reference.tokens), 0.0, correct=True),
        naive=Outcome(
            refusal,
            None,
            correct=not refusal,
            detail=f"padded to fit, a page is {padded.block_tokens:,} tokens and a 10-token request holds "
            f"{padded.request_bytes(10, DRAFTS) / 1e9:.2f} GB in every format",
        ),
        truekv=outcome(stage, told, 0, detail),
        passed=all(told.right)
        and bool(refusal)
        and grows
        and ours.max_tokens > 3 * native.max_tokens
        and ours.bytes_for_prompt(10) < padded.request_bytes(10, DRAFTS) / 3,
    )


def layout(spec: ModelSpec, kv_cache_dtype: str, budget: int) -> MemoryPlan:
    """Plan one sequence with drafts in a budget of bytes."""
    formats = choose_formats(spec, kv_cache_dtype, "", "bfloat16")
    return plan(spec, formats, memory=budget, max_num_seqs=1, drafts=DRAFTS, dtype="bfloat16")


def sequences(planned: MemoryPlan, budget: int, context: int) -> int:
    """How many sequences of so many tokens fit together."""
    return budget // planned.bytes_for_prompt(context)


def peers(spec: ModelSpec, kv_cache_dtype: str, *, pad: bool) -> UnifiedPages:
    """Plan a hybrid as the peers do, one page size for rows and states; raises PagesDoNotUnify."""
    paged = [index for index, layer in enumerate(spec.layers) if isinstance(layer, Paged)]
    recurrent = [layer for layer in spec.layers if isinstance(layer, Recurrent)]
    size = {
        name: plan(spec, choose_formats(spec, name, "", "bfloat16"), dtype="bfloat16").layers[paged[0]].bytes_per_token
        for name in ("bf16", kv_cache_dtype)
    }
    state = {slab.name: slab.shape for slab in recurrent[0].state}
    channels, taps = state["conv"]
    heads, keys, values = state["state"]
    return unify(
        row_bytes=size[kv_cache_dtype],
        native_row_bytes=size["bf16"],
        # The peers keep a convolution column per draft, because they cannot replay.
        state_bytes=4 * heads * keys * values + 2 * channels * (taps + DRAFTS),
        attention_layers=len(paged),
        recurrent_layers=len(recurrent),
        pad=pad,
    )


def _refusal(spec: ModelSpec) -> str:
    try:
        peers(spec, FORMAT, pad=False)
    except PagesDoNotUnify as error:
        return str(error)
    return ""
