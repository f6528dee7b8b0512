"""The bench's checkpoints, a thousand times smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bench import checkpoints, convert, frames
from bench.checkpoints import CONFIGS

if TYPE_CHECKING:
    from pathlib import Path

_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
}
_ROPE = {**CONFIGS["hybrid"]["rope_parameters"], "mrope_section": [3, 3, 2]}
TOYS: dict[str, dict[str, Any]] = {
    "dense": {**CONFIGS["dense"], **_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "hybrid": {
        **CONFIGS["hybrid"],
        **_SMALL,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": _ROPE,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
    "mla": {
        **CONFIGS["mla"],
        **_SMALL,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 64,
        "moe_intermediate_size": 64,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (checkpoints, convert, frames):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    for name, config in TOYS.items():
        monkeypatch.setitem(CONFIGS, name, config)
    return tmp_path
