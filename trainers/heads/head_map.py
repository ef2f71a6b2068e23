"""
Head maps: which query heads of a teacher stay attention, and where that choice comes from.

A head map is the artefact between selection and conversion (paper, section 4.1: "a sorted list of heads, from most to
least critical", of which the first k are kept; https://huggingface.co/papers/2602.11374). On disk it is one JSON file:

    {"schema_version": 1,
     "teacher": {"id", "revision", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"},
     "kept_heads": [[], [4], [0, 1], ...],        one sorted list of query heads for each layer
     "selection": {"method": "top-k", "heads": 8},
     "ranking": [[layer, head], ...],              best first; may be longer than the kept heads, or empty
     "probe": {...} or null,                       settings of the probe that scored the heads
     "scores_sha256": "..." or null,               digest of the scores.json behind the ranking
     "source": "where the order comes from",
     "created_with": "hf-rad 0.1.0"}

`HeadMap.load` takes such a file, a folder that holds one, the name of a teacher whose map ships with the package
(`hub_cards/head_maps/`), or a Hub repo of a student.
"""

import importlib.metadata
import importlib.resources
import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from trainers.files import read_json, write_json


SCHEMA_VERSION = 1
MAX_BYTES = 4 * 2**20
# Where a student keeps its head map.
STUDENT_MAP = "rad/head_map.json"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class TeacherShape:
    """
    Name and head layout of a teacher: what a head map must agree with before it can be used.

    Args:
        id (`str`):
            Hub id, folder or file the teacher came from.
        revision (`str` or `None`):
            Commit of the Hub repo, if known.
        num_hidden_layers (`int`):
            Layers L.
        num_attention_heads (`int`):
            Query heads H of a layer.
        num_key_value_heads (`int`):
            KV heads K of a layer; H must be a multiple of it.
        head_dim (`int`):
            Size P of one head.
    """

    id: str
    revision: str | None
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def __post_init__(self):
        for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
            value = asdict(self)[name]
            if not _is_index(value) or value == 0:
                raise ValueError(f"A teacher's {name} must be a positive integer, not {value!r}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} KV heads evenly."
            )

    @classmethod
    def from_config(cls, config, id: str, revision: str | None = None) -> "TeacherShape":
        """Reads the shape off a Llama-like `config` ([`~transformers.PreTrainedConfig`])."""
        values = config.to_dict()
        heads = values["num_attention_heads"]
        return cls(
            id=id,
            revision=revision,
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        )

    @property
    def num_heads(self) -> int:
        """Query heads in all layers together."""
        return self.num_hidden_layers * self.num_attention_heads

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    def same_layout(self, other: "TeacherShape") -> bool:
        """Whether both have the same layers, heads, KV heads and head size, whatever their names."""
        return self.layout == other.layout

    @property
    def layout(self) -> str:
        return (
            f"{self.num_hidden_layers} layers x {self.num_attention_heads} query heads on "
            f"{self.num_key_value_heads} KV heads of size {self.head_dim}"
        )


@dataclass(frozen=True)
class HeadMap:
    """
    The kept heads of one teacher, with their provenance. Checked when it is made: a map that cannot fit its own
    teacher's shape raises `ValueError`. A map that keeps no head at all (the control) is legal.

    Args:
        teacher ([`TeacherShape`]):
            Teacher that the heads belong to.
        kept_heads (`list[list[int]]`):
            One sorted list of query-head indices for each layer.
        selection (`dict`, *optional*):
            How the heads were chosen, such as `{"method": "top-k", "heads": 8}`.
        ranking (`list[tuple[int, int]]`, *optional*):
            (layer, query head), best first.
        probe (`dict`, *optional*):
            Settings of the probe that scored the heads.
        scores_sha256 (`str`, *optional*):
            Digest of the `scores.json` behind the ranking.
        source (`str`, *optional*, defaults to `""`):
            Where the order comes from.
    """

    teacher: TeacherShape
    kept_heads: list[list[int]]
    selection: dict = field(default_factory=dict)
    ranking: list[tuple[int, int]] = field(default_factory=list)
    probe: dict | None = None
    scores_sha256: str | None = None
    source: str = ""

    def __post_init__(self):
        layers, heads = self.teacher.num_hidden_layers, self.teacher.num_attention_heads
        if not isinstance(self.kept_heads, list) or len(self.kept_heads) != layers:
            raise ValueError(f"kept_heads must hold one list for each of the {layers} layers of {self.teacher.id}.")
        for layer, kept in enumerate(self.kept_heads):
            if not isinstance(kept, list) or not all(_is_index(head) and head < heads for head in kept):
                raise ValueError(
                    f"kept_heads of layer {layer} is {kept!r}: not a list of heads from 0 to {heads - 1}."
                )
            if kept != sorted(set(kept)):
                raise ValueError(f"kept_heads of layer {layer} is {kept}: must be sorted and name each head once.")
        for pair in self.ranking:
            _check_pair(pair, self.teacher)
        if len(set(self.ranking)) != len(self.ranking):
            raise ValueError("The ranking names some head twice.")

    @classmethod
    def from_pairs(cls, teacher: TeacherShape, pairs: list[tuple[int, int]], **provenance) -> "HeadMap":
        """
        Makes a head map that keeps exactly `pairs`.

        Args:
            teacher ([`TeacherShape`]):
                Teacher that the heads belong to.
            pairs (`list[tuple[int, int]]`):
                (layer, query head) of each kept head, in any order.
            **provenance:
                `selection`, `ranking`, `probe`, `scores_sha256`, `source` of the map.

        Raises:
            `ValueError`: when a pair is outside the teacher's shape or named twice.
        """
        pairs = [tuple(pair) for pair in pairs]
        for pair in pairs:
            _check_pair(pair, teacher)
        if len(set(pairs)) != len(pairs):
            raise ValueError("Some head is named twice among the heads to keep.")
        kept = [sorted(head for at, head in pairs if at == layer) for layer in range(teacher.num_hidden_layers)]
        return cls(teacher, kept, **provenance)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(layer, query head) of every kept head, by layer."""
        return [(layer, head) for layer, kept in enumerate(self.kept_heads) for head in kept]

    @property
    def num_kept(self) -> int:
        """Number of kept heads."""
        return len(self.pairs)

    @property
    def kv_groups(self) -> set[tuple[int, int]]:
        """(layer, KV head) of every KV group that a kept head reads: the unit that costs cache bytes."""
        return {(layer, head // self.teacher.queries_per_group) for layer, head in self.pairs}

    @property
    def summary(self) -> str:
        """One line: kept heads, the layers they stand in, and the KV groups that they cost."""
        groups = self.teacher.num_hidden_layers * self.teacher.num_key_value_heads
        return (
            f"{self.num_kept} of {self.teacher.num_heads} heads ({self.num_kept / self.teacher.num_heads:.1%}) in "
            f"{sum(map(bool, self.kept_heads))} of {self.teacher.num_hidden_layers} layers; {len(self.kv_groups)} of "
            f"{groups} KV groups ({len(self.kv_groups) / groups:.1%} of the KV cache)"
        )

    def check_teacher(self, config, id: str = "the teacher given") -> None:
        """
        Checks that the map fits a teacher.

        Args:
            config ([`~transformers.PreTrainedConfig`]):
                Configuration of the teacher about to be converted.
            id (`str`, *optional*, defaults to `"the teacher given"`):
                Its name, for the message.

        Raises:
            `ValueError`: when the shapes differ; the message names both.
        """
        other = TeacherShape.from_config(config, id)
        if not self.teacher.same_layout(other):
            raise ValueError(
                f"This head map was made for {self.teacher.id} ({self.teacher.layout}), but {id} has {other.layout}. "
                "Score the heads of this teacher, or use the map of the teacher it was made for."
            )

    def to_dict(self) -> dict:
        """Returns the map as it stands on disk."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self), "created_with": _created_with()}
        content["ranking"] = [list(pair) for pair in self.ranking]
        return content

    @classmethod
    def from_dict(cls, content: object) -> "HeadMap":
        """
        Reads a map from its JSON content.

        Raises:
            `ValueError`: when a field is missing, unknown or cannot be right, or when the schema is newer than ours.
        """
        if not isinstance(content, dict) or "schema_version" not in content:
            raise ValueError("This is not a head map: it has no schema_version.")
        version = content["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(f"This head map has schema version {version}; this hf-rad reads {SCHEMA_VERSION}.")
        known = {item.name for item in fields(cls)}
        unknown = set(content) - known - {"schema_version", "created_with"}
        missing = {"teacher", "kept_heads", "source"} - set(content)
        if unknown or missing:
            raise ValueError(f"Not a head map: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}.")
        for name, kind in (("selection", dict), ("ranking", list), ("source", str)):
            if name in content and not isinstance(content[name], kind):
                raise ValueError(f"{name} of a head map must be a {kind.__name__}, not {content[name]!r}.")
        values = {name: content[name] for name in known if name in content}
        try:
            values["teacher"] = TeacherShape(**content["teacher"])
        except TypeError as error:
            raise ValueError(f"The teacher of a head map needs id, revision and four sizes: {error}") from error
        values["ranking"] = [tuple(pair) if isinstance(pair, list) else pair for pair in content.get("ranking", [])]
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the map as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadMap":
        """
        Loads a head map.

        Args:
            path (`str` or `os.PathLike`):
                A JSON file; a folder with `head_map.json` or `rad/head_map.json`; the id of a teacher whose map ships
                with the package, such as `meta-llama/Llama-3.2-1B-Instruct`; or the Hub id of a published student.

        Raises:
            `FileNotFoundError`: when none of these exists.
            `ValueError`: when the content is not a valid head map; the message names the file.
        """
        file = _locate(path)
        try:
            return cls.from_dict(read_json(file, max_bytes=MAX_BYTES))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def shipped_head_maps() -> list[str]:
    """Names of the teachers whose head map ships with the package."""
    names = (item.name for item in importlib.resources.files("hub_cards").joinpath("head_maps").iterdir())
    return sorted(
        name.removesuffix(".json").replace("--", "/")
        for name in names
        if name.endswith(".json") and not name.endswith(".scores.json")
    )


def shipped_head_map(name: str) -> HeadMap:
    """
    Loads the head map of a known teacher from the package.

    Args:
        name (`str`):
            Hub id of the teacher, such as `Qwen/Qwen2.5-1.5B-Instruct`.

    Raises:
        `FileNotFoundError`: when no map of that teacher ships; the message lists those that do.
    """
    if name not in shipped_head_maps():
        raise FileNotFoundError(f"No head map of {name} ships with hf-rad; those that do: {shipped_head_maps()}.")
    resource = importlib.resources.files("hub_cards").joinpath("head_maps", name.replace("/", "--") + ".json")
    return HeadMap.from_dict(json.loads(resource.read_text(encoding="utf-8")))


def download_small(
    repo_id: str,
    path: str,
    max_bytes: int,
    revision: str | None = None,
    repo_type: str = "model",
    token: str | None = None,
) -> Path:
    """
    Fetches one file of a Hub repository after a look at its size.

    Args:
        repo_id (`str`), path (`str`), revision (`str`, *optional*), repo_type (`str`, *optional*, defaults to
        `"model"`):
            Where the file is.
        max_bytes (`int`):
            Size above which it is not fetched.
        token (`str`, *optional*):
            Access token; by default the one of this login.

    Raises:
        `FileNotFoundError`: when the repository has no such file.
        `ValueError`: when it is too large.
    """
    where = {"repo_id": repo_id, "revision": revision, "repo_type": repo_type, "token": token}
    try:
        found = HfApi().get_paths_info(paths=[path], **where)
    except OfflineModeIsEnabled:
        # What is in the cache was looked at when it came.
        return Path(hf_hub_download(filename=path, **where))
    if not found:
        raise FileNotFoundError(f"{repo_id} has no {path}: it is neither a student nor a collection of head maps.")
    if found[0].size > max_bytes:
        raise ValueError(f"{path} of {repo_id} has {found[0].size} bytes, more than the {max_bytes} allowed.")
    return Path(hf_hub_download(filename=path, **where))


def _locate(path: str | os.PathLike) -> Path:
    name, path = str(path), Path(path)
    for candidate in (path, path / "head_map.json", path / "rad" / "head_map.json"):
        if candidate.is_file():
            return candidate
    if name in shipped_head_maps():
        with importlib.resources.as_file(importlib.resources.files("hub_cards")) as folder:
            return folder / "head_maps" / (name.replace("/", "--") + ".json")
    reason = ""
    if REPO_ID.fullmatch(name) and not path.exists():
        try:
            return download_small(name, STUDENT_MAP, MAX_BYTES)
        except (HfHubHTTPError, OSError) as error:
            reason = f" Nor could it be read from the Hub ({type(error).__name__})."
    raise FileNotFoundError(
        f"There is no head map at {name}: it is neither a file, nor a folder with head_map.json, nor one of the maps "
        f"that ship with hf-rad ({', '.join(shipped_head_maps())}).{reason}"
    )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_pair(pair: object, teacher: TeacherShape) -> None:
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(_is_index(index) for index in pair):
        raise ValueError(f"{pair!r} is not a (layer, head) pair.")
    layer, head = pair
    if layer >= teacher.num_hidden_layers or head >= teacher.num_attention_heads:
        raise ValueError(f"Layer {layer}, head {head} does not exist in {teacher.id} ({teacher.layout}).")


def _created_with() -> str:
    try:
        return f"hf-rad {importlib.metadata.version('hf-rad')}"
    except importlib.metadata.PackageNotFoundError:
        return "hf-rad, not installed"
