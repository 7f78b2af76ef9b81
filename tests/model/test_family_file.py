"""Rows of families as YAML: what is read, what is refused, and that a row comes back as it was."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastedit.model.attention_modules import attend_in_pairs, rotate_by_table
from fastedit.model.families import FAMILIES, GPT2, LLAMA, Family
from fastedit.model.family_file import as_data, family_from, read_family


def written(folder: Path, text: str) -> Path:
    path = folder / "family.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_row_like_another(tmp_path: Path) -> None:
    text = """
like: llama
name: mine
layers: model.blocks
up: null
layer_modules: [self_attn, mlp, input_layernorm]
parallel: true
n_positions: 2048
config: {model_type: mine, tied: false}
rotate: rotate_by_table
attend: attend_in_pairs
"""
    assert read_family(written(tmp_path, text)) == replace(
        LLAMA,
        name="mine",
        layers="model.blocks",
        up=None,
        layer_modules=frozenset({"self_attn", "mlp", "input_layernorm"}),
        parallel=True,
        n_positions=2048,
        config=(("model_type", "mine"), ("tied", False)),
        rotate=rotate_by_table,
        attend=attend_in_pairs,
    )


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_a_row_comes_back_from_its_data_as_it_was(row: Family) -> None:
    data = as_data(row)
    assert data is not None
    assert family_from(data, "here") == row


def test_a_function_of_ones_own_is_no_data() -> None:
    assert as_data(replace(LLAMA, attend=lambda module, rows, plan, table: rows)) is None

    def attend_in_pairs(module, rows, plan, table):  # type: ignore[no-untyped-def]
        return rows

    assert as_data(replace(LLAMA, attend=attend_in_pairs)) is None


WRONG = {
    "gate_path: mlp.up": "'gate_path' is unknown; did you mean 'gate'?",
    "attend: attend_in_pair": "attend must name one of our functions: 'attend_in_pair' is unknown; did you mean",
    "rotate: os.system": "rotate must name one of our functions: 'os.system' is unknown; known are rotate_by_module",
    "attend: [attend_in_pairs]": "attend must name one of our functions",
    "attend: null": "attend must name one of our functions",
    "layers: null": "layers must be a text, got None",
    "down: 3": "down must be a text, got 3",
    "up: ''": "up must be a text, or null, got ''",
    "activation: null": "activation must be a text, got None",
    "parallel: 1": "parallel must be true or false, got 1",
    "n_positions: true": "n_positions must be a whole number above 0, or null, got True",
    "n_positions: 0": "n_positions must be a whole number above 0, or null, got 0",
    "layer_modules: mlp": "layer_modules must be a list of names, such as [attn, mlp, ln_1, ln_2], got 'mlp'",
    "config: [alibi]": "config must be a mapping of config entries to single values, {} for none, got ['alibi']",
    "config: {a: [1]}": "config must be a mapping of config entries to single values, {} for none, got {'a': [1]}",
    "3: mlp": "3 is unknown",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_field_is_named_with_the_file(line: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"like: llama\nname: mine\n{line}\n")
    with pytest.raises(ValueError, match=r".") as caught:
        read_family(path)
    assert str(caught.value).startswith(f"{path}: {WRONG[line]}")
    assert "\n" not in str(caught.value)


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read_family(written(tmp_path, "name: mine\nlayers: model.layers\ngates: mlp.up\n"))
    lines = str(caught.value).splitlines()
    assert "gates" in lines[0]
    assert [line.split(": ")[1].split()[0] for line in lines[1:]] == [
        *("embedding", "attention", "gate", "down", "layer_modules")
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("like: lama\n", "like names no row: 'lama' is unknown; did you mean 'llama'?"),
        ("like: [llama]\n", "like names no row: ['llama'] is unknown"),
        ("[llama]\n", "a family must be a mapping of its fields"),
        ("", "a family must be a mapping of its fields"),
    ],
)
def test_what_is_no_row_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=r".") as caught:
        read_family(path)
    assert str(caught.value).startswith(f"{path}: {told}")


def test_nothing_of_the_file_is_executed(tmp_path: Path) -> None:
    hidden = tmp_path / "touched"
    path = written(tmp_path, f"like: llama\nname: !!python/object/apply:os.mkdir ['{hidden}']\n")
    with pytest.raises(ValueError, match=r"family\.yaml:2:\d+: holds a tag"):
        read_family(path)
    assert not hidden.exists()


def test_what_differs_from_the_default_is_data_alone() -> None:
    data = as_data(GPT2)
    assert data is not None
    assert "rotate" not in data
    assert data["layer_modules"] == ["attn", "ln_1", "ln_2", "mlp"]
