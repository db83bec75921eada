import json
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from types import ModuleType
from typing import Any

import pytest

from jaxserve.chat_template import MAX_RENDERED_CHARS, ChatTemplate
from jaxserve.errors import TokenizerError, UsageError

LLAMA_2 = """\
{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0].content.strip() + '\\n<</SYS>>\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate user/assistant') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() -}}
        {{- ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message.content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

LLAMA_3 = """\
{{- bos_token }}
{%- set ns = namespace(names=[]) %}
{%- for message in messages %}
    {%- set ns.names = ns.names + [message.role] %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- call.function | tojson }}
        {%- endfor %}
    {%- elif message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type != 'text' %}{% continue %}{% endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none %}
    {{- 'Tools: ' + tools | tojson(indent=2) }}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
{#- the roles: #}{{- ns.names | join(',') }}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% set role = 'model' %}
    {% else %}
        {% set role = message['role'] %}
    {% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<start_of_turn>model\\n' }}
{% endif %}
"""

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' ~ message.role ~ '\\n' }}
    {% generation %}
{{ message.content }}
    {% endgeneration %}
{{ '<|im_end|>\\n' }}
{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

USER = {"role": "user", "content": " What is <b>naïve</b>? 🦙 "}
ANSWER = {"role": "assistant", "content": "An adjective & more."}
SYSTEM = {"role": "system", "content": "Be brief.\nBe kind."}
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look"}]}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5, None, True, "é<"]}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<x>"}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CASES = [
    pytest.param(LLAMA_2, [USER], {}, id="llama_2"),
    pytest.param(LLAMA_2, [SYSTEM, USER, ANSWER, USER], {}, id="llama_2 system"),
    pytest.param(LLAMA_3, [SYSTEM, USER], {}, id="llama_3"),
    pytest.param(LLAMA_3, [USER, CALL, PARTS], {"tools": TOOLS}, id="llama_3 tools"),
    pytest.param(GEMMA, [USER, ANSWER, USER], {}, id="gemma"),
    pytest.param(CHATML, [SYSTEM, USER, ANSWER], {}, id="chatml"),
    pytest.param(CHATML, [USER, ANSWER, USER, ANSWER, USER, ANSWER], {}, id="chatml break"),
]

Messages = Sequence[Mapping[str, Any]]


def render(source: str, messages: Messages = (USER,), **variables: Any) -> str:
    return ChatTemplate(source).render(messages, **variables)


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports warn of is not ours
        return pytest.importorskip("transformers", reason="the oracle is transformers")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(("source", "messages", "variables"), CASES)
def test_prompts_are_those_of_transformers(
    transformers: ModuleType,
    library_of: Any,
    source: str,
    messages: Messages,
    variables: dict[str, Any],
    add_generation_prompt: bool,
):
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library_of("llama_2"), chat_template=source, **SPECIAL
    )
    expected = oracle.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )
    assert render(
        source, messages, add_generation_prompt=add_generation_prompt, **SPECIAL, **variables
    ) == (expected)


def test_a_llama_2_prompt_is_what_it_should_be():
    messages = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello"}, USER]
    assert render(LLAMA_2, messages, **SPECIAL) == (
        "<s>[INST] Hi [/INST] Hello </s><s>[INST] What is <b>naïve</b>? 🦙 [/INST]"
    )


def test_what_a_template_refuses_is_an_error_with_its_words():
    with pytest.raises(TokenizerError, match="System role not supported"):
        render(GEMMA, [SYSTEM, USER], **SPECIAL)
    with pytest.raises(TokenizerError, match="roles must alternate"):
        render(LLAMA_2, [USER, USER], **SPECIAL)


def test_tojson_keeps_html_and_unicode():
    assert render("{{ messages[0] | tojson }}", [{"role": "é", "content": "<&>'"}]) == (
        """{"role": "é", "content": "<&>'"}"""
    )
    assert render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}") == (
        '{"a":2,"b":1}'
    )


def test_strftime_now_asks_the_given_clock():
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", now=lambda: datetime(2024, 7, 26))
    assert template.render([USER]) == "26 July 2024"


def test_fields_that_are_none_are_left_out():
    messages = [{"role": "user", "content": None}]
    assert render("{{ 'content' in messages[0] }} {{ messages[0].content }}", messages) == "False "


def test_a_template_is_compiled_once(monkeypatch: pytest.MonkeyPatch):
    from jinja2 import Environment

    compiled: list[str] = []
    compile_source = Environment.from_string

    def counting(self: Environment, source: str) -> Any:
        compiled.append(source)
        return compile_source(self, source)

    monkeypatch.setattr(Environment, "from_string", counting)
    template = ChatTemplate("{{ messages[0].content }}")
    assert [template.render([{"role": "user", "content": text}]) for text in "ab"] == ["a", "b"]
    assert compiled == ["{{ messages[0].content }}"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ dict.__subclasses__() }}",
        "{{ dict.mro() }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ namespace({'_x': 1}) }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
        "{{ lipsum(100) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.clear() }}",
    ],
)
def test_the_sandbox_holds(source: str):
    with pytest.raises(TokenizerError):
        render(source)


def test_what_a_template_is_given_stays_as_it_was():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(TokenizerError, match="SecurityError"):
        render("{{ messages[0].content.append('b') }}", messages)
    assert messages == [{"role": "user", "content": ["a"]}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
        "{{ 99999999999 * 'a' }}",
        "{{ [1] * 99999999999 }}",
        "{{ 9 ** 999999999 }}",
        "{% for i in range(100001) %}{% endfor %}",
    ],
)
def test_what_a_template_makes_is_bounded(source: str):
    with pytest.raises(TokenizerError, match=r"limit|more than|too big"):
        render(source, [{"role": "user", "content": "x" * 5000}])


def test_a_prompt_of_the_greatest_length_passes():
    content = "x" * (MAX_RENDERED_CHARS - 1)
    assert len(render("{{ messages[0].content }}.", [{"role": "user", "content": content}])) == (
        MAX_RENDERED_CHARS
    )
    with pytest.raises(TokenizerError, match=str(MAX_RENDERED_CHARS)):
        render("{{ messages[0].content }}..", [{"role": "user", "content": content}])


def test_arithmetic_of_ordinary_size_works():
    assert render("{{ 6 * 7 }} {{ 2 ** 10 }} {{ '-' * 3 }} {{ 2 ** -1 }} {{ 1.5 * 2 }}") == (
        "42 1024 --- 0.5 3.0"
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "line 1"),
        ("\n{% nonsense %}", "line 2: Encountered unknown tag 'nonsense'"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_a_broken_template_is_a_clear_error(source: str, words: str):
    with pytest.raises(TokenizerError, match=words):
        render(source)


@pytest.mark.parametrize(
    "messages",
    ["Hello", [], ["Hello"], [{"content": "Hello"}], [{"role": 3}], {"role": "user"}, None, 3],
)
def test_malformed_messages_are_refused(messages: Any):
    with pytest.raises(UsageError, match="messages"):
        render("{{ messages }}", messages)


def test_only_plain_data_reaches_a_template():
    class Role(StrEnum):
        USER = "user"

    shown = render("{{ messages | tojson }}", [{"role": Role.USER, "parts": ("a", 1)}])
    assert json.loads(shown) == [{"role": "user", "parts": ["a", 1]}]
    with pytest.raises(UsageError, match=r"messages\[0\].content holds a bytes"):
        render("", [{"role": "user", "content": b"x"}])
    with pytest.raises(UsageError, match="tools holds a function"):
        render("", tools=[render])
