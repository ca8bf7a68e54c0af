"""What generate(), sampling, Stats and Answer promise: generating equals re-scoring, row by row."""

import itertools
import random

import pytest
import torch

import generation
from cli.skip_map import Decisions
from filter_config import PRESETS, FilterConfig, preset
from generation import Answer, Stats, generate, row_seed, sample, sample_rows
from load_weights import Tokenizer
from model import Transformer
from test_model import LENGTHS, NAMES, decisions, filter_of, small, texts

PROMPTS = [texts()[row, :length].tolist() for row, length in enumerate(LENGTHS)]
FILTERS = [None, *(preset(name, prune=0.5) for name in PRESETS)]
every_filter = pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])


def answers_of(steps, n_rows):
    """The tokens of each row, from what generate() yields."""
    rows = [[] for _ in range(n_rows)]
    for row, token in steps:
        rows[row].append(token)
    return rows


def answer_of(steps):
    """The tokens of the only row."""
    return answers_of(steps, 1)[0]


def record_forwards(monkeypatch):
    """A list to which each forward adds (tokens, logits after them, decisions on them)."""
    steps = []
    forward = Transformer.forward

    def recorded(self, tokens, cache, *arguments, **options):
        logits = forward(self, tokens, cache, *arguments, **options)
        steps.append((tokens, logits, decisions(cache)[0]))
        return logits

    monkeypatch.setattr(Transformer, "forward", recorded)
    return steps


# -------------------------------------------------------------------------- rows and their tokens


@every_filter
def test_greedy_generation_equals_rescoring(filter):
    """Prompt and answer fed at once: each token is the likeliest after what is before it."""
    model = small()
    answers = answers_of(generate(model, PROMPTS, 25, filter, chunk=32), 3)
    for prompt, answer in zip(PROMPTS, answers):
        logits = model(torch.tensor([prompt + answer]), model.new_cache(1, filter))[0]
        assert len(answer) == 25
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@every_filter
def test_rows_do_not_depend_on_each_other_and_leave_at_eos(filter, temperature):
    model = small()
    free = answers_of(generate(model, PROMPTS, 20, filter, temperature=temperature), 3)
    eos_ids = {free[0][3], free[2][7]}  # they end the rows at different steps
    ended = answers_of(generate(model, PROMPTS, 20, filter, eos_ids, temperature=temperature), 3)
    for row, tokens in enumerate(free):
        before_eos = itertools.takewhile(lambda token: token not in eos_ids, tokens)
        assert ended[row] == list(before_eos)
        own_seed = [row_seed(0, row)]
        single = generate(
            model, [PROMPTS[row]], 20, filter, eos_ids, temperature=temperature, seed=own_seed
        )
        assert answer_of(single) == ended[row]
    assert len(ended[0]) <= 3
    assert len(ended[2]) <= 7


def test_rows_that_ended_are_no_longer_fed(monkeypatch):
    model = small()
    free = answers_of(generate(model, PROMPTS, 10), 3)
    forwards = record_forwards(monkeypatch)
    ended = answers_of(generate(model, PROMPTS, 10, eos_ids={free[0][2]}), 3)
    # The first forward is the prefill of all three. Then a row is fed once for every token that it
    # gave, but not for its last one at the limit.
    n_fed = sum(len(tokens) for tokens, _, _ in forwards[1:])
    assert n_fed == sum(min(len(row), 9) for row in ended)
    assert n_fed < 3 * 9


def test_a_caller_ends_a_row_with_its_latest_token():
    model = small()
    free = answers_of(generate(model, PROMPTS, 10), 3)
    ended = set()
    rows = [[], [], []]
    for row, token in generate(model, PROMPTS, 10, ended=ended):
        rows[row].append(token)
        if row == 1 and len(rows[1]) == 4:
            ended.add(1)
    assert rows == [free[0], free[1][:4], free[2]]


@every_filter
def test_what_prompts_have_in_common_is_fed_once(filter, monkeypatch):
    """And so are equal prompts; each is answered as if it was the only one."""
    monkeypatch.setattr(generation, "LEAST_SHARED", 40)
    model = small()
    beginning = texts()[0, :50].tolist()
    prompts = [beginning + end for end in ([1, 2, 3], [4], [1, 2, 3], [5, 6])]
    expected = [answer_of(generate(model, [prompt], 9, filter)) for prompt in prompts]
    forwards = record_forwards(monkeypatch)

    stats = Stats()
    assert answers_of(generate(model, prompts, 9, filter, stats=stats), 4) == expected
    assert stats.prompt_tokens == 50 + 3 + 1 + 2

    stats = Stats()
    equal = [prompts[0]] * 3
    assert answers_of(generate(model, equal, 9, filter, stats=stats), 3) == [expected[0]] * 3
    assert stats.prompt_tokens == 53

    forwards.clear()
    stats = Stats()
    unlike = [prompts[1], PROMPTS[1]]  # these begin otherwise
    assert answers_of(generate(model, unlike, 9, filter, stats=stats), 2)[0] == expected[1]
    assert stats.prompt_tokens == 51 + LENGTHS[1]
    first_tokens, _, _ = forwards[0]
    assert len(first_tokens) == 2


@pytest.mark.parametrize("name", NAMES)
def test_equal_prompts_are_fed_once_and_forked(name, monkeypatch):
    forwards = record_forwards(monkeypatch)
    short = list(range(40))
    prompts = [short, list(range(60)), short, short]
    filter = filter_of(name)
    rows = answers_of(generate(small(), prompts, 9, filter, temperature=1.0, seed=5), 4)
    assert [len(tokens) for tokens, _, _ in forwards] == [2] + [4] * 8
    assert rows[0] != rows[2] != rows[3]
    for row, prompt in enumerate(prompts):
        own_seed = [row_seed(5, row)]
        single = generate(small(), [prompt], 9, filter, temperature=1.0, seed=own_seed)
        assert answer_of(single) == rows[row]


@pytest.mark.parametrize("name", PRESETS)
def test_watched_decisions_are_those_of_one_forward(name):
    """In a batch of ragged prompts whose rows end at different steps, whatever the chunk."""
    model = small()
    filter = preset(name, prune=0.5)
    free = answers_of(generate(model, PROMPTS, 20, filter), 3)
    eos_ids = {free[0][3], free[2][7]}
    watched = Decisions(3, 4)
    steps = generate(model, PROMPTS, 20, filter, eos_ids, chunk=16, watch=watched.watch)
    answers = answers_of(steps, 3)
    assert len({len(answer) for answer in answers}) > 1
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        cache = model.new_cache(1, filter)
        model(torch.tensor([prompt + answer[:19]]), cache)  # a 20th is not fed back
        redundant, score = decisions(cache)
        assert watched.redundant[row].any()
        assert torch.equal(watched.redundant[row], redundant[:, 0])
        expected = score[:, 0].to(watched.score[row].dtype)
        torch.testing.assert_close(watched.score[row], expected, rtol=0, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------------------------------- figures


@every_filter
def test_stats_add_up(filter):
    """Rows end at different steps; each counts as if it had been fed by itself."""
    model = small()
    stats = Stats()
    eos_ids = {answers_of(generate(model, PROMPTS, 20, filter), 3)[0][5]}
    answers = answers_of(generate(model, PROMPTS, 20, filter, eos_ids, stats=stats), 3)
    assert len({len(answer) for answer in answers}) > 1

    total = torch.zeros(5, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers)):
        cache = model.new_cache(1, filter)
        model(torch.tensor([prompt + answer[:19]]), cache)  # a 20th is not fed back
        usage = cache.usage()[0]
        names = ("pairs", "skipped", "held", "read", "dense_read")
        assert stats.rows[row] == dict(zip(names, usage.tolist()))
        assert stats.rows[row]["skipped"] == decisions(cache)[0].sum()
        total += usage

    pairs, skipped, held, read, dense_read = total.tolist()
    assert stats.skip_ratio == skipped / pairs
    assert stats.kv_held == held / pairs
    assert stats.kv_read == read / dense_read
    if filter is None:
        assert (stats.skip_ratio, stats.kv_held, stats.kv_read) == (0, 1, 1)
    else:
        assert pairs > held > 0

    n_at_eos = sum(len(answer) < 20 for answer in answers)  # such a token is not yielded
    assert stats.prompt_tokens == sum(LENGTHS)
    assert stats.new_tokens == sum(len(answer) for answer in answers) + n_at_eos
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    megabytes = held * 2 * 2 * 8 * 8 / 1e6  # K and V, 2 heads of 8 float64s
    assert stats.line().endswith(
        f"skipped {skipped / pairs:.1%} of (token, layer) pairs; "
        f"KV held {held / pairs:.0%} ({megabytes:.2f} MB), read {read / dense_read:.0%} of dense"
    )


# --------------------------------------------------------------------------------------- sampling


def test_sampling():
    logits = torch.tensor([2.0, 0.0, 3.0, 1.0])
    assert sample(logits) == 2
    assert sample(logits, 1.0, top_k=1) == 2
    assert sample(logits, 1.0, top_p=0.1) == 2
    rng = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, 0.5, rng=rng) for _ in range(4000)])
    frequencies = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(frequencies, (logits / 0.5).softmax(0), atol=0.03, rtol=0)
    assert {sample(logits, 2.0, top_k=2, rng=rng) for _ in range(200)} == {0, 2}
    # The likeliest token has probability 0.64, which is not enough.
    assert {sample(logits, 1.0, top_p=0.7, rng=rng) for _ in range(200)} == {0, 2}


def test_a_random_number_belongs_to_a_token():
    """A small change of the logits moves few draws, though it moves all ranks."""
    logits = torch.linspace(2, -2, 256)
    moved = logits.clone()
    moved[255] = logits[0] + 1e-3  # the least likely becomes the likeliest
    n_different = 0
    for seed in range(400):
        before = sample(logits, 1.0, rng=torch.Generator().manual_seed(seed))
        after = sample(moved, 1.0, rng=torch.Generator().manual_seed(seed))
        n_different += before != after
    assert n_different < 30


def test_what_is_drawn_follows_the_probabilities():
    rng = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = torch.tensor([sample(p.log(), 1.0, rng=rng) for _ in range(4000)])
    frequencies = draws.bincount(minlength=4) / 4000
    assert ((frequencies - p).abs() < 0.03).all()


def test_of_equal_logits_the_lower_id_comes_first():
    rng = torch.Generator().manual_seed(0)
    equal = torch.zeros(50)
    assert sample(equal) == 0
    assert {sample(equal, 1.0, top_k=1, rng=rng) for _ in range(20)} == {0}


@pytest.mark.parametrize("temperature", [1e-308, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature):
    rng = torch.Generator().manual_seed(0)
    assert sample(torch.tensor([1.0, 3.0, 2.0]), temperature, rng=rng) == 1


def sorted_sample(logits, temperature, top_k, top_p, rng):
    """The rule of sample_rows for one row, as plainly as it can be said."""
    scaled = (logits.double() - logits.max()) / temperature
    ranked, order = scaled.sort(descending=True, stable=True)
    probabilities = ranked[: top_k or None].softmax(0)
    before = torch.cat((torch.zeros(1), probabilities.cumsum(0)[:-1]))
    probabilities[before >= top_p] = 0  # the likeliest always stays
    noise = torch.empty(len(logits), dtype=torch.float64).exponential_(generator=rng)
    race = probabilities / noise[order[: len(probabilities)]]
    return int(order[race.argmax()])


# Where rounding alone decides whether a token is within top_p.
AT_THE_EDGE = torch.tensor([0.05, 0.5, 0.15, 0.3, 0.0]).log()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0, 5e-324])
@pytest.mark.parametrize("top_k", [0, 1, 3, 40, 2000])
@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.5, 0.8, 0.9, 1.0])
def test_rows_are_sampled_together_as_one_by_one(temperature, top_k, top_p):
    for logits in (
        torch.zeros(40, 10),  # all alike
        torch.zeros(40, 50),
        3 * torch.randn(20, 3000),  # peaked
        torch.randn(40, 300).bfloat16(),
        torch.randn(40, 100).round(),  # many ties
        AT_THE_EDGE.expand(40, 5),
    ):
        rngs = [torch.Generator().manual_seed(row) for row in range(len(logits))]
        same_rngs = [torch.Generator().manual_seed(row) for row in range(len(logits))]
        found = sample_rows(logits, temperature, top_k, top_p, rngs)
        assert found.dtype == torch.int64
        assert found.tolist() == [
            sorted_sample(row, temperature, top_k, top_p, rng)
            for row, rng in zip(logits, same_rngs)
        ]
        # And so it goes on.
        assert all(a.get_state().equal(b.get_state()) for a, b in zip(rngs, same_rngs))


def test_no_two_seeds_or_rows_have_random_numbers_in_common():
    """Neighbours, equal sums, and seeds that are equal in their lower 32 bits.

    Those bits are all that torch's generator on the CPU takes of a seed.
    """
    seeds = (0, 1, 2, 3, 7, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 1)
    starts = []
    for seed in seeds:
        for row in range(40):
            rng = torch.Generator().manual_seed(row_seed(seed, row))
            starts.append(tuple(torch.rand(3, generator=rng).tolist()))
    assert len(set(starts)) == len(seeds) * 40


def test_samples_of_several_seeds_are_all_different():
    model = small()
    prompt = PROMPTS[0]
    samples = []
    for seed in (0, 1, 2**32):
        steps = generate(model, [prompt] * 5, 12, temperature=1.0, seed=seed)
        samples += [tuple(row) for row in answers_of(steps, 5)]
    assert len(set(samples)) == 15
    # What stands in between changes nothing.
    mixed = [prompt, PROMPTS[1], prompt, PROMPTS[2], prompt]
    rows = answers_of(generate(model, mixed, 12, temperature=1.0), 5)
    for row in (0, 2, 4):
        assert tuple(rows[row]) == samples[row]


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": float("nan")},
        {"top_p": 1.5},
        {"seed": -1},
        {"seed": 2**64},
        {"max_new_tokens": 0},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 2.5},
        {"chunk": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_named_at_once(wrong):
    [(name, value)] = wrong.items()
    settings = {"max_new_tokens": 4, "temperature": 1.0} | wrong
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, not a"):
        generate(small(), PROMPTS, **settings)


@pytest.mark.parametrize(
    "prompts, new_tokens, message",
    [
        ([], 5, "there is no prompt"),
        ([[1], []], 5, "prompt 2 is empty"),
        ([[1] * 500], 13, "prompt 1 .* longer than the model's context of 512"),
        ([[1], [2, -1]], 5, "prompt 2 has the token -1"),
        ([[-100, 5]], 5, "prompt 1 has the token -100"),
        ([[1, 10**6]], 5, "prompt 1 has the token 1000000"),
        (["text"], 5, "token ids"),
        ("text", 5, "token ids"),
        ([1, 2], 5, "token ids"),
        ([[1.0]], 5, "token ids"),
        (None, 5, "token ids"),
    ],
    ids=str,
)
def test_bad_prompts_are_refused_at_once(prompts, new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(small(), prompts, new_tokens)


def test_prompts_may_be_tensors():
    from_tensor = generate(small(), torch.tensor([PROMPTS[0]]), 5)
    assert answer_of(from_tensor) == answer_of(generate(small(), PROMPTS[:1], 5))


@pytest.mark.parametrize(
    "seed, message",
    [
        ([1, 2], "seed has 2 numbers for 3 prompts"),
        ([1, 2, -3], "seed is -3, not a whole number"),
        ("123", "seed is '123', not a whole number"),
    ],
    ids=str,
)
def test_seeds_of_rows_are_as_many_as_there_are_prompts(seed, message):
    with pytest.raises(ValueError, match=message):
        generate(small(), PROMPTS, 5, seed=seed)


SOME = preset("cache", prune=0.5)
OTHER = preset("cache", prune=0.3)


@pytest.mark.parametrize("asked, made", [(SOME, None), (None, SOME), (SOME, OTHER)])
def test_a_cache_of_another_filter_is_refused(asked, made):
    model = small()
    with pytest.raises(ValueError, match=r"filter is .*but the cache was made for") as error:
        generate(model, PROMPTS, 5, asked, cache=model.new_cache(3, made))
    for filter in (asked, made):
        assert repr(filter or FilterConfig(prune=0.0)) in str(error.value)


@pytest.mark.parametrize(
    "asked, made",
    [
        (preset("local", prune=0.0), None),  # both are dense
        (preset("local", prune=0.5), preset("local", prune=0.5)),
    ],
)
def test_a_cache_of_an_equal_filter_is_taken(asked, made):
    model = small()
    steps = list(generate(model, PROMPTS, 5, asked, cache=model.new_cache(3, made)))
    assert steps == list(generate(model, PROMPTS, 5, asked))


def test_a_cache_is_of_its_prompts():
    model = small()
    cache = model.new_cache(1)
    model(torch.tensor([[1, 2, 3]]), cache)
    for prompts in ([[1, 2, 3]], [[1, 2, 3, 4]] * 2, [[1]]):
        with pytest.raises(
            ValueError,
            match=r"cache holds texts of \[3\] tokens: it is for as many prompts, each longer",
        ):
            generate(model, prompts, 5, cache=cache)
    expected = list(generate(model, [[1, 2, 3, 4]], 5))
    assert list(generate(model, [[1, 2, 3, 4]], 5, cache=cache)) == expected


def test_a_preset_s_name_is_no_filter():
    with pytest.raises(ValueError, match=r"filter is 'cache', not None or a FilterConfig"):
        generate(small(), PROMPTS, 5, "cache")


# ------------------------------------------------------------------------------------ stop texts


class Pieces:
    """A tokenizer whose tokens are pieces of text themselves, some of them special."""

    def __init__(self, special):
        """special: piece -> anything"""
        self.special_names = {piece: piece for piece in special}

    def stream(self, start=False):
        return self

    def push(self, token):
        return token

    def flush(self):
        return ""


def test_an_answer_ends_at_a_stop_text_however_it_is_cut_into_tokens():
    """Some of the tokens are special: they are searched and not shown."""
    rng = random.Random(0)

    def random_text(length):
        return "".join(rng.choice("ab.") for _ in range(length))

    for _ in range(3000):
        text = random_text(12)
        stops = [random_text(rng.randint(1, 4)) for _ in range(rng.randint(0, 3))]
        places = []  # (end, start) of the first place of each stop text
        for stop in stops:
            if stop in text:
                start = text.index(stop)
                places.append((start + len(stop), start))
        cuts = [0, *sorted(rng.sample(range(1, 12), rng.randint(0, 11))), 12]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        special = {piece: True for piece in pieces if rng.random() < 0.2}

        answer = Answer(Pieces(special), stops)
        given = ""
        for piece, end in zip(pieces, cuts[1:]):
            given += answer.push(piece)
            assert answer.ended == any(stop_end <= end for stop_end, _ in places)
        given += answer.push(None)

        n_kept = 12
        if places:
            _, n_kept = min(places)
        expected = ""
        for piece, start in zip(pieces, cuts):
            if piece not in special:
                expected += piece[: max(n_kept - start, 0)]
        assert given == expected, (text, stops, cuts, special)


def test_a_letter_goes_on_after_a_special_token_as_in_decode(demo):
    tokenizer = Tokenizer(demo)
    [special] = tokenizer.encode("<|im_start|>", parse_special=True)
    letter = tokenizer.encode("\U0001f600")
    for ids in (
        [*letter[:-1], special, letter[-1]],
        [*letter[:-1], special],
        [special, *letter, special, *tokenizer.encode(" a")],
    ):
        answer = Answer(tokenizer, ["never"], start=True)
        given = "".join(answer.push(token) for token in ids)
        assert given + answer.push(None) == tokenizer.decode(ids)
