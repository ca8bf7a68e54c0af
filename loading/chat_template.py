"""Chat templates: the programs, in Jinja, that make one text of a conversation; and which part of the text is whose."""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import jinja2.ext
import jinja2.sandbox

from loading.checkpoint_files import CheckpointError, JsonObject, read_file


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks an answer for training; here it is just what is in it."""

    tags = {"generation"}  # noqa: RUF012 (jinja reads it from the class)

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def read_templates(folder: Path, config: JsonObject) -> dict[str, tuple[Path, str]]:
    """Name -> (its file, the template), of tokenizer_config.json and of files beside it, which go first. Raises CheckpointError."""
    template = config.values.get("chat_template")
    listed = [{"name": "default", "template": template}] if isinstance(template, str) else template or []
    try:
        found = {each["name"]: (config.path, "" + each["template"]) for each in listed}
    except (KeyError, TypeError):
        raise config.error("chat_template", "is neither a string nor a list of named templates") from None
    for path in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        if os.path.lexists(path):
            try:
                found["default" if path.parent == folder else path.stem] = path, read_file(path).decode("utf-8")
            except ValueError as error:
                raise CheckpointError(path, f"cannot be read ({error})") from None
    return found


def render(source: str, messages: list[dict], known: dict) -> str:
    """The text that a template makes of the messages, with the names that transformers defines; `known` are further ones.

    A template is a program that came with the checkpoint: the sandbox keeps it away from everything else. Raises whatever
    the template raises.
    """

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, **options):  # jinja's own is for web pages
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    messages = [named_reasoning(message) for message in changed(messages, str.__str__)]
    return sandbox.from_string(source).render(known, messages=messages, tools=None, documents=None)


def named_reasoning(message: dict) -> dict:
    """A message without what is None, and with its reasoning under the names that templates know."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def changed(value, change, change_name=None):
    """The same with all its strings changed; keys, a message's role, and the type of a part of it, in a way of their own."""
    change_name = change_name or change
    if isinstance(value, dict):
        ways = {key: change_name if key in ("role", "type") else change for key in value}
        return {changed(key, change_name): changed(part, ways[key], change_name) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [changed(part, change, change_name) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return change(value) if isinstance(value, str) else value


def texts(value) -> Iterator[str]:
    """All strings in it."""
    if isinstance(value, dict):
        yield from texts([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value


def own_tokens(text: str, messages: list[dict], special: re.Pattern[str], rendered: Callable) -> list[tuple[int, int]] | None:
    """Where in `text`, rendered(messages), stand the special tokens that the template wrote, (start, end) of each; None if that
    cannot be told.

    A special token ("<|im_end|>") ends a turn where the template writes it, and is ordinary text where a user types it. Whatever
    a template does to a message (escape, cut, count, capitalise), the two are told apart by rendering the messages again with
    other letters in them (rendered gives None if the template fails): a token that is still there is the template's own.
    """
    spans = [found.span() for found in special.finditer(text)]
    verdicts: dict[tuple[int, int], bool] = {}
    for number, table in enumerate(disguises(text, "".join(text[a:b] for a, b in spans))):

        def whole(said, table=table):
            return said.translate(table)

        def tokens(said, whole=whole):
            return special.sub(lambda found: whole(found[0]), said)

        if number == 1 and len(verdicts) == len(spans):
            break  # other letters all at once have told everything
        other = rendered(changed(messages, whole, tokens)) or ""
        looks = {(a, b): (other[a:b] == text[a:b], other[a:b] == whole(text[a:b])) for a, b in spans}
        if len(other) == len(text) and all(map(any, looks.values())):  # otherwise the template went by what a message says
            for span, (same, disguised) in looks.items():
                if not (same and disguised):
                    verdicts[span] = same and verdicts.get(span, True)
    if not any(map(special.search, texts(messages))):  # then whatever could not be told is the template's
        verdicts = dict.fromkeys(spans, True) | verdicts
    return [span for span in spans if verdicts[span]] if len(verdicts) == len(spans) else None


def disguises(text: str, tokens: str) -> Iterator[dict[int, int]]:
    """Tables for str.translate: all letters and digits, then one character of the tokens at a time, for one that is not in the text."""
    letters, capitals, digits = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
    halves = ((each[len(each) // 2 :] + each[: len(each) // 2]) for each in (letters, capitals, digits))
    yield str.maketrans(letters + capitals + digits, "".join(halves))
    everything = itertools.chain(letters, capitals, digits, map(chr, range(0x400, 0xA000)))  # Cyrillic to Chinese: some letter is free
    unused = itertools.islice((each for each in everything if each.isalnum() and each not in text), 2)
    for other, letter in itertools.product([*unused], sorted(set(tokens))):
        yield str.maketrans(letter + other, other + letter)
