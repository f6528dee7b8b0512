from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import truekv
from truekv import Refused
from truekv.serve.messages import ChatTemplate, check_messages, check_tools
from truekv.serve.template import _WORKER, render

TEMPLATE = (Path(truekv.__file__).parent / "tiny" / "chat_template.jinja").read_text()
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Köln", "unit": "celsius"}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Köln? <b>&</b> 😀"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "12 degrees."},
    {"role": "user", "content": "Thanks"},
]
HOSTILE = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "did not finish within",
    "{{ ''.__class__.__mro__ }}": "reaches for what the sandbox forbids",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "reaches for what the sandbox forbids",
    "{{ messages.append(1) }}": "reaches for what the sandbox forbids",
    "{{ ('a' * 3000000000) | length }}": "needed more than",
    "{% for i in range(99999) %}{{ 'abc' * 1000 }}{% endfor %}": "wrote more than 4 MiB",
    "{{ nothing.at.all }}": "uses a value that these messages do not have",
    "{% if %}": "is not valid jinja2: line 1",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ raise_exception('roles must\n alternate') }}": "refuses these messages: roles must alternate",
}
if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="module")
def _stop_the_worker() -> Iterator[None]:
    yield
    _WORKER.stop()


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_one_sentence_and_no_wait(template: str) -> None:
    render("warm", {})
    began = time.monotonic()
    with pytest.raises(Refused, match=HOSTILE[template]) as caught:
        render(template, {"messages": []}, seconds=1.0)
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    assert render("{{ messages | length }} {{ 'ok' }}", {"messages": [1, 2]}) == "2 ok"


def test_a_looping_template_does_not_outlive_its_time() -> None:
    render("warm", {})
    process = _WORKER._process
    assert process is not None
    with pytest.raises(Refused, match=r"within 0\.3 s"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {}, seconds=0.3)
    assert process.returncode is not None


def test_templates_render_as_in_transformers(tmp_path: Path) -> None:
    from random_models import byte_tokenizer
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|im_end|>")  # noqa: S106 (a token of text)
    templates = [
        TEMPLATE,
        "{% for m in messages %}\n    {{ m.content }}\n  {% if loop.last %}\n{{ eos_token }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
        "{{ messages[2] | tojson(indent=2) }}{{ tools | tojson if tools }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    ]
    for template in templates:
        (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
        ours = ChatTemplate.open(tmp_path)
        assert ours is not None
        for tools in (None, TOOLS):
            expected = reference.apply_chat_template(
                CONVERSATION, tools=tools, chat_template=template, add_generation_prompt=True, tokenize=False
            )
            assert ours.render(check_messages(CONVERSATION), check_tools(tools)) == expected


def test_the_template_is_found_where_checkpoints_keep_it(tmp_path: Path) -> None:
    def shown(**extra: Any) -> str:
        found = ChatTemplate.open(tmp_path)
        assert found is not None
        return found.render([{"role": "user", "content": "x"}], None, extra)

    config = tmp_path / "tokenizer_config.json"
    assert ChatTemplate.open(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "config {{ enable_thinking }}"}))
    assert shown(enable_thinking=True) == "config True"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    found = ChatTemplate.open(tmp_path)
    assert found is not None
    assert (found.render([], None), found.render([], TOOLS)) == ("plain", "tools")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert shown() == "json"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert shown() == "file x"
    # A caller's variable never replaces the conversation.
    assert shown(messages=[{"content": "y"}]) == "file x"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xff")
    with pytest.raises(Refused, match="not valid UTF-8: byte 0 is 0xff"):
        ChatTemplate.open(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").unlink()
    config.write_text(json.dumps({"chat_template": [1]}))
    with pytest.raises(Refused, match="must be a string or a list"):
        ChatTemplate.open(tmp_path)


def test_tool_arguments_written_as_json_text_reach_the_template_as_objects() -> None:
    call = {"function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    (message,) = check_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert "<parameter=city>\nRome\n</parameter>" in render(TEMPLATE, {"messages": [message], "tools": None})


def test_the_worker_imports_no_torch_and_ends_with_its_parent() -> None:
    code = (
        "import sys; from truekv.serve.template import _WORKER, render; render('x', {});"
        "print(_WORKER._process.pid, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    pid, loaded = done.stdout.split()
    assert loaded == "False"
    assert not done.stderr
    assert not Path(f"/proc/{pid}").exists()
