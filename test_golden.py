"""The golden files: token_filter, the model and the NumPy port agree with them, and they catch what a port gets wrong.

Every check runs on an implementation: golden/port.py, that file with one change, or `Reference`, this repository's own
code behind the same names.
"""

import functools
import json
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from golden import make, port
from model import ModelConfig, Transformer, rotate
from schedule import adaptive_ratios, layer_ratios
from token_filter import FilterConfig, FilterState, above_threshold, token_filter

INDEX = json.loads((make.FOLDER / "files.json").read_text())
SHAPE, LENGTHS, CALLS, PRUNES = (INDEX["model"][part] for part in ("shape", "lengths", "calls", "prune"))
FILES = [*INDEX["filter"], "ties", *INDEX["model"]["files"]]
DTYPES = ["float64", "float32"]

# ---------------------------------------------------------------------------------------------------- the checks


@functools.cache
def golden(name):
    return load_file(make.FOLDER / f"{name}.safetensors")


def agree(got, want, dtype, what):
    """As PORTING.md asks: counts and decisions exactly, numbers within a tolerance, where one is expected."""
    if want.dtype.kind == "f":
        atol = (1e-4 if dtype == "float32" else 1e-9) * max(1, np.nanmax(abs(want)))
        got, want = (np.where(np.isnan(want), 0, x) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=what)
    else:
        np.testing.assert_array_equal(got, want, err_msg=what)


def in_calls(calls, T, feed):
    """What every feed(at, n_new) of these calls returns, each array (B, t, ...), put together to (B, T, ...).

    x[at] are a call's chunk of x (B, T, ...), padded with what follows.
    """
    done, out, found = np.zeros(len(calls[0]), int), {}, []
    for n_new in np.array(calls):
        step = np.arange(n_new.max())
        at = np.arange(len(n_new))[:, None], np.minimum(done[:, None] + step, T - 1)
        real = step < n_new[:, None]
        found.append(feed(at, n_new))
        for name, x in found[-1].items():
            assert name != "redundant" or not x[~real].any(), "a pad is redundant"
            whole = out.setdefault(name, np.zeros((len(n_new), T) + x.shape[2:], x.dtype))
            whole[at[0].repeat(len(step), 1)[real], at[1][real]] = x[real]
        done += n_new
    return {name: out[name] for name in set.intersection(*map(set, found))}


def one_by_one(lengths):
    return [[int(t < n) for n in lengths] for t in range(max(lengths))]


def turned(implementation, raw_k, theta, calls):
    """Keys after RoPE, each row at its own positions."""
    return in_calls(calls, raw_k.shape[1], lambda at, n_new: {"k": implementation.rotate(raw_k[at], at[1], theta)})["k"]


def filtered(implementation, k, v, ratio, config, calls, dtype):
    """Every stage that the implementation shows."""
    B, T, KVH, D = k.shape
    state = implementation.Filter(B, KVH, D, config, np.dtype(dtype).type)
    return in_calls(calls, T, lambda at, n_new: implementation.filter_chunk(k[at], v[at], n_new, state, ratio, config))


def check_filter(implementation, name, dtype):
    data, about = golden(name), INDEX["filter"][name]
    config, layers = about["config"], len(data["k"])
    if name == "schedule-adaptive":
        agree(implementation.adaptive_ratios(data["contribution"], config["prune"]), data["ratio"], dtype, "ratio")
    elif name.startswith("schedule"):
        agree(implementation.layer_ratios(config["schedule"], config["prune"], layers), data["ratio"], dtype, "ratio")
    k, v = (data[side] if name == "half" else data[side].astype(dtype) for side in ("k", "v"))
    lengths = np.sum(about["calls"], 0).tolist()
    for calls in (about["calls"], [lengths], one_by_one(lengths)):
        if "raw_k" in data:
            k = turned(implementation, data["raw_k"].astype(dtype), about["rope_theta"], calls)
            agree(k, data["k"], dtype, "k")
        for stage, got in filtered(implementation, k, v, data["ratio"], config, calls, dtype).items():
            if not (name == "alike" and stage == "w_k" and dtype == "float32"):  # float32's variances are too rough for it
                agree(got, data[stage], dtype, stage)


def check_ties(implementation, dtype):
    data, W = golden("ties"), INDEX["ties"]["config"]["history"]
    score, history = data["score"].astype(dtype), np.full((len(data["score"]), W), np.nan, dtype)
    for t in range(score.shape[1]):
        *counts, above = implementation.threshold(score[:, t], history, np.full(len(score), t), data["ratio"])
        agree(above, data["redundant"][:, t], dtype, "redundant")
        if counts:
            agree(counts[0], data["below"][:, t], dtype, "below")
        history = np.concatenate((history[:, 1:], score[:, t, None]), 1)


def run(implementation, weights, tokens, config, calls, dtype):
    """The model's logits, and what else the implementation shows."""
    model = implementation.Model(weights, SHAPE, config, len(tokens), np.dtype(dtype).type)
    return in_calls(calls, tokens.shape[1], lambda at, n_new: model.feed(tokens[at], n_new))


def check_model(implementation, name, dtype):
    weights, config = dict(golden("model")), INDEX["model"]["files"][name]["config"]
    tokens, dense = weights.pop("tokens"), weights.pop("dense")
    for p, prune in enumerate(PRUNES) if name != "model" else [(0, 0.0)]:
        want = {"logits": dense} if name == "model" else {part: x[p] for part, x in golden(name).items()}
        for calls in (CALLS, one_by_one(LENGTHS)):
            got = run(implementation, weights, tokens, config | {"prune": prune}, calls, dtype)
            for part in want.keys() & got.keys():
                agree(got[part], want[part], dtype, f"{part}, prune {prune}")


def check(implementation, name, dtype="float64"):
    if name == "ties":
        check_ties(implementation, dtype)
    else:
        (check_filter if name in INDEX["filter"] else check_model)(implementation, name, dtype)


# ---------------------------------------------------------------------------------- this repository's code, and the port


class Reference:
    """token_filter.py and model.py by the names of golden/port.py, with the stages that can be seen from outside."""

    @staticmethod
    def Filter(B, kv_heads, head_dim, config, dtype):
        return FilterState.new(B, kv_heads, head_dim, FilterConfig(**config), 0, getattr(torch, dtype.__name__), "cpu")

    @staticmethod
    def filter_chunk(k, v, n_new, state, ratio, config):
        (k, v, n_new, ratio), config = (torch.tensor(x) for x in (k, v, n_new, ratio)), FilterConfig(**config)
        heads, out = k.shape[2], {}

        def mean(side, some):  # of these heads' cosines: the score of a filter that sees those heads and that side only
            part = FilterState(state.anchor[:, :, some], state.history, state.count, 0)
            return token_filter(k[:, :, some], v[:, :, some], n_new, part, ratio, replace(config, fusion=side))[1]

        sides = "key", "value"
        out["mean"] = torch.stack([mean(side, slice(None)) for side in sides], 2)
        cosine = [torch.stack([mean(side, slice(h, h + 1)) for h in range(heads)], 2) for side in sides]
        out["cosine"] = torch.stack(cosine, 2)
        if k.shape[1] == 1:
            x = torch.stack((k, v), 2).to(state.anchor.dtype)
            first = (state.count == 0).view(-1, 1, 1, 1, 1)
            out["anchors"] = torch.where(first, x, state.anchor[:, None])
        out["redundant"], out["score"] = token_filter(k, v, n_new, state, ratio, config)
        return {name: x.numpy() for name, x in out.items()}

    @staticmethod
    def threshold(score, history, count, ratio):
        above = above_threshold(*(torch.tensor(x) for x in (score[:, None], history, count, ratio)))
        return (above[:, 0].numpy(),)

    @staticmethod
    def layer_ratios(schedule, p, L):
        return np.array(layer_ratios(FilterConfig(schedule=schedule, prune=p), L))

    @staticmethod
    def adaptive_ratios(contribution, p):
        return adaptive_ratios(torch.tensor(contribution)[None], p)[0].numpy()

    @staticmethod
    def rotate(x, position, theta):
        x, D = torch.tensor(x), x.shape[-1]
        angle = torch.tensor(position)[:, :, None, None] * theta ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
        cos, sin = angle.cos(), angle.sin()
        return rotate(x, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)).numpy()

    class Model:
        def __init__(self, weights, shape, config, B, dtype):
            self.model = Transformer(ModelConfig(**shape)).to(getattr(torch, dtype.__name__))
            self.model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
            self.config = FilterConfig(**config)
            self.cache = self.model.new_cache(B, self.config)

        def feed(self, tokens, n_new):
            logits = self.model(torch.tensor(tokens).long(), self.cache, n_new)
            layers, nan = self.cache.layers, torch.full(tokens.shape, torch.nan)
            out = {"redundant": [layer.redundant for layer in layers]}
            out["score"] = [nan if layer.score is None else layer.score for layer in layers]
            if tokens.shape[1] == 1:  # what only shows after each token
                attends = [~layer.redundant | (self.config.mode == "cache") for layer in layers]
                position = self.cache.seen[:, None] - 1
                seen = [(layer.until >= position).sum(1, keepdim=True) for layer in layers]
                out["visible"] = [torch.where(some, number, 0) for some, number in zip(attends, seen)]
                out["length"] = [layer.length[:, None] for layer in layers]
                ratios = [torch.as_tensor(layer.ratio, dtype=torch.float64) for layer in layers]
                out["ratio"] = [ratio.expand(len(tokens))[:, None] for ratio in ratios]
            return {"logits": logits.numpy()} | {name: torch.stack(x, 2).numpy() for name, x in out.items()}


# ------------------------------------------------------------------------------------------------- who passes them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILES)
def test_token_filter_and_the_model_pass_every_file(name, dtype):
    check(Reference, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILES)
def test_the_port_passes_every_file(name, dtype):
    check(port, name, dtype)


def test_the_port_is_short_and_stands_alone():
    source = (make.FOLDER / "port.py").read_text()
    assert source.count("\n") < 200
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import numpy as np"]


# ------------------------------------------------------------------------------------------------ what they catch

PORT = (make.FOLDER / "port.py").read_text()
PRESET_FILES = [name for name in FILES if name.startswith("model-")]
FILTERED = [name for name in FILES if name not in ("ties", "model")]
CHANGES = {  # to the port: a piece of its text, what it becomes, files that must fail for it
    "anchor updated before scoring": ("after = g * anchor", "anchor = after = g * anchor", FILTERED),
    "not strictly above": ("(history < score", "(history <= score", ["ties"]),
    "sample variance": ("cosine.var(-1)", "cosine.var(-1, ddof=1)", ["gqa", "alike"]),
    "weights swapped": ("w_k = (variance[:, 1]", "w_k = (variance[:, 0]", ["gqa", *PRESET_FILES]),
    "warm-up one short": ('state.count >= max(config["warmup"], 1)', 'state.count >= config["warmup"] - 1', ["warmup"]),
    "warm-up one long": ('state.count >= max(config["warmup"], 1)', 'state.count > config["warmup"]', ["warmup"]),
    "unrotated keys compared": ("filter_chunk(k, v", "filter_chunk(raw_k, v", PRESET_FILES),
    "unrotated keys": ("return np.concatenate((a * cos", "return x + 0 * np.concatenate((a * cos", ["rope", "model"]),
    # and what else PORTING.md warns of
    "NaN is above": ("& ~np.isnan(score) &", "&", ["ties"]),
    "ceiling in float32": ("np.ceil((1 - ratio) * n - 1e-9)", "np.ceil((1 - np.float32(ratio)) * n)", ["ties"]),
    "no eps": ("variance[:, 1] + 1e-6", "variance[:, 1]", ["one-head", "alike"]),
    "warm-up not in the history": ("real[:, None], hi", '(real & (state.count > config["warmup"]))[:, None], hi', ["gqa"]),
    "redundant not in the history": ("real[:, None], hi", "(real & ~redundant)[:, None], hi", ["history", "gqa"]),
    "redundant not in the anchors": ("real[:, None, None, None]", "(real & ~redundant)[:, None, None, None]", ["history"]),
    "history one short": ("(state.history[:, 1:], ", "(state.history[:, :1] * np.nan, state.history[:, 2:], ", ["history"]),
    "position of the longest row": ("self.seen[:, None] + step", "self.seen.max() + 0 * n_new[:, None] + step", ["model"]),
    "position by slot": ("rotate(y, position,", "rotate(y, cache.k.shape[1] + position - self.seen[:, None],", PRESET_FILES),
    "pads enter the anchors": ("np.where(real[:, None, None, None], after, state.anchor)", "after", ["ragged"]),
    "pads enter the history": ("np.where(real[:, None], history, state.history)", "history", ["ragged", *PRESET_FILES]),
    "a pad is redundant": ("redundant = real & above", "redundant = above", ["ragged"]),
    "cosine in half precision": (".astype(state.anchor.dtype)  #", ".astype(np.float16)  #", ["half"]),
    "cosine of a zero norm": ("np.where(norms == 0, 0,", "np.where(norms == 0, 1,", ["zeros"]),
    "grace one long": ('position + config["grace"]', 'position + config["grace"] + 1', ["model-anchored", "model-cache"]),
    "skipped in the anchor output": ("np.where(keep[:, t, None], a", "np.where(real[:, t, None], a", ["model-anchored"]),
    "contribution to the normed stream": ("np.linalg.norm(x[:, t]", "np.linalg.norm(normed[:, t]", ["model-adaptive"]),
    "every kept token counts alike": ("1 / (1 - np.minimum(ratio, 0.95))", "1", ["model-adaptive"]),
    "ratios set one token late": ("np.isin(self.seen, self", "np.isin(self.seen - 1, self", ["model-adaptive"]),
}  # fmt: skip


@functools.cache
def changed(change):
    before, after, _ = CHANGES[change]
    assert PORT.count(before) == 1
    module = types.ModuleType(change)
    exec(PORT.replace(before, after), module.__dict__)  # our own file with one change
    return module


@functools.cache
def fails(change, name):
    try:
        with np.errstate(all="ignore"):
            check(changed(change), name)
    except AssertionError:
        return True
    return False


@pytest.mark.filterwarnings("ignore:Degrees of freedom")
@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_port_fails(change):
    for name in CHANGES[change][2]:
        assert fails(change, name), name


@pytest.mark.filterwarnings("ignore:Degrees of freedom")
@pytest.mark.parametrize("name", FILES)
def test_every_file_catches_something(name):
    assert any(fails(change, name) for change in CHANGES)


# --------------------------------------------------------------------------------------------------- the files themselves


@pytest.mark.parametrize("name", FILTERED)
def test_no_decision_is_close(name):
    """Every score is further than 1e-4 from the one that decides, and on the side of it that the decision says."""
    data = golden(name)
    if name in INDEX["filter"]:
        config, lengths = FilterConfig(**INDEX["filter"][name]["config"]), np.sum(INDEX["filter"][name]["calls"], 0)
        rows = [(data["score"][b], data["redundant"][b], np.full(n, data["ratio"][b]), n) for b, n in enumerate(lengths)]
    else:
        config, L = FilterConfig(**INDEX["model"]["files"][name]["config"]), SHAPE["n_layers"]
        parts = [data[part] for part in ("score", "redundant", "ratio")]
        cases = [(p, b, l) for p in range(len(PRUNES)) for b in range(len(LENGTHS)) for l in range(L)]
        rows = [(*(x[p, b, :, l] for x in parts), LENGTHS[b]) for p, b, l in cases]
    decided = 0
    for score, redundant, ratio, n in rows:
        margin = make.margins(score[:n], ratio[:n], config)
        some = np.isfinite(margin)
        assert (np.abs(margin) > 1e-4).all()
        np.testing.assert_array_equal(redundant[:n][some], margin[some] > 0)
        decided += some.sum()
    assert decided > 5


def test_the_files_are_what_make_golden_makes(tmp_path):
    make.make(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in make.FOLDER.iterdir() if path.suffix in (".safetensors", ".json"))
    assert json.loads((tmp_path / "files.json").read_text()) == INDEX
    for name in FILES:
        new = load_file(tmp_path / f"{name}.safetensors")
        assert {part: (x.dtype, x.shape) for part, x in new.items()} == {
            part: (x.dtype, x.shape) for part, x in golden(name).items()
        }
        for part, x in new.items():
            agree(x, golden(name)[part], "float64", part)


def test_the_files_are_small():
    sizes = {path.name: path.stat().st_size for path in make.FOLDER.iterdir() if path.is_file()}
    assert sum(sizes.values()) < 1.5e6
    assert sum(size for name, size in sizes.items() if name.startswith("model")) < 1e6


def test_every_tensor_is_described():
    weights = {part for part in golden("model") if part.endswith(".weight")}
    assert {part for name in FILES for part in golden(name)} - weights == set(INDEX["tensors"])
