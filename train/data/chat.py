"""Chats: rows of messages, rendered with the base's chat template as a server renders them.

The template's control tokens are control tokens; what looks like one within a message is text, as
in any other document. Shape suffix: T tokens of a chat.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_memdec.errors import MemdecError, said_by
from vllm_memdec.train.data.opening import BINARY

CHAT_FIELDS = ("messages", "conversations")
# ShareGPT's names of roles.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
# Noncharacters of Unicode, which no text has: the first divides what a message has of special
# tokens until they are encoded, the second stands for what the assistant says.
DIVIDER, STAND_IN = "\ufdd0", "\ufdd1"


class Chat(str):
    """A chat as a text, the JSON of its messages: hashed, compared and split as others are."""

    where: str  # in which file it stands
    assistant_only: bool  # whether only the assistant's tokens are predicted

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Return the messages, each with role and content."""
        return json.loads(self) if self else []


def read_chat(turns: list[Any], where: str, assistant_only: bool) -> Chat:
    """Return the chat of a row: OpenAI's {role, content} or ShareGPT's {from, value} in a list.

    A row without messages is an empty text. Raises MemdecError for what is no chat.
    """
    messages = [_message(turn, where) for turn in turns]
    chat = Chat(json.dumps(messages, ensure_ascii=False, default=str) if messages else "")
    chat.where, chat.assistant_only = where, assistant_only
    return chat


def _message(turn: Any, where: str) -> dict[str, Any]:
    """Return a message as vLLM gives it to a template."""
    given = dict(sorted(_clean(turn, where).items())) if isinstance(turn, dict) else {}
    role = given.pop("role", None) or given.pop("from", None)
    role = ROLES.get(role, role) if isinstance(role, str) else role
    content = given.pop("content", None)
    if content is None:
        content = given.pop("value", None)
    if isinstance(content, list) and all(map(_is_text, content)):
        content = "\n".join(str(part["text"]) for part in content if "text" in part)
    called = content is None and "tool_calls" in given
    if not isinstance(role, str) or not (isinstance(content, str) or called):
        raise MemdecError(
            f"{where}: a chat is a list of messages with text in `role` and `content`, or in `from`"
            " and `value`: mend the row, or give the text's field with --text-field "
            "(corpus.text_field)."
        )
    calls = given.get("tool_calls")
    if role == "assistant" and isinstance(calls, list):
        given["tool_calls"] = [_with_arguments(call, where) for call in calls]
        if not calls:  # a template may take an empty list for calls
            del given["tool_calls"]
    thoughts = given.get("reasoning", given.get("reasoning_content"))
    if role == "assistant" and thoughts is not None:  # a template reads one of both
        given |= {"reasoning": thoughts, "reasoning_content": thoughts}
    return {"role": role, "content": content or "", **given}


def _is_text(part: Any) -> bool:
    """Return whether a part of a content is text; a text that is null was left out of it."""
    return isinstance(part, dict) and ("text" in part or part.get("type") == "text")


def _with_arguments(call: Any, where: str) -> Any:
    """Return a tool call whose arguments are an object; an empty one where they are none."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
        arguments = _clean(arguments, where, nulls=True)
    arguments = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": {**function, "arguments": arguments}}


def _clean(value: Any, where: str, nulls: bool = False) -> Any:
    """Return a field with the line ends of any other text.

    Its fields that are null are left out, as a table has them for all that other rows have; nulls:
    they stay.
    """
    if isinstance(value, dict):
        kept = ((name, inner) for name, inner in value.items() if nulls or inner is not None)
        return {name: _clean(inner, where, nulls) for name, inner in kept}
    if isinstance(value, list):
        return [_clean(inner, where, nulls) for inner in value]
    if isinstance(value, str) and "\0" in value:
        raise MemdecError(f"{where} {BINARY}")
    return value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else value


def chat_template(tokenizer: Any) -> str:
    """Return the chat template of a tokenizer; MemdecError if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        name = tokenizer.name_or_path or "the base"
        raise MemdecError(
            f"the text has chats, but {name} has no chat template: give a chat model of the same "
            "tokenizer as --base, put its chat_template.jinja into that folder, or write the chats "
            "as text."
        )
    return str(tokenizer.get_chat_template())


def shared(text: str, other: str) -> str:
    """Return what two texts begin with."""
    return other if text.startswith(other) else os.path.commonprefix([text, other])


class Renderer:
    """Turns chats into tokens with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        chat_template(tokenizer)
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        longest_first = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.ends_turn = re.compile(f" *(?:{self.special.pattern})")
        self.closed_turn = re.compile(rf"({self.special.pattern})\s*\Z")

    def __call__(self, chat: Chat) -> np.ndarray:
        """Return the tokens [T] int32 of a chat, ~id for those that are not predicted.

        It ends as the template ends it. An array without tokens where none is predicted.
        """
        if chat.assistant_only and not self.tokenizer.is_fast:
            raise MemdecError(
                f"{self.tokenizer.name_or_path} does not tell which text its tokens are of: set "
                "corpus.loss_on to all."
            )
        messages = self.divided(chat.messages)
        text = self.render(messages, chat)
        ids, start, end = self.encode(text)
        if not chat.assistant_only:
            return ids
        predicted = np.zeros(len(ids), bool)
        for first, last in self.answers(messages, text, chat):
            first, last = (n - text.count(DIVIDER, 0, n) for n in (first, last))
            predicted |= (end > first) & (start < last)
        return np.where(predicted, ids, ~ids) if predicted.any() else ids[:0]

    def divided(self, value: Any) -> Any:
        """Return messages in which nothing is a special token."""
        if isinstance(value, dict):
            return {name: self.divided(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self.divided(inner) for inner in value]
        while isinstance(value, str) and self.special.search(value):
            value = self.special.sub(lambda match: match[0][0] + DIVIDER + match[0][1:], value)
        return value

    def render(self, messages: list[dict[str, Any]], chat: Chat, **options: bool) -> str:
        """Return messages as the template has them."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise what they like
            raise MemdecError(
                f"{chat.where}: the base's chat template refuses the chat ({said_by(error)}): mend "
                "the row, or leave it out."
            ) from None

    def answers(
        self, messages: list[dict[str, Any]], text: str, chat: Chat
    ) -> Iterator[tuple[int, int]]:
        """Yield where in the text an answer of the assistant begins, and where its turn ends.

        An answer is what changes in the text if something else is said in its place, and what the
        template lets the assistant say before it, as empty thoughts.
        """
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            other = {"role": "assistant", "content": STAND_IN}
            try:
                changed = self.render([*messages[:n], other, *messages[n + 1 :]], chat)
            except MemdecError:  # an answer may not stand where tools are called
                yield self.call(messages, n, text, chat)
                continue
            before, _, after = changed.partition(STAND_IN)
            before = self.opening(messages[:n], shared(text, before), chat)
            after = shared(text[len(before) :][::-1], after[::-1])
            last = len(text) - len(after)
            closed = self.ends_turn.match(text, last)
            yield len(before), closed.end() if closed else last

    def call(
        self, messages: list[dict[str, Any]], n: int, text: str, chat: Chat
    ) -> tuple[int, int]:
        """Return where in the text message n begins and ends, told by what is before it alone."""
        other = {"role": "assistant", "content": STAND_IN}
        try:
            before = self.render([*messages[:n], other], chat).partition(STAND_IN)[0]
            whole = shared(text, self.render(messages[: n + 1], chat))
        except MemdecError:
            raise MemdecError(
                f"{chat.where}: the base's chat template does not tell what the assistant says in "
                "this chat: set corpus.loss_on to all, or leave the row out."
            ) from None
        first = len(self.opening(messages[:n], shared(text, before), chat))
        closed = self.closed_turn.search(text, first, len(whole))
        return first, closed.end(1) if closed else len(whole)

    def opening(self, messages: list[dict[str, Any]], before: str, chat: Chat) -> str:
        """Return what of `before` a server gives the model before an answer to the messages."""
        try:
            asked = self.render(messages, chat, add_generation_prompt=True)
            if not before.startswith(asked) or asked in (before, self.render(messages, chat)):
                return before
        except MemdecError:  # no messages, for one
            return before
        return asked

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens [T] int32 of a rendered text, and where in it each begins and ends.

        Dividers are no part of the text.
        """
        # Whole where it can be: some tokenizers treat the beginning of a text unlike the rest.
        parts = [text]
        if DIVIDER in text:
            parts = re.split(f"({self.special.pattern})", text)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        before = 0
        for part in parts:
            plain = part.replace(DIVIDER, "")
            encoded = self.tokenizer(
                plain,
                add_special_tokens=False,
                split_special_tokens=DIVIDER in part,
                return_offsets_mapping=self.tokenizer.is_fast,
                verbose=False,
            )
            ids += encoded["input_ids"]
            spans += [(before + s, before + e) for s, e in encoded.get("offset_mapping", [])]
            before += len(plain)
        start, end = np.array(spans, np.int64).reshape(-1, 2).T
        return np.array(ids, np.int32), start, end
