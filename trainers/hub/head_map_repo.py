"""
Head maps on the Hub: a data set repository with one JSON for each teacher, and a table of all heads for the viewer.

    push_head_maps(["runs/demo/head_map.json"], "me/head-maps", scores=["runs/demo/scores.json"])
    head_map = pull_head_map("me/head-maps", "HuggingFaceTB/SmolLM2-135M-Instruct", revision="0123abc")
    head_map = find_head_map("me/head-maps", teacher="HuggingFaceTB/SmolLM2-135M-Instruct")

What comes from a repository is data: its size is looked at before it is fetched, and it is validated as any head map.
"""

import importlib.resources
import os
import re
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from trainers.files import read_json
from trainers.heads.head_map import MAX_BYTES, REPO_ID, STUDENT_MAP, HeadMap, download_small, shipped_head_maps
from trainers.heads.head_scores import MAX_BYTES as SCORES_BYTES
from trainers.heads.head_scores import HeadScores
from trainers.hub.hub_upload import Upload, naming_hub_errors


PAPER = "2602.11374"
MAP_NAME = re.compile(r"head_maps/([\w.-]+?)--([\w.-]+)\.json")
COLUMNS = pyarrow.schema(
    [
        ("teacher", pyarrow.string()),
        ("layer", pyarrow.int32()),
        ("head", pyarrow.int32()),
        ("kept", pyarrow.bool_()),
        ("rank", pyarrow.int32()),
        ("accuracy_drop", pyarrow.float64()),
        ("logprob_drop", pyarrow.float64()),
        ("source", pyarrow.string()),
    ]
)


def push_head_maps(
    head_maps: list[HeadMap | str | os.PathLike],
    repo_id: str,
    scores: list[HeadScores | str | os.PathLike] = (),
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """
    Adds head maps to a data set repository, beside those that it holds, in one commit.

    Args:
        head_maps (`list`):
            Head maps, or whatever [`HeadMap.load`] takes. One of a teacher that is there already replaces it.
        repo_id (`str`):
            Data set repository, made if it is not there.
        scores (`list`, *optional*):
            Scores behind them, or files with such. Each must be the one that its teacher's map names.
        private (`bool`, *optional*):
            Whether a repository that is made now is private.
        revision (`str`, *optional*):
            Branch to commit to.
        create_pr (`bool`, *optional*, defaults to `False`):
            Open a pull request instead.
        commit_message (`str`, *optional*):
            First line of the commit.
        token (`str`, *optional*):
            Access token; by default the one of this login.
        dry_run (`bool`, *optional*, defaults to `False`):
            Only say what would change.

    Returns:
        [`~trainers.hub.hub_upload.Upload`]: with `changes`, `commit`, `pull_request` and `url`.

    Raises:
        `ValueError`: when a map or scores are not valid, do not belong together, or name no Hub id as their teacher.
        `OSError`: when the Hub refuses or cannot be reached; the repository is then as it was.
    """
    if create_pr and revision:
        raise ValueError("A pull request is opened against main; leave out revision.")
    given = [item if isinstance(item, HeadMap) else HeadMap.load(item) for item in head_maps]
    measured = [item if isinstance(item, HeadScores) else HeadScores.load(item) for item in scores]
    _check_given(given, measured)
    with tempfile.TemporaryDirectory() as folder, naming_hub_errors(repo_id):
        folder, api = Path(folder), HfApi(token=token)
        _fetch_all(api, repo_id, revision, folder)
        for head_map in given:
            name = _file_name(head_map.teacher.id)
            head_map.save(folder / "head_maps" / name)
            old = folder / "scores" / name
            if old.is_file() and HeadScores.load(old).sha256 != head_map.scores_sha256:
                old.unlink()
        for item in measured:
            item.save(folder / "scores" / _file_name(item.teacher.id))
        _write_table(folder, repo_id)
        upload = Upload(api, folder, repo_id, revision or "main", create_pr, "dataset", stale=("scores/*",))
        upload.look()
        upload.compare()
        if not dry_run:
            names = ", ".join(head_map.teacher.id for head_map in given)
            upload.send(private, commit_message or f"Head map of {names}")
    return upload


def pull_head_map(
    repo_id: str, teacher: str | None = None, revision: str | None = None, token: str | None = None
) -> HeadMap:
    """
    Fetches one head map from a data set repository.

    Args:
        repo_id (`str`):
            Data set repository of head maps.
        teacher (`str`, *optional*):
            Hub id of the teacher; not needed where the repository has one map only.
        revision (`str`, *optional*):
            Commit, tag or branch.
        token (`str`, *optional*):
            Access token; by default the one of this login.

    Raises:
        `FileNotFoundError`: when it has no map of that teacher; the message lists those it has.
        `ValueError`: when several would do, or the file is too large or no valid head map of that teacher.
        `OSError`: when there is no such repository, or the Hub cannot be reached.
    """
    with naming_hub_errors(repo_id):
        return _pull(repo_id, teacher, revision, token)


def find_head_map(
    source: str | os.PathLike, teacher: str | None = None, revision: str | None = None, token: str | None = None
) -> HeadMap:
    """
    Loads a head map from wherever `source` says.

    Args:
        source (`str` or `os.PathLike`):
            What [`HeadMap.load`] takes, or a data set repository of head maps.
        teacher (`str`, *optional*):
            Hub id of the teacher, to choose by where a repository has several maps.
        revision (`str`, *optional*):
            Commit, tag or branch of a repository.
        token (`str`, *optional*):
            Access token; by default the one of this login.

    Raises:
        `FileNotFoundError`, `ValueError`, `OSError`: as [`HeadMap.load`] and [`pull_head_map`].
    """
    name = str(source)
    if Path(source).exists() or name in shipped_head_maps() or not REPO_ID.fullmatch(name):
        return HeadMap.load(source)
    with naming_hub_errors(name):
        try:
            return _pull(name, teacher, revision, token)
        except RepositoryNotFoundError:
            # Not a data set; then the model repository of a student.
            return _download(HfApi(token=token), name, STUDENT_MAP, revision, "model")


def shipped_scores() -> list[HeadScores]:
    """Scores behind the head maps that ship with the package, of those teachers that have any."""
    with importlib.resources.as_file(importlib.resources.files("hub_cards")) as folder:
        return [HeadScores.load(file) for file in sorted((folder / "scores").glob("*.json"))]


def _pull(repo_id: str, teacher: str | None, revision: str | None, token: str | None) -> HeadMap:
    api = HfApi(token=token)
    names = [name for name in api.list_repo_files(repo_id, revision=revision, repo_type="dataset")]
    known = {"/".join(match.groups()): match[0] for match in map(MAP_NAME.fullmatch, names) if match}
    if teacher is None and len(known) == 1:
        teacher = next(iter(known))
    if teacher is None:
        raise ValueError(f"{repo_id} has {len(known)} head maps; name the teacher: {', '.join(sorted(known))}.")
    if teacher not in known:
        raise FileNotFoundError(
            f"{repo_id} has no head map of {teacher}; it has {', '.join(sorted(known)) or 'none'}."
        )
    head_map = _download(api, repo_id, known[teacher], revision, "dataset")
    if head_map.teacher.id != teacher:
        raise ValueError(f"{known[teacher]} of {repo_id} is the head map of {head_map.teacher.id}, not of {teacher}.")
    return head_map


def _download(api: HfApi, repo_id: str, path: str, revision: str | None, repo_type: str) -> HeadMap:
    file = download_small(repo_id, path, MAX_BYTES, revision, repo_type, api.token)
    try:
        return HeadMap.from_dict(read_json(file, max_bytes=MAX_BYTES))
    except ValueError as error:
        raise ValueError(f"{path} of {repo_id}: {error}") from error


def _check_given(head_maps: list[HeadMap], scores: list[HeadScores]) -> None:
    by_teacher = {head_map.teacher.id: head_map for head_map in head_maps}
    for head_map in head_maps:
        if not REPO_ID.fullmatch(head_map.teacher.id):
            raise ValueError(f"The teacher {head_map.teacher.id} is no Hub id; nobody else could use its head map.")
    for item in scores:
        head_map = by_teacher.get(item.teacher.id)
        if head_map is None or head_map.scores_sha256 != item.sha256:
            raise ValueError(
                f"The scores of {item.teacher.id} are not those that a head map given here was made from."
            )


def _fetch_all(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Fetches the maps and scores that are there, each validated: the table is made of all."""
    try:
        branches = {ref.name for ref in api.list_repo_refs(repo_id, repo_type="dataset").branches}
    except RepositoryNotFoundError:
        return
    where = {"repo_id": repo_id, "revision": revision if revision in branches else None, "repo_type": "dataset"}
    for name in api.list_repo_files(**where):
        match = MAP_NAME.fullmatch(name.replace("scores/", "head_maps/", 1))
        if not match:
            continue
        if name.startswith("head_maps/"):
            _download(api, repo_id, name, where["revision"], "dataset").save(folder / name)
        else:
            HeadScores.load(download_small(path=name, max_bytes=SCORES_BYTES, token=api.token, **where)).save(
                folder / name
            )


def _write_table(folder: Path, repo_id: str) -> None:
    """Writes the Parquet table and the card, from all maps and scores in `folder`."""
    maps = [HeadMap.load(file) for file in sorted((folder / "head_maps").glob("*.json"))]
    rows = []
    for head_map in maps:
        file = folder / "scores" / _file_name(head_map.teacher.id)
        rows += head_rows(head_map, HeadScores.load(file) if file.is_file() else None)
    (folder / "data").mkdir()
    table = pyarrow.Table.from_pylist(rows, schema=COLUMNS)
    pyarrow.parquet.write_table(table, folder / "data" / "heads.parquet")
    data = DatasetCardData(
        license="apache-2.0",
        pretty_name="Head maps",
        tags=["rad-hybrid", "attention", "head-map", f"arxiv:{PAPER}"],
        configs=[{"config_name": "heads", "data_files": "data/heads.parquet"}],
    )
    with importlib.resources.as_file(importlib.resources.files("hub_cards")) as cards:
        card = DatasetCard.from_template(
            data,
            template_path=str(cards / "head_maps_card.md.jinja"),
            rows=[_summary(head_map) for head_map in maps],
            teacher=maps[0].teacher.id,
            repo_id=repo_id,
        )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def head_rows(head_map: HeadMap, scores: HeadScores | None = None) -> list[dict]:
    """
    One row for each head of a teacher, as in `data/heads.parquet`.

    Args:
        head_map ([`~trainers.heads.head_map.HeadMap`]):
            Map of the teacher.
        scores ([`~trainers.heads.head_scoring.HeadScores`], *optional*):
            Scores behind it.
    """
    ranks, kept = {pair: rank for rank, pair in enumerate(head_map.ranking, start=1)}, set(head_map.pairs)
    return [
        {
            "teacher": head_map.teacher.id,
            "layer": layer,
            "head": head,
            "kept": (layer, head) in kept,
            "rank": ranks.get((layer, head)),
            "accuracy_drop": scores.accuracy_drop[layer][head] if scores else None,
            "logprob_drop": scores.logprob_drop[layer][head] if scores else None,
            "source": head_map.source,
        }
        for layer in range(head_map.teacher.num_hidden_layers)
        for head in range(head_map.teacher.num_attention_heads)
    ]


def _summary(head_map: HeadMap) -> list[str]:
    teacher = head_map.teacher
    groups = teacher.num_hidden_layers * teacher.num_key_value_heads
    source = head_map.source.replace("|", "\\|").replace("\n", " ")
    return [
        teacher.id,
        f"{head_map.num_kept} of {teacher.num_heads}",
        f"{len(head_map.kv_groups)} of {groups}",
        str(len(head_map.ranking)),
        source,
    ]


def _file_name(teacher: str) -> str:
    return teacher.replace("/", "--") + ".json"
