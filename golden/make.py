"""Makes the golden files: inputs and expected outputs of every stage of the method, for ports.

    python -m golden.make    (or `make golden`) rewrites golden/*.safetensors, golden/files.json

Nothing here calls the code that the files are to check. What is expected of the filter comes from
`filter_loop`, the plain loop in loop.py. What is expected of the model comes from `slow_model`
below, which goes through one token, one head and one key at a time. All of it is in float64. The
inputs are float32 (or float16) numbers, so that a port in float32 starts from the very same ones.
PORTING.md says how to use the files.

Shapes: B sequences, T tokens, H query heads, KVH key/value heads, D head size, C width of the
residual stream, M width of the MLP, L layers, V vocabulary, P values of prune.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from filter_config import PRESETS, FilterConfig, preset
from golden.loop import cosine, drift, filter_loop, is_above, place, tail_by_bisection

FOLDER = Path(__file__).parent
# Every score is further than this from the one that decides about it.
MARGIN = 1e-4
# In the filter's files every score is further than this from every other, so that ranks agree too.
# With fusion "key-query" that is asked of the mean cosines, whose ranks make the score.
APART = 1e-5

# What the names of tensors mean, for files.json.
TENSORS = {
    "k": (
        "(B, T, KVH, D) input: keys as the cache holds them, after RoPE; 0 after a row's "
        "end; where there is raw_k, what must come out"
    ),
    "v": "(B, T, KVH, D) input: values",
    "q": (
        "(B, T, KVH, D) input: queries, rotated or not as k is, their mean over the query heads "
        "that share a key head"
    ),
    "raw_k": "(B, T, KVH, D) input: keys before RoPE",
    "ratio": "(B,) or, in the model, (P, L): the target ratio",
    "anchors": (
        "(B, T, 2, KVH, D) running averages of keys [:, :, 0] and values [:, :, 1] "
        "as they are before each token; with fusion key-query (B, T, 3, KVH, D), "
        "of queries too [:, :, 2]"
    ),
    "cosine": (
        "(B, T, 2, KVH) of keys and of values with their anchors; with fusion key-query "
        "(B, T, 3, KVH), of keys with the anchor of queries too [:, :, 2]"
    ),
    "mean": (
        "(B, T, 2) of the cosines over the heads, of keys and of values; with fusion key-query of "
        "keys with the anchor of keys and with that of queries, in the model (P, B, T, L, 2)"
    ),
    "place": (
        "(B, T, 2) for each of these two means: how many of the last W are strictly below it, and "
        "half of how many are equal to it"
    ),
    "variance": "(B, T, 2) of the cosines over the heads, population variance",
    "w_k": "(B, T) the weight of the keys' mean",
    "score": (
        "(B, T) or (P, B, T, L); NaN at padding and in layers of ratio 0; in "
        "ties.safetensors an input"
    ),
    "below": "(B, T) int32: how many of the last W scores are strictly below",
    "needed": "(B, T) int32: how many must be; below >= needed is what the threshold asks",
    "redundant": "(B, T) or (P, B, T, L) bool: the decision",
    "bias": (
        "in the names of model-bias: (width of the projection's output,) input, added "
        "to what it gives"
    ),
    "tokens": "(B, T) int32 input",
    "n": (
        "(P, B, T, L) int32: how many slots of the cache the token may see, its own "
        "included; 0 if it skips attention"
    ),
    "dense": "(B, T, V) logits with no filter",
    "logits": "(P, B, T, V), NaN at padding",
}

# -------------------------------------------------------------------------------------- the filter


def stages(k, v, q, lengths, ratio, config):
    """All that the filter goes through: filter_loop, fed one token at a time.

    k, v, q (B, T, KVH, D), of which row b has lengths[b] real tokens; q is looked at with fusion
    "key-query" alone; ratio (B,); config: a FilterConfig with that fusion, "variance" or "key".
    Returns arrays (B, T, ...) by the names of TENSORS. At padding numbers are NaN, counts 0.
    """
    sides = [k, v]
    if config.needs_queries:
        sides.append(q)
    B, T = k.shape[:2]
    found: dict[str, np.ndarray] = {}
    for b in range(B):
        state: Any = None
        anchors = np.stack([side[b, 0] for side in sides])  # the first token is its own anchor
        means: list[np.ndarray] = []
        scores: list[float] = []
        for t in range(lengths[b]):
            x = np.stack([side[b, t] for side in sides])  # (2 or 3, KVH, D)
            cosines = cosines_of(x, anchors)
            if config.needs_queries:
                parts, fused = fused_by_rank(cosines, means[-config.history :])
            else:
                parts, fused = fused_by_weight(cosines, config.fusion)
            one_k, one_v, one_q = (side[b : b + 1, t : t + 1] for side in (k, v, q))
            redundant, score, _, state = filter_loop(
                one_k, one_v, [1], [ratio[b]], config, state, one_q
            )
            # filter_loop does not show its stages. That these are its own, its score says.
            assert abs(fused - score[0, 0]) < 1e-12, "these are not the stages of filter_loop"

            recent = scores[-config.history :]
            below = sum(other < score[0, 0] for other in recent)
            needed = math.ceil((1 - ratio[b]) * len(recent) - 1e-9)
            of_token = {
                "anchors": anchors,
                "cosine": cosines,
                **parts,
                "score": score[0, 0],
                "below": np.int32(below),
                "needed": np.int32(needed),
                "redundant": redundant[0, 0],
            }
            for name, value in of_token.items():
                if name not in found:
                    found[name] = padding((B, T, *value.shape), value.dtype)
                found[name][b, t] = value

            means.append(parts["mean"])
            scores.append(score[0, 0])
            anchors = config.gamma * anchors + (1 - config.gamma) * x
    return found


def cosines_of(x, anchors):
    """One token's cosines with its anchors: x, anchors (2 or 3, KVH, D) -> (2 or 3, KVH).

    Of keys, of values, and of keys with the anchor of queries, where there is one.
    """
    compared = x.copy()
    if len(x) == 3:
        compared[2] = x[0]
    cosines = np.zeros(x.shape[:2])
    for side, h in np.ndindex(cosines.shape):
        cosines[side, h] = cosine(compared[side, h], anchors[side, h])
    return cosines


def fused_by_weight(cosines, fusion):
    """The parts of one token's score by the names of TENSORS, and the score: cosines (2, KVH)."""
    mean = cosines.mean(1)
    variance = ((cosines - cosines.mean(1, keepdims=True)) ** 2).mean(1)
    if fusion == "key":
        w_k = np.float64(1)
    else:
        w_k = (variance[1] + 1e-6) / (variance[0] + variance[1] + 2e-6)
    score = w_k * mean[0] + (1 - w_k) * mean[1]
    return {"mean": mean, "variance": variance, "w_k": w_k}, score


def fused_by_rank(cosines, recent):
    """The same with fusion "key-query": cosines (3, KVH); recent: the means (2,) before them."""
    mean_k, _, mean_q = cosines.mean(1)
    place_k = place(mean_k, [means[0] for means in recent])
    place_q = place(mean_q, [means[1] for means in recent])
    score = (place_k - 0.5 * place_q) / max(len(recent), 1)
    return {"mean": np.array([mean_k, mean_q]), "place": np.array([place_k, place_q])}, score


def padding(shape, dtype):
    """An array of what stands at padding: NaN, 0 or False."""
    return np.full(shape, np.nan if dtype == np.float64 else 0, dtype)


def margins(score, ratio, config):
    """How far each score of one sequence is from the one that decides about it: (T,) -> (T,).

    That one is the needed-th smallest of those remembered. The margin is positive where the token
    is redundant, and inf where nothing is decided.
    """
    margin = np.full(len(score), np.inf)
    for t in range(max(config.warmup, 1), len(score)):
        recent = np.sort(score[max(0, t - config.history) : t])
        needed = math.ceil((1 - ratio) * len(recent) - 1e-9)
        if ratio > 0 and needed > 0 and not math.isnan(score[t]):
            margin[t] = score[t] - recent[needed - 1]
    return margin


def has_clear_ranks(x):
    """Whether float32 can match every rank among the numbers of one sequence: x (T,).

    They may be equal only if they are 0, as the cosine of a zero norm is 0 exactly. Other equal
    cosines are not equal after rounding: those of a text that begins with the same token twice are
    about 1.
    """
    is_zero = x == 0
    if is_zero.any():
        x = np.append(x[~is_zero], 0.0)
    return np.diff(np.sort(x)).min(initial=np.inf) >= APART


def has_clear_decisions(found, at, ratio, config):
    """Whether float32 can match every decision of one sequence in one layer.

    found: arrays by the names of TENSORS; found["score"][at] (T,) are the scores of that sequence.
    """
    if config.needs_queries:
        # The scores need no margin. They are made of places, which are whole numbers and halves, so
        # equal scores are equal exactly, and others differ by 1 / (4 W^2) at the least. What can be
        # rounded to another order are the means. Any two of them have to be apart, since a place
        # counts all that are below.
        mean = found["mean"][at]  # (T, 2)
        return has_clear_ranks(mean[:, 0]) and has_clear_ranks(mean[:, 1])
    return np.abs(margins(found["score"][at], ratio, config)).min(initial=np.inf) > MARGIN


def rotated(x, position, theta):
    """RoPE: x (..., D), rotated by its position, which broadcasts to (..., D/2).

    The channel pair (i, i + D/2) is a complex number, and position * theta^(-2i/D) its angle.
    """
    half = x.shape[-1] // 2
    pair = x[..., :half] + 1j * x[..., half:]
    angle = position * theta ** (-np.arange(half) / half)
    rotated_pair = pair * np.exp(1j * angle)
    return np.concatenate((rotated_pair.real, rotated_pair.imag), -1)


def schedule_ratios(schedule, p, L):
    """Each layer's target ratio, (L,), with mean p."""
    if schedule == "uniform":
        return np.full(L, p)
    if schedule == "last":
        top = max(0.9, p)
        ratios = np.zeros(L)
        for n_after in range(L):
            ratios[L - 1 - n_after] = min(top, max(0, p * L - top * n_after))
        return ratios
    if p <= (L - 1) / L:
        tail = tail_by_bisection(p, L)
    else:
        tail = np.ones(L)
        tail[0] = p * L - (L - 1)
    if schedule == "head":
        return tail[::-1].copy()
    return tail


# The frequencies theta^(-2i/8) are powers of two, so that they are the same in float32 and float64.
THETA = 65536.0


def same_inputs(k, v):
    return k, v


def heads_alike(k, v):
    """Every head is close to the first."""
    return k[:, :, :1] + 0.002 * k, v[:, :, :1] + 0.004 * v


def some_zero_heads(k, v):
    """Key head 1 is 0 in every third token, value head 2 in every fourth, the first among them."""
    k = k.copy()
    v = v.copy()
    k[:, 2::3, 1] = 0
    v[:, 0::4, 2] = 0
    return k, v


def large_inputs(k, v):
    """The sums of squares of these overflow in float16."""
    return 300 * k, 300 * v


def nothing_more(found):
    return True


def some_zero_keys(k, v):
    """Every fifth key is 0 in all heads, so that there are mean cosines that are equal: 0."""
    k = k.copy()
    k[:, 4::5] = 0
    return k, v


def above_at_end_of_warmup(found):
    """Tokens 4 and 5 pass the threshold."""
    return (found["below"] >= found["needed"])[0, 4:6].all()


@dataclass
class Case:
    """One of the filter's files."""

    what: str  # what the file shows
    shape: tuple[int, int, int, int]  # B, T, KVH, D
    ratio: list[float] | None  # of each row; None where the schedule gives them
    calls: list[list[int]]  # calls[i][b] tokens of row b are fed in call i
    config: FilterConfig = field(default_factory=lambda: FilterConfig(warmup=4))
    change: Callable = same_inputs  # makes the inputs k, v of the drifting ones
    dtype: type = np.float32  # of the inputs
    condition: Callable = nothing_more  # what else must hold of the stages


CASES = {
    "one-head": Case("One KV head: no variance, so w_k is 1/2.", (1, 24, 1, 8), [0.5], [[24]]),
    "gqa": Case(
        "Two KV heads, the preset's warm-up of 16: two prefill chunks, then decode steps.",
        (2, 40, 2, 8),
        [0.5, 0.3],
        [[20, 20], [9, 9]] + [[1, 1]] * 11,
        FilterConfig(),
    ),
    "mha": Case("Eight KV heads.", (1, 32, 8, 4), [0.6], [[20], [12]]),
    "ragged": Case(
        (
            "A batch whose rows get different numbers of tokens in each call, some none, one "
            "never any."
        ),
        (4, 32, 2, 4),
        [0.5, 0.5, 0.5, 0.3],
        [[10, 0, 1, 12], [0, 0, 0, 7], [21, 0, 0, 0], [1, 0, 0, 0]],
    ),
    "warmup": Case(
        "A warm-up of 5: token 4 would be redundant but for it, token 5 is.",
        (1, 12, 2, 4),
        [0.5],
        [[5], [1], [6]],
        FilterConfig(warmup=5),
        condition=above_at_end_of_warmup,
    ),
    "history": Case(
        "Only the last 7 scores are remembered: they wrap within a chunk and from one to the next.",
        (1, 48, 2, 4),
        [0.5],
        [[3], [30], [1], [14]],
        FilterConfig(warmup=4, history=7),
    ),
    "alike": Case(
        (
            "Heads that nearly agree: variances about as small as eps, where population and "
            "sample variance part."
        ),
        (1, 32, 3, 8),
        [0.5],
        [[32]],
        change=heads_alike,
    ),
    "zeros": Case(
        "Heads of norm 0, the first token's among them: their cosine is 0.",
        (1, 32, 3, 4),
        [0.5],
        [[1], [31]],
        change=some_zero_heads,
    ),
    "half": Case(
        (
            "float16 inputs so large that their norms overflow in float16: statistics belong "
            "in float32."
        ),
        (1, 32, 2, 8),
        [0.5],
        [[16], [16]],
        change=large_inputs,
        dtype=np.float16,
    ),
    "fusion-key": Case(
        "Fusion key: the score is the mean cosine of the keys, whatever the values are.",
        (1, 24, 2, 8),
        [0.5],
        [[24]],
        FilterConfig(warmup=4, fusion="key"),
    ),
    "queries": Case(
        (
            "Fusion key-query: keys are compared with the average query too, and the score is made "
            "of two ranks. Rows get different numbers of tokens in each call; only the last 12 "
            "means and scores are remembered; every fifth key is 0, so that some means are equal."
        ),
        (3, 48, 2, 4),
        [0.5, 0.3, 0.7],
        [[20, 1, 9], [1, 1, 1], [20, 0, 3], [1, 1, 0], [6, 23, 0]],
        FilterConfig(warmup=4, history=12, mode="cache", fusion="key-query"),
        change=some_zero_keys,
    ),
    "rope": Case(
        (
            "Keys before and after RoPE. Rows stand at different positions in a call; rotated "
            "keys are compared."
        ),
        (2, 32, 2, 8),
        [0.5, 0.5],
        [[9, 4], [0, 6], [22, 3], [1, 1]],
    ),
}
for _schedule in ("tail", "uniform", "head", "last"):
    CASES[f"schedule-{_schedule}"] = Case(
        f"Schedule {_schedule}: row b is layer b of four; the ratios follow from prune.",
        (4, 24, 2, 4),
        None,
        [[24] * 4],
        FilterConfig(schedule=_schedule, prune=0.6, warmup=4),
    )


def filter_file(case: Case, seed):
    """A case's tensors made from a seed; None if a decision would be too close for float32."""
    B, T, _, _ = case.shape
    lengths = np.sum(case.calls, 0)
    if case.ratio is None:
        ratio = schedule_ratios(case.config.schedule, case.config.prune, B)
    else:
        ratio = np.array(case.ratio)

    drifting_k, drifting_v = drift(*case.shape, seed)
    changed_k, changed_v = case.change(drifting_k.numpy(), drifting_v.numpy())
    is_real = np.arange(T) < lengths[:, None]  # (B, T)
    holds_token = is_real[:, :, None, None]
    input_k: np.ndarray = np.where(holds_token, changed_k, 0).astype(case.dtype)
    input_v: np.ndarray = np.where(holds_token, changed_v, 0).astype(case.dtype)
    k = input_k.astype(np.float64)
    v = input_v.astype(np.float64)
    inputs: dict[str, np.ndarray] = {}
    if case is CASES["rope"]:
        k = rotated(k, np.arange(T)[:, None, None], THETA)
        inputs["raw_k"] = input_k
        inputs["k"] = k
    else:
        inputs["k"] = input_k
    inputs["v"] = input_v
    inputs["ratio"] = ratio
    q = k  # any array: only fusion "key-query" looks at it
    if case.config.needs_queries:
        drifting_q, _ = drift(*case.shape, seed + 1)  # another way than the keys
        inputs["q"] = np.where(holds_token, drifting_q.numpy(), 0).astype(case.dtype)
        q = inputs["q"].astype(np.float64)

    found = stages(k, v, q, lengths, ratio, case.config)
    for b in range(B):
        at = (b, slice(lengths[b]))
        if not has_clear_decisions(found, at, ratio[b], case.config):
            return None
        # So that `below` agrees too. Scores that are made of ranks may be equal.
        if not case.config.needs_queries and not has_clear_ranks(found["score"][at]):
            return None
    if not case.condition(found):
        return None
    return inputs | found


def ties_file():
    """The threshold alone: scores full of ties and NaN, from an empty history.

    Returns the tensors and the FilterConfig.
    """
    config = FilterConfig(history=10, warmup=0)
    ratio = np.array([0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1])
    T = 24
    score = np.random.default_rng(0).choice([-1, 0, 0.25, 0.5, 1, np.nan], (len(ratio), T))
    below = np.zeros(score.shape, np.int32)
    redundant = np.zeros(score.shape, bool)
    for b, t in np.ndindex(score.shape):
        recent = score[b, max(0, t - config.history) : t].tolist()
        below[b, t] = sum(other < score[b, t] for other in recent)
        redundant[b, t] = is_above(score[b, t], recent, ratio[b])
    tensors = {
        "score": score.astype(np.float32),
        "ratio": ratio,
        "below": below,
        "redundant": redundant,
    }
    return tensors, config


# -------------------------------------------------------------------------------------- the model

# As in files.json.
SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "width": 32,
    "n_layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 48,
    "rope_theta": THETA,
    "norm_eps": 1e-5,
    "max_positions": 64,
    "tied": False,
}
# How many tokens each row has, and how many of them are fed in each call.
LENGTHS = [64, 40, 17]
CALLS = [[20, 13, 9], [1, 1, 0], [11, 0, 7], [1, 1, 1], [31, 25, 0]]
# At 0.3 schedule "tail" leaves layer 0 alone. At 0.6 all of layer 1 is redundant past the warm-up.
PRUNES = [0.3, 0.6]


def small_presets():
    """The presets by name, with so few near slots that even these texts have far tokens."""
    configs = {}
    for name in PRESETS:
        recent = min(preset(name).recent, 8)
        configs[name] = preset(name, warmup=6, recent=recent)
    return configs


CONFIGS = small_presets()


def random_weights(rng):
    """float32 weights by the names that model.py gives them.

    They are so large that attention is far from uniform.
    """
    V = SHAPE["vocab_size"]
    C = SHAPE["width"]
    M = SHAPE["mlp_width"]
    q_width = SHAPE["heads"] * SHAPE["head_dim"]
    kv_width = SHAPE["kv_heads"] * SHAPE["head_dim"]
    # The order matters, as the numbers are drawn in it.
    shapes: dict[str, tuple[int, ...]] = {"embed": (V, C), "head": (V, C)}
    for l in range(SHAPE["n_layers"]):
        shapes[f"blocks.{l}.attn.q"] = (q_width, C)
        shapes[f"blocks.{l}.attn.k"] = (kv_width, C)
        shapes[f"blocks.{l}.attn.v"] = (kv_width, C)
        shapes[f"blocks.{l}.attn.o"] = (C, q_width)
        shapes[f"blocks.{l}.mlp.gate"] = (M, C)
        shapes[f"blocks.{l}.mlp.up"] = (M, C)
        shapes[f"blocks.{l}.mlp.down"] = (C, M)
        shapes[f"blocks.{l}.attn_norm"] = (C,)
        shapes[f"blocks.{l}.mlp_norm"] = (C,)
    shapes["norm"] = (C,)

    weights = {}
    for name, shape in shapes.items():
        normal = rng.standard_normal(shape)
        if len(shape) == 1:  # of a norm
            weight = 1 + 0.1 * normal
        elif name.endswith((".q", ".k")):
            weight = normal * 2.0 / math.sqrt(shape[1])
        else:
            weight = normal / math.sqrt(shape[1])
        weights[name + ".weight"] = weight.astype(np.float32)
    weights["embed.weight"] *= math.sqrt(C)
    return weights


def random_biases(rng):
    """float32 biases of every layer's q, k, v and o, as large as what they are added to."""
    kv_width = SHAPE["kv_heads"] * SHAPE["head_dim"]
    widths = {
        "q": SHAPE["heads"] * SHAPE["head_dim"],
        "k": kv_width,
        "v": kv_width,
        "o": SHAPE["width"],
    }
    biases = {}
    for l in range(SHAPE["n_layers"]):
        for projection, width in widths.items():
            bias = rng.standard_normal(width).astype(np.float32)
            biases[f"blocks.{l}.attn.{projection}.bias"] = bias
    return biases


def rms_norm(x, weight):
    return weight * x / math.sqrt((x * x).mean() + SHAPE["norm_eps"])


def project(w, projection, x):
    """W x, and b where the projection has a bias: w holds a layer's weights by name."""
    product = w[f"attn.{projection}.weight"] @ x
    return product + w.get(f"attn.{projection}.bias", 0)


def mlp(w, x):
    """The MLP of one token: w holds a layer's weights by name."""
    gate = w["mlp.gate.weight"] @ x
    up = w["mlp.up.weight"] @ x
    return w["mlp.down.weight"] @ (gate / (1 + np.exp(-gate)) * up)


def attend(q, keys, values):
    """What queries (H, D) find in the keys and values (n, KVH, D) that a token sees: (H * D,)."""
    # Each key/value head serves this many query heads.
    group = len(q) // keys.shape[1]
    heads = []
    for h, query in enumerate(q):
        logit = keys[:, h // group] @ query / math.sqrt(len(query))
        weight = np.exp(logit - logit.max())
        heads.append(weight / weight.sum() @ values[:, h // group])
    return np.concatenate(heads)


def visible(t, redundant, config):
    """The tokens that token t may see in a layer: redundant[j] says what token j is found to be."""
    if redundant[t] and config.mode == "skip":
        return []
    n_sinks = max(config.warmup, 1)
    sees_far = not redundant[t] or config.mode == "cache"
    tokens = []
    for j in range(t + 1):
        is_sink = j < n_sinks
        is_recent = t - j <= config.recent
        is_kept = not redundant[j]
        if is_sink or is_recent or (sees_far and is_kept):
            tokens.append(j)
    return tokens


class SlowLayer:
    """One layer, and all tokens that it has seen of one sequence: none is ever forgotten."""

    def __init__(self, weights, l, ratio):
        prefix = f"blocks.{l}."
        self.w = {}
        for name, weight in weights.items():
            if name.startswith(prefix):
                self.w[name.removeprefix(prefix)] = weight
        self.ratio = ratio
        # Of every token: its key and its value, (KVH, D), and whether it is redundant.
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.redundant: list[bool] = []
        self.filter_state: Any = None

    def step(self, x, config):
        """One token's residual stream (C,) through the layer.

        Returns the residual stream, the token's score, whether it is redundant, and how many
        tokens it sees. A token that sees nothing gets nothing from attention, not even o's bias.
        """
        D = SHAPE["head_dim"]
        t = len(self.keys)
        normed = rms_norm(x, self.w["attn_norm.weight"])
        unrotated_k = project(self.w, "k", normed).reshape(-1, D)
        unrotated_q = project(self.w, "q", normed).reshape(-1, D)
        v = project(self.w, "v", normed).reshape(-1, D)
        k = rotated(unrotated_k, t, THETA)
        q = rotated(unrotated_q, t, THETA)

        score = np.nan
        redundant = False
        if self.ratio > 0:
            if config.keys == "rotated":
                compared_k = k
                compared_q = q
            else:
                compared_k = unrotated_k
                compared_q = unrotated_q
            # The mean over the query heads that share a key head.
            compared_q = compared_q.reshape(len(k), -1, D).mean(1)  # (KVH, D)
            batch_of_k = compared_k[None, None]
            batch_of_v = v[None, None]
            batch_of_q = compared_q[None, None]
            decisions, scores, _, self.filter_state = filter_loop(
                batch_of_k, batch_of_v, [1], [self.ratio], config, self.filter_state, batch_of_q
            )
            score = scores[0, 0]
            redundant = decisions[0, 0]

        self.keys.append(k)
        self.values.append(v)
        self.redundant.append(redundant)
        seen = visible(t, self.redundant, config)
        if seen:
            attended = attend(q, np.array(self.keys)[seen], np.array(self.values)[seen])
            x = x + project(self.w, "o", attended)
        x = x + mlp(self.w, rms_norm(x, self.w["mlp_norm.weight"]))
        return x, score, redundant, len(seen)


def slow_model(weights, tokens, config):
    """One sequence through the model: tokens (T,), from the start.

    Returns arrays by the names of TENSORS: logits (T, V), and n, score, redundant (T, L); with
    fusion "key-query" also mean (T, L, 2).
    """
    L = SHAPE["n_layers"]
    T = len(tokens)
    exact = {name: weight.astype(np.float64) for name, weight in weights.items()}
    ratio = schedule_ratios(config.schedule, config.prune, L)
    layers = [SlowLayer(exact, l, ratio[l]) for l in range(L)]
    n = np.zeros((T, L), np.int32)
    score = np.full((T, L), np.nan)
    redundant = np.zeros((T, L), bool)
    logits = np.zeros((T, SHAPE["vocab_size"]))
    for t, token in enumerate(tokens):
        x = exact["embed.weight"][token]
        for l, layer in enumerate(layers):
            x, score[t, l], redundant[t, l], n[t, l] = layer.step(x, config)
        logits[t] = exact["head.weight"] @ rms_norm(x, exact["norm.weight"])
    found = {"n": n, "score": score, "redundant": redundant, "logits": logits}
    if config.needs_queries:
        found["mean"] = np.full((T, L, 2), np.nan)
        for l, layer in enumerate(layers):
            if layer.filter_state is not None:
                found["mean"][:, l, 0] = layer.filter_state[0].c_k
                found["mean"][:, l, 1] = layer.filter_state[0].c_q
    return found


def slow_batch(weights, tokens, config):
    """slow_model on each row of tokens (B, T): arrays (B, T, ...), padded with NaN, 0 or False."""
    B, T = tokens.shape
    padded: dict[str, np.ndarray] = {}
    for b in range(B):
        n = LENGTHS[b]
        for name, x in slow_model(weights, tokens[b, :n], config).items():
            if name not in padded:
                padded[name] = padding((B, T, *x.shape[1:]), x.dtype)
            padded[name][b, :n] = x
    return padded


def filtered(weights, tokens, config):
    """The layers' ratios (P, L), and slow_batch at each value of PRUNES: arrays (P, B, T, ...).

    None if a decision would be too close for float32.
    """
    ratios = []
    results = []
    for prune in PRUNES:
        ratio = schedule_ratios(config.schedule, prune, SHAPE["n_layers"])
        result = slow_batch(weights, tokens, replace(config, prune=prune))
        for b, n in enumerate(LENGTHS):
            for l in range(SHAPE["n_layers"]):
                at = (b, slice(n), l)
                if ratio[l] > 0 and not has_clear_decisions(result, at, ratio[l], config):
                    return None
        ratios.append(ratio)
        results.append(result)
    tensors = {"ratio": np.array(ratios)}
    for name in results[0]:
        tensors[name] = np.stack([result[name] for result in results])
    return tensors


@dataclass
class ModelFile:
    """One of the model's files."""

    what: str  # what the file shows
    tensors: dict[str, np.ndarray]
    config: FilterConfig


def model_files(seed):
    """The files {name: ModelFile} of the model made from a seed.

    None if a decision would be too close for float32.
    """
    rng = np.random.default_rng(seed)
    weights = random_weights(rng)
    B = len(LENGTHS)
    T = max(LENGTHS)
    tokens = rng.integers(0, SHAPE["vocab_size"], (B, T), dtype=np.int32)
    for b, n in enumerate(LENGTHS):
        tokens[b, n:] = 0

    by_preset = {}
    for name, config in CONFIGS.items():
        tensors = filtered(weights, tokens, config)
        if tensors is None:
            return None
        what = f"The model filtered as preset {name} does; axis P is prune = {PRUNES}."
        by_preset[f"model-{name}"] = ModelFile(what, tensors, config)

    dense_config = FilterConfig(prune=0.0)
    dense = slow_batch(weights, tokens, dense_config)["logits"]
    what = (
        "The two-layer model: weights, a batch of three texts, and its logits when "
        "nothing is filtered."
    )
    tensors = {**weights, "tokens": tokens, "dense": dense}
    return {"model": ModelFile(what, tensors, dense_config), **by_preset}


def bias_file(model_tensors, seed):
    """The ModelFile of the same weights and tokens, with biases made from a seed.

    model_tensors: those of model.safetensors. None if a decision would be too close for float32.
    The preset is paper, as what a port can get wrong is whether a token that skips attention gets
    o's bias.
    """
    weights = dict(model_tensors)
    tokens = weights.pop("tokens")
    del weights["dense"]
    biases = random_biases(np.random.default_rng(seed))
    config = CONFIGS["paper"]
    found = filtered(weights | biases, tokens, config)
    if found is None:
        return None
    what = "The same weights and texts with biases on q, k, v and o, filtered as preset paper does."
    return ModelFile(what, biases | found, config)


# ------------------------------------------------------------------------------------------- main


def first_clear(build, *given):
    """What build(*given, seed) makes of the first seed for which it is not None, and that seed."""
    for seed in range(10000):
        found = build(*given, seed)
        if found is not None:
            return found, seed
    raise RuntimeError("no seed gives decisions that are clear enough")


def as_json(value, depth=3, indent="\n"):
    """Indented down to a depth, then all on one line."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + "  "
    entries = []
    for key, entry in value.items():
        entries.append(f"{inner}{json.dumps(key)}: {as_json(entry, depth - 1, inner)}")
    return "{" + ",".join(entries) + indent + "}"


def make(folder):
    """Write all files to a folder (a Path)."""
    filter_index: dict[str, Any] = {}
    for name, case in CASES.items():
        tensors, seed = first_clear(filter_file, case)
        save_file(tensors, folder / f"{name}.safetensors")
        filter_index[name] = {
            "what": case.what,
            "config": asdict(case.config),
            "calls": case.calls,
            "inputs_from_seed": seed,
        }
    filter_index["rope"]["rope_theta"] = THETA

    tensors, config = ties_file()
    save_file(tensors, folder / "ties.safetensors")
    what = (
        "The threshold alone: scores full of ties and NaN (an input here), from an empty history."
    )
    ties_index = {"what": what, "config": asdict(config)}

    files, weights_seed = first_clear(model_files)
    files["model-bias"], biases_seed = first_clear(bias_file, files["model"].tensors)
    files_index: dict[str, Any] = {}
    for name, file in files.items():
        save_file(file.tensors, folder / f"{name}.safetensors")
        files_index[name] = {"what": file.what, "config": asdict(file.config)}
    files_index["model-bias"]["shape"] = {"qkv_bias": True, "o_bias": True}
    model_index = {
        "shape": SHAPE,
        "lengths": LENGTHS,
        "calls": CALLS,
        "prune": PRUNES,
        "weights_from_seed": weights_seed,
        "biases_from_seed": biases_seed,
        "files": files_index,
    }

    index = {
        "tensors": TENSORS,
        "filter": filter_index,
        "model": model_index,
        "ties": ties_index,
    }
    (folder / "files.json").write_text(as_json(index) + "\n")


if __name__ == "__main__":
    make(FOLDER)
    for path in sorted(FOLDER.glob("*.safetensors")):
        print(f"{path.stat().st_size:8d} bytes  {path.relative_to(FOLDER.parent)}")
