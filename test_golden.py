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
from token_filter import (
    PRESETS,
    FilterConfig,
    FilterState,
    above_threshold,
    adaptive_ratios,
    layer_ratios,
    token_filter,
)

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


def check_filter(implementation, name, dtype):
    data, about = golden(name), INDEX["filter"][name]
    (B, T, KVH, D), config = data["k"].shape, about["config"]
    if name == "schedule-adaptive":
        agree(implementation.adaptive_ratios(data["contribution"], config["prune"]), data["ratio"], dtype, "ratio")
    elif name.startswith("schedule"):
        agree(implementation.layer_ratios(config["schedule"], config["prune"], B), data["ratio"], dtype, "ratio")
    k, v = (data[side] if name == "half" else data[side].astype(dtype) for side in ("k", "v"))
    lengths = np.sum(about["calls"], 0).tolist()
    for calls in (about["calls"], [lengths], one_by_one(lengths)):
        if "raw_k" in data:
            raw, theta = data["raw_k"].astype(dtype), about["rope_theta"]
            k = in_calls(calls, T, lambda at, n_new: {"k": implementation.rotate(raw[at], at[1], theta)})["k"]
            agree(k, data["k"], dtype, "k")
        state = implementation.Filter(B, KVH, D, config, np.dtype(dtype).type)
        stages = in_calls(
            calls, T, lambda at, n_new: implementation.filter_chunk(k[at], v[at], n_new, state, data["ratio"], config)
        )
        for stage, got in stages.items():
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


def check_model(implementation, name, dtype):
    weights, about = dict(golden("model")), INDEX["model"]["files"][name]
    tokens, dense = weights.pop("tokens"), weights.pop("dense")
    for p, prune in enumerate(PRUNES):
        want = {part: x[p] for part, x in golden(name).items()} if name != "model" else {"logits": dense}
        config = about["config"] | {"prune": prune if name != "model" else 0.0}
        for calls in (CALLS, one_by_one(LENGTHS)):
            model = implementation.Model(weights, SHAPE, config, len(LENGTHS), np.dtype(dtype).type)
            got = in_calls(calls, tokens.shape[1], lambda at, n_new: model.feed(tokens[at], n_new))
            for part in want.keys() & got.keys():
                agree(got[part], want[part], dtype, f"{part}, prune {prune}")


def check(implementation, name, dtype="float64"):
    if name == "ties":
        check_ties(implementation, dtype)
    else:
        (check_filter if name in INDEX["filter"] else check_model)(implementation, name, dtype)


# ---------------------------------------------------------------------------------- this repository's code, and the port


class Reference:
    """token_filter.py and model.py by the names of golden/port.py. They show fewer stages; those are drawn from ablations."""

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
                out["ratio"] = [torch.as_tensor(layer.ratio, dtype=torch.float64).expand(len(tokens))[:, None] for layer in layers]
            return {"logits": logits.numpy()} | {name: torch.stack(x, 2).numpy() for name, x in out.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FILES)
def test_this_repository_passes_every_file(name, dtype):
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


# ------------------------------------------------------------------------------------- what the files catch

CHANGES = {  # to the port: the text, what it becomes, and the files that must catch it
    "anchor updated before scoring": ("anchor = np.where((state.count", "anchor = g * state.anchor + (1 - g) * x + 0 * np.where((state.count", ["one-head", "gqa", "mha", "warmup"]),
}
