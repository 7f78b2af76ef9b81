"""A hundred checkpoints with one thing wrong: each is edited, or refused in one sentence that names what is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastedit.editor import Editor
from fastedit.methods.columns.config import FiNEConfig, TrainConfig
from fastedit.model.families import UnsupportedModel
from fastedit.model.load import ModelNotFound, load_model
from fastedit.records.edit import EditSet

TINY = Path(__file__).resolve().parents[1] / "tiny" / "model"
N_MODELS = 100

Fault = Callable[[Path, random.Random], str]


def change_config(folder: Path, draw: random.Random) -> str:
    config = json.loads((folder / "config.json").read_text())
    name = draw.choice(sorted(config))
    value = draw.choice([None, 0, -1, 3, 10**6, 0.5, "", "abc", [], {}, True])
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    return f"config {name} = {value!r}"


def drop_config(folder: Path, draw: random.Random) -> str:
    config = json.loads((folder / "config.json").read_text())
    name = draw.choice(sorted(config))
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    return f"config without {name}"


def change_tokenizer(folder: Path, draw: random.Random) -> str:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    name = draw.choice(sorted(tokenizer))
    tokenizer[name] = draw.choice([None, [], {}, "abc", 7])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return f"tokenizer {name} = {tokenizer[name]!r}"


def damage_file(folder: Path, draw: random.Random) -> str:
    path = draw.choice(sorted(folder.iterdir()))
    kind = draw.choice(["gone", "empty", "cut", "noise", "folder", "not utf-8", "a list"])
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "gone":
        noise = bytes(draw.randrange(256) for _ in range(60))
        half = content[: len(content) // 2]
        path.write_bytes({"empty": b"", "cut": half, "noise": noise, "not utf-8": b"\xff\xfe", "a list": b"[1]"}[kind])
    return f"{path.name} {kind}"


def change_weight(folder: Path, draw: random.Random) -> str:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    kind = draw.choice(["gone", "renamed", "transposed", "cut", "NaN", "Inf", "huge", "float16", "integers", "twice"])
    tensor = tensors.pop(name)
    if kind == "renamed":
        tensors[name.replace("model.", "decoder.")] = tensor
    elif kind == "twice":
        tensors |= {name: tensor, name.replace(".weight", ".weight_2"): tensor.clone()}
    elif kind != "gone":
        tensors[name] = _changed(tensor, kind)
    save_file(tensors, path, {"format": "pt"})
    return f"{name} {kind}"


def _changed(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if kind in ("NaN", "Inf"):
        tensor = tensor.clone()
        tensor.view(-1)[5] = float(kind)
        return tensor
    changes = {
        "transposed": lambda: tensor.T.contiguous(),
        "cut": lambda: tensor[:-1].clone(),
        "huge": lambda: tensor * 1e30,
        "float16": lambda: tensor.half(),
        "integers": lambda: tensor.to(torch.int32),
    }
    return changes[kind]()


FAULTS: tuple[Fault, ...] = (change_config, drop_config, change_tokenizer, damage_file, change_weight)


@pytest.mark.slow
def test_a_hundred_odd_checkpoints(tiny_facts: EditSet, tmp_path: Path) -> None:
    seed = int(os.environ.get("FASTEDIT_SEED", "0"))
    seen: Counter[str] = Counter()
    for number in range(N_MODELS):
        folder = tmp_path / "model"
        shutil.copytree(TINY, folder)
        draw = random.Random(seed * N_MODELS + number)
        what = draw.choice(FAULTS)(folder, draw)

        told = edited(folder, tiny_facts)
        print(f"{number} {what}: {told}")
        assert len(told) < 500, (number, what, told)
        assert "\n" not in told, (number, what, told)

        seen["edited" if told == "edited" else "refused"] += 1
        shutil.rmtree(folder)

    assert set(seen) == {"refused", "edited"}


def edited(folder: Path, facts: EditSet) -> str:
    """What comes of an edit: "edited", or why it was refused. Any other error is a fault."""
    try:
        return edit_one(folder, facts)
    except (ModelNotFound, UnsupportedModel, ValueError) as error:
        return str(error)


def edit_one(folder: Path, facts: EditSet) -> str:
    editor = Editor(load_model(str(folder)), "fine", FiNEConfig(frozen_layers=1, train=TrainConfig(steps=2)))
    editor.edit(facts[:1])
    assert all(bool(part.isfinite().all()) for part in editor.model.parameters())
    return "edited"
