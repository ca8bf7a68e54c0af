"""A conversation in one cache is the same as fed at once; the terminal loop; stopped answers."""

import argparse
import fcntl
import io
import itertools
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import types

import pytest
import torch

import chat as chat_command
import generation
from chat import Conversation, main, obey_command, piped_lines, typed_lines
from filter_config import PRESETS
from generate import main as generate_main
from generation import generate, opening_messages
from load_weights import Tokenizer, load
from loading.checkpoint_files import CheckpointError
from test_cli import NOT_UTF_8, refused
from test_generation import answer_of, record_forwards
from test_model import NAMES, decisions, filter_of, small

TEXTS = ["one, two, three, four", "five", "six? seven, eight, nine", "ten. " * 6]


class Letters:
    """A tokenizer whose 97 tokens are letters, whatever a random model says.

    The template begins a turn with 0 (a user's) or 1 (an answer), and 2 ends it.
    """

    eos_ids = frozenset({2})
    special_names: types.MappingProxyType = types.MappingProxyType({})

    def chat(self, messages):
        tokens = []
        for message in messages:
            tokens.append(1 if message["role"] == "assistant" else 0)
            tokens += [ord(letter) % 97 for letter in message["content"]]
            tokens.append(2)
        return [*tokens, 1]

    def stream(self, start=False):
        return self

    def push(self, token):
        return chr(97 * 100 + token)

    def flush(self):
        return ""

    def decode(self, tokens):
        return "".join(self.push(token) for token in tokens)


class Forgetful(Letters):
    """Its template keeps three letters of each answer."""

    def chat(self, messages):
        kept = []
        for message in messages:
            if message["role"] == "assistant":
                message = message | {"content": message["content"][:3]}
            kept.append(message)
        return super().chat(kept)


# ---------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_turns_in_one_cache_equal_the_conversation_fed_at_once(name, temperature, monkeypatch):
    forwards = record_forwards(monkeypatch)
    filter = filter_of(name)
    talk = Conversation(small(), Letters(), filter, max_new_tokens=13, temperature=temperature)
    for number, text in enumerate(TEXTS):
        answer = talk.answer(text)
        n_pieces = 6 if number == 1 else None  # the second one is stopped
        said = list(itertools.islice(answer, n_pieces))
        answer.close()
        assert not talk.was_fed_anew
        assert said
        assert talk.messages[-1] == {"role": "assistant", "content": "".join(said)}

    # Nothing was fed twice, and nothing left out.
    turns = list(forwards)
    assert [token for tokens, _, _ in turns for token in tokens[0].tolist()] == talk.ids
    assert talk.ids == Letters().chat(talk.messages)[: len(talk.ids)]
    assert len(talk.ids) > 100

    model = small()
    cache = model.new_cache(1, filter)
    whole = model(torch.tensor([talk.ids]), cache)[0]
    redundant = decisions(cache)[0]
    assert torch.equal(torch.cat([decided for _, _, decided in turns], 2), redundant)
    assert redundant.any() == (name is not None)
    ends = torch.tensor([tokens.shape[1] for tokens, _, _ in turns]).cumsum(0) - 1
    logits = torch.cat([after for _, after, _ in turns])
    torch.testing.assert_close(logits, whole[ends], rtol=0, atol=1e-9)
    assert torch.equal(talk.cache.usage(), cache.usage())


def test_figures_are_those_of_the_cache():
    talk = Conversation(small(), Letters(), filter_of("cache"), max_new_tokens=13)
    for text in TEXTS:
        list(talk.answer(text))
    pairs, redundant, held, _, _ = talk.cache.usage()[0].tolist()
    megabytes = 2 * 2 * 8 * 8 / 1e6  # K and V of one slot, 2 heads of 8 float64s
    assert talk.figures() == (
        f"{len(talk.ids)} tokens so far, skipped {redundant / pairs:.1%} of (token, layer) pairs; "
        f"KV held {held * megabytes:.2f} MB of dense's {pairs * megabytes:.2f} ({held / pairs:.0%})"
    )
    assert 0 < redundant < pairs
    assert 0 < held < pairs


def test_a_turn_that_breaks_off_within_a_step_was_not_said(monkeypatch):
    """The cache may then hold half a step, so the next turn does without it."""
    talk = Conversation(small(), Letters(), filter_of("cache"), max_new_tokens=8)
    plain = Conversation(small(), Letters(), filter_of("cache"), max_new_tokens=8)
    assert list(talk.answer(TEXTS[0])) == list(plain.answer(TEXTS[0]))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(talk.model.blocks[2]), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.answer(TEXTS[1]))
    assert list(talk.answer(TEXTS[2])) == list(plain.answer(TEXTS[2]))
    assert talk.messages == plain.messages
    assert talk.ids == plain.ids
    assert not talk.was_fed_anew


def test_what_a_template_changes_is_fed_anew():
    talk = Conversation(small(), Forgetful(), filter_of("local"), max_new_tokens=8)
    fed_anew = []
    for text in TEXTS[:3]:
        assert len(list(talk.answer(text))) == 9  # a piece a token, and what is left
        fed_anew.append(talk.was_fed_anew)
    assert fed_anew == [False, True, True]
    prompt = Forgetful().chat(talk.messages[:-1])
    answer = answer_of(generate(small(), [prompt], 8, filter_of("local")))
    assert talk.messages[-1]["content"] == Letters().decode(answer)
    assert talk.ids == prompt + answer[:7]


def test_a_context_that_fills_up():
    talk = Conversation(
        small(), Letters(), filter_of("local"), max_new_tokens=300, eos_ids=frozenset()
    )
    assert len("".join(talk.answer(TEXTS[0]))) == 300
    n_new = len("".join(talk.answer(TEXTS[1])))
    assert n_new == 512 - len(Letters().chat(talk.messages[:-1]))
    assert n_new < 300
    assert len(talk.ids) == 511
    before = list(talk.messages)
    for _ in range(2):
        with pytest.raises(ValueError, match="the model's context of 512 tokens is full: begin a"):
            list(talk.answer(TEXTS[2]))
        assert talk.messages == before
        assert len(talk.ids) == 511


def test_turns_and_seeds_have_no_random_numbers_in_common(monkeypatch):
    """Turn n of seed s, that is: not those of turn n - 1 of seed s + 1."""
    seeds = []

    def recorded(*arguments, seed, **options):
        seeds.extend(seed)
        return generate(*arguments, seed=seed, **options)

    monkeypatch.setattr(generation, "generate", recorded)
    for seed in range(4):
        talk = Conversation(small(), Letters(), max_new_tokens=4, seed=seed, temperature=1.0)
        for text in TEXTS[:3]:
            list(talk.answer(text))
    assert len(seeds) == 12
    assert len(set(seeds)) == 12


# ------------------------------------------------------------------------- what ends an answer


def model_that_says(monkeypatch, tokens):
    """A stand-in for a model: generate() says these tokens, whatever it is asked.

    Those after one at which the caller ends the row are left out.
    """

    def steps(*_, ended, **__):
        for token in tokens:
            yield 0, token
            if ended:
                return

    monkeypatch.setattr(generation, "generate", steps)
    cache = types.SimpleNamespace(lengths=torch.tensor([0]))
    config = types.SimpleNamespace(max_positions=999)
    return types.SimpleNamespace(config=config, new_cache=lambda *_: cache)


SAYS = "Blue, he said.<|im_start|>user\nWhy?<|im_end|>\nmore"


@pytest.mark.parametrize(
    "stop, expected",
    [
        ("<|im_start|>", "Blue, he said."),
        ("said.<|im_start|>us", "Blue, he "),
        ("im_start|>user", "Blue, he said."),
        ("?<|im_end|>", "Blue, he said.user\nWhy"),
        ("<|im_end|>", "Blue, he said.user\nWhy?"),
        ("said.user", "Blue, he said.user\nWhy?"),
        ("<|im_end|>\nmore", "Blue, he said.user\nWhy?"),
    ],
)
def test_stop_texts_are_found_where_special_tokens_are_written_out(
    demo, monkeypatch, stop, expected
):
    """Within one, across their edges, in the one that ends the answer.

    They are not shown, and what comes after the end is not searched.
    """
    tokenizer = Tokenizer(demo)
    model = model_that_says(monkeypatch, tokenizer.encode(SAYS, parse_special=True))
    talk = Conversation(model, tokenizer, stop=[stop])
    assert "".join(talk.answer("Which colour?")) == expected
    assert talk.messages[-1]["content"] == expected


@pytest.mark.parametrize(
    "says, stop",
    [
        ("Hi \U0001f600 there", ()),
        ("Hi\nUs and them", ("\nUser:",)),
        (SAYS, ("<|im_start|>me",)),
    ],
)
def test_a_stopped_answer_is_remembered_as_far_as_it_was_given_out(demo, monkeypatch, says, stop):
    """Not half a letter, nor what may be the start of a stop text."""
    tokenizer = Tokenizer(demo)
    tokens = tokenizer.encode(says, parse_special=True)
    model = model_that_says(monkeypatch, tokens)
    for n_steps in range(1, len(tokens)):
        talk = Conversation(model, tokenizer, stop=stop)
        answer = talk.answer("Hello")
        given = "".join(itertools.islice(answer, n_steps))
        answer.close()
        assert talk.messages[-1]["content"] == given


# ----------------------------------------------------------------------------- lines of stdin


def pipe(monkeypatch, given):
    """Have stdin give these bytes, decoded as Python does in the C locale."""
    stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", stdin)


def pipe_text(monkeypatch, text):
    pipe(monkeypatch, text.encode("utf-8-sig"))


def test_piped_lines(monkeypatch, capsys):
    pipe_text(monkeypatch, "tea \n\n  café\r\nmilk")
    assert list(piped_lines(echo=True)) == ["tea ", "", "  café", "milk"]
    assert capsys.readouterr().out == "> tea\n>   café\n> milk\n"
    pipe_text(monkeypatch, "tea\nmilk\n")
    assert list(piped_lines(echo=False)) == ["tea", "milk"]
    assert capsys.readouterr().out == ""


def test_a_typed_line_that_is_no_text_is_refused_and_the_next_one_answered(monkeypatch, capsys):
    typed = iter([b"caf\xe9", b"tea"])
    pipe(monkeypatch, b"")
    monkeypatch.setattr("builtins.input", lambda _: next(typed).decode())
    assert list(itertools.islice(typed_lines(), 2)) == ["", "tea"]
    assert sys.stdin.errors == "strict"
    err = capsys.readouterr().err
    assert err.startswith("error: the line cannot be read as utf-8 text (")


@pytest.mark.parametrize("given", NOT_UTF_8)
def test_piped_lines_that_are_not_utf_8_are_refused(checkpoint, capsys, monkeypatch, given):
    pipe(monkeypatch, given)
    line = refused(capsys, checkpoint, "--max-new-tokens", 2, command=main)
    assert line.startswith("error: stdin: cannot be read as UTF-8 text")


# ------------------------------------------------------------------------------- the command


def test_each_line_of_a_pipe_is_a_turn(demo, capsys, monkeypatch):
    script = (
        "Hello\n\n/preset cache\n What is the capital of France?\nAnd of Italy?\n/prune 0\nHello"
    )
    settings = ["--prune", "0.5", "--preset", "local", "--max-new-tokens", "9"]
    flags = [str(demo), *settings, "--device", "cpu"]
    pipe_text(monkeypatch, script)
    main(flags)
    out, err = capsys.readouterr()
    echoed = [line for line in out.splitlines() if line.startswith("> ")]
    assert echoed == [
        "> Hello",
        "> /preset cache",
        ">  What is the capital of France?",
        "> And of Italy?",
        "> /prune 0",
        "> Hello",
    ]
    assert "Paris" in out

    lines = err.splitlines()
    n_tokens = [int(line.split()[0]) for line in lines if " tokens so far, skipped " in line]
    assert len(n_tokens) == 4
    assert n_tokens[1] < n_tokens[2] > n_tokens[3]  # the third continues, the fourth starts anew
    others = [line for line in lines if " tokens so far, skipped " not in line]
    names = ("local 0.5", "cache 0.5", "dense")
    assert others == [f"a new conversation: {name}" for name in names]
    assert "\033" not in err

    pipe_text(monkeypatch, script)
    main([*flags, "--no-echo"])
    answers = [line for line in out.splitlines(True) if not line.startswith("> ")]
    assert capsys.readouterr() == ("".join(answers), err)


@pytest.mark.parametrize(
    "line, message",
    [
        ("/prune 2", "/prune: 2 is not a number in [0, 1)"),
        ("/preset", f"/preset: nothing is not one of {', '.join(PRESETS)}"),
        ("/preset best", f"/preset: best is not one of {', '.join(PRESETS)}"),
        ("/preset cache", "/preset does nothing without /prune above 0"),
        ("/reset all", "/reset all is no command: /help lists them"),
        ("/quit", "/quit is no command: /help lists them"),
        (
            "x" * 200,
            "the model's context of 200 tokens is full: "
            "begin a new conversation (/reset), or say less",
        ),
    ],
)
def test_a_line_that_cannot_be_obeyed_ends_a_script(checkpoint, capsys, monkeypatch, line, message):
    pipe_text(monkeypatch, line + "\nmore\n")
    assert refused(capsys, checkpoint, "--no-echo", command=main) == f"error: {message}"


def test_commands_change_the_settings():
    args = argparse.Namespace(prune=0.5, preset=None)
    obey_command("/reset", args)
    obey_command("/preset  local", args)
    assert vars(args) == {"prune": 0.5, "preset": "local"}
    obey_command("/prune 0.25", args)
    assert vars(args) == {"prune": 0.25, "preset": "local"}
    with pytest.raises(ValueError):
        obey_command("/prune x", args)
    assert vars(args) == {"prune": 0.25, "preset": "local"}


def test_help_says_what_ends_a_piped_conversation(checkpoint, capsys, monkeypatch):
    pipe_text(monkeypatch, "/help\n")
    main([str(checkpoint), "--device", "cpu"])
    err = capsys.readouterr().err
    assert "Where lines are piped in, a wrong command ends the conversation" in err
    for command in ("/reset", "/prune", "/preset", "/help"):
        assert f"\n{command} " in err


def test_a_full_context_and_a_changing_template_are_said(checkpoint, capsys, monkeypatch):
    pipe_text(monkeypatch, "hello\nfox\n/reset\nhello\n")
    limit = ["--ignore-eos", "--max-new-tokens", "60"]
    main([str(checkpoint), "--no-echo", *limit, "--device", "cpu"])
    err = capsys.readouterr().err
    assert (
        "note: rendered again, what was said before has other tokens than the cache holds, "
        "so all of it was fed anew\n"
    ) in err
    assert "the model's context of 200 tokens is full: /reset starts anew" in err
    assert err.count("a new conversation: dense") == 2


@pytest.mark.parametrize(
    "more, noted",
    [
        (["--prune", "0.5"], True),
        (["--prune", "0.5", "--preset", "cache"], False),
        ([], False),
    ],
    ids=str,
)
def test_a_small_model_without_attention_is_said_to_answer_badly(
    checkpoint, capsys, monkeypatch, more, noted
):
    pipe_text(monkeypatch, "")
    main([str(checkpoint), *more, "--device", "cpu"])
    err = capsys.readouterr().err
    assert ("note: models below a billion parameters" in err) == noted


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--prompt", "a"], "unrecognized arguments: --prompt"),
        (["--prune", "2"], "--prune: 2 is not a number in [0, 1)"),
        (["--preset", "cache"], "--preset does nothing without --prune above 0"),
        (["--gamma", "0.5"], "--gamma does nothing without --prune above 0"),
        (["--seed", "1"], "--seed does nothing without --temperature"),
        (["--stop", ""], "--stop is empty: it would end every answer at once"),
        (["--max-new-tokens", "200"], "--max-new-tokens 200 leaves no room for a prompt"),
    ],
    ids=str,
)
def test_bad_flags(checkpoint, capsys, monkeypatch, flags, message):
    pipe_text(monkeypatch, "hello\n")
    assert message in refused(capsys, checkpoint, *flags, command=main)


def test_there_is_no_conversation_of_several_processes(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(chat_command, "N_RANKS", 2)
    line = "error: python chat.py is for one process: leave out torchrun"
    assert refused(capsys, checkpoint, command=main) == line


def test_there_is_no_conversation_without_stdin(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    line = "error: stdin is closed, so there is nobody to talk to"
    assert refused(capsys, checkpoint, command=main) == line


# ----------------------------------------------------------------------- a message of the system

REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ messages[0].content }}"
)
IGNORES = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [REFUSES, IGNORES], ids=["refuses", "ignores"])
def test_a_template_without_a_system_s_role(checkpoint, capsys, tmp_path, monkeypatch, template):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(template)
    line = f"error: {folder}: the chat template takes no message of a system: leave out --system"
    system = ["--system", "Be brief."]
    flags = [folder, "--chat", "--prompt", "a", *system]
    assert refused(capsys, *flags, command=generate_main) == line
    pipe_text(monkeypatch, "hello\n")
    assert refused(capsys, folder, *system, command=main) == line
    with pytest.raises(CheckpointError):
        opening_messages(Tokenizer(folder), "Be brief.")
    assert opening_messages(Tokenizer(folder), None) == []


def test_a_system_s_message_comes_first(checkpoint, monkeypatch):
    _, tokenizer = load(checkpoint, "cpu")
    system = {"role": "system", "content": "Be brief."}
    expected = tokenizer.chat([system, {"role": "user", "content": "fox"}])
    prompts = []

    def recorded(model, given, *_, **__):
        prompts.extend(given)
        return iter(())

    monkeypatch.setattr(generation, "generate", recorded)
    pipe_text(monkeypatch, "fox\n")
    main([str(checkpoint), "--system", "Be brief.", "--max-new-tokens", "3"])
    assert prompts == [expected]


# ---------------------------------------------------------------------------------- a terminal


class Terminal:
    """A process on a terminal of its own, for a test to read from and type to."""

    def __init__(self, *command):
        self.leader, follower = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        environment["TERM"] = "dumb"

        def on_a_terminal():
            # A shell has what it runs in the background ignore Ctrl-C.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
            preexec_fn=on_a_terminal,
        )
        os.close(follower)
        self.unread = ""

    def type(self, keys: bytes):
        os.write(self.leader, keys)

    def read_until(self, text, again=b""):
        """What came before the text, once it is there.

        `again` is typed after every three seconds of silence.
        """
        ends = time.monotonic() + 120
        while text not in self.unread and time.monotonic() < ends:
            readable, _, _ = select.select([self.leader], [], [], 3)
            if not readable:
                self.type(again)
                continue
            try:
                self.unread += os.read(self.leader, 1000).decode("utf-8", "replace")
            except OSError:  # the other side was closed
                break
        assert text in self.unread, self.unread
        before, _, self.unread = self.unread.partition(text)
        return before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.leader)


CTRL_C = b"\x03"
CTRL_D = b"\x04"


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_program(demo):
    flags = ["--ignore-eos", "--max-new-tokens", "4000", "--device", "cpu"]
    terminal = Terminal(sys.executable, chat_command.__file__, demo, *flags)
    try:
        terminal.read_until("a new conversation: dense; /help lists commands")
        terminal.read_until("> ")
        terminal.type(b"What is the capital of France?\n")
        terminal.read_until("The capital of")
        terminal.type(CTRL_C)
        assert "Traceback" not in terminal.read_until(" (stopped)")
        assert "\033[2m" in terminal.read_until(" tokens so far, ")
        terminal.read_until("> ")
        # Readline loses one that comes while it sets the terminal up.
        terminal.read_until("(Ctrl-D ends)", again=CTRL_C)
        terminal.type(b"/nope\n")
        terminal.read_until("error: /nope is no command: /help lists them")
        terminal.type(b"And of Italy?\n")
        terminal.read_until("Italy")
        terminal.read_until("Rome")
        terminal.type(CTRL_C)
        assert "note: " not in terminal.read_until(" tokens so far, ")
        terminal.read_until("> ")
        terminal.type(CTRL_D)
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
