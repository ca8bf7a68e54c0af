"""The harness sees the model that it sees through transformers; scores are those of decoding."""

import dataclasses
import functools
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from filter_config import PRESETS, preset
from generation import LEAST_SHARED, generate
from kv_cache import KVCache
from load_weights import load
from loading.checkpoint_files import CheckpointError
from local_tasks import CHOICE, FERRY, GENERATE, PUMP, ROLLING, write_tasks
from model import Transformer
from test_generation import FILTERS

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm_eval is an extra: pip install -r requirements-extra.txt"
)
# Its own model, to compare with, needs one more.
needs_accelerate = functools.partial(
    pytest.importorskip,
    "accelerate",
    reason="the harness's hf model needs it: pip install -r requirements-extra.txt",
)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from evaluation.harness_model import NEUTRAL, FilteredLM, batches, score  # noqa: E402


def instances(kind, arguments, task="t"):
    return [Instance(kind, {}, args, 0, (task, i, 1)) for i, args in enumerate(arguments)]


def answers(lm, prompts, **options):
    requests = instances("generate_until", [(prompt, options) for prompt in prompts])
    return lm.generate_until(requests, disable_tqdm=True)


def numbers(outcomes):
    """What loglikelihood and loglikelihood_rolling return, flat."""
    return torch.tensor(outcomes).flatten().tolist()


def record_feeding(monkeypatch):
    """A list that gets (tokens, lengths) of each call of a model from now on."""
    fed = []
    forward = Transformer.forward

    def recorded(self, tokens, cache, lengths=None, last=False):
        fed.append((tokens, lengths))
        return forward(self, tokens, cache, lengths, last)

    monkeypatch.setattr(Transformer, "forward", recorded)
    return fed


def n_fed(fed):
    """How many tokens were fed, without padding."""
    total = 0
    for tokens, lengths in fed:
        total += tokens.numel() if lengths is None else int(torch.as_tensor(lengths).sum())
    return total


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """The small random checkpoint in float64, its weights so large that attention is not even."""
    model, tokenizer = load(checkpoint, "cpu", "float64")
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(6.0)
    return model, tokenizer


@pytest.fixture(scope="module")
def real(demo):
    """The demo checkpoint's model and tokenizer."""
    return load(demo, "cpu", "float32")


# ----------------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def both(demo, real):
    """Ours and the harness's own `hf` model, dense, on the demo checkpoint."""
    needs_accelerate()
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(demo), dtype="float32", device="cpu", batch_size=4)
    return FilteredLM(*real), theirs


def test_agrees_with_the_harness_own_model(both, tmp_path):
    write_tasks(tmp_path)
    outcomes = []
    for lm in both:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        tasks = ["local_choice", "local_rolling", "local_generate"]
        outcomes.append(lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager))
    ours, theirs = outcomes
    assert ours["results"]["local_choice"] == theirs["results"]["local_choice"]
    assert ours["results"]["local_choice"]["acc,none"] > 0
    for task in ("local_choice", "local_rolling"):
        for mine, his in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for (my_answer,), (his_answer,) in zip(mine["resps"], his["resps"], strict=True):
                expected = torch.tensor(his_answer).tolist()
                assert torch.tensor(my_answer).tolist() == pytest.approx(expected, abs=1e-3)
    texts, expected = (
        [sample["resps"] for sample in outcome["samples"]["local_generate"]] for outcome in outcomes
    )
    assert texts == expected
    assert len({str(text) for text in texts}) == len(GENERATE)


def test_encodes_and_truncates_as_the_harness_own_model(both, monkeypatch):
    """Spaces at the context's end, an empty one, special tokens, and texts of too many tokens."""
    ours, theirs = both
    pairs = [
        ("The wind", " blew"),
        ("The wind ", "blew"),
        ("", "The wind blew"),
        ("The wind", "mill"),
        ("<|im_start|>user\nHello<|im_end|>\n", "Hello"),
        (FERRY, " and"),
        (FERRY, PUMP[:100]),
    ]
    monkeypatch.setattr(ours, "context", 32)
    config = dataclasses.replace(ours.model.config, max_positions=32)
    monkeypatch.setattr(ours.model, "config", config)
    monkeypatch.setattr(theirs, "_max_length", 32)

    requests = instances("loglikelihood", pairs)
    expected = numbers(theirs.loglikelihood(requests))
    assert numbers(ours.loglikelihood(requests)) == pytest.approx(expected, abs=1e-3)
    requests = instances("loglikelihood_rolling", [(text,) for text in ROLLING])
    expected = numbers(theirs.loglikelihood_rolling(requests))
    assert numbers(ours.loglikelihood_rolling(requests)) == pytest.approx(expected, abs=1e-3)
    requests = instances("generate_until", [(FERRY, {"until": [], "max_gen_toks": 8})])
    assert ours.generate_until(requests) == theirs.generate_until(requests)


# What the model below says after "x".
SAYS = ["\u258142", "<|im_end|>", "<0x0A>", "<|im_start|>", "q", "u", "i"]
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content | trim + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A random model with a tokenizer like LLaMA-2's, which says SAYS after "x".

    Spaces are part of words, one is put before a text, and bytes are tokens.
    """
    import transformers

    folder = tmp_path_factory.mktemp("llama-like")
    tokenizer = llama_like_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=336,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=200,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    # Each token has a channel of its own, by which the head knows what follows it.
    embedding = model.model.embed_tokens.weight.data
    embedding += torch.eye(336)[: len(embedding)]
    head = model.lm_head.weight.data
    said = tokenizer.encode("x").ids[-1:] + [tokenizer.token_to_id(token) for token in SAYS]
    for token, following in itertools.pairwise(said):
        head[following, token] += 5
    model.save_pretrained(folder)
    return folder


def llama_like_tokenizer():
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *byte_tokens])
    words = ["x", "is", "42", "the", "quick", "brown", "fox"]
    tokenizer.train_from_iterator(words, trainer)
    # The trainer made the bytes special, too.
    values = json.loads(tokenizer.to_str())
    added = [token for token in values["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps({**values, "added_tokens": added}))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.fixture
def both_of(llama_like):
    """Makes ours, and the harness's own model, of this folder, with settings of its tokenizer."""
    needs_accelerate()
    from lm_eval.models.huggingface import HFLM

    def make(template=PLAIN, eos="</s>"):
        settings = {
            "bos_token": "<s>",
            "eos_token": eos,
            "unk_token": "<unk>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": template,
        }
        (llama_like / "tokenizer_config.json").write_text(json.dumps(settings))
        theirs = HFLM(pretrained=str(llama_like), dtype="float32", device="cpu", batch_size=1)
        return FilteredLM(*load(llama_like, "cpu", "float32")), theirs

    return make


def test_a_tokenizer_like_llama_s_as_in_the_harness_own_model(both_of):
    """Scores and answers, which begin without a space; special tokens; contexts without a word."""
    ours, theirs = both_of()
    pairs = [
        ("the fox", " is"),
        ("the fox ", "is"),
        ("", "quick fox"),
        ("", "<s>is"),
        (" ", "the fox"),
        ("\n", "fox"),
        ("<s>the", " fox"),
        ("the <|im_end|>\n", " fox"),
        ("the", "<|im_end|>"),
    ]
    requests = instances("loglikelihood", pairs)
    expected = numbers(theirs.loglikelihood(requests))
    assert numbers(ours.loglikelihood(requests)) == pytest.approx(expected, abs=1e-3)
    texts = ("the fox is", "<s>the", "", " ")
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    expected = numbers(theirs.loglikelihood_rolling(requests))
    assert numbers(ours.loglikelihood_rolling(requests)) == pytest.approx(expected, abs=1e-3)

    prompts = ["x", "the x", "the fox", ""]
    assert answers(ours, prompts, until=[], max_gen_toks=9)[0].startswith("42\nqui")
    for until in ([], ["<|im_end|>"], ["i"], ["\n", "4"]):
        expected = answers(theirs, prompts, until=until, max_gen_toks=9)
        assert answers(ours, prompts, until=until, max_gen_toks=9) == expected


STOPPED = [  # stop texts, and what comes before the first of them
    (["<|im_end|>"], "42"),
    (["<|im_end|>\n"], "42"),
    (["<|im_start|>qu"], "42\n"),
    (["u"], "42\nq"),
    (["i", "\n<|"], "42"),
    (["2<|"], "4"),
    (["", None, "<|im_end|>i"], "42\nqui"),
]


def test_special_tokens_stop_and_are_not_in_the_answer(both_of):
    """Also in the middle of a stop text, where the harness cuts its answer too late."""
    ours, _ = both_of()
    for until, answer in STOPPED:
        assert answers(ours, ["x", "the x"], until=until, max_gen_toks=7) == [answer] * 2, until


def test_the_tokenizer_s_own_eos_ends_an_answer(both_of):
    ours, theirs = both_of(eos="<|im_end|>")
    for lm in (ours, theirs):
        assert answers(lm, ["x"], until=["u"], max_gen_toks=7) == ["42"]
    own = ours.tokenizer.encode("<|im_end|>", bos=False, parse_special=True)[-1]
    assert own != 2  # which config.json names
    assert ours.eot_token_id == own


BEGUN = (
    "The answer is",
    "```python\n",
    "\n`` ",
    " a ",
    "",
    "e",
    "user",
    "|",
    "<",
    "<|im_end|>",
    "</s>",
    "[INST]",
)


@pytest.mark.parametrize("template", [PLAIN, NO_SYSTEM], ids=["plain", "no system message"])
def test_writes_a_conversation_as_the_harness_own_model(both_of, template):
    """Without the system message where the template knows none; an answer that is begun goes on."""
    system = {"role": "system", "content": "Be short."}
    question = {"role": "user", "content": "Which of the two?"}
    ours, theirs = both_of(template)
    for history in ([question], [system, question]):
        assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
        for begun in BEGUN:
            messages = [*history, {"role": "assistant", "content": begun}]
            expected = theirs.apply_chat_template(messages, add_generation_prompt=False)
            assert ours.apply_chat_template(messages, False) == expected


def test_a_template_without_the_messages_is_refused(both_of):
    system = {"role": "system", "content": "Be short."}
    question = {"role": "user", "content": "Which of the two?"}
    broken, _ = both_of("{{ raise_exception('never') }}")
    with pytest.raises(CheckpointError, match="the chat template failed"):
        broken.apply_chat_template([question])
    first_only, _ = both_of("{{ messages[0].content }}")
    with pytest.raises(ValueError, match="does not show the last message"):
        first_only.apply_chat_template([question, system], False)


def test_generation_settings_as_the_harness_own_model(both_of):
    """What changes nothing is understood. Sampling at temperature 0, which it refuses, is not."""
    both = both_of()
    ours, _ = both
    usual = {"until": ["u"], "max_gen_toks": 9}
    plain = answers(ours, ["x"], **usual)
    not_sampled = {"do_sample": False, "temperature": 0.7, "num_beams": 1}
    for given in ({"num_beams": 1}, not_sampled, NEUTRAL):
        for lm in both:
            assert answers(lm, ["x"], **usual, **given) == plain
    given = {"temperature": None, "top_k": None, "num_beams": None, "repetition_penalty": 1.0}
    assert answers(ours, ["x"], **usual, **given) == plain
    for given in (
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_p": 0.9, "num_beams": 1},
    ):
        for lm in both:
            with pytest.raises(ValueError, match="temperature"):
                answers(lm, ["x"], **usual, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 2},
        {"num_beams": 0},
        {"repetition_penalty": 1.1},
        {"temperature": "hot"},
        {"temperature": [1]},
        {"top_p": 2, "do_sample": True},
        {"penalty": 0},
        {"max_gen_toks": math.inf},
        {"max_gen_toks": 0},
        {"max_gen_toks": -1},
        {"max_gen_toks": 200},  # the whole context
    ],
    ids=str,
)
def test_other_generation_settings_are_refused(tiny, given):
    with pytest.raises(ValueError, match=r"t: cannot generate with \{"):
        answers(FilteredLM(*tiny), ["x"], **{"until": ["u"], **given})


# ----------------------------------------------------------------------- against the slow path

PAIRS = [
    (question + " the quick brown fox jumps", " " + choice)
    for question, choices, _ in CHOICE[:2]
    for choice in choices
]
PAIRS += [("", "the lazy dog " * 4), (PUMP, " x"), (FERRY[:270], " the end")]


def one_by_one(lm, context, continuation):
    """The same score from tokens fed alone: log-probability, whether greedy, what was used."""
    cache = lm.model.new_cache(1, lm.filter)
    ids = [*context, *continuation][-(lm.context + 1) :]
    first = len(ids) - len(continuation)
    total = 0.0
    greedy = True
    for t, (token, following) in enumerate(itertools.pairwise(ids), start=1):
        log_probs = lm.model(torch.tensor([[token]]), cache)[0, 0].log_softmax(0)
        if t >= first:
            total += float(log_probs[following])
            greedy = greedy and following == int(log_probs.argmax())
    return total, greedy, cache.usage()[0].tolist()


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_scores_equal_decoding_one_by_one(tiny, filter):
    """Whatever shares a batch or a context, and with texts beyond the context of 200 tokens."""
    lm = FilteredLM(*tiny, filter)
    ids = []
    for context, continuation in PAIRS:
        if context:
            ids.append(lm._encode_pair(context, continuation))
        else:
            ids.append(([lm.prefix_token_id], lm.tok_encode(continuation)))
    assert max(len(context) + len(continuation) for context, continuation in ids) > 201
    log_probs, greedy, used = zip(*[one_by_one(lm, *pair) for pair in ids])
    for batch in (1, 5, 64):
        lm = FilteredLM(*tiny, filter, batch)
        outcomes = lm.loglikelihood(instances("loglikelihood", PAIRS))
        assert [log_prob for log_prob, _ in outcomes] == pytest.approx(log_probs, abs=1e-9)
        assert [is_greedy for _, is_greedy in outcomes] == list(greedy)
        assert lm.used["t"] == list(used)
    if filter is not None:
        assert sum(row[1] for row in used) > 0.3 * sum(row[0] for row in used)


def test_greedy_is_recognised(tiny):
    lm = FilteredLM(*tiny, FILTERS[1])
    prompt = lm.tok_encode(PUMP)[:40]
    best = [token for _, token in generate(lm.model, [prompt], 5, lm.filter)]
    other = [*best[:-1], best[-1] ^ 1]
    scored = lm.score_all([(prompt, best), (prompt, best[:2]), (prompt, other)])
    assert [greedy for _, greedy, _ in scored] == [True, True, False]


@pytest.mark.parametrize("filter", FILTERS[:2], ids=["dense", "paper"])
def test_rolling_equals_decoding_one_by_one(tiny, filter):
    lm = FilteredLM(*tiny, filter)
    texts = [FERRY * 2, PUMP]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    for text, total in zip(texts, lm.loglikelihood_rolling(requests)):
        ids = lm.tok_encode(text)
        assert len(ids) % lm.context != 0
        expected = 0.0
        for start in range(0, len(ids), lm.context):
            window = ids[start : start + lm.context]
            before = [lm.prefix_token_id, *ids][: start + 1]
            if start > 0:  # as far to the left as the window's length allows
                before = before[len(window) - lm.context - 1 :]
            log_prob, _, _ = one_by_one(lm, before, window)
            expected += log_prob
        assert total == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_generation_equals_generate(tiny, filter):
    """Cut at stop texts and limits of each request's own, and truncated from the left."""
    lm = FilteredLM(*tiny, filter, batch=2)
    prompts = [*GENERATE, FERRY]
    free = []
    n_tokens = 0
    for prompt in prompts:
        ids = lm.tok_encode(prompt)[-(lm.context - 20) :]
        steps = generate(lm.model, [ids], 20, filter, lm.tokenizer.eos_ids)
        tokens = [token for _, token in steps]
        free.append(lm.tokenizer.decode(tokens))
        n_tokens += len(ids) + len(tokens)
    stops = [free[0][5:7], free[1][8], "never there", "", free[4][:1]]
    requests = [
        (prompt, {"until": [stop], "max_gen_toks": 20}) for prompt, stop in zip(prompts, stops)
    ]
    texts = lm.generate_until(instances("generate_until", requests))
    assert texts == [text.split(stop)[0] if stop else text for text, stop in zip(free, stops)]
    assert texts[0] != free[0]
    assert len(lm.used["t"]) == len(prompts)
    # What has met its stop text is not fed any more. There are three layers.
    assert sum(used[0] // 3 for used in lm.used["t"]) < n_tokens - 30


def test_white_space_is_no_context(tiny):
    lm = FilteredLM(*tiny, FILTERS[1])
    for context, continuation in ((" ", "the fox"), ("\n\n", "a"), ("", " the"), ("", "<s>the")):
        ids = lm.tok_encode(context + continuation)
        if ids[0] != lm.prefix_token_id:
            ids = [lm.prefix_token_id, *ids]
        expected, _, _ = one_by_one(lm, ids[:1], ids[1:])
        ((log_prob, _),) = lm.loglikelihood(instances("loglikelihood", [(context, continuation)]))
        assert log_prob == pytest.approx(expected, abs=1e-9)


def test_nothing_to_do_is_nothing(tiny):
    lm = FilteredLM(*tiny, FILTERS[1])
    assert lm.loglikelihood([]) == []
    assert lm.loglikelihood_rolling([]) == []
    assert lm.generate_until([]) == []
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("",)])) == [0]
    for pair in (("", ""), ("the", "")):
        with pytest.raises(ValueError, match="a continuation has 0 tokens"):
            lm.loglikelihood(instances("loglikelihood", [pair]))


def without_eos(tokenizer):
    """A tokenizer none of whose tokens ends a text."""
    names = ("encode", "decode", "stream", "bos_id", "special_names")
    kept = {name: getattr(tokenizer, name) for name in names}
    return SimpleNamespace(
        **kept, eos_ids=frozenset(), named_id=lambda key: None, named_token=lambda key: None
    )


def test_the_cache_is_copied_only_when_a_row_leaves(tiny, monkeypatch):
    kept = []
    select = KVCache.select

    def recorded(self, rows):
        kept.append(len(rows))
        return select(self, rows)

    monkeypatch.setattr(KVCache, "select", recorded)
    lm = FilteredLM(*tiny, FILTERS[1])
    lm.tokenizer = without_eos(lm.tokenizer)
    free = answers(lm, GENERATE, until=[], max_gen_toks=9)
    assert kept == []

    stops = (free[0][:4], free[1][:2], "never there", free[3][:3])
    requests = [(text, {"until": [stop], "max_gen_toks": 9}) for text, stop in zip(GENERATE, stops)]
    lm.generate_until(instances("generate_until", requests))
    assert 1 < len(kept) <= 3
    assert kept == sorted(set(kept), reverse=True)
    assert kept[0] < 4

    kept.clear()
    score(lm.model, [((1, 2), (3, 4)), ((2, 2), (3,) * 30)], lm.filter)
    assert kept == [1]


def test_the_line_on_overflow_is_about_the_whole_text(tiny, monkeypatch):
    """Of a text that is generated, what was generated belongs to it."""
    fed = []
    forward = Transformer.forward

    def broken(self, tokens, *rest, **more):
        fed.append(tokens)
        logits = forward(self, tokens, *rest, **more)
        return logits * math.nan if len(fed) >= 4 else logits

    monkeypatch.setattr(Transformer, "forward", broken)
    monkeypatch.setattr("generation.overflow", lambda model, tokens, filter: str(tokens))
    with pytest.raises(FloatingPointError) as caught:
        answers(FilteredLM(*tiny), [FERRY[:40]], until=[], max_gen_toks=9)
    assert str(caught.value) == str(torch.cat(fed, dim=1)[0].tolist())


def test_texts_side_by_side_are_each_sampled_as_asked(tiny):
    ways = [{"top_k": 3}, {"top_p": 0.5}, {}, {"temperature": 0.0, "do_sample": False}]
    usual = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.8}
    requests = [(prompt, usual | way) for prompt in GENERATE[:2] for way in ways]
    requests = instances("generate_until", requests)
    together = FilteredLM(*tiny, batch=8, seed=5).generate_until(requests)
    alone = FilteredLM(*tiny, batch=1, seed=5).generate_until(requests)
    assert together == alone
    assert len(set(together)) > 5


# -------------------------------------------------------------------------------- what is fed


def test_a_shared_context_is_fed_once(tiny, monkeypatch):
    lm = FilteredLM(*tiny, FILTERS[1], batch=4)
    pairs = [lm._encode_pair(*pair) for pair in PAIRS[:4]]
    assert len({tuple(context) for context, _ in pairs}) == 1
    fed = record_feeding(monkeypatch)
    lm.score_all(pairs)
    context, _ = pairs[0]
    n_continued = sum(len(continuation) - 1 for _, continuation in pairs)
    assert n_fed(fed) == len(context) + n_continued


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_solved_examples_are_fed_once(tiny, filter, monkeypatch):
    """Contexts that begin alike give what each gives alone, and their beginning is one prefill."""
    monkeypatch.setattr("generation.LEAST_SHARED", 20)
    lm = FilteredLM(*tiny, filter, batch=4)
    solved = " ".join(f"{i} and {i} make {2 * i}." for i in range(8))
    other = " ".join(f"{i} is odd." for i in range(1, 19, 2))
    texts = [f"{solved} Next: {word}" for word in ("seven", "a", "the river")]
    texts += [f"{other} {i}" for i in range(2)]
    texts += ["Alone"]
    pairs = [lm._encode_pair(text, end) for text in texts for end in (" one", " or two of them")]
    alone = [
        score(lm.model, [(tuple(context), tuple(continuation))], filter)[0]
        for context, continuation in pairs
    ]
    fed = record_feeding(monkeypatch)
    for one, expected in zip(lm.score_all(pairs), alone):
        assert one[0] == pytest.approx(expected[0], abs=1e-9)
        assert one[1:] == expected[1:]

    contexts = {tuple(context) for context, _ in pairs}
    lengths = sorted(len(context) for context in contexts)
    assert len(lengths) == 6
    assert lengths[1] > 25  # all but "Alone"
    n_continued = sum(len(continuation) - 1 for _, continuation in pairs)
    # Three contexts in two batches of four pairs, and two contexts in one.
    assert n_fed(fed) < sum(lengths) + n_continued - 20 - 20


def test_a_continuation_that_has_ended_leaves(tiny, monkeypatch):
    """No padding is fed past it, but for what makes 16 tokens full."""
    model, _ = tiny
    fed = record_feeding(monkeypatch)
    score(model, [((1, 2, 3), tuple(range(n))) for n in (2, 40, 90)], None)
    assert [tokens.numel() for tokens, _ in fed] == [3, 3 * 16, 2 * 23, 50]


def test_batches_keep_contexts_together_and_their_size():
    pairs = [((name,) * 3, (i,)) for i, name in enumerate("aabbbcccccccccccd")]
    cut = list(batches(pairs, 4))
    assert sorted(itertools.chain(*cut)) == list(range(17))
    assert max(map(len, cut)) == 4
    assert [0, 1] in cut
    assert [2, 3, 4] in cut


def test_batches_keep_together_what_begins_alike():
    """Here there are two beginnings, taking turns."""
    solved = [((end % 2,) * LEAST_SHARED + (end,), (0,)) for end in range(7)]
    assert sorted(map(sorted, batches(solved, 8))) == [[0, 2, 4, 6], [1, 3, 5]]
    short = [((end % 2,) * (LEAST_SHARED - 1) + (end,), (0,)) for end in range(7)]
    assert len(list(batches(short, 8))) == 1


# ----------------------------------------------------------------------- decisions in float32


def decisions(monkeypatch, work):
    """Do `work`: {the tokens that a row was fed: the decisions of all layers on each of them}."""
    found = {}
    forward = Transformer.forward
    select = KVCache.select

    def recorded(self, tokens, cache, lengths=None, last=False):
        logits = forward(self, tokens, cache, lengths, last)
        B, T = tokens.shape
        rows = getattr(cache, "rows", [((), ())] * B)
        redundant = torch.stack(
            [layer.redundant for layer in cache.decisions()], dim=2
        )  # (B, T, L)
        counts = [T] * B if lengths is None else lengths.tolist()
        cache.rows = []
        for b, n in enumerate(counts):
            fed, made = rows[b]
            fed += tuple(tokens[b, :n].tolist())
            made += tuple(redundant[b, :n].tolist())
            cache.rows.append((fed, made))
        found.update(cache.rows)
        return logits

    def forked(self, rows):
        before = getattr(self, "rows", [((), ())] * len(self.lengths))
        select(self, rows)
        self.rows = [before[row] for row in rows]

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", recorded)
        patch.setattr(KVCache, "select", forked)
        work()
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_few_decisions_flip_in_float32(real, monkeypatch, record_property, name):
    """Batched and shared against alone: rounding differs, so that a rank may."""
    solved = "".join(
        f"Question: {question}\nAnswer: {choices[right]}\n\n"
        for question, choices, right in CHOICE[1:4]
    )
    question, choices, _ = CHOICE[0]
    pairs = [(solved + question, " " + choice) for choice in choices[1:]]
    requests = instances("loglikelihood", pairs)
    by_batch = []
    for batch in (1, 8):
        lm = FilteredLM(*real, preset(name, prune=0.5), batch)
        by_batch.append(decisions(monkeypatch, functools.partial(lm.loglikelihood, requests)))
    texts = sorted(by_batch[0], key=len)[-len(requests) :]
    alone, shared = (
        torch.cat([torch.tensor(decided[text]) for text in texts]) for decided in by_batch
    )
    flipped = float((alone != shared).double().mean())
    record_property(f"flipped, {name}", flipped)
    print(f"{name}: {flipped:.2e} of {alone.numel()} decisions flipped")
    assert 0.2 < float(alone.double().mean()) < 0.6
    assert flipped < 0.01
