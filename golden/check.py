"""Whether an implementation passes the golden files, as PORTING.md asks.

    python -m golden.check            checks golden/port.py
    check(yours, "gqa", "float32")    checks a port of your own

`yours` is a module or an object with the functions and classes of port.py under their names. It may
return fewer stages than port.py, but not fewer than REQUIRED.
"""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent
INDEX = json.loads((FOLDER / "files.json").read_text())
SHAPE, LENGTHS, CALLS, PRUNES = (
    INDEX["model"][part] for part in ("shape", "lengths", "calls", "prune")
)
FILES = [*INDEX["filter"], "ties", *INDEX["model"]["files"]]

# What must be returned of the filter, of a dense model, and of a filtered one.
REQUIRED = {
    "filter": {"redundant", "score"},
    "model": {"logits"},
    "filtered model": {"logits", "redundant", "score"},
}


@functools.cache
def golden(name):
    return load_file(FOLDER / f"{name}.safetensors")


def agree(got, want, dtype, what):
    """Counts and decisions exactly, numbers within a tolerance, where one is expected."""
    if want.dtype.kind != "f":
        np.testing.assert_array_equal(got, want, err_msg=what)
        return
    atol = (1e-4 if dtype == "float32" else 1e-9) * max(1, np.nanmax(abs(want)))
    is_expected = ~np.isnan(want)
    got = np.where(is_expected, got, 0)
    want = np.where(is_expected, want, 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=what)


def returns(found, required, what):
    """Fail, naming it, if something that must be returned is missing."""
    missing = sorted(set(required) - set(found))
    assert not missing, f"{what} does not return {', '.join(missing)}"


def in_calls(calls, feed, *given, **named):
    """What feed(*chunks of given, lengths, **chunks of named) returns in these calls, put together
    to (B, T, ...).

    feed returns arrays (B, t, ...) by name. A chunk of x (B, T, ...) is padded with the tokens that
    follow, so that a port that looks at padding is found out.
    """
    T = given[0].shape[1]
    rows = np.arange(len(calls[0]))
    done = np.zeros(len(rows), int)
    whole = dict[str, np.ndarray]()
    found = []
    for lengths in np.array(calls):
        step = np.arange(lengths.max())
        columns = np.minimum(done[:, None] + step, T - 1)  # (B, t)
        real = step < lengths[:, None]
        chunks = [x[rows[:, None], columns] for x in given]
        named_chunks = {name: x[rows[:, None], columns] for name, x in named.items()}
        found.append(feed(*chunks, lengths, **named_chunks))
        for name, x in found[-1].items():
            assert name != "redundant" or not x[~real].any(), "a pad is redundant"
            if name not in whole:
                whole[name] = np.zeros((len(rows), T, *x.shape[2:]), x.dtype)
            row_of = rows[:, None].repeat(len(step), 1)
            whole[name][row_of[real], columns[real]] = x[real]
        done += lengths
    in_every_call = set.intersection(*(set(each) for each in found))
    return {name: whole[name] for name in in_every_call}


def one_by_one(lengths):
    return [[int(t < n) for n in lengths] for t in range(max(lengths))]


def check_filter(implementation, name, dtype):
    data = golden(name)
    about = INDEX["filter"][name]
    config = about["config"]
    layers = len(data["k"])
    if name.startswith("schedule"):
        agree(
            implementation.layer_ratios(config["schedule"], config["prune"], layers),
            data["ratio"],
            dtype,
            "ratio",
        )
    k = data["k"]
    v = data["v"]
    if name != "half":
        k = k.astype(dtype)
        v = v.astype(dtype)
    if "raw_k" in data:
        raw_k = data["raw_k"].astype(dtype)
        position = np.arange(raw_k.shape[1])[None].repeat(len(raw_k), 0)
        k = implementation.apply_rope(raw_k, position, about["rope_theta"])
        agree(k, data["k"], dtype, "k")
    # A port that knows no queries is not handed any by the files that have none.
    queries = {"q": data["q"].astype(dtype)} if "q" in data else {}
    lengths = np.sum(about["calls"], 0).tolist()
    for calls in (about["calls"], [lengths], one_by_one(lengths)):
        state = implementation.Filter(len(k), *k.shape[2:], config, np.dtype(dtype).type)
        feed = functools.partial(
            implementation.filter_chunk, state=state, ratio=data["ratio"], config=config
        )
        found = in_calls(calls, feed, k, v, **queries)
        returns(found, REQUIRED["filter"], "filter_chunk")
        for stage, got in found.items():
            # float32's variances are too rough for w_k where heads nearly agree.
            is_too_rough = name == "alike" and stage == "w_k" and dtype == "float32"
            if not is_too_rough:
                agree(got, data[stage], dtype, stage)


def check_ties(implementation, dtype):
    data = golden("ties")
    W = INDEX["ties"]["config"]["history"]
    score = data["score"].astype(dtype)
    history = np.full((len(data["score"]), W), np.nan, dtype)
    for t in range(score.shape[1]):
        *counts, above = implementation.threshold(
            score[:, t], history, np.full(len(score), t), data["ratio"]
        )
        agree(above, data["redundant"][:, t], dtype, "redundant")
        if counts:
            agree(counts[0], data["below"][:, t], dtype, "below")
        history = np.concatenate((history[:, 1:], score[:, t, None]), 1)


def check_model(implementation, name, dtype):
    weights = dict(golden("model"))
    about = INDEX["model"]["files"][name]
    tokens = weights.pop("tokens")
    dense = weights.pop("dense")
    config = about["config"]
    shape = SHAPE | about.get("shape", {})
    if name != "model":
        weights |= {part: x for part, x in golden(name).items() if part.endswith(".bias")}
    if name == "model":
        check_logits(implementation, weights, shape, config, tokens, 0.0, {"logits": dense}, dtype)
        return
    expected = {part: x for part, x in golden(name).items() if not part.endswith(".bias")}
    for p, prune in enumerate(PRUNES):
        want = {part: x[p] for part, x in expected.items()}
        ratios = implementation.layer_ratios(config["schedule"], prune, SHAPE["n_layers"])
        agree(ratios, want["ratio"], dtype, "ratio")
        want["read"] = want["n"].sum(-1)  # in all layers
        check_logits(implementation, weights, shape, config, tokens, prune, want, dtype)


def check_logits(implementation, weights, shape, config, tokens, prune, want, dtype):
    """All that feed() returns, in calls of several tokens, token by token, and of a row alone."""
    required = REQUIRED["model" if "n" not in want else "filtered model"]
    for calls in (CALLS, one_by_one(LENGTHS), one_by_one(LENGTHS[:1])):
        rows = len(calls[0])
        model = implementation.Model(
            weights, shape, config | {"prune": prune}, rows, np.dtype(dtype).type
        )
        found = in_calls(calls, model.feed, tokens[:rows])
        returns(found, required, "feed")
        for part in want.keys() & found.keys():
            agree(found[part], want[part][:rows], dtype, f"{part}, prune {prune}")


def check(implementation, name, dtype="float64"):
    """Raises AssertionError, naming the stage, where the implementation does not pass the file."""
    if name == "ties":
        check_ties(implementation, dtype)
    elif name in INDEX["filter"]:
        check_filter(implementation, name, dtype)
    else:
        check_model(implementation, name, dtype)


if __name__ == "__main__":
    from golden import port

    for name in FILES:
        for dtype in ("float64", "float32"):
            check(port, name, dtype)
        print(f"{name}: as expected in float64 and float32")
