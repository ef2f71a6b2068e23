"""
A folder goes to a Hub repository in one commit: look at what is there, say what differs, send that.

`upload_folder` may cut a push into several commits (it does where Xet storage is used) and `push_to_hub` deletes
nothing, so the commit is made here, from a list of operations, on top of the commit that was looked at. Until it is
there, nobody sees anything; large files that have arrived are not sent again when an upload is started anew.

    upload = Upload(HfApi(), Path("folder"), "me/repo", stale=("*.safetensors",))
    with naming_hub_errors("me/repo"):
        upload.look()
        upload.compare()
        upload.send(private=True, message="All of it")
"""

import contextlib
import fnmatch
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from rich.table import Table

from trainers.files import sha256


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
    One file of an upload.

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


class Upload:
    """
    One way of a folder to the Hub.

    Args:
        api ([`~huggingface_hub.HfApi`]):
            Client, with its token.
        folder (`Path`):
            Folder to send.
        repo_id (`str`):
            Repository, made if it is not there.
        branch (`str`, *optional*, defaults to `"main"`):
            Branch to commit to, made from `main` if it is not there.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"model"` or `"dataset"`.
        stale (`tuple[str, ...]`, *optional*):
            Patterns of files that are deleted when they are in the repository but not in the folder. A pattern matches
            in its own depth only: folders of the user's own are left alone.
    """

    def __init__(
        self,
        api: HfApi,
        folder: Path,
        repo_id: str,
        branch: str = "main",
        create_pr: bool = False,
        repo_type: str = "model",
        stale: tuple[str, ...] = (),
    ):
        self.api, self.folder, self.repo_id, self.branch, self.create_pr = api, folder, repo_id, branch, create_pr
        self.repo_type, self.stale = repo_type, stale
        self.files = list_files(folder)
        self.digests = {path: (blob_id(file), sha256(file)) for path, file in self.files.items()}
        self.head: str | None = None
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.remote: dict[str, RepoFile] = {}
        self.replaced: dict[str, bytes] = {}
        self.changes: list[Change] = []
        self.commit: str | None = None
        self.pull_request: str | None = None

    @property
    def url(self) -> str:
        """Address of the repository."""
        return f"{self.api.endpoint}/{'' if self.repo_type == 'model' else f'{self.repo_type}s/'}{self.repo_id}"

    def look(self) -> None:
        """Reads what the repository holds; one that does not exist holds nothing."""
        where = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        try:
            refs = self.api.list_repo_refs(**where)
        except RepositoryNotFoundError:
            return
        self.branches = {ref.name: ref.target_commit for ref in refs.branches}
        self.tags = {ref.name: ref.target_commit for ref in refs.tags}
        self.head = self.branches.get(self.branch, self.branches.get("main"))
        entries = self.api.list_repo_tree(**where, recursive=True, revision=self.head)
        self.remote = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def compare(self, replaced: dict[str, bytes] | None = None) -> list[Change]:
        """
        Compares folder and repository by digest.

        Args:
            replaced (`dict[str, bytes]`, *optional*):
                Content sent in the place of a file of the folder.

        Returns:
            `list[Change]`: every file of the folder, then the stale ones of the repository.
        """
        self.replaced, self.changes = replaced or {}, []
        for path, file in self.files.items():
            content, there = self.replaced.get(path), self.remote.get(path)
            blob, digest, size = *self.digests[path], file.stat().st_size
            if content is not None:
                blob, digest, size = blob_id(content), hashlib.sha256(content).hexdigest(), len(content)
            if there is None:
                kind = "added"
            else:
                kind = "same" if (there.lfs.sha256 == digest if there.lfs else there.blob_id == blob) else "changed"
            self.changes.append(Change(path, kind, size))
        for path, entry in self.remote.items():
            if path not in self.files and self.is_stale(path):
                self.changes.append(Change(path, "deleted", entry.size))
        return self.changes

    def is_stale(self, path: str) -> bool:
        """Whether a file that is not in the folder would mislead whoever loads the repository."""
        return any(fnmatch.fnmatch(path, pattern) for pattern in self.stale if pattern.count("/") == path.count("/"))

    def send(self, private: bool | None, message: str) -> None:
        """Makes the one commit, and whatever it needs before: the repository, the branch."""
        where = {"repo_id": self.repo_id, "repo_type": self.repo_type}
        if self.head is None:
            self.api.create_repo(**where, private=private, exist_ok=True)
            self.head = self.api.repo_info(**where).sha
        if self.branch not in self.branches and self.branch != "main":
            self.api.create_branch(**where, branch=self.branch, revision=self.head, exist_ok=True)
        operations = []
        for change in self.changes:
            if change.kind == "deleted":
                operations.append(CommitOperationDelete(change.path))
            elif change.kind != "same":
                content = self.replaced.get(change.path, self.files[change.path])
                operations.append(CommitOperationAdd(change.path, content))
        if not operations:
            self.commit = self.head
            return
        # On top of the very commit that was compared: whoever came in between is not overwritten.
        info = self.api.create_commit(
            **where,
            operations=operations,
            commit_message=message,
            revision=None if self.create_pr else self.branch,
            create_pr=self.create_pr,
            parent_commit=self.head,
        )
        self.commit, self.pull_request = info.oid, info.pr_url


@contextlib.contextmanager
def naming_hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what the Hub client raises into one sentence that says what happened and what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = ADVICE.get(status, f"the Hub answered {status}: {error.server_message}")
        raise OSError(f"{repo_id}: {advice}") from error
    except (TRANSPORT_ERROR, RuntimeError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise OSError(
            f"{repo_id}: the connection failed ({cause}). The repository is as it was; run the same command again, "
            "files that have arrived are not sent again."
        ) from error


def changes_table(changes: list[Change], title: str) -> Table:
    """Renders what an upload changes: one row a file, with its size."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for change in changes:
        table.add_row(change.kind, change.path, f"{change.size:,}")
    return table


def list_files(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their path in a repository."""
    found = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return dict(sorted(found.items()))


def blob_id(content: Path | bytes) -> str:
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
