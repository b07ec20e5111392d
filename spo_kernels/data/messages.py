"""Texts of a record: strings, or lists of chat messages as chat templates take them."""

from __future__ import annotations

import json
import sys
from typing import Any

from spo_kernels.arguments import is_number
from spo_kernels.data.errors import DataError, no_column

Row = dict[str, Any]
Message = dict[str, Any]
Messages = list[Message]
Text = str | Messages

# The roles of {"from": ..., "value": ...}, the form of ShareGPT.
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
# Fields that are a turn of their own where there is no content.
_SPEAKS_WITHOUT_CONTENT = ("tool_calls", "reasoning_content", "thinking", "reasoning")


def check_text(where: str, row: Row, column: str) -> Text:
    """The string or chat messages in a column; a message keeps all its fields."""
    if column not in row:
        raise no_column(where, column, row)
    value = row[column]
    if isinstance(value, str):
        _check_string(where, column, value)
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: {column} must be a string or a list of chat messages, got {_kind(value)}")
    if not value:
        raise DataError(f"{where}: {column} is an empty list of messages")
    return [_message(where, f"{column}[{i}]", message) for i, message in enumerate(value)]


def check_tools(where: str, row: Row) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of JSON schemas, or that list as a JSON string, the only form that all tables hold."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json_or(tools, tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools must be a list of objects, or that as a JSON string, got {_kind(tools)}")
    return tools


def check_number(where: str, row: Row, column: str, use: str = "", most: float = sys.float_info.max) -> float:
    """The finite number in a column, of at most `most` in size; `use` says what for."""
    value = row.get(column)
    if is_number(value) and abs(value) <= most:
        return float(value)
    size = "" if most == sys.float_info.max else f", at most {most:.2g} in size"
    raise DataError(f"{where}: {column} must be a finite number{use}{size}, got {_kind(value)}")


def check_same_form(where: str, **texts: Text) -> None:
    if len({isinstance(text, str) for text in texts.values()}) > 1:
        forms = ", ".join(f"{k} is {'a string' if isinstance(v, str) else 'messages'}" for k, v in texts.items())
        raise DataError(f"{where}: all columns must be strings, or all chat messages; here {forms}")


def _message(where: str, name: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {name} must be an object with role and content, got {_kind(message)}")
    if "role" not in message and {"from", "value"} <= message.keys():
        speaker = message["from"]
        known = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        message = {"role": known or speaker, "content": message["value"]}
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where}: {name}.role must be a string, got {_kind(role)}")
    kept = {key: value for key, value in message.items() if value is not None}
    content = _content(where, f"{name}.content", message.get("content"))
    silent = role in ("system", "developer", "tool") or any(kept.get(key) for key in _SPEAKS_WITHOUT_CONTENT)
    if content is not None and not (silent and not content.strip()):
        _check_string(where, f"{name}.content", content)
    elif not silent:
        raise DataError(f"{where}: {name}.content must be a string, got nothing")
    # Templates add strings to it.
    kept["content"] = content or ""
    if "tool_calls" in kept:
        calls = kept["tool_calls"]
        if not isinstance(calls, list):
            raise DataError(f"{where}: {name}.tool_calls must be a list of objects, got {_kind(calls)}")
        kept["tool_calls"] = [_tool_call(where, f"{name}.tool_calls", call) for call in calls]
    return kept


def _content(where: str, name: str, content: Any) -> str | None:
    """A string, or the parts of one; pictures and sounds are refused."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content if isinstance(content, list) else [None]):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise DataError(f"{where}: {name}[{i}] is of type {kind!r}; only text can be trained on")
        if kind is None or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: {name} must be a string, got {_kind(content)}")
        texts.append(part["text"])
    return "".join(texts)


def _tool_call(where: str, name: str, call: Any) -> Any:
    """Arguments as an object: APIs give them as a string of JSON, which templates would quote once more."""
    if not isinstance(call, dict):
        raise DataError(f"{where}: {name} must be objects, got {_kind(call)}")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(where, name, call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": _json_or(arguments, arguments)} if isinstance(arguments, str) else call


def _json_or(text: str, default: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return default


def check_unicode(where: str, name: str, text: str) -> None:
    """Raise DataError where a text has half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name} is not valid Unicode: {error.reason} at character {error.start}") from error


def _check_string(where: str, name: str, value: str) -> None:
    if not value.strip():
        raise DataError(f"{where}: {name} is empty")
    check_unicode(where, name, value)


def _kind(value: Any) -> str:
    try:
        return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
    # An integer of more digits than Python prints.
    except ValueError:
        return type(value).__name__
