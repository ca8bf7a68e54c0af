"""Whether an implementation passes the golden files, as PORTING.md asks: python -m golden.check, of
port.py.

check(yours, name), with the functions and classes of port.py by their names, does the same for a
port of your own.
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


@functools.cache
def golden(name):
    return load_file(FOLDER / f"{name}.safetensors")


def agree(got, want, dtype, what):
    """As PORTING.md asks: counts and decisions exactly, numbers within a tolerance, where one is
    expected.
    """
    if want.dtype.kind == "f":
        atol = (1e-4 if dtype == "float32" else 1e-9) * max(1, np.nanmax(abs(want)))
        got, want = (np.where(np.isnan(want), 0, x) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=what)
    else:
        np.testing.assert_array_equal(got, want, err_msg=what)


def in_calls(calls, feed, *given):
    """What feed(*chunks of given, n_new), each array (B, t, ...), returns in these calls, put
    together to (B, T, ...).

    A chunk of x (B, T, ...) is padded with what follows.
    """
    T = given[0].shape[1]
    done = np.zeros(len(calls[0]), int)
    out = dict[str, np.ndarray]()
    found = []
    for n_new in np.array(calls):
        step = np.arange(n_new.max())
        at = np.arange(len(n_new))[:, None], np.minimum(done[:, None] + step, T - 1)
        real = step < n_new[:, None]
        found.append(feed(*(x[at] for x in given), n_new))
        for name, x in found[-1].items():
            assert name != "redundant" or not x[~real].any(), "a pad is redundant"
            whole = out.setdefault(name, np.zeros((len(n_new), T) + x.shape[2:], x.dtype))
            whole[at[0].repeat(len(step), 1)[real], at[1][real]] = x[real]
        done += n_new
    return {name: out[name] for name in set.intersection(*map(set, found))}


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
    k, v = (data[side] if name == "half" else data[side].astype(dtype) for side in ("k", "v"))
    if "raw_k" in data:
        raw_k = data["raw_k"].astype(dtype)
        k = implementation.apply_rope(
            raw_k, np.arange(raw_k.shape[1])[None].repeat(len(raw_k), 0), about["rope_theta"]
        )
        agree(k, data["k"], dtype, "k")
    lengths = np.sum(about["calls"], 0).tolist()
    for calls in (about["calls"], [lengths], one_by_one(lengths)):
        state = implementation.Filter(len(k), *k.shape[2:], config, np.dtype(dtype).type)
        feed = functools.partial(
            implementation.filter_chunk, state=state, ratio=data["ratio"], config=config
        )
        for stage, got in in_calls(calls, feed, k, v).items():
            if not (
                name == "alike" and stage == "w_k" and dtype == "float32"
            ):  # float32's variances are too rough for it
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
    for p, prune in enumerate(PRUNES) if name != "model" else [(0, 0.0)]:
        if name == "model":
            want = {"logits": dense}
        else:
            want = {part: x[p] for part, x in golden(name).items() if not part.endswith(".bias")}
        if "n" in want:
            agree(
                implementation.layer_ratios(config["schedule"], prune, SHAPE["n_layers"]),
                want["ratio"],
                dtype,
                "ratio",
            )
            want["read"] = want["n"].sum(-1)  # in all layers
        for calls in (
            CALLS,
            one_by_one(LENGTHS),
            one_by_one(LENGTHS[:1]),
        ):  # the last: a row alone, which is decode to its end
            rows = len(calls[0])
            model = implementation.Model(
                weights, shape, config | {"prune": prune}, rows, np.dtype(dtype).type
            )
            got = in_calls(calls, model.feed, tokens[:rows])
            for part in want.keys() & got.keys():
                agree(got[part], want[part][:rows], dtype, f"{part}, prune {prune}")


def check(implementation, name, dtype="float64"):
    if name == "ties":
        check_ties(implementation, dtype)
    else:
        (check_filter if name in INDEX["filter"] else check_model)(implementation, name, dtype)


if __name__ == "__main__":
    from golden import port

    for name in FILES:
        for dtype in ("float64", "float32"):
            check(port, name, dtype)
        print(f"{name}: as expected in float64 and float32")
