"""What is asked of the hub before a model is loaded: whether it answers, and whether the model is one."""

from __future__ import annotations

import json
from pathlib import Path

from fastedit.model.load_errors import NotLoadable

# How long the hub may take to say what a model consists of, in seconds.
PATIENCE = 5

ADAPTER = "adapter_config.json"


class HubError(NotLoadable):
    """The hub cannot be reached and its cache has no copy, it has no such model, or no model can have that name."""


class HoldsAdapter(NotLoadable):
    """An adapter (LoRA and the like) lies where a model was expected."""


def must_use_cache(hub_id: str) -> bool:
    """Whether the hub cannot be reached, so that only its cache can be read. Asks once, and never tries again.

    Raises HubError for a name that is no hub id, and for a model that is neither on the hub nor in the cache;
    HoldsAdapter."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        files = HfApi().model_info(hub_id, timeout=PATIENCE).siblings or []
    except GatedRepoError as error:
        raise HubError("the hub gives it only to those who asked for access: ask on its page, and log in") from error
    except RepositoryNotFoundError as error:
        raise HubError("the hub has no model of that name, or shows it only to those who are logged in") from error
    except HFValidationError as error:
        raise HubError(
            "that can be no hub id, which is NAME or OWNER/NAME of letters, digits, '-', '_' and '.', 96 at most"
        ) from error
    except HfHubHTTPError:
        # It answers, so that what is wrong is better told by loading.
        return False
    except Exception as error:
        if _cached(hub_id, "config.json") is None:
            raise HubError(f"cannot reach the hub ({_cause(error)}), and its cache holds no copy") from error
        _refuse_adapter_file(_cached(hub_id, ADAPTER))
        return True

    if any(file.rfilename == ADAPTER for file in files):
        raise HoldsAdapter(_what_to_do(None))

    return False


def refuse_adapter(folder: Path) -> None:
    """Raise HoldsAdapter for a folder that holds an adapter instead of, or beside, a model."""
    _refuse_adapter_file(folder / ADAPTER)


def _refuse_adapter_file(file: Path | None) -> None:
    if file is None or not file.is_file():
        return

    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None

    raise HoldsAdapter(_what_to_do(base))


def _what_to_do(base: str | None) -> str:
    of = f" of {base}" if base else ""
    return (
        f"it holds an adapter{of} and no model: load it with peft and give the PeftModel to Editor.from_model, or merge"
        " it into its base model (peft's merge_and_unload), save that, and give the saved folder"
    )


def _cached(hub_id: str, file: str) -> Path | None:
    """A file of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, file)
    return Path(found) if isinstance(found, str) else None


def _cause(error: BaseException) -> str:
    """Why the hub was not reached: the first cause that has words, on one line."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it"

    said = str(error)
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
        said = str(error) or said

    return " ".join(said.split()) or type(error).__name__
