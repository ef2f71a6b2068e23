"""
Fetches transformers' own model tests: from the source distribution of the very version that is installed.

Nothing of them is kept in this repository. The file goes to the cache folder, once for each version.
"""

import ast
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

from trainers.files import atomic_path


MEMBER = "tests/test_modeling_common.py"


def fetch(version: str = transformers.__version__) -> Path:
    """
    Makes sure that the tests are there.

    Args:
        version (`str`, *optional*, defaults to the installed version):
            Version of transformers.

    Returns:
        `Path`: the file `test_modeling_common.py`, in a folder of its version.

    Raises:
        `OSError`: when pip cannot download the source distribution.
    """
    cache = Path(os.environ.get("HF_RAD_CACHE") or Path.home() / ".cache" / "hf-rad").expanduser()
    target = cache / f"transformers-{version}" / MEMBER
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--no-binary", "transformers", "--dest", work, f"transformers=={version}"]
        code = subprocess.run(command, stdout=2).returncode
        archives = list(Path(work).glob("transformers-*.tar.gz"))
        if code or not archives:
            raise OSError(
                f"pip could not download the source of transformers {version} (exit code {code}, its own message stands "
                "above). Check that this machine reaches a package index."
            )
        with tarfile.open(archives[0]) as archive:
            source = archive.extractfile(f"transformers-{version}/{MEMBER}").read().decode()
    with atomic_path(target) as path:
        path.write_text(source, encoding="utf-8")
    return target


def missing_modules(source: Path) -> dict[str, list[str]]:
    """What a test file imports from beside it (`from .module import names`), by module."""
    nodes = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
    return {
        node.module: [alias.name for alias in node.names]
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.level == 1
    }
