"""Whatever is wrong with a checkpoint folder: one clear line and exit code 2.

At once, in little memory, and nothing is written.
"""

import json
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
from pathlib import Path

import pytest
import torch

from load_weights import CheckpointError, load
from test_cli import refused
from test_load_weights import edit_json, edit_tensors, fails, save_model
from test_tokenizer import byte_level_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint with nothing wrong, its weights in one file."""
    return save_sound(tmp_path_factory.mktemp("whole"), "1GB")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint with nothing wrong, its weights in shards."""
    return save_sound(tmp_path_factory.mktemp("sharded"), "10KB")


def save_sound(folder, max_shard_size):
    save_model(
        folder,
        vocab_size=270,
        max_shard_size=max_shard_size,
        attention_bias=True,
        bos_token_id=260,
        eos_token_id=261,
    )
    byte_level_json().save(str(folder / TOKENIZER))
    load(folder, "cpu")
    return folder


@pytest.fixture(autouse=True)
def limits():
    """A second gigabyte of memory, or half a minute, is an error."""

    def too_long(*_):
        raise AssertionError("it hangs")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def content(folder):
    """Size and time of all files, to see that nothing is written."""
    stats = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


# -------------------------------------------------------------------------------------- damages

# Each of these returns a function that damages the folder it is given.


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name, share):
    """Cut a file off at a share of its length: 0 is within the header of the weights."""

    def damage(folder):
        path = folder / name
        length = int(path.stat().st_size * share)
        os.truncate(path, max(9, length))

    return damage


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def values(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def tensors(**changes):
    return lambda folder: edit_tensors(folder / WEIGHTS, **changes)


def read_header(folder):
    """The header of the weights, a dict, and the bytes behind it."""
    raw = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_weights(folder, header, data):
    """Write a header, JSON as bytes, and what is behind it."""
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


def header_length(change):
    """Have the file say another length of its header; change(length) gives it."""

    def damage(folder):
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", change(length)) + raw[8:])

    return damage


def norm_entry(**changes):
    """Change what the header says of the norm."""

    def damage(folder):
        header, data = read_header(folder)
        header[NORM] |= changes
        write_weights(folder, json.dumps(header).encode(), data)

    return damage


def offsets_backwards(folder):
    header, data = read_header(folder)
    header[NORM]["data_offsets"].reverse()
    write_weights(folder, json.dumps(header).encode(), data)


def two_in_one_place(folder):
    header, data = read_header(folder)
    header[NORM]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]
    write_weights(folder, json.dumps(header).encode(), data)


def a_list_as_header(folder):
    _, data = read_header(folder)
    write_weights(folder, b"[]", data)


def bytes_left_over(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")


def norm_twice(folder):
    """The norm a second time, in 96 bytes of its own at the end."""
    header, data = read_header(folder)
    again = header[NORM] | {"data_offsets": [len(data), len(data) + 96]}
    # A dict has no key twice, so the text is put together.
    text = json.dumps(header).removesuffix("}") + f', "{NORM}": {json.dumps(again)}}}'
    write_weights(folder, text.encode(), data + bytes(96))


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def swap_shards(folder):
    first, second, *_ = shards(folder)
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)


def half_a_shard(folder):
    cut(shards(folder)[1].name, 0.5)(folder)


def a_shard_twice(folder):
    first, second, *_ = shards(folder)
    shutil.copy(first, second)


def a_shard_is_a_pipe(folder):
    replaced(shards(folder)[0].name, os.mkfifo)(folder)


def pickled_weights(folder):
    (folder / WEIGHTS).rename(folder / "consolidated.00.pth")


def map_norm_to(file):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        edit_json(folder / INDEX, weight_map=index | {NORM: file})

    return damage


def loop(path):
    path.symlink_to(path.name)


def endless(path):
    path.symlink_to("/dev/zero")


def bad_disk(path):
    path.symlink_to("/proc/self/mem")  # whose first byte is an input/output error


ONES = torch.ones(24)
INFINITE = torch.full((24,), float("inf"))
NO_NUMBERS = torch.full((24,), float("nan"))
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}
INFINITE_THETA = {"rope_theta": float("inf")}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
NOT_JSON = "config.json: cannot be read as JSON"
NOT_SAFETENSORS = "model.safetensors: cannot be read as safetensors"
TOO_MANY_LINKS = "cannot be read (Too many levels of symbolic links)"

# Each table: {what: (damage, words of the message)}.
BAD_CONFIG = {
    "no config": (remove(CONFIG), "config.json: no such file"),
    "empty config": (write(CONFIG, b""), NOT_JSON),
    "half a config": (cut(CONFIG, 0.5), NOT_JSON),
    "config is a list": (write(CONFIG, b"[1]"), "config.json: the file is not a JSON object"),
    "config is nested deeply": (write(CONFIG, b'{"a":' * 200_000), NOT_JSON),
    "config is not UTF-8": (write(CONFIG, b'{"\xff": 1}'), NOT_JSON),
    "config is binary": (write(CONFIG, bytes(range(256)) * 9), NOT_JSON),
    "config is a number of 5000 digits": (write(CONFIG, b"9" * 5000), NOT_JSON),
    "config is a folder": (replaced(CONFIG, Path.mkdir), "config.json: is not a file"),
    "config is a loop": (replaced(CONFIG, loop), f"config.json: {TOO_MANY_LINKS}"),
    "config is a pipe": (replaced(CONFIG, os.mkfifo), "config.json: is not a file"),
    "config never ends": (replaced(CONFIG, endless), "config.json: is not a file"),
    "config on a bad disk": (
        replaced(CONFIG, bad_disk),
        "config.json: cannot be read (Input/output error)",
    ),
    "another family": (
        values(CONFIG, model_type="mixtral"),
        "model_type 'mixtral' is not supported",
    ),
    "no width": (values(CONFIG, hidden_size=...), "hidden_size is missing"),
    "negative width": (values(CONFIG, hidden_size=-24), "hidden_size is -24"),
    "no layers": (values(CONFIG, num_hidden_layers=0), "num_hidden_layers is 0"),
    "too many layers": (values(CONFIG, num_hidden_layers=10**8), "num_hidden_layers is 100000000"),
    "layers that are not there": (
        values(CONFIG, num_hidden_layers=4),
        "'model.layers.3.input_layernorm.weight' is missing",
    ),
    "layers left over": (values(CONFIG, num_hidden_layers=2), "'model.layers.2."),
    "half a head": (values(CONFIG, num_attention_heads=2.5), "num_attention_heads is 2.5"),
    "heads that do not divide": (
        values(CONFIG, num_attention_heads=5),
        "num_key_value_heads is 2, which does not divide",
    ),
    "absurd heads": (
        values(CONFIG, num_attention_heads=2**12, head_dim=2**12),
        "has the shape [40",
    ),
    "vocabulary as text": (values(CONFIG, vocab_size="270"), "vocab_size is '270'"),
    "vocabulary of a billion": (values(CONFIG, vocab_size=10**9), "vocab_size is 1000000000"),
    "eps is not a number": (values(CONFIG, rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "theta is infinite": (values(CONFIG, rope_parameters=INFINITE_THETA), "rope_theta is inf"),
    "longrope": (values(CONFIG, rope_parameters=LONGROPE), "rope type 'longrope'"),
    "quantised": (
        values(CONFIG, quantization_config={"quant_method": "awq"}),
        "quantization_config is set ('awq')",
    ),
    "biases not declared": (
        values(CONFIG, attention_bias=False),
        "_proj.bias' is not part of the model",
    ),
}
BAD_WEIGHTS = {
    "no weights": (remove(WEIGHTS), "model.safetensors: no such file"),
    "pickled weights": (pickled_weights, "pickles are not read"),
    "empty weights": (write(WEIGHTS, b""), NOT_SAFETENSORS),
    "a pointer to the weights": (write(WEIGHTS, LFS_POINTER), NOT_SAFETENSORS),
    "weights are a pipe": (replaced(WEIGHTS, os.mkfifo), "model.safetensors: is not a file"),
    "weights are a loop": (replaced(WEIGHTS, loop), f"model.safetensors: {TOO_MANY_LINKS}"),
    "weights never end": (replaced(WEIGHTS, endless), "model.safetensors: is not a file"),
    "weights cut in the length": (
        lambda folder: os.truncate(folder / WEIGHTS, 5),
        NOT_SAFETENSORS,
    ),
    "weights cut in the header": (cut(WEIGHTS, 0), NOT_SAFETENSORS),
    "weights cut in the middle": (cut(WEIGHTS, 0.5), NOT_SAFETENSORS),
    "weights cut at the end": (cut(WEIGHTS, 0.999), NOT_SAFETENSORS),
    "bytes left over": (bytes_left_over, NOT_SAFETENSORS),
    "header longer than the file": (header_length(lambda length: 2**63), NOT_SAFETENSORS),
    "header of 90 MB": (header_length(lambda length: 90_000_000), NOT_SAFETENSORS),
    "header a byte too long": (header_length(lambda length: length + 1), NOT_SAFETENSORS),
    "header a byte too short": (header_length(lambda length: length - 1), NOT_SAFETENSORS),
    "header of no bytes": (header_length(lambda length: 0), NOT_SAFETENSORS),
    "header is a list": (a_list_as_header, NOT_SAFETENSORS),
    "offsets beyond the file": (norm_entry(data_offsets=[0, 10**12]), NOT_SAFETENSORS),
    "offsets backwards": (offsets_backwards, NOT_SAFETENSORS),
    "two tensors in one place": (two_in_one_place, NOT_SAFETENSORS),
    "a tensor twice": (norm_twice, NOT_SAFETENSORS),
    "shape of no size": (norm_entry(shape=[0]), NOT_SAFETENSORS),
    "shape of negative size": (norm_entry(shape=[-24]), NOT_SAFETENSORS),
    "shape that overflows": (norm_entry(shape=[2**62, 2**62]), NOT_SAFETENSORS),
    "a dtype nobody knows": (norm_entry(dtype="F99"), NOT_SAFETENSORS),
    "empty tensor": (tensors(model__norm__weight=torch.zeros(0)), f"'{NORM}' has the shape [0]"),
    "whole numbers": (
        tensors(model__norm__weight=ONES.to(torch.int32)),
        f"'{NORM}' has the dtype I32",
    ),
    "8 bits": (
        tensors(model__norm__weight=ONES.to(torch.float8_e4m3fn)),
        f"'{NORM}' has the dtype F8_E4M3",
    ),
    "no norm": (tensors(model__norm__weight=None), f"'{NORM}' is missing"),
    "one tensor more": (
        tensors(model__norm__scale=ONES),
        "'model.norm.scale' is not part of the model",
    ),
    "the wrong way round": (
        tensors(model__embed_tokens__weight=torch.ones(24, 270)),
        "has the shape [24, 270]",
    ),
    "infinite weights": (
        tensors(model__norm__weight=INFINITE),
        f"'{NORM}' has values that are not finite",
    ),
    "weights that are no numbers": (
        tensors(model__layers__1__self_attn__o_proj__bias=NO_NUMBERS),
        "has values that are not finite",
    ),
}
BAD_TOKENIZER = {
    "no tokenizer": (remove(TOKENIZER), "has no tokenizer.json and no tokenizer.model"),
    "half a tokenizer": (cut(TOKENIZER, 0.5), "tokenizer.json: cannot be read as JSON"),
    "tokenizer is no tokenizer": (
        write(TOKENIZER, b'{"model": {"type": "BPE"}}'),
        "cannot be read as a tokenizer",
    ),
    "tokenizer is a loop": (replaced(TOKENIZER, loop), f"tokenizer.json: {TOO_MANY_LINKS}"),
    "tokenizer is a pipe": (replaced(TOKENIZER, os.mkfifo), "tokenizer.json: is not a file"),
    "tokenizer of a larger model": (
        values(CONFIG, vocab_size=200, eos_token_id=None),
        "tokens, more than config.json's vocab_size, 200",
    ),
    "no such end of text": (
        values("generation_config.json", eos_token_id=10**6),
        "eos_token_id is 1000000",
    ),
    "no such special token": (
        values("tokenizer_config.json", bos_token="<nope>"),
        "'<nope>' is not in the vocabulary",
    ),
}
BAD_SHARDS = {
    "no shard": (
        remove("model-00003-of-00011.safetensors"),
        "model-00003-of-00011.safetensors: no such file",
    ),
    "shards swapped": (swap_shards, "unlike model.safetensors.index.json says"),
    "half a shard": (half_a_shard, "model-00002-of-00011.safetensors: cannot be"),
    "a shard two times": (a_shard_twice, "unlike model.safetensors.index"),
    "a shard is a pipe": (a_shard_is_a_pipe, "is not a file"),
    "a shard nobody has": (
        map_norm_to("model-00009-of-00009.safetensors"),
        "model-00009-of-00009.safetensors: no such file",
    ),
    "a shard above": (
        map_norm_to("../sharded/model-00001-of-00011.safetensors"),
        f"'{NORM}' is put in '../sharded",
    ),
    "a shard at the root": (
        map_norm_to("/etc/passwd"),
        f"'{NORM}' is put in '/etc/passwd', not a safetensors file here",
    ),
    "a shard that is a number": (map_norm_to(1), f"'{NORM}' is put in 1"),
    "index is a list": (write(INDEX, b"[]"), "index.json: the file is not a JSON object"),
    "index maps nothing": (
        values(INDEX, weight_map={}),
        "index.json: the tensor 'model.embed_tokens.weight' is missing",
    ),
    "index without map": (values(INDEX, weight_map=...), "index.json: weight_map is missing"),
    "index is a loop": (replaced(INDEX, loop), f"index.json: {TOO_MANY_LINKS}"),
}
BAD_IN_ONE_FILE = BAD_CONFIG | BAD_WEIGHTS | BAD_TOKENIZER

# ---------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("what", BAD_IN_ONE_FILE)
def test_malformed(whole, what, tmp_path, capsys):
    damage, words = BAD_IN_ONE_FILE[what]
    check_refused(whole, damage, words, tmp_path / "bad", capsys)


@pytest.mark.parametrize("what", BAD_SHARDS)
def test_malformed_in_shards(sharded, what, tmp_path, capsys):
    damage, words = BAD_SHARDS[what]
    check_refused(sharded, damage, words, tmp_path / "bad", capsys)


def check_refused(sound, damage, words, folder, capsys):
    shutil.copytree(sound, folder)
    damage(folder)
    before = content(folder)
    error = refused(capsys, folder, "--prompt", "hello", "--device", "cpu", "--max-new-tokens", "1")
    assert error.startswith(f"error: {folder}")
    assert words in error
    assert len(error) < 600
    assert content(folder) == before


def test_control_characters_do_not_reach_the_terminal(whole, tmp_path, capsys):
    """In a folder's name, a key, a template's complaint: shown as escapes, in one line."""
    folder = shutil.copytree(whole, tmp_path / "a\x1b[31m\x07b")
    template = "{{ raise_exception('\x1b]0;title\x07\u202e\nno') }}"
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    flags = ["--prompt", "hello", "--chat", "--device", "cpu", "--max-new-tokens", "8"]
    error = refused(capsys, folder, *flags)
    assert error.strip().isprintable()
    assert r"a\x1b[31m\x07b" in error
    assert r"\x1b]0;title\x07\u202e no" in error
    assert refused(capsys, "--\x1b[2J").strip().isprintable()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_no_permission(whole, name):
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(whole, Path(temporary), dirs_exist_ok=True)
        folder.chmod(0o755)
        (folder / name).chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            message = fails(load, folder, "cpu")
        finally:
            os.seteuid(user)
    assert message.startswith(f"{folder / name}: cannot be read")
    assert "Permission denied" in message


def survives(folder):
    """Whether the folder loads; if not, the reason must be one line."""
    try:
        load(folder, "cpu")
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message
        assert message.startswith(str(folder))
        return False
    return True


NUMBERS = [0, 1, -1, 7, 2**31, 2**64, 0.5, 1e308, float("nan")]
NONSENSE: list = [None, True, *NUMBERS, "", "x", "llama", [], [1], [[]], {}, {"a": 1}]


def test_any_value_in_config_json(whole, tmp_path):
    rng = random.Random(0)
    folder = shutil.copytree(whole, tmp_path / "fuzz")
    original = json.loads((folder / CONFIG).read_text())
    loaded = 0
    for _ in range(150):
        changed = dict(original)
        for _ in range(rng.randrange(1, 3)):
            changed[rng.choice(list(original))] = rng.choice(NONSENSE)
        (folder / CONFIG).write_text(json.dumps(changed))
        loaded += survives(folder)
    for _ in range(50):
        raw = bytearray(json.dumps(original).encode())
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (folder / CONFIG).write_bytes(raw)
        loaded += survives(folder)
    assert 20 < loaded < 150  # settings of training and the like may say what they want


def test_any_bytes_in_the_header(whole, tmp_path):
    rng = random.Random(0)
    folder = shutil.copytree(whole, tmp_path / "fuzz")
    original = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", original[:8])
    end = 8 + length
    loaded = 0
    for _ in range(200):
        raw = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            # One time in three in the length, otherwise behind it.
            place = rng.choice([rng.randrange(8), rng.randrange(8, end), rng.randrange(8, end)])
            raw[place] = rng.choice([*b'09{}[]",:-', 255])
        if rng.random() < 0.2:
            del raw[rng.randrange(len(raw)) :]
        (folder / WEIGHTS).write_bytes(raw)
        loaded += survives(folder)
    assert loaded < 20
