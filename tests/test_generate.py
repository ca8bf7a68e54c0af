"""The command generate.py: what it prints is what generate() finds, and a mistake is one line."""

import functools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval_ppl
import generate as generate_command
import generation
from cli import skip_map
from cli.report import COLUMNS
from cli.skip_map import BOLD, paint, paint_legend, token_pieces
from filter_config import PRESETS, preset
from generate import main
from generation import generate
from load_weights import Tokenizer, load
from test_cli import LONG, NOT_UTF_8, refused
from test_generation import answer_of
from test_model import decisions

RUN = ["--max-new-tokens", "12", "--ignore-eos", "--device", "cpu"]
SKIPS = ["--prune", "0.5", "--preset", "cache", "--dtype", "float64", *RUN]


def first_result(capsys, *flags):
    """What --json says of the first setting."""
    main([*(str(flag) for flag in flags), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)["results"][0]


# ------------------------------------------------------------------------- prompts and answers


def test_one_prompt_streams_what_json_reports(checkpoint, capsys):
    flags = [str(checkpoint), "--prompt", LONG, "--prune", "0.5", *RUN]
    main(flags)
    streamed, figures = capsys.readouterr()
    result = first_result(capsys, *flags)
    assert streamed == f"{LONG}\n{result['texts'][0]}\n"
    skipped = f"skipped {result['skip_ratio']:.1%} of (token, layer) pairs"
    assert f"{skipped}; KV held {result['kv_held']:.0%} (" in figures
    assert f"read {result['kv_read']:.0%} of dense" in figures
    assert 0.1 < result["skip_ratio"] < 0.6
    assert 0.3 < result["kv_held"] < 0.9
    assert 0.2 < result["kv_read"] < 0.9
    assert "note: models below a billion parameters" in figures
    assert result["filter"]["prune"] == 0.5
    assert result["new_tokens"] == 12

    model, tokenizer = load(checkpoint, "cpu")
    prompt = tokenizer.encode(LONG)
    answer = answer_of(generate(model, [prompt], 12, preset("paper", prune=0.5)))
    assert tokenizer.decode(answer) == result["texts"][0]


def test_a_batch_gives_each_prompts_own_text(checkpoint, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{LONG}\n\nfox\n", encoding="utf-8")
    flags = ["--preset", "cache", "--prune", "0.4", *RUN]
    file = ["--prompts-file", str(tmp_path / "prompts.txt")]
    main([str(checkpoint), "--prompt", "a", *file, *flags, "--json"])
    batch = json.loads(capsys.readouterr().out)
    assert batch["prompts"] == ["a", LONG, "fox"]
    texts = batch["results"][0]["texts"]
    for prompt, text in zip(batch["prompts"], texts):
        assert first_result(capsys, checkpoint, "--prompt", prompt, *flags)["texts"] == [text]

    two = [str(checkpoint), "--prompt", "a", "--prompt", "fox", *flags]
    main(two)
    assert capsys.readouterr().out == f"[1] a\n{texts[0]}\n\n[2] fox\n{texts[2]}\n\n"
    main([*two, "--no-echo"])
    assert capsys.readouterr().out == f"[1] {texts[0]}\n\n[2] {texts[2]}\n\n"


def test_lines_of_a_prompts_file(checkpoint, tmp_path, capsys):
    """Only \\n and \\r\\n end a line; a byte order mark and empty lines are no prompts."""
    file = tmp_path / "prompts"
    file.write_bytes("\ufeffhello\r\nhel\u2028lo\x0b\x85x\rhello\n\n".encode())
    flags = ["--prompts-file", str(file), "--json", "--max-new-tokens", "3"]
    main([str(checkpoint), *flags])
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == ["hello", "hel\u2028lo\x0b\x85x", "hello"]
    texts = result["results"][0]["texts"]
    assert texts[0] == texts[2]


@pytest.mark.parametrize(
    "flags, given, code, out",
    [
        (["--prompt", "-"], b"hello\nfox\n", 0, "hello\nfox\n"),
        (["--prompts-file", "-"], b"\xef\xbb\xbfhello\r\nfox\n", 0, "[1] hello\n"),
        (["--prompt", "-"], b"", 2, ""),
        (["--prompt", "-"], b"caf\xe9", 2, ""),
        (["--prompts-file", "-"], b"\n", 2, ""),
    ],
    ids=str,
)
def test_a_dash_is_stdin(checkpoint, flags, given, code, out):
    more = ["--max-new-tokens", "3", "--device", "cpu"]
    command = [sys.executable, generate_command.__file__, str(checkpoint), *flags, *more]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    assert done.returncode == code
    assert done.stdout.decode().startswith(out)
    assert bool(done.stdout) == (code == 0)
    if code == 2:
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flag", ["--prompt", "--prompts-file"])
def test_a_dash_where_stdin_is_closed(checkpoint, flag):
    command = [sys.executable, generate_command.__file__, str(checkpoint), flag, "-"]
    shell = ["bash", "-c", 'exec "$@" <&-', "-", *command]
    done = subprocess.run(shell, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr == b"error: stdin is closed, so there is nothing to read\n"


# ----------------------------------------------------------------------------------------- --chat


def test_chat_puts_the_prompt_in_the_template(checkpoint, capsys):
    result = first_result(capsys, checkpoint, "--prompt", "fox", "--chat", *RUN)
    _, tokenizer = load(checkpoint, "cpu")
    expected = tokenizer.encode("<s>user: fox</s>", parse_special=True)
    assert result["prompt_tokens"] == len(expected)
    assert result["filter"] is None
    assert result["skip_ratio"] == 0


def test_chat_with_a_system_s_message(checkpoint, capsys):
    flags = ["--chat", "--system", "Be brief.", "--prompt", "fox", "--max-new-tokens", 3]
    result = first_result(capsys, checkpoint, *flags)
    _, tokenizer = load(checkpoint, "cpu")
    expected = tokenizer.encode("<s>system: Be brief.</s><s>user: fox</s>", parse_special=True)
    assert result["prompt_tokens"] == len(expected)


@pytest.mark.parametrize("more", [[], ["--json"], ["--compare"], ["--system", "Be brief."]])
def test_a_conversation_is_another_command(checkpoint, capsys, more):
    line = (
        "error: no prompt: give --prompt TEXT or --prompts-file FILE; to talk, use python chat.py"
    )
    assert refused(capsys, checkpoint, "--chat", *more) == line


def test_no_chat_template(checkpoint, capsys, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    (folder / "tokenizer_config.json").unlink()
    assert "chat template" in refused(capsys, folder, "--prompt", "a", "--chat")


# --------------------------------------------------------------------- stop texts and --num-samples


def test_stop_ends_each_row_for_itself(demo, capsys):
    limit = ["--max-new-tokens", 24]
    keeper = [demo, *limit, "--prompt", "The lighthouse keeper"]
    both = [*keeper, "--prompt", "One, two, three, four, five,"]
    plain = first_result(capsys, *both)["texts"]
    within = plain[0][9:15]
    assert "seven" in plain[1]
    stops = ["--stop", within, "--stop", "seven", "--stop", "never said"]
    stopped = first_result(capsys, *both, *stops)
    assert stopped["texts"] == [plain[0].split(within)[0], plain[1].split("seven")[0]]
    assert stopped["new_tokens"] < 48

    main([*(str(flag) for flag in keeper), "--stop", within, "--device", "cpu"])
    assert capsys.readouterr().out == f"The lighthouse keeper\n{stopped['texts'][0]}\n"


def test_samples_are_those_of_equal_prompts_and_of_the_first_row_s_seed(checkpoint, capsys):
    sampling = ["--temperature", 1, "--ignore-eos", "--max-new-tokens", 12, "--dtype", "float64"]
    flags = [checkpoint, *sampling, "--prompt", LONG]
    samples = first_result(capsys, *flags, "--num-samples", 3, "--seed", 0)
    others = first_result(capsys, *flags, "--num-samples", 3, "--seed", 1)
    three_prompts = first_result(capsys, *flags, "--prompt", LONG, "--prompt", LONG)
    assert three_prompts["texts"] == samples["texts"]
    assert first_result(capsys, *flags)["texts"] == samples["texts"][:1]
    assert len({*samples["texts"], *others["texts"]}) == 6
    assert samples["new_tokens"] == 36


# ----------------------------------------------------------------------------- presets and notes


def test_compare_runs_dense_and_every_preset(checkpoint, capsys):
    flags = [str(checkpoint), "--prompt", LONG, "--prune", "0.5", *RUN]
    main([*flags, "--compare"])
    out = capsys.readouterr().out
    assert out.startswith(COLUMNS)
    titles = [line[4:] for line in out.splitlines() if line.startswith("===")]
    assert titles == ["dense", *(f"{name}, prune 0.5" for name in PRESETS)]
    for name in PRESETS:
        main([*flags, "--preset", name])
        assert capsys.readouterr().out in out


def test_compare_has_a_ratio_of_its_own(checkpoint, capsys):
    main([str(checkpoint), "--prompt", LONG, "--compare", "--json", *RUN])
    results = json.loads(capsys.readouterr().out)["results"]
    ratios = [result["filter"] and result["filter"]["prune"] for result in results]
    assert ratios == [None, *[0.3] * len(PRESETS)]


def test_every_filter_field_can_be_overridden(checkpoint, capsys):
    values = {
        "prune": 0.5,
        "mode": "cache",
        "recent": 3,
        "schedule": "head",
        "gamma": 0.8,
        "warmup": 5,
        "history": 9,
        "fusion": "key",
        "keys": "unrotated",
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", value)]
    result = first_result(capsys, checkpoint, "--prompt", LONG, *flags, *RUN)
    assert result["filter"] == values


@pytest.mark.parametrize(
    "flags, title",
    [
        (
            "--mode local --recent 32 --schedule uniform",
            "paper, mode local, recent 32, schedule uniform, prune 0.5",
        ),
        (
            "--preset cache --recent 0 --gamma 0.99",
            "cache, recent 0, gamma 0.99, prune 0.5",
        ),
        ("--preset local --recent 32", "local, prune 0.5"),
        ("", "paper, prune 0.5"),
    ],
)
def test_a_title_says_what_was_run(checkpoint, capsys, tmp_path, flags, title):
    page = tmp_path / "skips.HTML"
    flags = [str(checkpoint), "--prompt", LONG, "--prune", "0.5", *flags.split(), *RUN]
    main([*flags, "--skip-map", str(page)])
    err = capsys.readouterr().err
    assert f"\n{title}: prefill" in f"\n{err}"
    assert f"{page}: the page" in err
    assert f'"title":"{title}"' in page.read_text()
    assert first_result(capsys, *flags)["setting"] == title.removesuffix(", prune 0.5")


@pytest.mark.parametrize("name", PRESETS)
def test_a_text_within_the_warm_up_is_said_not_to_be_filtered(checkpoint, capsys, name):
    flags = ["--prune", "0.5", "--preset", name, "--warmup", "16", "--max-new-tokens", "4"]
    main([str(checkpoint), "--prompt", "a", *flags])
    err = capsys.readouterr().err
    assert "the first 16 tokens of a text (the warm-up) are not filtered" in err
    assert "billion" not in err


@pytest.mark.parametrize("name", PRESETS)
def test_a_small_model_without_attention_is_said_to_answer_badly(checkpoint, capsys, name):
    flags = ["--prune", "0.5", "--preset", name, "--max-new-tokens", "4"]
    main([str(checkpoint), "--prompt", LONG, *flags])
    err = capsys.readouterr().err
    assert "warm-up" not in err
    assert ("models below a billion parameters" in err) == (name == "paper")


# -------------------------------------------------------------------------------------- --compile


def count_compiled(monkeypatch):
    """Have torch.compile run each graph as it is, which takes seconds less: the list of graphs."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    return compiled


def test_compile_changes_nothing_but_the_time(checkpoint, capsys, monkeypatch):
    """test_decode.py has the real backend."""
    compiled = count_compiled(monkeypatch)
    flags = [str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--preset", "local", *RUN]
    main(flags)
    text = capsys.readouterr().out
    assert not compiled
    main([*flags, "--compile"])
    assert capsys.readouterr().out == text
    assert len(compiled) > 1  # the trial, and a block


def test_without_a_compiler_compile_says_so_in_one_line(checkpoint, capsys):
    flags = [str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--preset", "local", *RUN]
    main(flags)
    text = capsys.readouterr().out
    torch.compiler.reset()
    no_compiler = {"cpp.cxx": ("no/such/compiler",)}
    with torch._inductor.config.patch(no_compiler):  # monkeypatch would leave it broken
        main([*flags, "--compile"])
    out, err = capsys.readouterr()
    notes = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("note: ")]
    assert out == text
    assert len(notes) == 1
    assert "Traceback" not in err
    start = "note: torch.compile does not work here, so nothing is compiled: "
    assert notes[0].startswith(start)
    assert "C++ compiler" in notes[0]


def test_compiling_is_said_and_left_out_of_the_speed(checkpoint, capsys, monkeypatch):
    """Also what a cache that grows and rows that leave need compiled."""
    compiled = count_compiled(monkeypatch)
    compiled_late = []
    generate_answers = generate_command.generate_answers

    def timed(*arguments):
        n_before = len(compiled)
        result = generate_answers(*arguments)
        compiled_late.append(len(compiled) - n_before)
        return result

    monkeypatch.setattr(generate_command, "generate_answers", timed)
    prompts = ["--prompt", LONG, "--prompt", "fox", "--prompt", "the dog"]
    settings = ["--compare", "--prune", "0.5", "--compile", "--max-new-tokens", "60"]
    main([str(checkpoint), *prompts, *settings, "--device", "cpu"])
    assert capsys.readouterr().err.count("compiling ...\n") == 1
    assert compiled_late == [0] * 4
    assert len(compiled) > 4


# ----------------------------------------------------------------------------------------- Ctrl-C


def interrupt_after(monkeypatch, n_tokens):
    """Have generate() end in Ctrl-C after so many tokens."""

    def interrupted(*arguments, **options):
        for number, step in enumerate(generate(*arguments, **options)):
            if number == n_tokens:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(generation, "generate", interrupted)


@pytest.mark.parametrize("more", [[], ["--prompt", "low"], ["--prompt", "low", "--json"]])
def test_ctrl_c_keeps_what_was_generated(checkpoint, capsys, monkeypatch, more):
    interrupt_after(monkeypatch, 7)
    limit = ["--ignore-eos", "--max-new-tokens", "40"]
    with pytest.raises(SystemExit) as end:
        main([str(checkpoint), "--prompt", "hello", *limit, *more])
    out, err = capsys.readouterr()
    assert end.value.code == 130
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in err
    assert out.endswith("\n")
    if "--json" in more:
        first, second = json.loads(out)["results"][0]["texts"]
        assert first
        assert second
    elif more:
        assert "[1] hello\n" in out
        assert "[2] low\n" in out
    else:
        assert out.removeprefix("hello\n").strip("\n")


def test_ctrl_c_ends_a_comparison(checkpoint, capsys, monkeypatch):
    interrupt_after(monkeypatch, 7)
    with pytest.raises(SystemExit):
        main([str(checkpoint), "--prompt", LONG, "--compare", "--json", *RUN])
    out = capsys.readouterr().out
    assert [result["setting"] for result in json.loads(out)["results"]] == ["dense"]


HALF = "Hi \U0001f600"  # of which the last token is left out
HELD = "Hi\nUs"
WHOLE = "Yes\nUs"


@pytest.mark.parametrize("case", ["half a letter", "held back", "one had ended"])
def test_ctrl_c_leaves_out_what_was_not_certain(demo, capsys, monkeypatch, case):
    """Half a letter, and what may be the start of a stop text; not of an answer that had ended."""
    tokenizer = Tokenizer(demo)
    [eos] = tokenizer.eos_ids
    held = [(0, token) for token in tokenizer.encode(HELD)]
    if case == "half a letter":
        steps = [(0, token) for token in tokenizer.encode(HALF)[:-1]]
        expected = ["Hi "]
    elif case == "held back":
        steps = held
        expected = ["Hi"]
    else:
        steps = [(1, token) for token in [*tokenizer.encode(WHOLE), eos]] + held
        expected = ["Hi", WHOLE]

    def interrupted(*_, **__):
        yield from steps
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", interrupted)
    prompts = ["--prompt", "Hello"] * len(expected)
    with pytest.raises(SystemExit):
        main([str(demo), *prompts, "--stop", "\nUser:", "--json", "--device", "cpu"])
    assert json.loads(capsys.readouterr().out)["results"][0]["texts"] == expected


@pytest.mark.parametrize("name", ["skips.html", "skips.png"])
def test_ctrl_c_before_or_while_skips_are_drawn(checkpoint, capsys, tmp_path, monkeypatch, name):
    """No file, which is said, and the text is there; test_skip_map.py says more of the file."""

    def interrupted(*_):
        raise KeyboardInterrupt

    path = tmp_path / name
    flags = [str(checkpoint), "--prompt", LONG, "--skip-map", str(path), *SKIPS, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(skip_map, "write_skip_page", interrupted)
        patch.setattr(skip_map, "draw_skip_map", interrupted)
        with pytest.raises(KeyboardInterrupt):  # of which run_command makes exit code 130
            main(flags)
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("interrupted: no ")
    assert json.loads(out)["results"][0]["texts"]

    interrupt_after(monkeypatch, 3)
    with pytest.raises(SystemExit):
        main(flags)
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.endswith(f"figures are not complete; {path} was not written")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- what was skipped


def painted(model, tokenizer, text, filter):
    """A prompt and its answer in colours, from one forward of both."""
    prompt = tokenizer.encode(text)
    answer = answer_of(generate(model, [prompt], 12, filter))
    cache = model.new_cache(1, filter)
    model(torch.tensor([prompt + answer[:-1]]), cache)
    pieces = token_pieces(tokenizer, prompt) + token_pieces(tokenizer, answer)
    return paint(pieces, len(prompt), decisions(cache)[0][:, 0])


def test_show_skips_colours_each_row(checkpoint, capsys, monkeypatch):
    model, tokenizer = load(checkpoint, "cpu", "float64")
    filter = preset("cache", prune=0.5)
    first = painted(model, tokenizer, LONG, filter)
    second = painted(model, tokenizer, "fox " * 20, filter)
    assert "48;5;" in first
    assert "48;5;" in second

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    flags = [str(checkpoint), "--prompt", LONG, "--show-skips"]
    main([*flags, *SKIPS])
    assert capsys.readouterr().out == f"{paint_legend()}\n{first}\n"
    main([*flags, "--prompt", "fox " * 20, *SKIPS])
    assert capsys.readouterr().out == f"{paint_legend()}\n[1] {first}\n[2] {second}\n"
    main([*flags, "--compare", "--prune", "0.5", "--dtype", "float64", *RUN])
    _, dense, *filtered = capsys.readouterr().out.split("===")
    assert "48;5;" not in dense
    assert BOLD in dense
    assert all("48;5;" in text for text in filtered)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_colour_without_a_terminal_or_with_no_color(
    checkpoint, capsys, monkeypatch, is_terminal
):
    flags = [str(checkpoint), "--prompt", LONG, *SKIPS]
    main(flags)
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setenv("NO_COLOR", "1" if is_terminal else "")  # empty counts as not set
    main([*flags, "--show-skips"])
    out, err = capsys.readouterr()
    assert out == plain
    assert "\033" not in out
    assert "note: --show-skips has no effect" in err


def test_skip_map_is_written_beside_the_output(checkpoint, capsys, tmp_path):
    flags = [checkpoint, "--prompt", LONG, *SKIPS]
    without = first_result(capsys, *flags)
    path = tmp_path / "map.png"
    assert first_result(capsys, *flags, "--skip-map", path)["texts"] == without["texts"]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --------------------------------------------------------------------------------------- bad input


def test_no_room_for_new_tokens_is_said_before_weights_are_read(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("load_weights.load", lambda *_, **__: pytest.fail("too late"))
    for many in (200, 10**9):
        line = refused(capsys, checkpoint, "--prompt", "a", "--max-new-tokens", many)
        assert f"--max-new-tokens {many} leaves no room for a prompt" in line


@pytest.fixture
def overflowing(checkpoint, tmp_path):
    """A checkpoint whose layer 1 leaves the range of float16."""
    folder = shutil.copytree(checkpoint, tmp_path / "overflowing")
    name = "model.layers.1.mlp.up_proj.weight"
    [shard] = [file for file in folder.glob("*.safetensors") if name in load_file(file)]
    weights = load_file(shard)
    weights[name][:] = 6e4
    save_file(weights, shard, metadata={"format": "pt"})
    return folder


NOT_FINITE = (
    "error: float16 is not enough for this model: from layer 1 on, values are not finite; "
    "use --dtype bfloat16 or float32 or float64"
)


@pytest.mark.parametrize(
    "more", [[], ["--temperature", 1], ["--prune", 0.5], ["--prompt", "x", "--json"]], ids=str
)
def test_values_that_are_not_finite_end_in_a_line_that_names_the_layer(overflowing, capsys, more):
    flags = ["--prompt", LONG, "--dtype", "float16", *more]
    assert refused(capsys, overflowing, *flags) == NOT_FINITE


def test_perplexity_names_the_layer_too_and_writes_nothing(overflowing, capsys, tmp_path):
    (tmp_path / "text").write_text(LONG)
    table = tmp_path / "table.json"
    flags = ["--text", tmp_path / "text", "--json", table, "--window", 30, "--dtype", "float16"]
    with pytest.raises(SystemExit) as end:
        eval_ppl.main([str(overflowing), *(str(flag) for flag in flags)])
    assert end.value.code == 2
    assert NOT_FINITE in capsys.readouterr().err
    assert not table.exists()


PRUNE = ["--prune", "0.5"]
A = ["--prompt", "a"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        # --prune and the filter's flags
        (["--prune", "1.5"], "--prune: 1.5 is not a number in [0, 1)"),
        (["--prune", "nan"], "--prune: nan is not a number in [0, 1)"),
        (["--prune", "half"], "--prune: half is not a number in [0, 1)"),
        ([*PRUNE, "--gamma", "1"], "--gamma: 1 is not a number in [0, 1)"),
        ([*PRUNE, "--recent", "-1"], "--recent: -1 is not a whole number of at least 0"),
        ([*PRUNE, "--mode", "attention"], "--mode: invalid choice: 'attention'"),
        (["--preset", "cache"], "--preset does nothing without --prune above 0"),
        (["--preset", "cache", "--prune", "0"], "--preset does nothing without --prune above 0"),
        (["--recent", "3"], "--recent does nothing without --prune above 0"),
        (["--compare", "--prune", "0"], "--compare does nothing without --prune above 0"),
        (["--compare", "--recent", "3"], "cannot be combined with --recent"),
        (["--compare", "--preset", "cache"], "cannot be combined with --preset"),
        # the answer
        (["--max-new-tokens", "0"], "--max-new-tokens: 0 is not a whole number of at least 1"),
        (["--max-new-tokens", "2.5"], "--max-new-tokens: 2.5 is not a whole number"),
        (["--stop", ""], "--stop is empty: it would end every answer at once"),
        (["--stop", "\udce9"], "--stop is not UTF-8 text"),
        (["--system", "\udce9", "--chat"], "--system is not UTF-8 text"),
        (["--system", "x"], "--system does nothing without --chat"),
        # sampling
        (["--temperature", "nan"], "--temperature: nan is not a finite number of at least 0"),
        (["--temperature", "inf"], "--temperature: inf is not a finite number of at least 0"),
        (["--temperature", "-1"], "--temperature: -1 is not a finite number of at least 0"),
        (["--temperature", "1", "--top-k", "-1"], "--top-k: -1 is not a whole number"),
        (["--temperature", "1", "--top-p", "0"], "--top-p: 0 is not a number above 0 and at most"),
        (["--temperature", "1", "--top-p", "nan"], "--top-p: nan is not a number above 0"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p: 1.5 is not a number above 0"),
        (["--temperature", "1", "--seed", "-1"], "--seed: -1 is not a whole number of at least 0"),
        (["--temperature", "1", "--seed", str(2**64)], "at least 0 and below 9223372036854775808"),
        (["--top-k", "3"], "--top-k does nothing without --temperature"),
        (["--top-p", "0.5"], "--top-p does nothing without --temperature"),
        (["--seed", "0"], "--seed does nothing without --temperature"),
        (["--num-samples", "2"], "--num-samples does nothing without --temperature"),
        (["--num-samples", "0"], "--num-samples: 0 is not a whole number of at least 1"),
        (
            [*A, "--num-samples", "2", "--temperature", "1"],
            "--num-samples is for one prompt, and here are 2",
        ),
        # skips
        (["--show-skips"], "--show-skips does nothing without --prune above 0"),
        (["--skip-map", "x.png", "--prune", "0"], "--skip-map does nothing without --prune above"),
        (["--show-skips", *PRUNE, "--json"], "cannot be combined with --json"),
        (["--show-skips", *PRUNE, "--no-echo"], "cannot be combined with --no-echo"),
        (["--skip-map", "x.png", "--compare"], "draws one prompt with one setting"),
        ([*A, "--skip-map", "x.png", *PRUNE], "draws one prompt with one setting"),
        (["--skip-map", "x.jpg", *PRUNE], "x.jpg: the name must end in .html, .png"),
        (["--skip-map", "x.HTM", *PRUNE], "x.HTM: the name must end in .html, .png"),
        (["--skip-map", "no/such/x.HTML", *PRUNE], "no/such/x.HTML: cannot be written: No such"),
        (["--skip-map", "no/such/x.PNG", *PRUNE], "no/such/x.PNG: cannot be written: No such"),
        (["--skip-map", "no/such/x.png", *PRUNE], "no/such/x.png: cannot be written: No such"),
        # the checkpoint
        (["--device", "abacus"], "abacus"),
    ],
    ids=str,
)
def test_bad_flags_beside_a_prompt(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, *A, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "no prompt: give --prompt TEXT or --prompts-file FILE"),
        (["--prompt", ""], "prompt 1 is empty"),
        (["--prompt", "a", "--prompt", ""], "prompt 2 is empty"),
        (["--prompt", "-", "--prompts-file", "-"], "stdin (-) can be read only once"),
        (["--prompt", "-", "--prompt", "-"], "stdin (-) can be read only once"),
        (["--prompts-file", "no/such/file"], "no/such/file: cannot be read: No such file"),
        (
            ["--prompt", LONG, "--max-new-tokens", "190"],
            "longer than the model's context of 200",
        ),
    ],
    ids=str,
)
def test_bad_prompts(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, *flags)


@pytest.mark.parametrize("given", NOT_UTF_8)
def test_a_prompts_file_that_is_not_utf_8_is_refused(checkpoint, capsys, tmp_path, given):
    (tmp_path / "prompts").write_bytes(given)
    line = refused(capsys, checkpoint, "--prompts-file", tmp_path / "prompts")
    assert "cannot be read as UTF-8 text" in line


def test_what_keeps_a_skip_map_from_being_drawn_is_found_before_the_work(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "folder.png").mkdir()
    flags = [tmp_path / "no checkpoint", "--prompt", "a", "--prune", "0.5", "--skip-map"]
    line = refused(capsys, *flags, tmp_path / "folder.png")
    assert "folder.png: cannot be written: Is a directory" in line
    assert "no such folder" in refused(capsys, *flags, tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()  # trying left nothing behind
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--skip-map needs matplotlib: " in refused(capsys, *flags, tmp_path / "map.png")
