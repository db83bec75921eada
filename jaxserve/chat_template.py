"""Rendering a conversation with a checkpoint's chat template.

    ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(
        [{"role": "user", "content": "Hello"}])

A chat template is code that comes with a checkpoint. It runs in jinja2's immutable sandbox: it
reaches neither Python's internals nor files nor the network, and cannot change what it is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn, cast

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxserve.errors import TokenizerError, UsageError

MAX_RENDERED_CHARS = 4 * 2**20
"""The longest prompt, and the longest single repetition, that a template may make."""


class _Refusal(TemplateError):
    """What `raise_exception` raises inside a template."""


class _GenerationTag(Extension):
    """Renders the body of `{% generation %}`, a tag that marks what models are trained on."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _PublicNamespace(Namespace):
    """A `namespace()` whose names cannot begin with an underscore.

    jinja2 answers Python's own look-ups of special names from a namespace's attributes, so such a
    name would be a way past the sandbox.
    """

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        for name in dict(*args, **kwargs):
            _check_public(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, with refusals that are heard and bounds on `*` and `**`.

    Those two make a great value of a short expression, even while a template compiles.
    """

    intercepted_binops = frozenset(["*", "**"])

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # By default a forbidden attribute is an undefined value, which prints as nothing.
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is out of bounds")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        size = _result_size(operator, left, right)
        if size > MAX_RENDERED_CHARS:
            raise SecurityError(
                f"{operator!r} would make {size} characters or bits, "
                f"over the limit of {MAX_RENDERED_CHARS}"
            )
        return super().call_binop(context, operator, left, right)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, compiled on first use.

    Args:
        source: the template's text.
        origin: where it comes from, for error messages.
        now: the clock behind `strftime_now`.
    """

    source: str
    origin: str = "chat template"
    now: Callable[[], datetime] = datetime.now

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Returns the prompt that the template makes of a conversation.

        Args:
            messages: mappings with a `role`, oldest first; keys whose value is None are left out.
            add_generation_prompt: whether the prompt ends where the assistant's answer begins.
            variables: what else the template reads (`tools`, `documents`, `bos_token`, …).

        Raises:
            UsageError: the messages or variables are not plain data, or there are none.
            TokenizerError: the template does not compile, refuses the messages, fails, breaks
                the sandbox's rules or makes more than `MAX_RENDERED_CHARS` characters.
        """
        data: dict[str, Any] = {"tools": None, "documents": None}
        data |= {name: _plain(value, name) for name, value in variables.items()}
        data |= {
            "messages": _plain_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._compiled
        try:
            return _bounded_text(template, data, self.origin)
        except TokenizerError:
            raise
        except _Refusal as error:
            raise TokenizerError(f"the {self.origin} refuses these messages: {error}") from error
        except Exception as error:  # the template is foreign code: it can raise any exception
            raise TokenizerError(
                f"the {self.origin} failed: {type(error).__name__}: {error}; "
                "check the messages, or use another template"
            ) from error

    @cached_property
    def _compiled(self) -> Template:
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        names = cast("dict[str, Any]", environment.globals)
        names.update(
            raise_exception=_raise_exception,
            strftime_now=self._strftime_now,
            namespace=_PublicNamespace,
        )
        del names["lipsum"]  # unbounded text, no use in a chat
        try:
            return environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"the {self.origin} does not compile: line {error.lineno}: {error.message}"
            ) from error
        except (TemplateError, RecursionError, OverflowError, ValueError) as error:
            raise TokenizerError(f"the {self.origin} does not compile: {error}") from error

    def _strftime_now(self, pattern: str) -> str:
        return self.now().strftime(pattern)


def _bounded_text(template: Template, data: dict[str, Any], origin: str) -> str:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(data):
        size += len(piece)
        if size > MAX_RENDERED_CHARS:
            raise TokenizerError(
                f"the {origin} makes more than {MAX_RENDERED_CHARS} characters; "
                "send fewer or shorter messages"
            )
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} begins with an underscore; rename it")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _result_size(operator: str, left: Any, right: Any) -> int:
    """Returns the size of a product or power: items of a sequence, bits of a large integer."""
    if operator == "**":
        if not (isinstance(left, int) and isinstance(right, int)):
            return 0
        return left.bit_length() * right
    if isinstance(left, int) and isinstance(right, int):
        return 0
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(cast("Sequence[Any]", sequence)) * times
    return 0


def _plain_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple):
        raise UsageError(
            f"messages={messages!r:.80} is not a list; pass [{{'role': 'user', 'content': '…'}}]"
        )
    if not messages:
        raise UsageError("messages=[] is empty; pass at least one message")
    plain: list[dict[str, Any]] = []
    for index, message in enumerate(cast("Sequence[Any]", messages)):
        fields: Any = _plain(message, f"messages[{index}]") if isinstance(message, Mapping) else {}
        if not isinstance(fields.get("role"), str):
            raise UsageError(
                f"messages[{index}]={message!r:.80} has no role; pass a mapping with a string "
                "'role' and usually a 'content'"
            )
        plain.append({name: value for name, value in fields.items() if value is not None})
    return plain


def _plain(value: Any, where: str) -> Any:
    """Returns a copy made of plain data only: other objects have methods a template could call."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, such as an enumeration, only the text
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {_plain(key, where): _plain(item, f"{where}.{key}") for key, item in items}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in cast("Sequence[Any]", value)]
    raise UsageError(
        f"{where} holds a {type(value).__name__}, which a chat template cannot be given; "
        "pass strings, numbers, lists and mappings"
    )
