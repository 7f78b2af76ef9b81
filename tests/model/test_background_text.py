"""Texts for second moments: what is no text is named, and so is one that is far too short."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastedit.config import MomentConfig
from fastedit.methods.closed_form.second_moments import second_moments
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source

FIVE = "A river runs by the mill."


def text_of(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_memits_second_moments_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.layers.5.mlp.down_proj_float32_mom2_100000.npz"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"a \.npz of second moments, as MEMIT stores them, is not read; give a text"):
        Source(path).check()


def test_a_file_is_judged_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Source(tmp_path / "gone.txt").check()
    with pytest.raises(ValueError, match=r"no text to compute second moments from"):
        Source(text_of(tmp_path, " \n")).check()
    Source(text_of(tmp_path, FIVE)).check()
    Source().check()


def test_far_too_few_tokens_are_refused_with_both_numbers(tiny_model: ModelAdapter, tmp_path: Path) -> None:
    path = text_of(tmp_path, FIVE)
    with pytest.raises(ValueError, match=r"text\.txt: holds 1\d tokens, and 2 000 are to be read; give a longer text"):
        Source(path).windows(tiny_model, MomentConfig(tokens=2000), show=False)


def test_fewer_tokens_than_asked_for_are_a_warning(
    tiny_model: ModelAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = text_of(tmp_path, f"{FIVE} " * 40)
    windows = Source(path).windows(tiny_model, MomentConfig(tokens=100_000), show=False)
    n_tokens = sum(map(len, windows))
    assert n_tokens >= tiny_model.d_ff
    assert f"holds {n_tokens} tokens, and 100 000 are to be read; all there are will be read" in caplog.text

    caplog.clear()
    Source(path).windows(tiny_model, MomentConfig(tokens=n_tokens), show=False)
    assert caplog.text == ""


def test_second_moments_without_full_rank_are_a_warning(
    tiny_model: ModelAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(text_of(tmp_path, f"{FIVE} " * 40))
    second_moments(tiny_model, [1], source, MomentConfig(tokens=100), tmp_path, show=False)
    assert "second moments of 100 tokens have no full rank, since d_ff is 192" in caplog.text

    caplog.clear()
    second_moments(tiny_model, [1], source, MomentConfig(tokens=192), tmp_path, show=False)
    assert caplog.text == ""
