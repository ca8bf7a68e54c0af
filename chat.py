"""A conversation with a model, in one cache.

    python chat.py [CHECKPOINT] --prune 0.5 --preset cache

Each line of stdin is a turn, and the cache is kept from turn to turn. From Python:

    talk = Conversation(model, tokenizer, preset("cache", prune=0.5))
    for piece in talk.answer("Why is the sky blue?"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cli.arguments import (
    Parser,
    add_filter_arguments,
    add_generation_arguments,
    add_model_arguments,
    check_filter_arguments,
    check_generation_arguments,
    filters_from,
    load_checkpoint,
    note_useless_filter,
    share,
)
from cli.process import N_RANKS, fail, one_line, run_command
from cli.report import refuse_zeros
from filter_config import PRESETS, FilterConfig

# Torch takes seconds to import. So what needs it is imported in the functions below, which are
# called once the arguments are known to make sense.
if TYPE_CHECKING:
    from loading.tokenizer import Tokenizer
    from model import Transformer


class Conversation:
    """Turns that share one cache of one row: each turn feeds only what the cache does not hold.

    messages       what was said so far, as {"role": ..., "content": ...}
    ids            the tokens of the conversation that the cache holds
    was_fed_anew   whether the latest turn fed everything into a new cache, because what came
                   before, rendered again, has other tokens (a template may drop or trim some of it)
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        filter: FilterConfig | None = None,
        messages: Sequence[dict] = (),
        stop: Sequence[str] = (),
        max_new_tokens=128,
        seed=0,
        eos_ids=None,
        **settings,
    ):
        """An empty conversation, or one that begins with `messages`.

        eos_ids: the tokenizer's, if None; settings: as in generate().
        """
        self.model = model
        self.tokenizer = tokenizer
        self.filter = filter
        self.messages = list(messages)
        self.stop = stop
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.eos_ids = tokenizer.eos_ids if eos_ids is None else eos_ids
        self.settings = settings
        self.cache = model.new_cache(1, filter)
        self.ids: list[int] = []
        self.was_fed_anew = False

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to a user's message, piece by piece.

        A caller that closes the iterator stops it; what it was given by then is the answer. Raises
        CheckpointError where the chat template refuses the message, ValueError where the context is
        full: then the message was not said.
        """
        from generation import Answer, generate, row_seed

        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.chat(messages)
        context = self.model.config.max_positions
        room = context - len(prompt)
        if room < 1:
            raise ValueError(
                f"the model's context of {context} tokens is full: "
                "begin a new conversation (/reset), or say less"
            )

        # Something must be left to feed, so the prompt's last token is never taken from the cache.
        self.was_fed_anew = prompt[:-1][: len(self.ids)] != self.ids
        cache = self.model.new_cache(1, self.filter) if self.was_fed_anew else self.cache
        # For the next turn, should this one break off within a step.
        self.cache = self.model.new_cache(1, self.filter)
        self.ids = []

        # An Answer has to see the token that ends it, so generate() is told of none.
        reply = Answer(self.tokenizer, self.stop, self.eos_ids)
        ended = set[int]()
        steps = generate(
            self.model,
            [prompt],
            min(self.max_new_tokens, room),
            self.filter,
            seed=[row_seed(self.seed, len(self.messages))],
            cache=cache,
            ended=ended,
            **self.settings,
        )
        tokens: list[int] = []
        given = ""
        was_closed = False
        try:
            for _, token in steps:
                tokens.append(token)
                piece = reply.push(token)
                given += piece
                if reply.ended:
                    ended.add(0)
                yield piece
        except GeneratorExit:
            was_closed = True
        rest = ""
        if not was_closed:  # otherwise nobody sees what was held back
            rest = reply.push(None)
        self.messages = [*messages, {"role": "assistant", "content": given + rest}]
        self.cache = cache
        self.ids = (prompt + tokens)[: int(cache.lengths[0])]
        if not was_closed:
            yield rest

    def figures(self) -> str:
        """What all turns so far came to, in one line."""
        pairs, redundant, held, _, _ = self.cache.usage()[0].tolist()
        megabytes = self.cache.slot_bytes / 1e6
        return (
            f"{len(self.ids)} tokens so far, "
            f"skipped {redundant / max(pairs, 1):.1%} of (token, layer) pairs; "
            f"KV held {held * megabytes:.2f} MB of dense's {pairs * megabytes:.2f} "
            f"({held / max(pairs, 1):.0%})"
        )


# ------------------------------------------------------------------------------- the terminal

HELP = f"""\
/reset        forget all that was said
/prune P      filter as much as that (0: not at all), from the start
/preset NAME  with another preset, one of {", ".join(PRESETS)}, from the start
/help         this
Ctrl-C stops an answer, Ctrl-D ends. Put a blank before a message of your own that begins with /.
Where lines are piped in, a wrong command ends the conversation, with exit code 2."""


def piped_lines(echo: bool) -> Iterator[str]:
    """The lines that are piped in; with `echo`, they are printed, as a terminal would.

    Fails where they are no text.
    """
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")  # type: ignore[union-attr]
    try:
        for line in sys.stdin:
            refuse_zeros("stdin", line)
            if echo and line.strip():
                print(f"> {line.rstrip()}", flush=True)
            yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        fail(f"stdin: cannot be read as UTF-8 text ({error.reason})")


def typed_lines() -> Iterator[str]:
    """The lines that are typed at a prompt, until Ctrl-D; an empty one after Ctrl-C."""
    encoding = sys.stdin.encoding
    sys.stdin.reconfigure(errors="strict")  # type: ignore[union-attr]
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
            print()
            return
        except UnicodeDecodeError as error:
            problem = f"the line cannot be read as {encoding} text ({error.reason})"
            print(f"error: {problem}", file=sys.stderr)
        yield line


@contextmanager
def collected_interrupts(on_terminal: bool):
    """On a terminal, collect Ctrl-C, to be obeyed between two steps, when the cache is whole.

    A second one is obeyed at once, and so is the first where lines are piped in.
    """
    presses: list[int] = []

    def press(number, frame):
        if presses:
            raise KeyboardInterrupt
        presses.append(number)

    if not on_terminal:
        yield presses
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


def obey_command(line: str, args):
    """Change args as a line that begins with / wants it. Raises ValueError."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/reset" and not value:
        return
    if name == "/prune":
        try:
            args.prune = share(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"/prune: {error}") from None
    elif name == "/preset":
        if value not in PRESETS:
            given = value or "nothing"
            raise ValueError(f"/preset: {given} is not one of {', '.join(PRESETS)}")
        if not args.prune:
            raise ValueError("/preset does nothing without /prune above 0")
        args.preset = value
    else:
        raise ValueError(f"{line} is no command: /help lists them")


def take_turn(conversation: Conversation, message: str, on_terminal: bool, say: Callable):
    """Print the answer to a message, and say what there is to say of it."""
    with collected_interrupts(on_terminal) as presses:
        answer = conversation.answer(message)
        for piece in answer:
            print(piece, end="", flush=True)
            if presses:
                answer.close()
    print(" (stopped)" if presses else "", flush=True)
    if conversation.was_fed_anew:
        say(
            "note: rendered again, what was said before has other tokens than the cache holds, "
            "so all of it was fed anew"
        )
    say(conversation.figures())
    context = conversation.model.config.max_positions
    if len(conversation.ids) + 1 >= context:
        say(f"the model's context of {context} tokens is full: /reset starts anew")


def start_conversation(model: Transformer, tokenizer: Tokenizer, messages: Sequence[dict], args):
    """(name of its filter, Conversation) as args says, with nothing said but `messages`."""
    name = "dense"
    filter = None
    if args.prune:
        preset_name = args.preset or "paper"
        [(name, filter)] = filters_from(args, [preset_name], [args.prune], with_ratio=True)
    conversation = Conversation(
        model,
        tokenizer,
        filter,
        messages,
        stop=args.stop,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        eos_ids=frozenset() if args.ignore_eos else None,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    return name, conversation


def talk(model: Transformer, tokenizer: Tokenizer, messages: Sequence[dict], args):
    """Lines in, answers out, until the end of stdin.

    Figures, notes and errors go to stderr. Where lines are piped in, an error ends the process with
    exit code 2.
    """
    from loading.checkpoint_files import CheckpointError

    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    dimmed = sys.stderr.isatty() and not os.environ.get("NO_COLOR")

    def say(text):
        if dimmed:
            text = f"\033[2m{text}\033[0m"
        print(text, file=sys.stderr, flush=True)

    def start() -> Conversation:
        name, conversation = start_conversation(model, tokenizer, messages, args)
        hint = "; /help lists commands" if on_terminal else ""
        say(f"a new conversation: {name}{hint}")
        return conversation

    conversation = start()
    lines = typed_lines() if on_terminal else piped_lines(echo=not args.no_echo)
    for line in lines:
        message = line.strip()
        try:
            if message == "/help":
                say(HELP)
            elif line.startswith("/"):
                obey_command(message, args)
                conversation = start()
            elif message:
                take_turn(conversation, message, on_terminal, say)
        except (ValueError, FloatingPointError, CheckpointError) as error:
            if not on_terminal:
                fail(error)
            print(f"error: {one_line(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            say("(stopped: what was said is fed again with the next message)")


# ---------------------------------------------------------------------------- the command line


def make_parser() -> Parser:
    parser = Parser(
        description="A conversation with a model: each line of stdin is a turn, and the cache is "
        "kept from turn to turn. /help lists what else can be typed."
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--no-echo",
        action="store_true",
        help="where lines are piped in, do not print them above their answers",
    )
    add_generation_arguments(parser)
    add_filter_arguments(parser)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    check_generation_arguments(args)
    check_filter_arguments(args)
    if N_RANKS > 1:
        fail("python chat.py is for one process: leave out torchrun")
    if sys.stdin is None:
        fail("stdin is closed, so there is nobody to talk to")

    from generation import opening_messages
    from loading.checkpoint_files import CheckpointError

    model, tokenizer = load_checkpoint(args)
    try:
        messages = opening_messages(tokenizer, args.system)
    except CheckpointError as error:
        fail(error)
    if args.prune:
        # The same for a conversation as for a prompt that fills the context.
        filters = filters_from(args, [args.preset or "paper"], [args.prune])
        note_useless_filter(model, [filter for _, filter in filters], model.config.max_positions)
    talk(model, tokenizer, messages, args)


if __name__ == "__main__":
    run_command(main)
