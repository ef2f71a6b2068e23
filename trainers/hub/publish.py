"""
Publishing a staged student: one commit on the Hub that brings all of it and deletes what is stale, a reload by a
stranger, and then a tag. Or, without a repository, the local folder with the same checks.

`push_to_hub` of transformers would leave stale weights beside new ones, which then win over them, and write a card of
its own; and it makes a commit for each of model, tokenizer and card.

    publication = publish("runs/demo/published", "me/student", private=True)
    print(publication.snippet)
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi

from trainers.hub.hub_upload import Change, Upload, list_files, naming_hub_errors
from trainers.hub.model_card import load_snippet, pin_snippet
from trainers.hub.reload import ReloadResult, reload_check
from trainers.hub.verify import verify


# What an earlier publication, or another tool, may have left and a reader would load instead of ours.
STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py", "*.jinja", "rad/*")
STALE += ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", ".eval_results/*")
OUR_TAG = re.compile(r"v(\d+)")


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
            Folder made by [`~trainers.hub.staging.stage`].
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
        upload = StudentUpload(HfApi(token=token), folder, repo_id, revision or "main", create_pr, stale=STALE)
        with naming_hub_errors(repo_id):
            upload.look()
            upload.choose_tag(tag)
    if dry_run:
        return upload.outcome() if upload else _local(folder)
    reload = reload_check(folder, prompt=prompt, max_new_tokens=max_new_tokens) if check else None
    if upload is None:
        return _local(folder, reload)
    with naming_hub_errors(repo_id):
        name = f", {upload.tag}" if upload.tag else ""
        upload.send(private, commit_message or f"Publish a RAD hybrid student{name}")
    if check:
        try:
            reload = reload_check(repo_id, upload.commit, folder, prompt, max_new_tokens, token=token)
        except ValueError as error:
            raise ValueError(f"{error} It was not tagged; the commit before it is {upload.head}.") from error
    with naming_hub_errors(repo_id):
        upload.place_tag()
    return upload.outcome(reload)


class StudentUpload(Upload):
    """An [`~trainers.hub.hub_upload.Upload`] whose card is pinned to the repository, under a tag that it chooses."""

    tag: str | None = None

    def choose_tag(self, tag: str | None) -> None:
        """
        Compares under the tag given, or on `main` the next of `v1`, `v2`, ..., which stands in the card's snippet.

        Raises:
            `ValueError`: when the tag given stands at another student.
        """
        for possible in self.possible_tags(tag):
            self.tag = possible
            card = (self.folder / "README.md").read_text(encoding="utf-8")
            pinned = pin_snippet(card, self.repo_id, self.tag or self.branch).encode()
            if all(change.kind == "same" for change in self.compare({"README.md": pinned})):
                return
        if self.tag in self.tags:
            raise ValueError(
                f"The tag {self.tag} of {self.repo_id} stands at another student ({self.tags[self.tag][:8]}); choose "
                "a new one."
            )

    def possible_tags(self, tag: str | None) -> list[str | None]:
        """Tags under which this very student may be there already, then the one to give it if it is not."""
        if tag or self.create_pr or self.branch != "main":
            return [tag]
        latest = max((int(match[1]) for match in map(OUR_TAG.fullmatch, self.tags) if match), default=0)
        return [*([f"v{latest}"] if latest else []), f"v{latest + 1}"]

    def place_tag(self) -> None:
        """Tags the commit. Comes last: what bears a tag has been checked."""
        if self.tag and self.tag not in self.tags:
            self.api.create_tag(self.repo_id, tag=self.tag, revision=self.commit)

    def outcome(self, reload: ReloadResult | None = None) -> Publication:
        """Says what was done, or would be."""
        return Publication(
            folder=self.folder,
            repo_id=self.repo_id,
            url=self.url,
            commit=self.commit,
            tag=self.tag,
            pull_request=self.pull_request,
            changes=self.changes,
            reload=reload,
            snippet=load_snippet(self.repo_id, self.tag or self.commit or self.branch),
        )


def _local(folder: Path, reload: ReloadResult | None = None) -> Publication:
    changes = [Change(path, "same", file.stat().st_size) for path, file in list_files(folder).items()]
    return Publication(folder, changes=changes, reload=reload, snippet=load_snippet(str(folder), None))
