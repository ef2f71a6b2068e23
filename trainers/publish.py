"""
Publishing a staged student: one commit on the Hub that brings all of it and deletes what is stale, then a tag, then a
reload by a stranger. Or, without a repository, the local folder with the same checks.

`upload_folder` may cut a push into several commits (it does where Xet storage is used), and `push_to_hub` deletes
nothing and writes a card of its own; so the commit is made here, from a list of operations, on top of the commit that
was looked at. Until it is there, nobody sees anything; large files that were already sent are not sent again when an
interrupted upload is started anew.

    publication = publish("runs/demo/published", "me/student", private=True)
    print(publication.snippet)
"""

import contextlib
import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from rich.table import Table

from trainers.files import sha256
from trainers.model_card import load_snippet, pin_snippet
from trainers.reload import ReloadResult, reload_check
from trainers.verify import verify


# What an earlier publication, or another tool, may have left and a reader would load instead of ours.
STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py", "*.jinja", "rad/*")
STALE += ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
OUR_TAG = re.compile(r"v(\d+)")
# HTTPError of httpx or httpx2, whichever the installed client is built on; connections that fail raise it too.
TRANSPORT_ERROR = HfHubHTTPError.__bases__[0]
ADVICE = {
    401: "you are not logged in, or the token is not valid. Log in with `hf auth login`, or pass a token.",
    403: "this account may not write there. Choose a repository of your own, or open a pull request.",
    404: "there is no such repository or revision, or this account may not see it.",
    412: "somebody committed to it in the meantime. Run the same command again.",
}


@dataclass(frozen=True)
class Change:
    """
    One file of a publication.

    Args:
        path (`str`):
            Path in the repository.
        kind (`str`):
            `"added"`, `"changed"`, `"deleted"` or `"same"`.
        size (`int`):
            Bytes, of the new content where there is one.
    """

    path: str
    kind: str
    size: int


@dataclass(frozen=True)
class Publication:
    """
    What was published, or would be.

    Args:
        folder (`Path`):
            The staged folder.
        repo_id (`str`, *optional*), url (`str`, *optional*):
            Hub repository and its address.
        commit (`str`, *optional*):
            Commit that holds the student.
        tag (`str`, *optional*):
            Tag of that commit.
        pull_request (`str`, *optional*):
            Address of the pull request that was opened instead of a commit to the branch.
        changes (`list[Change]`):
            Every file of the folder, and those deleted.
        reload (`ReloadResult`, *optional*):
            What a fresh process saw.
        snippet (`str`):
            Lines that load the student, pinned.
    """

    folder: Path
    repo_id: str | None = None
    url: str | None = None
    commit: str | None = None
    tag: str | None = None
    pull_request: str | None = None
    changes: list[Change] = field(default_factory=list)
    reload: ReloadResult | None = None
    snippet: str = ""


def publish(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    check: bool = True,
    prompt: str = "My name is",
    max_new_tokens: int = 20,
) -> Publication:
    """
    Checks a staged folder, puts it on the Hub in one commit, tags it, and reloads it from there.

    Args:
        folder (`str` or `os.PathLike`):
            Folder made by [`~trainers.staging.stage`].
        repo_id (`str`, *optional*):
            Hub repository, made if it is not there. Without it the folder is checked and reloaded where it is.
        private (`bool`, *optional*):
            Whether a repository that is made now is private.
        revision (`str`, *optional*):
            Branch to commit to, made from `main` if it is not there; by default `main`.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead of committing to `main`.
        tag (`str`, *optional*):
            Tag for the commit; by default the next of `v1`, `v2`, ... on `main`, and none on a branch or pull request.
        commit_message (`str`, *optional*):
            First line of the commit.
        token (`str`, *optional*):
            Access token; by default the one of this login. It is never printed or written.
        dry_run (`bool`, *optional*, defaults to `False`):
            Only say what would change.
        check (`bool`, *optional*, defaults to `True`):
            Reload in a fresh process, before the upload from the folder and after it from the Hub.
        prompt (`str`, *optional*, defaults to `"My name is"`), max_new_tokens (`int`, *optional*, defaults to 20):
            What the fresh process continues, and by how many tokens.

    Returns:
        [`Publication`]: where it is, what changed, what the fresh process saw.

    Raises:
        `ValueError`: when the folder fails a check, or the options contradict one another.
        `OSError`: when the Hub refuses or cannot be reached; the repository is then as it was.
    """
    folder = Path(folder)
    if repo_id is None and (private or revision or create_pr or tag):
        raise ValueError("private, revision, create_pr and tag need a repository; name it with repo_id.")
    if create_pr and (revision or tag):
        raise ValueError("A pull request is opened against main and carries no tag; leave out revision and tag.")
    verify(folder)
    upload = None
    if repo_id is not None:
        upload = Upload(HfApi(token=token), folder, repo_id, revision or "main", create_pr)
        with naming_hub_errors(repo_id):
            upload.look(tag)
    if dry_run:
        return upload.outcome() if upload else _local(folder)
    reload = reload_check(folder, prompt=prompt, max_new_tokens=max_new_tokens) if check else None
    if upload is None:
        return _local(folder, reload)
    with naming_hub_errors(repo_id):
        upload.send(private, commit_message)
    if check:
        try:
            reload = reload_check(repo_id, upload.commit, folder, prompt, max_new_tokens, token=token)
        except ValueError as error:
            raise ValueError(f"{error} It was not tagged; the commit before it is {upload.head}.") from error
    with naming_hub_errors(repo_id):
        upload.place_tag()
    return upload.outcome(reload)


class Upload:
    """
    One way of a folder to the Hub: look at what is there, send what differs, tag it.

    Args:
        api ([`~huggingface_hub.HfApi`]):
            Client, with its token.
        folder (`Path`):
            The staged folder.
        repo_id (`str`):
            Repository.
        branch (`str`):
            Branch to commit to.
        create_pr (`bool`):
            Whether to open a pull request instead.
    """

    def __init__(self, api: HfApi, folder: Path, repo_id: str, branch: str, create_pr: bool):
        self.api, self.folder, self.repo_id, self.branch, self.create_pr = api, folder, repo_id, branch, create_pr
        self.files = _files(folder)
        self.digests = {path: (_blob_id(file), sha256(file)) for path, file in self.files.items()}
        self.head = self.commit = self.tag = self.pull_request = None
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}

    def look(self, tag: str | None) -> None:
        """Reads what the repository holds, and from it decides tag, card and changes."""
        try:
            refs = self.api.list_repo_refs(self.repo_id)
            self.branches = {ref.name: ref.target_commit for ref in refs.branches}
            self.tags = {ref.name: ref.target_commit for ref in refs.tags}
            self.head = self.branches.get(self.branch, self.branches.get("main"))
            entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=self.head)
            self.remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        except RepositoryNotFoundError:
            self.remote = {}
        for possible in self.possible_tags(tag):
            self.tag = possible
            self.pin_card()
            self.changes = self.find_changes()
            if all(change.kind == "same" for change in self.changes):
                break
        else:
            if self.tag in self.tags:
                raise ValueError(
                    f"The tag {self.tag} of {self.repo_id} stands at another student ({self.tags[self.tag][:8]}); "
                    "choose a new one."
                )

    def possible_tags(self, tag: str | None) -> list[str | None]:
        """Tags under which this very student may be there already, then the one to give it if it is not."""
        if tag or self.create_pr or self.branch != "main":
            return [tag]
        numbers = [int(match[1]) for match in map(OUR_TAG.fullmatch, self.tags) if match]
        latest = max(numbers, default=0)
        return [*([f"v{latest}"] if latest else []), f"v{latest + 1}"]

    def pin_card(self) -> None:
        """Makes the card that is sent load the student from its repository."""
        text = (self.folder / "README.md").read_text(encoding="utf-8")
        self.card = pin_snippet(text, self.repo_id, self.tag or self.branch).encode()
        self.digests["README.md"] = (_blob_id(self.card), hashlib.sha256(self.card).hexdigest())

    def find_changes(self) -> list[Change]:
        """Compares folder and repository by digest; lists stale files among the deleted."""
        changes = []
        for path, file in self.files.items():
            there, (blob_id, digest) = self.remote.get(path), self.digests[path]
            size = len(self.card) if path == "README.md" else file.stat().st_size
            if there is None:
                kind = "added"
            else:
                kind = "same" if (there.lfs.sha256 == digest if there.lfs else there.blob_id == blob_id) else "changed"
            changes.append(Change(path, kind, size))
        stale = [entry for path, entry in self.remote.items() if path not in self.files and is_stale(path)]
        return changes + [Change(entry.path, "deleted", entry.size) for entry in stale]

    def send(self, private: bool | None, message: str | None) -> None:
        """Makes the one commit, and whatever it needs before: the repository, the branch."""
        if self.head is None:
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
            self.head = self.api.repo_info(self.repo_id).sha
        if self.branch not in self.branches and self.branch != "main":
            self.api.create_branch(self.repo_id, branch=self.branch, revision=self.head, exist_ok=True)
        operations = []
        for change in self.changes:
            if change.kind == "deleted":
                operations.append(CommitOperationDelete(change.path))
            elif change.kind != "same":
                content = self.card if change.path == "README.md" else self.files[change.path]
                operations.append(CommitOperationAdd(change.path, content))
        if not operations:
            self.commit = self.head
            return
        # On top of the very commit that was compared: whoever came in between is not overwritten.
        info = self.api.create_commit(
            self.repo_id,
            operations,
            commit_message=message or f"Publish a RAD hybrid student{f', {self.tag}' if self.tag else ''}",
            revision=None if self.create_pr else self.branch,
            create_pr=self.create_pr,
            parent_commit=self.head,
        )
        self.commit, self.pull_request = info.oid, info.pr_url

    def place_tag(self) -> None:
        """Tags the commit. Comes last: what bears a tag has been checked."""
        if self.tag and self.tag not in self.tags:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=self.commit)

    def outcome(self, reload: ReloadResult | None = None) -> Publication:
        """Says what was done, or would be."""
        return Publication(
            folder=self.folder,
            repo_id=self.repo_id,
            url=f"{self.api.endpoint}/{self.repo_id}",
            commit=self.commit,
            tag=self.tag,
            pull_request=self.pull_request,
            changes=self.changes,
            reload=reload,
            snippet=load_snippet(self.repo_id, self.tag or self.commit or self.branch),
        )


def is_stale(path: str) -> bool:
    """Whether a file of a repository that is not in the folder would mislead whoever loads the student."""
    # Folders of the user's own are left alone.
    return any(fnmatch.fnmatch(path, pattern) for pattern in STALE if pattern.count("/") == path.count("/"))


def changes_table(publication: Publication) -> Table:
    """Renders what a publication changes: one row a file, with its size."""
    table = Table(title=f"{publication.repo_id or publication.folder}", title_justify="left")
    table.add_column("")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for change in publication.changes:
        table.add_row(change.kind, change.path, f"{change.size:,}")
    return table


@contextlib.contextmanager
def naming_hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what the Hub client raises into one sentence that says what happened and what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise OSError(
            f"{repo_id}: {ADVICE.get(status, f'the Hub answered {status}: {error.server_message}')}"
        ) from error
    except (TRANSPORT_ERROR, RuntimeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise OSError(
            f"{repo_id}: the connection failed ({cause}). The repository is as it was; run the same command again, "
            "files that have arrived are not sent again."
        ) from error


def _local(folder: Path, reload: ReloadResult | None = None) -> Publication:
    changes = [Change(path, "same", file.stat().st_size) for path, file in _files(folder).items()]
    return Publication(folder, changes=changes, reload=reload, snippet=load_snippet(str(folder), None))


def _files(folder: Path) -> dict[str, Path]:
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return dict(sorted(found.items()))


def _blob_id(content: Path | bytes) -> str:
    """The id that git gives a file."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest = hashlib.sha1(b"blob %d\0" % size)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
