"""Special tokens: which ones a checkpoint's files name or add, and where they stand in a text."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, NamedTuple

from tokenizers import AddedToken

from loading.checkpoint_files import CheckpointError, JsonObject

# One of the characters that Unicode sets aside for a program's own use, never to be part of a text.
MARK = "\ufdd0"


class ParseSpecial(Enum):
    """Which special tokens in a text count as such. The others are ordinary characters."""

    NEVER = "none"
    ALWAYS = "all"
    MARKED = "those with MARK in front"


def token_pattern(tokens: dict[str, AddedToken], mark: str = "") -> re.Pattern[str]:
    """Matches any of these tokens, as a group; the longest one where several begin.

    mark: a pattern that stands in front of the special ones.
    """
    words = []
    for name in sorted(tokens, key=len, reverse=True):
        word = re.escape(name)
        if tokens[name].single_word:
            word = rf"(?<!\w){word}(?!\w)"
        if tokens[name].special:
            word = mark + word
        words.append(word)
    nothing = "(?!)"
    return re.compile(f"({'|'.join(words) or nothing})")


# ------------------------------------------------------------------------- what the files say

FLAGS = ("special", "lstrip", "rstrip", "single_word")  # false if missing


class AddedEntry(NamedTuple):
    """A token that a file adds to a vocabulary."""

    id: int
    flags: dict[str, bool]  # FLAGS and "normalized"; {} where the file says nothing about them


def token_name(token: Any) -> Any:
    """A token as files name it: by a string, or by an object that has the string as its content."""
    if isinstance(token, dict):
        return token.get("content")
    return token


def named_tokens(config: JsonObject) -> dict[str, str]:
    """The tokens that tokenizer_config.json gives a name: {"bos_token": "<s>"}."""
    values = {key: value for key, value in config.values.items() if key.endswith("_token")}
    extra = extra_tokens(config)
    if isinstance(extra, dict):
        values |= extra
    names = {key: token_name(value) for key, value in values.items()}
    return {key: name for key, name in names.items() if isinstance(name, str)}


def special_tokens(config: JsonObject) -> set[str]:
    """The tokens that tokenizer_config.json gives a name, and those that it lists as special."""
    names = set(named_tokens(config).values())
    extra = extra_tokens(config)
    if isinstance(extra, list):
        listed = [token_name(token) for token in extra]
        names.update(name for name in listed if isinstance(name, str))
    return names - {""}


def extra_tokens(config: JsonObject) -> Any:
    """Further special tokens: a list, an object with their names, or nothing."""
    extra = config.values.get("extra_special_tokens")
    return extra or config.values.get("additional_special_tokens")


def added_tokens(config: JsonObject) -> dict[str, AddedEntry]:
    """The tokens that files add, by name.

    They stand in added_tokens.json, which has no flags, and in tokenizer_config.json's
    added_tokens_decoder. Raises CheckpointError where the two do not agree about an id.
    """
    older = JsonObject.read(config.path.with_name("added_tokens.json"), optional=True)
    entries: list[tuple[str, AddedEntry]] = []
    try:
        for name, number in older.values.items():
            entries.append((name, AddedEntry(int(number), {})))
        for number, values in config.get("added_tokens_decoder", dict, {}).items():
            token = JsonObject(config.path, values, f"added_tokens_decoder.{number}.")
            flags = {flag: token.get(flag, bool, False) for flag in FLAGS}
            flags["normalized"] = token.get("normalized", bool, not flags["special"])
            entries.append((token.get("content", str), AddedEntry(int(number), flags)))
    except (TypeError, ValueError, OverflowError):
        problem = "or added_tokens.json: not a table of added tokens"
        raise CheckpointError(config.path, problem) from None

    added: dict[str, AddedEntry] = {}
    for name, entry in entries:
        has_other_id = name in added and added[name].id != entry.id
        if not name or entry.id < 0 or has_other_id:
            problem = f"the added token {name!r:.80} has two ids, or a bad one"
            raise CheckpointError(config.path, f"or added_tokens.json: {problem}")
        added[name] = entry
    return added


def other_id_error(config: JsonObject, name: str, number: int, file: str) -> CheckpointError:
    """The error of an added token that has another id in the tokenizer's own file."""
    problem = f"or added_tokens.json gives {name!r:.80} the id {number}, unlike {file}"
    return config.error("added_tokens_decoder", problem)
