"""Rows of conversations as tokens, with the tokens that are given to the model and not learned.

A row is an object with `messages`, with `prompt` and `completion`, or with `text`. It travels from
its file to the token cache as the JSON of these fields.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from trainer.data.chat_template import (
    CLOSE,
    OPEN,
    ChatTemplate,
    Message,
    RenderedConversation,
    TemplateError,
)
from trainer.data.documents import EncodedDocument
from trainer.data.errors import DataError, ReadReport
from trainer.data.sources.readers import Unread, sound
from trainer.data.tokenizers import ChatTokenizer, ended

FIELDS = ("messages", "prompt", "completion", "text", "tools")
LossOn = Literal["answers", "all"]
NO_ANSWER = "conversations without an answer"
MALFORMED = "malformed conversations"


class Conversation(NamedTuple):
    """A row with messages.

    Attributes:
        messages: each with a role, and content or what else its template reads.
        tools: that the assistant may call, or None.
        first: number of the first message whose answer is learned.
    """

    messages: list[Message]
    tools: list[Any] | None
    first: int


class PromptPair(NamedTuple):
    """A row with texts: a prompt, which may be empty, and what is learned."""

    prompt: str
    completion: str


def row_of(value: Any, place: str) -> str | Unread:
    """Returns the JSON of what is read of a row, or why it cannot be read.

    Args:
        value: the row.
        place: where it lies, for messages.
    """
    if not isinstance(value, dict):
        return Unread(MALFORMED, f"{place} is not an object but {type(value).__name__}")
    row = {name: value[name] for name in FIELDS if value.get(name) is not None}
    parsed = parse(row, place)
    if isinstance(parsed, Unread):
        return parsed
    text = json.dumps(row, ensure_ascii=False)
    if not sound(text):
        return Unread(
            MALFORMED, f"{place}: its text holds half a surrogate pair, which is no character"
        )
    if OPEN in text or CLOSE in text:
        return Unread(MALFORMED, f"{place}: its text holds U+FDD0 or U+FDD1, which is no character")
    return text


def parse(row: Mapping[str, Any], place: str) -> Conversation | PromptPair | Unread:
    """Returns what a row holds, or why it cannot be read."""
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        return Unread(MALFORMED, f"{place}: tools are not a list but {type(tools).__name__}")
    if "messages" in row:
        return _conversation([], row["messages"], tools, place)
    if "prompt" in row or "completion" in row:
        prompt = row.get("prompt", "")
        completion = row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                return Unread(NO_ANSWER, f"{place} has an empty completion")
            return PromptPair(prompt, completion)
        return _conversation(prompt, completion, tools, place)
    text = row.get("text")
    if isinstance(text, str):
        return PromptPair("", text)
    return Unread(
        MALFORMED,
        f"{place} has none of the fields messages, prompt with completion, or text",
    )


def _conversation(
    given: Any, learned: Any, tools: list[Any] | None, place: str
) -> Conversation | Unread:
    """Returns messages of which the first ones are given, or why they cannot be read."""
    if not isinstance(given, list) or not isinstance(learned, list):
        kinds = f"{type(given).__name__} and {type(learned).__name__}"
        return Unread(
            MALFORMED,
            f"{place}: lists of messages, or two texts, are needed; it has {kinds}",
        )
    messages: list[Message] = []
    for number, message in enumerate([*given, *learned]):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return Unread(
                MALFORMED, f"{place}: message {number + 1} is no object with a role and content"
            )
        # A table has every field in every message, null where it was not written.
        messages.append({name: part for name, part in message.items() if part is not None})
        messages[-1].setdefault("content", None if "tool_calls" in messages[-1] else "")
    learned_roles = [message["role"] for message in messages[len(given) :]]
    if "assistant" not in learned_roles:
        return Unread(NO_ANSWER, f"{place} has no message of the role assistant to learn")
    return Conversation(messages, tools, len(given))


class ConversationEncoder:
    """Turns rows into tokens.

    Args:
        tokenizer: of the texts.
        template: of the conversations.
        loss_on: answers = every other token is given; all = no token is.

    Attributes:
        fingerprint, learns_part: see DocumentEncoder.
    """

    learns_part = True

    def __init__(self, tokenizer: ChatTokenizer, template: ChatTemplate, loss_on: LossOn):
        self.tokenizer = tokenizer
        self.template = template
        self.loss_on: LossOn = loss_on
        identity = f"conversations/1 {tokenizer.fingerprint} {template.identity} {loss_on}"
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def inspect(self, name: str, text: str, report: ReadReport) -> None:
        """Reports why a row cannot be encoded, without its tokens."""
        row = self._row(name, text, report)
        if isinstance(row, Conversation):
            self._rendered(row, name, report)

    def encode_all(
        self, names: Sequence[str], texts: Sequence[str], report: ReadReport
    ) -> Iterator[EncodedDocument | None]:
        """See DocumentEncoder.encode_all; texts are as `row_of` returns them."""
        for name, text in zip(names, texts, strict=True):
            row = self._row(name, text, report)
            if row is None:
                yield None
            elif isinstance(row, PromptPair):
                yield self._completion(row, report)
            else:
                yield self._learned(row, name, report)

    def _learned(self, row: Conversation, name: str, report: ReadReport) -> EncodedDocument | None:
        """Returns the tokens of a conversation; None where it is at fault."""
        rendered = self._rendered(row, name, report)
        if rendered is None:
            return None
        tokens, begins = self.tokenizer.encode_markup(rendered.text)
        # Of a normalised text a token may seem to begin before the one before it.
        begins = np.maximum.accumulate(begins)
        given = np.full(len(tokens), self.loss_on == "answers")
        for first, stop in rendered.answers:
            # A token belongs to an answer where it begins in one.
            given[np.searchsorted(begins, first) : np.searchsorted(begins, stop)] = False
        if given[1:].all():
            report.fault(NO_ANSWER, f"{name}: no token of it is learned")
            return None
        turns = np.unique(np.searchsorted(begins, rendered.turns))
        return EncodedDocument(tokens, given, turns[(turns > 0) & (turns < len(tokens))])

    def _row(self, name: str, text: str, report: ReadReport) -> Conversation | PromptPair | None:
        row = parse(json.loads(text), name)
        if isinstance(row, Unread):
            report.fault(*row)
            return None
        return row

    def _completion(self, row: PromptPair, report: ReadReport) -> EncodedDocument | None:
        """Returns the tokens of two texts, which are encoded apart as they are when generating."""
        tokens = self.tokenizer.encode(row.completion)
        if not len(tokens):
            report.silent += 1
            return None
        tokens = ended(tokens, self.tokenizer.end_of_text)
        prompt = self.tokenizer.encode(row.prompt)
        given = np.zeros(len(prompt) + len(tokens), bool)
        given[: len(prompt)] = self.loss_on == "answers"
        return EncodedDocument(np.concatenate([prompt, tokens]), given, np.zeros(0, np.int64))

    def _rendered(
        self, row: Conversation, name: str, report: ReadReport
    ) -> RenderedConversation | None:
        """Returns the text of a conversation; None where it is at fault."""
        try:
            rendered = self._told_apart(row)
        except TemplateError as error:
            report.fault("conversations that the chat template refuses", f"{name}: {error}")
            return None
        spelled = self._spelled(row)
        if spelled is not None:
            report.fault(
                "conversations that spell a special token",
                f"{name}: a message spells the special token {spelled}, which would end or begin a"
                " turn",
            )
            return None
        if self.loss_on == "answers" and not rendered.answers:
            report.fault(NO_ANSWER, f"{name}: its chat template writes no answer")
            return None
        return rendered

    def _told_apart(self, row: Conversation) -> RenderedConversation:
        """Returns the text of a conversation with its answers."""
        try:
            return self.template.conversation(row.messages, row.tools, row.first)
        except DataError:
            if self.loss_on == "answers":
                raise
            # Every token is learned: which are answers decides only where it may be cut.
            return RenderedConversation(self.template.render(row.messages, row.tools), [], [])

    def _spelled(self, row: Conversation) -> str | None:
        """Returns a special token that a message spells; None where none does."""
        words = json.dumps(row.messages, ensure_ascii=False)
        for ending in self.tokenizer.endings:
            if json.dumps(ending, ensure_ascii=False)[1:-1] in words:
                return ending
        return None
