"""Reading the files of a checkpoint folder, so that whatever is wrong with one is said in a line that names it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message is one line: the file, the tensor or key, what is wrong."""

    def __init__(self, where: Path, problem: object):
        super().__init__(" ".join(f"{where}: {problem}".split()))


def check_file(path: Path) -> None:
    """Raises CheckpointError unless `path` is a plain file that opens: reading a pipe or a device might never end."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(path, "is not a file")
        path.open("rb").close()
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except OSError as error:  # no permission, a loop of symbolic links
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None


def read_file(path: Path) -> bytes:
    """A plain file's bytes. Raises CheckpointError."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:  # a bad disk
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from None


class JsonObject:
    """A JSON object that knows where it came from, so that every complaint can name the file and the key.

    `aliases` are for a file that calls the keys differently: {our name: the file's}.
    """

    def __init__(self, path: Path, values: Any, prefix: str = "", aliases: dict[str, str] | None = None):
        if not isinstance(values, dict):
            raise CheckpointError(path, f"{prefix or 'the file '}is not a JSON object")
        self.path, self.values, self.prefix, self.aliases = path, values, prefix, aliases or {}

    @classmethod
    def read(cls, path: Path, optional: bool = False, aliases: dict[str, str] | None = None) -> JsonObject:
        """The object in a file; if `optional`, an empty one where there is no file."""
        if optional and not os.path.lexists(path):
            return cls(path, {})
        try:
            return cls(path, json.loads(read_file(path).decode("utf-8")), aliases=aliases)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(path, f"cannot be read as JSON ({error})") from None

    def raw(self, key: str) -> Any:
        """The value of a key as it stands in the file; None if it is missing."""
        return self.values.get(self.aliases.get(key, key))

    def get(self, key: str, kind: Any, *default: Any, most: float = 2**31) -> Any:
        """The value of a key, of the kind asked for; a number also > 0 and <= most. null is as good as missing."""
        value = self.raw(key)
        if value is None:
            if default:
                return default[0]
            raise self.error(key, "is missing")
        if type(value) is not kind and not (kind is float and type(value) is int):
            words = {int: "whole number", float: "number", bool: "true or false", str: "string", dict: "object", list: "list"}
            raise self.error(key, f"is {value!r:.80}, not of the kind: {words[kind]}")
        if kind in (int, float) and not 0 < value <= most:
            raise self.error(key, f"is {value!r:.80}, not between 0 and {most}")
        return kind(value)

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(self.path, f"{self.prefix}{self.aliases.get(key, key)} {problem}")
