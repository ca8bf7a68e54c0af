"""A conversation with a model, in one cache: from Python, and on a terminal (generate.py --chat).

    talk = Conversation(model, tokenizer, preset("cache", prune=0.5))
    for piece in talk.answer("Why is the sky blue?"): print(piece, end="", flush=True)
"""

import argparse
import os
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress

from command_line import PRESETS, PRUNE, fail, filters_from, one_line

from checkpoint_files import CheckpointError
from generate import generate, row_seed
from model import Transformer
from report import Answer, refuse_zeros
from token_filter import FilterConfig
from tokenizer import Tokenizer


class Conversation:
    """Turns that share one cache of one row: each feeds only what the cache does not hold. `settings` are generate's.

    messages: what was said; ids: the tokens that the cache holds, all but the latest, which the next turn feeds; anew: whether the
    latest turn fed all into a new cache, as what came before, rendered again, has other tokens (a template may drop or trim it).
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, filter: FilterConfig | None = None, messages: Sequence[dict] = (),
                 stop: Sequence[str] = (), max_new_tokens=128, seed=0, eos_ids=None, **settings):  # fmt: skip
        self.model, self.tokenizer, self.filter, self.messages, self.stop = model, tokenizer, filter, [*messages], stop
        self.most, self.seed, self.settings = max_new_tokens, seed, settings
        self.eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
        self.cache, self.ids, self.anew = model.new_cache(1, filter), list[int](), False

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to a user's message, as it comes. A caller that closes the iterator stops it: what it was given is the answer.

        Raises CheckpointError where the template refuses the message, ValueError where the context is full: then it was not said.
        """
        messages, tokens, ended = [*self.messages, {"role": "user", "content": text}], list[int](), set[int]()
        prompt, said, left = self.tokenizer.chat(messages), "", False
        # The Answer has to see the token that ends it, so generate() is told of none.
        reply = Answer(self.tokenizer, self.stop, self.eos_ids)
        if (room := self.model.config.max_positions - len(prompt)) < 1:
            raise ValueError(f"the model's context of {len(prompt) + room} tokens is full: begin a new conversation (/reset), or say less")
        self.anew = prompt[:-1][: len(self.ids)] != self.ids
        cache = self.model.new_cache(1, self.filter) if self.anew else self.cache
        self.cache, self.ids = self.model.new_cache(1, self.filter), []  # for the next turn, should this one break off within a step
        own_seed = row_seed(self.seed, len(self.messages))
        settings = self.settings | {"cache": cache, "ended": ended, "seed": [own_seed]}
        try:
            for _, token in generate(self.model, [prompt], min(self.most, room), self.filter, **settings):
                tokens.append(token)
                piece = reply.push(token)
                said += piece
                if reply.ended:
                    ended.add(0)
                yield piece
        except GeneratorExit:
            left = True
        rest = ""
        if not left:  # otherwise nobody has seen what was held back
            rest = reply.push(None)
        self.messages = [*messages, {"role": "assistant", "content": said + rest}]
        self.cache, self.ids = cache, (prompt + tokens)[: int(cache.seen[0])]
        if not left:
            yield rest


def begin(tokenizer: Tokenizer, system: str | None) -> list[dict]:
    """The messages that a conversation begins with. Raises CheckpointError where the template has no use for a system's."""
    if system is None:
        return []

    def rendered(*said):
        with suppress(CheckpointError):
            return tokenizer.chat_text([*({"role": "system", "content": text} for text in said), {"role": "user", "content": "a"}])

    if rendered() is not None and (rendered("b") is None or rendered("b") == rendered("c")):
        raise CheckpointError(tokenizer.path.parent, "the chat template takes no message of a system: leave out --system")
    return [{"role": "system", "content": system}]


# ------------------------------------------------------------------------------------------------------ the terminal

HELP = f"""\
/reset        forget all that was said
/prune P      filter as much as that (0: not at all), from the start
/preset NAME  with another preset, one of {', '.join(PRESETS)}, from the start
/help         this
Ctrl-C stops an answer, Ctrl-D ends. A message of your own that begins with / is told apart by a space before it.
Where lines are piped in, a wrong command ends the conversation, with exit code 2."""


def figures(conversation: Conversation) -> str:
    """Of all turns so far, in one line."""
    pairs, skipped, held, _, _ = conversation.cache.usage()[0].tolist()
    megabytes, share = conversation.cache.slot_bytes / 1e6, f"skipped {skipped / max(pairs, 1):.1%} of (token, layer) pairs"
    dense = f"of dense's {pairs * megabytes:.2f} ({held / max(pairs, 1):.0%})"
    return f"{len(conversation.ids)} tokens so far, {share}; KV held {held * megabytes:.2f} MB {dense}"


def lines(terminal: bool, echo: bool) -> Iterator[str]:
    """What is typed, or piped in; the latter is printed, as a terminal does. What is not text is refused, a pipe's with
    exit code 2."""
    encoding = sys.stdin.encoding if terminal else "utf-8-sig"
    sys.stdin.reconfigure(encoding=encoding, errors="strict")  # type: ignore[union-attr]
    if not terminal:
        try:
            for line in sys.stdin:
                refuse_zeros("stdin", line)
                if echo and line.strip():
                    print(f"> {line.rstrip()}", flush=True)
                yield line.rstrip("\n")
        except UnicodeDecodeError as e:
            fail(f"stdin: cannot be read as UTF-8 text ({e.reason})")
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (with it, a line can be edited)
    while True:
        line = ""
        try:
            line = input("> ")
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):  # a second one
                print("\n(Ctrl-D ends)", flush=True)
        except EOFError:
            return print()
        except UnicodeDecodeError as e:
            print(f"error: the line cannot be read as {encoding} text ({e.reason})", file=sys.stderr)
        yield line


@contextmanager
def interruptible(terminal: bool):
    """Collects Ctrl-C, to be obeyed between two steps, when the cache is whole; a second one is obeyed at once, and a script's first."""
    presses = list[int]()

    def press(number, frame):
        if presses:
            raise KeyboardInterrupt
        presses.append(number)

    before = signal.signal(signal.SIGINT, press) if terminal else None
    try:
        yield presses
    finally:
        if terminal:
            signal.signal(signal.SIGINT, before)


def command(line: str, args) -> None:
    """Change args as a line that begins with / wants it. Raises ValueError."""
    name, _, value = line.partition(" ")
    value = value.strip()
    try:
        prune = PRUNE(value) if name == "/prune" else args.prune
    except argparse.ArgumentTypeError as e:
        raise ValueError(f"/prune: {e}") from None
    if name == "/preset" and value not in PRESETS:
        raise ValueError(f"/preset: {value or 'nothing'} is not one of {', '.join(PRESETS)}")
    if name == "/preset" and not prune:
        raise ValueError("/preset does nothing without /prune above 0")
    if name not in ("/reset", "/prune", "/preset") or (name == "/reset" and value):
        raise ValueError(f"{line} is no command: /help lists them")
    args.prune, args.preset = prune, value if name == "/preset" else args.preset


def turn(conversation: Conversation, message: str, terminal: bool, say):
    """Prints the answer to a message, and says what there is to say of it."""
    with interruptible(terminal) as presses:
        answer = conversation.answer(message)
        for piece in answer:
            print(piece, end="", flush=True)
            if presses:
                answer.close()
    print(" (stopped)" if presses else "", flush=True)
    if conversation.anew:
        say("note: rendered again, what was said before has other tokens than the cache holds, so all was fed anew")
    say(figures(conversation))
    if len(conversation.ids) + 1 >= (context := conversation.model.config.max_positions):
        say(f"the model's context of {context} tokens is full: /reset starts anew")


def talk(model: Transformer, tokenizer: Tokenizer, messages: Sequence[dict], args) -> None:
    """Lines in, answers out, until the end of stdin; figures, notes and faults on stderr, where a fault ends a script with exit code 2."""
    if sys.stdin is None:
        fail("stdin is closed, so there is nobody to talk to")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    settings = {name: getattr(args, name) for name in ("stop", "max_new_tokens", "seed", "temperature", "top_k", "top_p")}
    settings |= {"eos_ids": frozenset()} if args.ignore_eos else {}

    def say(text):
        print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)

    def start():
        chosen = filters_from(args, [args.preset or "paper"], [args.prune or 0], with_ratio=True)
        name, filter = chosen[0] if chosen else ("dense", None)
        say(f"a new conversation: {name}; /help lists commands" if terminal else f"a new conversation: {name}")
        return Conversation(model, tokenizer, filter, messages, **settings)

    conversation = start()
    for line in lines(terminal, not args.no_echo):
        try:
            if line.strip() == "/help":
                say(HELP)
            elif line.startswith("/"):
                command(line.strip(), args)
                conversation = start()
            elif line.strip():
                turn(conversation, line.strip(), terminal, say)
        except (ValueError, FloatingPointError, CheckpointError) as e:
            if not terminal:
                fail(e)
            print(f"error: {one_line(e)}", file=sys.stderr)
        except KeyboardInterrupt:
            if not terminal:
                raise
            say("(stopped: what was said is fed again with the next message)")
