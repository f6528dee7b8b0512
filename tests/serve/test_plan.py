"""`truekv plan`: the numbers are arithmetic that anyone can redo, and nothing but a sentence stops it."""

import copy
import functools
import json
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from truekv.core.config import Config
from truekv.core.errors import DoesNotFit, Refused
from truekv.core.options import EngineOptions, Speculation
from truekv.formats.choice import names
from truekv.models.weights import Checkpoint, understand
from truekv.serve.plan import Request, parse_size, run

CONFIGS = Path(__file__).parent.parent / "configs"
GIB = 1 << 30
DEFAULTS: dict[str, Any] = {
    "kv_cache_dtype": "auto",
    "kv_cache_map": "",
    "memory": None,
    "max_model_len": None,
    "max_num_seqs": 8,
    "num_speculative_tokens": 0,
    "weight_bytes": None,
    "dtype": "auto",
    "as_json": True,
}


@functools.cache
def released(name: str) -> Checkpoint:
    """A directory that holds a released model's config.json and nothing else."""
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    return Checkpoint(Path("/nowhere"), Config(values), understand(Config(values)), {})


def guesses(drafts: int) -> Speculation | None:
    return Speculation(num_speculative_tokens=drafts) if drafts else None


def planned(name: str, **asked: Any) -> dict[str, Any]:
    memory, weights = asked.pop("memory", None), asked.pop("weights", None)
    asked["speculative_config"] = guesses(asked.pop("num_speculative_tokens", 0))
    return Request(name, released(name), EngineOptions(**asked), memory, weights).plan().as_json()


# -- numbers by hand -----------------------------------------------------------------------------

# name: attention layers, heads x dims of one token's row in bf16 (keys and values, or latent and rope);
# recurrent layers, numbers of their float32 state, channels and columns of their bf16 convolution.
BY_HAND = {
    "qwen3-0.6b": (28, 2 * 8 * 128, 0, 0, 0),
    "qwen3.5-0.8b": (6, 2 * 2 * 256, 18, 16 * 128 * 128, (2 * 16 * 128 + 16 * 128) * 3),
    "qwen3.5-4b": (8, 2 * 4 * 256, 24, 32 * 128 * 128, (2 * 16 * 128 + 32 * 128) * 3),
    "qwen3.6-27b": (16, 2 * 4 * 256, 48, 48 * 128 * 128, (2 * 16 * 128 + 48 * 128) * 3),
    "qwen3.6-35b-a3b": (10, 2 * 2 * 256, 30, 32 * 128 * 128, (2 * 16 * 128 + 32 * 128) * 3),
    "qwen3-next-80b-a3b": (12, 2 * 2 * 256, 36, 32 * 128 * 128, (2 * 16 * 128 + 32 * 128) * 3),
    "nemotron-3-nano-30b-a3b": (6, 2 * 2 * 128, 23, 64 * 64 * 128, (64 * 64 + 2 * 8 * 128) * 3),
    "granite-4.0-h-tiny": (4, 2 * 4 * 128, 36, 48 * 64 * 128, (48 * 64 + 2 * 1 * 128) * 3),
    "glm-4.7-flash": (47, 512 + 64, 0, 0, 0),
    "deepseek-v2-lite": (27, 512 + 64, 0, 0, 0),
}
# Every slot counts the tokens it holds, to notice a wrong slot: an int64 in each recurrent layer.
COUNT = 8


@pytest.mark.parametrize("name", BY_HAND)
def test_released_models_by_hand(name: str) -> None:
    attention, row, recurrent, state, conv = BY_HAND[name]
    plan = planned(name, kv_cache_dtype="bf16")
    paged = [layer for layer in plan["layers"] if "bytes_per_token" in layer]
    stateful = [layer for layer in plan["layers"] if "state_bytes" in layer]
    assert (len(paged), len(stateful)) == (attention, recurrent)
    assert all(layer["bytes_per_token"] == 2 * row for layer in paged)
    assert all(layer["state_bytes"] == 4 * state + 2 * conv + COUNT for layer in stateful)
    assert [layer["index"] for layer in plan["layers"]] == list(range(len(plan["layers"])))
    assert plan["page_tokens"] == 32
    assert plan["page_bytes"] == 32 * attention * 2 * row
    assert plan["state_bytes_per_sequence"] == recurrent * (4 * state + 2 * conv + COUNT)
    assert plan["bytes_for_prompt_of_10_tokens"] == plan["page_bytes"] + plan["state_bytes_per_sequence"]
    assert plan["weight_bytes"] == 2 * plan["parameters"]


def test_parameters_are_those_that_were_released() -> None:
    # In billions, as the model cards say (text part, without the multi-token-prediction head).
    for name, billions in {
        "qwen3-0.6b": 0.596,
        "qwen3.5-0.8b": 0.75,
        "qwen3.5-9b": 8.95,
        "qwen3.6-27b": 26.9,
        "qwen3.6-35b-a3b": 34.7,
        "qwen3-next-80b-a3b": 79.7,
        "glm-4.7-flash": 29.9,
        "deepseek-v2-lite": 15.7,
        "nemotron-3-nano-30b-a3b": 31.6,
        "granite-4.0-h-tiny": 6.94,
    }.items():
        assert released(name).parameters == pytest.approx(billions * 1e9, rel=0.005), name


def test_a_short_prompt_costs_one_page_and_one_state() -> None:
    plan = planned("qwen3.6-27b", kv_cache_dtype="bf16")
    assert plan["bytes_for_prompt_of_10_tokens"] == 32 * 16 * 2 * 4 * 256 * 2 + 153_944_448 == 156_041_600
    assert plan["bytes_for_prompt_of_10_tokens"] < 0.16e9


# Bytes of one row of 256 numbers.
ROWS = {"bf16": 512, "int8": 258, "kv4": 130, "kv3": 98, "turboquant_4bit": 130, "turboquant_3bit": 98, "q8_0": 272}


@pytest.mark.parametrize(
    ("asked", "key", "value"),
    [
        ("auto", "bf16", "bf16"),
        ("int8", "int8", "int8"),
        ("int8/kv4", "int8", "kv4"),
        ("k4v3", "kv4", "kv3"),
        ("turboquant_4bit_nc", "turboquant_4bit", "turboquant_4bit"),
        ("turboquant_3bit_nc", "turboquant_3bit", "turboquant_3bit"),
        ("q8_0", "q8_0", "q8_0"),
    ],
)
@pytest.mark.parametrize("drafts", [0, 1, 3, 7])
def test_turboquant_and_drafts_on_a_hybrid(asked: str, key: str, value: str, drafts: int) -> None:
    plan = planned("qwen3.6-27b", kv_cache_dtype=asked, num_speculative_tokens=drafts)
    layer = next(layer for layer in plan["layers"] if "bytes_per_token" in layer)
    assert layer["formats"] == {"k": key, "v": value}
    assert layer["bytes_per_token"] == 4 * (ROWS[key] + ROWS[value])
    assert plan["page_bytes"] == 32 * 16 * layer["bytes_per_token"]
    # The log of a draft: q, k and v channels in bf16, decay and beta of each head in float32.
    log = drafts * ((2 * 16 * 128 + 48 * 128) * 2 + 2 * 48 * 4)
    assert plan["state_bytes_per_sequence"] == 153_944_448 + 48 * log


def test_latents_by_hand() -> None:
    assert planned("glm-4.7-flash", kv_cache_dtype="int8")["bytes_per_token"] == 47 * (512 + 2 + 64 + 2) == 47 * 580
    assert planned("glm-4.7-flash", kv_cache_dtype="kv4")["bytes_per_token"] == 47 * (512 // 2 + 2 + 64 + 2) == 47 * 324
    layer = planned("glm-4.7-flash", kv_cache_dtype="kv4")["layers"][3]
    assert layer["formats"] == {"latent": "kv4", "rope": "int8"}


def test_a_map_changes_its_layers_only() -> None:
    plan = planned("qwen3.6-27b", kv_cache_dtype="kv4", kv_cache_map="3=bf16,59-59=int8/kv4")
    sizes = {layer["index"]: layer["bytes_per_token"] for layer in plan["layers"] if "bytes_per_token" in layer}
    assert sizes.pop(3) == 4096
    assert sizes.pop(59) == 4 * (258 + 130)
    assert set(sizes.values()) == {4 * 2 * 130}


# -- what fits -----------------------------------------------------------------------------------


def test_memory_is_divided_without_a_rest_of_a_page() -> None:
    memory, weights = 24 * GIB, 14 * GIB
    plan = planned("qwen3.6-27b", kv_cache_dtype="int8", memory=memory, weights=weights, max_num_seqs=4)
    left = memory - weights - 4 * plan["state_bytes_per_sequence"]
    assert plan["pages"] == left // plan["page_bytes"]
    assert plan["max_tokens"] == 32 * plan["pages"]
    assert plan["max_context_one_sequence"] == min(plan["max_tokens"], 262144)
    assert plan["cache_bytes"] == plan["pages"] * plan["page_bytes"] + 4 * plan["state_bytes_per_sequence"]
    assert plan["verdict"].startswith("fits in 24.0 GiB")


def test_the_users_of_24_gigabytes_get_their_context() -> None:
    # What they asked for: 96k to 125k tokens beside 4-bit weights, with three drafts.
    plan = planned(
        "qwen3.6-27b",
        kv_cache_dtype="turboquant_4bit_nc",
        num_speculative_tokens=3,
        memory=24 * GIB,
        weights=16 * GIB,
        max_num_seqs=4,
    )
    assert plan["max_context_one_sequence"] > 125_000


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("drafts", [0, 3])
def test_capacity_grows_with_compression_at_every_length(name: str, drafts: int) -> None:
    ladder = ["f32", "bf16", "int8", "kv4", "kv3"]
    plans = [planned(name, kv_cache_dtype=asked, num_speculative_tokens=drafts) for asked in ladder]
    for tokens in (1, 10, 31, 32, 33, 100, 1_000, 10_000, 100_000, 262_144):
        held = [-(-tokens // 32) * plan["page_bytes"] + plan["state_bytes_per_sequence"] for plan in plans]
        assert held == sorted(held, reverse=True)
        assert len(set(held)) == len(held)
        users = [64 * GIB // size for size in held]
        assert users == sorted(users)
        if tokens >= 1_000:
            assert users[-1] > users[1]
    assert {plan["page_tokens"] for plan in plans} == {32}


def refused(kind: type[Refused] = Refused, **asked: Any) -> str:
    name = asked.pop("name", "qwen3.6-27b")
    with pytest.raises(kind) as error:
        planned(name, **asked)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_alone_may_not_fit() -> None:
    text = refused(DoesNotFit, memory=24 * GIB)
    assert text.startswith("the weights of qwen3.6-27b need 50.1 GiB, but there are only 24.0 GiB of memory")
    planned("qwen3.6-27b", memory=parse_size(demanded(text), "--memory"))


def demanded(text: str) -> str:
    match = re.search(r"give (?:at least )?([\d.]+ \w+)", text)
    assert match, text
    return match[1]


@pytest.mark.parametrize(
    "asked",
    [
        {"memory": 17 * GIB, "max_model_len": 200_000, "kv_cache_dtype": "bf16"},
        {"memory": 15 * GIB, "max_num_seqs": 64},
        {"memory": 15 * GIB, "max_num_seqs": 1, "max_model_len": 262_144, "num_speculative_tokens": 7},
        {"memory": 14 * GIB + (150 << 20), "num_speculative_tokens": 3, "max_num_seqs": 1},
    ],
)
def test_every_remedy_that_is_named_works(asked: dict[str, Any]) -> None:
    asked = {"weights": 14 * GIB, **asked}
    text = refused(DoesNotFit, **asked)
    assert " need " in text
    assert " is left for rows and states: " in text
    remedies = text.split("states: ")[1].split(", or ")
    assert f"give {demanded(text)} of memory" == remedies[-1]
    planned("qwen3.6-27b", **{**asked, "memory": parse_size(demanded(text), "--memory")})
    for remedy in remedies[:-1]:
        match re.split(r" to | ", remedy):
            case ["lower", "num_speculative_tokens"]:
                planned("qwen3.6-27b", **{**asked, "num_speculative_tokens": 0})
            case ["lower", name, value]:
                planned("qwen3.6-27b", **{**asked, name: int(value)})
            case ["use", "kv_cache_dtype", name]:
                planned("qwen3.6-27b", **{**asked, "kv_cache_dtype": name})
            case _:
                pytest.fail(f"nobody tried {remedy!r}")


def test_a_plan_without_memory_says_what_it_takes() -> None:
    plan = planned("qwen3-0.6b", kv_cache_dtype="int8", max_model_len=1000, max_num_seqs=3)
    assert plan["pages"] == 3 * 32
    assert plan["max_context_one_sequence"] == 1000
    assert plan["cache_bytes"] == 96 * 32 * 28 * 2 * 8 * 130
    assert plan["verdict"] == (
        "takes 1.3 GiB: 1.1 GiB of weights and 170.6 MiB of rows and states for 3 sequences of 1,000 tokens each"
    )


def test_formats_that_need_a_measurement_say_so() -> None:
    assert "truekv calibrate qwen3.6-27b" in planned("qwen3.6-27b", kv_cache_dtype="kv4")["before_running"]
    assert planned("qwen3.6-27b", kv_cache_dtype="int8")["before_running"] is None


def test_frames_beside_the_weights_count_for_the_fields_they_cover(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    directory(tmp_path, "qwen3.6-27b")
    places = [f"layers.{index}.{field}" for index in range(3, 64, 4) for field in "kv"]
    for covered, lacking in ((places, None), (places[:-1], "layer 63 has none for its v rows")):
        path = tmp_path / "truekv/kv_cache_frames.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({f"{place}.centre": torch.zeros(4, 256) for place in covered}, path)
        assert run(str(tmp_path), **{**DEFAULTS, "kv_cache_dtype": "kv4"}) == 0
        first = json.loads(capsys.readouterr().out)["before_running"]
        assert first is None if lacking is None else lacking in first


def test_the_compute_dtype_is_what_weights_and_states_are_planned_in() -> None:
    half, full = planned("qwen3.5-0.8b"), planned("qwen3.5-0.8b", dtype="float32")
    assert full["weight_bytes"] == 2 * half["weight_bytes"]
    assert full["page_bytes"] == 2 * half["page_bytes"]
    assert refused(dtype="float16") == "dtype is 'float16', but must be auto, float32 or bfloat16"


def test_misspelt_and_impossible_requests_are_one_sentence() -> None:
    assert "did you mean 'turboquant_4bit_nc'" in refused(kv_cache_dtype="turboquant_4bits_nc")
    assert "layer 0 stores no rows" in refused(kv_cache_map="0=int8")
    assert "max_model_len is 262145" in refused(max_model_len=262_145)
    assert "max_num_seqs is 0" in refused(max_num_seqs=0)


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24 GiB", 24 * GIB),
        ("24g", 24 * GIB),
        ("24G", 24 * GIB),
        ("24gi", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("1.5gib", 3 * GIB // 2),
        ("512m", 512 << 20),
        ("2TiB", 2 << 40),
        ("3KB", 3000),
        ("25769803776", 25769803776),
        ("7B", 7),
        (" 8GiB ", 8 * GIB),
        ("0.1KiB", 102),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "0", "0.0001KB", "nan", "inf", "1e9", "24 gigs", "24XB", "1,5GiB", "٢٤GiB", "24iB", "9" * 30,
     "999999999999TiB", "2" * 18 + "TiB", "24GiB\n24", "0x10", "1.GiB", ".5GiB"],
)  # fmt: skip
def test_nonsense_sizes_are_refused(text: str) -> None:
    with pytest.raises(Refused, match="--memory is ") as error:
        parse_size(text, "--memory")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


# -- the command ---------------------------------------------------------------------------------


def directory(path: Path, name: str) -> Path:
    (path / "config.json").write_bytes((CONFIGS / f"{name}.json").read_bytes())
    return path


def test_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory(tmp_path, "glm-4.7-flash")
    assert run(str(tmp_path), **{**DEFAULTS, "kv_cache_dtype": "int8", "memory": "80GiB"}) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert err == ""
    expected = planned("glm-4.7-flash", kv_cache_dtype="int8", memory=80 * GIB)
    differing = {name for name in plan if plan[name] != expected[name]}
    assert differing == {"model", "command"}
    assert {
        "layers", "page_tokens", "page_bytes", "state_bytes_per_sequence", "weight_bytes", "pages", "max_tokens",
        "max_context_one_sequence", "bytes_for_prompt_of_10_tokens", "verdict",
    } <= plan.keys()  # fmt: skip


def test_tables_show_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory(tmp_path, "qwen3.6-27b")
    asked = {"kv_cache_dtype": "int8", "kv_cache_map": "3=bf16", "memory": "24GiB", "weight_bytes": "14GiB"}
    assert run(str(tmp_path), **{**DEFAULTS, **asked, "as_json": False}) == 0
    lines = capsys.readouterr().out.splitlines()
    plan = planned("qwen3.6-27b", kv_cache_dtype="int8", kv_cache_map="3=bf16", memory=24 * GIB, weights=14 * GIB)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert ["48", "gdn", "state float32, conv model", "-", "3.1 MiB"] in cells
    assert ["1", "k + v", "k bf16, v bf16", "4,096", "-"] in cells
    assert ["15", "k + v", "k int8, v int8", "2,064", "-"] in cells
    assert ["longest context", f"{plan['max_context_one_sequence']:,} tokens"] in cells
    assert plan["verdict"] in lines
    assert shlex.split(lines[-1]) == [
        "truekv", "generate", str(tmp_path), "--kv-cache-dtype", "int8", "--kv-cache-map", "3=bf16",
        "--max-model-len", str(plan["max_context_one_sequence"]),
    ]  # fmt: skip


def test_headers_say_what_weights_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    config = json.loads((CONFIGS / "qwen3-0.6b.json").read_text()) | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2, "dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = Checkpoint.open(str(tmp_path)).architecture.tensors
    stored = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    # A few tensors in float32: then the headers, and not two bytes per number, are right.
    stored = {name: tensor.float() if "norm" in name else tensor for name, tensor in stored.items()}
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    assert run(str(tmp_path), **DEFAULTS) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["weight_bytes"] == sum(tensor.nbytes for tensor in stored.values()) != 2 * plan["parameters"]
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        assert run(str(tmp_path), **{**DEFAULTS, "dtype": dtype, "weight_bytes": None}) == 0
        plan = json.loads(capsys.readouterr().out)
        assert dtype == "bfloat16" or plan["weight_bytes"] == size * plan["parameters"]
    assert run(str(tmp_path), **{**DEFAULTS, "weight_bytes": "12345"}) == 0
    assert json.loads(capsys.readouterr().out)["weight_bytes"] == 12345


def test_planning_never_imports_torch(tmp_path: Path) -> None:
    directory(tmp_path, "qwen3.6-27b")
    program = """
        import sys
        from truekv.core.errors import DoesNotFit
        from truekv.serve.plan import run
        arguments = dict(
            kv_cache_dtype="turboquant_3bit_nc", kv_cache_map="7=int8/kv4", memory="24GiB", max_model_len=None,
            max_num_seqs=4, num_speculative_tokens=3, weight_bytes="14GiB", dtype="auto",
        )
        run(sys.argv[1], as_json=True, **arguments)
        run(sys.argv[1], as_json=False, **arguments)
        try:
            run(sys.argv[1], as_json=True, **{**arguments, "weight_bytes": None})
        except DoesNotFit as error:
            print(error, file=sys.stderr)
        assert not {"torch", "numpy", "transformers", "huggingface_hub", "jinja2"} & sys.modules.keys()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("the weights of ")


def test_an_unknown_family_is_one_sentence(tmp_path: Path) -> None:
    directory(tmp_path, "kimi-linear-48b-a3b")
    with pytest.raises(Refused, match="model_type 'kimi_linear' is not implemented; truekv runs ") as error:
        run(str(tmp_path), **DEFAULTS)
    assert "qwen3_5" in str(error.value)


# -- everything that anyone could ask ------------------------------------------------------------


FAMILIES = ("qwen3-0.6b", "qwen3.6-27b", "qwen3.6-35b-a3b", "qwen3-next-80b-a3b", "glm-4.7-flash", "deepseek-v2-lite",
            "granite-4.0-h-tiny", "nemotron-3-nano-30b-a3b")  # fmt: skip


def test_every_format_plans_on_every_family() -> None:
    # Refused on purpose: a key and a value format for a latent that is both.
    refusals: dict[str, set[str]] = {}
    sentences: set[str] = set()
    for config in FAMILIES:
        for asked in names():
            for drafts in (0, 3):
                options = EngineOptions(kv_cache_dtype=asked, speculative_config=guesses(drafts))
                try:
                    plan = Request(config, released(config), options, memory=200 * GIB).plan().plan
                except Refused as error:
                    sentences.add(str(error))
                    refusals.setdefault(config, set()).add(asked)
                else:
                    assert plan.pages > 0
    pairs = {"k8v4", "k4v3", "turboquant_k8v4", "turboquant_k3v4_nc"}
    assert refusals == {"glm-4.7-flash": pairs, "deepseek-v2-lite": pairs}
    assert all("use LATENT/ROPE" in sentence for sentence in sentences)


FORMAT = st.one_of(
    st.sampled_from(names()),
    st.tuples(st.sampled_from(names()), st.sampled_from(names())).map("/".join),
    st.sampled_from(("int9", "", "/", "kv4/", "int8/kv4/bf16", "q4_0/q8_0", "Ω")),
)
LAYERS = st.integers(0, 70)
ENTRY = st.one_of(
    st.tuples(LAYERS, FORMAT).map(lambda pair: f"{pair[0]}={pair[1]}"),
    st.tuples(LAYERS, LAYERS, FORMAT).map(lambda item: f"{item[0]}-{item[1]}={item[2]}"),
    st.sampled_from(("3", "=int8", "x=int8", "-1=int8", "3=int8=bf16", "999999999=int8")),
)
# Valid maps are rare among random entries, so half of the draws name attention layers of the hybrids.
MAP = st.one_of(
    st.just(""),
    st.lists(ENTRY, max_size=4).map(",".join),
    st.lists(st.tuples(st.sampled_from((3, 7, 11, 15)), FORMAT), max_size=3, unique_by=lambda item: item[0]).map(
        lambda items: ",".join(f"{index}={name}" for index, name in items)
    ),
)
QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]


def check_sentence(text: str) -> None:
    assert text
    assert "\n" not in text
    assert len(text) < 1000


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(
    name=st.sampled_from(sorted(path.stem for path in CONFIGS.glob("*.json") if "kimi" not in path.stem)),
    kv_cache_dtype=FORMAT,
    kv_cache_map=MAP,
    drafts=st.one_of(st.integers(0, 16), st.sampled_from((-1, 1 << 20, 1 << 21))),
    slots=st.one_of(st.integers(1, 64), st.sampled_from((0, 1 << 20))),
    length=st.one_of(st.none(), st.integers(-1, 300_000), st.integers(1, 1 << 63)),
    memory=st.one_of(st.none(), st.integers(1, 1 << 12), st.integers(1, 1 << 38), st.integers(1, 1 << 62)),
    weights=st.one_of(st.none(), st.integers(0, 1 << 36)),
    dtype=st.sampled_from(("auto", "float32", "bfloat16", "int4")),
)
def test_every_combination_plans_or_refuses(
    name: str,
    kv_cache_dtype: str,
    kv_cache_map: str,
    drafts: int,
    slots: int,
    length: int | None,
    memory: int | None,
    weights: int | None,
    dtype: Any,
) -> None:
    try:
        plan = planned(
            name,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_map=kv_cache_map,
            num_speculative_tokens=drafts,
            max_num_seqs=slots,
            max_model_len=length,
            memory=memory,
            weights=weights,
            dtype=dtype,
        )
    except Refused as error:
        check_sentence(str(error))
        return
    layers = plan["layers"]
    assert plan["page_bytes"] == 32 * sum(layer.get("bytes_per_token", 0) for layer in layers)
    assert plan["state_bytes_per_sequence"] == sum(layer.get("state_bytes", 0) for layer in layers)
    assert plan["cache_bytes"] == plan["pages"] * plan["page_bytes"] + slots * plan["state_bytes_per_sequence"]
    assert plan["pages"] >= 1
    if length is not None:
        assert plan["max_context_one_sequence"] == length
    if memory is not None:
        assert plan["cache_bytes"] + plan["weight_bytes"] <= memory
        assert plan["cache_bytes"] + plan["weight_bytes"] + plan["page_bytes"] > memory
    json.dumps(plan)


SMALL = {
    "hidden_size": 64, "intermediate_size": 32, "vocab_size": 128, "moe_intermediate_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "n_routed_experts": 4, "num_local_experts": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_expert_intermediate_size": 16, "kv_lora_rank": 32,
    "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "qk_head_dim": 24,
}  # fmt: skip
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.sampled_from((7, 48, 96, 100, 192, 513, 1 << 20, 1 << 24, 1 << 40, -(1 << 40), 10**30)),
        st.floats(allow_nan=False),
        st.text(max_size=5),
        st.sampled_from(
            ("full_attention", "linear_attention", "sliding_attention", "yarn", "silu", "relu2", "default")
        ),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=4,
)


def shrunk(name: str) -> dict[str, Any]:
    """A released config made small, the multimodal wrapper included."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    inner = config.get("text_config", config)
    inner.update({field: value for field, value in SMALL.items() if inner.get(field) is not None})
    if "kv_lora_rank" in inner:
        inner["num_key_value_heads"] = inner["num_attention_heads"]
        inner["head_dim"] = inner["qk_rope_head_dim"]
    return config


@pytest.mark.parametrize("name", FAMILIES)
def test_small_configs_still_plan(name: str) -> None:
    values = shrunk(name)
    checkpoint = Checkpoint(Path("/nowhere"), Config(values), understand(Config(values)), {})
    assert checkpoint.parameters < 10_000_000
    plan = Request(name, checkpoint, EngineOptions(kv_cache_dtype="bf16")).plan().as_json()
    assert plan["bytes_per_token"] > 0


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(data=st.data(), name=st.sampled_from(FAMILIES), kv_cache_dtype=FORMAT, drafts=st.integers(0, 4))
def test_any_config_plans_or_is_refused(data: st.DataObject, name: str, kv_cache_dtype: str, drafts: int) -> None:
    values = copy.deepcopy(shrunk(name))
    inner: dict[str, Any] = values.get("text_config", values)
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from((*sorted(inner), "sliding_window", "rope_scaling", "mystery", "dtype")))
        old = inner.get(field)
        nested = isinstance(old, dict) and bool(old) and data.draw(st.booleans())
        if data.draw(st.integers(0, 4)) == 0:
            inner.pop(field, None)
        elif nested:
            old[data.draw(st.sampled_from(sorted(old)))] = data.draw(JSON)
        else:
            inner[field] = data.draw(JSON)
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "config.json").write_text(json.dumps(values))
        options = EngineOptions(kv_cache_dtype=kv_cache_dtype, speculative_config=guesses(drafts))
        try:
            plan = Request("m", Checkpoint.open(path), options, memory=4 * GIB, weights=0).plan().as_json()
        except Refused as error:
            check_sentence(str(error))
            return
    assert plan["cache_bytes"] <= 4 * GIB
