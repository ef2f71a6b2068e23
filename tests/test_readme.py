"""What the README says about publishing and loading is run word for word, by a user named `you` and by a stranger."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from stranger import run_as_stranger
from student import make_head_map, make_report, make_student

from trainers.files import write_json
from trainers.heads.head_map import TeacherShape


CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"


def block(heading: str, language: str) -> str:
    """The one code block of that language under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## )", README, re.DOTALL | re.MULTILINE)[1]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return code


@pytest.fixture
def world():
    """A Hub with a user `you`, and the teacher's card on it."""
    hub = HubServer(users={"you": [], TEACHER.split("/")[0]: []}).start()
    teacher = HfApi(endpoint=hub.url, token=hub.token(TEACHER.split("/")[0]))
    teacher.create_repo(TEACHER)
    card = b"---\nlicense: apache-2.0\n---\n# SmolLM2\n"
    teacher.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=TEACHER)
    yield hub
    hub.stop()


@pytest.mark.timeout(900)  # five processes, each of which imports PyTorch
def test_publish_and_load_as_the_readme_says(world, tmp_path, tiny_llama, tiny_tokenizer):
    """A tiny student lies where the demo leaves its own; the rest is the README's."""
    demo = tmp_path / "runs" / "demo"
    head_map, scores = make_head_map(TeacherShape.from_config(tiny_llama.config, TEACHER))
    make_student(tiny_llama, head_map).save_pretrained(demo / "distillation")
    tiny_tokenizer.save_pretrained(demo / "distillation")
    for folder in (demo, demo / "distillation" / "rad"):
        head_map.save(folder / "head_map.json")
        scores.save(folder / "scores.json")
    write_json(demo / "eval.json", make_report(TEACHER))
    environment = {**os.environ, "HF_ENDPOINT": world.url, "HF_TOKEN": world.token("you")}
    environment |= {"HF_HOME": str(tmp_path / "you"), "PYTHONPATH": str(CHECKOUT)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.run(
        ["bash", "-e", "-c", block("Publish your student", "bash")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    snippet = block("Load a student", "python")
    assert snippet in process.stdout and f"url: {world.url}/you/smollm2-135m-rad8" in process.stdout
    assert set(world.repo("you/smollm2-135m-rad8").tags) == {"v1"}
    assert (
        f"head_maps/{TEACHER.replace('/', '--')}.json"
        in world.repo("you/head-maps", "datasets").branches["main"].files
    )
    # The tiny tokenizer knows neither of the prompt's words.
    code = "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out:\n"
    code += "".join(f"    {line}\n" for line in snippet.splitlines()) + "print(json.dumps(out.getvalue()))"
    printed = run_as_stranger(code, tmp_path / "stranger", HF_ENDPOINT=world.url, HF_TOKEN="")
    assert printed.startswith("<unk> <unk>") and len(printed.split()) > 4
