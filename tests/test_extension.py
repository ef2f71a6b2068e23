"""
`hf rad ...` reaches us where hf-rad is installed as an extension of the Hub's own command.

`hf extensions install` fetches from GitHub and nothing else; so the folder that it would make is made here, from the
console script that pyproject.toml declares, and the real `hf` dispatches to it.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


CHECKOUT = Path(__file__).parents[1]
HF = Path(sys.executable).with_name("hf")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home directory with the extension in it."""
    home = tmp_path_factory.mktemp("home")
    folder = home / ".local" / "share" / "hf" / "extensions" / "hf-rad"
    folder.mkdir(parents=True)
    scripts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["hf-rad"].split(":")
    script = folder / "hf-rad"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(CHECKOUT)!r})\n"
        f"from {module} import {function}\nsys.exit({function}())\n"
    )
    script.chmod(0o755)
    manifest = {"owner": "someone", "repo": "hf-rad", "repo_id": "someone/hf-rad", "short_name": "rad"}
    manifest |= {"executable_path": str(script), "type": "python", "installed_at": "2026-01-01T00:00:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return home


def hf(home: Path, *words: str) -> subprocess.CompletedProcess:
    # The update check asks GitHub; its answer, or its absence, is not what is tested.
    environment = {**os.environ, "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.run([HF, *words], env=environment, cwd=home, capture_output=True, text=True)


@pytest.mark.parametrize("words", [("extensions", "exec", "rad", "--"), ("rad",)])
def test_help_reaches_us(home, words):
    process = hf(home, *words, "--help")
    assert process.returncode == 0, process.stderr
    for verb in ("score", "select", "convert", "distill", "eval", "publish", "run", "demo"):
        assert f"\n    {verb} " in process.stdout
    assert "usage: hf-rad" in process.stdout


def test_exit_codes_and_streams(home):
    process = hf(home, "rad", "heads", "show", "nowhere.json")
    assert process.returncode == 1 and not process.stdout
    assert process.stderr.startswith("Error: There is no head map at nowhere.json") and process.stderr.count("\n") == 1
    assert hf(home, "rad", "conjure").returncode == 2


def test_answers_are_machine_readable(home):
    process = hf(home, "rad", "heads", "show", "meta-llama/Llama-3.2-1B-Instruct", "--format", "json")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["teacher"] == "meta-llama/Llama-3.2-1B-Instruct"
