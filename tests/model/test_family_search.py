"""What is said of a model that no row fits: which modules it has, which row is nearest, and a row to start from."""

import pytest
import transformers
from transformers import MptConfig, MptForCausalLM

from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES, LLAMA, OPT, Family, UnsupportedModel
from fastedit.model.family_file import read_family
from fastedit.model.family_search import choose, starting_row


@pytest.fixture
def mpt():
    """A model of no family that has a row."""
    return MptForCausalLM(MptConfig(vocab_size=320, d_model=32, n_layers=2, n_heads=4))


@pytest.fixture
def biogpt():
    """A model that computes what an OPT does, under other names, and that no row ships for."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    config = transformers.BioGptConfig(
        **sizes, **ids, intermediate_size=48, max_position_embeddings=64, initializer_range=0.2
    )
    return transformers.BioGptForCausalLM(config).eval()


def refused(model, families=FAMILIES):
    with pytest.raises(UnsupportedModel) as caught:
        choose(model, families)
    return caught.value


def test_the_error_is_one_sentence_with_the_modules_and_the_nearest_row(mpt, random_tokenizer):
    with pytest.raises(UnsupportedModel, match="MptForCausalLM: no known family fits") as caught:
        ModelAdapter(mpt, random_tokenizer)
    message = str(caught.value)
    assert "comes closest, but has no " in message
    assert "transformer.blocks holds norm_1, attn.Wqkv, attn.out_proj, norm_2, ffn.up_proj, ffn.down_proj" in message
    assert "--family FILE" in message
    assert "\n" not in message
    assert len(message) < 500


def test_the_notes_hold_a_row_to_start_from_all_fields_and_all_rows(mpt):
    start, needs = refused(mpt).__notes__
    assert "like: gptj\nname: mpt\nlayers: transformer.blocks\n" in start
    assert (
        "gate: ffn.up_proj\ndown: ffn.down_proj\nattention_norm: norm_1\nffn_norm: norm_2\nparallel: false\n" in start
    )
    for field in Family.__dataclass_fields__.values():
        assert f"  {field.name}" in needs
        assert field.metadata["what"] in needs
    for row in FAMILIES:
        assert row.name in needs


def test_the_start_can_be_pasted_and_is_the_models_row(biogpt, random_tokenizer, tmp_path):
    start, _ = refused(biogpt).__notes__
    (tmp_path / "family.yaml").write_text(start.partition("\n\n")[2], encoding="utf-8")
    adapter = ModelAdapter(biogpt, random_tokenizer, families=(read_family(tmp_path / "family.yaml"),))
    adapter.check_forward(1e-5)
    assert (adapter.family.name, adapter.n_layers, adapter.d_ff) == ("biogpt", 3, 48)


def test_the_nearest_row_is_that_of_the_layers_wherever_they_are(random_llama):
    random_llama.model.blocks = random_llama.model.layers
    del random_llama.model.layers
    assert "'llama' comes closest, but has no model.layers" in str(refused(random_llama))
    assert starting_row(random_llama, LLAMA, "model.blocks") == "like: llama\nname: llama\nlayers: model.blocks\n"


def test_a_row_of_ones_own_that_does_not_fit_says_why(biogpt):
    error = refused(biogpt, (OPT,))
    assert "'opt' comes closest, but has no model.decoder.layers" in str(error)
    assert "and 3 more" in str(error)


def test_a_model_without_layers_has_no_start(biogpt):
    del biogpt.biogpt.layers
    (needs,) = refused(biogpt).__notes__
    assert "like:" not in needs
