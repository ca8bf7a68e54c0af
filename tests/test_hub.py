"""A checkpoint by its name on the hub: downloaded once, then read without a network.

What goes wrong is one line.
"""

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

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    """Answers as the hub does, for org/small, org/pickles and org/gated.

    Its `asked` lists the paths that were asked for.
    """
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
            api = "/api/models/"
            if self.path.startswith(api):
                self.answer_about(self.path.removeprefix(api))
            elif self.path.startswith("/org/gated/"):
                self.answer(403, X_Error_Code="GatedRepo")
            else:
                self.answer_with_file()

        def answer_about(self, path):
            """name, name/revision/REVISION or name/tree/REVISION: what the repository holds."""
            repository, _, tree = path.partition("/tree/")
            name, _, revision = repository.partition("/revision/")
            if name not in ("org/small", "org/pickles", "org/gated"):
                return self.answer(404, X_Error_Code="RepoNotFound")
            if revision not in ("", "main", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            files = sorted(os.listdir(folder))
            if name == "org/pickles":
                files = ["config.json", "pytorch_model.bin"]
            if tree:
                sizes = {file: (folder / file).stat().st_size for file in files}
                about = [
                    {"type": "file", "path": file, "size": size, "oid": file}
                    for file, size in sizes.items()
                ]
            else:
                siblings = [{"rfilename": file} for file in files]
                about = {"id": name, "sha": COMMIT, "siblings": siblings}
            return self.answer(body=json.dumps(about).encode(), Content_Type="application/json")

        def answer_with_file(self):
            file = folder / self.path.rpartition("/")[2]
            if "/resolve/" not in self.path or not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            body = file.read_bytes()
            tag = f'"{sha256(body).hexdigest()}"'
            return self.answer(body=body, ETag=tag, X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(server_port=server.server_port, asked=asked)
    server.shutdown()


def run(hub, home, name, **more):
    """Run generate.py: its exit code, stdout, and the last line of stderr.

    In a process of its own, because the hub's settings are read when it is imported; more: of them.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", **more}
    command = [sys.executable, ROOT / "generate.py", name, "--prompt", "the"]
    command += ["--max-new-tokens", "3", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    lines = done.stderr.replace("\r", "\n").splitlines()
    return done.returncode, done.stdout, lines[-1]


def run_well(*arguments, **more):
    """What run() gives on stdout; it must end well."""
    code, out, last_line = run(*arguments, **more)
    assert code == 0, last_line
    return out


def test_a_name_on_the_hub_then_without_a_network(hub, checkpoint, tmp_path):
    expected = run_well(hub, tmp_path, checkpoint)
    assert run_well(hub, tmp_path, "org/small") == expected
    # No pickle, no second copy of the weights, no README.
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {path.name for path in checkpoint.iterdir()}
    snapshot = tmp_path / "hub/models--org--small/snapshots" / COMMIT
    assert (snapshot / "config.json").is_symlink()
    asked = len(hub.asked)
    assert run_well(hub, tmp_path, "org/small", HF_HUB_OFFLINE="1") == expected
    assert len(hub.asked) == asked
    gone = SimpleNamespace(server_port=1)  # nobody listens there
    assert run_well(gone, tmp_path, "org/small") == expected
    assert run_well(gone, tmp_path, f"org/small@{COMMIT}") == expected
    assert run_well(gone, tmp_path, snapshot) == expected


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("org/none", {}, "is not there either"),
        ("org/small@v9", {}, "has no revision 'v9'"),
        ("org/gated", {}, "is gated: ask for access"),
        ("org/pickles", {}, "has no safetensors weights"),
        ("org/small", {"HF_HUB_OFFLINE": "1"}, "is not in the cache"),
        ("org/small", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "does not answer"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_one_line(hub, tmp_path, name, settings, words):
    code, out, line = run(hub, tmp_path, name, **settings)
    assert (code, out) == (2, "")
    assert line.startswith(f"error: {name} (no such folder; taken as a model")
    assert words in line


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository on a hub without a server: its folder, and the one that files are fetched to."""
    import huggingface_hub

    there = tmp_path / "there"
    here = tmp_path / "here"

    def fetch(name):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(there / name, here / name))

    def model_info(self, repo_id, revision=None):
        siblings = [SimpleNamespace(rfilename=name) for name in files_in(there)]
        return SimpleNamespace(siblings=siblings)

    def hf_hub_download(repo_id, filename, revision=None):
        return fetch(filename)

    def snapshot_download(repo_id, revision=None, allow_patterns=()):
        for name in allow_patterns:
            fetch(name)
        return str(here)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return there, here


def files_in(folder):
    """The paths of all files in a folder, from there."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def write_files(folder, *names, **indices):
    """Write files without content, and an index for each of `indices`: model=[its shards]."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    for name, shards in indices.items():
        write_files(folder, *shards)
        weight_map = {f"tensor {i}": shard for i, shard in enumerate(shards)}
        index = folder / f"{name}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NAMED = ["pytorch_model-1.safetensors", "last_layers.safetensors"]
OWN = ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"]
MODEL = "model.safetensors"
CONSOLIDATED = "consolidated.safetensors"
MODEL_INDEX = f"{MODEL}.index.json"
CONSOLIDATED_INDEX = f"{CONSOLIDATED}.index.json"
# The same weights again, which are not read, and what goes with them.
AGAIN = [
    "model.fp16.safetensors",
    "model.fp16-00001-of-00001.safetensors",
    "model-original/model.safetensors",
    "adapter.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "onnx/config.json",
    "pytorch_model.bin",
]


@pytest.mark.parametrize(
    ("names", "indices", "read"),
    [
        (["config.json"], {"model": SHARDS}, [*SHARDS, MODEL_INDEX]),
        (["config.json"], {"model": NAMED}, [*NAMED, MODEL_INDEX]),
        (["config.json", MODEL], {"model": SHARDS}, [MODEL]),
        (["config.json", MODEL], {}, [MODEL]),
        (
            ["config.json", "params.json", CONSOLIDATED],
            {"model": SHARDS, "consolidated": OWN},
            [*SHARDS, MODEL_INDEX],
        ),
        (
            ["params.json"],
            {"model": SHARDS, "consolidated": OWN},
            [*OWN, CONSOLIDATED_INDEX],
        ),
        (["params.json"], {"consolidated": NAMED}, [*NAMED, CONSOLIDATED_INDEX]),
        (["params.json", CONSOLIDATED, MODEL], {"consolidated": OWN}, [CONSOLIDATED]),
    ],
)
def test_of_the_weights_what_is_read_is_fetched_and_nothing_else(repository, names, indices, read):
    there, here = repository
    write_files(there, "tokenizer.model", *names, *AGAIN, **indices)
    assert checkpoint_folder("org/name@main") == here
    assert set(files_in(here)) == {names[0], "tokenizer.model", *read}
    found = folder_weights(there)
    assert folder_weights(here) == found
    assert set(found.files) <= set(read)


@pytest.mark.parametrize(
    ("names", "index", "words"),
    [
        (
            ["config.json", "model.fp16.safetensors"],
            None,
            "has no model.safetensors, nor model.safetensors.index.json",
        ),
        (["config.json", "original/model.safetensors"], None, "has no model.safetensors, nor"),
        (
            ["config.json", CONSOLIDATED],
            None,
            "consolidated.safetensors is there, but goes with params.json",
        ),
        (
            ["config.json"],
            {"weight_map": {"a": SHARDS[0]}},
            f"has no {SHARDS[0]}, which its model.safetensors.index.json names",
        ),
        (
            ["config.json"],
            {"weight_map": {"a": "../a.safetensors"}},
            "the tensor 'a' is put in '../a.safetensors'",
        ),
        (["config.json"], [], "model.safetensors.index.json: the file is not a JSON object"),
    ],
)
def test_weights_that_cannot_be_read_are_not_fetched(repository, names, index, words):
    there, here = repository
    write_files(there, *names)
    if index is not None:
        (there / "model.safetensors.index.json").write_text(json.dumps(index))
    assert words in complaint_about("org/name")
    assert not [*here.rglob("*.safetensors"), *here.rglob("config.json")]


def complaint_about(name):
    """The one-line message of the CheckpointError that a name must raise."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint_folder(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_no_checkpoint_folder_is_named_as_what_it_is(checkpoint, tmp_path):
    cache = tmp_path / "models--org--small"
    snapshot = cache / "snapshots" / COMMIT
    shutil.copytree(checkpoint, snapshot)
    assert f"did you mean {snapshot}?" in complaint_about(str(cache))

    training = tmp_path / "out"
    shutil.copytree(checkpoint, training / "checkpoint-500")
    assert f"did you mean {training / 'checkpoint-500'}?" in complaint_about(str(training))

    file = str(checkpoint / "config.json")
    assert "is a file, or cannot be opened; give the folder" in complaint_about(file)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "GGUF is not read" in complaint_about(str(tmp_path / "x.gguf"))

    address = "https://huggingface.co/org/small/tree/main"
    assert f"{address}: no such folder; a model of" in complaint_about(address)
    for name in ("no-such-folder", "/no/such/folder", "../up"):
        assert complaint_about(name) == f"{name}: no such folder"
    assert checkpoint_folder(str(checkpoint)) == checkpoint
