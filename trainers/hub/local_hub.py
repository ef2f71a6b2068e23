"""
The whole way of publishing without an account: a Hub server of the checkout's own (`tests/hub_server.py`), the real
client, a stranger who loads the student from it by the pinned snippet.

    publication, printed = publish_to_local_hub("runs/demo/published", "alice/smollm2-rad8")
    print(publication.url, printed)

The server lives as long as the call, on a free port of this machine. The client reads its environment when it is
imported, so publishing runs in a process of its own.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trainers.hub.hub_upload import Change
from trainers.hub.publish import Publication
from trainers.hub.reload import BLOCKED, SCRIPT, ReloadResult


CHECKOUT = Path(__file__).parents[2]
SERVER = CHECKOUT / "tests" / "hub_server.py"
PUBLISH = """
import dataclasses, json, sys
from trainers.hub.publish import publish
done = dataclasses.asdict(publish(**json.load(sys.stdin)))
print(json.dumps({**done, "folder": str(done["folder"])}))
"""
# Run before the snippet: our packages are blocked, as in any other reload.
BLOCK = f"import runpy, sys\nsys.meta_path.insert(0, runpy.run_path({str(SCRIPT)!r})['Blocker']({BLOCKED!r}))\n"


def publish_to_local_hub(folder: str | os.PathLike, repo_id: str, **options) -> tuple[Publication, str]:
    """
    Publishes a staged folder to a Hub server on this machine, and runs the snippet that loads it from there.

    Args:
        folder (`str` or `os.PathLike`):
            Folder made by [`~trainers.hub.staging.stage`].
        repo_id (`str`):
            Repository, under the server's user `alice` or her organisation `acme`.
        **options:
            Further arguments of [`~trainers.hub.publish.publish`].

    Returns:
        `tuple[Publication, str]`: what was published, and what the snippet printed in a process without our packages.

    Raises:
        `FileNotFoundError`: when this is no checkout: the server is not part of the installed package.
        `ValueError`: when publishing, or the snippet, fails.
    """
    job = json.dumps({"folder": str(Path(folder).resolve()), "repo_id": repo_id, **options})
    with local_hub() as environment, tempfile.TemporaryDirectory(prefix="fresh-process-") as home:
        output = _run([sys.executable, "-c", PUBLISH], environment, CHECKOUT, job)
        seen = json.loads(output.splitlines()[-1])
        stranger = {**environment, "HF_HOME": home, "HF_TOKEN": "", "TRANSFORMERS_VERBOSITY": "error"}
        printed = _run([sys.executable, "-I", "-c", BLOCK + seen["snippet"]], stranger, home)
    changes = [Change(**change) for change in seen["changes"]]
    reload = seen["reload"] and ReloadResult(**seen["reload"])
    return Publication(**{**seen, "folder": Path(folder), "changes": changes, "reload": reload}), printed.strip()


@contextlib.contextmanager
def local_hub() -> Iterator[dict[str, str]]:
    """Runs a Hub server; yields the environment in which a client talks to it as its user alice."""
    if not SERVER.is_file():
        raise FileNotFoundError("The local Hub server is part of the repository, and hf-rad is installed without it.")
    process = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    with tempfile.TemporaryDirectory(prefix="hub-user-") as home:
        try:
            words = process.stdout.readline().split()[1:]
            caches = {
                name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))
            }
            quiet = {"HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            yield {**caches, **quiet, **dict(word.split("=", 1) for word in words)}
        finally:
            process.terminate()  # it deletes what was uploaded
            process.wait()
            process.stdout.close()


def _run(command: list[str], environment: dict[str, str], folder: str | Path, text: str = "") -> str:
    process = subprocess.run(command, env=environment, cwd=folder, input=text, capture_output=True, text=True)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise ValueError(f"Publishing to the local Hub server failed: {reason}")
    return process.stdout
