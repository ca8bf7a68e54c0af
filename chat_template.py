"""Chat templates: the programs, in Jinja, that make one text of a conversation; and which part of the text is whose."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime

import jinja2.ext
import jinja2.sandbox


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks an answer for training; here it is just what is in it."""

    tags = {"generation"}  # noqa: RUF012 (jinja reads it from the class)

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


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
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return sandbox.from_string(source).render(known, messages=messages, tools=None, documents=None)


def changed(value, change, change_role=None):
    """The same with all its strings changed; a message's role, and the type of a part of it, in a way of their own."""
    if isinstance(value, dict):
        ways = {key: change_role or change if key in ("role", "type") else change for key in value}
        return {key: changed(part, ways[key], change_role) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [changed(part, change, change_role) for part in value]
    return change(value) if isinstance(value, str) else value


def own_tokens(text: str, messages: list[dict], special: re.Pattern[str], rendered: Callable) -> list[tuple[int, int]] | None:
    """Where in `text`, rendered(messages), stand the special tokens that the template wrote, (start, end) of each; None if that
    cannot be told.

    A special token ("<|im_end|>") ends a turn where the template writes it, and is ordinary text where a user types it. Whatever
    a template does to a message (escape, cut, count, capitalise), the two are told apart by rendering the messages again with
    other letters in them (rendered gives None if the template fails): a token that is still there is the template's own.
    """
    spans = [found.span() for found in special.finditer(text)]
    verdicts = {(a, b): True for a, b in spans if not any(map(str.isalnum, text[a:b]))}  # the same in all letters
    for table in disguises(text, "".join(text[a:b] for a, b in spans)):

        def whole(said, table=table):
            return said.translate(table)

        def tokens(said, whole=whole):
            return special.sub(lambda found: whole(found[0]), said)

        if len(verdicts) == len(spans):
            break
        other = rendered(changed(messages, whole, tokens)) or ""
        looks = {(a, b): (other[a:b] == text[a:b], other[a:b] == whole(text[a:b])) for a, b in spans}
        if len(other) == len(text) and all(map(any, looks.values())):  # otherwise the template went by what a message says
            for span, (same, disguised) in looks.items():
                if not (same and disguised):
                    verdicts[span] = same and verdicts.get(span, True)
    return [span for span in spans if verdicts[span]] if len(verdicts) == len(spans) else None


def disguises(text: str, tokens: str) -> Iterator[dict[int, int]]:
    """Tables for str.translate: all letters and digits, then one letter of the tokens at a time, for one that is not in the text."""
    letters, capitals, digits = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
    halves = ((each[len(each) // 2 :] + each[: len(each) // 2]) for each in (letters, capitals, digits))
    yield str.maketrans(letters + capitals + digits, "".join(halves))
    unused = [letter for letter in letters + capitals + digits if letter not in text]
    for letter in sorted(set(filter(str.isalnum, tokens))):
        for other in unused[:2]:
            yield str.maketrans(letter + other, other + letter)
