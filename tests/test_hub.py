"""A checkpoint by its name on the hub: downloaded once, then read without a network; what goes wrong is one line."""

import json
import os
import shutil
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from loading.checkpoint_files import CheckpointError, checkpoint_folder, folder_weights

HERE = Path(__file__).resolve().parent.parent
COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    """Answers as the hub does, for org/small, org/pickles, org/gated; its `asked` lists the paths that were asked for."""
    folder = tmp_path_factory.mktemp("hub") / "small"
    shutil.copytree(checkpoint, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    for name in ("consolidated.safetensors", "model.fp16-00001-of-00001.safetensors"):
        (folder / name).write_bytes(b"the same weights again")
    for name in ("params.json", "tokenizer.model"):
        (folder / name).write_text("what config.json and tokenizer.json say, in another form")
    (folder / "README.md").write_text("not for us")
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status=200, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            asked.append(self.path)
            api, _, rest = self.path.partition("/api/models/")
            if not api and rest:
                rest, _, tree = rest.partition("/tree/")
                name, _, revision = rest.partition("/revision/")
                if name not in ("org/small", "org/pickles", "org/gated"):
                    return self.answer(404, X_Error_Code="RepoNotFound")
                if revision not in ("", "main", COMMIT):
                    return self.answer(404, X_Error_Code="RevisionNotFound")
                files = ["config.json", "pytorch_model.bin"] if name == "org/pickles" else sorted(os.listdir(folder))
                about: object = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                if tree:
                    about = [{"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": file} for file in files]
                return self.answer(body=json.dumps(about).encode(), Content_Type="application/json")
            if self.path.startswith("/org/gated/"):
                return self.answer(403, X_Error_Code="GatedRepo")
            file = folder / self.path.rpartition("/")[2]
            if "/resolve/" not in self.path or not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            body = file.read_bytes()
            return self.answer(body=body, ETag=f'"{sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(server_port=server.server_port, asked=asked)
    server.shutdown()


def run(hub, home, name, **more):
    """generate.py in a process of its own, because the hub's settings are read when it is imported."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {"HF_HOME": str(home), **more}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    command = [sys.executable, HERE / "generate.py", name, "--prompt", "the", "--max-new-tokens", "3", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return done.returncode, done.stdout, done.stderr.replace("\r", "\n").splitlines()[-1]


def test_a_name_on_the_hub_then_without_a_network(hub, checkpoint, tmp_path):
    wanted = run(hub, tmp_path, checkpoint)[:2]
    assert wanted[0] == 0 and run(hub, tmp_path, "org/small")[:2] == wanted
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {path.name for path in checkpoint.iterdir()}  # no pickle, no second copy of the weights, no README
    snapshot = tmp_path / "hub/models--org--small/snapshots" / COMMIT
    assert (snapshot / "config.json").is_symlink()
    asked = len(hub.asked)
    assert run(hub, tmp_path, "org/small", HF_HUB_OFFLINE="1")[:2] == wanted
    assert len(hub.asked) == asked
    gone = SimpleNamespace(server_port=1)  # nobody listens there
    assert run(gone, tmp_path, "org/small")[:2] == run(gone, tmp_path, f"org/small@{COMMIT}")[:2] == wanted
    assert run(gone, tmp_path, snapshot)[:2] == wanted


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("org/none", {}, "is not there either"),
        ("org/small@v9", {}, "has no revision 'v9'"),
        ("org/gated", {}, "is gated: ask for access"),
        ("org/pickles", {}, "has no safetensors weights"),
        ("org/small", {"HF_HUB_OFFLINE": "1"}, "is not in the cache"),
        ("org/small", {"port": 1}, "does not answer"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_one_line(hub, tmp_path, name, more, words):
    server = SimpleNamespace(server_port=more.pop("port", hub.server_port))
    code, out, line = run(server, tmp_path, name, **more)
    assert (code, out) == (2, "") and line.startswith(f"error: {name} (no such folder; taken as a model") and words in line


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository on a hub without a server: its folder, and the one that files are fetched to."""
    import huggingface_hub

    there, here = tmp_path / "there", tmp_path / "here"

    def fetch(name):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(there / name, here / name))

    def model_info(self, repo_id, revision=None):
        files = [path.relative_to(there) for path in there.rglob("*") if path.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=str(file)) for file in files])

    def snapshot_download(repo_id, revision=None, allow_patterns=()):
        for name in allow_patterns:
            fetch(name)
        return str(here)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, filename, revision=None: fetch(filename))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return there, here


def write_files(folder, *names, **indices):
    """Files without content, and an index for each of `indices`: {the name of the only file: its shards}."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, shards in indices.items():
        write_files(folder, *shards)
        weight_map = {f"tensor {i}": shard for i, shard in enumerate(shards)}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NAMED = ["pytorch_model-1.safetensors", "last_layers.safetensors"]
OWN = ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"]
MODEL, CONSOLIDATED = "model.safetensors", "consolidated.safetensors"


@pytest.mark.parametrize(
    ("names", "indices", "read"),
    [
        (["config.json"], {"model": SHARDS}, [*SHARDS, f"{MODEL}.index.json"]),
        (["config.json"], {"model": NAMED}, [*NAMED, f"{MODEL}.index.json"]),
        (["config.json", MODEL], {"model": SHARDS}, [MODEL]),
        (["config.json", MODEL], {}, [MODEL]),
        (["config.json", "params.json", CONSOLIDATED], {"model": SHARDS, "consolidated": OWN}, [*SHARDS, f"{MODEL}.index.json"]),
        (["params.json"], {"model": SHARDS, "consolidated": OWN}, [*OWN, f"{CONSOLIDATED}.index.json"]),
        (["params.json"], {"consolidated": NAMED}, [*NAMED, f"{CONSOLIDATED}.index.json"]),
        (["params.json", CONSOLIDATED, MODEL], {"consolidated": OWN}, [CONSOLIDATED]),
    ],
)
def test_of_the_weights_what_is_read_is_fetched_and_nothing_else(repository, names, indices, read):
    there, here = repository
    again = ["model.fp16.safetensors", "model.fp16-00001-of-00001.safetensors", "model-original/model.safetensors", "adapter.safetensors"]
    again += ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "onnx/config.json", "pytorch_model.bin"]
    write_files(there, "tokenizer.model", *names, *again, **indices)
    assert checkpoint_folder("org/name@main") == here
    assert {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()} == {names[0], "tokenizer.model", *read}
    assert folder_weights(here) == folder_weights(there) and {*folder_weights(there).files} <= {*read}


@pytest.mark.parametrize(
    ("names", "index", "words"),
    [
        (["config.json", "model.fp16.safetensors"], None, "has no model.safetensors, nor model.safetensors.index.json"),
        (["config.json", "original/model.safetensors"], None, "has no model.safetensors, nor"),
        (["config.json", CONSOLIDATED], None, "consolidated.safetensors is there, but goes with params.json"),
        (["config.json"], {"weight_map": {"a": SHARDS[0]}}, f"has no {SHARDS[0]}, which its model.safetensors.index.json names"),
        (["config.json"], {"weight_map": {"a": "../a.safetensors"}}, "the tensor 'a' is put in '../a.safetensors'"),
        (["config.json"], [], "model.safetensors.index.json: the file is not a JSON object"),
    ],
)
def test_weights_that_cannot_be_read_are_not_fetched(repository, names, index, words):
    there, here = repository
    write_files(there, *names)
    if index is not None:
        (there / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_folder("org/name")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not [*here.rglob("*.safetensors"), *here.rglob("config.json")]


def test_what_is_no_checkpoint_folder_is_named_as_what_it_is(checkpoint, tmp_path):
    cache = tmp_path / "models--org--small"
    shutil.copytree(checkpoint, cache / "snapshots" / COMMIT)
    shutil.copytree(checkpoint, tmp_path / "out" / "checkpoint-500")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for given, words in (
        (cache, f"did you mean {cache / 'snapshots' / COMMIT}?"),
        (tmp_path / "out", f"did you mean {tmp_path / 'out' / 'checkpoint-500'}?"),
        (checkpoint / "config.json", "is a file, or cannot be opened; give the folder"),
        (tmp_path / "x.gguf", "GGUF is not read"),
        ("https://huggingface.co/org/small/tree/main", "https://huggingface.co/org/small/tree/main: no such folder; a model of"),
        ("no-such-folder", "no-such-folder: no such folder"),
        ("/no/such/folder", "/no/such/folder: no such folder"),
        ("../up", "../up: no such folder"),
    ):
        with pytest.raises(CheckpointError) as caught:
            checkpoint_folder(str(given))
        assert words in str(caught.value) and "\n" not in str(caught.value), given
    assert checkpoint_folder(str(checkpoint)) == checkpoint
