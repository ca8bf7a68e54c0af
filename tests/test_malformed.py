"""Whatever is wrong with a checkpoint folder: one clear line, exit code 2, at once, in little memory, nothing written."""

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
from test_generate import refused
from test_load_weights import edit_json, edit_tensors, fails, save_model
from test_tokenizer import byte_level_json


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint with nothing wrong: in one file, and in shards."""
    folders = []
    for name, size in (("whole", "1GB"), ("sharded", "10KB")):
        folders.append(tmp_path_factory.mktemp(name))
        save_model(folders[-1], vocab_size=270, max_shard_size=size, attention_bias=True, bos_token_id=260, eos_token_id=261)
        byte_level_json().save(str(folders[-1] / "tokenizer.json"))
        load(folders[-1], "cpu")
    return folders


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
    return {path.name: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.iterdir()}


CONFIG, WEIGHTS, TOKENIZER, INDEX = "config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"
NORM = "model.norm.weight"


# each of these returns a function that damages the folder it is given


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def cut(name, share):
    """Cut the file off in its header (0), near its middle (0.5), or where the share says."""
    return lambda folder: os.truncate(folder / name, max(9, int((folder / name).stat().st_size * share)))


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def values(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def tensors(**changes):
    return lambda folder: edit_tensors(folder / WEIGHTS, **changes)


def header(change, data=lambda data: data):
    """Apply `change` to the header of the safetensors file, a dict, which it edits or returns as text; likewise `data`."""

    def damage(folder):
        raw = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        old = json.loads(raw[8 : 8 + size])
        text = (change(old) or json.dumps(old)).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data(raw[8 + size :]))

    return damage


def header_length(change):
    def damage(folder):
        raw = (folder / WEIGHTS).read_bytes()
        length = change(struct.unpack("<Q", raw[:8])[0])
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + raw[8:])

    return damage


def twice(old):
    """The norm a second time, in 96 bytes of its own at the end."""
    end = max(entry["data_offsets"][1] for name, entry in old.items() if name != "__metadata__")
    return json.dumps(old)[:-1] + f', "{NORM}": {json.dumps(old[NORM] | {"data_offsets": [end, end + 96]})}' + "}"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def swap_shards(folder):
    a, b = shards(folder)[:2]
    a.rename(folder / "other")
    b.rename(a)
    (folder / "other").rename(b)


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


inf, nan = torch.full((24,), float("inf")), torch.full((24,), float("nan"))
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}

WHOLE = {  # damage, and words of the message
    "no config": (lambda folder: (folder / CONFIG).unlink(), "config.json: no such file"),
    "empty config": (write(CONFIG, ""), "config.json: cannot be read as JSON"),
    "half a config": (cut(CONFIG, 0.5), "config.json: cannot be read as JSON"),
    "config is a list": (write(CONFIG, "[1]"), "config.json: the file is not a JSON object"),
    "config is nested deeply": (write(CONFIG, '{"a":' * 200_000), "config.json: cannot be read as JSON"),
    "config is not UTF-8": (write(CONFIG, b'{"\xff": 1}'), "config.json: cannot be read as JSON"),
    "config is binary": (write(CONFIG, bytes(range(256)) * 9), "config.json: cannot be read as JSON"),
    "config is a number of 5000 digits": (write(CONFIG, "9" * 5000), "config.json: cannot be read as JSON"),
    "config is a folder": (replaced(CONFIG, Path.mkdir), "config.json: is not a file"),
    "config is a loop": (replaced(CONFIG, loop), "config.json: cannot be read (Too many levels of symbolic links)"),
    "config is a pipe": (replaced(CONFIG, os.mkfifo), "config.json: is not a file"),
    "config never ends": (replaced(CONFIG, endless), "config.json: is not a file"),
    "config on a bad disk": (replaced(CONFIG, bad_disk), "config.json: cannot be read (Input/output error)"),
    "another family": (values(CONFIG, model_type="mixtral"), "model_type 'mixtral' is not supported"),
    "no width": (values(CONFIG, hidden_size=...), "hidden_size is missing"),
    "negative width": (values(CONFIG, hidden_size=-24), "hidden_size is -24"),
    "no layers": (values(CONFIG, num_hidden_layers=0), "num_hidden_layers is 0"),
    "too many layers": (values(CONFIG, num_hidden_layers=10**8), "num_hidden_layers is 100000000"),
    "layers that are not there": (values(CONFIG, num_hidden_layers=4), "'model.layers.3.input_layernorm.weight' is missing"),
    "layers left over": (values(CONFIG, num_hidden_layers=2), "'model.layers.2."),
    "half a head": (values(CONFIG, num_attention_heads=2.5), "num_attention_heads is 2.5"),
    "heads that do not divide": (values(CONFIG, num_attention_heads=5), "num_key_value_heads is 2, which does not divide"),
    "absurd heads": (values(CONFIG, num_attention_heads=2**12, head_dim=2**12), "has the shape [40"),
    "vocabulary as text": (values(CONFIG, vocab_size="270"), "vocab_size is '270'"),
    "vocabulary of a billion": (values(CONFIG, vocab_size=10**9), "vocab_size is 1000000000"),
    "eps is not a number": (values(CONFIG, rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    "theta is infinite": (values(CONFIG, rope_parameters={"rope_theta": float("inf")}), "rope_theta is inf"),
    "longrope": (values(CONFIG, rope_parameters=LONGROPE), "rope type 'longrope'"),
    "quantised": (values(CONFIG, quantization_config={"quant_method": "awq"}), "quantization_config is set ('awq')"),
    "biases not declared": (values(CONFIG, attention_bias=False), "_proj.bias' is not part of the model"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors: no such file"),
    "pickled weights": (lambda folder: (folder / WEIGHTS).rename(folder / "consolidated.00.pth"), "pickles are not read"),
    "empty weights": (write(WEIGHTS, b""), "model.safetensors: cannot be read as safetensors"),
    "a pointer to the weights": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "cannot be read as safetensors"),
    "weights are a pipe": (replaced(WEIGHTS, os.mkfifo), "model.safetensors: is not a file"),
    "weights are a loop": (replaced(WEIGHTS, loop), "model.safetensors: cannot be read (Too many levels"),
    "weights never end": (replaced(WEIGHTS, endless), "model.safetensors: is not a file"),
    "weights cut in the length": (lambda folder: os.truncate(folder / WEIGHTS, 5), "cannot be read as safetensors"),
    "weights cut in the header": (cut(WEIGHTS, 0), "cannot be read as safetensors"),
    "weights cut in the middle": (cut(WEIGHTS, 0.5), "cannot be read as safetensors"),
    "weights cut at the end": (cut(WEIGHTS, 0.999), "cannot be read as safetensors"),
    "bytes left over": (header(lambda old: None, lambda data: data + b"more"), "cannot be read as safetensors"),
    "header longer than the file": (header_length(lambda n: 2**63), "cannot be read as safetensors"),
    "header of 90 MB": (header_length(lambda n: 90_000_000), "cannot be read as safetensors"),
    "header a byte too long": (header_length(lambda n: n + 1), "cannot be read as safetensors"),
    "header a byte too short": (header_length(lambda n: n - 1), "cannot be read as safetensors"),
    "header of no bytes": (header_length(lambda n: 0), "cannot be read as safetensors"),
    "header is a list": (header(lambda old: "[]"), "cannot be read as safetensors"),
    "offsets beyond the file": (header(lambda old: old[NORM].update(data_offsets=[0, 10**12])), "cannot be read as safetensors"),
    "offsets backwards": (header(lambda old: old[NORM]["data_offsets"].reverse()), "cannot be read as safetensors"),
    "two tensors in one place": (
        header(lambda old: old[NORM].update(data_offsets=old["model.layers.0.input_layernorm.weight"]["data_offsets"])),
        "cannot be read as safetensors",
    ),
    "a tensor twice": (header(twice, lambda data: data + bytes(96)), "cannot be read as safetensors"),
    "shape of no size": (header(lambda old: old[NORM].update(shape=[0])), "cannot be read as safetensors"),
    "shape of negative size": (header(lambda old: old[NORM].update(shape=[-24])), "cannot be read as safetensors"),
    "shape that overflows": (header(lambda old: old[NORM].update(shape=[2**62, 2**62])), "cannot be read as safetensors"),
    "a dtype nobody knows": (header(lambda old: old[NORM].update(dtype="F99")), "cannot be read as safetensors"),
    "empty tensor": (tensors(model__norm__weight=torch.zeros(0)), f"'{NORM}' has the shape [0]"),
    "whole numbers": (tensors(model__norm__weight=torch.ones(24, dtype=torch.int32)), f"'{NORM}' has the dtype I32"),
    "8 bits": (tensors(model__norm__weight=torch.ones(24).to(torch.float8_e4m3fn)), f"'{NORM}' has the dtype F8_E4M3"),
    "no norm": (tensors(model__norm__weight=None), f"'{NORM}' is missing"),
    "one tensor more": (tensors(model__norm__scale=torch.ones(24)), "'model.norm.scale' is not part of the model"),
    "the wrong way round": (tensors(model__embed_tokens__weight=torch.ones(24, 270)), "has the shape [24, 270]"),
    "infinite weights": (tensors(model__norm__weight=inf), f"'{NORM}' has values that are not finite"),
    "weights that are no numbers": (tensors(model__layers__1__self_attn__o_proj__bias=nan), "has values that are not finite"),
    "no tokenizer": (lambda folder: (folder / TOKENIZER).unlink(), "has no tokenizer.json and no tokenizer.model"),
    "half a tokenizer": (cut(TOKENIZER, 0.5), "tokenizer.json: cannot be read as JSON"),
    "tokenizer is no tokenizer": (write(TOKENIZER, '{"model": {"type": "BPE"}}'), "cannot be read as a tokenizer"),
    "tokenizer is a loop": (replaced(TOKENIZER, loop), "tokenizer.json: cannot be read (Too many levels"),
    "tokenizer is a pipe": (replaced(TOKENIZER, os.mkfifo), "tokenizer.json: is not a file"),
    "tokenizer of a larger model": (values(CONFIG, vocab_size=200, eos_token_id=None), "tokens, more than config.json's vocab_size, 200"),
    "no such end of text": (values("generation_config.json", eos_token_id=10**6), "eos_token_id is 1000000"),
    "no such special token": (values("tokenizer_config.json", bos_token="<nope>"), "'<nope>' is not in the vocabulary"),
}
SHARDED = {
    "no shard": (lambda folder: shards(folder)[2].unlink(), "model-00003-of-00011.safetensors: no such file"),
    "shards swapped": (swap_shards, "unlike model.safetensors.index.json says"),
    "half a shard": (lambda folder: cut(shards(folder)[1].name, 0.5)(folder), "model-00002-of-00011.safetensors: cannot be"),
    "a shard two times": (lambda folder: shutil.copy(shards(folder)[0], shards(folder)[1]), "unlike model.safetensors.index"),
    "a shard is a pipe": (lambda folder: replaced(shards(folder)[0].name, os.mkfifo)(folder), "is not a file"),
    "a shard nobody has": (map_norm_to("model-00009-of-00009.safetensors"), "model-00009-of-00009.safetensors: no such file"),
    "a shard above": (map_norm_to("../sharded/model-00001-of-00011.safetensors"), f"'{NORM}' is put in '../sharded"),
    "a shard at the root": (map_norm_to("/etc/passwd"), f"'{NORM}' is put in '/etc/passwd', not a safetensors file here"),
    "a shard that is a number": (map_norm_to(1), f"'{NORM}' is put in 1"),
    "index is a list": (write(INDEX, "[]"), "index.json: the file is not a JSON object"),
    "index maps nothing": (values(INDEX, weight_map={}), "index.json: the tensor 'model.embed_tokens.weight' is missing"),
    "index without map": (values(INDEX, weight_map=...), "index.json: weight_map is missing"),
    "index is a loop": (replaced(INDEX, loop), "index.json: cannot be read (Too many levels of symbolic links)"),
}


@pytest.mark.parametrize("what", [*WHOLE, *SHARDED])
def test_malformed(sound, what, tmp_path, capsys):
    folder = shutil.copytree(sound[what in SHARDED], tmp_path / "bad")
    damage, words = (WHOLE | SHARDED)[what]
    damage(folder)
    before = content(folder)
    error = refused(capsys, folder, "--prompt", "hello", "--device", "cpu", "--max-new-tokens", "1")
    assert error.startswith(f"error: {folder}") and words in error and len(error) < 600, error
    assert content(folder) == before


def test_control_characters_do_not_reach_the_terminal(sound, tmp_path, capsys):
    """In a folder's name, a key, a template's complaint: shown as escapes, in one line."""
    folder = shutil.copytree(sound[0], tmp_path / "a\x1b[31m\x07b")
    template = "{{ raise_exception('\x1b]0;title\x07\u202e\nno') }}"
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    error = refused(capsys, folder, "--prompt", "hello", "--chat", "--device", "cpu", "--max-new-tokens", "8")
    assert error.strip().isprintable() and r"a\x1b[31m\x07b" in error and r"\x1b]0;title\x07\u202e no" in error
    assert refused(capsys, "--\x1b[2J").strip().isprintable()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, TOKENIZER])
def test_no_permission(sound, name):
    with tempfile.TemporaryDirectory() as folder:
        folder = shutil.copytree(sound[0], Path(folder), dirs_exist_ok=True)
        folder.chmod(0o755)
        (folder / name).chmod(0)
        user = os.geteuid()
        try:
            if user == 0:  # root may read everything
                os.seteuid(65534)
            message = fails(load, folder, "cpu")
        finally:
            os.seteuid(user)
    assert message.startswith(f"{folder / name}: cannot be read") and "Permission denied" in message


def survives(folder):
    """Whether the folder loads; if not, the reason must be one line."""
    try:
        load(folder, "cpu")
    except CheckpointError as error:
        assert "\n" not in str(error) and str(error).startswith(str(folder))
        return False
    return True


def test_any_value_in_config_json(sound, tmp_path):
    rng, folder = random.Random(0), shutil.copytree(sound[0], tmp_path / "fuzz")
    original = json.loads((folder / CONFIG).read_text())
    nonsense = [None, True, 0, 1, -1, 7, 2**31, 2**64, 0.5, 1e308, float("nan"), "", "x", [], [1], {}, {"a": 1}, [[]], "llama"]
    loaded = 0
    for _ in range(150):
        changed = original | {rng.choice(list(original)): rng.choice(nonsense) for _ in range(rng.randrange(1, 3))}
        (folder / CONFIG).write_text(json.dumps(changed))
        loaded += survives(folder)
    for _ in range(50):
        raw = bytearray(json.dumps(original).encode())
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        (folder / CONFIG).write_bytes(raw)
        loaded += survives(folder)
    assert 20 < loaded < 150  # settings of training and the like may say what they want


def test_any_bytes_in_the_header(sound, tmp_path):
    rng, folder = random.Random(0), shutil.copytree(sound[0], tmp_path / "fuzz")
    original = (folder / WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", original[:8])[0]
    loaded = 0
    for _ in range(200):
        raw = bytearray(original)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.choice([rng.randrange(8), rng.randrange(8, end), rng.randrange(8, end)])] = rng.choice([*b'09{}[]",:-', 255])
        if rng.random() < 0.2:
            del raw[rng.randrange(len(raw)) :]
        (folder / WEIGHTS).write_bytes(raw)
        loaded += survives(folder)
    assert loaded < 20
