"""
Recipes: everything that `hf-rad run` needs to know, read from one YAML file and checked before anything heavy starts.

A recipe names a teacher, one or more students of it, and the settings of each step; what it leaves out has the
defaults of the classes below. An unknown key, a wrong type and an impossible value each end with one sentence that
names the key.

    recipe = Recipe.load("recipes/demo.yaml")
    recipe = Recipe.from_dict({"teacher": "HuggingFaceTB/SmolLM2-135M-Instruct", "select": {"heads": 8}})
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml


# What a student keeps: the heads that were found, none at all, or as many drawn at random.
STUDENTS = ("found", "none", "random")
MIXINGS = ("replace", "parallel")
ROOT = Path(__file__).resolve().parent.parent
# Questions of four share a dictionary and its cost.
STANDARD_TASKS = tuple(
    {"probe": {"name": "kv", "shots": 2, "queries": 4, **probe}, "num_examples": 100}
    for probe in (
        {"format": "json", "pairs": 10},
        {"format": "json", "pairs": 20},
        {"format": "json", "pairs": 40},
        {"format": "json", "pairs": 20, "values": "words"},
        {"format": "paper", "pairs": 20},
        {"format": "lines", "pairs": 20},
        {"name": "phone_book", "pairs": 10},
    )
)


@dataclass(frozen=True)
class ScoreSettings:
    """
    How the teacher's heads are scored.

    Args:
        probe (`dict`):
            Settings of the probe, as [`~trainers.probes.probe_from_settings`] takes them.
        num_examples (`int`, *optional*, defaults to `40`):
            Questions asked with each head ablated.
        min_accuracy (`float`, *optional*, defaults to `0.6`):
            Accuracy below which the teacher has failed the probe, so that no scores are written.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the matrix products: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        ablation (`str`, *optional*, defaults to `"zero"`):
            What an ablated head gives: `"zero"` or `"mean"`.
        answers (`str`, *optional*, defaults to `"generated"`):
            When an answer counts: `"generated"` or `"candidates"`.
        screen (`str`, *optional*), survivors (`int`, *optional*):
            Screen of [`trainers.heads.screens`] that chooses the heads to ablate, and how many it lets through.
        text_tokens (`int`, *optional*, defaults to `0`):
            Tokens of held-out text on which every head is ablated too, for its divergence there.
    """

    probe: dict = field(
        default_factory=lambda: {"name": "kv", "format": "json", "pairs": 20, "shots": 2, "queries": 10}
    )
    num_examples: int = 40
    min_accuracy: float = 0.6
    dtype: str = "auto"
    ablation: str = "zero"
    answers: str = "generated"
    screen: str | None = None
    survivors: int | None = None
    text_tokens: int = 0


@dataclass(frozen=True)
class SelectSettings:
    """
    How many heads stay attention, either `heads` or a `fraction` of all; or a ready-made `head_map`, which makes
    scoring unnecessary.

    Args:
        heads (`int`, *optional*):
            Number of kept heads.
        fraction (`float`, *optional*):
            Kept heads as a share of all, between 0 and 1.
        head_map (`str`, *optional*):
            File, folder, name of a shipped map or Hub id, as [`~trainers.hub.head_map_repo.find_head_map`] takes it.
        head_map_revision (`str`, *optional*):
            Branch, tag or commit of the map's Hub repo.
    """

    heads: int | None = None
    fraction: float | None = None
    head_map: str | None = None
    head_map_revision: str | None = None

    def __post_init__(self):
        budgets = ("heads", "fraction", "head_map")
        given = [name for name in budgets if dataclasses.asdict(self)[name] is not None]
        if len(given) > 1:
            raise ValueError(f"select: {' and '.join(given)} exclude each other; give one of them.")
        if self.heads is not None and self.heads < 0:
            raise ValueError(f"select.heads is {self.heads}; it cannot be negative.")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"select.fraction is {self.fraction}; it must be above 0 and at most 1.")


@dataclass(frozen=True)
class ConvertSettings:
    """
    How the converted heads are built.

    Args:
        mixing (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"parallel"`.
        state_size (`int`, *optional*, defaults to `8`):
            State size N of a recurrent head.
    """

    mixing: str = "replace"
    state_size: int = 8

    def __post_init__(self):
        if self.mixing not in MIXINGS:
            raise ValueError(f"convert.mixing is {self.mixing!r}; choose one of {', '.join(MIXINGS)}.")
        if self.state_size < 1:
            raise ValueError(f"convert.state_size is {self.state_size}; it must be at least 1.")


@dataclass(frozen=True)
class DataSettings:
    """
    What the students are calibrated and trained on.

    Args:
        text (`str`, *optional*):
            A .jsonl or .txt file (also compressed), a folder of them, or a Hub data set; by default the excerpt that
            comes with the repository.
        held_out_text (`str`, *optional*):
            The same for the loss on held-out text; by default that of the excerpt, or one document in twenty of
            `text`.
        probes (`list[dict]`, *optional*):
            Settings of the probes whose documents are mixed in.
        probe_share (`float`, *optional*, defaults to `0.4`):
            Share of the tokens that comes from probes.
        length (`int`, *optional*, defaults to `512`):
            Tokens of one training sequence.
        sources (`list[dict]`, *optional*):
            A weighted mixture instead of `text` and `probes`: sources as
            [`~trainers.data.source_from_settings`] takes them.
        packed (`str`, *optional*):
            Folder that `hf-rad pack` wrote, instead of all of these: its rows are calibrated and trained on, each
            step going on where the one before ended.
    """

    text: str | None = None
    held_out_text: str | None = None
    probes: list[dict] = field(default_factory=list)
    probe_share: float = 0.4
    length: int = 512
    sources: list[dict] = field(default_factory=list)
    packed: str | None = None

    def __post_init__(self):
        if self.sources and (self.probes or self.text):
            raise ValueError("data.sources excludes data.text and data.probes; name all of them as sources.")
        if self.packed and (self.sources or self.probes):
            raise ValueError("data.packed excludes data.sources and data.probes: its rows hold what they hold.")
        if not 0 <= self.probe_share < 1:
            raise ValueError(f"data.probe_share is {self.probe_share}; it must be at least 0 and below 1.")
        if self.length < 2:
            raise ValueError(f"data.length is {self.length}; a sequence needs at least 2 tokens.")

    def mixture(self, default_text: str) -> list[dict]:
        """The sources of the mixture as plain values; `default_text` stands in where no text is named."""
        if self.sources:
            return self.sources
        share = self.probe_share if self.probes else 0.0
        text = {"text": self.text or default_text, "weight": 1 - share}
        return [text, *({"probe": probe, "weight": share / len(self.probes)} for probe in self.probes if share)]


@dataclass(frozen=True)
class CalibrateSettings:
    """
    The closed-form fit of each layer's readout.

    Args:
        tokens (`int`, *optional*, defaults to `50000`):
            Tokens of the fit; 0 leaves the step out.
    """

    tokens: int = 50_000


@dataclass(frozen=True)
class StageSettings:
    """
    One training stage, a run of [`~trainers.distillation.distill_trainer.RadDistillationTrainer`].

    Args:
        tokens (`int`, *optional*, defaults to `0`):
            Tokens to train on; 0 leaves the stage out.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens of one optimizer step.
        arguments (`dict`, *optional*):
            Any other field of [`~trainers.distillation.distill_config.RadDistillationConfig`], such as `learning_rate`.
        length (`int`, *optional*):
            Tokens of one sequence in this stage, where it is not that of `data`.
        packed (`str`, *optional*):
            Packed folder of this stage, where it is not that of `data`.
        measure_steps (`int`, *optional*):
            Measure the student as `eval` says every so many steps, into `measurements.jsonl` of the stage's folder.
    """

    tokens: int = 0
    batch_tokens: int = 4096
    arguments: dict = field(default_factory=dict)
    length: int | None = None
    packed: str | None = None
    measure_steps: int | None = None


@dataclass(frozen=True)
class EvalSettings:
    """
    How teacher and students are measured.

    Args:
        tasks (`list[dict]`, *optional*, defaults to `STANDARD_TASKS`):
            Tasks as [`~trainers.tasks.task_from_settings`] takes them.
        text_tokens (`int`, *optional*, defaults to `32768`):
            Held-out tokens for the loss on text; 0 leaves it out.
        batch_size (`int`, *optional*, defaults to `25`):
            Prompts generated for at once.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Type of the weights while evaluating: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        floor (`float`, *optional*, defaults to `0.2`):
            Tasks on which the teacher scores less are left out of the coverage.
    """

    tasks: list[dict] = field(default_factory=lambda: list(STANDARD_TASKS))
    text_tokens: int = 32_768
    batch_size: int = 25
    dtype: str = "auto"
    floor: float = 0.2


@dataclass(frozen=True)
class PublishSettings:
    """
    Where the student goes.

    Args:
        repo_id (`str`, *optional*):
            Hub repository to push to; by default the staged folder `published/` is all there is.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        local_hub (`bool`, *optional*, defaults to `False`):
            Whether to push to a Hub server of the checkout's own that lives as long as the step, under its user
            `alice`: the whole way without an account.
        datasets (`list[str]`, *optional*), language (`list[str]`, *optional*, defaults to `["en"]`):
            Hub ids of the training data and codes of its languages, for the card.
    """

    repo_id: str | None = None
    private: bool = False
    local_hub: bool = False
    datasets: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=lambda: ["en"])

    def __post_init__(self):
        if self.local_hub and not (self.repo_id or "").startswith("alice/"):
            raise ValueError(f"publish.repo_id is {self.repo_id!r}; on the local Hub it begins with `alice/`.")


@dataclass(frozen=True)
class Recipe:
    """
    A whole run: one teacher, its students, and the settings of every step.

    Args:
        teacher (`str`):
            Hub id, folder or `.gguf` file; `"smollm2"` fetches the default teacher of `examples/smollm2`.
        teacher_revision (`str`, *optional*):
            Branch, tag or commit of the teacher's Hub repo.
        out (`str`, *optional*, defaults to `"runs/default"`):
            Folder of the run's artefacts.
        seed (`int`, *optional*, defaults to `0`):
            Seed of probes, data order and new parameters.
        students (`list[str]`, *optional*, defaults to `["found"]`):
            What each student keeps: `"found"` heads, `"none"`, `"random"` ones. The first is the one that is
            published; the others are controls with the same training.
        score, select, convert, data, calibrate, orient, align, distill, long, eval, publish:
            Settings of each step; with an `orient` stage the closed-form fit comes after it, not before; `long` is a second distillation, meant for longer sequences.
    """

    teacher: str
    teacher_revision: str | None = None
    out: str = "runs/default"
    seed: int = 0
    students: list[str] = field(default_factory=lambda: ["found"])
    score: ScoreSettings = field(default_factory=ScoreSettings)
    select: SelectSettings = field(default_factory=SelectSettings)
    convert: ConvertSettings = field(default_factory=ConvertSettings)
    data: DataSettings = field(default_factory=DataSettings)
    calibrate: CalibrateSettings = field(default_factory=CalibrateSettings)
    orient: StageSettings = field(default_factory=StageSettings)
    align: StageSettings = field(default_factory=StageSettings)
    distill: StageSettings = field(default_factory=StageSettings)
    long: StageSettings = field(default_factory=StageSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    publish: PublishSettings = field(default_factory=PublishSettings)

    def __post_init__(self):
        unknown = [student for student in self.students if student not in STUDENTS]
        if unknown or not self.students or len(set(self.students)) != len(self.students):
            raise ValueError(f"students is {self.students}; list one or more of {', '.join(STUDENTS)}, each once.")

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """
        Makes a recipe of plain values.

        Raises:
            `ValueError`: for an unknown or missing key, a wrong type or an impossible value; the message names the
            key.
        """
        return _parse(cls, values, "")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Recipe":
        """
        Reads a recipe from a YAML file.

        Raises:
            `FileNotFoundError`: when there is no such file.
            `ValueError`: when it is not YAML or not a recipe; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no recipe {path}.")
        try:
            return cls.from_dict(yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader))
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from error

    def stages(self) -> list[tuple[str, StageSettings]]:
        """Name and settings of every training stage, in their order, those without tokens too."""
        stages = ("orientation", self.orient), ("alignment", self.align), ("distillation", self.distill)
        return [*stages, ("long", self.long)]

    @property
    def fitted_at_conversion(self) -> int:
        """Tokens of the closed-form fit at conversion. An orientation changes what the fit reads, so it comes first."""
        return 0 if self.orient.tokens else self.calibrate.tokens

    def trained_probes(self) -> list[dict]:
        """Settings of the probes in the training data; those of a packed folder stand in its manifest."""
        if self.data.sources:
            return [source["probe"] for source in self.data.sources if "probe" in source]
        return self.data.probes if self.data.probe_share else []

    def to_dict(self) -> dict:
        """Returns plain values that [`Recipe.from_dict`] reads back."""
        return dataclasses.asdict(self)


class _Loader(yaml.SafeLoader):
    """Reads `2e-5`, without a point, as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def shipped_recipe(name: str) -> Path:
    """
    Path of a recipe of the repository's `recipes/`.

    Raises:
        `FileNotFoundError`: when hf-rad runs without its repository, or there is no such recipe.
    """
    path = ROOT / "recipes" / f"{name}.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path.name} in {path.parent}: recipes come with the repository. Run from a clone of it "
            "(pip install -e .), or write a recipe of your own for `hf-rad run --config`."
        )
    return path


def _parse(kind, value, where: str):
    """Turns `value`, as YAML gives it, into the annotated type `kind`; `where` is its dotted key."""
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        return _parse(next(option for option in arguments if option is not type(None)), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; it must be a list.")
        return [_parse(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    # YAML reads `2e-5`, without a point, as a string.
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {value!r}; it must be of type {kind.__name__}.")
    return value


def _parse_dataclass(kind, values, where: str):
    prefix = f"{where}." if where else ""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'A recipe'} is {values!r}; it must be a mapping of keys to values.")
    known = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else f" Known keys: {', '.join(known)}."
            raise ValueError(f"There is no key {prefix}{key}.{hint}")
    for name, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"The key {prefix}{name} is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _parse(hints[key], value, prefix + key) for key, value in values.items()})
