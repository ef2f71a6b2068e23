"""Reading and writing artefacts so that a killed run or a full disk never leaves half a file under its final name."""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yields a temporary path beside `path`; moves it into place when the block ends without an error, deletes it otherwise.

    Args:
        path (`str` or `os.PathLike`):
            Final name of the file. Its folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner reads; an artefact is as readable as any other file.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(value: object) -> str:
    """Returns `value` as indented JSON, each innermost list on one line."""

    # Within strings JSON writes a line break as two characters, so only the layout's own breaks match.
    def on_one_line(found: re.Match) -> str:
        return "[" + re.sub(r",\n\s*", ", ", found[1]) + "]"

    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]", on_one_line, text) + "\n"


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes `value` as [`json_text`], atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")


def read_json(path: str | os.PathLike, max_bytes: int = 64 * 2**20) -> object:
    """
    Reads a JSON file.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when the file is larger than `max_bytes` or is not JSON; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {max_bytes} allowed for such a file.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a JSON file ({error}). Write it anew with the command that made it."
        ) from error


def sha256(path: str | os.PathLike) -> str:
    """Returns the hexadecimal SHA-256 digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
