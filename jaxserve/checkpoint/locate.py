"""Finds the directory of a model from what a user calls it."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path
from typing import cast

from jaxserve.checkpoint.files import COMPANIONS, expanded
from jaxserve.checkpoint.remote import is_address, mirror
from jaxserve.errors import CheckpointError

EMBEDDED = ("tiny", "tiny-draft")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = [*COMPANIONS, "*.safetensors", "*.safetensors.index.json"]
# Folders hold the same weights for other programs; "consolidated" files too.
_UNWANTED = ["*/*", "consolidated*"]


def locate(name: str | Path) -> Path:
    """Returns the directory of an embedded model, a checkpoint directory, or a hub model.

    Of a checkpoint in an object store (gs://BUCKET/FOLDER) that is a folder with all but the
    weights, which are read from there.

    A hub model (OWNER/NAME) is downloaded once into the cache of huggingface_hub, whose
    environment variables hold: `HF_HUB_OFFLINE=1` takes what is cached and asks nobody.

    Raises:
        CheckpointError: there is nothing of that name.
    """
    if name in EMBEDDED:
        return _embedded(str(name))
    if is_address(name):
        return mirror(str(name))
    path = expanded(name)
    # An empty path would be the current directory.
    if path.is_dir() and name != "":
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the directory it is in: {path.parent}")
    if isinstance(name, str) and _HUB_NAME.fullmatch(name):
        return _download(name)
    raise CheckpointError(
        f"{str(name)!r} is not a model: there is no directory of that name, it is none of the "
        f"embedded models ({', '.join(EMBEDDED)}), a name on the hub reads OWNER/NAME, and one "
        "in an object store gs://BUCKET/FOLDER"
    )


def _embedded(name: str) -> Path:
    path = Path(str(files("jaxserve").joinpath("data", name)))
    if not path.is_dir():
        raise CheckpointError(
            f"the embedded model {name!r} is missing from this installation ({path}); "
            "install jaxserve again"
        )
    return path


def _download(name: str) -> Path:
    import huggingface_hub  # only names on the hub need it
    from huggingface_hub.errors import HfHubHTTPError

    # A broken connection comes through as the HTTP client's own error, whichever client it is.
    client_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except (client_error, OSError, ValueError) as error:
        # OSError: no network, or not in the cache. ValueError: a name the hub does not allow.
        raise CheckpointError(_hub_message(name, error)) from error
    return Path(found)


def _hub_message(name: str, error: Exception) -> str:
    start = f"{name!r} is no directory here, and "
    if os.environ.get("HF_HUB_OFFLINE"):
        return (
            f"{start}is not in the cache of downloaded models, and HF_HUB_OFFLINE is set; "
            "unset it to download, or give a directory"
        )
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{start}could not be downloaded from the hub ({type(error).__name__}: {reason:.300}); "
        "check the name, the network and, for a gated model, `hf auth login`"
    )
