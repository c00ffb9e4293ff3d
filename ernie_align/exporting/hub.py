"""The upload of a finished folder to the hub, and only when it is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from ernie_align.errors import ExportError


def check_push(name: str) -> None:
    """Whether an upload can begin at all, asked before anything is merged. Raises ExportError."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ExportError.at("--push", f"{name!r} is no repository", fix="write owner/name")
    if get_token() is None:
        raise ExportError.at("--push", "nobody is logged in to the hub", fix="run hf auth login, or set HF_TOKEN")


def push_folder(folder: Path, name: str) -> str:
    """Upload to the repository, which is made private if it is not there. Its address.

    Raises ExportError; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Exported by ernie-align")
    except Exception as error:  # network, rights, quota: each has a class of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = f"the export itself is whole: try again with hf upload {name} {folder}"
        raise ExportError.at("--push", f"{folder} was not uploaded: {reason}", fix=fix) from error
    return str(address)
