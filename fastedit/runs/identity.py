"""Which model a run began with, and on which machine."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES
from fastedit.model.family_file import as_data
from fastedit.model.lora import stored_name
from fastedit.ops import cpp
from fastedit.ops._dispatch import PACKAGES, wanted
from fastedit.runs.log import RunError
from fastedit.runtime.hashing import canonical, tensor_bytes, tensors_hash

if TYPE_CHECKING:
    from fastedit.weights.editable import EditableWeights

log = logging.getLogger(__name__)

# Entries hashed of each weight that is not edited.
SAMPLED = 1024


class WrongModel(RunError):
    """The model is not the one that the run began with."""


def identity(model: ModelAdapter, weights: EditableWeights) -> dict[str, Any]:
    """What tells one model from another: hashes of the weights that may be edited, as they were before any edit, of a
    sample of all others, and of the tokenizer; and the entries of its config."""
    return {
        "class": type(model.model).__name__,
        "source": model.source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "edited": {str(layer): tensors_hash({"weight": weights.original(layer)}) for layer in weights.layers},
        "other": _other_weights_hash(model, {model.weight_name(layer) for layer in weights.layers}),
        "tokenizer": _tokenizer_hash(model),
        "config": _deciding_settings(model),
        **_own_family(model),
    }


def _own_family(model: ModelAdapter) -> dict[str, Any]:
    """The row of the model's family, if it is none of those that ship; without its fields if data cannot hold them."""
    row = model.family
    if row in FAMILIES:
        return {}

    data = as_data(row)

    return {"family": {"name": row.name, **({} if data is None else {"row": data})}}


def _other_weights_hash(model: ModelAdapter, edited: set[str]) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.model.state_dict().items():
        if (stored_name(name) if model.has_adapters else name) in edited:
            continue

        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(flat[:: max(1, flat.numel() // SAMPLED)]))
    return digest.hexdigest()


def _tokenizer_hash(model: ModelAdapter) -> str:
    parts = json.loads(model.tokenizer.backend_tokenizer.to_str())
    # The last call sets these two, they are not the tokenizer's own.
    parts = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


# Entries of a config that decide no logit of an evaluated model: names, and beginnings or ends of names.
UNDECIDING = frozenset(
    {"architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_decoder", "is_encoder_decoder", "label2id"}
    | {"max_position_embeddings", "name_or_path", "output_attentions", "output_hidden_states", "pretraining_tp"}
    | {"problem_type", "quantization_config", "return_dict", "tokenizer_class", "torch_dtype", "torchscript"}
    | {"transformers_version", "use_cache", "vocab_size", "finetuning_task", "prefix", "task_specific_params"}
    # Of generation, which older releases keep in every config.
    | {"add_cross_attention", "bad_words_ids", "cross_attention_hidden_size", "diversity_penalty", "do_sample"}
    | {"early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty"}
    | {"max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"}
    | {"output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens"}
    | {"begin_suppress_tokens", "temperature", "tf_legacy_loss", "top_k", "top_p", "typical_p", "use_bfloat16"}
    | {"pruned_heads"}
)
UNDECIDING_STARTS = ("_", "initializer", "init_", "summary_", "attn_implementation")
UNDECIDING_ENDS = ("_token_id", "dropout", "pdrop")


def _deciding_settings(model: ModelAdapter) -> dict[str, Any]:
    """Entries of the text decoder's config that may decide its logits, such as rms_norm_eps, as plain data."""
    settings = json.loads(json.dumps(model.text_config.to_dict(), default=str))

    return {
        name: value
        for name, value in sorted(settings.items())
        if name not in UNDECIDING and not name.startswith(UNDECIDING_STARTS) and not name.endswith(UNDECIDING_ENDS)
    }


def _config_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Entries that both configs have and that differ. Releases of transformers name some entries otherwise."""
    return [f"{name} is {now[name]!r}, was {was[name]!r}" for name in was if name in now and now[name] != was[name]]


def machine() -> dict[str, Any]:
    """What the bits of a result depend on besides the model."""
    return {
        "fastedit": _own_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "processor": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "backend": wanted() or "automatic",
        "kernels": _kernels(),
    }


def _own_version() -> str:
    try:
        return version("fastedit-engine")
    except PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    """The kinds of kernels that run in this process, and the instruction set of those in C++."""
    kinds = [name for name, package in PACKAGES.items() if importlib.import_module(package).missing() is None]
    if "cpp" not in kinds:
        return ", ".join(kinds) or "none"

    number, _ = cpp.setting()
    return ", ".join([*kinds[:-1], f"cpp {cpp.compiled().ISAS[number]}"])


def machine_changes(header: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What `machine` says now and what the run says, by name, where the two differ.

    What a run of an earlier version does not say is no difference. Neither is the version of fastedit: its results stay
    the same."""
    was = header["machine"]
    now = machine()
    return {
        name: (now[name], was[name]) for name in now if name != "fastedit" and name in was and now[name] != was[name]
    }


def check_model(header: Mapping[str, Any], model: ModelAdapter, weights: EditableWeights) -> None:
    """Raise WrongModel, saying what differs, unless this is the model the run began with, unedited."""
    was = header["model"]
    now = identity(model, weights)

    wrong = [f"{name} is {now[name]!r}, was {was[name]!r}" for name in ("class", "dtype") if now[name] != was[name]]

    layers = sorted({*was["edited"], *now["edited"]}, key=int)
    differ = [layer for layer in layers if was["edited"].get(layer) != now["edited"].get(layer)]
    if differ:
        wrong.append(f"the weights of layers {', '.join(differ)} differ")
    if was["other"] != now["other"]:
        wrong.append("weights that are not edited differ")
    if was["tokenizer"] != now["tokenizer"]:
        wrong.append("the tokenizer differs")
    # Runs of earlier versions did not record it.
    wrong += [f"its config differs: {text}" for text in _config_differences(was.get("config", {}), now["config"])]

    if wrong:
        raise WrongModel(f"not the model that the run began with ({was['source'] or 'unnamed'}): {'; '.join(wrong)}")


def compare_machine(header: Mapping[str, Any]) -> None:
    """Warn when the run began on another kind of machine, with other libraries or with other kernels."""
    changes = [f"{name} {now} instead of {was}" for name, (now, was) in machine_changes(header).items()]
    if changes:
        log.warning("results may differ in their last bits from an uninterrupted run: %s", ", ".join(changes))
