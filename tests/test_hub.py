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

from checkpoint_files import CheckpointError, checkpoint_folder

HERE = Path(__file__).resolve().parent.parent
COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def hub(checkpoint, tmp_path_factory):
    """Answers as the hub does, for org/small, org/pickles, org/gated; its `asked` lists the paths that were asked for."""
    folder = tmp_path_factory.mktemp("hub") / "small"
    shutil.copytree(checkpoint, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
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
