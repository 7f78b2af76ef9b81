"""Shared fixtures: the tiny trained model, an editor on a fresh copy of it, and the published procedure."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastedit.adapter import ModelAdapter
from fastedit.config import (
    AlphaEditConfig,
    AttributionConfig,
    EditConfig,
    FiNEConfig,
    KNConfig,
    KNEConfig,
    MEMITConfig,
    MomentConfig,
    NSEConfig,
    TrainConfig,
    ValueConfig,
    changed,
)
from fastedit.editor import Editor
from fastedit.edits import EditSet
from fastedit.loading import load_transformers
from fastedit.readers import load_edits
from fastedit.stats import Source, second_moments

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny"

TINY_CONFIG = NSEConfig(
    layers=(2, 3, 4),
    covariance_weight=100,
    value=ValueConfig(steps=25, lr=0.1),
    moments=MomentConfig(tokens=8192, window=64),
    residual_min=0.5,
)

TINY_CONFIGS: dict[str, EditConfig] = {
    "nse": TINY_CONFIG,
    "memit": MEMITConfig(
        layers=TINY_CONFIG.layers, covariance_weight=100, value=TINY_CONFIG.value, moments=TINY_CONFIG.moments
    ),
    "alphaedit": AlphaEditConfig(
        layers=TINY_CONFIG.layers, ridge=0.1, value=TINY_CONFIG.value, moments=TINY_CONFIG.moments
    ),
    "fine": FiNEConfig(frozen_layers=1, train=TrainConfig(lr=0.03)),
    "kne": KNEConfig(
        share=0.05,
        attribution=AttributionConfig(nodes=3),
        train=TrainConfig(steps=40, lr=0.01, reduce="mean", kl_factor=0, repetition_factor=0, norm_factor=0),
    ),
    "kn": KNConfig(attribution=AttributionConfig(nodes=3, tokens="apart")),
}

os.environ["HF_HUB_OFFLINE"] = "1"
# Where no device can run them, Triton's kernels run in its interpreter, which they are bound to when first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models here are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's cache."""
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """bench/published.py, which is no part of the package."""
    return bench_module("published")


@pytest.fixture(scope="session")
def published_siblings(published: ModuleType) -> ModuleType:
    """bench/published_siblings.py."""
    return bench_module("published_siblings")


@pytest.fixture(scope="session")
def published_fine() -> ModuleType:
    """bench/published_fine.py."""
    return bench_module("published_fine")


def bench_module(name: str) -> ModuleType:
    """A module of bench/, found by the others there under its own name."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_parts() -> tuple[Any, Any]:
    """The tiny model and its tokenizer, never to be edited: take a copy."""
    return load_transformers(str(TINY / "model"), "float32")


@pytest.fixture(scope="session")
def tiny_facts() -> EditSet:
    """Records about the facts that the tiny model knows."""
    return load_edits(TINY / "facts.jsonl")


@pytest.fixture(scope="session")
def tiny_moments(tiny_parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, torch.Tensor]:
    """Second moments of the tiny model's edited layers, from its held-out text."""
    adapter = ModelAdapter(*tiny_parts)
    source = Source(TINY / "text.txt")
    folder = tmp_path_factory.mktemp("moments")
    return second_moments(adapter, TINY_CONFIG.layers, source, TINY_CONFIG.moments, folder, show=False)


@pytest.fixture
def tiny_model(tiny_parts: tuple[Any, Any]) -> ModelAdapter:
    """A fresh copy of the tiny model."""
    model, tokenizer = tiny_parts
    return ModelAdapter(copy.deepcopy(model), tokenizer)


@pytest.fixture
def tiny_editor(tiny_parts: tuple[Any, Any], tiny_moments: dict[int, torch.Tensor]) -> Callable[..., Editor]:
    """Makes editors on fresh copies of the tiny model; keyword arguments change the config."""

    def make(method: str = "nse", **changes: Any) -> Editor:
        model, tokenizer = tiny_parts
        adapter = ModelAdapter(copy.deepcopy(model), tokenizer)
        config = changed(TINY_CONFIGS[method], changes)
        return Editor(adapter, method, config, moments=tiny_moments, progress=False)

    return make
