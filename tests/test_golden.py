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


@pytest.mark.parametrize("name, function", [("gqa", "filter_chunk"), ("model-local", "feed")])
def test_a_port_that_returns_nothing_does_not_pass(name, function, monkeypatch):
    if function == "feed":
        monkeypatch.setattr(port.Model, "feed", lambda *given: {})
    else:
        monkeypatch.setattr(port, "filter_chunk", lambda *given, **more: {})
    with pytest.raises((AssertionError, KeyError)):
        check(port, name)


def test_the_port_stands_alone():
    source = (make.FOLDER / "port.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import numpy as np"]


# -------------------------------------------------------------------------------- what they catch

PORT = (make.FOLDER / "port.py").read_text()
PRESET_FILES = [name for name in FILES if name.startswith("model-")]
FILTERED = [name for name in FILES if name not in ("ties", "model")]
# Each is a change to the port: a piece of its text, what it becomes, files that must fail for it.
CHANGES = {
    "anchor updated before scoring": (
        "    # The cosine is 0 where a norm is 0.\n",
        '    g = config["gamma"]\n    anchor = g * anchor + (1 - g) * kv\n',
        FILTERED,
    ),
    "not strictly above": ("(history < score", "(history <= score", ["ties"]),
    "sample variance": ("cosine.var(-1)", "cosine.var(-1, ddof=1)", ["gqa", "alike"]),
    "weights swapped": (
        "return (variance_v + 1e-6)",
        "return (variance_k + 1e-6)",
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
        "compared_k = k\n",
        "compared_k = unrotated_k\n",
        ["model-paper", "model-local"],
    ),
    "rotated keys compared": ("compared_k = unrotated_k\n", "compared_k = k\n", ["model-cache"]),
    "always fused": ('if fusion == "variance"', "if True", ["model-cache"]),
    "unrotated keys": (
        "return np.concatenate((rotated_a, rotated_b)",
        "return np.concatenate((a, b)",
        ["rope", "model"],
    ),
    # And what else PORTING.md warns of.
    "NaN is above": ("& is_number &", "&", ["ties"]),
    "ceiling in float32": (
        "np.ceil((1 - ratio) * n - 1e-9)",
        "np.ceil((1 - np.float32(ratio)) * n)",
        ["ties"],
    ),
    "no eps": ("return (variance_v + 1e-6)", "return variance_v", ["one-head", "alike"]),
    "warm-up not in the history": (
        "    column = state.count",
        '    is_real &= state.count > config["warmup"]\n    column = state.count',
        ["gqa"],
    ),
    "redundant not in the history": (
        "state.history[is_real, column[is_real]] = score[is_real]",
        "some = is_real & ~redundant; state.history[some, column[some]] = score[some]",
        ["history", "gqa"],
    ),
    "redundant not in the anchors": (
        "[is_real] = next_anchor[is_real]",
        "[is_real & ~redundant] = next_anchor[is_real & ~redundant]",
        ["history"],
    ),
    "history one short": (
        "history.shape[1])\n",
        "history.shape[1])\n    history = history[:, 1:]\n",
        ["history"],
    ),
    "position of the longest row": (
        "position = self.lengths[:, None] + column",
        "position = self.lengths.max() + 0 * lengths[:, None] + column",
        ["model"],
    ),
    "position by slot": (
        'theta = self.shape["rope_theta"]\n'
        "        q = apply_rope(unrotated_q, position, theta)\n"
        "        k = apply_rope(unrotated_k, position, theta)\n",
        'theta = self.shape["rope_theta"]\n'
        "        slot = cache.n_far[:, None] + position - self.lengths[:, None]\n"
        "        q = apply_rope(unrotated_q, slot, theta)\n"
        "        k = apply_rope(unrotated_k, slot, theta)\n",
        PRESET_FILES,
    ),
    "pads enter the anchors": ("[is_real] = next_anchor[is_real]", "[:] = next_anchor", ["ragged"]),
    "pads enter the history": (
        "    state.history[is_real,",
        "    is_real = is_real | True\n    state.history[is_real,",
        ["ragged", *PRESET_FILES],
    ),
    "a pad is redundant": (
        "redundant = is_real & is_past_warmup",
        "redundant = is_past_warmup",
        ["ragged"],
    ),
    "o's bias without attention": (
        "added[n_visible == 0] = 0",
        "added[n_visible < 0] = 0",
        ["model-bias"],
    ),
    # The cache, and who sees what.
    "pads enter the cache": (
        "flatnonzero(is_real[:, t])",
        "flatnonzero(is_real[:, t] | True)",
        ["model", *PRESET_FILES],
    ),
    "as far as the longest row": (
        "all_filled = near_filled + self.n_far[row]",
        "all_filled = near_filled + self.n_far.max()",
        PRESET_FILES,
    ),
    "as far as the longest row, without a filter": (
        "return self.n_far[row]",
        "return 0 * row + self.n_far.max()",
        ["model"],
    ),
    "unwritten slots in sight": (
        "np.minimum(position + 1, self.n_near)",
        "0 * position + self.n_near",
        PRESET_FILES,
    ),
    "blind to itself": (
        "np.minimum(position + 1, self.n_near)",
        "np.minimum(position, self.n_near)",
        PRESET_FILES,
    ),
    "blind to itself, without a filter": (
        "return self.n_far[row]",
        "return self.n_far[row] - 1",
        ["model"],
    ),
    "no ring": ('config["recent"] + 1', "1", ["model-local", "model-cache"]),
    "ring one short": (
        'config["recent"] + 1',
        'max(config["recent"], 1)',
        ["model-local", "model-cache"],
    ),
    "ring from the first token on": (
        "(position - self.n_sinks) % self.ring_size",
        "position % self.ring_size",
        ["model-local", "model-cache"],
    ),
    "no sinks": ('self.n_sinks = max(config["warmup"], 1)', "self.n_sinks = 0", ["model-local"]),
    "a redundant token stays": (
        "self.kept[row, slot] = ~redundant",
        "self.kept[row, slot] = True",
        PRESET_FILES,
    ),
    "a kept token goes": (
        "self.n_far[row] += self.kept[row, slot]",
        "self.n_far[row] += 0",
        PRESET_FILES,
    ),
    "stored before the oldest is copied": (
        "first_free] = self.kv[:, row, slot]",
        "first_free] = kv",
        PRESET_FILES,
    ),
    "flags set before the oldest's is read": (
        "+= self.kept[row, slot]",
        "+= ~redundant",
        PRESET_FILES,
    ),
    "skip attends": (
        "n_if_redundant = np.zeros_like(all_filled)",
        "n_if_redundant = all_filled + 0",
        ["model-paper"],
    ),
    "local reads far": (
        "n_if_redundant = near_filled",
        "n_if_redundant = near_filled + self.n_far[row]",
        ["model-local"],
    ),
    "local skips": (
        "n_if_redundant = near_filled",
        "n_if_redundant = 0 * near_filled",
        ["model-local"],
    ),
    "cache reads sinks and ring alone": (
        "n_if_redundant = all_filled",
        "n_if_redundant = near_filled",
        ["model-cache"],
    ),
    "cosine in half precision": (
        ".astype(state.anchor.dtype)",
        ".astype(np.float16)",
        ["half"],
    ),
    "cosine of a zero norm": ("np.where(norms == 0, 0,", "np.where(norms == 0, 1,", ["zeros"]),
}


@functools.cache
def changed(change):
    before, after, _ = CHANGES[change]
    if PORT.count(before) != 1:
        raise ValueError(f"golden/port.py has {PORT.count(before)} times: {before!r}")
    module = types.ModuleType(change)
    exec(PORT.replace(before, after), module.__dict__)  # our own file with one change
    return module


@functools.cache
def fails(change, name):
    # Outside of try: a change whose text the port does not have must not pass for a failure.
    port_with_change = changed(change)
    try:
        with np.errstate(all="ignore"):
            check(port_with_change, name)
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
