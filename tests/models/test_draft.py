"""Prediction heads against a plain float32 head around transformers' own layers, without any cache."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import save_dense
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer
from transformers.models.glm4_moe_lite import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
from transformers.models.glm4_moe_lite.modeling_glm4_moe_lite import Glm4MoeLiteDecoderLayer
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.engine.speculate.mtp import Predictor, Row
from truekv.formats.choice import choose_formats
from truekv.kernels.native.library import library
from truekv.kernels.native.ops import OPS as NATIVE
from truekv.kernels.reference.ops import OPS as REFERENCE
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint

from .conftest import randomised, tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from truekv.core.protocols import Model

TOKENS, DRAFTS = 90, 4
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
GDN = SIZES | {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
MIXTURE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
LATENT = SIZES | {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.8,
    "n_group": 1,
    "topk_group": 1,
}


@dataclass(frozen=True)
class Released:
    """How one family releases its head: names, and the config field that counts it."""

    model_class: Any
    config: Any
    layer_class: Any
    qwen: bool
    counter: str
    split: bool = False
    """Whether the head's experts are stored one by one."""

    @property
    def prefix(self) -> str:
        return "mtp." if self.qwen else "model.layers.2."

    @property
    def layer_prefix(self) -> str:
        return "mtp.layers.0." if self.qwen else "model.layers.2."

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Norm of the embedding, norm of the state, the map, the last norm."""
        if self.qwen:
            return "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"
        return "enorm", "hnorm", "eh_proj", "shared_head.norm"


CASES = {
    "qwen3_5, tied": Released(
        Qwen3_5ForCausalLM,
        lambda: Qwen3_5TextConfig(**GDN, intermediate_size=96, tie_word_embeddings=True),
        Qwen3_5DecoderLayer,
        qwen=True,
        counter="mtp_num_hidden_layers",
    ),
    "qwen3_5_moe, experts one by one in the head alone": Released(
        Qwen3_5MoeForCausalLM,
        lambda: Qwen3_5MoeTextConfig(**GDN, **MIXTURE),
        Qwen3_5MoeDecoderLayer,
        qwen=True,
        counter="mtp_num_hidden_layers",
        split=True,
    ),
    "qwen3_next, whose config is silent": Released(
        Qwen3NextForCausalLM,
        lambda: Qwen3NextConfig(**GDN, **MIXTURE),
        Qwen3NextDecoderLayer,
        qwen=True,
        counter="",
    ),
    "deepseek_v3": Released(
        DeepseekV3ForCausalLM,
        lambda: DeepseekV3Config(**LATENT, first_k_dense_replace=1),
        DeepseekV3DecoderLayer,
        qwen=False,
        counter="num_nextn_predict_layers",
        split=True,
    ),
    "glm4_moe_lite": Released(
        Glm4MoeLiteForCausalLM,
        lambda: Glm4MoeLiteConfig(**LATENT),
        Glm4MoeLiteDecoderLayer,
        qwen=False,
        counter="num_nextn_predict_layers",
    ),
}


class PlainHead(torch.nn.Module):
    """The published definition on whole sequences: no cache, no chunks, no operations of ours."""

    def __init__(self, released: Released, trunk: Any) -> None:
        super().__init__()
        self.released, self.config = released, trunk.config
        self.trunk = [trunk]  # not a submodule
        size = trunk.config.hidden_size
        start = torch.zeros if released.qwen else torch.ones
        norms = [name for name in released.names if "norm" in name]
        self.norms = torch.nn.ParameterDict({name.replace(".", "-"): start(size) for name in norms})
        self.join = torch.nn.Linear(2 * size, size, bias=False)
        self.layer = released.layer_class(trunk.config, 1)
        randomised(self, seed=3)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.norms[name.replace(".", "-")] + (1.0 if self.released.qwen else 0.0)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def states(self, states_TC: torch.Tensor, following: Sequence[int]) -> torch.Tensor:
        """Return the states one token on, [T, C]."""
        embedding_norm, state_norm, _, last_norm = self.released.names
        model = self.trunk[0].model
        embedded = self.norm(embedding_norm, model.embed_tokens(torch.tensor(following)))
        x = self.join(torch.cat((embedded, self.norm(state_norm, states_TC)), -1))[None]
        positions = torch.arange(len(following))[None]
        mask = torch.full((len(following),) * 2, -torch.inf).triu(1)[None, None]
        rotary = model.rotary_emb(x, positions)
        x = self.layer(x, position_embeddings=rotary, attention_mask=mask, position_ids=positions)
        return self.norm(last_norm, x[0])

    def chain(self, states_TC: torch.Tensor, following: Sequence[int], count: int) -> tuple[list[int], torch.Tensor]:
        """Draft greedily after the last token, feeding each state back; return drafts and their logits."""
        following, found = list(following), []
        for _ in range(count):
            last = self.states(states_TC, following)[-1:]
            found.append(self.trunk[0].lm_head(last))
            states_TC = torch.cat((states_TC, last))
            following.append(int(found[-1].argmax()))
        return following[-count:], torch.cat(found)

    def released_tensors(self) -> dict[str, torch.Tensor]:
        prefix, layer_prefix = self.released.prefix, self.released.layer_prefix
        found = {f"{prefix}{name.replace('-', '.')}.weight": weight for name, weight in self.norms.items()}
        found[f"{prefix}{self.released.names[2]}.weight"] = self.join.weight
        for name, weight in self.layer.state_dict().items():
            if self.released.split and "experts." in name and "shared" not in name:
                base, kind = f"{layer_prefix}{name}".rsplit(".", 1)
                for index, one in enumerate(weight):
                    parts = {"down_proj": one}
                    if kind == "gate_up_proj":
                        parts = dict(zip(("gate_proj", "up_proj"), one.chunk(2), strict=True))
                    found |= {f"{base}.{index}.{part}.weight": value for part, value in parts.items()}
            else:
                found[f"{layer_prefix}{name}"] = weight
        if not self.released.qwen:  # copies that released checkpoints hold
            model = self.trunk[0]
            found[f"{prefix}embed_tokens.weight"] = model.model.embed_tokens.weight
            found[f"{prefix}shared_head.head.weight"] = model.lm_head.weight
        return {name: weight.detach().clone().contiguous() for name, weight in found.items()}


@dataclass(frozen=True)
class Drafted:
    directory: Path
    plain: PlainHead

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(str(self.directory))

    def trunk_states(self, tokens: Sequence[int]) -> torch.Tensor:
        """What the trunk's output head reads, [T, C]: after the final norm."""
        trunk = self.plain.trunk[0]
        with torch.inference_mode():
            return trunk.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module", params=CASES)
def drafted(request: pytest.FixtureRequest, save: Any) -> Drafted:
    released = CASES[request.param]
    tiny = save(released.model_class, released.config())
    plain = PlainHead(released, tiny.reference)
    weights = load_file(tiny.directory / "model.safetensors")
    save_file(weights | plain.released_tensors(), tiny.directory / "model.safetensors", {"format": "pt"})
    if released.counter:
        _edit(tiny.directory, **{released.counter: 1})
    return Drafted(tiny.directory, plain)


def arena_for(model: Model, longest: int = TOKENS + 16, sequences: int = 3) -> tuple[Arena, Any]:
    formats = [choose_formats(model.spec, "f32", "", "float32", draft=draft) for draft in (False, True)]
    kernels = select(model.spec, *([chosen or () for chosen in found] for found in formats))
    planned = plan(
        model.spec,
        formats[0],
        draft_formats=formats[1],
        max_model_len=longest,
        max_num_seqs=sequences,
        drafts=DRAFTS,
    )
    return Arena(model.spec, planned, kernels, poison=True), kernels


def cuts(seed: int, total: int) -> Iterator[int]:
    source = random.Random(seed)
    while total:
        size = min(source.randint(1, source.choice((2, 40))), total)
        total -= size
        yield size


@pytest.mark.parametrize("ops", [REFERENCE, NATIVE] if library() else [REFERENCE])
def test_logits_and_chained_drafts_equal_the_plain_head_in_any_chunking(drafted: Drafted, ops: Any) -> None:
    tokens = tokens_of(128, 5, TOKENS + 1)
    states = drafted.trunk_states(tokens)
    with torch.inference_mode():
        expected = drafted.plain.trunk[0].lm_head(drafted.plain.states(states[:-1], tokens[1:]))
        chained = {end: drafted.plain.chain(states[:end], tokens[1 : end + 1], DRAFTS) for end in (33, TOKENS)}
    assert 0.5 < expected.std() < 10.0, "the head says nothing, or shouts"
    model = drafted.checkpoint.with_draft_head().load("float32", ops)
    head = model.draft_head
    assert head is not None
    arena, kernels = arena_for(model)
    arena.open()  # takes slot and pages, so that ours are not the first
    held = arena.open()
    predictor = Predictor(model, arena)
    got: list[torch.Tensor] = []
    with torch.inference_mode():
        for size in [*cuts(1, 33), *cuts(2, TOKENS - 33)]:
            start = held.position
            end = start + size
            step = arena.reserve([Chunk(held, tokens[start:end], room=DRAFTS - 1)])
            hidden = model.forward(step, arena.layers)
            again = arena.draft_step([(held, start, tokens[start + 1 : end + 1])])
            got.append(head.logits(head.forward(head.begin(hidden), again, arena.draft_layers)))
            wanted = DRAFTS if end in chained else 0
            row = Row(held, start, tokens[start + 1 : end + 1], range(size), wanted)
            (drafts,) = predictor.propose([row], hidden)
            assert drafts == (chained[end][0] if wanted else [])
            arena.advance(held, size)
    assert (torch.cat(got) - expected).abs().max() <= 1e-4
    paged = [kernel for kernel in kernels.calls if kernel.startswith("attend")]
    assert paged, "rows went through memory"


def test_without_being_asked_a_checkpoint_loads_as_if_it_had_no_head(drafted: Drafted) -> None:
    model = drafted.checkpoint.load("float32")
    assert model.draft_head is None
    arena, _ = arena_for(model)
    with pytest.raises(Refused, match="the model was loaded without the multi-token-prediction head"):
        Predictor(model, arena)
    asked = drafted.checkpoint.with_draft_head()
    assert asked.architecture.spec == drafted.checkpoint.architecture.spec
    assert asked.digest == drafted.checkpoint.digest
    assert len(asked.tensors) > len(drafted.checkpoint.tensors)
    (layer,) = asked.architecture.spec.draft_layers
    assert layer == asked.architecture.spec.layers[1]


def test_the_head_shares_embedding_and_output_with_the_trunk(drafted: Drafted) -> None:
    model: Any = drafted.checkpoint.with_draft_head().load("float32")
    assert model.draft_head.embedding is model.embedding
    assert model.draft_head.output is model.head.matrix
    used = [
        name for name in drafted.checkpoint.with_draft_head().tensors if name.startswith(drafted.plain.released.prefix)
    ]
    assert not [name for name in used if "embed_tokens" in name or "shared_head.head" in name]


def rewrite(drafted: Drafted, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Checkpoint:
    weights = load_file(drafted.directory / "model.safetensors")
    save_file(change(weights), target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((drafted.directory / "config.json").read_text())
    return Checkpoint.open(str(target))


def test_what_is_wrong_with_a_head_is_refused_before_it_is_loaded(drafted: Drafted, tmp_path: Path) -> None:
    released = drafted.plain.released
    join, norm = (f"{released.prefix}{name}.weight" for name in (released.names[2], released.names[3]))

    def faulty(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rest = {name: weight for name, weight in weights.items() if name != norm}
        return rest | {join: weights[join][:, 1:].contiguous(), f"{released.prefix}more": torch.zeros(2)}

    checkpoint = rewrite(drafted, tmp_path, faulty)
    checkpoint.check()
    with pytest.raises(Refused) as refusal:
        checkpoint.with_draft_head().check()
    for part in (
        f"'{norm}' missing",
        f"'{released.prefix}more' unexpected",
        f"'{join}' has shape [64, 127] instead of",
    ):
        assert part in str(refusal.value)


def test_asking_for_a_head_that_is_not_there_names_what_to_use_instead(drafted: Drafted, tmp_path: Path) -> None:
    def headless(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: one for name, one in weights.items() if not name.startswith(drafted.plain.released.prefix)}

    checkpoint = rewrite(drafted, tmp_path, headless)
    with pytest.raises(Refused, match=r"holds no tensor of the .* head that its config announces.* method ngram"):
        checkpoint.with_draft_head()
    checkpoint.load("float32")
    counter = drafted.plain.released.counter or "mtp_num_hidden_layers"
    for count, sentence in ((0, "is not announced by its config"), (2, "has 2 layers, but only heads of one are")):
        _edit(tmp_path, **{counter: count})
        with pytest.raises(Refused, match=f"{sentence}.*method ngram"):
            Checkpoint.open(str(tmp_path)).with_draft_head()
        Checkpoint.open(str(tmp_path)).load("float32")


def test_families_without_a_head_say_so(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"head of this qwen3 model is not announced by its config; .* ngram"):
        Checkpoint.open(str(save_dense(tmp_path))).with_draft_head()
