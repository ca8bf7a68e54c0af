"""A conversation is the same in one cache, turn by turn, as fed at once; the terminal loop; stop texts, samples, system, stdin."""

import fcntl
import io
import itertools
import json
import os
import pty
import random
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

import generate as generate_module
from chat import Conversation, begin, lines
from checkpoint_files import CheckpointError
from generate import generate, main, row_seed
from load_weights import Tokenizer, load
from report import Answer
from skip_map import decisions
from test_generate import LONG, refused
from test_model import NAMES, filter_of, small

TEXTS = ["one, two, three, four", "five", "six? seven, eight, nine", "ten. " * 6]


class Letters:
    """A tokenizer whose 97 tokens are letters, whatever a random model says; the template begins a turn with 0 or 1, and 2 ends it."""

    eos_ids = frozenset({2})
    _backend = types.SimpleNamespace(special=(), vocab={})

    def chat(self, messages):
        turns = [[m["role"] == "assistant", *(ord(letter) % 97 for letter in m["content"]), 2] for m in messages]
        return [int(token) for turn in turns for token in turn] + [1]

    def stream(self, start=False):
        return self

    def push(self, token):
        return chr(97 * 100 + token)

    def flush(self):
        return ""

    def decode(self, tokens):
        return "".join(map(self.push, tokens))


@pytest.fixture
def fed(monkeypatch):
    """(tokens fed, logits after them, decisions on them) of each forward."""
    steps, forward = [], type(small()).forward

    def watched(self, tokens, cache, n_new=None, last=False):
        logits = forward(self, tokens, cache, n_new, last)
        steps.append((tokens[0].tolist(), logits, decisions(cache)[0]))
        return logits

    monkeypatch.setattr(type(small()), "forward", watched)
    return steps


# -------------------------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_turns_in_one_cache_equal_the_conversation_fed_at_once(name, temperature, fed):
    model, talk = small(), Conversation(small(), Letters(), filter_of(name), max_new_tokens=13, temperature=temperature)
    for number, text in enumerate(TEXTS):
        answer = talk.answer(text)
        said = list(itertools.islice(answer, 6 if number == 1 else None))
        answer.close()  # the second one is stopped
        assert not talk.anew and said and talk.messages[-1]["content"] == "".join(said)
    turns = list(fed)
    assert [token for tokens, _, _ in turns for token in tokens] == talk.ids  # nothing twice, nothing left out
    assert talk.ids == Letters().chat(talk.messages)[: len(talk.ids)] and len(talk.ids) > 100
    cache = model.new_cache(1, filter_of(name))
    whole = model(torch.tensor([talk.ids]), cache)[0]
    redundant = decisions(cache)[0]
    assert torch.equal(torch.cat([each for _, _, each in turns], 2), redundant) and redundant.any() == (name is not None)
    ends = torch.tensor([len(tokens) for tokens, _, _ in turns]).cumsum(0) - 1
    torch.testing.assert_close(torch.cat([logits for _, logits, _ in turns]), whole[ends], rtol=0, atol=1e-9)
    assert torch.equal(talk.cache.usage(), cache.usage())


def test_a_turn_that_breaks_off_within_a_step_was_not_said(fed, monkeypatch):
    """The cache may then hold half a step, so the next turn does without it."""
    talk, plain = (Conversation(small(), Letters(), filter_of("cache"), max_new_tokens=8) for _ in range(2))
    said = list(talk.answer(TEXTS[0]))
    assert list(plain.answer(TEXTS[0])) == said
    with monkeypatch.context() as patch:
        patch.setattr(type(talk.model.blocks[2]), "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(talk.answer(TEXTS[1]))
    assert list(talk.answer(TEXTS[2])) == list(plain.answer(TEXTS[2])) and talk.messages == plain.messages and talk.ids == plain.ids
    assert not talk.anew


def test_what_a_template_changes_is_fed_anew():
    class Forgetful(Letters):
        def chat(self, messages):
            return super().chat([m | {"content": m["content"][:3]} if m["role"] == "assistant" else m for m in messages])

    talk = Conversation(small(), Forgetful(), filter_of("local"), max_new_tokens=8)
    assert [(len(list(talk.answer(text))), talk.anew) for text in TEXTS[:3]] == [(9, False), (9, True), (9, True)]
    prompt = Forgetful().chat(talk.messages[:-1])
    assert talk.ids == prompt + [ord(letter) % 97 for letter in talk.messages[-1]["content"][:7]]
    fresh = generate(small(), [prompt], 8, filter_of("local"))
    assert "".join(Letters().push(token) for _, token in fresh) == talk.messages[-1]["content"]


def test_a_context_that_fills_up(fed):
    talk = Conversation(small(), Letters(), filter_of("local"), max_new_tokens=300, eos_ids=frozenset())
    assert len(list(talk.answer(TEXTS[0]))) == 301
    assert len("".join(talk.answer(TEXTS[1]))) == 512 - len(Letters().chat(talk.messages[:-1])) < 300
    assert len(talk.ids) == 511
    before = list(talk.messages)
    for _ in range(2):
        with pytest.raises(ValueError, match="the model's context of 512 tokens is full: begin a new conversation"):
            list(talk.answer(TEXTS[2]))
        assert talk.messages == before and len(talk.ids) == 511


def test_a_cache_is_of_its_prompts():
    model, cache = small(), small().new_cache(1)
    model(torch.tensor([[1, 2, 3]]), cache)
    for prompts in ([[1, 2, 3]], [[1, 2, 3, 4]] * 2, [[1]]):
        with pytest.raises(ValueError, match=r"cache holds texts of \[3\] tokens: it is for as many prompts, each longer"):
            generate(model, prompts, 5, cache=cache)
    expected = list(generate(model, [[1, 2, 3, 4]], 5))
    assert list(generate(model, [[1, 2, 3, 4]], 5, cache=cache)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_equal_prompts_are_fed_once_and_forked(name, fed):
    prompts = [list(range(40)), list(range(60)), list(range(40)), list(range(40))]
    rows = [[] for _ in prompts]
    for row, token in generate(small(), prompts, 9, filter_of(name), temperature=1.0, seed=5):
        rows[row].append(token)
    assert [logits.shape[0] for _, logits, _ in fed] == [2] + [4] * 8 and rows[0] != rows[2] != rows[3]
    for row, prompt in enumerate(prompts):
        own = [row_seed(5, row)]
        assert rows[row] == [token for _, token in generate(small(), [prompt], 9, filter_of(name), temperature=1.0, seed=own)]


def test_an_answer_ends_at_a_stop_text_however_it_is_cut_into_tokens():
    """Some of the tokens are special: they are searched and not shown."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab.") for _ in range(12))
        stops = ["".join(rng.choice("ab.") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        cuts = [0, *sorted(rng.sample(range(1, 12), rng.randint(0, 11))), 12]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        special = {piece: number for number, piece in enumerate(pieces) if rng.random() < 0.2}
        backend = types.SimpleNamespace(special=special, vocab={piece: piece for piece in special})
        tokenizer = type("Pieces", (Letters,), {"push": lambda self, token: token, "_backend": backend, "_shown": ()})()
        answer, given = Answer(tokenizer, stops), ""
        for piece, end in zip(pieces, cuts[1:]):
            given += answer.push(piece)
            assert answer.ended == any(e <= end for e, _ in ends)
        kept = min(ends)[1] if ends else 12
        shown = "".join(piece[: max(kept - start, 0)] for piece, start in zip(pieces, cuts) if piece not in special)
        assert given + answer.push(None) == shown, (text, stops, cuts, special)


def plays(monkeypatch, tokenizer, says):
    """generate() says these tokens, whatever it is asked; those after one at which it is to end are left out."""

    def steps(*_, ended, **__):
        for token in says:
            yield 0, token
            if ended:
                return

    monkeypatch.setattr("chat.generate", steps)
    cache = types.SimpleNamespace(seen=torch.tensor([0]))
    return types.SimpleNamespace(config=types.SimpleNamespace(max_positions=999), new_cache=lambda *_: cache)


SAYS = "Blue, he said.<|im_start|>user\nWhy?<|im_end|>\nmore"


@pytest.mark.parametrize("stop, answer", [
    ("<|im_start|>", "Blue, he said."), ("said.<|im_start|>us", "Blue, he "), ("im_start|>user", "Blue, he said."),
    ("?<|im_end|>", "Blue, he said.user\nWhy"), ("<|im_end|>", "Blue, he said.user\nWhy?"), ("said.user", "Blue, he said.user\nWhy?"),
    ("<|im_end|>\nmore", "Blue, he said.user\nWhy?"),
])  # fmt: skip
def test_stop_texts_are_found_where_special_tokens_are_written_out(demo, monkeypatch, stop, answer):
    """Within one, across their edges, in the one that ends the answer; they are not shown, nor what comes after them searched."""
    tokenizer = Tokenizer(demo)
    says = tokenizer.encode(SAYS, parse_special=True)
    talk = Conversation(plays(monkeypatch, tokenizer, says), tokenizer, stop=[stop])
    assert "".join(talk.answer("Which colour?")) == answer == talk.messages[-1]["content"]


def test_a_letter_goes_on_after_a_special_token_as_in_decode(demo):
    tokenizer = Tokenizer(demo)
    (special,) = tokenizer.encode("<|im_start|>", parse_special=True)
    letter = tokenizer.encode("\U0001f600")
    for ids in ([*letter[:-1], special, letter[-1]], [*letter[:-1], special], [special, *letter, special, *tokenizer.encode(" a")]):
        answer = Answer(tokenizer, ["never"], start=True)
        assert "".join(map(answer.push, ids)) + answer.push(None) == tokenizer.decode(ids)


@pytest.mark.parametrize("says, stop", [("Hi \U0001f600 there", ()), ("Hi\nUs and them", ("\nUser:",)), (SAYS, ("<|im_start|>me",))])
def test_a_stopped_answer_is_remembered_as_far_as_it_was_given_out(demo, monkeypatch, says, stop):
    """Not half a letter, nor what may be the start of a stop text."""
    tokenizer = Tokenizer(demo)
    says = tokenizer.encode(says, parse_special=True)
    model = plays(monkeypatch, tokenizer, says)
    for steps in range(1, len(says)):
        talk = Conversation(model, tokenizer, stop=stop)
        answer = talk.answer("Hello")
        given = "".join(itertools.islice(answer, steps))
        answer.close()
        assert talk.messages[-1]["content"] == given


def test_turns_and_seeds_have_no_random_numbers_in_common(monkeypatch):
    """Turn n of seed s, that is: not those of turn n - 1 of seed s + 1."""
    seeds, plain = [], generate
    monkeypatch.setattr("chat.generate", lambda *given, **more: seeds.append(more["seed"][0]) or plain(*given, **more))
    for seed in range(4):
        talk = Conversation(small(), Letters(), max_new_tokens=4, seed=seed, temperature=1.0)
        for text in TEXTS[:3]:
            list(talk.answer(text))
    assert len(set(seeds)) == 12


# --------------------------------------------------------------------------------------------- the command line


def piped(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8-sig"))))


def test_each_line_of_a_pipe_is_a_turn(demo, capsys, monkeypatch):
    script = "Hello\n\n/preset cache\n What is the capital of France?\nAnd of Italy?\n/prune 0\nHello"
    flags = [str(demo), "--chat", "--prune", "0.5", "--preset", "local", "--max-new-tokens", "9", "--device", "cpu"]
    piped(monkeypatch, script)
    main(flags)
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("> ")]
    assert lines == ["> Hello", "> /preset cache", ">  What is the capital of France?", "> And of Italy?", "> /prune 0", "> Hello"]
    kinds = [line.split()[0 if "KV held" in line else -1] for line in err.splitlines()]
    assert [each for each in err.splitlines() if "new conversation" in each] == [
        f"a new conversation: {name}" for name in ("local 0.5", "cache 0.5", "dense")]  # fmt: skip
    assert err.count("skipped") == 4 and "\033" not in err and "note: " not in err and int(kinds[3]) < int(kinds[4]) > int(kinds[6])
    piped(monkeypatch, script)
    main([*flags, "--no-echo"])
    assert capsys.readouterr() == ("".join(line for line in out.splitlines(True) if not line.startswith("> ")), err)
    assert "Paris" in out


@pytest.mark.parametrize("line, message", [
    ("/prune 2", "/prune: 2 is not a number in [0, 1)"), ("/preset", "/preset: nothing is not one of paper, local, cache"),
    ("/preset cache", "/preset does nothing without /prune above 0"), ("/quit", "/quit is no command: /help lists them"),
    ("x" * 200, "the model's context of 200 tokens is full: begin a new conversation (/reset), or say less"),
])  # fmt: skip
def test_a_line_that_cannot_be_obeyed_ends_a_script(checkpoint, capsys, monkeypatch, line, message):
    piped(monkeypatch, line + "\nmore\n")
    assert refused(capsys, checkpoint, "--chat", "--no-echo") == f"error: {message}"


@pytest.mark.parametrize("given", [
    "A caf\xe9?\n".encode("latin-1"), "A cup?\n".encode("utf-16"), "A cup?\n".encode("utf-16-le"), "A cup?\n".encode("utf-16-be"),
])  # fmt: skip
@pytest.mark.parametrize("flags", [["--chat"], ["--prompts-file", "FILE"]])
def test_what_is_not_utf_8_is_refused(checkpoint, capsys, monkeypatch, tmp_path, given, flags):
    (tmp_path / "FILE").write_bytes(given)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", errors="surrogateescape"))  # as in the C locale
    assert "cannot be read as UTF-8 text" in refused(capsys, checkpoint, *flags, "--max-new-tokens", 2)


def test_a_typed_line_that_is_no_text_is_refused_and_the_next_one_answered(monkeypatch, capsys):
    typed = iter([b"caf\xe9", b"tea"])

    def read(_):
        return next(typed).decode()

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape"))
    monkeypatch.setattr("builtins.input", read)
    found = list(itertools.islice(lines(True, False), 2))
    assert found == ["", "tea"] and sys.stdin.errors == "strict"
    assert capsys.readouterr().err.startswith("error: the line cannot be read as utf-8 text (")


def test_help_says_what_ends_a_piped_conversation(checkpoint, capsys, monkeypatch):
    piped(monkeypatch, "/help\n")
    main([str(checkpoint), "--chat", "--device", "cpu"])
    assert "Where lines are piped in, a wrong command ends the conversation" in capsys.readouterr().err


def test_a_full_context_and_a_changing_template_are_said(checkpoint, capsys, monkeypatch):
    piped(monkeypatch, "hello\nfox\n/reset\nhello\n")
    main([str(checkpoint), "--chat", "--no-echo", "--ignore-eos", "--max-new-tokens", "60", "--device", "cpu"])
    err = capsys.readouterr().err
    assert err.count("note: rendered again, what was said before has other tokens than the cache holds, so all was fed anew") >= 1
    assert "the model's context of 200 tokens is full: /reset starts anew" in err and err.count("a new conversation: dense") == 2


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_program(demo):
    leader, follower = pty.openpty()
    command = [sys.executable, generate_module.__file__, demo, "--chat", "--ignore-eos", "--max-new-tokens", "4000", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "dumb"}

    def on_a_terminal():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what it runs in the background ignore it
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True,
                               preexec_fn=on_a_terminal)  # fmt: skip
    os.close(follower)
    seen = ""

    def until(text, again=b""):
        """Reads on until the text comes, and drops what was read; types `again` after every three seconds of silence."""
        nonlocal seen
        ends = time.monotonic() + 60
        while text not in seen and time.monotonic() < ends:
            if not select.select([leader], [], [], 3)[0]:
                os.write(leader, again)
                continue
            try:
                seen += os.read(leader, 1000).decode("utf-8", "replace")
            except OSError:  # the other side was closed
                break
        assert text in seen, seen
        before, _, seen = seen.partition(text)
        return before

    try:
        until("a new conversation: dense; /help lists commands")
        until("> ")
        os.write(leader, b"What is the capital of France?\n")
        until("The capital of")
        os.write(leader, b"\x03")
        assert "Traceback" not in until(" (stopped)")
        assert "\033[2m" in until(" tokens so far, ")
        until("> ")
        until("(Ctrl-D ends)", again=b"\x03")  # readline loses one that comes while it sets the terminal up
        os.write(leader, b"/nope\n")
        until("error: /nope is no command: /help lists them")
        os.write(leader, b"And of Italy?\n")
        until("Italy")
        until("Rome")
        os.write(leader, b"\x03")
        assert "note: " not in until(" tokens so far, ")
        until("> ")
        os.write(leader, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "a", "--system", "x"], "--system does nothing without --chat"),
    (["--prompt", "a", "--num-samples", "2"], "--num-samples does nothing without --temperature"),
    (["--prompt", "a", "--prompt", "b", "--num-samples", "2", "--temperature", "1"], "--num-samples is for one prompt, and here are 2"),
    (["--prompt", "a", "--num-samples", "0"], "--num-samples: 0 is not a whole number of at least 1"),
    (["--prompt", "a", "--stop", ""], "--stop is empty"),
    (["--prompt", "a", "--stop", "\udce9"], "--stop is not UTF-8 text"),
    (["--prompt", "-", "--prompts-file", "-"], "stdin (-) can be read only once"),
    (["--prompt", "-", "--prompt", "-"], "stdin (-) can be read only once"),
    (["--chat", "--json"], "--json needs a --prompt"),
    (["--chat", "--prune", "0.5", "--compare"], "--compare needs a --prompt"),
    (["--chat", "--temperature", "1", "--num-samples", "2"], "--num-samples needs a --prompt"),
    (["--prompt", "a", "--prune", "0.5", "--show-skips", "--no-echo"], "cannot be combined with --no-echo"),
])  # fmt: skip
def test_bad_flags(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, *flags)


@pytest.mark.parametrize("flags, given, code, out", [
    (["--prompt", "-"], b"hello\nfox\n", 0, "hello\nfox\n"), (["--prompts-file", "-"], b"\xef\xbb\xbfhello\r\nfox\n", 0, "[1] hello\n"),
    (["--prompt", "-"], b"", 2, ""), (["--prompt", "-"], b"caf\xe9", 2, ""), (["--prompts-file", "-"], b"\n", 2, ""),
])  # fmt: skip
def test_a_dash_is_stdin(checkpoint, flags, given, code, out):
    command = [sys.executable, generate_module.__file__, checkpoint, *flags, "--max-new-tokens", "3", "--device", "cpu"]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    assert done.returncode == code and done.stdout.decode().startswith(out) and bool(done.stdout) == (code == 0)
    assert code == 0 or len(done.stderr.splitlines()) == 1
    closed = subprocess.run(["bash", "-c", 'exec "$@" <&-', "-", *map(str, command)], capture_output=True, check=False)
    assert closed.returncode == 2 and closed.stderr == b"error: stdin is closed, so there is nothing to read\n"


def texts(capsys, *flags):
    main([*map(str, flags), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)["results"][0]


def test_stop_ends_each_row_for_itself(demo, capsys):
    flags = [demo, "--max-new-tokens", 24, "--prompt", "The lighthouse keeper", "--prompt", "One, two, three, four, five,"]
    plain = texts(capsys, *flags)["texts"]
    stops = [plain[0][9:15], "seven", "never said"]
    stopped = texts(capsys, *flags, *(word for stop in stops for word in ("--stop", stop)))
    assert stopped["texts"] == [plain[0][: plain[0].index(stops[0])], plain[1].split("seven")[0]] and "seven" in plain[1]
    assert stopped["new_tokens"] < 48
    main([*map(str, flags[:5]), "--stop", stops[0], "--device", "cpu"])
    assert capsys.readouterr().out == f"The lighthouse keeper\n{stopped['texts'][0]}\n"


def test_samples_are_those_of_equal_prompts_and_of_one_seed_alone(checkpoint, capsys):
    flags = [checkpoint, "--temperature", 1, "--ignore-eos", "--max-new-tokens", 12, "--dtype", "float64"]
    samples, others = (texts(capsys, *flags, "--prompt", LONG, "--num-samples", 3, "--seed", seed) for seed in (0, 1))
    assert texts(capsys, *flags, *["--prompt", LONG] * 3)["texts"] == samples["texts"]
    assert texts(capsys, *flags, "--prompt", LONG)["texts"] == samples["texts"][:1]
    assert len({*samples["texts"], *others["texts"]}) == 6
    assert samples["new_tokens"] == 36


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
IGNORES = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [REFUSES, IGNORES])
def test_a_template_without_a_system_s_role(checkpoint, capsys, tmp_path, monkeypatch, template):
    folder = shutil.copytree(checkpoint, tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(template)
    line = f"error: {folder}: the chat template takes no message of a system: leave out --system"
    assert refused(capsys, folder, "--chat", "--prompt", "a", "--system", "Be brief.") == line
    piped(monkeypatch, "hello\n")
    assert refused(capsys, folder, "--chat", "--system", "Be brief.") == line
    with pytest.raises(CheckpointError):
        begin(Tokenizer(folder), "Be brief.")
    assert begin(Tokenizer(folder), None) == []


def test_a_system_s_message_comes_first(checkpoint, capsys, monkeypatch):
    _, tokenizer = load(checkpoint, "cpu")
    expected = tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "fox"}])
    flags = [checkpoint, "--chat", "--system", "Be brief.", "--max-new-tokens", 3]
    assert texts(capsys, *flags, "--prompt", "fox")["prompt_tokens"] == len(expected)
    prompts = []
    monkeypatch.setattr("chat.generate", lambda model, prompt, *_, **__: prompts.extend(prompt) or iter(()))
    piped(monkeypatch, "fox\n")
    main([*map(str, flags)])
    assert prompts == [expected]
