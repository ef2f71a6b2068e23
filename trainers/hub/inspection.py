"""
A look at somebody's student before its code may run: the repository is fetched as data and checked as one of our own
would be before it is published ([`trainers.hub.verify`]).

    inspection = inspect_student("somebody/student", revision="v1")

Names and sizes are judged before anything is fetched, nothing is unpickled or imported, and what was fetched is
deleted again.
"""

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from trainers.files import sha256
from trainers.heads.head_map import REPO_ID
from trainers.hub.hub_upload import naming_hub_errors
from trainers.hub.staging import code_files
from trainers.hub.verify import PICKLES, verify


# Plain names below one another; what a file system could read as a way out, or as an option, is not among them.
SAFE_PATH = re.compile(r"(?!.*\.\.)[\w.][\w.+-]*(/[\w.][\w.+-]*)*")
# A tokenizer is the largest of all files but the weights.
MAX_BYTES = 64 * 2**20
MAX_FILES = 500


@dataclass(frozen=True)
class Inspection:
    """
    What is known of a student that passed every check.

    Args:
        source (`str`):
            Hub id or folder.
        commit (`str`, *optional*):
            Commit that was looked at, to pin.
        own_code (`bool`):
            Whether its Python files are, byte for byte, those of this hf-rad.
    """

    source: str
    commit: str | None
    own_code: bool


def inspect_student(source: str | os.PathLike, revision: str | None = None, progress: bool = False) -> Inspection:
    """
    Checks a published student without running anything of it.

    Args:
        source (`str` or `os.PathLike`):
            Folder or Hub id.
        revision (`str`, *optional*):
            Commit, tag or branch of the Hub repository.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        `FileNotFoundError`, `ValueError`: at the first thing that is wrong, as [`~trainers.hub.verify.verify`] says it.
        `OSError`: when there is no such repository, or the Hub cannot be reached.
    """
    if Path(source).is_dir() or not REPO_ID.fullmatch(str(source)):
        verify(source, progress)
        return Inspection(str(source), None, _has_own_code(Path(source)))
    source = str(source)
    with tempfile.TemporaryDirectory(prefix="inspection-") as work, naming_hub_errors(source):
        commit = HfApi().repo_info(source, revision=revision).sha
        check_listing([item for item in HfApi().list_repo_tree(source, recursive=True, revision=commit)])
        (enable_progress_bars if progress else disable_progress_bars)()
        folder = Path(snapshot_download(source, revision=commit, local_dir=f"{work}/student"))
        verify(folder, progress)
        return Inspection(source, commit, _has_own_code(folder))


def check_listing(entries: list) -> None:
    """
    Judges the files of a repository by name and size.

    Args:
        entries (`list`):
            Entries of [`~huggingface_hub.HfApi.list_repo_tree`].

    Raises:
        `ValueError`: when one leads out of the folder, could run code when it is loaded, or is far too large.
    """
    if len(entries) > MAX_FILES:
        raise ValueError(f"The repository has {len(entries)} files and folders, more than the {MAX_FILES} looked at.")
    for entry in entries:
        if not SAFE_PATH.fullmatch(entry.path):
            raise ValueError(f"The repository has a file named {entry.path!r}, which may lead out of its folder.")
        if not isinstance(entry, RepoFile):
            continue
        if entry.path.lower().endswith(PICKLES):
            raise ValueError(f"{entry.path} could run code when it is loaded; use students with safetensors only.")
        if entry.size > MAX_BYTES and not entry.path.endswith(".safetensors"):
            raise ValueError(
                f"{entry.path} has {entry.size} bytes, more than the {MAX_BYTES} allowed for such a file."
            )


def _has_own_code(folder: Path) -> bool:
    return all(sha256(file) == sha256(folder / file.name) for file in code_files())
