"""The edited model as an ordinary checkpoint: in the dtype that it came in, read back and compared."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastedit.model.adapter import ModelAdapter
from fastedit.model.save import read_tokenizer, write_model
from fastedit.model.tokens import encode
from fastedit.runtime.hashing import tensors_hash
from fastedit.runtime.places import NotSaved, equal_bits
from fastedit.weights.editable import EditableWeights

# What a tokenizer must read as before: cases, digits, white space, scripts, the characters of chat templates.
TEXTS = (
    "The capital of France is Paris.",
    " a\nline break,  two spaces\tand a tab\n\n",
    "0123456789 3.14 <|im_start|>user [INST] </s>",
    "Zürich, 東京, Москва, العربية, 🙂 e\u0301",
)


def rounded_weights(
    model: ModelAdapter, weights: EditableWeights, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The model's state dict as it is to be saved. Tensors that are one in the model are one here.

    dtype: of all weights; None = that of each tensor in the checkpoint that the model was loaded from. An edited weight
        in half precision is rounded from its float32 master
    Raises ValueError for a weight that is too large for the dtype."""
    rounded: dict[Hashable, Tensor] = {}
    found = {}

    for name, tensor in model.state().items():
        wanted = _saved_dtype(model, name, tensor, dtype)
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), wanted

        if key not in rounded:
            rounded[key] = tensor if wanted == tensor.dtype else _exact(model, weights, name, tensor).to(wanted)
            if wanted == torch.float16 and bool(rounded[key].isinf().any()):
                raise ValueError(
                    f"{name} has numbers up to {float(tensor.abs().max()):.3g}, and float16 ends at 65504: save in"
                    " another dtype"
                )
        found[name] = rounded[key]

    return found


def _saved_dtype(model: ModelAdapter, name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor of the state dict is saved."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if dtype is not None:
        return dtype
    if model.stored is None:
        return tensor.dtype

    return model.stored.of(name)


def _exact(model: ModelAdapter, weights: EditableWeights, name: str, tensor: Tensor) -> Tensor:
    """The master of an edited weight in half precision, in the model's layout; every other tensor as it is."""
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor

    layers = {model.weight_name(layer): layer for layer in weights.layers}
    if name not in layers:
        return tensor

    layer = layers[name]
    return model.oriented(layer, weights.stored(layer))


def write_checkpoint(
    model: ModelAdapter, tensors: Mapping[str, Tensor], folder: Path, texts: Sequence[str], max_shard_size: str = "5GB"
) -> str | None:
    """Write tensors (of `rounded_weights`), config and tokenizer as transformers reads them; read back and compare.

    folder: an empty one
    texts: that the tokenizer should read as before, beside `TEXTS`
    Returns what is wrong with the tokenizer that was written, a sentence or None: the weights are good, so they are
    kept. Raises NotSaved for files that hold other weights."""
    write_model(model, folder, tensors, max_shard_size)
    # transformers writes the dtype of the model in memory.
    _write_dtype(folder / "config.json", tensors)

    _compare_tensors(folder, tensors)
    return _wrong_tokens(folder, model.tokenizer, [*TEXTS, *texts])


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most of the numbers."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()

    return max(sizes, key=lambda dtype: sizes[dtype])


def _write_dtype(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put the dtype of the saved tensors into a config.json, wherever it names one."""
    name = str(main_dtype(tensors)).removeprefix("torch.")

    def with_dtype(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {
            key: name if key in ("dtype", "torch_dtype") and isinstance(value, str) else with_dtype(value)
            for key, value in part.items()
        }

    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(with_dtype(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compare_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise NotSaved unless the safetensors files hold these tensors, bit for bit.

    transformers gives some tensors other names than the model has, and writes tied ones once. Such a tensor must be
    found by its bytes."""
    unread = dict(tensors)
    renamed = []

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (no dict)
                tensor = stored.get_tensor(name)
                wanted = unread.pop(name, None)
                if wanted is None:
                    renamed.append((name, _digest(tensor)))
                elif not equal_bits(tensor, wanted):
                    raise NotSaved(f"{file.name}: {name} is not as it was written; nothing was kept, try again")

    saved = {tensor.data_ptr() for name, tensor in tensors.items() if name not in unread}
    missing = {name: _digest(tensor) for name, tensor in unread.items() if tensor.data_ptr() not in saved}
    strange = [name for name, digest in renamed if digest not in missing.values()]
    lost = [name for name, digest in missing.items() if digest not in dict(renamed).values()]
    if strange or lost:
        raise NotSaved(
            f"{folder.name}: {(strange + lost)[0]} is not in the files as it is in the model; nothing was kept"
        )


def _digest(tensor: Tensor) -> str:
    return tensors_hash({"": tensor})


def _wrong_tokens(folder: Path, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """What is wrong where the saved tokenizer does not read the texts as the model's does, as a sentence; else None."""
    advice = "copy the tokenizer's files from the model's source"
    try:
        saved = read_tokenizer(str(folder))
        (wanted, _), (found, _) = encode(tokenizer, texts), encode(saved, texts)
    except Exception as error:  # noqa: BLE001 (transformers and tokenizers raise anything)
        return f"the tokenizer that was written cannot be read again ({type(error).__name__}: {error}): {advice}"

    for text, right, wrong in zip(texts, wanted, found, strict=True):
        if right != wrong:
            at = next((i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), len(wrong))
            return (
                f"the tokenizer that was written reads {text[:40]!r} otherwise than the model's: token {at} is"
                f" {wrong[at : at + 1] or 'missing'}, not {right[at : at + 1] or 'missing'}: {advice}"
            )

    return None
