"""A command as a process: errors in one line, Ctrl-C, closed streams, several processes.

Imports nothing that takes time, so that a command answers a wrong flag at once.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

# torchrun starts several processes (ranks) for one model: how many, and which of them this is. Rank
# 0 speaks for all of them. What they do together is in runtime/tensor_parallel.py.
STARTED_BY_TORCHRUN = "LOCAL_RANK" in os.environ
N_RANKS = int(os.environ["WORLD_SIZE"]) if STARTED_BY_TORCHRUN else 1
RANK = int(os.environ["RANK"]) if STARTED_BY_TORCHRUN else 0


class Ranks:
    """What a command does differently once its processes have met: tensor_parallel sets both."""

    # Whether this rank is the one to say why all of them end.
    is_first_to_fail: Callable[[], bool] = staticmethod(lambda: RANK == 0)
    # Part from the other ranks, at the end.
    leave: Callable[[], None] = staticmethod(lambda: None)


def one_line(message: object) -> str:
    """A message in one line, without anything that a terminal would obey.

    What other people wrote (names, keys, a template's complaint) goes into messages through this.
    """
    text = " ".join(str(message).split())
    letters = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "".join(letters)


def fail(message) -> NoReturn:
    """End with one line on stderr and exit code 2. Of several ranks the first to fail says why."""
    if Ranks.is_first_to_fail():
        # The stderr of other ranks than 0 is replaced by run_command.
        stream = sys.__stderr__ if RANK > 0 else sys.stderr
        print(f"error: {one_line(message)}", file=stream)
    raise SystemExit(2)


def single_process_only(**given):
    """Fail if one of these flags was given and there are several ranks: compile=args.compile."""
    if N_RANKS == 1:
        return
    for name, value in given.items():
        if value:
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} is for one process: leave it out, or torchrun")


class IgnoreWriteErrors:
    """A stream whose faults stop nobody: for stderr, whose disk may be full or reader gone."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def run_command(main: Callable[..., Any], *arguments):
    """Call a command's main function as a process that ends well whatever happens to its streams.

    Ctrl-C ends it with exit code 130. A reader that has seen enough (head, say), a full disk or a
    closed stream end it without a traceback. A letter that the terminal's encoding lacks becomes
    "?". Progress bars are drawn on a terminal only.
    """
    prepare_streams()
    try:
        main(*arguments)
        sys.stdout.flush()
        Ranks.leave()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:
        # What is still in stdout's buffer has nowhere to go.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return
        what = f" {error.filename}" if error.filename else ""
        fail(f"cannot write or read{what}: {error.strerror}")
    except RuntimeError as error:
        if N_RANKS == 1:
            raise
        fail(f"process {RANK} of {N_RANKS}, or one that it waited for, has failed: {error}")


def prepare_streams():
    """stdout and stderr as run_command promises them. Of several ranks, only 0 writes."""
    stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    sys.stderr = IgnoreWriteErrors(stderr)
    if not sys.stderr.isatty():
        # tqdm and the hub read these when they are imported.
        os.environ["TQDM_DISABLE"] = "1"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = IgnoreWriteErrors(open(os.devnull, "w"))  # noqa: SIM115
    if sys.stdout is None:
        fail("stdout is closed, so there is nowhere to print to")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
