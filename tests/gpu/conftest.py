"""Tests that need a CUDA device: without one a few small cases run in the interpreter, so that nothing else can be new.

Those that are left are skipped, and the summary counts them. On a device the fast ones come first.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu.place import ON_DEVICE

from truekv.kernels.triton.interpreter import INTERPRETED

_HERE = Path(__file__).parent
_ORDER = (
    "test_ops",
    "test_frames",
    "test_attention",
    "test_cuda",
    "test_scans",
    "test_graphs",
    "test_answers",
    "test_refused",
)
# A case of every test, by its name.
_TRIED = (
    "test_operations_on_rows[96-dtype1]",
    "test_rotary_positions[80-35-True-dtype1]",
    "test_experts[8-1-dtype0]",
    "test_routers[160-softmax-8-True]",
    "test_the_largest_of_each_row[1025-dtype1]",
    "test_linear_maps[dtype1]",
    "test_decode_verify_and_a_chunk[gqa-64-kv4-8]",
    "test_a_program_of_several_spans_leaves_the_same_bits[int8-triton]",
    "test_bytes_are_those_of_the_reference[gqa-64-kv3]",
    "test_prefill_decode_and_verify[gqa-64-int8]",
    "test_outputs_states_and_logs_are_the_references[0-gdn-4x8x12-4-float32]",
    "test_outputs_states_and_logs_are_the_references[0-mamba2-4x6x8-4-float32]",
    "test_prompts_in_chunks[0-gdn-4x8x12-4-float32]",
    "test_prompts_in_chunks[0-mamba2-4x6x8-4-float32]",
    "test_the_same_step_gives_the_same_bits[5-mamba2-4x6x8-4]",
    "test_replayed_steps_are_bitwise_those_run_eagerly[gdn-int8-float32]",
    "test_every_size_with_every_number_of_accepted_drafts[dense]",
    "test_answers[tiny-hybrid-int8]",
    "test_drafts_change_nothing[on]",
    "test_logits_leave_the_device_only_where_somebody_reads_them",
    "test_of_most_rows_the_best_logits_are_all_that_filters_need",
    "test_tokens_drawn_on_the_device_are_those_of_the_host[1.0]",
    "test_weights_and_memory_lie_on_the_device",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if _HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if not ON_DEVICE and not (INTERPRETED and item.name in _TRIED):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make gpu runs these tests there"))
    if ON_DEVICE and len(ours) == len(items):
        items.sort(key=lambda item: _ORDER.index(item.path.stem))
