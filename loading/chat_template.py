"""Chat templates: programs, in Jinja, that make one text of a conversation.

And which special tokens of the text are the template's own: see own_tokens.
"""

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

# ------------------------------------------------------------------------------------- rendering


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks an answer for training.

    Here it is just what is in it.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja reads it from the class)

    def parse(self, parser):
        line = next(parser.stream).lineno
        content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(content, lineno=line)


def read_templates(folder: Path, config: JsonObject) -> dict[str, tuple[Path, str]]:
    """{name: (its file, the template)}. Raises CheckpointError.

    They stand in tokenizer_config.json, or in files beside it, which go first.
    """
    template = config.values.get("chat_template")
    if isinstance(template, str):
        listed = [{"name": "default", "template": template}]
    else:
        listed = template or []
    found = {}
    try:
        for entry in listed:
            found[entry["name"]] = (config.path, "" + entry["template"])
    except (KeyError, TypeError):
        problem = "is neither a string nor a list of named templates"
        raise config.error("chat_template", problem) from None

    default = folder / "chat_template.jinja"
    if os.path.lexists(default):
        found["default"] = (default, read_template(default))
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = (path, read_template(path))
    return found


def read_template(path: Path) -> str:
    """The template in a file. Raises CheckpointError."""
    try:
        return read_file(path).decode("utf-8")
    except ValueError as error:
        raise CheckpointError(path, f"cannot be read ({error})") from None


def render(source: str, messages: list[dict], known: dict) -> str:
    """The text that a template makes of the messages, with the names that transformers defines.

    known: further names. A template is a program that came with the checkpoint: the sandbox keeps
    it away from everything else. Raises whatever the template raises.
    """

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **options):
        # Jinja's own is for web pages, and escapes "<".
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationBlock],
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    plain = map_strings(messages, str.__str__)  # copies, of plain strings
    prepared = [prepare_message(message) for message in plain]
    template = sandbox.from_string(source)
    return template.render(known, messages=prepared, tools=None, documents=None)


def prepare_message(message: dict) -> dict:
    """A message without what is None, its reasoning under all names that templates know."""
    stated = {key: value for key, value in message.items() if value is not None}
    for key in ("reasoning_content", "thinking", "reasoning"):
        if key in stated:
            reasoning = stated[key]
            return {"thinking": reasoning, **stated, "reasoning_content": reasoning}
    return stated


# -------------------------------------------------------------------------- strings in messages


def map_strings(
    value, change: Callable[[str], str], change_name: Callable[[str], str] | None = None
):
    """The same value with all its strings changed.

    change_name: how keys change, a message's role and the type of a part; None: as the others do.
    """
    change_name = change_name or change
    if isinstance(value, dict):
        mapped = {}
        for key, part in value.items():
            way = change_name if key in ("role", "type") else change
            mapped[map_strings(key, change_name)] = map_strings(part, way, change_name)
        return mapped
    if isinstance(value, list):
        return [map_strings(part, change, change_name) for part in value]
    if isinstance(value, tuple):
        return tuple(map_strings(part, change, change_name) for part in value)
    if isinstance(value, str):
        return change(value)
    return value


def strings_in(value) -> Iterator[str]:
    """All strings in a value, keys too."""
    if isinstance(value, dict):
        yield from strings_in(list(value.keys()))
        yield from strings_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings_in(part)
    elif isinstance(value, str):
        yield value


# ------------------------------------------------------------------- the template's own tokens

Span = tuple[int, int]  # start and end in a text
Swap = dict[int, int]  # other letters for letters, for str.translate


def own_tokens(
    text: str,
    messages: list[dict],
    special: re.Pattern[str],
    render_again: Callable[[list[dict]], str | None],
) -> list[Span] | None:
    """Where in a text the template's own special tokens stand; None if that cannot be told.

    text          what the template made of the messages
    special       matches special tokens
    render_again  what the template makes of other messages; None if it fails

    A special token ("<|im_end|>") ends a turn where the template writes it, and is ordinary text
    where a user types it. Whatever a template does to a message (escape, cut, count, capitalise),
    the two are told apart by rendering the messages again with other letters in them: a token that
    is still there is the template's own.
    """
    spans = [found.span() for found in special.finditer(text)]
    is_own: dict[Span, bool] = {}  # of each span that has been told

    def try_swap(swap: Swap):
        other = render_swapped(messages, swap, special, render_again)
        for span, still_there in compare(text, other, spans, swap).items():
            is_own[span] = still_there and is_own.get(span, True)

    try_swap(swap_all())
    if len(is_own) < len(spans):
        token_letters = {letter for start, end in spans for letter in text[start:end]}
        for swap in swaps_of_one(text, token_letters):
            try_swap(swap)

    typed = any(special.search(string) for string in strings_in(messages))
    if not typed:
        # Whatever could not be told is the template's.
        for span in spans:
            is_own.setdefault(span, True)
    if len(is_own) < len(spans):
        return None
    return [span for span in spans if is_own[span]]


def render_swapped(
    messages: list[dict],
    swap: Swap,
    special: re.Pattern[str],
    render_again: Callable[[list[dict]], str | None],
) -> str:
    """What the template makes of the messages with other letters; "" if it fails.

    Templates go by roles and keys, so there only special tokens get other letters.
    """

    def swap_letters(string: str) -> str:
        return string.translate(swap)

    def swap_in_tokens(string: str) -> str:
        return special.sub(lambda found: found[0].translate(swap), string)

    return render_again(map_strings(messages, swap_letters, swap_in_tokens)) or ""


def compare(text: str, other: str, spans: list[Span], swap: Swap) -> dict[Span, bool]:
    """Which spans are still there in the text with other letters: those it tells something about.

    It tells nothing about a span without any of the letters; and nothing at all where the template
    went by what a message says, so that the two texts differ in more than the letters.
    """
    if len(other) != len(text):
        return {}
    told = {}
    for start, end in spans:
        token = text[start:end]
        swapped = token.translate(swap)
        found = other[start:end]
        if found not in (token, swapped):
            return {}
        if token != swapped:
            told[start, end] = found == token
    return told


LETTERS = "abcdefghijklmnopqrstuvwxyz"
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"


def swap_all() -> Swap:
    """Every letter for the one half an alphabet further, and digits likewise."""
    swap: Swap = {}
    for alphabet in (LETTERS, CAPITALS, DIGITS):
        half = len(alphabet) // 2
        swap |= str.maketrans(alphabet, alphabet[half:] + alphabet[:half])
    return swap


def swaps_of_one(text: str, letters: set[str]) -> Iterator[Swap]:
    """One of these letters at a time for one that is not in the text, and then for a second one."""
    # From Cyrillic to Chinese: some letter is always free.
    foreign = (chr(code) for code in range(0x400, 0xA000))
    candidates = itertools.chain(LETTERS, CAPITALS, DIGITS, foreign)
    unused = (letter for letter in candidates if letter.isalnum() and letter not in text)
    for other in itertools.islice(unused, 2):
        for letter in sorted(letters):
            yield str.maketrans(letter + other, other + letter)
