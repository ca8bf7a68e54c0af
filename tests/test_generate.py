"""Generation equals re-scoring, rows do not disturb each other, the command says what went wrong in one line."""

import argparse
import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import command_line

import pytest
import torch

import eval_ppl
import generate as generate_module
import skip_map
import token_filter
from generate import Stats, generate, main, row_seed, sample, sample_rows
from load_weights import Tokenizer, load
from model import Transformer
from skip_map import BOLD, Decisions, decisions, paint, paint_legend, token_pieces
from test_model import LENGTHS, small, texts
from token_filter import PRESETS, preset

PROMPTS = [texts()[row, :length].tolist() for row, length in enumerate(LENGTHS)]
FILTERS = [None] + [preset(name, prune=0.5) for name in PRESETS]


def collect(n_rows, steps):
    rows = [[] for _ in range(n_rows)]
    for row, token in steps:
        rows[row].append(token)
    return rows


# -------------------------------------------------------------------------------------------------- from Python


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_greedy_generation_equals_rescoring(filter):
    """Feeding prompt and answer in one go, each token of the answer is the likeliest after what is before it."""
    model = small()
    for prompt, answer in zip(PROMPTS, collect(3, generate(model, PROMPTS, 25, filter, chunk=32))):
        logits = model(torch.tensor([prompt + answer]), model.new_cache(1, filter))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_rows_do_not_depend_on_each_other_and_leave_at_eos(filter, temperature):
    model = small()
    free = collect(3, generate(model, PROMPTS, 20, filter, temperature=temperature))
    eos = {free[0][3], free[2][7]}  # ends the rows at different steps
    ended = collect(3, generate(model, PROMPTS, 20, filter, eos, temperature=temperature))
    for row, tokens in enumerate(free):
        stop = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
        assert ended[row] == tokens[:stop]
        own = [row_seed(0, row)]
        alone = collect(1, generate(model, [PROMPTS[row]], 20, filter, eos, temperature=temperature, seed=own))
        assert alone[0] == ended[row]
    assert len(ended[0]) <= 3 and len(ended[2]) <= 7


def test_rows_that_ended_are_no_longer_fed(monkeypatch):
    model, sizes = small(), []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, t, *a, **k: sizes.append(len(t)) or forward(self, t, *a, **k))
    free = collect(3, generate(model, PROMPTS, 10))
    sizes.clear()
    ended = collect(3, generate(model, PROMPTS, 10, eos_ids={free[0][2]}))
    # one prefill of all three; then a row is fed once for every token it gave, but the last one at the limit
    assert sum(sizes[1:]) == sum(len(row) - (len(row) == 10) for row in ended)


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_stats_add_up(filter):
    """Rows end at different steps; each counts as if it had been fed alone."""
    model, stats = small(), Stats()
    eos = {collect(3, generate(model, PROMPTS, 20, filter))[0][5]}
    answers = collect(3, generate(model, PROMPTS, 20, filter, eos, stats=stats))
    assert len(set(map(len, answers))) > 1
    usage = torch.zeros(5, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        cache = model.new_cache(1, filter)
        model(torch.tensor([prompt + answer[:19]]), cache)  # a 20th is not fed back
        redundant = decisions(cache)[0]
        assert stats.rows[row]["skipped"] == redundant.sum()
        assert [*stats.rows[row].values()] == cache.usage()[0].tolist()
        usage += cache.usage()[0]
    pairs, skipped, held, read, dense_read = usage.tolist()
    assert pairs > held > 0 or filter is None
    assert (stats.skip_ratio, stats.kv_held, stats.kv_read) == (skipped / pairs, held / pairs, read / dense_read)
    if filter is None:
        assert (stats.skip_ratio, stats.kv_held, stats.kv_read) == (0, 1, 1)
    ended = sum(len(answer) < 20 for answer in answers)  # by a token that is sampled, and not yielded
    assert (stats.prompt_tokens, stats.new_tokens) == (sum(LENGTHS), sum(map(len, answers)) + ended)
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    megabytes = held * 2 * 2 * 8 * 8 / 1e6  # K and V, 2 heads of 8 float64s
    assert stats.line().endswith(
        f"skipped {skipped / pairs:.1%} of (token, layer) pairs; "
        f"KV held {held / pairs:.0%} ({megabytes:.2f} MB), read {read / dense_read:.0%} of dense"
    )


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_what_prompts_have_in_common_is_fed_once(filter, monkeypatch):
    """And equal prompts are; each is answered as if alone."""
    monkeypatch.setattr(generate_module, "SHARED", 40)
    model, fed, forward = small(), [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, t, *a, **k: fed.append(t) or forward(self, t, *a, **k))
    prompts = [texts()[0, :50].tolist() + end for end in ([1, 2, 3], [4], [1, 2, 3], [5, 6])]
    alone = [collect(1, generate(model, [prompt], 9, filter))[0] for prompt in prompts]
    for some, tokens in ((prompts, 50 + 3 + 1 + 2), ([prompts[0]] * 3, 53), ([prompts[1], PROMPTS[1]], 51 + LENGTHS[1])):
        fed.clear()
        stats = Stats()
        answers = collect(len(some), generate(model, some, 9, filter, stats=stats))
        assert answers[0] == alone[prompts.index(some[0])] and (some != prompts or answers == alone)
        assert stats.prompt_tokens == tokens
    assert fed[0].shape[0] == 2  # these begin otherwise


def test_a_random_number_belongs_to_a_token():
    """What draws by chance draws what it should, and a small change of the logits moves few draws; equals go by id."""
    logits = torch.linspace(2, -2, 256)
    moved = logits.clone()
    moved[255] = logits[0] + 1e-3  # the least likely becomes the likeliest, all ranks move
    seeds = [torch.Generator().manual_seed(s) for s in range(400)]
    before, after = ([sample(each, 1.0, rng=rng.manual_seed(rng.initial_seed())) for rng in seeds] for each in (logits, moved))
    assert sum(a != b for a, b in zip(before, after)) < 30
    rng, p = torch.Generator().manual_seed(0), torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = torch.tensor([sample(p.log(), 1.0, rng=rng) for _ in range(4000)]).bincount(minlength=4)
    assert ((counts / 4000 - p).abs() < 0.03).all()
    assert {sample(torch.zeros(50), 1.0, top_k=1, rng=rng) for _ in range(20)} == {0} == {sample(torch.zeros(50))}
    assert sample(torch.tensor([1.0, 3.0, 2.0]), 1e-308, rng=rng) == sample(torch.tensor([1.0, 3.0, 2.0]), 5e-324, rng=rng) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0},
        {"top_p": float("nan")}, {"top_p": 1.5}, {"seed": -1}, {"seed": 2**64}, {"max_new_tokens": 0}, {"chunk": 0},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(wrong, checkpoint, capsys):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} is "):
        generate(small(), PROMPTS, **{"max_new_tokens": 4, "temperature": 1.0} | wrong)
    if name != "chunk":
        flag = f"--{name.replace('_', '-')}"
        assert refused(capsys, checkpoint, "--prompt", "a", "--temperature", 1, flag, wrong[name]).startswith(f"error: {flag} is ")


def test_values_that_are_not_finite_end_in_a_line_that_names_the_layer(checkpoint, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (shard,) = (file for file in tmp_path.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in load_file(file))
    weights = load_file(shard)
    weights["model.layers.1.mlp.up_proj.weight"][:] = 6e4
    save_file(weights, shard, metadata={"format": "pt"})
    (tmp_path / "text").write_text(LONG)
    line = "error: float16 is not enough for this model: from layer 1 on, values are not finite; use --dtype bfloat16 or float32 or float64"
    for more in ([], ["--temperature", 1], ["--prune", 0.5], ["--prompt", "x", "--json"]):
        assert refused(capsys, tmp_path, "--prompt", LONG, "--dtype", "float16", *more) == line
    with pytest.raises(SystemExit) as end:
        files = ["--text", str(tmp_path / "text"), "--json", str(tmp_path / "j")]
        eval_ppl.main([str(tmp_path), *files, "--window", "30", "--dtype", "float16"])
    assert end.value.code == 2 and line in capsys.readouterr().err and not (tmp_path / "j").exists()


def test_a_text_within_the_warm_up_is_said_not_to_be_filtered(checkpoint, capsys):
    for preset_name in PRESETS:
        main([str(checkpoint), "--prompt", "a", "--prune", "0.5", "--preset", preset_name, "--max-new-tokens", "4"])
        err = capsys.readouterr().err
        assert "the first 16 tokens of a text (the warm-up) are not filtered" in err and "billion" not in err
    main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--preset", "paper", "--max-new-tokens", "4"])
    err = capsys.readouterr().err
    assert "warm-up" not in err and "billion" in err


def test_lines_of_a_prompts_file(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts").write_bytes("\ufeffhello\r\nhel\u2028lo\x0b\x85x\rhello\n\n".encode())
    main([str(checkpoint), "--prompts-file", str(tmp_path / "prompts"), "--json", "--max-new-tokens", "3"])
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == ["hello", "hel\u2028lo\x0b\x85x", "hello"]
    assert result["results"][0]["texts"][0] == result["results"][0]["texts"][2]


SHELL = f"{shlex.quote(sys.executable)} {shlex.quote(generate_module.__file__)} CHECKPOINT --prompt hello --ignore-eos --max-new-tokens 40"


@pytest.mark.parametrize(
    "command, code, words",
    [
        (f"{SHELL} 2>&-", 0, ""),
        (f"{SHELL} 2>/dev/full", 0, ""),
        (f"{SHELL} >&-", 2, "error: stdout is closed"),
        (f"{SHELL} >/dev/full", 2, "error: cannot write or read: No space left on device"),
        (f"{SHELL} --json >/dev/full", 2, "error: cannot write or read: No space left on device"),
        (f"PYTHONIOENCODING=cp1252 {SHELL}", 0, "decode"),
        (f"PYTHONIOENCODING=ascii {SHELL} --json", 0, ""),
        (f"{SHELL} --prompt caf$'\\xe9'", 2, "error: --prompt is not UTF-8 text"),
        (f"{SHELL.replace('CHECKPOINT', '/none')} 2>&-", 2, ""),
    ],
)
def test_streams_and_encodings(checkpoint, command, code, words):
    done = subprocess.run(["bash", "-c", command.replace("CHECKPOINT", shlex.quote(str(checkpoint)))], capture_output=True, check=False)
    lines = done.stderr.decode().replace("\r", "\n").splitlines()
    assert (done.returncode, bool(done.stdout)) == (code, code == 0 and ">/dev/full" not in command.replace("2>", "")), lines
    assert words in (lines or [""])[-1] and not any("Traceback" in line for line in lines)
    if "--json" in command and done.stdout:
        assert json.loads(done.stdout)["prompts"] == ["hello"]


def test_ctrl_c_leaves_out_what_was_not_certain(demo, capsys, monkeypatch):
    """Half a letter, and what may be the start of a stop text; but not of an answer that had ended before."""
    tokenizer = Tokenizer(demo)
    half = tokenizer.encode("Hi \U0001f600")[:-1]
    steps = {"half": [(0, token) for token in half], "held": [(0, token) for token in tokenizer.encode("Hi\nUs")]}
    (end,) = tokenizer.eos_ids
    steps["ended"] = [(1, token) for token in [*tokenizer.encode("Yes\nUs"), end]] + steps["held"]
    for name, answers in (("half", ["Hi "]), ("held", ["Hi"]), ("ended", ["Hi", "Yes\nUs"])):

        def stopped(*_, given=steps[name], **__):
            yield from given
            raise KeyboardInterrupt

        monkeypatch.setattr(generate_module, "generate", stopped)
        prompts = [word for _ in answers for word in ("--prompt", "Hello")]
        with pytest.raises(SystemExit):
            main([str(demo), *prompts, "--stop", "\nUser:", "--json", "--device", "cpu"])
        assert json.loads(capsys.readouterr().out)["results"][0]["texts"] == answers


@pytest.mark.parametrize("more", [[], ["--prompt", "low"], ["--prompt", "low", "--json"]])
def test_ctrl_c_keeps_what_was_generated(checkpoint, capsys, monkeypatch, more):
    plain = generate_module.generate

    def stopped(*arguments, **options):
        for number, step in enumerate(plain(*arguments, **options)):
            if number == 7:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(generate_module, "generate", stopped)
    with pytest.raises(SystemExit) as end:
        main([str(checkpoint), "--prompt", "hello", "--ignore-eos", "--max-new-tokens", "40", *more])
    out, err = capsys.readouterr()
    assert end.value.code == 130 and err.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in err
    texts = json.loads(out)["results"][0]["texts"] if "--json" in more else [out]
    assert all(texts) and out.endswith("\n") and ("[2] low\n" in out or more != ["--prompt", "low"])


def test_sampling():
    logits = torch.tensor([2.0, 0.0, 3.0, 1.0])
    assert sample(logits) == sample(logits, 1.0, top_k=1) == sample(logits, 1.0, top_p=0.1) == 2
    rng = torch.Generator().manual_seed(0)
    drawn = torch.bincount(torch.tensor([sample(logits, 0.5, rng=rng) for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(drawn, (logits / 0.5).softmax(0), atol=0.03, rtol=0)
    assert {sample(logits, 2.0, top_k=2, rng=rng) for _ in range(200)} == {0, 2}
    assert {sample(logits, 1.0, top_p=0.7, rng=rng) for _ in range(200)} == {0, 2}  # 0.64 alone is not enough


def sorted_sample(logits, temperature, top_k, top_p, rng):
    """The rule of sample_rows for one row, as plainly as it can be said."""
    logits, order = ((logits.double() - logits.max()) / temperature).sort(descending=True, stable=True)
    probabilities = logits[: top_k or None].softmax(0)
    before = torch.cat((torch.zeros(1), probabilities.cumsum(0)[:-1]))
    probabilities[before >= top_p] = 0  # the likeliest always stays
    noise = torch.empty(len(logits), dtype=torch.float64).exponential_(generator=rng)
    return int(order[(probabilities / noise[order[: len(probabilities)]]).argmax()])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0, 5e-324])
@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 2000])
@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.5, 0.8, 0.9, 1.0])
def test_rows_are_sampled_together_as_one_by_one(temperature, top_k, top_p):
    """Peaked, flat, with many ties, all alike; where rounding alone decides whether a token is within top_p, too."""
    for logits in (torch.zeros(40, 10), torch.zeros(40, 50), 3 * torch.randn(20, 3000), torch.randn(40, 300).bfloat16(),
                   torch.randn(40, 100).round(), torch.tensor([0.05, 0.5, 0.15, 0.3, 0.0]).log().expand(40, 5)):  # fmt: skip
        seeds = [[torch.Generator().manual_seed(row) for row in range(len(logits))] for _ in range(2)]
        found = sample_rows(logits, temperature, top_k, top_p, seeds[0])
        assert found.dtype == torch.int64
        assert found.tolist() == [sorted_sample(row, temperature, top_k, top_p, rng) for row, rng in zip(logits, seeds[1])]
        assert all(a.get_state().equal(b.get_state()) for a, b in zip(*seeds))  # and so it goes on


@pytest.mark.parametrize("prompts, new, message", [
    ([], 5, "no prompt"), ([[1], []], 5, "prompt 2 is empty"), ([[1] * 500], 13, "longer than the model's context of 512"),
    ([[1], [2, -1]], 5, "prompt 2 has the token -1"), ([[-100, 5]], 5, "prompt 1 has the token -100"), ([[1, 10**6]], 5, "token 1000000"),
    (["text"], 5, "token ids"), ("text", 5, "token ids"), ([1, 2], 5, "token ids"), ([[1.0]], 5, "token ids"), (None, 5, "token ids"),
    ([[1]], "5", "max_new_tokens is '5'"), ([[1]], 2.5, "max_new_tokens is 2.5"),
])  # fmt: skip
def test_bad_prompts_are_refused_at_once(prompts, new, message):
    with pytest.raises(ValueError, match=message):
        generate(small(), prompts, new)


@pytest.mark.parametrize("seed, message", [
    ([1, 2], "seed has 2 numbers for 3 prompts"), ([1, 2, -3], "seed is -3, not a whole number"), ("123", "seed is '123', not a whole"),
])  # fmt: skip
def test_seeds_of_rows_are_as_many_as_there_are_prompts(seed, message):
    with pytest.raises(ValueError, match=message):
        generate(small(), PROMPTS, 5, seed=seed)


def test_no_two_seeds_or_rows_have_random_numbers_in_common():
    """Neighbours, sums that are equal, and seeds that are equal in their lower 32 bits, as all that torch's CPU generator takes."""
    seeds = (0, 1, 2, 3, 7, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 1)
    starts = [torch.rand(3, generator=torch.Generator().manual_seed(row_seed(seed, row))) for seed in seeds for row in range(40)]
    assert len({tuple(start.tolist()) for start in starts}) == len(starts)
    model, prompt = small(), PROMPTS[0]
    samples = [tuple(row) for seed in (0, 1, 2**32) for row in collect(5, generate(model, [prompt] * 5, 12, temperature=1.0, seed=seed))]
    assert len(set(samples)) == 15
    shuffled = collect(5, generate(model, [prompt, PROMPTS[1], prompt, PROMPTS[2], prompt], 12, temperature=1.0))
    assert [tuple(shuffled[row]) for row in (0, 2, 4)] == [samples[row] for row in (0, 2, 4)]


def test_a_cache_is_of_the_filter_that_is_asked_for():
    model = small()
    some, other = preset("cache", prune=0.5), preset("cache", prune=0.3)
    for asked, made in ((some, None), (None, some), (some, other)):
        with pytest.raises(ValueError, match=r"filter is .*but the cache was made for") as error:
            generate(model, PROMPTS, 5, asked, cache=model.new_cache(3, made))
        for filter in (asked, made):
            assert repr(filter or token_filter.FilterConfig(prune=0.0)) in str(error.value)
    for asked, made in ((preset("local", prune=0.0), None), (preset("local", prune=0.5), preset("local", prune=0.5))):
        steps = list(generate(model, PROMPTS, 5, asked, cache=model.new_cache(3, made)))
        assert steps == list(generate(model, PROMPTS, 5, asked))


def test_a_preset_s_name_is_no_filter():
    with pytest.raises(ValueError, match=r"filter is 'cache', not None or a FilterConfig"):
        generate(small(), PROMPTS, 5, "cache")
    assert collect(1, generate(small(), torch.tensor([PROMPTS[0]]), 5)) == collect(1, generate(small(), PROMPTS[:1], 5))


# ---------------------------------------------------------------------------------------------- what was skipped


@pytest.mark.parametrize("name", PRESETS)
def test_watched_decisions_are_those_of_one_forward(name):
    """In a batch of ragged prompts whose rows end at different steps, chunked or not."""
    model, filter = small(), preset(name, prune=0.5)
    free = collect(3, generate(model, PROMPTS, 20, filter))
    watched = Decisions(3, 4)
    answers = collect(3, generate(model, PROMPTS, 20, filter, {free[0][3], free[2][7]}, chunk=16, watch=watched.watch))
    assert len(set(map(len, answers))) > 1
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        cache = model.new_cache(1, filter)
        model(torch.tensor([prompt + answer[:19]]), cache)  # a 20th is not fed back
        redundant, score = decisions(cache)
        assert watched.redundant[row].any()
        assert torch.equal(watched.redundant[row], redundant[:, 0])
        torch.testing.assert_close(watched.score[row], score[:, 0].to(watched.score[row].dtype), rtol=0, atol=1e-6, equal_nan=True)


# --------------------------------------------------------------------------------------------- the command line


LONG = "the quick brown fox " * 3
RUN = ["--max-new-tokens", "12", "--ignore-eos", "--device", "cpu"]


def test_one_prompt_streams_what_json_reports(checkpoint, capsys):
    main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", *RUN])
    streamed, figures = capsys.readouterr()
    main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--json", *RUN])
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert streamed == f"{LONG}\n{result['texts'][0]}\n"
    assert f"skipped {result['skip_ratio']:.1%} of (token, layer) pairs; KV held {result['kv_held']:.0%} (" in figures
    assert f"read {result['kv_read']:.0%} of dense" in figures
    assert 0.1 < result["skip_ratio"] < 0.6 and 0.3 < result["kv_held"] < 0.9 and 0.2 < result["kv_read"] < 0.9
    assert "note: models below a billion parameters" in figures
    assert result["filter"]["prune"] == 0.5 and result["new_tokens"] == 12
    model, tokenizer = load(checkpoint, "cpu")
    ids = [token for _, token in generate(model, [tokenizer.encode(LONG)], 12, preset("paper", prune=0.5))]
    assert tokenizer.decode(ids) == result["texts"][0]


def test_a_batch_gives_each_prompts_own_text(checkpoint, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{LONG}\n\nfox\n", encoding="utf-8")
    flags = ["--preset", "cache", "--prune", "0.4", "--json", *RUN]
    main([str(checkpoint), "--prompt", "a", "--prompts-file", str(tmp_path / "prompts.txt"), *flags])
    batch = json.loads(capsys.readouterr().out)
    assert batch["prompts"] == ["a", LONG, "fox"]
    for prompt, text in zip(batch["prompts"], batch["results"][0]["texts"]):
        main([str(checkpoint), "--prompt", prompt, *flags])
        assert json.loads(capsys.readouterr().out)["results"][0]["texts"] == [text]
    main([str(checkpoint), "--prompt", "a", "--prompt", "fox", "--prune", "0.4", "--preset", "cache", *RUN])
    out = capsys.readouterr().out
    assert f"[2] fox\n{batch['results'][0]['texts'][2]}\n" in out
    main([str(checkpoint), "--prompt", "a", "--prompt", "fox", "--no-echo", "--prune", "0.4", "--preset", "cache", *RUN])
    assert capsys.readouterr().out == out.replace("] a\n", "] ").replace("] fox\n", "] ")


def test_chat_puts_the_prompt_in_the_template(checkpoint, capsys):
    main([str(checkpoint), "--prompt", "fox", "--chat", "--json", *RUN])
    chat = json.loads(capsys.readouterr().out)["results"][0]
    _, tokenizer = load(checkpoint, "cpu")
    assert chat["prompt_tokens"] == len(tokenizer.encode("<s>user: fox</s>", parse_special=True))
    assert chat["filter"] is None and chat["skip_ratio"] == 0


def test_compare_runs_dense_and_every_preset(checkpoint, capsys):
    main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--compare", *RUN])
    out = capsys.readouterr().out
    assert [line[4:] for line in out.splitlines() if line.startswith("===")] == [
        "dense", *(f"{name}, prune 0.5" for name in PRESETS)
    ]  # fmt: skip
    for name in PRESETS:
        main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--preset", name, *RUN])
        assert capsys.readouterr().out in out


def test_every_filter_field_can_be_overridden(checkpoint, capsys):
    flags = "--mode cache --recent 3 --schedule head --gamma 0.8 --warmup 5 --history 9 --fusion key --keys unrotated"
    main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--json", *flags.split(), *RUN])
    used = json.loads(capsys.readouterr().out)["results"][0]["filter"]
    assert used == {"prune": 0.5, "mode": "cache", "recent": 3, "schedule": "head", "gamma": 0.8, "warmup": 5,
                    "history": 9, "fusion": "key", "keys": "unrotated"}  # fmt: skip


def test_compile_changes_nothing_but_the_time(checkpoint, capsys, monkeypatch):
    """With a backend that runs a graph as it is, which takes seconds less; test_decode.py has the real one."""
    compiled = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda graph, _: compiled.append(graph) or graph))
    flags = [str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--preset", "local", *RUN]
    main(flags)
    text, figures = capsys.readouterr()
    assert not compiled and "models below a billion" not in figures  # that note is for mode skip
    torch.compiler.reset()
    main([*flags, "--compile"])
    assert capsys.readouterr().out == text
    assert len(compiled) > 1  # the trial, and a block


def test_without_a_compiler_compile_says_so_in_one_line(checkpoint, capsys):
    flags = [str(checkpoint), "--prompt", LONG, "--prune", "0.5", "--preset", "local", *RUN]
    main(flags)
    text = capsys.readouterr().out
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no/such/compiler",)}):  # monkeypatch would leave it broken
        main([*flags, "--compile"])
    out, err = capsys.readouterr()
    notes = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("note: ")]
    assert out == text and len(notes) == 1 and "Traceback" not in err
    assert notes[0].startswith("note: torch.compile does not work here, so nothing is compiled: ") and "C++ compiler" in notes[0]


@pytest.mark.parametrize("command", ["generate", "eval_ppl", "eval_passkey", "eval_tasks", "bench", "demo_checkpoint"])
def test_help_says_something_of_every_argument(command, monkeypatch):
    if command == "eval_tasks":
        pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install -r requirements-extra.txt")
    parsers = []
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", lambda self, argv: (parsers.append(self), sys.exit()))
    with pytest.raises(SystemExit):
        importlib.import_module(command).main([])
    texts = [action.help for action in parsers[0]._actions]
    assert all(texts) and len(set(texts)) == len(texts)  # of each its own


COMMANDS = ["generate", "eval_ppl", "eval_passkey", "eval_tasks", "bench"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flags, code", [(["--help"], 0), (["--nope"], 2), (["--prune", "50"], 2), (["--prune", "0", "--gamma", "0.5"], 2)])
def test_what_is_wrong_with_flags_is_said_before_torch_is_imported(command, flags, code):
    """That alone takes seconds."""
    file = generate_module.__file__.replace("generate.py", f"{command}.py")
    program = f"import atexit, runpy, sys; atexit.register(lambda: print(*sys.modules)); runpy.run_path({file!r}, run_name='__main__')"
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {file.rpartition('/')[0]!r}); {program}", *flags]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    loaded = done.stdout.splitlines()[-1].split()
    assert done.returncode == code and not {"torch", "numpy", "tqdm"} & set(loaded) and "command_line" in loaded
    assert ("usage: " in done.stdout) == (code == 0) and len(done.stderr.splitlines()) == (code == 2)


def test_flags_are_those_of_the_filter():
    """What command_line says of them, so that torch need not be imported, is what token_filter says."""
    assert tuple(token_filter.PRESETS) == command_line.PRESETS
    assert [field.name for field in dataclasses.fields(token_filter.FilterConfig)] == ["prune", *command_line.KNOBS]
    for name, (value, allowed, _) in command_line.KNOBS.items():
        assert value == getattr(token_filter.FilterConfig, name) and type(value) is type(getattr(token_filter.FilterConfig, name))
        assert token_filter.CHOICES.get(name) == (allowed if isinstance(value, str) else None)
    checks = {"prune": command_line.PRUNE} | {name: knob[1] for name, knob in command_line.KNOBS.items() if callable(knob[1])}
    for name, allowed in checks.items():
        for text in ("-1", "-0.001", "0", "0.5", "0.999", "1", "2", "300", "NaN", "Infinity", "x"):
            outcomes = []
            for read in (allowed, lambda text, name=name: preset("paper", **{name: json.loads(text)})):
                try:
                    outcomes.append(read(text) is not None)
                except (ValueError, argparse.ArgumentTypeError):
                    outcomes.append(False)
            assert outcomes[0] == outcomes[1], (name, text)


@pytest.mark.parametrize("flags, title", [
    ("--mode local --recent 32 --schedule uniform", "paper, mode local, recent 32, schedule uniform, prune 0.5"),
    ("--preset cache --recent 0 --gamma 0.99", "cache, recent 0, gamma 0.99, prune 0.5"),
    ("--preset local --recent 32", "local, prune 0.5"), ("", "paper, prune 0.5"),
])  # fmt: skip
def test_a_title_says_what_was_run(checkpoint, capsys, tmp_path, flags, title):
    page = ["--skip-map", str(tmp_path / "skips.HTML")]
    main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", *flags.split(), *page, *RUN])
    err = capsys.readouterr().err
    assert f"\n{title}: prefill" in f"\n{err}" and f"{page[1]}: the page" in err
    assert f'"title":"{title}"' in (tmp_path / "skips.HTML").read_text()
    main([str(checkpoint), "--prompt", LONG, "--prune", "0.5", *flags.split(), "--json", *RUN])
    assert json.loads(capsys.readouterr().out)["results"][0]["setting"] == title.removesuffix(", prune 0.5")


def test_what_comes_out_equal_is_run_once(checkpoint, capsys, tmp_path):
    (tmp_path / "text").write_text(LONG * 3)
    flags = "--mode local --recent 32 --schedule uniform --fusion variance --keys rotated --prune 0.5 0.5 0.3 0 --window 64 --device cpu"
    eval_ppl.main([str(checkpoint), "--text", str(tmp_path / "text"), *flags.split()])
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith(("dense", "paper", "local", "cache"))]
    assert [row.rsplit(maxsplit=6)[0].split("  ")[0] for row in rows] == ["dense", *["paper, mode local, recent 32, schedule uniform"] * 2]
    assert "note: at --prune 0.5, local is paper, mode local, " in err and err.count("note: ") == 4


@pytest.mark.parametrize("kind", ["page", "picture"])
def test_ctrl_c_while_skips_are_drawn_leaves_no_file_and_says_so(checkpoint, capsys, tmp_path, monkeypatch, kind):
    path = tmp_path / {"page": "skips.html", "picture": "skips.png"}[kind]
    path.write_text("of before")

    def never(*_):
        raise KeyboardInterrupt

    name = {"page": "write_skip_page", "picture": "draw_skip_map"}[kind]
    flags = [str(checkpoint), "--prompt", LONG, "--skip-map", str(path), *SKIPS, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(skip_map, name, lambda part, *_: (Path(part).write_text("half"), never()))
        with pytest.raises(KeyboardInterrupt):  # as_process's business
            main(flags)
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == f"interrupted: no {kind} was written to {path}"
    assert json.loads(out)["results"][0]["texts"] and path.read_text() == "of before" and len(list(tmp_path.iterdir())) == 1
    plain = generate_module.generate
    monkeypatch.setattr(generate_module, "generate", lambda *a, **k: (never() if i == 3 else step for i, step in enumerate(plain(*a, **k))))
    with pytest.raises(SystemExit):
        main(flags)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"figures are not complete; {path} was not written")


def test_progress_is_for_a_terminal(checkpoint):
    run = [sys.executable, generate_module.__file__, checkpoint, "--prompt", "a", "--prompt", "b", "--ignore-eos", "--max-new-tokens", "60"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"dense: prefill .*\n", done.stderr)


def test_compiling_is_said_and_left_out_of_the_speed(checkpoint, capsys, monkeypatch):
    """Also what a cache that grows and rows that leave need compiled."""
    compiled, late, run = [], [], generate_module.run

    def timed(*arguments):
        before = len(compiled)
        result = run(*arguments)
        late.append(len(compiled) - before)
        return result

    monkeypatch.setattr(generate_module, "run", timed)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda graph, _: compiled.append(graph) or graph))
    torch.compiler.reset()
    prompts = ["--prompt", LONG, "--prompt", "fox", "--prompt", "the dog"]
    main([str(checkpoint), *prompts, "--compare", "--prune", "0.5", "--compile", "--max-new-tokens", "60", "--device", "cpu"])
    assert capsys.readouterr().err.count("compiling ...\n") == 1
    assert late == [0] * 4 and len(compiled) > 4


def test_no_room_for_new_tokens_is_said_before_weights_are_read(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(generate_module, "load", lambda *_, **__: pytest.fail("too late"))
    for many in (200, 10**9):
        assert f"--max-new-tokens {many} leaves no room" in refused(capsys, checkpoint, "--prompt", "a", "--max-new-tokens", many)


SKIPS = ["--prune", "0.5", "--preset", "cache", "--dtype", "float64", *RUN]


def test_show_skips_colours_each_row(checkpoint, capsys, monkeypatch):
    model, tokenizer = load(checkpoint, "cpu", "float64")
    prompts, filter = [tokenizer.encode(text) for text in (LONG, "fox " * 20)], preset("cache", prune=0.5)
    expected = []
    for prompt in prompts:
        answer = [token for _, token in generate(model, [prompt], 12, filter)]
        cache = model.new_cache(1, filter)
        model(torch.tensor([prompt + answer[:-1]]), cache)
        pieces = token_pieces(tokenizer, prompt) + token_pieces(tokenizer, answer)
        expected.append(paint(pieces, len(prompt), decisions(cache)[0][:, 0]))
    assert all("48;5;" in text for text in expected)

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    main([str(checkpoint), "--prompt", LONG, "--show-skips", *SKIPS])
    assert capsys.readouterr().out == f"{paint_legend()}\n{expected[0]}\n"
    main([str(checkpoint), "--prompt", LONG, "--prompt", "fox " * 20, "--show-skips", *SKIPS])
    assert capsys.readouterr().out == f"{paint_legend()}\n[1] {expected[0]}\n[2] {expected[1]}\n"
    main([str(checkpoint), "--prompt", LONG, "--compare", "--show-skips", "--prune", "0.5", "--dtype", "float64", *RUN])
    dense, *filtered = capsys.readouterr().out.split("===")[1:]
    assert "48;5;" not in dense and BOLD in dense and all("48;5;" in text for text in filtered)


@pytest.mark.parametrize("terminal", [False, True])
def test_no_colour_without_a_terminal_or_with_no_color(checkpoint, capsys, monkeypatch, terminal):
    main([str(checkpoint), "--prompt", LONG, *SKIPS])
    plain = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", "1" if terminal else "")  # empty counts as not set
    main([str(checkpoint), "--prompt", LONG, "--show-skips", *SKIPS])
    out, err = capsys.readouterr()
    assert out == plain and "\033" not in out and "note: --show-skips has no effect" in err


def test_skip_map_is_written_beside_the_output(checkpoint, capsys, tmp_path):
    main([str(checkpoint), "--prompt", LONG, "--json", *SKIPS])
    without = json.loads(capsys.readouterr().out)
    path = tmp_path / "map.png"
    main([str(checkpoint), "--prompt", LONG, "--json", "--skip-map", str(path), *SKIPS])
    assert json.loads(capsys.readouterr().out)["results"][0]["texts"] == without["results"][0]["texts"]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --------------------------------------------------------------------------------------------------- bad input


def refused(capsys, *flags, command=main):
    """Runs the command, which must print one line on stderr, nothing on stdout, and exit with code 2."""
    with pytest.raises(SystemExit) as caught:
        command([*map(str, flags)])
    out, err = capsys.readouterr()
    err = err.replace("\r", "\n").split("\n")
    errors = [line for line in err if line.startswith("error: ")]
    assert caught.value.code == 2 and out == "" and len(errors) == 1, (caught.value.code, out, err)
    assert not any("Traceback" in line for line in err)
    return errors[0]


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "a", "--prune", "1.5"], "--prune: 1.5 is not a number in [0, 1)"),
    (["--prompt", "a", "--prune", "nan"], "--prune: nan is not a number in [0, 1)"),
    (["--prompt", "a", "--prune", "half"], "--prune: half is not a number in [0, 1)"),
    (["--prompt", "a", "--prune", "0.5", "--gamma", "1"], "--gamma: 1 is not a number in [0, 1)"),
    (["--prompt", "a", "--prune", "0.5", "--recent", "-1"], "--recent: -1 is not a whole number of at least 0"),
    (["--prompt", "a", "--prune", "0.5", "--mode", "attention"], "--mode: invalid choice: 'attention'"),
    (["--prompt", "a", "--preset", "cache"], "--preset does nothing without --prune"),
    (["--prompt", "a", "--recent", "3"], "--recent does nothing without --prune"),
    (["--prompt", "a", "--compare", "--recent", "3"], "cannot be combined with --recent"),
    (["--prompt", ""], "prompt 1 is empty"),
    ([], "no prompt"),
    (["--prompts-file", "no/such/file"], "error: no/such/file: cannot be read: No such file or directory"),
    (["--prompts-file", __file__ + "c"], "c: cannot be read: No such file or directory"),
    (["--prompt", "a", "--compare", "--prune", "0"], "--compare does nothing without --prune above 0"),
    (["--prompt", "a", "--preset", "cache", "--prune", "0"], "--preset does nothing without --prune above 0"),
    (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0, not a whole number of at least 1"),
    (["--prompt", "a", "--top-p", "0"], "--top-p is 0.0, not a number above 0 and at most 1"),
    (["--prompt", "a", "--temperature", "nan"], "--temperature"),
    (["--prompt", LONG, "--max-new-tokens", "190"], "longer than the model's context of 200"),
    (["--prompt", "a", "--device", "abacus"], "abacus"),
    (["--prompt", "a", "--show-skips"], "--show-skips does nothing without --prune above 0"),
    (["--prompt", "a", "--skip-map", "x.png", "--prune", "0"], "--skip-map does nothing without --prune above 0"),
    (["--prompt", "a", "--show-skips", "--prune", "0.5", "--json"], "cannot be combined with --json"),
    (["--prompt", "a", "--skip-map", "x.png", "--compare"], "draws one prompt with one setting"),
    (["--prompt", "a", "--prompt", "b", "--skip-map", "x.png", "--prune", "0.5"], "draws one prompt with one setting"),
    (["--prompt", "a", "--skip-map", "x.jpg", "--prune", "0.5"], "--skip-map x.jpg: the name must end in .html, .png"),
    (["--prompt", "a", "--skip-map", "x.HTM", "--prune", "0.5"], "--skip-map x.HTM: the name must end in .html, .png"),
    (["--prompt", "a", "--skip-map", "no/such/x.HTML", "--prune", "0.5"], "no/such/x.HTML: cannot be written: No such file"),
    (["--prompt", "a", "--skip-map", "no/such/x.PNG", "--prune", "0.5"], "no/such/x.PNG: cannot be written: No such file"),
    (["--prompt", "a", "--skip-map", "no/such/x.png", "--prune", "0.5"], "no/such/x.png: cannot be written: No such file"),
    (["--prompt", "a", "--nonsense"], "--nonsense"),
])  # fmt: skip
def test_bad_flags(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, *flags)


def test_what_keeps_a_skip_map_from_being_drawn_is_found_before_the_work(capsys, tmp_path, monkeypatch):
    flags = [tmp_path / "no checkpoint", "--prompt", "a", "--prune", "0.5", "--skip-map"]
    (tmp_path / "folder.png").mkdir()
    assert "folder.png: cannot be written: Is a directory" in refused(capsys, *flags, tmp_path / "folder.png")
    assert "no such folder" in refused(capsys, *flags, tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()  # trying left nothing behind
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--skip-map needs matplotlib: " in refused(capsys, *flags, tmp_path / "map.png")


def test_no_chat_template(checkpoint, capsys, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").unlink()
    assert "chat template" in refused(capsys, tmp_path / "base", "--prompt", "a", "--chat")


def test_the_process_itself_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, generate_module.__file__, str(tmp_path / "nowhere"), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: no such folder\n"
