"""The pass key is where it is said to be, and found is what was answered."""

import json
import re

import pytest

from evaluation import passkey as eval_passkey
from evaluation.passkey import ANSWER, main, passkey, passkey_prompt
from load_weights import Tokenizer, load
from test_generate import refused
from filter_config import PRESETS, preset


def test_passkey_prompts_fit_and_have_the_key_at_its_depth(demo):
    tokenizer = Tokenizer(demo)
    for length in (200, 1000):
        for chat in (False, True):
            for depth in (0, 0.25, 1):
                prompt = passkey_prompt(tokenizer, "12345", length, depth, chat)
                assert length - ANSWER - 15 < len(prompt) <= length - ANSWER  # less than a sentence short
                text = tokenizer.decode(prompt)
                filler = text[text.index("The ") :]
                assert text.count("12345") == 2
                needle = filler.index("12345") / len(filler)
                assert abs(needle - depth) < (0.35 if length == 200 else 0.15)
    with pytest.raises(ValueError, match="more tokens than 40"):
        passkey_prompt(tokenizer, "12345", 40, 0)


def test_passkey_counts_the_keys_that_are_reproduced(checkpoint, monkeypatch):
    model, tokenizer = load(checkpoint, "cpu")
    real, seen = eval_passkey.generate, []

    def oracle(model, prompts, new, *rest, **more):
        """Says the key of the first row always, of the second in every other trial, of the third never."""
        for _ in real(model, prompts, new, *rest, **more):
            pass
        keys = [re.search(r"\d{5}", tokenizer.decode(prompt))[0] for prompt in prompts]
        seen.append(keys)
        for row, key in enumerate([keys[0], keys[1] if len(seen) % 2 else "12", "99999"]):
            yield from ((row, token) for token in tokenizer.encode(f" {key}. So", bos=False))

    monkeypatch.setattr(eval_passkey, "generate", oracle)
    figures = passkey(model, tokenizer, 190, [0, 0.5, 1], 4, preset("cache", prune=0.5))
    assert figures["depth 0"] == 1 and figures["depth 0.5"] == 0.5 and figures["depth 1"] == 0 and figures["found"] == 0.5
    assert 0.4 < figures["skipped"] < 0.55 < figures["KV held"] < 0.7 < figures["KV read"] < 0.85  # early tokens see most of them
    assert len({key for keys in seen for key in keys}) == 12
    first = list(seen)
    passkey(model, tokenizer, 190, [0, 0.5, 1], 4, None)
    assert seen[4:] == first  # the same keys for every setting


def test_the_demo_model_finds_a_pass_key(demo):
    model, tokenizer = load(demo, "cpu", "float32")
    assert passkey(model, tokenizer, 160, [0, 1], 1, None)["found"] == 1
    assert passkey(model, tokenizer, 160, [0, 1], 1, preset("paper", prune=0.9))["found"] == 0


def test_passkey_command(checkpoint, capsys, tmp_path):
    out, picture = tmp_path / "passkey.json", tmp_path / "passkey.png"
    flags = ["--device", "cpu", "--lengths", "180", "200", "--depths", "0", "0.5", "--json", out, "--plot", picture]
    main([str(checkpoint), *map(str, flags)])
    head, *rows = (re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.split("\n\n")[1].splitlines())
    assert head == ["setting", "prune", "length", "depth 0", "depth 0.5", "found", "skipped", "KV held", "KV read"]
    assert [row[:3] for row in rows] == [
        [name, prune, length]
        for name, prune in [("dense", "0.000"), *((name, "0.300") for name in PRESETS)]
        for length in ("180", "200")
    ]
    assert len(json.loads(out.read_text())["rows"]) == len(rows) and picture.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("flags, message", [
    (["--lengths", "201"], "context of 200"), (["--lengths", "20"], "more tokens than 20"), (["--depths", "1.5"], "--depths"),
    (["--trials", "0"], "--trials"), (["--prune", "2"], "--prune: 2"), (["--plot", "x.jpeg2"], ".png, .svg, .pdf"),
])  # fmt: skip
def test_bad_input(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, "--device", "cpu", *flags, command=main)
