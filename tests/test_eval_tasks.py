"""The harness sees the same model as through transformers; filtered scores are those of decoding token by token."""

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is an extra: pip install -r requirements-extra.txt")

from lm_eval.api.instance import Instance

import eval_tasks
import report
import skip_map
from checkpoint_files import CheckpointError
from eval_tasks import SUITES, FilteredLM, batches, compare, load_tasks, main, score, summarise
from generate import SHARED, generate
from load_weights import load
from model import KVCache, Transformer
from test_generate import FILTERS
from token_filter import PRESETS, preset

HERE = Path(eval_tasks.__file__).parent

CHOICE = [
    ("A wet towel left in the sun becomes", ["dry", "wetter", "heavier than before", "a stone"], 0),
    ("Before cutting bread, one takes a", ["knife", "pillow", "letter", "candle made of wax"], 0),
    ("Ice that is heated turns into", ["sand", "water", "wood", "a different kind of metal"], 1),
    ("The mug fell from the shelf onto the stone floor and", ["flew away", "sang", "broke", "grew"], 2),
    ("To see the stars well one should look up at", ["noon", "breakfast", "the floor", "night"], 3),
    ("Fish breathe", ["with gills", "through their tails", "only on land", "smoke"], 0),
]
FERRY = (
    "The ferry left the harbour a little after six. Nobody stood at the rail, because the wind came straight from the north "
    "and carried rain with it. In the saloon an old man was repairing a net, knot by knot, and a girl asked him whether "
    "the fish would not see it. They see it, he said, but they do not know what a net is."
)
PUMP = "A pump that stands still is a pump that rusts. Run it for ten minutes every month, and write the date on the card."
ROLLING = [FERRY, PUMP]
GENERATE = ["The three primary colours are red,", "Monday, Tuesday, Wednesday,", "1, 2, 3, 4, 5,", "The capital of Italy is"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Multiple choice, perplexity of whole texts, generation; and three tasks that cannot be run."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "choice": [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in CHOICE],
        "rolling": [{"text": text} for text in ROLLING],
        "generate": [{"text": text, "answer": "green"} for text in GENERATE],
    }
    accuracy = [{"metric": "acc"}, {"metric": "acc_norm"}]
    settings = {
        "choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "metric_list": accuracy,
        },
        "rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
        "generate": {
            "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
        },
        "too_long": {
            "output_type": "multiple_choice", "doc_to_text": "a", "doc_to_choice": "{{[text * 250, 'b']}}", "doc_to_target": 0,
        },
        "beams": {
            "output_type": "generate_until", "doc_to_text": "a", "doc_to_target": "b", "generation_kwargs": {"num_beams": 4},
        },
        "no_temperature": {
            "output_type": "generate_until", "doc_to_text": "a", "doc_to_target": "b", "generation_kwargs": {"do_sample": True},
        },
    }  # fmt: skip
    for name, task in settings.items():
        stand_in(folder, f"local_{name}", rows.get(name, [{"text": "x"}]), {**task, "test_split": "test"})
    return folder


def stand_in(folder, name, rows, settings):
    """A task over these rows, in every split that it may want."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("train", "validation", "test", "dev"), str(folder / f"{name}.jsonl"))
    kwargs = {"data_files": files, "cache_dir": str(folder / "cache")}
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**settings, "task": name, **data}))


@pytest.fixture(scope="module")
def tiny(checkpoint):
    """The small random checkpoint in float64, its weights scaled up so that attention is far from uniform."""
    model, tokenizer = load(checkpoint, "cpu", "float64")
    for p in model.parameters():
        p.data.mul_(6.0 if p.dim() == 2 else 1.0)
    return model, tokenizer


def instances(kind, arguments, task="t"):
    return [Instance(kind, {}, args, 0, (task, i, 1)) for i, args in enumerate(arguments)]


# ------------------------------------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def real(demo):
    """The demo checkpoint's model and tokenizer."""
    return load(demo, "cpu", "float32")


@pytest.fixture(scope="module")
def both(demo, real):
    """Ours and the harness's own `hf` model, dense, on the demo checkpoint."""
    pytest.importorskip("accelerate", reason="the harness's hf model needs it: pip install -r requirements-extra.txt")
    from lm_eval.models.huggingface import HFLM

    return FilteredLM(*real), HFLM(pretrained=str(demo), dtype="float32", device="cpu", batch_size=4)


def test_agrees_with_the_harness_own_model(both, local):
    outcomes = []
    for lm in both:
        manager = lm_eval.tasks.TaskManager(include_path=str(local), include_defaults=False)
        outcomes.append(lm_eval.simple_evaluate(lm, tasks=["local_choice", "local_rolling", "local_generate"], task_manager=manager))
    ours, theirs = outcomes
    assert ours["results"]["local_choice"] == theirs["results"]["local_choice"]
    assert 0 < ours["results"]["local_choice"]["acc,none"]
    for task in ("local_choice", "local_rolling"):
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for (mine,), (his,) in zip(a["resps"], b["resps"], strict=True):
                assert torch.tensor(mine).tolist() == pytest.approx(torch.tensor(his).tolist(), abs=1e-3)
    texts = [[sample["resps"] for sample in outcome["samples"]["local_generate"]] for outcome in outcomes]
    assert texts[0] == texts[1] and len({str(text) for text in texts[0]}) == len(GENERATE)


def test_encodes_and_truncates_as_the_harness_own_model(both, monkeypatch):
    """Spaces at the context's end, an empty context, special tokens, and texts beyond a context of 32 tokens."""
    ours, theirs = both
    pairs = [
        ("The wind", " blew"), ("The wind ", "blew"), ("", "The wind blew"), ("The wind", "mill"),
        ("<|im_start|>user\nHello<|im_end|>\n", "Hello"), (FERRY, " and"), (FERRY, PUMP[:100]),
    ]  # fmt: skip
    config = dataclasses.replace(ours.model.config, max_positions=32)
    monkeypatch.setattr(ours, "context", 32)
    monkeypatch.setattr(ours.model, "config", config)
    monkeypatch.setattr(theirs, "_max_length", 32)
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", [(text,) for text in ROLLING])):
        mine, his = (getattr(lm, kind)(instances(kind, arguments)) for lm in both)
        assert torch.tensor(mine).flatten().tolist() == pytest.approx(torch.tensor(his).flatten().tolist(), abs=1e-3)
    prompts = instances("generate_until", [(FERRY, {"until": [], "max_gen_toks": 8})])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


SAYS = ["\u258142", "<|im_end|>", "<0x0A>", "<|im_start|>", "q", "u", "i"]  # what the model below says after "x"
PLAIN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NO_SYSTEM = """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}
{%- endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content | trim + eos_token }}{% endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    """A random model with a tokenizer like LLaMA-2's: spaces are part of words, one is put before a text, and bytes are tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    folder = tmp_path_factory.mktemp("llama-like")
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))])
    tokenizer.train_from_iterator(["x", "is", "42", "the", "quick", "brown", "fox"], trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(values))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(values["model"]["vocab"]), hidden_size=336, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=200, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding += torch.eye(336)[: len(embedding)]
    said = tokenizer.encode("x").ids[-1:] + [tokenizer.token_to_id(token) for token in SAYS]
    for now, following in itertools.pairwise(said):
        head[following, now] += 5
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def both_of(llama_like):
    """Ours, and the harness's own model, of this folder with these settings of its tokenizer."""
    pytest.importorskip("accelerate", reason="the harness's hf model needs it: pip install -r requirements-extra.txt")
    from lm_eval.models.huggingface import HFLM

    def make(template=PLAIN, eos="</s>"):
        settings = {"bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (llama_like / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        theirs = HFLM(pretrained=str(llama_like), dtype="float32", device="cpu", batch_size=1)
        return FilteredLM(*load(llama_like, "cpu", "float32")), theirs

    return make


def answers(lm, prompts, **options):
    return lm.generate_until(instances("generate_until", [(prompt, options) for prompt in prompts]), disable_tqdm=True)


def test_a_tokenizer_like_llama_s_as_in_the_harness_own_model(both_of):
    """Scores and answers, which begin without a space; special tokens in contexts; contexts without a word."""
    ours, theirs = both_of()
    pairs = [
        ("the fox", " is"), ("the fox ", "is"), ("", "quick fox"), ("", "<s>is"), (" ", "the fox"), ("\n", "fox"), ("<s>the", " fox"),
        ("the <|im_end|>\n", " fox"), ("the", "<|im_end|>"),
    ]  # fmt: skip
    for kind, arguments in (("loglikelihood", pairs), ("loglikelihood_rolling", [("the fox is",), ("<s>the",), ("",), (" ",)])):
        mine, his = (getattr(lm, kind)(instances(kind, arguments)) for lm in (ours, theirs))
        assert torch.tensor(mine).flatten().tolist() == pytest.approx(torch.tensor(his).flatten().tolist(), abs=1e-3)
    for until in ([], ["<|im_end|>"], ["i"], ["\n", "4"]):
        mine, his = (answers(lm, ["x", "the x", "the fox", ""], until=until, max_gen_toks=9) for lm in (ours, theirs))
        assert mine == his and (until or mine[0].startswith("42\nqui"))


def test_special_tokens_stop_and_are_not_in_the_answer(both_of):
    """Also in the middle of a stop string, where the harness cuts its answer too late; and the tokenizer's own EOS."""
    ours, _ = both_of()
    for until, answer in (
        (["<|im_end|>"], "42"), (["<|im_end|>\n"], "42"), (["<|im_start|>qu"], "42\n"), (["u"], "42\nq"), (["i", "\n<|"], "42"),
        (["2<|"], "4"), (["", None, "<|im_end|>i"], "42\nqui"),
    ):  # fmt: skip
        assert answers(ours, ["x", "the x"], until=until, max_gen_toks=7) == [answer] * 2, until
    assert [answers(lm, ["x"], until=["u"], max_gen_toks=7) for lm in both_of(eos="<|im_end|>")] == [["42"]] * 2
    lm = both_of(eos="<|im_end|>")[0]
    assert lm.eot_token_id == lm.tokenizer.encode("<|im_end|>", bos=False, parse_special=True)[-1] != 2  # config.json's


@pytest.mark.parametrize("template", [PLAIN, NO_SYSTEM])
def test_writes_a_conversation_as_the_harness_own_model(both_of, template):
    """Without the system message where the template knows none; an answer that is begun, whatever its text, goes on."""
    system, question = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Which of the two?"}
    ours, theirs = both_of(template)
    for history in ([question], [system, question]):
        assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
        for begun in ("The answer is", "```python\n", "\n`` ", " a ", "", "e", "user", "|", "<", "<|im_end|>", "</s>", "[INST]"):
            messages = [*history, {"role": "assistant", "content": begun}]
            assert ours.apply_chat_template(messages, False) == theirs.apply_chat_template(messages, add_generation_prompt=False)
    with pytest.raises(CheckpointError, match="the chat template failed"):
        both_of("{{ raise_exception('never') }}")[0].apply_chat_template([question])
    with pytest.raises(ValueError, match="does not show the last message"):
        both_of("{{ messages[0].content }}")[0].apply_chat_template([question, system], False)


def test_generation_settings_as_the_harness_own_model(both_of):
    """What changes nothing is understood, and what that model refuses is refused: sampling at the temperature 0."""
    ours, theirs = both_of()
    plain = answers(ours, ["x"], until=["u"], max_gen_toks=9)
    for given in ({"num_beams": 1}, {"do_sample": False, "temperature": 0.7, "num_beams": 1}, eval_tasks.NEUTRAL):
        assert [answers(lm, ["x"], until=["u"], max_gen_toks=9, **given) for lm in (ours, theirs)] == [plain, plain]
    given = {"temperature": None, "top_k": None, "num_beams": None, "repetition_penalty": 1.0}
    assert answers(ours, ["x"], until=["u"], max_gen_toks=9, **given) == plain
    for given in ({"do_sample": True}, {"do_sample": True, "temperature": 0.0}, {"do_sample": True, "top_p": 0.9, "num_beams": 1}):
        for lm in (ours, theirs):
            with pytest.raises(ValueError, match="temperature"):
                answers(lm, ["x"], until=["u"], max_gen_toks=9, **given)
    for given in ({"num_beams": 2}, {"num_beams": 0}, {"repetition_penalty": 1.1}, {"temperature": "hot"}, {"top_p": 2, "do_sample": True},
                  {"penalty": 0}, {"max_gen_toks": math.inf}, {"temperature": [1]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"t: cannot generate with \{"):
            answers(ours, ["x"], **{"until": ["u"], **given})


# ------------------------------------------------------------------------------------------- against the slow path


PAIRS = [(question + " the quick brown fox jumps", " " + choice) for question, choices, _ in CHOICE[:2] for choice in choices]
PAIRS += [("", "the lazy dog " * 4), (PUMP, " x"), (FERRY[:270], " the end")]


def one_by_one(lm, context, continuation):
    """The same score from tokens fed alone, one at a time: log-probability, greedy, and what was used."""
    cache, total, greedy = lm.model.new_cache(1, lm.filter), 0.0, True
    ids = [*context, *continuation][-(lm.context + 1) :]
    for t, (token, following) in enumerate(itertools.pairwise(ids)):
        logprobs = lm.model(torch.tensor([[token]]), cache)[0, 0].log_softmax(0)
        if t >= len(ids) - 1 - len(continuation):
            total += float(logprobs[following])
            greedy &= following == int(logprobs.argmax())
    return total, greedy, cache.usage()[0].tolist()


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_scores_equal_decoding_one_by_one(tiny, filter):
    """Whatever shares a batch or a context, and with texts longer than the model's context of 200 tokens."""
    expected = None
    for batch in (1, 5, 64):
        lm = FilteredLM(*tiny, filter, batch)
        answers = lm.loglikelihood(instances("loglikelihood", PAIRS))
        if expected is None:
            ids = [lm._encode_pair(*pair) if pair[0] else ([lm.prefix_token_id], lm.tok_encode(pair[1])) for pair in PAIRS]
            assert max(len(a) + len(b) for a, b in ids) > 201
            expected = [one_by_one(lm, *pair) for pair in ids]
        assert [answer[0] for answer in answers] == pytest.approx([e[0] for e in expected], abs=1e-9)
        assert [answer[1] for answer in answers] == [e[1] for e in expected]
        assert lm.used["t"] == [e[2] for e in expected]
    if filter is not None:
        assert sum(used[1] for used in lm.used["t"]) > 0.3 * sum(used[0] for used in lm.used["t"])


def test_greedy_is_recognised(tiny):
    lm = FilteredLM(*tiny, FILTERS[1])
    prompt = lm.tok_encode(PUMP)[:40]
    best = [token for _, token in generate(lm.model, [prompt], 5, lm.filter)]
    answers = lm.score_all([(prompt, best), (prompt, best[:2]), (prompt, best[:-1] + [best[-1] ^ 1])])
    assert [greedy for _, greedy, *_ in answers] == [True, True, False]


@pytest.mark.parametrize("filter", FILTERS[:2], ids=["dense", "paper"])
def test_rolling_equals_decoding_one_by_one(tiny, filter):
    lm = FilteredLM(*tiny, filter)
    texts = [FERRY * 2, PUMP]
    totals = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    for text, total in zip(texts, totals):
        ids, expected = lm.tok_encode(text), 0.0
        for start in range(0, len(ids), lm.context):  # the context is as far to the left as the window's length allows
            window = ids[start : start + lm.context]
            before = [lm.prefix_token_id, *ids][: start + 1][len(window) - lm.context - 1 if start else 0 :]
            expected += one_by_one(lm, before, window)[0]
        assert len(ids) % lm.context and total == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("filter", FILTERS, ids=["dense", *PRESETS])
def test_generation_equals_generate(tiny, filter):
    """Cut at stop strings and limits of each request's own, and truncated from the left."""
    lm, prompts = FilteredLM(*tiny, filter, batch=2), [*GENERATE, FERRY]
    free, full = [], 0
    for prompt in prompts:
        ids = lm.tok_encode(prompt)[-(lm.context - 20) :]
        tokens = [token for _, token in generate(lm.model, [ids], 20, filter, lm.tokenizer.eos_ids)]
        free.append(lm.tokenizer.decode(tokens))
        full += len(ids) + len(tokens)
    stops = [free[0][5:7], free[1][8], "never there", "", free[4][:1]]
    requests = [(prompt, {"until": [stop], "max_gen_toks": 20}) for prompt, stop in zip(prompts, stops)]
    texts = lm.generate_until(instances("generate_until", requests))
    assert texts == [text.split(stop)[0] if stop else text for text, stop in zip(free, stops)]
    assert texts[0] != free[0] and len(lm.used["t"]) == len(prompts)
    assert sum(used[0] // 3 for used in lm.used["t"]) < full - 30  # what has met its stop string is not fed any more


def test_without_a_context_or_without_anything(tiny):
    """White space is no context; nothing to generate is nothing; what cannot be scored is named."""
    lm = FilteredLM(*tiny, FILTERS[1])
    for context, continuation in ((" ", "the fox"), ("\n\n", "a"), ("", " the"), ("", "<s>the")):
        ids = lm.tok_encode(context + continuation)
        ids = ids if ids[0] == lm.prefix_token_id else [lm.prefix_token_id, *ids]
        ((logprob, _),) = lm.loglikelihood(instances("loglikelihood", [(context, continuation)]))
        assert logprob == pytest.approx(one_by_one(lm, ids[:1], ids[1:])[0], abs=1e-9)
    assert [lm.loglikelihood([]), lm.loglikelihood_rolling([]), lm.generate_until([])] == [[], [], []]
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("",)])) == [0]
    for pair in (("", ""), ("the", "")):
        with pytest.raises(ValueError, match="a continuation has 0 tokens"):
            lm.loglikelihood(instances("loglikelihood", [pair]))
    for most in (0, -1, lm.context):
        with pytest.raises(ValueError, match=rf"cannot generate with .*{most}"):
            answers(lm, ["the"], until=[], max_gen_toks=most)


def test_the_cache_is_copied_only_when_a_row_leaves(tiny, monkeypatch):
    kept, select = [], KVCache.select
    monkeypatch.setattr(KVCache, "select", lambda self, rows: kept.append(len(rows)) or select(self, rows))
    lm = FilteredLM(*tiny, FILTERS[1])
    lm.tokenizer = SimpleNamespace(**{name: getattr(lm.tokenizer, name) for name in ("encode", "stream", "bos_id", "_backend", "_shown")},
                                   eos_ids=frozenset(), _template_tokens={})  # fmt: skip
    free = answers(lm, GENERATE, until=[], max_gen_toks=9)
    assert not kept
    stops = zip(GENERATE, (free[0][:4], free[1][:2], "never there", free[3][:3]))
    lm.generate_until(instances("generate_until", [(text, {"until": [stop], "max_gen_toks": 9}) for text, stop in stops]))
    assert 1 < len(kept) <= 3 and kept == sorted(set(kept), reverse=True) and kept[0] < 4
    kept.clear()
    score(lm.model, [((1, 2), (3, 4)), ((2, 2), (3,) * 30)], lm.filter)
    assert kept == [1]


def test_the_line_on_overflow_is_about_the_whole_text(tiny, monkeypatch):
    """Of a text that is generated, what was generated belongs to it."""
    fed, forward = [], Transformer.forward

    def broken(self, tokens, *rest, **more):
        fed.append(tokens)
        return forward(self, tokens, *rest, **more) * (1 if len(fed) < 4 else math.nan)

    monkeypatch.setattr(Transformer, "forward", broken)
    monkeypatch.setattr("generate.overflow", lambda model, tokens, filter: str(tokens))
    with pytest.raises(FloatingPointError) as caught:
        answers(FilteredLM(*tiny), [FERRY[:40]], until=[], max_gen_toks=9)
    assert str(caught.value) == str(torch.cat(fed, dim=1)[0].tolist())


def test_texts_side_by_side_are_each_sampled_as_asked(tiny):
    ways = [{"top_k": 3}, {"top_p": 0.5}, {}, {"temperature": 0.0, "do_sample": False}]
    options = [{"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 0.8} | way for way in ways]
    requests = [(prompt, option) for prompt in GENERATE[:2] for option in options]
    together, alone = (FilteredLM(*tiny, batch=n, seed=5).generate_until(instances("generate_until", requests)) for n in (8, 1))
    assert together == alone and len(set(together)) > 5


def test_a_shared_context_is_fed_once(tiny, monkeypatch):
    fed, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *a, **k: fed.append(a) or forward(self, *a, **k))
    lm = FilteredLM(*tiny, FILTERS[1], batch=4)
    pairs = [lm._encode_pair(*pair) for pair in PAIRS[:4]]
    lm.score_all(pairs)
    tokens = sum(int(n_new.sum()) for _, _, n_new in fed)
    assert len({tuple(context) for context, _ in pairs}) == 1
    assert tokens == len(pairs[0][0]) + sum(len(continuation) - 1 for _, continuation in pairs)


@pytest.mark.parametrize("filter", FILTERS)
def test_solved_examples_are_fed_once(tiny, filter, monkeypatch):
    """Contexts that begin alike give what each gives alone, and their beginning is one row of one prefill."""
    monkeypatch.setattr("generate.SHARED", 20)
    lm = FilteredLM(*tiny, filter, batch=4)
    solved, other = " ".join(f"{i} and {i} make {2 * i}." for i in range(8)), " ".join(f"{i} is odd." for i in range(1, 19, 2))
    texts = [*(f"{solved} Next: {word}" for word in ("seven", "a", "the river")), *(f"{other} {i}" for i in range(2)), "Alone"]
    pairs = [lm._encode_pair(text, " " + end) for text in texts for end in ("one", "or two of them")]
    alone = [score(lm.model, [(tuple(context), tuple(continuation))], filter)[0] for context, continuation in pairs]
    fed, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *a, **k: fed.append(a) or forward(self, *a, **k))
    for (logprob, greedy, used), (expected, expected_greedy, expected_used) in zip(lm.score_all(pairs), alone):
        assert logprob == pytest.approx(expected, abs=1e-9) and greedy == expected_greedy and used == expected_used
    contexts = {tuple(context) for context, _ in pairs}
    assert len(contexts) == 6 and all(len(context) > 25 for context in contexts if len(context) > 5)
    whole = sum(map(len, contexts)) + sum(len(continuation) - 1 for _, continuation in pairs)
    assert sum(int(n_new.sum()) for _, _, n_new in fed) < whole - 20 - 20  # three contexts in two batches of four pairs; and two


def test_a_continuation_that_has_ended_leaves(tiny, monkeypatch):
    """No padding is fed past it, but for what makes 16 tokens full."""
    fed, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, *a, **k: fed.append(a[0].numel()) or forward(self, *a, **k))
    score(tiny[0], [((1, 2, 3), tuple(range(n))) for n in (2, 40, 90)], None)
    assert fed == [3, 3 * 16, 2 * 23, 50]


def test_batches_keep_together_what_begins_alike_and_their_size():
    pairs = [((name,) * 3, (i,)) for i, name in enumerate("aabbbcccccccccccd")]
    cut = list(batches(pairs, 4))
    assert sorted(itertools.chain(*cut)) == list(range(17)) and max(map(len, cut)) == 4
    assert [0, 1] in cut and [2, 3, 4] in cut
    solved = [((end % 2,) * SHARED + (end,), (0,)) for end in range(7)]  # two beginnings, taking turns
    short = [((end % 2,) * (SHARED - 1) + (end,), (0,)) for end in range(7)]
    assert sorted(map(sorted, batches(solved, 8))) == [[0, 2, 4, 6], [1, 3, 5]] and len(list(batches(short, 8))) == 1


# -------------------------------------------------------------------------------------------- decisions in float32


def decisions(monkeypatch, work):
    """Do `work` and return {the tokens a row was fed: its decisions, a tuple of (L,) lists}."""
    found, forward, select = {}, Transformer.forward, KVCache.select

    def recorded(self, tokens, cache, n_new=None, last=False):
        logits = forward(self, tokens, cache, n_new, last)
        rows = getattr(cache, "rows", [((), ())] * len(tokens))
        redundant = skip_map.decisions(cache)[0].permute(1, 2, 0)  # (B, T, L)
        counts = [tokens.shape[1]] * len(tokens) if n_new is None else n_new.tolist()
        cache.rows = [
            (fed + tuple(tokens[b, :n].tolist()), made + tuple(redundant[b, :n].tolist()))
            for b, ((fed, made), n) in enumerate(zip(rows, counts))
        ]
        found.update(cache.rows)
        return logits

    def forked(self, rows):
        before = getattr(self, "rows", [((), ())] * len(self.seen))
        select(self, rows)
        self.rows = [before[row] for row in rows]

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", recorded)
        patch.setattr(KVCache, "select", forked)
        work()
    return found


def test_few_decisions_flip_in_float32(real, monkeypatch, record_property):
    """Batched and shared against alone, on the demo checkpoint: rounding differs, so that a rank may."""
    solved = "".join(f"Question: {question}\nAnswer: {choices[right]}\n\n" for question, choices, right in CHOICE[1:4])
    requests = instances("loglikelihood", [(solved + CHOICE[0][0], " " + choice) for choice in CHOICE[0][1][1:]])
    for name in PRESETS:
        found = []
        for batch in (1, 8):
            lm = FilteredLM(*real, preset(name, prune=0.5), batch)
            found.append(decisions(monkeypatch, functools.partial(lm.loglikelihood, requests)))
        texts = sorted(found[0], key=len)[-len(requests) :]
        alone, shared = (torch.cat([torch.tensor(decided[text]) for text in texts]) for decided in found)
        flipped = float((alone != shared).double().mean())
        record_property(f"flipped, {name}", flipped)
        print(f"{name}: {flipped:.2e} of {alone.numel()} decisions flipped")
        assert 0.2 < float(alone.double().mean()) < 0.6 and flipped < 0.01


# ------------------------------------------------------------------------------------------------ the command line


QUESTION = {"choices": {"text": ["sand", "water", "wood", "glass"], "label": ["A", "B", "C", "D"]}, "answerKey": "B"}
ROWS = {  # each data set's own columns
    "boolq": {"question": "is ice frozen water", "passage": "Ice is frozen water.", "idx": 0, "label": 1},
    "piqa": {"goal": "To dry a cup,", "sol1": "use a towel.", "sol2": "use a lamp post.", "label": 0},
    "hellaswag": {
        "ind": 4, "activity_label": "Cooking", "ctx_a": "A man boils water.", "ctx_b": "he", "ctx": "A man boils water. he",
        "endings": ["adds the rice.", "paints it [title] red.", "swims off.", "sleeps."], "label": "0",
    },
    "winogrande": {"sentence": "Tom thanked Jim because _ had helped.", "option1": "Tom", "option2": "Jim", "answer": "2"},
    "arc_easy": {"id": "a", "question": "What does ice melt into?", **QUESTION},
    "arc_challenge": {"id": "b", "question": "What fills the sea?", **QUESTION},
    "openbookqa": {"id": "c", "question_stem": "Rain consists of", **QUESTION},
    "wikitext": {"page": " = Ice = \n Ice is water that is frozen , and it floats on water . \n"},
    "mmlu": {"question": "What is ice? ", "subject": "x", "choices": ["sand", "water", "wood", "glass"], "answer": 1},
}  # fmt: skip
FOLDERS = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "wikitext", "mmlu/default")
FIRST = {  # the first request that must come out of these rows
    "boolq": ("Ice is frozen water.\nQuestion: is ice frozen water?\nAnswer:", " no"),
    "piqa": ("Question: To dry a cup,\nAnswer:", " use a towel."),
    "hellaswag": ("Cooking: A man boils water. He", " adds the rice."),
    "winogrande": ("Tom thanked Jim because Tom", " had helped."),
    "arc_easy": ("Question: What does ice melt into?\nAnswer:", " sand"),
    "arc_challenge": ("Question: What fills the sea?\nAnswer:", " sand"),
    "openbookqa": ("Rain consists of", " sand"),
    "wikitext": (" = Ice =\nIce is water that is frozen, and it floats on water.\n",),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """--include-path arguments: the harness's own YAML files, and ones that only put local rows in place of their data."""
    folder = tmp_path_factory.mktemp("stand-ins")
    own = [str(Path(lm_eval.__file__).parent / "tasks" / name) for name in FOLDERS]
    index = lm_eval.tasks.TaskManager(include_path=own, include_defaults=False).task_index
    for name, entry in index.items():
        kind = "mmlu" if name.startswith("mmlu_") else name
        if entry.kind.name == "TASK" and kind in ROWS:
            stand_in(folder, name, [ROWS[kind]] * 3, {"include": str(entry.yaml_path)})
    return [argument for path in (*own, folder) for argument in ("--include-path", str(path))]


def test_the_paper_s_tasks_build_their_requests(stand_ins):
    loaded, lines = load_tasks([name for suite in SUITES.values() for name in suite], stand_ins[1::2])
    assert list(lines) == [name for suite in SUITES.values() for name in suite] and len(lines["mmlu"]) == 57
    parts = {}
    for name, task in loaded["tasks"].items():
        task.build_all_requests(limit=2)
        parts[name] = [request.args for request in task.instances]
    assert {name: parts[name][0] for name in FIRST} == FIRST
    mmlu = {name: requests for name, requests in parts.items() if name.startswith("mmlu_")}
    assert len(mmlu) == 57 and all(len(requests) == 8 for requests in mmlu.values())
    header = "The following are multiple choice questions (with answers) about astronomy.\n\n"
    assert mmlu["mmlu_astronomy"][1] == (header + "What is ice?\nA. sand\nB. water\nC. wood\nD. glass\nAnswer:", " B")


def run(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_table_of_a_suite(checkpoint, stand_ins, capsys):
    """Every figure comes from the JSON form; averages and differences add up; short texts are named."""
    arguments = [checkpoint, "--suite", "commonsense", *stand_ins, "--tasks", "mmlu_astronomy", "--limit", 2]
    arguments += ["--preset", "cache", "--prune", 0.5, 0, "--warmup", 25]
    shown = run(capsys, *arguments).splitlines()
    results = json.loads(run(capsys, *arguments, "--json"))["results"]
    assert [row["setting"] for row in results] == ["dense", "cache 0.5, warmup 25"] and results[1]["filter"]["warmup"] == 25

    dense, filtered = (row["tasks"] for row in results)
    names = [*SUITES["commonsense"], "mmlu_astronomy", "average"]
    assert list(dense) == names
    assert " ".join(shown[0].split()) == "setting task metric value stderr - dense stderr skipped KV held KV read whole"
    for table in (dense, filtered):
        for metric in ("acc", "acc_norm"):
            values = torch.tensor([table[name]["metrics"][metric] for name in names[:-1] if metric in table[name]["metrics"]])
            expected = values[:, 0].mean(), values[:, 1].square().sum().sqrt() / len(values)
            assert table["average"]["metrics"][f"{metric} of {len(values)}"] == pytest.approx([float(x) for x in expected], abs=1e-6)
    assert all((row["skip_ratio"], row["kv_held"], row["kv_read"]) == (0, 1, 1) for row in dense.values())
    assert filtered["mmlu_astronomy"]["skip_ratio"] > 0.2 and filtered["mmlu_astronomy"]["unfiltered"] == 0
    assert dense["piqa"]["texts"] == 4 and dense["mmlu_astronomy"]["texts"] == 8

    for name, row in filtered.items():
        for metric, (change, error) in row["- dense"].items():
            assert change == pytest.approx(row["metrics"][metric][0] - dense[name]["metrics"][metric][0])
            if name != "average":
                pairs = zip(row["outcomes"][metric], dense[name]["outcomes"][metric])
                assert error == pytest.approx(statistics.stdev(a - b for a, b in pairs) / 2**0.5)
    assert len(filtered["average"]["- dense"]) == 2 and not any("- dense" in row for row in dense.values())

    (line,) = (line for line in shown if line.startswith("cache 0.5, warmup 25  mmlu_astronomy "))
    row = filtered["mmlu_astronomy"]
    expected = *row["metrics"]["acc"], *row["- dense"]["acc"], row["skip_ratio"], row["kv_held"], row["kv_read"]
    assert [float(figure) for figure in line.split()[6:-1]] == pytest.approx(expected, abs=1e-4) and line.split()[-1] == "0%"
    assert any(line.startswith("cache 0.5, warmup 25  openbookqa") and line.endswith(" 100%") for line in shown)


def test_rivals_skip_as_much_and_other_tokens(checkpoint, local, capsys):
    arguments = ["--tasks", "local_choice", "--include-path", local, "--prune", 0, 0.5, "--recent", 0, "--warmup", 2, "--json"]
    shown = json.loads(run(capsys, checkpoint, *arguments, "--preset", "paper", "cache", "--rivals"))["results"]
    names = ["dense", "paper 0.5, warmup 2", "paper 0.5, warmup 2, random"]
    names += ["cache 0.5, recent 0, warmup 2", "cache 0.5, recent 0, warmup 2, random", "last layers 0.5"]
    assert [row["setting"] for row in shown] == names
    rows = [row["tasks"]["local_choice"] for row in shown[1:]]
    assert all(0.3 < row["skip_ratio"] < 0.7 for row in rows) and len({row["skip_ratio"] for row in rows}) == 5


def test_the_table_compares_with_dense():
    """Paired by question; without the questions' own values, or with one question, no standard error."""
    lm = SimpleNamespace(used={"a": [[40, 10, 30, 5, 10]], "b": [[40, 0, 40, 10, 10]]}, filter=None)
    lm.model = SimpleNamespace(config=SimpleNamespace(n_layers=4))

    def results(a, b):
        outcomes = {"a": a, "b": b}
        samples = {name: [{"filter": "none", "acc": value} for value in values] for name, values in outcomes.items()}
        return {"results": {name: {"acc,none": sum(values) / len(values)} for name, values in outcomes.items()}, "samples": samples}

    lines = {"a": ["a"], "b": ["b"]}
    dense = summarise(results([1, 1, 0, 1], [0.5]), lm, lines)
    table = summarise(results([1, 0, 0, 0], [0.75]), lm, lines)
    compare(table, dense)
    assert table["a"]["metrics"] == {"acc": (0.25, None)} and table["a"]["skip_ratio"] == 0.25 and table["a"]["kv_read"] == 0.5
    assert table["a"]["- dense"]["acc"] == pytest.approx((-0.5, statistics.stdev([0, -1, 0, -1]) / 2))
    assert table["b"]["- dense"]["acc"] == (0.25, None) and table["average"]["- dense"]["acc of 2"] == (-0.125, None)


def test_a_group_is_one_line(checkpoint, stand_ins, capsys):
    shown = run(capsys, checkpoint, "--suite", "mmlu", *stand_ins, "--prune", 0, "--limit", 1, "--num-fewshot", 0, "--json")
    (only,) = json.loads(shown)["results"]
    assert list(only["tasks"]) == ["mmlu"] and only["tasks"]["mmlu"]["texts"] == 57 * 4


def test_few_shot_and_generation(checkpoint, local, capsys):
    def longest(shots, *more):
        arguments = ["--tasks", "local_choice", "local_generate", "--include-path", local, "--prune", 0, "--num-fewshot", shots, *more]
        return json.loads(run(capsys, checkpoint, *arguments, "--json"))["results"][0]["tasks"]["local_choice"]["longest"]

    assert longest(2) > 2 * longest(0)
    assert longest(0, "--chat") > longest(0) + 5


def test_every_setting_gets_the_same_prompts(checkpoint, local, capsys, monkeypatch):
    """Solved examples that are drawn at random are the same ones, and so is whatever else a task draws."""
    asked, loglikelihood = [], FilteredLM.loglikelihood

    def recorded(self, requests, *rest, **more):
        asked.append(([request.args for request in requests], random.random()))
        return loglikelihood(self, requests, *rest, **more)

    monkeypatch.setattr(FilteredLM, "loglikelihood", recorded)
    arguments = [checkpoint, "--tasks", "local_choice", "--include-path", local, "--num-fewshot", 2, "--prune", 0, 0.2, 0.5]
    run(capsys, *arguments)
    assert len(asked) == 3 and asked[0] == asked[1] == asked[2] and len({context.rpartition("\n\n")[0] for (context, _) in asked[0][0]}) > 3
    run(capsys, *arguments, "--fewshot-seed", 5, "--seed", 5)
    assert asked[3][0] != asked[0][0] and asked[3][1] != asked[0][1]


@pytest.mark.parametrize("chat", [True, False])
def test_asks_as_simple_evaluate_does(checkpoint, local, capsys, monkeypatch, chat):
    """Solved examples in a chat are turns of the two; what a task draws at random, with any of the three generators, is the same."""
    asked, numbers = [], []

    def recorded(self, requests, *rest, **more):
        asked.append([request.args for request in requests])
        numbers.append((random.random(), np.random.random(), float(torch.rand(1))))
        for request in requests:
            self.used[request.task_name].append([1, 0, 1, 1, 1])
        return ["" if request.request_type == "generate_until" else (0.0, False) for request in requests]

    monkeypatch.setattr(FilteredLM, "loglikelihood", recorded)
    monkeypatch.setattr(FilteredLM, "generate_until", recorded)
    tasks = ["local_choice", "local_generate"]
    arguments = [checkpoint, "--tasks", *tasks, "--include-path", local, "--num-fewshot", 2, "--prune", 0, 0.5, *["--chat"] * chat]
    run(capsys, *arguments)
    manager = lm_eval.tasks.TaskManager(include_path=str(local), include_defaults=False)
    shots = {"num_fewshot": 2, "apply_chat_template": chat}
    lm_eval.simple_evaluate(FilteredLM(*load(checkpoint, "cpu")), tasks=tasks, task_manager=manager, **shots)
    assert len(asked) == 6 and asked[:2] == asked[2:4] == asked[4:] and numbers[:2] == numbers[2:4] == numbers[4:]
    prompts = [asked[0][0][0], asked[1][0][0]]
    assert [prompt.count("<s>assistant: ") for prompt in prompts] == [2 * chat] * 2


def test_a_loss_without_bound_and_empty_texts(checkpoint, local, capsys, monkeypatch):
    """One line where the harness has no figure for them, nothing where it has; infinity is null in JSON."""
    empty = yaml.safe_load((local / "local_rolling.yaml").read_text())
    for name, metric in (("words", "word_perplexity"), ("bytes", "byte_perplexity")):
        stand_in(local, f"empty_{name}", [{"text": ""}], {**empty, "metric_list": [{"metric": metric}]})
    arguments = [str(checkpoint), "--include-path", str(local), "--prune", "0", "--device", "cpu", "--tasks"]
    (row,) = json.loads(run(capsys, *arguments, "empty_words", "--json"))["results"]
    assert row["tasks"]["empty_words"]["metrics"] == {"word_perplexity": [1.0, None]} and row["tasks"]["empty_words"]["longest"] == 0
    model, tokenizer = load(checkpoint, "cpu")
    model.head.weight.mul_(1e5)
    monkeypatch.setattr(eval_tasks, "load", lambda *_, **__: (model, tokenizer))
    for task in ("empty_bytes", "local_rolling"):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, task])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
        assert stopped.value.code == 2 and "dense: the harness cannot make figures" in line
    assert report.finite({"a": [math.inf, (1, math.nan)], "b": "inf"}) == {"a": [None, [1, None]], "b": "inf"}


def test_an_empty_context_without_bos_and_eos(checkpoint, local, capsys, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    for file in ("config.json", "generation_config.json"):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, "bos_token_id": None, "eos_token_id": None}))
    with pytest.raises(SystemExit):
        main([str(folder), "--include-path", str(local), "--tasks", "local_rolling", "--device", "cpu"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "an empty context has to become a BOS or EOS token" in line


def test_a_checkpoint_is_downloaded_and_data_sets_are_not(tmp_path):
    """Unless HF_HUB_OFFLINE=0 says so. Nobody listens where the hub should be, but it is asked for the checkpoint."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1"}
    code = "import eval_tasks, datasets, evaluate; print(datasets.config.HF_HUB_OFFLINE, evaluate.config.HF_EVALUATE_OFFLINE); "
    code += "eval_tasks.main(['org/small', '--tasks', 'common_sense'])"
    for more, offline in (({}, "True True"), ({"HF_HUB_OFFLINE": "0"}, "False False")):
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env=env | more, check=False)
        assert done.stdout.split("\n")[0] == offline and done.returncode == 2
        assert re.search("org/small.*does not answer", done.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--suite or --tasks"),
        (["--tasks", "local_choice", "--batch", "0"], "--batch"),
        (["--tasks", "local_choice", "--gamma", "2"], "gamma"),
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--tasks", "gone"], "gone: its data cannot be loaded: .*someone/gone.* HF_HUB_OFFLINE=0"),
        (["--tasks", "missing"], "missing: its data cannot be loaded: Unable to find '/none/choice.jsonl'; is the path"),
        (["--tasks", "local_choice", "--include-path", "/none"], "--include-path /none: no such folder"),
        (["--tasks", "local_choice", "--dtype", "float16"], "from layer 1 on, values are not finite"),
        (["--tasks", "local_generate", "--dtype", "float16"], "from layer 1 on, values are not finite"),
        (["--tasks", "local_too_long"], "continuation has 2[0-9]* tokens"),
        (["--tasks", "local_beams"], "num_beams is not supported at this value"),
        (["--tasks", "local_no_temperature"], "local_no_temperature: .*do_sample draws at random, which takes a temperature"),
        (["--tasks", "local_choice", "--seed", str(2**32)], "--seed must be below"),
    ],
)
def test_one_line_says_what_is_wrong(arguments, named, checkpoint, local, capsys, monkeypatch):
    own = functools.partial(eval_tasks.TaskManager, include_defaults=False)  # without the harness's thousands of files
    monkeypatch.setattr(eval_tasks, "TaskManager", lambda include_path, **_: own(include_path=include_path))
    text = (local / "local_choice.yaml").read_text().replace("task: local_choice", "task: gone")
    (local / "gone.yaml").write_text(text.replace("path: json", "path: someone/gone"))
    missing = re.sub(r"/\S*choice.jsonl", "/none/choice.jsonl", text.replace("task: gone", "task: missing"))
    (local / "missing.yaml").write_text(missing)
    if "float16" in arguments:
        model, tokenizer = load(checkpoint, "cpu")
        model.half().blocks[1].mlp.up.weight[:] = 6e4
        monkeypatch.setattr(eval_tasks, "load", lambda *_, **__: (model, tokenizer))
    with pytest.raises(SystemExit) as stopped:
        main([str(checkpoint), "--include-path", str(local), "--device", "cpu", *arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert stopped.value.code == 2 and len(lines) == 1
    assert re.search(named, lines[0])


def test_without_the_harness_it_says_what_to_install():
    code = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_path('eval_tasks.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "--tasks", "any"], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "requirements-extra.txt" in done.stderr
