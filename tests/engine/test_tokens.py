from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_models import SPECIAL, byte_tokenizer
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from truekv import Refused
from truekv.engine.tokens import StopStrings, TextStream, Tokenizer, end_tokens, read_object

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = Tokenizer(byte_tokenizer())


def stream(tokens: list[int], tokenizer: Tokenizer = TOKENIZER, before: tuple[int, ...] = ()) -> list[str]:
    texts = TextStream(tokenizer, before)
    return [*(texts.push(token) for token in tokens), texts.flush()]


def test_an_emoji_appears_whole_with_its_last_byte() -> None:
    tokens = TOKENIZER.encode("a😀é", add_special_tokens=False)
    assert len(tokens) == 7
    assert stream(tokens) == ["a", "", "", "", "😀", "", "é", ""]


def test_an_unfinished_character_shows_at_the_end_and_not_before() -> None:
    tokens = TOKENIZER.encode("ok😀", add_special_tokens=False)[:-1]
    assert stream(tokens) == ["o", "k", "", "", "", "\ufffd"]


@given(st.text())
def test_what_streams_is_the_text(text: str) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    pieces = stream(tokens)
    assert "".join(pieces) == text
    # The character itself may be U+FFFD; half of another one never shows as it.
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


@given(st.lists(st.integers(0, 255), max_size=40))
def test_invalid_bytes_never_raise_and_are_not_held_for_ever(tokens: list[int]) -> None:
    texts = TextStream(TOKENIZER)
    silent = 0
    for token in tokens:
        silent = 0 if texts.push(token) else silent + 1
        assert silent < 8
    texts.flush()


def test_special_tokens_are_not_text() -> None:
    end = TOKENIZER.find("<|im_end|>")
    assert end is not None
    tokens = [
        *TOKENIZER.encode("hello", add_special_tokens=False),
        end,
        *TOKENIZER.encode(" you", add_special_tokens=False),
    ]
    assert "".join(stream(tokens)) == "hello you"
    assert TOKENIZER.piece(end) == "<|im_end|>"


def test_a_word_keeps_its_space_after_the_prompt_and_after_a_special_token() -> None:
    # SentencePiece decoders strip the space of the first token they see.
    library = Library(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "<s>": 2}, "<s>"))
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(library)
    assert "".join(stream([1, 0], tokenizer)) == "b a"
    assert "".join(stream([1, 0], tokenizer, before=(0,))) == " b a"
    assert "".join(stream([1, 2, 0], tokenizer, before=(0,))) == " b a"


def cut(text: str, stops: list[str], sizes: list[int]) -> tuple[str, bool]:
    """Push a text in pieces; what is shown is checked to be final."""
    watch = StopStrings(stops)
    shown, place = "", 0
    for size in sizes:
        part, stopped = watch.push(text[place : place + size])
        shown, place = shown + part, place + size
        if stopped:
            return shown, True
    part, stopped = watch.push(text[place:])
    return shown + part + ("" if stopped else watch.flush()), stopped


@pytest.mark.parametrize("sizes", [[], [1] * 30, [4, 1, 2], [6], [7], [3, 3, 3]])
def test_a_stop_string_is_found_across_any_borders(sizes: list[int]) -> None:
    assert cut("hello\n\nUser: x", ["\n\nUser:", "zzz"], sizes) == ("hello", True)
    assert cut("hello\n\nUse other", ["\n\nUser:"], sizes) == ("hello\n\nUse other", False)


@given(st.text("ab", max_size=24), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_strings_agree_with_a_search_of_the_whole_text(text: str, stops: list[str], data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), max_size=len(text)))
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    shown, stopped = cut(text, stops, sizes)
    assert stopped == bool(ends)
    if not stopped:
        assert shown == text
    else:
        # Whatever the pieces, no stop string is inside what was shown, and one follows it.
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(shown + stop) for stop in stops)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    watch = StopStrings(["</answer>"])
    assert watch.push("42</ans") == ("42", False)
    assert watch.push("wers>") == ("</answers>", False)
    assert watch.push("</answer") == ("", False)
    assert watch.flush() == "</answer"


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_tokens(tmp_path, None) == {7}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [8, 9]}}))
    assert end_tokens(tmp_path, None) == {8, 9}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert end_tokens(tmp_path, None) == {3, 4}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": SPECIAL[2]}}))
    assert end_tokens(tmp_path, TOKENIZER) == {3, 4, TOKENIZER.find(SPECIAL[2])}


def test_a_tokenizer_never_truncates_or_pads(tmp_path: Path) -> None:
    library = byte_tokenizer()
    library.enable_truncation(4)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("a longer text", add_special_tokens=True)) == "a longer text"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    assert Tokenizer.open(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Refused, match=r"tokenizer.json cannot be read as a tokenizer"):
        Tokenizer.open(tmp_path)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(Refused, match="must hold a JSON object"):
        read_object(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(Refused, match="not valid JSON"):
        read_object(tmp_path / "x.json")


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(Refused, match="lone surrogate at character 2"):
        TOKENIZER.encode("ab\udc80", add_special_tokens=False)
