"""
The last check of a student: a fresh process with an empty cache and without our packages loads it from where it was
published, and must give the same logits.

    result = reload_check("runs/demo/published", prompt="The capital of France is")
    result = reload_check("me/student", revision="v1", reference="runs/demo/published")
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import get_token
from safetensors.torch import load_file

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.files import read_json


BLOCKED = ["modeling_rad_hybrid", "trainers", "hub_cards"]
SCRIPT = Path(__file__).with_name("fresh_load.py")
CACHES = (
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_MODULES_CACHE",
    "HF_ASSETS_CACHE",
    "HF_XET_CACHE",
    "HF_TOKEN_PATH",
)
# Odd, so that the chunked scan ends in the middle of a chunk.
BATCH, TOKENS = 2, 77


@dataclass(frozen=True)
class ReloadResult:
    """
    What a fresh process saw.

    Args:
        max_difference (`float`):
            Greatest absolute difference between its logits and ours, in float32.
        text (`str`):
            Its greedy answer to the prompt.
        module (`str`):
            Module that its model class came from, `transformers_modules...` for code that came with the student.
    """

    max_difference: float
    text: str
    module: str


def reload_check(
    source: str | os.PathLike,
    revision: str | None = None,
    reference: str | os.PathLike | None = None,
    prompt: str = "My name is",
    max_new_tokens: int = 20,
    tolerance: float = 1e-4,
    token: str | None = None,
) -> ReloadResult:
    """
    Loads a published student as a stranger would and compares.

    Args:
        source (`str` or `os.PathLike`):
            Folder or Hub id to load from.
        revision (`str`, *optional*):
            Commit, tag or branch of the Hub repository.
        reference (`str` or `os.PathLike`, *optional*):
            Folder of the same student, loaded here by our own package; by default `source`, if that is a folder.
        prompt (`str`, *optional*, defaults to `"My name is"`):
            Text to continue greedily.
        max_new_tokens (`int`, *optional*, defaults to `20`):
            Most tokens to generate.
        tolerance (`float`, *optional*, defaults to `1e-4`):
            Greatest difference of logits that is taken for equal.
        token (`str`, *optional*):
            Access token for the Hub; by default the one of this login.

    Returns:
        [`ReloadResult`]: what the fresh process saw.

    Raises:
        `ValueError`: when it cannot load the student, or its logits differ by more than `tolerance`.
    """
    local = Path(source).is_dir()
    reference = reference or source
    if not Path(reference).is_dir():
        raise ValueError(f"To compare {source} with something, name the folder it was published from as `reference`.")
    # transformers cannot load a folder by the name `.`; an absolute path always has one.
    source = str(Path(source).resolve()) if local else str(source)
    model = RadHybridForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS), generator=generator)
    with torch.no_grad():
        expected = model(input_ids).logits  # [B, T, V]
    del model

    with tempfile.TemporaryDirectory(prefix="fresh-process-") as work:
        job = {"source": source, "revision": revision, "input_ids": input_ids.tolist(), "blocked": BLOCKED}
        job |= {"prompt": prompt, "max_new_tokens": max_new_tokens}
        job |= {"logits": f"{work}/logits.safetensors", "result": f"{work}/result.json"}
        # -I: neither the working directory nor PYTHONPATH nor the user's own packages are on its path.
        process = subprocess.run(
            [sys.executable, "-I", str(SCRIPT)],
            input=json.dumps(job),
            env=_environment(work, local, token),
            cwd=work,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise ValueError(f"{_name(source, revision)} does not load in a process without our packages: {reason}")
        seen, logits = read_json(job["result"]), load_file(job["logits"])["logits"]
    difference = (logits - expected).abs().max().item()
    # Written so that a NaN fails as well.
    if not difference <= tolerance:
        raise ValueError(
            f"{_name(source, revision)} gives other logits than {Path(reference).name}: they differ by up to "
            f"{difference:.2e}, more than {tolerance:.0e}."
        )
    return ReloadResult(difference, **seen)


def _environment(work: str, local: bool, token: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in CACHES}
    kept |= {"HF_HOME": work, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if local:
        # A folder must be enough by itself.
        return kept | {"HF_HUB_OFFLINE": "1"}
    token = token or get_token()
    # The token file lies in the HF_HOME that this process shall not have.
    return {**kept, **({"HF_TOKEN": token} if token else {})}


def _name(source: str, revision: str | None) -> str:
    return source if revision is None else f"{source} at {revision}"
