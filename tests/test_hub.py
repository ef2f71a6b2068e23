"""Publishing to a Hub over HTTP with the real client, and what other users then see, in processes of their own."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import get_session
from stranger import run_as_stranger
from student import make_head_map, make_student, stage_student

import trainers.hub.publish
from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.hub.hub_upload import Upload, changes_table, naming_hub_errors
from trainers.hub.publish import publish
from trainers.hub.reload import reload_check
from trainers.hub.staging import stage


HF = Path(sys.executable).with_name("hf")


@pytest.fixture
def staged(tmp_path, tiny_llama, tiny_tokenizer):
    return stage_student(tmp_path / "published", tiny_llama, tiny_tokenizer)


@pytest.fixture
def staged_shards(request, tmp_path, tiny_llama, tiny_tokenizer):
    """Another student, its weights in several files that no other test has sent to the server."""
    seed = zlib.crc32(request.node.name.encode())
    head_map, _ = make_head_map(TeacherShape.from_config(tiny_llama.config, "acme/teacher"))
    folder = tmp_path / "trained"
    make_student(tiny_llama, head_map, seed).save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer.save_pretrained(folder)
    head_map.save(folder / "rad" / "head_map.json")
    return stage(folder, tmp_path / "shards", license="apache-2.0")


@pytest.fixture
def repo_id(request, hub):
    """A repository of its own for each test."""
    name = f"alice/{request.node.name.split('[')[0].removeprefix('test_').replace('_', '-')}"
    yield name
    hub.repos.pop(("models", name), None)
    hub.faults.clear()


@pytest.fixture
def requests(hub):
    """The requests of this test, as (method, path), by method."""
    start = len(hub.requests)
    return lambda *methods: [path for method, path in hub.requests[start:] if method in methods]


def weights(source, **options):
    """Tensors of a student as loaded from a folder or the Hub."""
    return RadHybridForCausalLM.from_pretrained(str(source), **options).state_dict()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def local_files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


LOAD = """
seen = {}
for revision in job["revisions"]:
    options = {"revision": revision, "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(job["repo"], **options)
    seen[revision] = [type(model).__module__, model(torch.tensor([[5, 6, 7]])).logits[0, -1].tolist()]
options["revision"] = "v1"
config = AutoConfig.from_pretrained(job["repo"], **options)
base = AutoModel.from_pretrained(job["repo"], **options)
tokenizer = AutoTokenizer.from_pretrained(job["repo"], **options)
prompts = tokenizer(["the key stone is", "the sea"], return_tensors="pt", padding=True, padding_side="left")
batch = model.generate(**prompts, max_new_tokens=4, do_sample=False)
alone = model.generate(**tokenizer("the sea", return_tensors="pt"), max_new_tokens=4, do_sample=False)
chat = tokenizer.apply_chat_template([{"role": "user", "content": "tell me"}], tokenize=False)
if "snippet" in job:
    exec(job["snippet"].replace("[0]))", "[0]), file=sys.stderr)"))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(job["tuned"])
    again = AutoModelForCausalLM.from_pretrained(job["tuned"], trust_remote_code=True)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
print(json.dumps({"seen": seen, "kept": config.kept_heads, "base": type(base).__name__, "chat": chat,
                  "padded": batch[1, -4:].tolist() == alone[0, -4:].tolist()}))
"""


@pytest.fixture
def reload_only_from_the_hub(repo_id, monkeypatch):
    """Leaves out the reload of the local folder, which has its own test and takes seconds."""

    def check(source, *args, **options):
        return reload_check(source, *args, **options) if source == repo_id else None

    monkeypatch.setattr(trainers.hub.publish, "reload_check", check)


@pytest.mark.usefixtures("reload_only_from_the_hub")
def test_published_student_is_everybodys(hub, staged, repo_id, tmp_path):
    """
    A stranger loads it by tag, commit and branch, runs the snippet, saves a tuned copy with its code, works offline.
    """
    publication = publish(staged, repo_id, prompt="the key stone is", max_new_tokens=3)
    repo = hub.repo(repo_id)
    assert publication.commit == repo.branches["main"].sha == repo.tags["v1"].sha and len(repo.commits) == 2
    assert set(repo.branches["main"].files) == local_files(staged) | {".gitattributes"}
    assert publication.reload.max_difference < 1e-4 and len(publication.reload.text.split()) == 3
    assert publication.commit in publication.reload.module
    card = hub.content(repo_id, "README.md").decode()
    assert publication.snippet in card and f'repo, revision = "{repo_id}", "v1"' in publication.snippet

    tuned = tmp_path / "tuned"
    job = {"repo": repo_id, "revisions": ["v1", publication.commit, "main"], "snippet": publication.snippet}
    job["tuned"] = str(tuned)
    seen = run_as_stranger(f"job = {job!r}\n" + LOAD, tmp_path / "carol", HF_TOKEN="")
    expected = RadHybridForCausalLM.from_pretrained(staged)(torch.tensor([[5, 6, 7]])).logits[0, -1]
    for module, logits in seen["seen"].values():
        # Hyphens and dots are not for module names; the commit is, so that two revisions never mix.
        assert module.endswith(f".{publication.commit}.modeling_rad_hybrid")
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)
    assert seen["kept"] == [[], [1], [0, 3]] and seen["base"] == "RadHybridModel" and seen["padded"]
    assert seen["chat"] == "user : tell me </s> "
    assert {file.name for file in tuned.glob("*.py")} == {file.name for file in staged.glob("*.py")}

    del job["snippet"]
    before = len(hub.requests)
    offline = run_as_stranger(f"job = {job!r}\n" + LOAD, tmp_path / "carol", HF_TOKEN="", HF_HUB_OFFLINE="1")
    assert offline == seen and len(hub.requests) == before


def test_publishing_again_does_nothing(hub, staged, repo_id, requests):
    first = publish(staged, repo_id, check=False)
    count = len(requests("POST", "PUT", "DELETE"))
    second = publish(staged, repo_id, check=False)
    assert (second.commit, second.tag) == (first.commit, first.tag) and len(hub.repo(repo_id).commits) == 2
    assert {change.kind for change in second.changes} == {"same"}
    assert len(requests("POST", "PUT", "DELETE")) == count


def test_update_leaves_no_stale_weights(hub, staged, staged_shards, repo_id):
    """transformers prefers a single file to shards, so one that was left would win over newer weights."""
    publish(staged, repo_id, check=False)
    api = HfApi()
    for path in ("notes.txt", "examples/tool.py", "pytorch_model.bin", "old_code.py"):
        api.upload_file(path_or_fileobj=b"x = 1", path_in_repo=path, repo_id=repo_id)
    second = publish(staged_shards, repo_id, check=False)
    files = set(hub.repo(repo_id).branches["main"].files)
    assert files == local_files(staged_shards) | {".gitattributes", "notes.txt", "examples/tool.py"}
    assert same(weights(repo_id), weights(staged_shards)) and second.tag == "v2"
    third = publish(staged, repo_id, check=False)
    assert not any("-of-" in path or "index" in path for path in hub.repo(repo_id).branches["main"].files)
    assert same(weights(repo_id), weights(staged)) and third.tag == "v3"
    assert same(weights(repo_id, revision="v2"), weights(staged_shards))
    # One commit each, those of `upload_file` apart.
    assert len(hub.repo(repo_id).commits) == 1 + 3 + 4


def test_private_is_private(hub, staged, repo_id, tmp_path):
    publish(staged, repo_id, private=True, check=False)
    assert hub.repo(repo_id).private
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    for user, granted in (("alice", True), ("bob", False)):
        process = subprocess.run(
            [HF, "download", repo_id, "--revision", "v1", "--local-dir", tmp_path / user],
            env={**environment, "HF_TOKEN": hub.token(user)},
            capture_output=True,
            text=True,
        )
        assert (process.returncode == 0) == granted, process.stderr
        assert granted or "not found" in process.stderr.lower()
    assert local_files(staged) <= local_files(tmp_path / "alice")
    assert not (tmp_path / "bob" / "config.json").exists()


@pytest.mark.parametrize(("user", "message"), [("bob", "may not write"), ("nobody", "hf auth login")])
def test_strangers_cannot_publish_there(hub, staged, repo_id, user, message):
    publish(staged, repo_id, check=False)
    head = hub.repo(repo_id).branches["main"].sha
    (staged / "NOTICE").write_text((staged / "NOTICE").read_text() + "\nMore.\n")
    with pytest.raises(OSError, match=message) as caught:
        publish(staged, repo_id, token=f"hf_{user}", check=False)
    assert "\n" not in str(caught.value) and f"hf_{user}" not in str(caught.value)
    assert hub.repo(repo_id).branches["main"].sha == head and set(hub.repo(repo_id).tags) == {"v1"}


def test_killed_upload_is_taken_up_again(hub, staged_shards, repo_id, requests):
    """A process dies in the middle of its upload; nothing is published, and what had arrived is not sent again."""
    hub.release.clear()
    hub.fail("PUT", "/lfs/", "hold", times=100, after=2)
    code = f"from trainers.hub.publish import publish; publish({str(staged_shards)!r}, {repo_id!r}, check=False)"
    checkout = Path(trainers.hub.publish.__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=checkout, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(requests("PUT")) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.faults.clear()
    hub.release.set()
    assert set(hub.repo(repo_id).branches["main"].files) == {".gitattributes"} and not hub.repo(repo_id).tags
    arrived, before = set(os.listdir(hub.storage)), len(requests("PUT"))
    publish(staged_shards, repo_id, check=False)
    again = {path.removeprefix("/lfs/") for path in requests("PUT")[before:]}
    assert again and not again & arrived
    assert same(weights(repo_id), weights(staged_shards))


def test_upload_goes_on_after_the_network_dropped(hub, staged_shards, repo_id, requests, monkeypatch):
    """Connections break in the middle of a file; the client tries again, gives up, and a second call does the rest."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.fail("PUT", "/lfs/", "drop", times=100, after=2)
    with pytest.raises(OSError, match="the connection failed .*run the same command again") as caught:
        publish(staged_shards, repo_id, check=False)
    assert "\n" not in str(caught.value)
    assert set(hub.repo(repo_id).branches["main"].files) == {".gitattributes"} and not hub.repo(repo_id).tags
    hub.faults.clear()
    arrived, before = set(os.listdir(hub.storage)), len(requests("PUT"))
    assert publish(staged_shards, repo_id, check=False).tag == "v1"
    again = {path.removeprefix("/lfs/") for path in requests("PUT")[before:]}
    assert again and not again & arrived
    assert same(weights(repo_id), weights(staged_shards))


def test_failed_upload_leaves_the_last_one(hub, staged, staged_shards, repo_id, requests):
    publish(staged, repo_id, check=False)
    head = hub.repo(repo_id).branches["main"].sha
    for how, path in ((507, "/lfs/"), ("corrupt", "/lfs/"), (507, "/commit/"), (507, "/preupload/")):
        hub.fail("PUT" if path == "/lfs/" else "POST", path, how)
        with pytest.raises(OSError, match=repo_id) as caught:
            publish(staged_shards, repo_id, check=False)
        assert "\n" not in str(caught.value)
        assert hub.repo(repo_id).branches["main"].sha == head and set(hub.repo(repo_id).tags) == {"v1"}
    assert same(weights(repo_id), weights(staged))
    assert publish(staged_shards, repo_id, check=False).tag == "v2"


@pytest.mark.usefixtures("reload_only_from_the_hub")
def test_corrupt_content_is_not_tagged(hub, staged, repo_id, monkeypatch):
    """The reload from the Hub sees what a user would see; the tag comes only after it."""
    hub.fail("GET", "resolve/.*/model.safetensors", "corrupt")
    with pytest.raises(ValueError, match="gives other logits.*It was not tagged; the commit before it is"):
        publish(staged, repo_id)
    assert not hub.repo(repo_id).tags
    monkeypatch.setattr(trainers.hub.publish, "reload_check", lambda *args, **options: None)
    publication = publish(staged, repo_id)
    assert hub.repo(repo_id).tags["v1"].sha == publication.commit and len(hub.repo(repo_id).commits) == 2


def test_missing_tag_is_made_up_for(hub, staged, repo_id):
    hub.fail("POST", "/tag/", 507)
    with pytest.raises(OSError, match="507"):
        publish(staged, repo_id, check=False)
    assert not hub.repo(repo_id).tags
    assert publish(staged, repo_id, check=False).tag == "v1"
    assert hub.repo(repo_id).tags["v1"] is hub.repo(repo_id).branches["main"] and len(hub.repo(repo_id).commits) == 2


def test_branch(hub, staged, staged_shards, repo_id):
    publish(staged, repo_id, check=False)
    head = hub.repo(repo_id).branches["main"]
    publication = publish(staged_shards, repo_id, revision="smaller", check=False)
    assert hub.repo(repo_id).branches["main"] is head and publication.tag is None
    assert f'"{repo_id}", "{publication.commit}"' in publication.snippet
    assert f'"{repo_id}", "smaller"' in hub.content(repo_id, "README.md", "smaller").decode()
    assert same(weights(repo_id, revision="smaller"), weights(staged_shards))


BOB = """
import json, sys
from trainers.hub.publish import publish
job = json.load(sys.stdin)
try:
    publish(**job, check=False)
except OSError as error:
    print(json.dumps(str(error)))
print(json.dumps(publish(**job, create_pr=True, check=False).pull_request))
"""


def test_pull_request_of_another_user(hub, staged, staged_shards, repo_id, tmp_path):
    """Bob, on a machine of his own, may not write to Alice's repository; he offers her his student instead."""
    publish(staged, repo_id, check=False)
    head = hub.repo(repo_id).branches["main"]
    process = subprocess.run(
        [sys.executable, "-c", BOB],
        input=json.dumps({"folder": str(staged_shards), "repo_id": repo_id}),
        env={**os.environ, "HF_HOME": str(tmp_path / "bob"), "HF_TOKEN": hub.token("bob")},
        cwd=Path(trainers.hub.publish.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    refused, pull_request = map(json.loads, process.stdout.splitlines())
    assert (
        refused
        == f"{repo_id}: this account may not write there. Choose a repository of your own, or open a pull request."
    )
    assert hub.repo(repo_id).branches["main"] is head and set(hub.repo(repo_id).tags) == {"v1"}
    assert pull_request.endswith(f"{repo_id}/discussions/1")
    assert same(weights(repo_id, revision="refs/pr/1"), weights(staged_shards))
    HfApi().merge_pull_request(repo_id, 1)
    assert same(weights(repo_id), weights(staged_shards))


def test_dry_run_only_looks(hub, staged, staged_shards, repo_id, requests):
    publication = publish(staged, repo_id, dry_run=True)
    assert {change.kind for change in publication.changes} == {"added"} and publication.tag == "v1"
    publish(staged, repo_id, check=False)
    count = len(requests("POST", "PUT", "DELETE"))
    publication = publish(staged_shards, repo_id, dry_run=True)
    kinds = {change.path: change.kind for change in publication.changes}
    assert kinds["model.safetensors"] == "deleted" and kinds["rad/heads.png"] == "deleted"
    assert kinds["model.safetensors.index.json"] == "added" and kinds["README.md"] == "changed"
    assert kinds["ssd.py"] == "same" and publication.tag == "v2"
    assert len(requests("POST", "PUT", "DELETE")) == count
    assert changes_table(publication.changes, "changes").row_count == len(kinds)


def test_tags_are_not_moved(hub, staged, staged_shards, repo_id, requests):
    publish(staged, repo_id, tag="release", check=False)
    assert publish(staged, repo_id, tag="release", check=False).tag == "release"
    count = len(requests("POST", "PUT", "DELETE"))
    with pytest.raises(ValueError, match="The tag release of .* stands at another student"):
        publish(staged_shards, repo_id, tag="release", check=False)
    assert len(requests("POST", "PUT", "DELETE")) == count


def test_a_commit_that_came_in_between_is_not_overwritten(hub, staged, repo_id):
    upload = Upload(HfApi(), staged, repo_id)
    upload.look()
    HfApi().create_repo(repo_id)
    upload.look()
    upload.compare()
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id=repo_id)
    with pytest.raises(OSError, match="somebody committed to it in the meantime"), naming_hub_errors(repo_id):
        upload.send(None, "Too late")
    assert set(hub.repo(repo_id).branches["main"].files) == {".gitattributes", "notes.txt"}


def test_options_that_contradict(staged):
    with pytest.raises(ValueError, match="leave out revision and tag"):
        publish(staged, "alice/x", create_pr=True, tag="v1")


def test_head_map_is_taken_from_a_published_student(staged, repo_id):
    publish(staged, repo_id, check=False)
    assert HeadMap.load(repo_id) == HeadMap.load(staged)


# The server itself, where the tests above do not lead.


def test_server_knows_the_errors_of_the_client(hub, staged, repo_id):
    publish(staged, repo_id, check=False)
    stranger, home = hub.token("bob"), {"cache_dir": staged.parent / "cache"}
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo_id, "none.txt", **home)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo_id, "config.json", revision="v99", **home)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/none", "config.json", **home)
    HfApi().update_repo_settings(repo_id, gated="manual")
    with pytest.raises(GatedRepoError):
        hf_hub_download(repo_id, "config.json", token=stranger, **home)
    HfApi().update_repo_settings(repo_id, gated=False, private=True)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(repo_id, "config.json", token=stranger, cache_dir=staged.parent / "empty")
    assert HfApi().repo_exists(repo_id) and not HfApi(token=stranger).repo_exists(repo_id)
    assert repo_id in {model.id for model in HfApi().list_models(author="alice")}
    assert repo_id not in {model.id for model in HfApi(token=stranger).list_models(author="alice")}


def test_server_sends_parts_of_files(hub, staged, repo_id):
    publish(staged, repo_id, check=False)
    url = f"{hub.url}/{repo_id}/resolve/main/model.safetensors"
    whole = (staged / "model.safetensors").read_bytes()
    part = get_session().get(url, headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == whole[100:200]
    assert get_session().get(url, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_server_lists_trees_in_pages(staged):
    hub = HubServer(page=3).start()
    try:
        api = HfApi(endpoint=hub.url, token=hub.token("alice"))
        api.create_repo("acme/pages")
        api.upload_folder(repo_id="acme/pages", folder_path=staged)
        found = {entry.path for entry in api.list_repo_tree("acme/pages", recursive=True)}
        assert found == local_files(staged) | {".gitattributes", "rad"}
        assert {entry.path for entry in api.list_repo_tree("acme/pages", "rad")} == {
            path for path in local_files(staged) if path.startswith("rad/")
        }
    finally:
        hub.stop()


def test_publication_tells_no_token(hub, staged, repo_id):
    publication = publish(staged, repo_id, token=hub.token("alice"), check=False)
    assert hub.token("alice") not in str(dataclasses.asdict(publication))
    shutil.rmtree(staged)
