"""Hub ids, against a server of our own that answers as the hub does; every process has a cache of its own."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

TINY = Path(__file__).resolve().parent.parent / "tiny"

LOAD = """
import sys, time
from fastedit.model.load import load_model
for name in sys.argv[1:]:
    started = time.monotonic()
    try:
        print("loaded", load_model(name).n_layers, end=" ")
    except Exception as error:
        print(f"{type(error).__name__}: {error}", end=" ")
    print(f"[{time.monotonic() - started:.1f} s]", flush=True)
"""

FILES = {path.name: path.read_bytes() for path in (TINY / "model").iterdir()}
REPOSITORIES = {
    "someone/tiny": FILES,
    "someone/lora": {**FILES, "adapter_config.json": b'{"base_model_name_or_path": "someone/tiny"}'},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what the hub's clients ask: what is in a repository, and its files."""

    def log_message(self, *text):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": "c" * 40, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        files = REPOSITORIES.get(name)
        if files is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif path == f"api/models/{name}":
            listed = {"id": name, "siblings": [{"rfilename": file} for file in files]}
            self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        elif (file := path.rpartition("/")[2]) in files:
            self.answer(200, files[file], ETag=f'"{hashlib.sha256(files[file]).hexdigest()}"')
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def load(endpoint, cache, *names, **environment):
    """What a process prints that loads models by name from a hub."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names],
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment},
        cwd=TINY.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


NOBODY = "http://127.0.0.1:9"


def test_a_hub_that_does_not_answer_is_told_at_once_in_one_line(tmp_path):
    [said] = load(NOBODY, tmp_path, "someone/tiny")
    assert said.startswith("ModelNotFound: cannot load 'someone/tiny': cannot reach the hub (")
    assert "refused), and its cache holds no copy; no folder 'someone/tiny' is here, so it was taken for a hub" in said
    assert float(said.split("[")[-1].split()[0]) < 10
    [said] = load(NOBODY, tmp_path, "someone/tiny", HF_HUB_OFFLINE="1")
    assert "cannot reach the hub (HF_HUB_OFFLINE forbids it), and its cache holds no copy; no folder" in said


def test_models_adapters_and_names_that_are_not_there(hub, tmp_path):
    loaded, adapter, none = load(hub, tmp_path, "someone/tiny", "someone/lora", "someone/else")
    assert loaded.startswith("loaded 8 ")
    assert "it holds an adapter and no model: load it with peft" in adapter
    assert "the hub has no model of that name, or shows it only to those who are logged in" in none

    # From the cache, where the hub is gone.
    started = time.monotonic()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        [loaded] = load(NOBODY, tmp_path, "someone/tiny", **environment)
        assert loaded.startswith("loaded 8 ")
    assert time.monotonic() - started < 60


def test_an_adapter_in_the_cache_is_refused(tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--lora" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("c" * 40)
    for name, content in REPOSITORIES["someone/lora"].items():
        (snapshot / name).write_bytes(content)
    [said] = load(NOBODY, tmp_path, "someone/lora")
    assert "it holds an adapter of someone/tiny and no model: load it with peft" in said
