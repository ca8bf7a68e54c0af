"""Makes the golden files: inputs and expected outputs of every stage of the method, for those who
port it.

    python -m golden.make    (or `make golden`) rewrites golden/*.safetensors, golden/files.json

Nothing here calls the code that the files are to check. What is expected of the filter comes from
`filter_loop`, the plain loop in test_filter.py; what is expected of the model from `slow_model`
below, which goes through one token, one head and one key at a time. All in float64, from inputs
that are float32 (or float16) numbers, so that a port in float32 starts from the very same ones.
PORTING.md says how to use the files.

Shapes: B sequences, T tokens, KVH key/value heads, D head size, L layers, V vocabulary, P values of
prune.
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
from golden.loop import cosine, drift, filter_loop, is_above, tail_by_bisection

FOLDER = Path(__file__).parent
MARGIN = 1e-4  # every score is further than this from the one that decides,
APART = 1e-5  # and in the filter's files than this from every other, so that ranks agree as well

TENSORS = {  # what the names mean, for files.json
    "k": (
        "(B, T, KVH, D) input: keys as the cache holds them, after RoPE; 0 after a row's "
        "end; where there is raw_k, what must come out"
    ),
    "v": "(B, T, KVH, D) input: values",
    "raw_k": "(B, T, KVH, D) input: keys before RoPE",
    "ratio": "(B,) or, in the model, (P, L): the target ratio",
    "anchors": (
        "(B, T, 2, KVH, D) running averages of keys [:, :, 0] and values [:, :, 1] "
        "as they are before each token"
    ),
    "cosine": "(B, T, 2, KVH) of keys and of values with their anchors",
    "mean": "(B, T, 2) of the cosines over the heads",
    "variance": "(B, T, 2) the same, population variance",
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


def stages(k, v, lengths, ratio, config):
    """All that the filter goes through, (B, T, ...) arrays by name: filter_loop, fed one token at a
    time.
    """
    B, T, KVH, D = k.shape
    shapes = {
        "anchors": (2, KVH, D),
        "cosine": (2, KVH),
        "mean": (2,),
        "variance": (2,),
        "w_k": (),
        "score": (),
    }
    out = {name: np.full((B, T, *shape), np.nan) for name, shape in shapes.items()}
    out |= {
        "below": np.zeros((B, T), np.int32),
        "needed": np.zeros((B, T), np.int32),
        "redundant": np.zeros((B, T), bool),
    }
    for b in range(B):
        state = None
        for t in range(lengths[b]):
            x = np.stack((k[b, t], v[b, t]))
            anchor = np.stack((state[0].A_K, state[0].A_V)) if state else x
            recent: list[float] = state[0].scores[-config.history :] if state else []
            one = np.s_[b : b + 1, t : t + 1]
            redundant, score, _, state = filter_loop(k[one], v[one], [1], [ratio[b]], config, state)
            c = np.array(
                [[cosine(x[side, h], anchor[side, h]) for h in range(KVH)] for side in range(2)]
            )
            var_k, var_v = ((c - c.mean(1, keepdims=True)) ** 2).mean(1)
            w_k = (var_v + 1e-6) / (var_k + var_v + 2e-6)
            s = score[0, 0]
            assert (
                abs(w_k * c[0].mean() + (1 - w_k) * c[1].mean() - s) < 1e-12
            )  # these stages are the loop's own
            values = anchor, c, c.mean(1), (var_k, var_v), w_k, s
            for name, value in zip(shapes, values):
                out[name][b, t] = value
            out["below"][b, t] = sum(other < s for other in recent)
            out["needed"][b, t] = math.ceil((1 - ratio[b]) * len(recent) - 1e-9)
            out["redundant"][b, t] = redundant[0, 0]
    return out


def margins(score, ratio, config):
    """How far each score (T,) of one sequence is from the one that decides, the needed-th smallest
    of those remembered: positive where the token is redundant, inf where nothing is decided.
    """
    out = np.full(len(score), np.inf)
    for t in range(max(config.warmup, 1), len(score)):
        recent = np.sort(score[max(0, t - config.history) : t])
        needed = math.ceil((1 - ratio) * len(recent) - 1e-9)
        if ratio > 0 and needed > 0 and not math.isnan(score[t]):
            out[t] = score[t] - recent[needed - 1]
    return out


def clear(score, lengths, ratio, config):
    """Whether a port in float32 can match every decision and rank: score (B, T), ratio (B,)."""
    for s, n, r in zip(score, lengths, ratio):
        apart = np.diff(np.sort(s[:n])).min(initial=np.inf)
        if apart < APART or np.abs(margins(s[:n], r, config)).min(initial=np.inf) <= MARGIN:
            return False
    return True


def turned(x, position, theta):
    """RoPE: the channel pair (i, i + D/2) of x (..., D) as a complex number, turned by position *
    theta^(-2i/D).
    """
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(
        1j * position * theta ** (-np.arange(half) / half)
    )
    return np.concatenate((z.real, z.imag), -1)


def schedule_ratios(schedule, p, L):
    """The layers' ratios, (L,)."""
    if schedule == "uniform":
        return np.full(L, p)
    if schedule == "last":
        top = max(0.9, p)
        return np.array([min(top, max(0, p * L - top * after)) for after in range(L)][::-1])
    tail = (
        tail_by_bisection(p, L)
        if p <= (L - 1) / L
        else np.array([p * L - (L - 1)] + [1.0] * (L - 1))
    )
    return tail[::-1].copy() if schedule == "head" else tail


THETA = (
    65536.0  # so that theta^(-2i/8) are powers of two: the same frequencies in float32 and float64
)


@dataclass
class Case:
    """One of the filter's files: k, v of this shape, of which calls[i][b] tokens of row b are fed
    in call i.
    """

    what: str
    shape: tuple[int, int, int, int]  # B, T, KVH, D
    ratio: list[float]
    calls: list[list[int]]
    config: FilterConfig = field(default_factory=lambda: FilterConfig(warmup=4))
    change: Callable = lambda k, v: (k, v)  # to the drifting k, v
    dtype: type = np.float32
    also: Callable = lambda out: True  # what else must hold of the stages


def of_head(x, tokens, head):
    """x (B, T, KVH, D) with zeros in one head of some tokens."""
    x = x.copy()
    x[:, tokens, head] = 0
    return x


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
        also=lambda out: (out["below"] >= out["needed"])[0, 4:6].all(),
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
        change=lambda k, v: (k[:, :, :1] + 0.002 * k, v[:, :, :1] + 0.004 * v),
    ),
    "zeros": Case(
        "Heads of norm 0, the first token's among them: their cosine is 0.",
        (1, 32, 3, 4),
        [0.5],
        [[1], [31]],
        change=lambda k, v: (of_head(k, np.s_[2::3], 1), of_head(v, np.s_[0::4], 2)),
    ),
    "half": Case(
        (
            "float16 inputs so large that their norms overflow in float16: statistics belong "
            "in float32."
        ),
        (1, 32, 2, 8),
        [0.5],
        [[16], [16]],
        change=lambda k, v: (300 * k, 300 * v),
        dtype=np.float16,
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
for _name in ("tail", "uniform", "head", "last"):
    CASES[f"schedule-{_name}"] = Case(
        f"Schedule {_name}: row b is layer b of four; the ratios follow from prune.",
        (4, 24, 2, 4),
        [],
        [[24] * 4],
        FilterConfig(schedule=_name, prune=0.6, warmup=4),
    )


def filter_file(case: Case, seed):
    """A case's tensors made from a seed, or None if a decision in it would be too close for
    float32.
    """
    B, T = case.shape[:2]
    lengths = np.sum(case.calls, 0)
    config = case.config
    k, v = case.change(*(x.numpy() for x in drift(*case.shape, seed)))
    k, v = (
        np.where((np.arange(T) < lengths[:, None])[:, :, None, None], x, 0).astype(case.dtype)
        for x in (k, v)
    )
    ratio = np.array(case.ratio or schedule_ratios(config.schedule, config.prune, B))
    inputs: dict[str, np.ndarray] = {"k": k, "v": v}
    k = k.astype(np.float64)
    v = v.astype(np.float64)
    if case is CASES["rope"]:
        k = turned(k, np.arange(T)[:, None, None], THETA)
        inputs = {"raw_k": inputs["k"], "k": k, "v": inputs["v"]}
    out = stages(k, v, lengths, ratio, config)
    if clear(out["score"], lengths, ratio, config) and case.also(out):
        return inputs | {"ratio": ratio} | out
    return None


def ties_file():
    """The threshold alone, on scores full of ties and NaN, from an empty history."""
    ratio = np.array([0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1])
    W = 10
    T = 24
    score = np.random.default_rng(0).choice([-1, 0, 0.25, 0.5, 1, np.nan], (len(ratio), T))
    out = {"below": np.zeros(score.shape, np.int32), "redundant": np.zeros(score.shape, bool)}
    for b, t in np.ndindex(score.shape):
        recent = score[b, max(0, t - W) : t].tolist()
        out["below"][b, t] = sum(other < score[b, t] for other in recent)
        out["redundant"][b, t] = is_above(score[b, t], recent, ratio[b])
    return {"score": score.astype(np.float32), "ratio": ratio} | out, FilterConfig(
        history=W, warmup=0
    )


# -------------------------------------------------------------------------------------- the model

SHAPE: dict[str, Any] = {  # as in files.json
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
LENGTHS = [64, 40, 17]
CALLS = [[20, 13, 9], [1, 1, 0], [11, 0, 7], [1, 1, 1], [31, 25, 0]]
PRUNES = [
    0.3,
    0.6,
]  # at 0.3 `tail` leaves layer 0 alone, at 0.6 all of layer 1 is redundant past the warm-up
CONFIGS = {  # the presets, with windows so small that even these texts have far tokens
    name: preset(name, warmup=6, recent=min(preset(name).recent, 8)) for name in PRESETS
}


def random_weights(rng):
    """float32 weights by the names that model.py gives them; scaled up, so that attention is far
    from uniform.
    """
    V = SHAPE["vocab_size"]
    C = SHAPE["width"]
    M = SHAPE["mlp_width"]
    D = SHAPE["head_dim"]
    Q = SHAPE["heads"] * D
    KV = SHAPE["kv_heads"] * D
    matrices: dict[str, tuple[int, ...]] = {"embed": (V, C), "head": (V, C)}
    for block in (f"blocks.{l}." for l in range(SHAPE["n_layers"])):
        matrices |= {block + "attn.q": (Q, C), block + "attn.k": (KV, C), block + "attn.v": (KV, C)}
        matrices |= {block + "attn.o": (C, Q)}
        matrices |= {
            block + "mlp.gate": (M, C),
            block + "mlp.up": (M, C),
            block + "mlp.down": (C, M),
        }
        matrices |= {block + "attn_norm": (C,), block + "mlp_norm": (C,)}
    matrices["norm"] = (C,)
    weights = {}
    for name, shape in matrices.items():
        w = rng.standard_normal(shape)
        w = (
            1 + 0.1 * w
            if len(shape) == 1
            else w * (2.0 if name.endswith((".q", ".k")) else 1.0) / math.sqrt(shape[1])
        )
        weights[name + ".weight"] = w.astype(np.float32)
    weights["embed.weight"] *= math.sqrt(SHAPE["width"])
    return weights


def random_biases(rng):
    """float32 biases of every layer's q, k, v and o, as large as what they are added to."""
    C = SHAPE["width"]
    D = SHAPE["head_dim"]
    widths = {
        "q": SHAPE["heads"] * D,
        "k": SHAPE["kv_heads"] * D,
        "v": SHAPE["kv_heads"] * D,
        "o": C,
    }
    biases = {}
    for l in range(SHAPE["n_layers"]):
        for projection, width in widths.items():
            biases[f"blocks.{l}.attn.{projection}.bias"] = rng.standard_normal(width).astype(
                np.float32
            )
    return biases


def rms_norm(x, weight):
    return weight * x / math.sqrt((x * x).mean() + SHAPE["norm_eps"])


def in_sight(t, redundant, config):
    """The tokens that token t may see in a layer, where redundant[j] says what token j is found to
    be.
    """
    if redundant[t] and config.mode == "skip":
        return []
    sinks = max(config.warmup, 1)
    far = not redundant[t] or config.mode == "cache"
    return [
        j for j in range(t + 1) if j < sinks or t - j <= config.recent or (far and not redundant[j])
    ]


def attended(q, keys, values):
    """What queries (H, D) find in the keys and values (n, KVH, D) that a token sees: (H * D,)."""
    heads = []
    shared = len(q) // keys.shape[1]
    for h, query in enumerate(q):
        logit = keys[:, h // shared] @ query / math.sqrt(len(query))
        weight = np.exp(logit - logit.max())
        heads.append(weight / weight.sum() @ values[:, h // shared])
    return np.concatenate(heads)


def project(w, projection, x):
    """W x, and b where the projection has a bias: w holds a layer's weights by name."""
    product = w[f"attn.{projection}.weight"] @ x
    return product + w.get(f"attn.{projection}.bias", 0)


def slow_model(weights, tokens, config):
    """One sequence through the model: logits (T, V) and, by (T, L), what else TENSORS names.

    A token that sees nothing gets nothing from attention, o's bias neither.
    """
    W = {name: w.astype(np.float64) for name, w in weights.items()}
    L, H, KVH, D = (SHAPE[name] for name in ("n_layers", "heads", "kv_heads", "head_dim"))
    ratio = schedule_ratios(config.schedule, config.prune, L)
    T = len(tokens)
    past: list[tuple] = [
        ([], [], []) for _ in range(L)
    ]  # of each layer: every token's k, its v, whether it is redundant
    states = [None] * L
    out = {
        "n": np.zeros((T, L), np.int32),
        "score": np.full((T, L), np.nan),
        "redundant": np.zeros((T, L), bool),
    }
    out["logits"] = np.zeros((T, SHAPE["vocab_size"]))

    for t, token in enumerate(tokens):
        x = W["embed.weight"][token]
        for l in range(L):
            w = {
                name[len(f"blocks.{l}.") :]: m
                for name, m in W.items()
                if name.startswith(f"blocks.{l}.")
            }
            normed = rms_norm(x, w["attn_norm.weight"])
            raw_k = project(w, "k", normed).reshape(KVH, D)
            k = turned(raw_k, t, THETA)
            v = project(w, "v", normed).reshape(KVH, D)
            q = turned(project(w, "q", normed).reshape(H, D), t, THETA)

            redundant = False
            if ratio[l] > 0:
                compared = k if config.keys == "rotated" else raw_k
                found, score, _, states[l] = filter_loop(
                    compared[None, None], v[None, None], [1], [ratio[l]], config, states[l]
                )
                redundant = found[0, 0]
                out["score"][t, l] = score[0, 0]
            for part, new in zip(past[l], (k, v, redundant)):
                part.append(new)
            seen = in_sight(t, past[l][2], config)
            out["redundant"][t, l] = redundant
            out["n"][t, l] = len(seen)

            if seen:
                x = x + project(
                    w, "o", attended(q, *(np.array(part)[seen] for part in past[l][:2]))
                )
            normed = rms_norm(x, w["mlp_norm.weight"])
            gate = w["mlp.gate.weight"] @ normed
            x = x + w["mlp.down.weight"] @ (
                gate / (1 + np.exp(-gate)) * (w["mlp.up.weight"] @ normed)
            )
        out["logits"][t] = W["head.weight"] @ rms_norm(x, W["norm.weight"])
    return out


def batch(weights, tokens, config):
    """slow_model on each row: its arrays by (B, T, ...), padded with NaN, 0 or False."""
    rows = [slow_model(weights, row[:n], config) for row, n in zip(tokens, LENGTHS)]
    out = {}
    for name, first in rows[0].items():
        out[name] = np.full(
            tokens.shape + first.shape[1:], np.nan if first.dtype == np.float64 else 0, first.dtype
        )
        for b, row in enumerate(rows):
            out[name][b, : LENGTHS[b]] = row[name]
    return out


def filtered(weights, tokens, config):
    """batch() at each value of PRUNES, by (P, B, T, ...), and the ratios; None if a decision would
    be too close for float32.
    """
    results = []
    ratios = [schedule_ratios(config.schedule, p, SHAPE["n_layers"]) for p in PRUNES]
    for p, ratio in zip(PRUNES, ratios):
        results.append(batch(weights, tokens, replace(config, prune=p)))
        for b, l in np.ndindex(len(LENGTHS), SHAPE["n_layers"]):
            if (
                np.abs(margins(results[-1]["score"][b, : LENGTHS[b], l], ratio[l], config)).min()
                <= MARGIN
            ):
                return None
    return {"ratio": np.array(ratios)} | {
        part: np.stack([result[part] for result in results]) for part in results[0]
    }


def model_files(seed):
    """{file: (tensors, what, config)} of the model made from a seed; None if a decision would be
    too close for float32.
    """
    rng = np.random.default_rng(seed)
    weights = random_weights(rng)
    tokens = rng.integers(0, SHAPE["vocab_size"], (len(LENGTHS), max(LENGTHS)), dtype=np.int32)
    tokens[np.arange(max(LENGTHS)) >= np.array(LENGTHS)[:, None]] = 0
    files = {}
    for name, config in CONFIGS.items():
        tensors = filtered(weights, tokens, config)
        if tensors is None:
            return None
        files[f"model-{name}"] = (
            tensors,
            f"The model filtered as preset {name} does; axis P is prune = {PRUNES}.",
            config,
        )
    dense = batch(weights, tokens, FilterConfig(prune=0.0))["logits"]
    what = (
        "The two-layer model: weights, a batch of three texts, and its logits when "
        "nothing is filtered."
    )
    return {
        "model": ({**weights, "tokens": tokens, "dense": dense}, what, FilterConfig(prune=0.0))
    } | files


def bias_file(model, seed):
    """(tensors, what, config) of model.safetensors' own weights and tokens with biases made from a
    seed; None as above.

    Preset paper, as what a port can get wrong is whether a token that skips attention gets o's
    bias.
    """
    weights = dict(model)
    tokens = weights.pop("tokens")
    del weights["dense"]
    biases = random_biases(np.random.default_rng(seed))
    found = filtered(weights | biases, tokens, CONFIGS["paper"])
    if found is None:
        return None
    what = "The same weights and texts with biases on q, k, v and o, filtered as preset paper does."
    return biases | found, what, CONFIGS["paper"]


# ------------------------------------------------------------------------------------------- main


def search(build, *given):
    """What build(*given, seed) makes of the first seed it does not refuse, and that seed."""
    for seed in range(10000):
        if (found := build(*given, seed)) is not None:
            return found, seed
    raise RuntimeError("no seed gives decisions that are clear enough")


def as_json(value, depth=3, indent="\n"):
    """Indented down to a depth, then all on one line."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    inner = indent + "  "
    entries = [
        f"{inner}{json.dumps(key)}: {as_json(entry, depth - 1, inner)}"
        for key, entry in value.items()
    ]
    return "{" + ",".join(entries) + indent + "}"


def make(folder):
    """Write all files to a folder (a Path)."""
    model: dict[str, Any] = {"shape": SHAPE, "lengths": LENGTHS, "calls": CALLS, "prune": PRUNES}
    index: dict[str, Any] = {"tensors": TENSORS, "filter": {}, "model": model}
    for name, case in CASES.items():
        tensors, seed = search(filter_file, case)
        save_file(tensors, folder / f"{name}.safetensors")
        about = {
            "what": case.what,
            "config": asdict(case.config),
            "calls": case.calls,
            "inputs_from_seed": seed,
        }
        index["filter"][name] = about | ({"rope_theta": THETA} if name == "rope" else {})
    tensors, config = ties_file()
    save_file(tensors, folder / "ties.safetensors")
    what = (
        "The threshold alone: scores full of ties and NaN (an input here), from an empty history."
    )
    index["ties"] = {"what": what, "config": asdict(config)}
    files, model["weights_from_seed"] = search(model_files)
    files["model-bias"], model["biases_from_seed"] = search(bias_file, files["model"][0])
    model["files"] = {}
    for name, (tensors, what, config) in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
        model["files"][name] = {"what": what, "config": asdict(config)}
    model["files"]["model-bias"]["shape"] = {"qkv_bias": True, "o_bias": True}
    (folder / "files.json").write_text(as_json(index) + "\n")


if __name__ == "__main__":
    make(FOLDER)
    for path in sorted(FOLDER.glob("*.safetensors")):
        print(f"{path.stat().st_size:8d} bytes  {path.relative_to(FOLDER.parent)}")
