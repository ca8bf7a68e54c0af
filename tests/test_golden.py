"""The golden files: token_filter, the model and the NumPy port agree with them, and they catch what
a port gets wrong.

Every check runs on an implementation: golden/port.py, that file with one change, or `Reference`,
this repository's own code behind the same names.
"""

import copy
import functools
import json
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from filter_config import FilterConfig, layer_ratios
from golden import make, port
from golden.check import FILES, INDEX, LENGTHS, PRUNES, SHAPE, agree, check, golden
from model import ModelConfig, Transformer, apply_rope, rope_table
from token_filter import FilterState, exceeds_quantile, token_filter

DTYPES = ["float64", "float32"]

# ------------------------------------------------------------ this repository's code, and the port


class Reference:
    """token_filter.py and model.py by the names of golden/port.py, with the stages that can be seen
    from outside.
    """

    @staticmethod
    def Filter(B, kv_heads, head_dim, config, dtype):
        return FilterState(
            B, kv_heads, head_dim, FilterConfig(**config), 0, getattr(torch, dtype.__name__), "cpu"
        )

    @staticmethod
    def filter_chunk(k, v, n_new, state, ratio, config):
        decode = k.shape[1] == 1 and n_new.all()
        (k, v, n_new) = (torch.tensor(x) for x in (k, v, n_new))
        ratio = torch.tensor(ratio)[:, None]
        config = FilterConfig(**config)
        n_new = None if decode else n_new
        heads = k.shape[2]
        out = {}

        def mean(side, some):
            """Of these heads' cosines: the score of a filter that sees those and that side only."""
            part = copy.deepcopy(state)
            part.anchor = part.anchor[:, :, some]
            return token_filter(
                k[:, :, some], v[:, :, some], n_new, part, ratio, replace(config, fusion=side)
            )[1]

        sides = "key", "value"
        out["mean"] = torch.stack([mean(side, slice(None)) for side in sides], 2)
        cosine = [
            torch.stack([mean(side, slice(h, h + 1)) for h in range(heads)], 2) for side in sides
        ]
        out["cosine"] = torch.stack(cosine, 2)
        if k.shape[1] == 1:
            x = torch.stack((k, v), 2).to(state.anchor.dtype)
            first = (state.count == 0).view(-1, 1, 1, 1, 1)
            out["anchors"] = torch.where(first, x, state.anchor[:, None])
        out["redundant"], out["score"] = token_filter(k, v, n_new, state, ratio, config)
        return {name: x.numpy() for name, x in out.items()}

    @staticmethod
    def threshold(score, history, count, ratio):
        score, history, count, ratio = (
            torch.tensor(x)[:, None] for x in (score, history, count, ratio)
        )
        return (
            exceeds_quantile(score, history, count.clamp(max=history.shape[2]), ratio)[
                :, 0
            ].numpy(),
        )

    @staticmethod
    def layer_ratios(schedule, p, L):
        return np.array(layer_ratios(FilterConfig(schedule=schedule, prune=p), L))

    @staticmethod
    def apply_rope(x, position, theta):
        x, D = torch.tensor(x), x.shape[-1]
        frequencies = theta ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)
        return apply_rope(x, *rope_table(torch.tensor(position), frequencies, x.dtype)).numpy()

    class Model:
        def __init__(self, weights, shape, config, B, dtype):
            self.model = Transformer(ModelConfig(**shape)).to(getattr(torch, dtype.__name__))
            self.model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
            self.cache = self.model.new_cache(B, FilterConfig(**config))

        def feed(self, tokens, n_new):
            read = self.cache.usage()[:, 3]
            logits = self.model(torch.tensor(tokens).long(), self.cache, n_new)
            layers = self.cache.decisions()
            score = torch.stack([layer.score for layer in layers], 2)  # (B, T, L)
            redundant = torch.stack([layer.redundant for layer in layers], 2)
            out = {"logits": logits, "score": score, "redundant": redundant}
            if tokens.shape[1] == 1:  # of one token alone
                out["read"] = (self.cache.usage()[:, 3] - read)[:, None]
            return {name: x.numpy() for name, x in out.items()}


# -------------------------------------------------------------------------------- who passes them


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
    assert source.count("\n") < 260
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import numpy as np"]


# -------------------------------------------------------------------------------- what they catch

PORT = (make.FOLDER / "port.py").read_text()
PRESET_FILES = [name for name in FILES if name.startswith("model-")]
FILTERED = [name for name in FILES if name not in ("ties", "model")]
CHANGES = {  # to the port: a piece of its text, what it becomes, files that must fail for it
    "anchor updated before scoring": (
        "after = g * anchor",
        "anchor = after = g * anchor",
        FILTERED,
    ),
    "not strictly above": ("(history < score", "(history <= score", ["ties"]),
    "sample variance": ("cosine.var(-1)", "cosine.var(-1, ddof=1)", ["gqa", "alike"]),
    "weights swapped": (
        "w_k = (variance[:, 1]",
        "w_k = (variance[:, 0]",
        ["gqa", "model-paper", "model-local"],
    ),
    "warm-up one short": (
        'state.count >= max(config["warmup"], 1)',
        'state.count >= config["warmup"] - 1',
        ["warmup"],
    ),
    "warm-up one long": (
        'state.count >= max(config["warmup"], 1)',
        'state.count > config["warmup"]',
        ["warmup"],
    ),
    "unrotated keys compared": (
        "filter_chunk(compared, v",
        "filter_chunk(raw_k, v",
        ["model-paper", "model-local"],
    ),
    "rotated keys compared": ("filter_chunk(compared, v", "filter_chunk(k, v", ["model-cache"]),
    "always fused": ('config["fusion"] == "variance"', "True", ["model-cache"]),
    "unrotated keys": (
        "return np.concatenate((a * cos",
        "return x + 0 * np.concatenate((a * cos",
        ["rope", "model"],
    ),
    # and what else PORTING.md warns of
    "NaN is above": ("& ~np.isnan(score) &", "&", ["ties"]),
    "ceiling in float32": (
        "np.ceil((1 - ratio) * n - 1e-9)",
        "np.ceil((1 - np.float32(ratio)) * n)",
        ["ties"],
    ),
    "no eps": ("variance[:, 1] + 1e-6", "variance[:, 1]", ["one-head", "alike"]),
    "warm-up not in the history": (
        "state.history[real,",
        'real &= state.count > config["warmup"]; state.history[real,',
        ["gqa"],
    ),
    "redundant not in the history": (
        "state.history[real,",
        "real = real & ~redundant; state.history[real,",
        ["history", "gqa"],
    ),
    "redundant not in the anchors": (
        "[real] = after[real]",
        "[real & ~redundant] = after[real & ~redundant]",
        ["history"],
    ),
    "history one short": (
        "history.shape[1])\n",
        "history.shape[1])\n    history = history[:, 1:]\n",
        ["history"],
    ),
    "position of the longest row": (
        "self.seen[:, None] + step",
        "self.seen.max() + 0 * n_new[:, None] + step",
        ["model"],
    ),
    "position by slot": (
        "apply_rope(y, position,",
        "apply_rope(y, cache.far[:, None] + position - self.seen[:, None],",
        PRESET_FILES,
    ),
    "pads enter the anchors": ("[real] = after[real]", "[:] = after", ["ragged"]),
    "pads enter the history": (
        "state.history[real,",
        "real = real | True; state.history[real,",
        ["ragged", *PRESET_FILES],
    ),
    "a pad is redundant": ("redundant = real & above", "redundant = above", ["ragged"]),
    "o's bias without attention": ("added[n == 0] = 0", "added[n < 0] = 0", ["model-bias"]),
    # the cache, and who sees what
    "pads enter the cache": (
        "flatnonzero(real[:, t])",
        "flatnonzero(real[:, t] | True)",
        ["model", *PRESET_FILES],
    ),
    "as long as the longest row": (
        "position + 1, front), self.far[b]",
        "position + 1, front), self.far.max()",
        ["model", *PRESET_FILES],
    ),
    "unwritten slots in sight": (
        "np.minimum(position + 1, front)",
        "0 * position + front",
        PRESET_FILES,
    ),
    "blind to itself": (
        "np.minimum(position + 1, front)",
        "np.minimum(position, front)",
        PRESET_FILES,
    ),
    "no ring": ('config["recent"] + 1', "1", ["model-local", "model-cache"]),
    "ring one short": (
        'config["recent"] + 1',
        'max(config["recent"], 1)',
        ["model-local", "model-cache"],
    ),
    "ring from the first token on": (
        "(position - self.sinks) % self.ring",
        "position % self.ring",
        ["model-local", "model-cache"],
    ),
    "no sinks": ('max(config["warmup"], 1) if', "0 if", ["model-local"]),
    "a redundant token stays": (
        "self.kept[b, slot] = ~redundant",
        "self.kept[b, slot] = True",
        PRESET_FILES,
    ),
    "a kept token goes": ("self.far[b] += self.kept[b, slot]", "self.far[b] += 0", PRESET_FILES),
    "stored before the oldest is copied": ("self.kv[:, b, slot]  #", "kv  #", PRESET_FILES),
    "flags set before the oldest's is read": ("self.kept[b, slot]\n", "~redundant\n", PRESET_FILES),
    "skip attends": ('{"skip": 0', '{"skip": near + far', ["model-paper"]),
    "local reads far": ('"local": near', '"local": near + far', ["model-local"]),
    "local skips": ('"local": near', '"local": 0', ["model-local"]),
    "cache reads sinks and ring alone": ('"cache": near + far', '"cache": near', ["model-cache"]),
    "cosine in half precision": (
        ".astype(state.anchor.dtype)  #",
        ".astype(np.float16)  #",
        ["half"],
    ),
    "cosine of a zero norm": ("np.where(norms == 0, 0,", "np.where(norms == 0, 1,", ["zeros"]),
}


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


# --------------------------------------------------------------------------- the files themselves


@pytest.mark.parametrize("name", FILTERED)
def test_no_decision_is_close(name):
    """Every score is further than 1e-4 from the one that decides, and on the side of it that the
    decision says.
    """
    data = golden(name)
    if name in INDEX["filter"]:
        config = FilterConfig(**INDEX["filter"][name]["config"])
        lengths = np.sum(INDEX["filter"][name]["calls"], 0)
        rows = [
            (data["score"][b], data["redundant"][b], data["ratio"][b], n)
            for b, n in enumerate(lengths)
        ]
    else:
        config = FilterConfig(**INDEX["model"]["files"][name]["config"])
        L = SHAPE["n_layers"]
        cases = np.ndindex(len(PRUNES), len(LENGTHS), L)
        rows = [
            (
                data["score"][p, b, :, l],
                data["redundant"][p, b, :, l],
                data["ratio"][p, l],
                LENGTHS[b],
            )
            for p, b, l in cases
        ]
    decided = 0
    for score, redundant, ratio, n in rows:
        margin = make.margins(score[:n], ratio, config)
        some = np.isfinite(margin)
        assert (np.abs(margin) > 1e-4).all()
        np.testing.assert_array_equal(redundant[:n][some], margin[some] > 0)
        decided += some.sum()
    assert decided > 5


def test_the_files_are_what_make_golden_makes(tmp_path):
    make.make(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(
        path.name for path in make.FOLDER.iterdir() if path.suffix in (".safetensors", ".json")
    )
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
    parts = {part for name in FILES for part in golden(name)}
    weights = {part for part in golden("model") if part.endswith(".weight")}
    named = {"bias" if part.endswith(".bias") else part for part in parts - weights}
    assert named == set(INDEX["tensors"])
