"""Another user's machine: a process of its own that cannot import our packages, with its own cache and token."""

import json
import os
import subprocess
import sys
from pathlib import Path

from trainers.hub import reload


PRELUDE = f"""
import json, runpy, sys
sys.meta_path.insert(0, runpy.run_path({str(reload.SCRIPT)!r})["Blocker"]({reload.BLOCKED!r}))
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
"""


def run_as_stranger(code: str, home: Path, **environment: str) -> object:
    """
    Runs `code` and returns what it prints as JSON in its last line.

    Args:
        code (`str`):
            Python code; torch, json and the Auto classes are imported.
        home (`Path`):
            The user's `HF_HOME`.
        **environment:
            Further environment variables, such as `HF_TOKEN`.
    """
    home.mkdir(parents=True, exist_ok=True)
    process = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + code],
        env={**os.environ, "HF_HOME": str(home), "TRANSFORMERS_VERBOSITY": "error", **environment},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.strip().splitlines()[-1])
