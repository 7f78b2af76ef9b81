"""Second moments against a loop over the model's own forward; which files are reused and which refused."""

import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastedit.config import MomentConfig
from fastedit.methods.closed_form.second_moments import (
    BadMoments,
    accumulate,
    content_key,
    load_moment,
    provenance,
    save_moment,
    second_moments,
)
from fastedit.model.background_text import Source
from fastedit.runtime.places import PlaceError

D_FF = 48
TEXT = (
    "The twin of Tavisk is Pell. Rook lives in the old house.\n\nIn 東京 they burn coal, and the miners\ndig.\n\n" * 4
)
WINDOWS = [[5, 9, 31, 7, 12], [8, 3, 200], [44, 6, 6, 250, 9], [17], [5, 9, 31]]
CONFIG = MomentConfig(tokens=90, window=20, token_budget=64)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "background.txt"
    path.write_text(TEXT, encoding="utf-8")
    return Source(path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "moments"


def naive(model, layer, windows):
    """Mean of k k^T, one token at a time, in float64; a key is the input of the down-projection."""
    total = torch.zeros(D_FF, D_FF, dtype=torch.float64)
    count = 0
    inputs_seen = []
    hook = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
        lambda m, inputs: inputs_seen.append(inputs[0])
    )

    for window in windows:
        with torch.no_grad():
            model(input_ids=torch.tensor([window]))
        for key in inputs_seen.pop()[0]:
            total += torch.outer(key, key)
            count += 1

    hook.remove()
    return total / count


def forbid(module):
    def refuse(*_):
        raise AssertionError("this part must not run")

    return module.register_forward_pre_hook(refuse)


def assert_near(moment, expected):
    torch.testing.assert_close(moment.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("token_budget", [1, 8, 1000])
def test_moments_are_the_mean_over_all_tokens_of_all_windows(random_adapter, token_budget):
    counts = []
    moments = accumulate(random_adapter, [0, 2], WINDOWS, token_budget, counts.append)
    assert set(moments) == {0, 2}
    assert sum(counts) == sum(map(len, WINDOWS))
    for layer, moment in moments.items():
        assert moment.dtype == torch.float32
        assert_near(moment, naive(random_adapter.model, layer, WINDOWS))


def test_no_layer_above_the_last_wanted_one_runs(random_adapter):
    forbid(random_adapter.layers[2])
    forbid(random_adapter.layers[2].self_attn)
    forbid(random_adapter.model.lm_head)
    assert set(accumulate(random_adapter, [1], WINDOWS, 8)) == {1}
    with pytest.raises(AssertionError, match="must not run"):
        accumulate(random_adapter, [2], WINDOWS, 8)


def test_a_text_file_is_cut_into_windows_of_its_own_tokens(random_adapter, source, folder):
    moments = second_moments(random_adapter, [1, 3], source, CONFIG, folder)
    ids = random_adapter.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:90]
    windows = [ids[i : i + 20] for i in range(0, 90, 20)]
    assert [len(window) for window in windows] == [20, 20, 20, 20, 10]
    assert source.windows(random_adapter, CONFIG, show=False) == windows
    for layer, moment in moments.items():
        assert_near(moment, naive(random_adapter.model, layer, windows))


def test_a_window_is_never_longer_than_the_model_can_read(random_adapter, source):
    windows = source.windows(random_adapter, MomentConfig(tokens=100, window=1000), show=False)
    assert [len(window) for window in windows] == [64, 36]


def test_a_short_text_is_used_whole(random_adapter, source):
    windows = source.windows(random_adapter, MomentConfig(tokens=10_000, window=20), show=False)
    ids = [token for window in windows for token in window]
    assert random_adapter.tokenizer.decode(ids).startswith(TEXT.rstrip())


def test_without_a_text_the_model_writes_its_own(random_adapter, folder):
    moments = second_moments(random_adapter, [2], Source(seed=3), CONFIG, folder)
    windows = Source(seed=3).windows(random_adapter, CONFIG, show=False)
    assert sum(map(len, windows)) >= CONFIG.tokens
    assert_near(moments[2], naive(random_adapter.model, 2, windows))
    assert Source(seed=4).windows(random_adapter, CONFIG, show=False) != windows


@pytest.mark.parametrize("text", ["", " \n\n \n"])
def test_an_empty_text_is_refused_by_name(random_adapter, tmp_path, folder, text):
    (tmp_path / "empty.txt").write_text(text)
    with pytest.raises(ValueError, match=r"empty\.txt: no text"):
        second_moments(random_adapter, [1], Source(tmp_path / "empty.txt"), CONFIG, folder)
    assert not folder.exists()


def test_stored_moments_are_not_computed_again(random_adapter, source, folder):
    first = second_moments(random_adapter, [0, 1], source, CONFIG, folder)
    files = sorted(folder.iterdir())
    times = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 2
    hook = forbid(random_adapter.layers[0].self_attn)
    again = second_moments(random_adapter, [0, 1], source, CONFIG, folder)
    assert all(torch.equal(first[layer], again[layer]) for layer in (0, 1))
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == times
    hook.remove()
    # Only missing second moments are computed.
    second_moments(random_adapter, [1, 2], source, CONFIG, folder)
    assert len(list(folder.iterdir())) == 3
    assert [path.stat().st_mtime_ns for path in files] == times


def test_the_same_text_elsewhere_is_the_same_source(random_adapter, source, folder, tmp_path):
    first = second_moments(random_adapter, [1], source, CONFIG, folder)
    moved = source.path.rename(tmp_path / "moved.txt")
    forbid(random_adapter.layers[0].self_attn)
    again = second_moments(random_adapter, [1], Source(moved), CONFIG, folder)
    assert torch.equal(first[1], again[1])
    assert len(list(folder.iterdir())) == 1


def test_the_default_folder_is_in_the_cache(random_adapter, source, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "cache"))
    second_moments(random_adapter, [1], source, CONFIG)
    assert len(list((tmp_path / "cache" / "moments").glob("*.safetensors"))) == 1


def change_weight_below(model, source):
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1


def change_embedding(model, source):
    model.model.embed_tokens.weight.data[0, 0] += 1


def change_text(model, source):
    source.path.write_text(TEXT + "x", encoding="utf-8")


def change_nothing(model, source):
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    model.lm_head.weight.data[0, 0] += 1


@pytest.mark.parametrize(
    ("change", "n_files"),
    [(change_weight_below, 2), (change_embedding, 2), (change_text, 2), (change_nothing, 1)],
)
def test_moments_are_computed_again_exactly_when_keys_may_change(random_adapter, source, folder, change, n_files):
    second_moments(random_adapter, [1], source, CONFIG, folder)
    change(random_adapter.model, source)
    second_moments(random_adapter, [1], source, CONFIG, folder)
    assert len(list(folder.iterdir())) == n_files


def test_every_setting_changes_the_name(random_adapter, source):
    base = provenance(random_adapter, 1, source, CONFIG)
    others = [
        provenance(random_adapter, 2, source, CONFIG),
        provenance(random_adapter, 1, Source(), CONFIG),
        provenance(random_adapter, 1, Source(seed=1), CONFIG),
        provenance(random_adapter, 1, source, CONFIG.model_copy(update={"tokens": 91})),
        provenance(random_adapter, 1, source, CONFIG.model_copy(update={"window": 21})),
    ]
    assert len({content_key(about) for about in [base, *others]}) == 6
    # The token budget changes rounding only.
    assert provenance(random_adapter, 1, source, CONFIG.model_copy(update={"token_budget": 9})) == base


ABOUT = {"format": "fastedit second moment 1", "weights": "w", "layer": "1"}


def some_moment():
    keys = torch.randn(100, D_FF, generator=torch.Generator().manual_seed(2))
    return keys.T @ keys / 100


@pytest.fixture
def stored(folder):
    path = folder / "stored.safetensors"
    moment = some_moment()
    moment = torch.tril(moment) + torch.tril(moment, -1).T
    save_moment(path, moment, ABOUT)
    return path, moment


def test_a_stored_moment_comes_back_bit_for_bit(stored):
    path, moment = stored
    assert torch.equal(load_moment(path, D_FF, ABOUT), moment)
    assert torch.equal(load_moment(path, D_FF), moment)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_holds_one_triangle(stored):
    path, _ = stored
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("second_moment").shape == (D_FF * (D_FF + 1) // 2,)
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + header + 4 * D_FF * (D_FF + 1) // 2


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def put_foreign_file(path):
    save_file({"weight": torch.zeros(3)}, path)


def put_other_format(path):
    save_file({"second_moment": torch.zeros(D_FF * (D_FF + 1) // 2)}, path, {"format": "other"})


def put_nan(path):
    moment = some_moment()
    moment[3, 2] = float("nan")
    save_moment(path, moment, ABOUT)


def put_negative_diagonal(path):
    moment = some_moment()
    moment[3, 3] = -1
    save_moment(path, moment, ABOUT)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "not a readable file"),
        (empty, "not a readable file"),
        (flip_a_bit, "checksum"),
        (put_foreign_file, "not a readable file"),
        (put_other_format, "format 'other'"),
        (put_nan, "NaN"),
        (put_negative_diagonal, "negative diagonal"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_by_name(stored, damage, reason):
    path, _ = stored
    damage(path)
    with pytest.raises(BadMoments, match=reason) as caught:
        load_moment(path, D_FF)
    assert str(path) in str(caught.value)


def test_a_file_of_another_width_or_origin_is_refused(stored):
    path, _ = stored
    with pytest.raises(BadMoments, match="made for d_ff 48, the model has 49"):
        load_moment(path, 49)
    with pytest.raises(BadMoments, match="weights is 'w', wanted 'v'"):
        load_moment(path, D_FF, {**ABOUT, "weights": "v"})
    with pytest.raises(BadMoments, match="source is None, wanted 'text'"):
        load_moment(path, D_FF, {**ABOUT, "source": "text"})


def test_a_damaged_file_in_the_cache_is_neither_used_nor_replaced(random_adapter, source, folder):
    second_moments(random_adapter, [1], source, CONFIG, folder)
    [path] = folder.iterdir()
    flip_a_bit(path)
    damaged = path.read_bytes()
    with pytest.raises(BadMoments, match="checksum"):
        second_moments(random_adapter, [1], source, CONFIG, folder)
    assert path.read_bytes() == damaged


def test_without_a_cache_it_goes_on_with_the_same_bits(random_adapter, source, folder, tmp_path, monkeypatch, caplog):
    """A file in place of the folder fails for every user, root too."""
    stored = second_moments(random_adapter, [1, 2], source, CONFIG, folder)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "file"))
    computed = second_moments(random_adapter, [1, 2], source, CONFIG)
    assert all(torch.equal(computed[layer], stored[layer]) for layer in (1, 2))
    assert caplog.text.count("FASTEDIT_CACHE names another folder") == 2

    # A folder that was named is one that is wanted.
    with pytest.raises(PlaceError, match="name another place"):
        second_moments(random_adapter, [1], source, CONFIG, tmp_path / "file" / "moments")
