"""The pass key is where it is said to be, and found is what was answered."""

import json
import re

import pytest

from evaluation import passkey as passkey_module
from evaluation.passkey import ANSWER, main, passkey, passkey_prompt
from filter_config import PRESETS, preset
from load_weights import Tokenizer, load
from test_generate import refused


@pytest.mark.parametrize("depth", [0, 0.25, 1])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("length, tolerance", [(200, 0.35), (1000, 0.15)])
def test_prompts_fit_and_have_the_key_at_its_depth(demo, length, tolerance, chat, depth):
    tokenizer = Tokenizer(demo)
    prompt = passkey_prompt(tokenizer, "12345", length, depth, chat)
    # A sentence has up to 15 tokens, and another would not fit.
    assert length - ANSWER - 15 < len(prompt) <= length - ANSWER
    text = tokenizer.decode(prompt)
    assert text.count("12345") == 2
    filler = text[text.index("The ") :]
    assert abs(filler.index("12345") / len(filler) - depth) < tolerance


def test_a_length_without_room_for_a_sentence_is_refused(demo):
    with pytest.raises(ValueError, match="more tokens than 40"):
        passkey_prompt(Tokenizer(demo), "12345", 40, 0)


def test_keys_that_are_reproduced_are_counted(checkpoint, monkeypatch):
    model, tokenizer = load(checkpoint, "cpu")
    generate = passkey_module.generate
    keys_of_trials = []

    def oracle(model, prompts, *settings, **more):
        """Says the first row's key always, the second's every other time, the third's never."""
        for _ in generate(model, prompts, *settings, **more):
            pass
        keys = [re.search(r"\d{5}", tokenizer.decode(prompt))[0] for prompt in prompts]
        keys_of_trials.append(keys)
        in_odd_trials = keys[1] if len(keys_of_trials) % 2 == 1 else "12"
        for row, key in enumerate([keys[0], in_odd_trials, "99999"]):
            for token in tokenizer.encode(f" {key}. So", bos=False):
                yield row, token

    monkeypatch.setattr(passkey_module, "generate", oracle)
    figures = passkey(model, tokenizer, 190, [0, 0.5, 1], 4, preset("cache", prune=0.5))
    found = [figures[column] for column in ("depth 0", "depth 0.5", "depth 1", "found")]
    assert found == [1, 0.5, 0, 0.5]
    assert 0.4 < figures["skipped"] < 0.55
    assert 0.55 < figures["KV held"] < 0.7
    assert figures["KV held"] < figures["KV read"] < 0.85  # early tokens see most of those before

    filtered = list(keys_of_trials)
    assert len({key for keys in filtered for key in keys}) == 12
    passkey(model, tokenizer, 190, [0, 0.5, 1], 4, None)
    assert keys_of_trials[4:] == filtered  # the same keys for every setting


def test_the_demo_model_finds_a_pass_key(demo):
    model, tokenizer = load(demo, "cpu", "float32")
    assert passkey(model, tokenizer, 160, [0, 1], 1, None)["found"] == 1
    assert passkey(model, tokenizer, 160, [0, 1], 1, preset("paper", prune=0.9))["found"] == 0


def test_the_command_prints_a_row_for_each_setting_and_length(checkpoint, capsys, tmp_path):
    out = tmp_path / "passkey.json"
    picture = tmp_path / "passkey.png"
    flags = ["--device", "cpu", "--lengths", "180", "200", "--depths", "0", "0.5"]
    main([str(checkpoint), *flags, "--json", str(out), "--plot", str(picture)])

    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    head, *rows = [re.split(r" {2,}", line.strip()) for line in lines]
    shares = ["skipped", "KV held", "KV read"]
    assert head == ["setting", "prune", "length", "depth 0", "depth 0.5", "found", *shares]
    settings = [("dense", "0.000"), *((name, "0.300") for name in PRESETS)]
    expected = [[name, prune, length] for name, prune in settings for length in ("180", "200")]
    assert [row[:3] for row in rows] == expected
    assert len(json.loads(out.read_text())["rows"]) == len(rows)
    assert picture.read_bytes()[1:4] == b"PNG"


def test_the_picture_has_a_panel_for_each_setting():
    """Dense is in the first column, and what is not measured yet has no number."""

    def row(setting, prune, length, found):
        return {"setting": setting, "prune": prune, "length": length, "depth 0": found}

    rows = [row("dense", 0.0, 180, 1.0), row("dense", 0.0, 200, 0.5), row("cache", 0.5, 180, 0.25)]
    rows += [row("cache", 0.7, 180, 0.0)]
    panels = passkey_module.draw(rows).axes
    shown = {
        panel.get_title(): [text.get_text() for text in panel.texts]
        for panel in panels
        if panel.get_visible() and panel.get_title()
    }
    expected = {"dense": ["100%", "50%"], "cache, prune 0.5": ["25%"], "cache, prune 0.7": ["0%"]}
    assert shown == expected


BAD_FLAGS = {
    "more than the context": (["--lengths", "201"], "context of 200"),
    "no room for a sentence": (["--lengths", "20"], "more tokens than 20"),
    "beyond the end": (["--depths", "1.5"], "--depths"),
    "no trial": (["--trials", "0"], "--trials"),
    "more than all": (["--prune", "2"], "--prune: 2"),
    "no picture": (["--plot", "x.jpeg2"], ".png, .svg, .pdf"),
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_end_in_one_line(checkpoint, capsys, flags, message):
    assert message in refused(capsys, checkpoint, "--device", "cpu", *flags, command=main)
