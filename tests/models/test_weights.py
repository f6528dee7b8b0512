"""Checkpoints: whatever a file claims is checked before it is believed, and said in one sentence."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.utils
import pytest
import torch
from safetensors.torch import save_file

from truekv.core.errors import Corrupted, Refused, TrueKVError
from truekv.models.headers import read_header, read_headers
from truekv.models.weights import Checkpoint

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "float32",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "attention_bias": False,
}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}


def write_config(directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def random_weights(directory: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = Checkpoint.open(str(directory)).architecture.tensors
    return {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}


def one_sentence(error: pytest.ExceptionInfo[TrueKVError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 600
    assert error.value.__cause__ is None
    return text


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


# -- one safetensors file ------------------------------------------------------------------------


def test_a_header_is_read_with_absolute_offsets(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(packed({"__metadata__": {"format": "pt"}, "b": B, "a": A}, bytes(32)))
    found = read_header(file)
    base = file.stat().st_size - 32
    assert {
        name: (item.dtype, item.shape, item.file, item.start - base, item.end - base) for name, item in found.items()
    } == {
        "a": ("F32", (2, 3), "model.safetensors", 0, 24),
        "b": ("F16", (4,), "model.safetensors", 24, 32),
    }


def test_our_reader_agrees_with_the_library(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "eight": torch.randn(6).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, file)
    found, raw = read_header(file), file.read_bytes()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        stored = bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        assert raw[found[name].start : found[name].end] == stored


def test_sub_byte_dtypes_are_counted_in_bits(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(packed({"a": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}, bytes(3)))
    assert read_header(file)["a"].end - read_header(file)["a"].start == 3
    file.write_bytes(packed({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, bytes(2)))
    with pytest.raises(Corrupted, match=r"needs 1\.5"):
        read_header(file)


MALFORMED = {
    "empty file": (b"", "0 bytes, too few"),
    "seven bytes": (bytes(7), "7 bytes, too few"),
    "no header behind the length": (packed(b"", length=10), "announces a header of 10 bytes, but has only 8"),
    "huge header length": (packed({"a": A}, bytes(24), length=1 << 62), "more than the 100000000 allowed"),
    "all ones": (b"\xff" * 64, "more than the 100000000 allowed"),
    "zero header length": (packed(b"", length=0), "not valid JSON"),
    "not JSON": (packed(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (packed(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "a list": (packed([1]), "must be an object"),
    "deep nesting": (packed(b"[" * 100_000), "nests its objects too deeply"),
    "duplicate tensor": (packed(b'{"a": %b, "a": %b}' % ((json.dumps(A).encode(),) * 2), bytes(24)), "'a' twice"),
    "tensor is no object": (packed({"a": 3}), "something else than dtype, shape and data_offsets"),
    "field missing": (packed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "something else than"),
    "field too many": (packed({"a": {**A, "x": 1}}, bytes(24)), "something else than"),
    "unknown dtype": (packed({"a": {**A, "dtype": "F33"}}, bytes(24)), "unknown dtype 'F33'"),
    "dtype is a number": (packed({"a": {**A, "dtype": 32}}, bytes(24)), "unknown dtype 32"),
    "shape is no list": (packed({"a": {**A, "shape": 6}}, bytes(24)), "impossible shape 6"),
    "negative dims": (packed({"a": {**A, "shape": [-2, -3]}}, bytes(24)), "impossible shape"),
    "fractional dim": (packed({"a": {**A, "shape": [2.0, 3]}}, bytes(24)), "impossible shape"),
    "boolean dim": (packed({"a": {**A, "shape": [True, 6]}}, bytes(24)), "impossible shape"),
    "huge dim": (packed({"a": {**A, "shape": [1 << 70, 0], "data_offsets": [0, 0]}}), "impossible shape"),
    "huge product": (packed({"a": {**A, "shape": [1 << 40] * 8}}, bytes(24)), "24 bytes, but F32"),
    "too many dims": (packed({"a": {**A, "shape": [2, 3] + [1] * 7}}, bytes(24)), "impossible shape"),
    "number of 5000 digits": (packed(b'{"a": %b}' % (b"9" * 5000)), "not valid JSON"),
    "offsets reversed": (packed({"a": {**A, "data_offsets": [24, 0]}}, bytes(24)), "impossible data_offsets"),
    "offsets negative": (packed({"a": {**A, "data_offsets": [-24, 0]}}, bytes(24)), "impossible data_offsets"),
    "three offsets": (packed({"a": {**A, "data_offsets": [0, 8, 24]}}, bytes(24)), "impossible data_offsets"),
    "bytes unlike the shape": (packed({"a": {**A, "data_offsets": [0, 20]}}, bytes(20)), "20 bytes, but F32"),
    "truncated data": (packed({"a": A, "b": B}, bytes(31)), "'b', which reaches"),
    "a byte too many": (packed({"a": A, "b": B}, bytes(33)), "1 bytes after its last tensor"),
    "a hole": (packed({"a": A, "b": {**B, "data_offsets": [25, 33]}}, bytes(33)), "a hole before 'b'"),
    "an overlap": (packed({"a": A, "b": {**B, "data_offsets": [16, 24]}}, bytes(24)), "another tensor inside 'b'"),
    "a hole at the start": (packed({"a": {**A, "data_offsets": [8, 32]}}, bytes(32)), "a hole before 'a'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_one_sentence(case: str, tmp_path: Path) -> None:
    data, expected = MALFORMED[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(Corrupted) as error:
        read_header(file)
    text = one_sentence(error)
    assert expected in text
    assert str(file) in text


def test_no_malformed_file_needs_torch(tmp_path: Path) -> None:
    for index, (data, _) in enumerate(MALFORMED.values()):
        directory = write_config(tmp_path / str(index))
        (directory / "model.safetensors").write_bytes(data)
    program = """
        import sys
        from pathlib import Path
        from truekv.core.errors import Corrupted
        from truekv.models.weights import Checkpoint
        caught = 0
        for directory in Path(sys.argv[1]).iterdir():
            try:
                Checkpoint.open(str(directory))
            except Corrupted:
                caught += 1
        assert "torch" not in sys.modules
        print(caught)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert int(done.stdout) == len(MALFORMED)


# -- the directory -------------------------------------------------------------------------------


def test_config_alone_opens(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write_config(tmp_path)))
    # By hand: embedding; per layer q, o, k + v, three MLP maps, two norms, q and k norm; final norm.
    layer = 16 * 16 + 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16 + 2 * 16 + 2 * 8
    assert checkpoint.parameters == 24 * 16 + 2 * layer + 16
    assert checkpoint.weight_bytes == 2 * checkpoint.parameters
    assert dict(checkpoint.headers) == {}
    with pytest.raises(Refused, match=r"holds no model\.safetensors") as error:
        checkpoint.check()
    one_sentence(error)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'false'\ntR.")
    with pytest.raises(Refused, match=r"'pytorch_model\.bin' cannot be used: only safetensors are read"):
        Checkpoint.open(str(tmp_path)).load("float32")


def test_weights_load_bit_for_bit_and_infinity_is_a_number(tmp_path: Path) -> None:
    write_config(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        text.replace('"attention_bias": false', '"attention_bias": false, "label2id": Infinity')
    )
    weights = random_weights(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.config.values["label2id"] == math.inf
    assert checkpoint.weight_bytes == 4 * checkpoint.parameters
    loaded = received(checkpoint, "float32")
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor)


def received(checkpoint: Checkpoint, dtype: str) -> dict[str, torch.Tensor]:
    """What the family's build was given."""
    caught: dict[str, torch.Tensor] = {}

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(checkpoint.architecture, name)

        def build(self, weights: dict[str, torch.Tensor]) -> object:
            caught.update(weights)
            return checkpoint.architecture.build(weights)

    Checkpoint(checkpoint.directory, checkpoint.config, Spy(), checkpoint.headers).load(dtype)  # type: ignore[arg-type]
    return caught


def test_sixteen_bit_files_convert_to_the_compute_dtype(tmp_path: Path) -> None:
    write_config(tmp_path, dtype="float16")
    weights = {name: tensor.half() for name, tensor in random_weights(tmp_path).items()}
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.weight_bytes == 2 * checkpoint.parameters
    assert checkpoint.compute_dtype("auto") == "float32"
    assert checkpoint.compute_dtype("bfloat16") == "bfloat16"
    for name, tensor in received(checkpoint, "auto").items():
        assert torch.equal(tensor, weights[name].float())
    with pytest.raises(Refused, match="dtype is 'float8', but must be auto, float32 or bfloat16"):
        checkpoint.load("float8")


def test_a_loaded_model_survives_the_file(tmp_path: Path) -> None:
    write_config(tmp_path)
    weights = random_weights(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    loaded = received(Checkpoint.open(str(tmp_path)), "float32")
    os.truncate(tmp_path / "model.safetensors", 8)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    write_config(tmp_path)
    weights = random_weights(tmp_path)
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in received(Checkpoint.open(str(tmp_path)), "float32")


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to read a tensor fails the test."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a tensor was read before the check")

    monkeypatch.setattr("truekv.models.stored.StoredTensors.__getitem__", refuse)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({NORM: None}, f"'{NORM}' missing"),
        ({"model.layers.0.extra": torch.zeros(1)}, "'model.layers.0.extra' unexpected"),
        ({NORM: torch.zeros(17)}, f"'{NORM}' has shape [17] instead of [16]"),
        ({NORM: torch.zeros(1, 16)}, f"'{NORM}' has shape [1, 16] instead of [16]"),
        ({NORM: torch.zeros(16, dtype=torch.int8)}, f"'{NORM}' is stored as I8"),
        ({NORM: torch.zeros(16).to(torch.float8_e4m3fn)}, f"'{NORM}' is stored as F8_E4M3"),
        ({f"extra.{index}": torch.zeros(1) for index in range(5)}, "'extra.2' and 2 more unexpected"),
        ({NORM: None, "x": torch.zeros(1)}, f"'{NORM}' missing; 'x' unexpected"),
    ],
)
@pytest.mark.usefixtures("no_reads")
def test_wrong_tensors_are_named_before_any_is_read(
    change: dict[str, torch.Tensor | None], expected: str, tmp_path: Path
) -> None:
    write_config(tmp_path)
    weights = random_weights(tmp_path) | change
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(str(tmp_path))
    with pytest.raises(Refused) as error:
        checkpoint.load("float32")
    assert expected in one_sentence(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_non_finite_weights_are_refused(value: float, dtype: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    weights = random_weights(tmp_path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(Corrupted, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity") as error:
        Checkpoint.open(str(tmp_path)).load(dtype)
    one_sentence(error)


def test_a_number_too_large_for_the_compute_dtype_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    weights = {name: tensor.double() for name, tensor in random_weights(tmp_path).items()}
    weights[NORM][0] = 1e300
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(Corrupted, match=NORM):
        Checkpoint.open(str(tmp_path)).load("float32")


# -- shards --------------------------------------------------------------------------------------


def shard(directory: Path, placed: dict[str, str], held: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, tensors in held.items():
        save_file(tensors, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def halves(weights: dict[str, torch.Tensor]) -> tuple[dict[str, str], dict[str, dict[str, torch.Tensor]]]:
    names = list(weights)
    held = {
        "model-00001-of-00002.safetensors": {name: weights[name] for name in names[::2]},
        "model-00002-of-00002.safetensors": {name: weights[name] for name in names[1::2]},
    }
    return {name: file for file, tensors in held.items() for name in tensors}, held


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    write_config(tmp_path)
    weights = random_weights(tmp_path)
    shard(tmp_path, *halves(weights))
    loaded = received(Checkpoint.open(str(tmp_path)), "float32")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    shard(tmp_path, *halves(random_weights(tmp_path)))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(Refused, match=r"lacks 'model-00002-of-00002\.safetensors'") as error:
        Checkpoint.open(str(tmp_path))
    one_sentence(error)
    # Planning needs no weights, so it may go on without them.
    assert (
        Checkpoint.open(str(tmp_path), weights=False).weight_bytes
        == 2 * Checkpoint.open(str(tmp_path), weights=False).parameters
    )


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "model.bin", "", 3]
)
def test_shards_stay_in_their_directory(name: object, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(Refused, match=r"a shard must be a \.safetensors file in the same directory") as error:
        Checkpoint.open(str(tmp_path))
    one_sentence(error)


def test_an_index_that_lies_is_caught(tmp_path: Path) -> None:
    write_config(tmp_path)
    placed, held = halves(random_weights(tmp_path))
    first, second = held
    shard(tmp_path, {**placed, NORM: first if placed[NORM] == second else second}, held)
    with pytest.raises(Corrupted, match="which does not hold them") as error:
        Checkpoint.open(str(tmp_path))
    one_sentence(error)
    held[second] |= held[first]
    shard(tmp_path, placed, held)
    with pytest.raises(Corrupted, match="both hold") as error:
        Checkpoint.open(str(tmp_path))
    one_sentence(error)
    for index in ("{}", '{"weight_map": []}', '{"weight_map": {}}', "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(Refused):
            read_headers(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(Refused, match=r"no model\.safetensors\.index\.json"):
        read_headers(tmp_path)


# -- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be an object"),
        (b'"qwen3"', "must be an object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": ' * 50_000, "too deeply"),
        (b"{}", "no field 'model_type'"),
        (b'{"model_type": 3}', "must be a string"),
        (b'{"model_type": "qwen33"}', "did you mean 'qwen3'? truekv runs "),
        (b'{"model_type": "\\ud800"}', "is not implemented; truekv runs "),
        (b'{"model_type": "zzzz"}', "model_type 'zzzz' is not implemented; truekv runs "),
        (b" " * 16_000_001, "more than the 16000000"),
    ],
)
def test_bad_configs_are_one_sentence(text: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(Refused) as error:
        Checkpoint.open(str(tmp_path))
    sentence = one_sentence(error)
    assert expected in sentence
    assert str(tmp_path / "config.json") in sentence
    sentence.encode()


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    for quantization in ({"quant_method": "fp8"}, {"quant_method": "awq", "bits": 4}, "mystery"):
        write_config(tmp_path, quantization_config=quantization)
        with pytest.raises(
            Refused, match="quantized weights are not implemented; use the model's unquantized"
        ) as error:
            Checkpoint.open(str(tmp_path))
        one_sentence(error)
    write_config(tmp_path, text_config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(Refused, match="quantized weights"):
        Checkpoint.open(str(tmp_path))
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    both = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme, "config_groups": {"group_0": {}}}
    write_config(tmp_path, quantization_config=both)
    with pytest.raises(Refused, match="quantized weights"):
        Checkpoint.open(str(tmp_path))
    only_cache = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme, "config_groups": {}}
    write_config(tmp_path, quantization_config=only_cache)
    with pytest.raises(Refused, match="--kv-cache-dtype int8") as error:
        Checkpoint.open(str(tmp_path))
    one_sentence(error)
    write_config(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(Refused, match="hf_quant_config"):
        Checkpoint.open(str(tmp_path))


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "neither a directory nor a hub id"),
        ("/no/such/place", "neither a directory nor a hub id"),
        ("a b", "neither a directory nor a hub id"),
        ("", "neither a directory nor a hub id"),
        ("x\0y", "neither a directory nor a hub id"),
        ("../../etc", "neither a directory nor a hub id"),
        ("x" * 5000, "neither a directory nor a hub id"),
        ("x" * 90 + "/" + "y" * 90, "cannot be downloaded"),
        ("truekv-tests/not-downloaded", "cannot be downloaded: the hub could not be reached"),
    ],
)
def test_models_that_are_not_there(name: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused) as error:
        Checkpoint.open(name)
    assert expected in one_sentence(error)


def cached(cache: Path, name: str, files: dict[str, bytes]) -> None:
    """A model as the hub client leaves it on disk: blobs, and a snapshot of symbolic links."""
    root, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (root / folder).mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for index, (file, data) in enumerate(files.items()):
        (root / "blobs" / str(index)).write_bytes(data)
        (root / "snapshots" / commit / file).symlink_to(f"../../blobs/{index}")


def test_a_model_in_the_hub_cache_opens_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = write_config(tmp_path / "plain")
    weights = random_weights(plain)
    save_file(weights, plain / "model.safetensors")
    names = ("config.json", "model.safetensors")
    cached(tmp_path / "hub", "truekv-tests/small", {name: (plain / name).read_bytes() for name in names})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = Checkpoint.open("truekv-tests/small")
    assert checkpoint.directory.is_relative_to(tmp_path / "hub")
    assert checkpoint.digest == Checkpoint.open(str(plain)).digest
    loaded = received(checkpoint, "float32")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_only_data_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offered = (
        "config.json model.safetensors model-00001-of-00002.safetensors model.safetensors.index.json tokenizer.json "
        "chat_template.jinja pytorch_model.bin modeling_custom.py consolidated.safetensors onnx/model.onnx "
        "original/consolidated.00.pth fp8/model.safetensors model.gguf tokenizer.model README.md"
    ).split()
    fetched: list[list[str]] = []

    def download(model: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert model == "org/name"
        choose = huggingface_hub.utils.filter_repo_objects
        fetched.append(list(choose(offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        return str(write_config(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Checkpoint.open("org/name")
    Checkpoint.open("org/name", weights=False)
    whole = ["config.json", *offered[1:6]]
    assert fetched == [whole, [name for name in whole if not name.endswith(".safetensors")]]


def test_a_bar_appears_only_when_loading_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_config(tmp_path)
    save_file(random_weights(tmp_path), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(str(tmp_path))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("truekv.models.stored.time", SimpleNamespace(monotonic=lambda: 0.0))
    checkpoint.load("float32")
    assert "loading weights" not in capsys.readouterr().err
    ticks = iter(range(0, 3000, 3))
    monkeypatch.setattr("truekv.models.stored.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    checkpoint.load("float32")
    out, err = capsys.readouterr()
    assert "loading weights" in err
    assert out == ""


def test_a_file_and_an_empty_directory_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(Refused, match="is a file; name the model directory"):
        Checkpoint.open(str(tmp_path / "model.gguf"))
    with pytest.raises(Refused, match=r"holds no config\.json"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "config.json").mkdir()
    with pytest.raises(Refused, match="is not a file"):
        Checkpoint.open(str(tmp_path))


# -- identity ------------------------------------------------------------------------------------


def test_the_digest_is_the_models_and_not_the_files(tmp_path: Path) -> None:
    one, two, tuned, other = (write_config(tmp_path / name) for name in ("one", "two", "tuned", "other"))
    weights = random_weights(one)
    save_file(weights, one / "model.safetensors")
    save_file(weights, two / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, tuned / "model.safetensors")
    write_config(other, rms_norm_eps=1e-5)
    save_file(weights, other / "model.safetensors")
    first = Checkpoint.open(str(one)).digest
    assert Checkpoint.open(str(two)).digest == first
    assert len({first, Checkpoint.open(str(tuned)).digest, Checkpoint.open(str(other)).digest}) == 3
