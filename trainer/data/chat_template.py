"""Chat templates: the text of a conversation, and which part of it the assistant says.

A template is a Jinja program of the tokenizer's author. It runs in Jinja's immutable sandbox with
the extensions and globals that transformers gives it, so that the text is the same.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from trainer.data.errors import DataError
from trainer.data.sources.readers import reason

# Noncharacters of Unicode: no text may hold them, so they mark places in one.
OPEN = "\ufdd0"
CLOSE = "\ufdd1"
TODAY = datetime.datetime(2026, 1, 1)  # of every day: the tokens must be the same tomorrow
REASONING = ("reasoning_content", "thinking", "reasoning")  # a message's names for its reasoning
# The template data.chat_template=chatml: the layout of OpenAI's ChatML, with its answers marked.
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}"
    "{%- endif %}{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
Message = dict[str, Any]


class TemplateError(Exception):
    """A conversation that the template refuses; the message is for the user."""


class RenderedConversation(NamedTuple):
    """The text of a conversation.

    Attributes:
        text: all of it.
        answers: [begin, end) of each answer in the text, its end-of-turn token included.
        turns: where the text may be cut: the end of each answer with what the template writes
            behind it.
    """

    text: str
    answers: list[tuple[int, int]]
    turns: list[int]


class ChatTemplate:
    """A chat template of a tokenizer.

    Args:
        sources: {name: Jinja source}; "default", and "tool_use" for conversations with tools.
        special: {name: text} of the special tokens that templates may write, such as eos_token.
        endings: texts of the tokenizer's special tokens, one of which ends a turn.
        name: what messages call the template.

    Attributes:
        identity: equal for templates that write equal texts.
        date, asks_for_date: the day that a template is told, and whether one asks.

    Raises:
        ValueError: a source is no Jinja template, or there is no default.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        special: Mapping[str, str],
        endings: Sequence[str],
        name: str,
    ):
        self.name = name
        # Everything that a text depends on beside the conversation.
        self.identity = f"{sorted(sources.items())} {sorted(special.items())} {TODAY}"
        self.date = f"{TODAY:%d %B %Y}"
        self.asks_for_date = any("strftime_now" in source for source in sources.values())
        self.special = dict(special)
        self.endings = tuple(word for word in endings if word)
        if "default" not in sources:
            raise ValueError(
                f"{name}: it has no chat template; give data.chat_template=FILE.jinja, or chatml"
            )
        environment = _environment()
        self.compiled: dict[str, jinja2.Template] = {}
        self.marked: dict[str, bool] = {}
        for label, source in sources.items():
            try:
                tree = environment.parse(source)
                self.compiled[label] = environment.from_string(source)
            except (jinja2.TemplateError, RecursionError) as error:
                raise ValueError(
                    f"{name}: its chat template is no Jinja ({reason(error)}); mend it, or give"
                    " another with data.chat_template"
                ) from error
            marks = [call for call in tree.find_all(nodes.CallBlock) if _is_mark(call)]
            self.marked[label] = bool(marks)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns the text of a conversation, as transformers' apply_chat_template does.

        Raises:
            TemplateError: the template refuses the conversation, or fails.
        """
        return _unmarked(self._render(messages, tools, add_generation_prompt))

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, first: int = 0
    ) -> RenderedConversation:
        """Returns the text with the answers of the messages from `first` on.

        Answers are what the template marks by {% generation %}. Without marks the conversation is
        rendered up to each answer, with the opening of an answer, and with the answer; each text
        must begin with the one before.

        Raises:
            TemplateError: as for render.
            DataError: without marks, one of the texts does not begin with the one before.
        """
        if self.marked[self._label(tools)]:
            return self._from_marks(messages, tools, first)
        return self._from_prefixes(messages, tools, first)

    def _label(self, tools: Sequence[Any] | None) -> str:
        return "tool_use" if tools and "tool_use" in self.compiled else "default"

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> str:
        template = self.compiled[self._label(tools)]
        try:
            return template.render(
                messages=[_with_reasoning(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        # A template may run into any error of the values that it is given.
        except Exception as error:
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise TemplateError(
                f"the chat template of {self.name}: {kind}{reason(error)}"
            ) from error

    def _from_marks(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, first: int
    ) -> RenderedConversation:
        pieces = self._render(messages, tools, False).replace(CLOSE, OPEN).split(OPEN)
        text = ""
        answers: list[tuple[int, int]] = []
        for number, piece in enumerate(pieces):
            # Text outside and inside of marks alternates.
            if number % 2 and piece:
                answers.append((len(text), len(text) + len(piece)))
            text += piece
        turns = [_behind_space(text, end) for _, end in answers]
        skipped = 0
        if first:
            skipped = self._render(messages[:first], tools, False).count(OPEN)
        return RenderedConversation(text, answers[skipped:], turns)

    def _from_prefixes(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, first: int
    ) -> RenderedConversation:
        whole = self._render(messages, tools, False)
        answers: list[tuple[int, int]] = []
        turns: list[int] = []
        before = ""
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            opened = self._render(messages[:number], tools, True)
            after = self._render(messages[: number + 1], tools, False)
            if not (opened.startswith(before) and after.startswith(opened)):
                raise self._no_prefix(number)
            if number >= first:
                end = self._end_of_turn(after[len(opened) :])
                answers.append((len(opened), len(opened) + end))
            turns.append(len(after))
            before = after
        if not whole.startswith(before):
            raise self._no_prefix(len(messages) - 1)
        return RenderedConversation(whole, answers, turns)

    def _end_of_turn(self, answer: str) -> int:
        """Returns the end of the token that ends a turn, or of the answer where there is none."""
        ends = [answer.rfind(word) + len(word) for word in self.endings if word in answer]
        last = max(ends, default=len(answer))
        # What the template writes behind the token is not said by the assistant.
        return len(answer) if answer[last:].strip() else last

    def _no_prefix(self, number: int) -> DataError:
        return DataError(
            f"data.chat_template: that of {self.name} writes the messages before number"
            f" {number + 1} of a conversation otherwise once that follows, so it cannot be told"
            " which tokens are answers; mark them in the template with {% generation %} and"
            " {% endgeneration %}, or use data.loss_on=all"
        )


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Returns a call of `_mark` with the body as its caller."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _is_mark(call: nodes.CallBlock) -> bool:
    method = call.call.node
    return isinstance(method, nodes.ExtensionAttribute) and method.name == "_mark"


class _Dict:
    """dict(...) of a template, without the attributes of Python's class."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)

    def fromkeys(self, *keys: Any) -> dict[Any, Any]:
        """Returns dict.fromkeys(...)."""
        return dict.fromkeys(*keys)


class _Namespace(Namespace):
    """namespace(...) of a template; refuses names with an underscore, which lead into Python."""

    # Without a parameter `self`, because a template may give a value of that name.
    def __init__(*pairs: Any, **values: Any):
        own, *further = pairs
        for name in dict(*further, **values):
            _refuse_private(name)
        Namespace.__init__(own, *further, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    """Returns the environment that templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=TODAY.strftime,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes the characters of HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _with_reasoning(message: Message) -> Message:
    """Returns a message whose reasoning has every name that templates read it by."""
    for name in REASONING:
        if message.get(name) is not None:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return dict(message)


def _unmarked(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def _behind_space(text: str, place: int) -> int:
    """Returns the first place from `place` on that is no white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place
