"""Plans are plain sums: they never assert, they say what to change, and what they say is true."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory.toys import HYBRID, formats_of, gdn, gqa, make_plan, mamba2, mla, model_spec

from truekv.core.errors import DoesNotFit, Refused
from truekv.core.spec import LayerSpec, Paged, Stateless
from truekv.formats.choice import codecs
from truekv.memory.plan import enough, plan, readable

MIB = 1 << 20
# Qwen3.5-0.8B's shape: 18 GDN layers with a state of 1 MiB each and 6 attention layers of 2 KiB a token.
QWEN = tuple(
    gqa(2, 256) if index % 4 == 3 else gdn(key_heads=16, value_heads=16, key_dim=128, value_dim=128)
    for index in range(24)
)


def qwen(name: str = "bf16", **asked: object) -> object:
    positions = 262_144
    spec = model_spec(QWEN, positions=positions)
    return plan(spec, formats_of(QWEN, name), dtype="bfloat16", **asked)


def test_the_sums_of_a_released_shape() -> None:
    planned = qwen(memory=1 << 30, max_num_seqs=4, drafts=3)
    assert [layer.kind for layer in planned.layers[:4]] == ["recurrent"] * 3 + ["paged"]
    paged, recurrent = planned.layers[3], planned.layers[0]
    assert paged.bytes_per_token == 2 * 2 * 256 * 2
    assert [(name, chosen.name, size) for name, chosen, size in paged.fields] == [
        ("k", "bf16", 1024),
        ("v", "bf16", 1024),
    ]
    assert paged.page_bytes == 32 * 2048
    assert planned.page_bytes == 6 * 32 * 2048
    # State in float32, three convolution inputs of 6144 channels in bf16, and the count of folded tokens.
    assert recurrent.state_bytes == 16 * 128 * 128 * 4 + 6144 * 3 * 2 + 8
    assert recurrent.log_bytes == 3 * (6144 * 2 + 16 * 4 + 16 * 4)
    assert planned.state_bytes_per_sequence == 18 * (recurrent.state_bytes + recurrent.log_bytes)
    assert planned.pages == ((1 << 30) - 4 * planned.state_bytes_per_sequence) // planned.page_bytes
    assert planned.max_tokens == 32 * planned.pages
    assert planned.max_context_one_sequence == planned.max_tokens
    assert planned.total_bytes <= 1 << 30 < planned.total_bytes + planned.page_bytes


def test_a_short_prompt_holds_one_page_and_one_state() -> None:
    planned = qwen(memory=1 << 30)
    assert planned.bytes_for_prompt(10) == planned.page_bytes + planned.state_bytes_per_sequence
    assert planned.bytes_for_prompt(0) == planned.state_bytes_per_sequence
    assert planned.bytes_for_prompt(33) - planned.bytes_for_prompt(32) == planned.page_bytes


def test_a_draft_token_costs_its_inputs_and_not_a_state() -> None:
    without, with_one = (qwen(max_num_seqs=1, drafts=drafts) for drafts in (0, 1))
    extra = with_one.state_bytes_per_sequence - without.state_bytes_per_sequence
    assert extra == 18 * (6144 * 2 + 2 * 16 * 4)
    assert without.state_bytes_per_sequence > 80 * extra


def test_compression_buys_capacity_at_every_length() -> None:
    plans = {name: qwen(name, memory=512 * MIB, max_num_seqs=2) for name in ("bf16", "int8", "kv4")}
    assert plans["int8"].max_tokens > 1.9 * plans["bf16"].max_tokens
    assert plans["kv4"].max_tokens > 3.7 * plans["bf16"].max_tokens
    for tokens in (1, 32, 33, 1000, 100_000):
        sizes = [plans[name].bytes_for_prompt(tokens) for name in ("kv4", "int8", "bf16")]
        assert sizes == sorted(set(sizes))


def test_without_a_budget_the_plan_takes_what_was_asked_for() -> None:
    planned = qwen(max_num_seqs=3, max_model_len=1000)
    assert planned.pages == 3 * 32
    assert planned.max_context_one_sequence == 1000
    assert planned.total_bytes == 3 * planned.state_bytes_per_sequence + 96 * planned.page_bytes


def test_saved_states_have_a_place_of_their_own_when_asked_for() -> None:
    without, planned = qwen(memory=1 << 30, max_num_seqs=4), qwen(memory=1 << 30, max_num_seqs=4, checkpoints=6)
    assert without.checkpoints == 0
    assert planned.checkpoint_bytes == planned.state_bytes_per_sequence == without.state_bytes_per_sequence
    assert planned.pages == ((1 << 30) - 10 * planned.checkpoint_bytes) // planned.page_bytes
    assert planned.bytes_for_prompt(10) == without.bytes_for_prompt(10)
    # Drafts are logged for sequences only.
    drafted = qwen(max_num_seqs=2, max_model_len=64, drafts=3, checkpoints=5)
    assert drafted.checkpoint_bytes == planned.checkpoint_bytes < drafted.state_bytes_per_sequence
    states = 2 * drafted.state_bytes_per_sequence + 5 * drafted.checkpoint_bytes
    assert drafted.total_bytes == 4 * drafted.page_bytes + states


@pytest.mark.parametrize(
    ("memory", "sequences", "expected"),
    [
        (None, 1, 10),
        (None, 4, 16),
        (16 << 30, 4, 16),  # all that it wants
        (800 * MIB, 2, 5),  # an eighth
        (100 * MIB, 2, 2),  # one each, which is more than an eighth
        (60 * MIB, 2, 1),  # what the sequences leave
        (40 * MIB, 2, 0),
    ],
)
def test_saved_states_take_what_is_worth_it_and_never_what_sequences_need(
    memory: int | None, sequences: int, expected: int
) -> None:
    asked = {"memory": memory, "max_num_seqs": sequences, "max_model_len": 64}
    planned = qwen(**asked, checkpoints=None)
    assert 18.6 * MIB < planned.checkpoint_bytes < 18.7 * MIB
    assert planned.checkpoints == expected
    assert planned.pages >= max(sequences, 2)
    assert make_plan((gqa(), mla()), max_num_seqs=sequences, checkpoints=None).checkpoints == 0


def test_layers_without_rows_cost_no_page_and_still_hold_tokens() -> None:
    planned = make_plan((gdn(), Stateless(), mamba2()), memory=100_000, max_num_seqs=2, max_model_len=4096)
    assert planned.page_bytes == 0
    assert planned.max_context_one_sequence == 4096
    assert planned.total_bytes == 2 * planned.state_bytes_per_sequence


def test_formats_per_layer_add_up() -> None:
    layers = (gqa(dim=64), mla(64, 32), gqa(dim=64))
    known = codecs()
    mixed = ((known["bf16"], known["int8"]), (known["kv4"], known["int8"]), (known["kv3"], known["kv4"]))
    planned = plan(model_spec(layers), mixed, max_model_len=64)
    assert [layer.bytes_per_token for layer in planned.layers] == [2 * (128 + 66), 34 + 34, 2 * (26 + 34)]


def test_the_rotary_key_keeps_its_bits() -> None:
    known = codecs()
    with pytest.raises(Refused, match="layer 0: 'rope' must keep at least 8 bits, but kv4 has 4; use int8"):
        plan(model_spec((mla(64, 32),)), ((known["kv4"], known["kv4"]),))


@pytest.mark.parametrize(
    ("formats", "sentence"),
    [
        ((), "0 format choices were given for 1 layers"),
        (((codecs()["f32"],),), r"layer 0 has the fields \(k, v\), but 1 formats were given"),
        ((None,), r"layer 0 has the fields \(k, v\), but 0 formats were given"),
    ],
)
def test_choices_that_do_not_match_the_layers_are_refused(formats: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        plan(model_spec((gqa(),)), formats)


@pytest.mark.parametrize("length", [0, -1, 4097])
def test_a_context_beyond_the_checkpoints_positions_is_refused(length: int) -> None:
    with pytest.raises(Refused, match=f"max_model_len is {length}, but this checkpoint has positions for 1 to 4096"):
        make_plan(HYBRID, max_model_len=length)


def settings_of(sentence: str, asked: dict[str, int], name: str, need: int) -> list[tuple[str, dict[str, int]]]:
    """Every remedy that a refusal names, as the settings it proposes."""
    found = [(name, asked | {"memory": need})]
    for key in ("max_model_len", "max_num_seqs"):
        match = re.search(rf"lower {key} to (\d+)", sentence)
        found += [(name, asked | {key: int(match[1])})] if match else []
    if "lower num_speculative_tokens" in sentence:
        found.append((name, asked | {"drafts": 0}))
    match = re.search(r"use kv_cache_dtype (\S+?),", sentence)
    return found + ([(match[1], asked)] if match else [])


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "kv4"])
@pytest.mark.parametrize(
    "asked",
    [
        {"memory": 60 * MIB, "max_model_len": 262_144, "max_num_seqs": 1, "drafts": 0},
        {"memory": 200 * MIB, "max_model_len": 262_144, "max_num_seqs": 8, "drafts": 4},
        {"memory": 200 * MIB, "max_model_len": 100, "max_num_seqs": 64, "drafts": 4},
        {"memory": 160 * MIB, "max_model_len": 100, "max_num_seqs": 8, "drafts": 8},
        {"memory": 24 * MIB, "max_model_len": 32_768, "max_num_seqs": 1, "drafts": 0},
        {"memory": 1, "max_model_len": 10, "max_num_seqs": 1, "drafts": 0},
    ],
)
def test_every_remedy_that_a_refusal_names_works(name: str, asked: dict[str, int]) -> None:
    with pytest.raises(DoesNotFit) as refusal:
        qwen(name, **asked)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert sentence.count(": ") == 1
    needed = qwen(name, **(asked | {"memory": 1 << 50}))
    pages = max(asked["max_num_seqs"], -(-asked["max_model_len"] // 32))
    need = needed.state_bytes_per_sequence * asked["max_num_seqs"] + pages * needed.page_bytes
    assert f"need {readable(need)}, but {readable(asked['memory'])} is left" in sentence
    assert sentence.endswith(f"give {enough(need)} of memory")
    for form, proposal in settings_of(sentence, asked, name, need):
        assert qwen(form, **proposal).pages > 0
    with pytest.raises(DoesNotFit):
        qwen(name, **(asked | {"memory": need - 1}))


LAYERS = st.one_of(
    st.builds(gqa, heads=st.integers(1, 4), dim=st.sampled_from((64, 80, 96, 128, 192, 256, 512))),
    st.builds(mla, latent=st.sampled_from((128, 512)), rope=st.sampled_from((32, 64))),
    st.builds(gdn, key_dim=st.integers(1, 64), value_dim=st.integers(1, 64)),
    st.builds(mamba2, head_dim=st.integers(1, 64), size=st.integers(1, 64)),
    st.just(Stateless()),
)


@settings(max_examples=300, deadline=None)
@given(
    layers=st.lists(LAYERS, max_size=6).map(tuple),
    names=st.lists(st.sampled_from(sorted(codecs())), min_size=6, max_size=6),
    memory=st.one_of(st.none(), st.integers(1, 1 << 34)),
    length=st.one_of(st.none(), st.integers(1, 4096)),
    sequences=st.integers(1, 300),
    drafts=st.integers(0, 9),
    checkpoints=st.sampled_from((0, None)),
    dtype=st.sampled_from(("float32", "bfloat16")),
)
def test_any_mixture_plans_or_is_refused(
    layers: tuple[LayerSpec, ...],
    names: list[str],
    memory: int | None,
    length: int | None,
    sequences: int,
    drafts: int,
    checkpoints: int | None,
    dtype: str,
) -> None:
    formats = tuple(formats_of((layer,), name)[0] for layer, name in zip(layers, names, strict=False))
    asked = {"max_model_len": length, "max_num_seqs": sequences, "drafts": drafts, "dtype": dtype}
    asked["checkpoints"] = checkpoints
    roomy = plan(model_spec(layers), formats, memory=1 << 60, **asked)
    least = sequences * roomy.state_bytes_per_sequence + max(sequences, -(-(length or 1) // 32)) * roomy.page_bytes
    if memory is not None and memory < least:
        with pytest.raises(DoesNotFit, match=r"give .* of memory"):
            plan(model_spec(layers), formats, memory=memory, **asked)
        return
    planned = plan(model_spec(layers), formats, memory=memory, **asked)
    assert planned.slots == sequences
    assert planned.pages >= sequences
    assert planned.max_context_one_sequence >= (length or 1)
    if memory is not None:
        assert planned.total_bytes <= memory
        if planned.page_bytes:
            assert memory - planned.total_bytes < planned.page_bytes
    for layer, planned_layer in zip(layers, planned.layers, strict=True):
        assert (planned_layer.page_bytes > 0) == isinstance(layer, Paged)
        assert planned_layer.page_bytes == 32 * planned_layer.bytes_per_token


def test_planning_does_not_load_torch() -> None:
    code = (
        "import sys\n"
        "from truekv.core.spec import Field, ModelSpec, Paged\n"
        "from truekv.formats.choice import codecs\n"
        "from truekv.memory.plan import plan\n"
        "layer = Paged((Field('k', 2, 64, 'key'), Field('v', 2, 64, 'value')))\n"
        "spec = ModelSpec('toy', 8, 8, 4096, 'float32', (layer,))\n"
        "formats = ((codecs()['int8'],) * 2,)\n"
        "assert plan(spec, formats, memory=1 << 20).pages == 124\n"
        "try:\n    plan(spec, formats, memory=1)\n"
        "except Exception as refusal:\n    assert 'give' in str(refusal)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (20480, "20.0 KiB"), (3 << 29, "1.5 GiB"), (1 << 41, "2.0 TiB")],
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert readable(count) == text


@given(st.integers(0, 1 << 50))
def test_what_is_enough_is_never_less(count: int) -> None:
    number, unit = enough(count).split()
    given = float(number) * 1024 ** ("bytes", "KiB", "MiB", "GiB", "TiB").index(unit)
    assert count <= given <= 1.1 * count + 1
