"""Saving on the command line: judged before the work, saved before measuring, told when it failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fastedit.cli.main import app
from fastedit.editor import Editor
from fastedit.evaluation import metrics
from fastedit.model import load
from fastedit.runtime.places import NotSaved

TINY = Path(__file__).resolve().parents[1] / "tiny"
MODEL, FACTS = str(TINY / "model"), str(TINY / "facts.jsonl")
PRESET = (
    "--method",
    "fine",
    "--preset",
    "smollm2-135m",
    "--set",
    "frozen_layers=1",
    "--set",
    "train.steps=2",
    "--set",
    "common_share=null",
)
EDIT = ("edit", MODEL, FACTS, "--limit", "2", *PRESET, "--no-eval")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test: what is wrong must be known before."""

    def refuses(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(load, "load_model", refuses)


@pytest.mark.usefixtures("no_model")
class TestJudgedBeforeAModelIsLoaded:
    def test_edit(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "config.json").write_text("{}")
        for place, said in [
            ("file", "a file stands there"),
            ("file/below", "is no folder"),
            ("full", "is not empty; name another folder, or replace an earlier result in it with --force"),
            (MODEL, "would be overwritten"),
        ]:
            done = run(*EDIT, "--save", tmp_path / place)
            assert done.exit_code == 2, done.output
            assert said in done.stderr
        assert (tmp_path / "file").read_text() == "mine"

    def test_an_empty_name_is_not_the_current_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for command in ((*EDIT, "--save", ""), ("replay", "run", "--save", ""), ("export", "run", "")):
            done = run(*command)
            assert done.exit_code == 2
            assert "a name is wanted" in done.stderr

    def test_options_without_use(self, tmp_path: Path) -> None:
        for option in (["--force"], ["--save-dtype", "float16"], ["--save-format", "lora"]):
            done = run(*EDIT, *option)
            assert done.exit_code == 2
            assert f"{option[0]}: " in done.stderr
            assert "there is no --save" in done.stderr
        done = run(*EDIT, "--save", tmp_path / "out", "--save-format", "lora", "--save-dtype", "float16")
        assert "dtype is of a checkpoint's weights" in done.stderr

    def test_meg(self, tmp_path: Path) -> None:
        (tmp_path / "meg.safetensors").write_text("mine")
        done = run("edit", MODEL, FACTS, "--method", "meg", "--save", tmp_path)
        assert done.exit_code == 2
        assert "stands already" in done.stderr
        assert (tmp_path / "meg.safetensors").read_text() == "mine"
        assert "--force" in run("edit", MODEL, FACTS, "--method", "meg", "--force").stderr

    def test_the_text_is_read_first(self, tmp_path: Path) -> None:
        done = run(*EDIT[:-1], "--text", tmp_path / "nothing.txt", "--save", tmp_path / "out")
        assert done.exit_code == 2
        assert "nothing.txt" in done.stderr

    def test_plot(self, tmp_path: Path) -> None:
        (tmp_path / "map.png").write_text("mine")
        done = run("locate", MODEL, "--prompt", "a", "--target", "b", "--plot", tmp_path / "map.png")
        assert done.exit_code == 2
        assert "stands already" in done.stderr


class TestOfARun:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        done = run(*EDIT, "--run-dir", tmp_path / "run")
        assert done.exit_code == 0, done.output
        return tmp_path / "run"

    def test_places(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Editor, "resume", lambda *_, **__: pytest.fail("a model was loaded"))
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        for place in (folder, MODEL, TINY):
            for command in (["replay", folder, "--save", place], ["export", folder, place]):
                done = run(*command, "--force")
                assert done.exit_code == 2, done.output
                assert "would be overwritten" in done.stderr
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    def test_replay_and_export_say_what_they_wrote(self, folder: Path, tmp_path: Path) -> None:
        done = run("replay", folder, "--save", tmp_path / "a", "--save-dtype", "bfloat16", "--json")
        told = json.loads(done.stdout)
        assert (told["edits"], told["dtype"], told["holds"]["n_edits"]) == (2, "bfloat16", 2)
        done = run("replay", folder, "--save", tmp_path / "a", "--force")
        assert "2 edits written, saved to" in done.stdout
        assert "in float32, read back and compared" in done.stdout

        done = run("export", folder, tmp_path / "b", "--to", "0", "--format", "delta")
        assert done.exit_code == 2
        assert "nothing to export" in done.stderr
        done = run("export", folder, tmp_path / "b", "--format", "gguf")
        assert done.exit_code == 2
        assert "GGUF file that the model came from" in done.stderr


class TestEdit:
    def test_saved_before_measuring(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: Any, **__: Any) -> None:
            assert (tmp_path / "out" / "config.json").is_file()
            raise ValueError("the measurement broke")

        monkeypatch.setattr(metrics, "evaluate", fails)
        done = run(*EDIT[:-1], "--save", tmp_path / "out", "--json")
        assert done.exit_code == 2
        assert "the measurement broke" in done.stderr
        assert f"saved to {tmp_path / 'out'}" in done.stderr
        assert json.loads(done.stdout)["saved"]["dtype"] == "float32"

    @pytest.mark.parametrize("recorded", [False, True])
    def test_what_could_not_be_saved_is_an_error_beside_the_result(
        self, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: Any, **__: Any) -> None:
            raise NotSaved("out: not saved (no space left on the disk)")

        monkeypatch.setattr(Editor, "export", fails)
        more = ("--run-dir", tmp_path / "run") if recorded else ()
        done = run(*EDIT, "--save", tmp_path / "out", "--json", *more)
        assert done.exit_code == 1
        assert "error: out: not saved (no space left on the disk)" in done.stderr
        assert ("fastedit replay" in done.stderr) == recorded
        assert json.loads(done.stdout)["n_edits"] == 2

    def test_gguf_in_gguf_out(self, write_tiny_gguf: Callable[..., None], tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        write_tiny_gguf(TINY / "model", tmp_path / "in" / "tiny.gguf")
        edit = ("edit", tmp_path / "in" / "tiny.gguf", *EDIT[2:])
        done = run(*edit, "--save", tmp_path / "out", "--save-format", "gguf")
        assert done.exit_code == 0, done.output
        assert "saved as gguf" in done.stdout

        done = run("eval", tmp_path / "out" / "tiny-edited.gguf", FACTS, "--limit", "2", "--fluency-prompts", "0")
        assert done.exit_code == 0, done.output
        done = run(*edit, "--save", tmp_path / "in", "--force")
        assert "would be overwritten" in done.stderr


def test_stats_that_cannot_be_stored_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "file"))
    done = run("stats", MODEL, "--preset", "smollm2-135m", "--set", "layers=[1]", "--moments", TINY / "text.txt")
    assert done.exit_code == 2, done.output
    assert "name another place" in done.stderr
