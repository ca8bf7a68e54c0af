"""Chat templates: the programs, in Jinja, that make one text of a conversation; and which part of the text is whose.

A special token ("<|im_end|>") ends a turn where the template writes it, and is ordinary text where a user types it. Whatever
a template does to a message (escape, cut, count, capitalise), the two are told apart by rendering twice, the second time with
other characters in the messages: special tokens that are still there, in the same place, are the template's own.
"""

import json
import re
from datetime import datetime

import jinja2.ext
import jinja2.sandbox

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# other characters of the same kind: a text in disguise is as long as before, escaped, counted or cut
DISGUISE = str.maketrans(
    LETTERS + LETTERS.upper() + "0123456789<>[]|!",
    LETTERS[13:] + LETTERS[:13] + (LETTERS[13:] + LETTERS[:13]).upper() + "5678901234><][!|",
)


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
    """The same with all its strings changed, or a message's role and the type of a part of it in another way."""
    if isinstance(value, dict):
        ways = {key: change_role or change if key in ("role", "type") else change for key in value}
        return {key: changed(part, ways[key], change_role) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [changed(part, change, change_role) for part in value]
    return change(value) if isinstance(value, str) else value


def disguises(messages: list[dict], special: re.Pattern[str]):
    """The messages with other characters throughout; and in special tokens alone, for a template that goes by what is said."""

    def tokens(text):
        return special.sub(lambda found: found[0].translate(DISGUISE), text)

    yield changed(messages, lambda text: text.translate(DISGUISE), tokens)
    yield changed(messages, tokens)
