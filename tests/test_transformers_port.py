"""The port into transformers: the golden files, this repository's model, and families that only
transformers has. All models here are tiny and in float64, but for the demo checkpoint.
"""

import contextlib
import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

# ruff: noqa: E402
from filter_config import FilterConfig, preset
from golden.check import CALLS, INDEX, LENGTHS, PRUNES, SHAPE, golden, one_by_one
from load_weights import load_model
from ports.transformers_cache import (
    TokenFilterCache,
    TokenFilterLayer,
    attach,
    detach,
    unrotate,
)

ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Windows so small that texts of 90 tokens have far ones.
FILTERS = {
    "cache": preset("cache", warmup=4, history=16, recent=6),
    "local": preset("local", warmup=4, history=16, recent=6),
    "paper": preset("paper", warmup=4, history=16),
}
# Layers of ratio 1; tokens that skip attention, but stay in sight of the next five; keys before
# RoPE, without queries; and keys after it, with them.
MORE_FILTERS = {
    "ratio 1": preset("paper", prune=0.8, warmup=4, history=16),
    "skip, recent 5": preset("paper", recent=5, warmup=4, history=16),
    "cache, keys alone": preset("cache", fusion="key", warmup=4, history=16, recent=6),
    "local, queries": preset("local", fusion="key-query", warmup=4, history=16, recent=6),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --------------------------------------------------------------------------------- tiny models


def exact(model):
    """The model with norms and RoPE's angles in float64: transformers computes them in float32, in
    whatever dtype a model is.
    """
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon)
            norm.weight = module.weight
            parent_name, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent_name), own_name, norm)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = functools.partial(exact_rotary, module)
    return model


def exact_rotary(module, x, position_ids):
    angle = position_ids[..., None].double() * module.inv_freq.double()
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * module.attention_scaling, angle.sin() * module.attention_scaling


@functools.cache
@torch.no_grad()
def tiny(family, **changes):
    """A random float64 model whose attention is far from uniform, every bias at work."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, 0.15)
        elif "bias" in name:
            parameter.normal_(0, 0.1)
    model.generation_config.eos_token_id = None
    return model


def random_prompts(*lengths, seed=2):
    """Prompts that do not begin with the same token twice, as those of seed 1 do. In the first
    layer both have a cosine of 1, but for rounding, so preset "cache" would rank them differently
    where the rotation is undone and where it was never done.
    """
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=rng) for n in lengths]


def left_padded(prompts):
    """Prompts as a batch: ids and mask, (B, longest) each."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    mask = [
        nn.functional.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts
    ]
    return torch.stack(ids), torch.stack(mask)


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def feed(model, cache, ids, mask, chunk=1000):
    """Logits (B, T, vocab) of ids fed in chunks, and each layer's decisions, (B, T) each."""
    logits = []
    decisions = [[] for _ in cache.layers]
    positions = positions_of(mask)
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        output = model(
            ids[:, part],
            attention_mask=mask[:, : start + chunk],
            position_ids=positions[:, part],
            past_key_values=cache,
        )
        logits.append(output.logits)
        for chunks, layer in zip(decisions, cache.layers):
            chunks.append(layer.redundant)
    return torch.cat(logits, dim=1), [torch.cat(chunks, dim=1) for chunks in decisions]


# ------------------------------------------------------------------------------ the golden files

MODEL_FILES = INDEX["model"]["files"]
GOLDEN_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn",
}


def hugging_face_name(name):
    """blocks.0.attn.q.weight -> model.layers.0.self_attn.q_proj.weight"""
    parts = name.split(".")
    if parts[0] != "blocks":
        return f"{GOLDEN_NAMES[parts[0]]}.{parts[1]}"
    layer = f"model.layers.{parts[1]}"
    module = GOLDEN_NAMES.get(parts[2], parts[2])
    if len(parts) == 4:
        return f"{layer}.{module}.{parts[3]}"
    return f"{layer}.{module}.{parts[3]}_proj.{parts[4]}"


@functools.cache
def golden_llama(name):
    """LlamaForCausalLM with the weights of a golden file."""
    weights = {part: x for part, x in golden("model").items() if part.endswith(".weight")}
    weights |= {part: x for part, x in golden(name).items() if part.endswith(".bias")}
    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["width"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        head_dim=SHAPE["head_dim"],
        intermediate_size=SHAPE["mlp_width"],
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
        rms_norm_eps=SHAPE["norm_eps"],
        max_position_embeddings=SHAPE["max_positions"],
        attention_bias="shape" in MODEL_FILES[name],
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    named = {hugging_face_name(part): torch.tensor(x) for part, x in weights.items()}
    model.load_state_dict(named)
    return exact(model)


def feed_golden(model, cache, calls, left):
    """All that the files expect, (B, T, ...), of the golden tokens fed in these calls."""
    tokens = torch.tensor(golden("model")["tokens"]).long()
    B, T = tokens.shape
    L = SHAPE["n_layers"]
    found = {
        "logits": torch.zeros(B, T, SHAPE["vocab_size"], dtype=torch.float64),
        "n": torch.zeros(B, T, L, dtype=torch.int64),
        "redundant": torch.zeros(B, T, L, dtype=torch.bool),
        "score": torch.full((B, T, L), torch.nan, dtype=torch.float64),
    }
    done = torch.zeros(B, dtype=torch.int64)
    mask = torch.zeros(B, 0, dtype=torch.int64)
    for call in torch.tensor(calls):
        longest = int(call.max())
        column = torch.arange(longest)
        first = longest - call if left else torch.zeros_like(call)
        step = column - first[:, None]
        is_real = (step >= 0) & (step < call[:, None])
        positions = (done[:, None] + step).clamp(min=0, max=T - 1)
        mask = torch.cat((mask, is_real.long()), dim=1)
        visible = []
        with watch_visible(visible):
            output = model(
                tokens.gather(1, positions),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
            )
        b, t = is_real.nonzero(as_tuple=True)
        at = (b, positions[b, t])
        found["logits"][at] = output.logits[b, t]
        for number, layer in enumerate(cache.layers):
            found["n"][..., number][at] = visible[number].sum(-1)[b, t]
            found["redundant"][..., number][at] = layer.redundant[b, t]
            if layer.score is not None:
                found["score"][..., number][at] = layer.score[b, t]
        done += call
    return found


@contextlib.contextmanager
def watch_visible(masks):
    """Collects the masks (B, T, K) that the layers make."""
    original = TokenFilterLayer.visible

    def visible(layer, *args):
        masks.append(original(layer, *args))
        return masks[-1]

    TokenFilterLayer.visible = visible
    try:
        yield
    finally:
        TokenFilterLayer.visible = original


WAYS = {
    "rows unequal by calls": (CALLS, False),
    "whole, padded right": ([LENGTHS], False),
    "whole, padded left": ([LENGTHS], True),
    "unequal and padded left": (CALLS, True),
    "half of it token by token": ([[32, 20, 9], *one_by_one([32, 20, 8])], False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_golden_model_files(name, way):
    calls, left = WAYS[way]
    model = golden_llama(name)
    for p, prune in enumerate([0.0] if name == "model" else PRUNES):
        config = FilterConfig(**MODEL_FILES[name]["config"] | {"prune": prune})
        found = feed_golden(model, TokenFilterCache(model, config), calls, left)
        if name == "model":
            expected = {"logits": golden("model")["dense"]}
        else:
            parts = ("logits", "n", "redundant", "score")
            expected = {part: golden(name)[part][p] for part in parts}
        for part, want in expected.items():
            want = torch.tensor(want)
            got = found[part].to(want.dtype)
            for b, n in enumerate(LENGTHS):
                same = torch.isclose(got[b, :n], want[b, :n], rtol=0, atol=1e-9, equal_nan=True)
                assert same.all(), f"{part}, row {b}, prune {prune}"


# -------------------------------------------------------------------- this repository's own model

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 40},
    "qwen2": {},
    "phi3": {"sliding_window": None},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """The same weights as transformers' model and as ours."""
    theirs = tiny(request.param, **FAMILIES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ours = load_model(folder, "cpu", torch.float64)
    return exact(copy.deepcopy(theirs)), ours


@pytest.mark.parametrize("name", FILTERS)
def test_decides_and_answers_as_our_model(pair, name):
    """Three rows of 90, 31 and 7 tokens, fed whole and in chunks of 13, then 30 steps."""
    theirs, ours = pair
    prompts = random_prompts(90, 31, 7)
    assert_same_as_ours(theirs, ours, FILTERS[name], prompts, chunk=1000, n_steps=0)
    assert_same_as_ours(theirs, ours, FILTERS[name], prompts, chunk=13, n_steps=30)


@pytest.mark.parametrize("name", MORE_FILTERS)
@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_decides_and_answers_as_our_model_with_other_filters(pair, name):
    theirs, ours = pair
    prompts = random_prompts(90, 31, 7)
    assert_same_as_ours(theirs, ours, MORE_FILTERS[name], prompts, chunk=13, n_steps=10)


@pytest.mark.parametrize("name", FILTERS)
def test_decides_and_answers_as_our_model_without_padding(pair, name):
    theirs, ours = pair
    assert_same_as_ours(theirs, ours, FILTERS[name], random_prompts(90), chunk=1000, n_steps=10)


def assert_same_as_ours(theirs, ours, config, prompts, chunk, n_steps):
    B = len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids, mask = left_padded(prompts)
    their_cache = TokenFilterCache(theirs, config)
    their_logits, their_decisions = feed(theirs, their_cache, ids, mask, chunk)
    our_cache = ours.new_cache(B, config)
    our_logits = ours(nn.utils.rnn.pad_sequence(prompts, batch_first=True), our_cache, lengths)
    our_decisions = [decisions.redundant for decisions in our_cache.decisions()]
    for b, n in enumerate(lengths):
        assert_close(their_logits[b, -n:], our_logits[b, :n])
        for their_layer, our_layer in zip(their_decisions, our_decisions):
            assert torch.equal(their_layer[b, -n:], our_layer[b, :n])

    latest = our_logits[torch.arange(B), lengths - 1]
    for _ in range(n_steps):
        token = latest.argmax(-1, keepdim=True)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        output = theirs(
            token,
            attention_mask=mask,
            position_ids=positions_of(mask)[:, -1:],
            past_key_values=their_cache,
        )
        latest = ours(token, our_cache, last=True)
        assert_close(output.logits[:, -1], latest)
        for layer, decisions in zip(their_cache.layers, our_cache.decisions()):
            assert torch.equal(layer.redundant, decisions.redundant)
        usage = their_cache.usage()
        parts = torch.stack((usage.pairs, usage.redundant, usage.held), dim=1)
        assert torch.equal(parts, our_cache.usage()[:, :3])
    assert our_cache.usage()[0, 1] > 0.3 * our_cache.usage()[0, 0]


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# --------------------------------------------------------------- families that we do not have

FOREIGN = {
    "gemma3_text": {"sliding_window": 40, "query_pre_attn_scalar": 16, "head_dim": 16},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": None},
}


@pytest.fixture(params=FOREIGN)
def foreign(request):
    changes = {name: value for name, value in FOREIGN[request.param].items() if value is not None}
    return tiny(request.param, **changes)


def test_foreign_families_are_themselves_without_a_filter(foreign):
    ids, mask = left_padded(random_prompts(90, 31))
    plain = foreign(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    found, _ = feed(foreign, TokenFilterCache(foreign, preset("cache", prune=0.0)), ids, mask, 13)
    for b, n in enumerate((90, 31)):
        torch.testing.assert_close(found[b, -n:], plain[b, -n:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FILTERS)
def test_foreign_families_whole_in_chunks_and_padded(foreign, name):
    """Tolerances are those of float32, in which transformers computes norms and angles."""
    prompts = random_prompts(90, 110)
    alone = prompts[0][None]
    everyone = torch.ones_like(alone)
    whole = TokenFilterCache(foreign, FILTERS[name])
    expected, decisions = feed(foreign, whole, alone, everyone)
    usage = whole.usage()
    assert 0.3 * usage.pairs < usage.redundant
    assert usage.held < 0.8 * usage.pairs

    cache = TokenFilterCache(foreign, FILTERS[name])
    found, again = feed(foreign, cache, alone, everyone, chunk=13)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(decisions, again))

    cache = TokenFilterCache(foreign, FILTERS[name])
    feed(foreign, cache, alone[:, :70], everyone[:, :70])
    for t in range(70, 90):  # token by token
        logits = foreign(alone[:, t : t + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=0, atol=1e-4)

    ids, mask = left_padded(prompts)
    found, again = feed(foreign, TokenFilterCache(foreign, FILTERS[name]), ids, mask, 37)
    torch.testing.assert_close(found[:1, 20:], expected, rtol=0, atol=1e-4)
    assert all(torch.equal(a, b[:1, 20:]) for a, b in zip(decisions, again))


def test_keys_are_turned_back_where_yarn_stretches_them():
    """Keys of a model with YaRN have rotated channels that are longer than the others."""
    model = tiny("phi", partial_rotary_factor=0.5, num_key_value_heads=4)
    module = model.model.layers[0].self_attn
    R = module.rotary_ndims
    k = torch.randn(2, 4, 5, 16, dtype=torch.float64)
    angle = torch.randn(2, 5, R // 2, dtype=torch.float64).repeat(1, 1, 2)
    cos = 1.3 * angle.cos()
    sin = 1.3 * angle.sin()
    apply_rope = transformers.models.phi.modeling_phi.apply_rotary_pos_emb
    _, rotated = apply_rope(k[..., :R], k[..., :R], cos, sin)
    k_rotated = torch.cat((rotated, k[..., R:]), dim=-1)
    assert_close(unrotate(module, k_rotated, (cos, sin)), k)


# --------------------------------------------------------------------------- ways to generate


@pytest.fixture
def llama():
    model = copy.deepcopy(tiny("llama"))
    yield model
    detach(model)


def new_cache(model, name="cache"):
    return TokenFilterCache(model, FILTERS[name])


def generate(model, ids, mask=None, n=20, **options):
    if mask is None:
        mask = torch.ones_like(ids)
    options = {"do_sample": False} | options
    return model.generate(ids, attention_mask=mask, max_new_tokens=n, **options)


def text_score(model, text, n):
    """The log probability of the last n tokens, the whole text fed anew."""
    log_probs = model(text, past_key_values=new_cache(model)).logits.log_softmax(-1)
    return log_probs[:, -n - 1 : -1].gather(2, text[:, -n:, None]).sum((1, 2))


def test_padded_batch_and_chunks_generate_as_alone(llama):
    prompts = random_prompts(60, 45)
    ids, mask = left_padded(prompts)
    together = generate(llama, ids, mask, past_key_values=new_cache(llama))
    in_chunks = generate(llama, ids, mask, past_key_values=new_cache(llama), prefill_chunk_size=16)
    assert torch.equal(together, in_chunks)
    for prompt, text in zip(prompts, together):
        alone = generate(llama, prompt[None], past_key_values=new_cache(llama))
        assert torch.equal(alone[0, -20:], text[-20:])
    assert not torch.equal(together, generate(llama, ids, mask))  # dense


def test_beams(llama):
    ids, mask = left_padded(random_prompts(60, 45))
    output = generate(
        llama,
        ids,
        mask,
        past_key_values=new_cache(llama),
        num_beams=4,
        num_return_sequences=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, n_padding in enumerate((0, 0, 15, 15)):
        text = output.sequences[row : row + 1, n_padding:]
        score = text_score(llama, text, 20)
        found = output.sequences_scores[row : row + 1].double()
        torch.testing.assert_close(found, score, rtol=0, atol=1e-5)


def test_several_sequences_of_a_prompt(llama):
    (prompt,) = random_prompts(60)
    options = {"do_sample": True, "top_k": 1}  # sampling, of which only one text can come
    cache = new_cache(llama)
    texts = generate(llama, prompt[None], past_key_values=cache, num_return_sequences=3, **options)
    alone = generate(llama, prompt[None], past_key_values=new_cache(llama))
    assert torch.equal(texts, alone.repeat(3, 1))
    assert cache.usage().pairs.tolist() == 3 * [4 * 79]


def test_a_second_turn_and_a_reset(llama):
    (prompt, question) = random_prompts(60, 9)
    cache = new_cache(llama)
    first = generate(llama, prompt[None], past_key_values=cache)
    both = torch.cat((first, question[None]), dim=1)
    second = generate(llama, both, past_key_values=cache)
    assert cache.usage().pairs.tolist() == [4 * (60 + 20 + 9 + 20 - 1)]
    assert torch.equal(second, generate(llama, both, past_key_values=new_cache(llama)))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(first, generate(llama, prompt[None], past_key_values=cache))


def test_rows_are_selected_and_repeated(llama):
    """A row that was copied or moved goes on as it would have."""
    ids = torch.stack(random_prompts(60, 60))
    next_token = torch.tensor([[5]])
    expected = []
    for row in ids:
        cache = new_cache(llama)
        llama(row[None], past_key_values=cache)
        expected.append(llama(next_token, past_key_values=cache).logits[0])

    cache = new_cache(llama)
    llama(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)  # rows 0 0 1 1
    cache.batch_select_indices(torch.tensor([3, 0]))
    found = llama(next_token.repeat(2, 1), past_key_values=cache).logits
    assert_close(found, torch.stack((expected[1], expected[0])))


def test_usage_counts_and_bytes(llama):
    cache = new_cache(llama)
    assert cache.usage().nbytes == 0
    llama(random_prompts(90)[0][None], past_key_values=cache)
    usage = cache.usage()
    assert usage.pairs.tolist() == [4 * 90]
    assert 0.4 * usage.pairs < usage.redundant < 0.6 * usage.pairs
    assert usage.redundant <= usage.pairs - usage.held + 4 * 7
    of_slots = 2 * 2 * 16 * 8 + 8 + 1  # K and V of two heads, the position, and whether it is kept
    # Of each layer three averages of two heads, three histories of 16 numbers, and a count.
    of_state = 4 * (3 * 2 * 16 * 8 + 3 * 16 * 8 + 8)
    longest = sum(layer.stored.positions.shape[1] for layer in cache.layers)
    assert usage.nbytes == longest * of_slots + of_state


def test_bfloat16(llama):
    model = copy.deepcopy(llama).bfloat16()
    cache = new_cache(model)
    ids, mask = left_padded(random_prompts(60, 45))
    assert generate(model, ids, mask, past_key_values=cache).shape == (2, 80)
    assert cache.layers[0].stored.kv.dtype == torch.bfloat16
    assert cache.layers[0].state.anchor.dtype == torch.float32


# ----------------------------------------------------------------------------- attach and detach


def test_attached_model_filters_every_call(llama):
    ids, mask = left_padded(random_prompts(60, 45))
    dense = generate(llama, ids, mask)
    dense_logits = llama(ids, attention_mask=mask).logits
    filtered = generate(llama, ids, mask, past_key_values=new_cache(llama))
    filtered_logits = llama(ids, attention_mask=mask, past_key_values=new_cache(llama)).logits
    assert not torch.equal(dense, filtered)

    attach(llama, FILTERS["cache"])
    for _ in range(2):
        assert torch.equal(generate(llama, ids, mask), filtered)
    assert torch.equal(llama(ids, attention_mask=mask).logits, filtered_logits)
    assert torch.equal(llama(ids, attention_mask=mask, use_cache=False).logits, filtered_logits)
    assert llama(ids).past_key_values.usage().redundant.min() > 0

    attach(llama, FILTERS["local"])  # in the place of the other
    local = generate(llama, ids, mask, past_key_values=new_cache(llama, "local"))
    assert torch.equal(generate(llama, ids, mask), local)

    detach(llama)
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(generate(llama, ids, mask), dense)
    assert torch.equal(llama(ids, attention_mask=mask).logits, dense_logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    detach(llama)  # nothing to do


def test_other_caches_are_left_alone(llama):
    ids, mask = left_padded(random_prompts(60, 45))
    dense = generate(llama, ids, mask)
    new_cache(llama)
    assert llama.config._attn_implementation == "token_filter"
    assert torch.equal(generate(llama, ids, mask), dense)


def test_lm_eval_scores_as_our_model(checkpoint):
    """Log-likelihoods of a real task's answers, through HFLM and an attached model. Questions have
    some 150 tokens here, as each byte is one.
    """
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = preset("cache", prune=0.5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    ours = load_model(checkpoint, "cpu", torch.float64)
    attach(exact(theirs), config)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=theirs, tokenizer=tokenizer, device="cpu", batch_size=4),
        tasks=["common_sense"],
        limit=3,
        task_manager=TaskManager(
            include_path=str(ROOT / "evaluation/common_sense"), include_defaults=False
        ),
        bootstrap_iters=0,
    )
    n_answers = 0
    for sample in found["samples"]["common_sense"]:
        for (question, answer), (response,) in zip(sample["arguments"], sample["resps"]):
            text = tokenizer.encode(question + answer)
            n = len(text) - len(tokenizer.encode(question))
            cache = ours.new_cache(1, config)
            log_probs = ours(torch.tensor([text]), cache)[0].log_softmax(-1)
            score = log_probs[-n - 1 : -1].gather(1, torch.tensor(text[-n:])[:, None]).sum()
            assert abs(response[0] - score) < 1e-4
            assert cache.usage()[0, 2] < cache.usage()[0, 0]
            n_answers += 1
    assert n_answers >= 6


def readme_snippets():
    text = (ROOT / "ports" / "README.md").read_text(encoding="utf-8")
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def test_readme_snippets_run(checkpoint, capsys, monkeypatch):
    """All but the quantised one, which needs bitsandbytes: of that one the imports are tried."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(ROOT)
    generating, quantised, measuring = readme_snippets()
    for snippet in (generating, measuring):
        assert "checkpoints/smollm2-135m" in snippet
        code = snippet.replace("checkpoints/smollm2-135m", str(checkpoint))
        code = code.replace("limit=8", "limit=2")
        exec(compile(code, "ports/README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "of the keys and values are held" in out
    assert "acc,none" in out

    imports = [line for line in quantised.splitlines() if line.startswith("from ")]
    exec("\n".join(imports), {})


# --------------------------------------------------------------------------------------- refusals


def test_assisted_decoding_is_refused(llama):
    ids = random_prompts(60)[0][None]
    with pytest.raises((NotImplementedError, ValueError), match="assist"):
        generate(llama, ids, past_key_values=new_cache(llama), prompt_lookup_num_tokens=3)
    attach(llama, FILTERS["cache"])
    with pytest.raises((NotImplementedError, ValueError), match="assist"):
        generate(llama, ids, prompt_lookup_num_tokens=3)


def test_a_static_cache_is_refused(llama):
    ids = random_prompts(60)[0][None]
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(llama, ids, past_key_values=new_cache(llama), cache_implementation="static")
    attach(llama, FILTERS["cache"])
    with pytest.raises(NotImplementedError, match="StaticCache: leave cache_implementation alone"):
        generate(llama, ids, cache_implementation="static")


def test_a_cache_filled_without_the_filter_is_refused(llama):
    ids = random_prompts(60)[0][None]
    cache = transformers.DynamicCache(config=llama.config)
    llama(ids, past_key_values=cache)
    attach(llama, FILTERS["cache"])
    with pytest.raises(ValueError, match="filled without the filter"):
        llama(ids, past_key_values=cache)


EXPERTS = {
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
}
CHUNKED = EXPERTS | {"attention_chunk_size": 64, "intermediate_size_mlp": 96}
LATENT = EXPERTS | {
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
UNSUPPORTED = {
    "llama4_text": (CHUNKED, "chunked attention"),
    "deepseek_v3": (LATENT, "MLA"),
    "bloom": ({}, "in a way of its own"),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_families_that_cannot_be_filtered_are_refused(family):
    changes, reason = UNSUPPORTED[family]
    config = transformers.AutoConfig.for_model(family, **SIZES | changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match=reason):
        attach(model, FILTERS["cache"])
    assert model.config._attn_implementation == before


def test_a_rotation_that_cannot_be_undone_is_refused(llama, monkeypatch):
    ids = random_prompts(60)[0][None]
    file = transformers.models.llama.modeling_llama
    original = file.apply_rotary_pos_emb
    cache = new_cache(llama)
    # The attention has its own reference to the function, as in families that name it otherwise.
    monkeypatch.delattr(file, "apply_rotary_pos_emb")
    monkeypatch.setattr(file, "rotate_all", original, raising=False)
    forward = file.LlamaAttention.forward
    names = forward.__globals__ | {"apply_rotary_pos_emb": original}
    own = type(forward)(forward.__code__, names, forward.__name__, forward.__defaults__)
    monkeypatch.setattr(file.LlamaAttention, "forward", own)
    with pytest.raises(NotImplementedError, match=r'LlamaAttention.*keys="rotated"'):
        llama(ids, past_key_values=cache)
    llama(ids, past_key_values=new_cache(llama, "local"))  # compares rotated keys


def test_an_attention_changed_or_detached_under_a_cache_is_refused(llama):
    ids = random_prompts(60)[0][None]
    cache = new_cache(llama)
    llama.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="attn_implementation was changed"):
        llama(ids, past_key_values=cache)
    cache = new_cache(llama)
    llama(ids, past_key_values=cache)
    detach(llama)
    with pytest.raises(NotImplementedError, match="make a new TokenFilterCache"):
        llama(ids, past_key_values=cache)


def test_training_and_masks_of_numbers_are_refused(llama):
    ids = random_prompts(60)[0][None]
    with pytest.raises(NotImplementedError, match="attention_mask"):
        mask = torch.zeros(1, 1, 60, 60, dtype=torch.float64)
        llama(ids, attention_mask=mask, past_key_values=new_cache(llama))
    llama.train()
    with pytest.raises(NotImplementedError, match="eval"):
        llama(ids, past_key_values=new_cache(llama))


# ----------------------------------------------------------------------------------- a real model


@pytest.mark.parametrize("name", ["paper", "local", "cache"])
def test_the_demo_checkpoint_says_and_holds_what_our_model_does(demo, name):
    theirs, ours, tokenizer = demo_models(str(demo))
    config = preset(name, prune=0.5)
    prompt = tokenizer.encode("The three laws of thermodynamics say that energy").ids * 6

    their_cache = TokenFilterCache(theirs, config)
    text = generate(theirs, torch.tensor([prompt]), n=12, past_key_values=their_cache)
    our_cache = ours.new_cache(1, config)
    token = ours.prefill([prompt], our_cache).argmax(-1)
    answer = [int(token)]
    while len(answer) < 12:
        token = ours(token[:, None], our_cache, last=True).argmax(-1)
        answer.append(int(token))

    assert text[0, len(prompt) :].tolist() == answer
    usage = their_cache.usage()
    assert [*map(int, usage[:3])] == our_cache.usage()[0, :3].tolist()
    assert usage.redundant > 0.3 * usage.pairs


@functools.cache
def demo_models(folder):
    from tokenizers import Tokenizer

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return theirs, load_model(folder, "cpu", torch.float32), tokenizer
