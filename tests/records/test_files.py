"""Files that a user named: pipes, devices, endless lines and absurd sizes are refused at once, by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

from fastedit.cli.main import app
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.load import ModelNotFound, load_model
from fastedit.records.edit import InvalidEdits
from fastedit.records.files import read_plain, read_text
from fastedit.records.load import load_edits

TINY = Path(__file__).resolve().parents[1] / "tiny"
RECORD = {"prompt": "{} is in", "subject": "Pell", "target_new": "Tavisk"}


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """What hangs fails."""

    def give_up(*arguments: object) -> None:
        raise TimeoutError("still reading after ten seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["pipe", "zero"])
def endless(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "endless.jsonl"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


def test_pipes_and_devices(endless: Path, tiny_model: ModelAdapter) -> None:
    for read in (read_plain, read_text, lambda path: Source(path).identity()):
        with pytest.raises(OSError, match="is a pipe or a device") as refused:
            read(endless)
        assert refused.value.filename == str(endless)
    with pytest.raises(InvalidEdits, match=r"endless\.jsonl.*is a pipe or a device"):
        load_edits(endless)

    told = CliRunner().invoke(app, ["eval", str(TINY / "model"), str(TINY / "facts.jsonl"), "--text", str(endless)])
    assert told.exit_code == 2
    assert "is a pipe or a device" in told.output


def test_a_record_of_a_hundred_megabytes_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with open(path, "w") as file:
        file.write(json.dumps(RECORD) + "\n")
        file.write('{"prompt": "' + "x" * 100_000_000 + "\n")
        file.write(json.dumps(RECORD) + "\n")
    with pytest.raises(InvalidEdits, match=r"long\.jsonl:2: has 100 MB, a record at most 10 MB") as refused:
        load_edits(path)
    assert len(str(refused.value)) < 1000
    assert len(load_edits(path, on_invalid="skip")) == 2


@pytest.mark.parametrize("count", [10**9, 1e30])
def test_a_config_with_a_billion_layers(count: float, tmp_path: Path) -> None:
    shutil.copytree(TINY / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": count}))
    with pytest.raises(ModelNotFound, match=r"config\.json: num_hidden_layers is 10+.*, more than 10000"):
        load_model(str(tmp_path / "model"))


def test_text_is_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Żubrówka\r\nŁomża\rPell\n".encode())
    assert read_text(path) == path.read_text(encoding="utf-8") == "Żubrówka\nŁomża\nPell\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"text\.txt: must be UTF-8 text, got byte 0xff at 2"):
        read_text(path)
    with pytest.raises(IsADirectoryError):
        read_plain(tmp_path)


KINDS = {
    "zip archive": b"PK\x03\x04\x14\x00",
    "numpy array": b"\x93NUMPY\x01\x00",
    "compressed with gzip": b"\x1f\x8b\x08\x00",
    "Parquet table": b"PAR1\x15\x04",
    "GGUF model": b"GGUF\x03\x00",
    "Python pickle": b"\x80\x04\x95",
    "text in UTF-16": "text".encode("utf-16"),
    "safetensors file": save({"a": torch.zeros(2)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_text_is_named(kind: str, tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl", ".json"):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(KINDS[kind])
        with pytest.raises(ValueError, match=rf"file\{suffix}: must be UTF-8 text, and is .*{kind}"):
            read_text(path)
        if suffix != ".txt" and kind != "text in UTF-16":
            with pytest.raises(InvalidEdits, match=rf"file\{suffix}: must be JSON as UTF-8 text, and is .*{kind}"):
                load_edits(path)

    path = tmp_path / "file.parquet"
    path.write_bytes(KINDS[kind])
    with pytest.raises(InvalidEdits, match=rf"must be a \.jsonl or \.json file, got \.parquet.*{kind}|UTF-16"):
        load_edits(path)


def test_zero_bytes_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"a\x00b")
    with pytest.raises(ValueError, match=r"file\.txt: must be UTF-8 text, and is no text: it holds zero bytes"):
        read_text(path)
