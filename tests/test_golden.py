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
    def filter_chunk(k, v, n_new, state, ratio, config, q=None):
        decode = k.shape[1] == 1 and n_new.all()
        inputs = [torch.tensor(x) for x in (k, v, q) if x is not None]
        k, v, *queries = inputs
        ratio = torch.tensor(ratio)[:, None]
        config = FilterConfig(**config)
        n_new = None if decode else torch.tensor(n_new)
        out = {}

        def mean(side, some):
            """Of these heads' cosines: the score of a filter that sees those and that side only."""
            part = copy.deepcopy(state)
            part.anchor = part.anchor[:, :, some]
            return token_filter(
                k[:, :, some], v[:, :, some], n_new, part, ratio, replace(config, fusion=side)
            )[1]

        if q is None:
            heads = range(k.shape[2])
            sides = "key", "value"
            out["mean"] = torch.stack([mean(side, slice(None)) for side in sides], 2)
            cosine = [
                torch.stack([mean(side, slice(h, h + 1)) for h in heads], 2) for side in sides
            ]
            out["cosine"] = torch.stack(cosine, 2)
        if k.shape[1] == 1:
            x = torch.stack(inputs, 2).to(state.anchor.dtype)
            first = (state.count == 0).view(-1, 1, 1, 1, 1)
            out["anchors"] = torch.where(first, x, state.anchor[:, None])
        out["redundant"], out["score"] = token_filter(k, v, n_new, state, ratio, config, *queries)
        if q is not None:  # a score made of ranks does not show the cosines
            out["cosine"] = state.latest_cosine
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


def test_only_files_with_queries_ask_for_them(monkeypatch):
    with_queries = port.filter_chunk

    def filter_chunk(k, v, lengths, state, ratio, config):
        return with_queries(k, v, lengths, state, ratio, config)

    monkeypatch.setattr(port, "filter_chunk", filter_chunk)
    for name in INDEX["filter"]:
        if name != "queries":
            check(port, name)
    with pytest.raises(TypeError):
        check(port, "queries")


def test_the_port_names_queries_that_are_missing():
    config = INDEX["filter"]["queries"]["config"]
    k = golden("queries")["k"]
    state = port.Filter(len(k), *k.shape[2:], config, np.float64)
    with pytest.raises(ValueError, match=r"key-query.* give q"):
        port.filter_chunk(k, k, np.array([1, 1, 1]), state, 0.5, config)


def test_the_port_stands_alone():
    source = (make.FOLDER / "port.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert imports == ["import numpy as np"]


# -------------------------------------------------------------------------------- what they catch

PORT = (make.FOLDER / "port.py").read_text()
PRESET_FILES = [name for name in FILES if name.startswith("model-")]
FILTERED = [name for name in FILES if name not in ("ties", "model")]
QUERY_FILES = ["queries", "model-cache"]
# Each is a change to the port: a piece of its text, what it becomes, files that must fail for it.
CHANGES = {
    "anchor updated before scoring": (
        "    # The cosine is 0 where a norm is 0.\n",
        '    g = config["gamma"]\n    anchor = g * anchor + (1 - g) * x\n',
        FILTERED,
    ),
    "not strictly above": ("(history < score", "(history <= score", ["ties", *QUERY_FILES]),
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
    "always fused": ('if fusion == "variance"', "if True", ["fusion-key"]),
    # Queries.
    "rotated queries compared": ("compared_q = unrotated_q\n", "compared_q = q\n", ["model-cache"]),
    "one query of a group": ("by_group.mean(3)", "by_group[:, :, :, 0]", ["model-cache"]),
    "wrong groups": (
        'compared_q.reshape(B, T, self.shape["kv_heads"], -1, D)',
        'compared_q.reshape(B, T, -1, self.shape["kv_heads"], D).swapaxes(2, 3)',
        ["model-cache"],
    ),
    "average query updated before scoring": (
        "    # The cosine is 0 where a norm is 0.\n",
        '    g = config["gamma"]\n    anchor[:, 2:] = g * anchor[:, 2:] + (1 - g) * x[:, 2:]\n',
        QUERY_FILES,
    ),
    "average query starts at 0": (
        "    # The cosine is 0 where a norm is 0.\n",
        "    anchor[is_first, 2:] = 0\n",
        QUERY_FILES,
    ),
    "query compared with the average query": ("compared[:, 2] = x[:, 0]", "pass", QUERY_FILES),
    "query compared with the average key": (
        "    # The cosine is 0 where a norm is 0.\n",
        "    if compared.shape[1] == 3:\n"
        "        compared[:, 2] = x[:, 2]\n"
        "        anchor = anchor[:, [0, 1, 0]]\n",
        QUERY_FILES,
    ),
    "cosine of keys not ranked": (
        "(place[:, 0] - 0.5 * place[:, 1]) / np.maximum(n, 1)",
        "mean_k - 0.5 * place[:, 1] / np.maximum(n, 1)",
        QUERY_FILES,
    ),
    "equal means count as below": ("below + 0.5 * equal", "below + equal", ["queries"]),
    "equal means do not count": ("below + 0.5 * equal", "below", ["queries"]),
    "both ranks weigh the same": ("- 0.5 * place[:, 1]", "- place[:, 1]", QUERY_FILES),
    "what queries look for goes": ("- 0.5 * place[:, 1]", "+ 0.5 * place[:, 1]", QUERY_FILES),
    "divided before the subtraction": (
        "(place[:, 0] - 0.5 * place[:, 1]) / np.maximum(n, 1)",
        "place[:, 0] / np.maximum(n, 1) - 0.5 * (place[:, 1] / np.maximum(n, 1))",
        ["queries"],
    ),
    "score of another precision than the history's": (
        "score.astype(mean.dtype)",
        "score.astype(np.float64)",
        ["queries"],
    ),
    "divided by the whole history": (
        "/ np.maximum(n, 1)",
        "/ state.mean_history.shape[2]",
        QUERY_FILES,
    ),
    "divided by all tokens": ("/ np.maximum(n, 1)", "/ np.maximum(state.count, 1)", ["queries"]),
    "means in the history before they are ranked": (
        "    # Where each mean stands",
        "    column = state.count % state.mean_history.shape[2]\n"
        "    state.mean_history[np.arange(len(mean)), :, column] = mean\n"
        "    # Where each mean stands",
        QUERY_FILES,
    ),
    "history of means one short": (
        "    # Where each mean stands",
        "    oldest = state.count % state.mean_history.shape[2]\n"
        "    state.mean_history[np.arange(len(mean)), :, oldest] = np.nan\n"
        "    # Where each mean stands",
        ["queries"],
    ),
    "redundant not in the history of means": (
        'state.mean_history[is_real, :, column[is_real]] = parts["mean"][is_real]',
        "some = is_real & ~redundant\n"
        '    state.mean_history[some, :, column[some]] = parts["mean"][some]',
        QUERY_FILES,
    ),
    "pads enter the history of means": (
        'state.mean_history[is_real, :, column[is_real]] = parts["mean"][is_real]',
        'state.mean_history[np.arange(len(x)), :, column] = parts["mean"]',
        QUERY_FILES,
    ),
    "score of ranks not ranked itself": (
        "    is_past_warmup = ",
        '    if "place" in parts:\n        above = score > 0.5 - ratio\n    is_past_warmup = ',
        QUERY_FILES,
    ),
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
    "pads enter the anchors": (
        "[is_real] = next_anchor[is_real]",
        "[:] = next_anchor",
        ["ragged", "queries", *PRESET_FILES],
    ),
    "pads enter the history": (
        "    state.history[is_real,",
        "    is_real = is_real | True\n    state.history[is_real,",
        ["ragged", "queries", *PRESET_FILES],
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
# These do no harm in float64.
ONLY_IN_FLOAT32 = ["score of another precision than the history's"]


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
    dtype = "float32" if change in ONLY_IN_FLOAT32 else "float64"
    try:
        with np.errstate(all="ignore"):
            check(port_with_change, name, dtype)
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


def decided_rows(name):
    """Of each sequence in a layer that filters: {tensor: (T, ...)} and the ratio."""
    data = golden(name)
    parts = [part for part in ("score", "redundant", "mean") if part in data]
    if name in INDEX["filter"]:
        lengths = np.sum(INDEX["filter"][name]["calls"], 0)
        for b, n in enumerate(lengths):
            yield {part: data[part][b, :n] for part in parts}, data["ratio"][b]
        return
    for p, b, l in np.ndindex(len(PRUNES), len(LENGTHS), SHAPE["n_layers"]):
        ratio = data["ratio"][p, l]
        if ratio > 0:
            yield {part: data[part][p, b, : LENGTHS[b], l] for part in parts}, ratio


def config_of(name):
    about = INDEX["filter"][name] if name in INDEX["filter"] else INDEX["model"]["files"][name]
    return FilterConfig(**about["config"])


@pytest.mark.parametrize("name", FILTERED)
def test_no_decision_is_close(name):
    """Every score is further than 1e-4 from the one that decides, or equal to it if it is made of
    ranks, and on the side of it that the decision says.
    """
    config = config_of(name)
    decided = 0
    for row, ratio in decided_rows(name):
        margin = make.margins(row["score"], ratio, config)
        is_equal = (margin == 0) & config.needs_queries
        assert ((np.abs(margin) > 1e-4) | is_equal).all()
        some = np.isfinite(margin)
        np.testing.assert_array_equal(row["redundant"][some], margin[some] > 0)
        decided += some.sum()
    assert decided > 5


@pytest.mark.parametrize("name", QUERY_FILES)
def test_no_rank_is_close(name):
    """Mean cosines that are ranked are at least 1e-5 apart, but for those that are 0 exactly."""
    n_rows = 0
    for row, _ in decided_rows(name):
        for mean in row["mean"].T:
            values, counts = np.unique(mean, return_counts=True)
            assert np.diff(values).min(initial=np.inf) >= 1e-5
            assert (counts[values != 0] == 1).all()
            n_rows += 1
    assert n_rows >= 6


def test_some_ranks_and_scores_are_equal():
    """Else the files would not tell how equal means count, nor that a tie keeps its token."""
    for name in QUERY_FILES:
        config = config_of(name)
        rows = list(decided_rows(name))
        assert any((make.margins(row["score"], ratio, config) == 0).any() for row, ratio in rows)
    assert all((row["mean"] == 0).sum() > 1 for row, _ in decided_rows("queries"))


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
