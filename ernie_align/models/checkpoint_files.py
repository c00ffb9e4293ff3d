"""Read the small files of a checkpoint (config, tokenizer, processor) from a folder or the hub, without torch."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.errors import ModelError

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

# Files that a folder of weights needs to be loadable on its own: copied, never rewritten.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "*.ttf",
)


@functools.cache
def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(PROCESSOR_FILES)))


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint. name: folder or hub id; revision: on the hub; where: what errors point at."""

    name: str
    revision: str | None = None
    where: str = ""

    @property
    def is_folder(self) -> bool:
        """True for an existing folder, or a name that cannot be a hub id."""
        path = Path(self.name)
        looks_local = not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name) or self.name.startswith(".")
        return path.exists() or looks_local or ("/" in self.name and Path(path.parts[0]).is_dir())

    @property
    def folder(self) -> Path:
        """The folder itself, or the snapshot in the hub cache."""
        if self.is_folder:
            return Path(self.name)
        fetched = self._fetch("config.json") or self._fetch("adapter_config.json")
        if fetched is None:
            raise self._missing("config.json")
        return fetched.parent

    def read_json(self, file: str, *, required: bool = True) -> dict[str, Any] | None:
        """Read a JSON file of the checkpoint. Raises ModelError if it is missing (and required) or invalid."""
        path = self._fetch(file)
        if path is None:
            if not required:
                return None
            raise self._missing(file)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError.at(str(path), f"not valid JSON: {error}", fix="restore the file") from None
        if not isinstance(values, dict):
            raise ModelError.at(str(path), "expected a JSON object", fix="restore the file")
        return values

    def require(self, file: str) -> None:
        """Raise ModelError if the checkpoint has no such file."""
        if self._fetch(file) is None:
            fix = "save it as safetensors where it was trained: pickle files can run code, and are not loaded"
            raise ModelError.at(self.where or self.name, f"{self.name} has no {file}", fix=fix)

    @property
    def is_adapter(self) -> bool:
        """True for an adapter in PEFT's format without a model."""
        return self._fetch("config.json") is None and self._fetch("adapter_config.json") is not None

    def image_settings(self) -> dict[str, Any]:
        """Read the image processor's settings, nested in processor_config.json or in preprocessor_config.json."""
        nested = (self.read_json("processor_config.json", required=False) or {}).get("image_processor")
        return nested or self.read_json("preprocessor_config.json")

    def tokenizer(self) -> TokenizersBackend:
        """Load the tokenizer with its chat template. Raises ModelError if either is missing."""
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        # The class that transformers uses for this family, whatever tokenizer_config.json names.
        try:
            tokenizer = TokenizersBackend.from_pretrained(self.name, revision=self.revision)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError.at(self.where or self.name, f"no tokenizer could be loaded: {reason}") from error
        if tokenizer.chat_template is None:
            legacy = self.read_json("chat_template.json", required=False) or {}
            tokenizer.chat_template = legacy.get("chat_template")
        if tokenizer.chat_template is None:
            fix = "put a chat_template.jinja into the folder; base models need one before chat training"
            raise ModelError.at(self.where or self.name, "the checkpoint has no chat template", fix=fix)
        return tokenizer

    def fingerprint(self, adapter: str | None = None) -> str:
        """Hash the weights (SHA-256 of the files, or the commit of a hub model), and those in an adapter's folder."""
        digest = hashlib.sha256()
        folders = [Path(adapter)] if adapter else []
        if self.is_folder:
            folders.append(Path(self.name))
        else:
            digest.update(f"{self.name} {self._fetch('config.json').parent.name}".encode())  # snapshots/<commit>/
        for folder in folders:
            for path in sorted(folder.glob("*.safetensors")):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def copy_processor(self, folder: str | Path) -> None:
        """Copy tokenizer, chat template and processor files into `folder`, byte for byte."""
        source = Path(self.name) if self.is_folder else _snapshot(self.name, self.revision)
        for path in source.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in PROCESSOR_FILES):
                shutil.copyfile(path, Path(folder) / path.name)

    def _fetch(self, file: str) -> Path | None:
        if self.is_folder:
            path = Path(self.name) / file
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, revision=self.revision))
        except LocalEntryNotFoundError as error:  # not in the cache, and the hub is unreachable
            raise self._unreachable(error) from error
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise self._unreachable(error) from error

    def _missing(self, file: str) -> ModelError:
        where, path = self.where or self.name, Path(self.name)
        if self.is_folder and not path.is_dir():
            return ModelError.at(
                where, f"no such folder: {self.name}", fix="give the folder of a checkpoint or a hub id"
            )
        return ModelError.at(where, f"{self.name} has no {file}", fix="give the folder of a complete checkpoint")

    def _unreachable(self, error: Exception) -> ModelError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"{self.name} is not a local folder and could not be read from the hub: {reason}"
        return ModelError.at(self.where or self.name, what, fix="check the name, the revision and the network")
