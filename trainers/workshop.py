"""
What the steps of a run share, each made once and only when a step asks for it: the teacher, its tokenizer, the
documents, the packed rows, and what the teacher said about them.

The students of one run are trained on the same rows in the same order, so in the distillation stage the teacher's
hidden states need computing for the first student only; [`Remembered`] keeps them for the others.
"""

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trainers.data import ProbeDocuments, Source, packed_dataset, source_from_settings
from trainers.data.packing import Manifest, load_packed
from trainers.documents import held_out, text_documents
from trainers.heads.head_map import TeacherShape
from trainers.precision import fast_dtype
from trainers.probes import probe_from_settings
from trainers.recipe import Recipe, StageSettings
from trainers.teachers import load_teacher, teacher_identity


ROOT = Path(__file__).resolve().parent.parent
DEFAULT_TEACHER = "smollm2"
DEFAULT_TEACHER_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Bytes of hidden states that may be kept for the next student.
MAX_REMEMBERED = 2**31
EXCERPT = ROOT / "examples" / "text"


def resolve_teacher(name: str) -> str:
    """
    Turns the name `smollm2` into a folder with the default teacher, fetched where it is not there yet; leaves any
    other name alone. Where hf-rad runs without its repository's `examples/`, the default teacher is its Hub id.
    """
    if name != DEFAULT_TEACHER:
        return name
    script = ROOT / "examples" / "smollm2" / "fetch.py"
    if not script.is_file():
        return DEFAULT_TEACHER_ID
    spec = importlib.util.spec_from_file_location("examples.smollm2.fetch", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.fetch())


def text_and_held_out(text: str | None, held_out_text: str | None = None) -> tuple[list[str], list[str]]:
    """
    Reads the text to train on and the text to measure the loss on.

    Args:
        text (`str`, *optional*):
            A .jsonl or .txt file (also compressed), a folder of them, or a Hub data set; by default the excerpt that
            comes with the repository.
        held_out_text (`str`, *optional*):
            The same for held-out text; by default that of the excerpt, or one document in twenty of `text`.

    Returns:
        `tuple[list[str], list[str]]`: training documents and held-out documents.
    """
    if text is not None and held_out_text is None:
        return held_out(text_documents(text))
    if not EXCERPT.is_dir() and (text is None or held_out_text is None):
        raise FileNotFoundError(
            "The text excerpt is part of the repository, and hf-rad is installed without it. Name a text: a .jsonl or "
            ".txt file, a folder of them, or a Hub data set."
        )
    sources = text or EXCERPT / "train.jsonl.xz", held_out_text or EXCERPT / "held_out.jsonl.xz"
    train, held = (text_documents(str(source)) for source in sources)
    return train, held


class Workshop:
    """
    Shared resources of one run.

    Args:
        recipe ([`~trainers.recipe.Recipe`]):
            The run.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.
    """

    def __init__(self, recipe: Recipe, progress: bool = True):
        self.recipe, self.progress = recipe, progress
        self._teachers: dict[torch.dtype, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        self._remembered: Remembered | None = None
        self._rows: dict[tuple, Dataset] = {}

    @functools.cached_property
    def teacher_path(self) -> str:
        return resolve_teacher(self.recipe.teacher)

    def teacher_in(self, dtype: torch.dtype) -> PreTrainedModel:
        """The teacher in a type, loaded once for each."""
        if dtype not in self._teachers:
            options = {"dtype": dtype, "device": default_device()}
            self._teachers[dtype] = load_teacher(self.teacher_path, self.recipe.teacher_revision, **options)
        return self._teachers[dtype][0]

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher in float32."""
        return self.teacher_in(torch.float32)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer; for a GGUF file, which holds both, the teacher is loaded with it."""
        path = Path(self.teacher_path)
        if path.exists() and not (path / "tokenizer_config.json").is_file():
            self.teacher_in(torch.float32)
            return self._teachers[torch.float32][1]
        tokenizer = AutoTokenizer.from_pretrained(self.teacher_path, revision=self.recipe.teacher_revision)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @contextlib.contextmanager
    def stage_teacher(self, stage: str, num_tokens: int) -> Iterator[PreTrainedModel]:
        """
        Lends the teacher to a training stage, in the type that matrix products are quickest in here. In the
        distillation stage of a run with several students it remembers what it said, where that fits into memory.
        """
        teacher = self.teacher_in(fast_dtype(default_device()))
        size = num_tokens * teacher.config.hidden_size * teacher.dtype.itemsize
        if stage in ("orientation", "alignment") or len(self.recipe.students) == 1 or size > MAX_REMEMBERED:
            yield teacher
            return
        self._remembered = self._remembered or Remembered(teacher.model.forward)
        teacher.model.forward = self._remembered
        try:
            yield teacher
        finally:
            del teacher.model.forward  # the class's own shows again

    @property
    def teacher_name(self) -> str:
        """The name under which artefacts speak of the teacher."""
        return teacher_identity(self.teacher_path)

    @property
    def shape(self) -> TeacherShape:
        """Name and head layout of the teacher."""
        return TeacherShape.from_config(self.teacher.config, self.teacher_name, self.recipe.teacher_revision)

    @property
    def trained_probes(self) -> list[dict]:
        """Settings of the probes in the training data."""
        packed = self.recipe.data.packed
        return Manifest.load(packed).probes if packed else self.recipe.trained_probes()

    @functools.cached_property
    def _documents(self) -> tuple[list[str], list[str]]:
        return text_and_held_out(self.recipe.data.text, self.recipe.data.held_out_text)

    def rows(self, num_tokens: int, purpose: str, settings: StageSettings | None = None) -> Dataset:
        """
        Packs text and probe documents in the recipe's shares into rows.

        Args:
            num_tokens (`int`):
                Least number of tokens.
            purpose (`str`):
                Name of the step the rows are for: each has draws of its own, whatever the order of the steps.
            settings ([`~trainers.recipe.StageSettings`], *optional*):
                The step's own length and packed folder, if it has them.
        """
        key = num_tokens, purpose, str(settings)
        if key not in self._rows:
            self._rows[key] = self._packed(num_tokens, purpose, settings or StageSettings())
        return self._rows[key]

    def _packed(self, num_tokens: int, purpose: str, settings: StageSettings) -> Dataset:
        data = self.recipe.data
        length, packed = settings.length or data.length, settings.packed or data.packed
        if packed:
            return self._packed_rows(num_tokens, purpose, packed, length)
        seed = int.from_bytes(hashlib.sha256(f"{purpose} {self.recipe.seed}".encode()).digest()[:4], "big")
        if data.sources:
            sources = [source_from_settings(source, seed, length) for source in data.sources]
            return packed_dataset(self.tokenizer, sources, length, num_tokens, seed, self.progress)
        return mixture_rows(
            self.tokenizer,
            self._documents[0],
            data.probes,
            data.probe_share,
            length,
            num_tokens,
            seed,
            self.progress,
        )

    def _packed_rows(self, num_tokens: int, purpose: str, packed: str, length: int) -> Dataset:
        """Rows of the packed folder: each step goes on where the one before ended, from the start again at the end."""
        recipe, theirs = self.recipe, Manifest.load(packed).length
        if length != theirs:
            raise ValueError(
                f"{'data.' if purpose == 'calibration' else ''}length is {length}, but the rows of {packed} have "
                f"{theirs} tokens. Write length: {theirs}, or pack rows of {length}."
            )
        rows = load_packed(packed, self.tokenizer)
        budgets = [("calibration", recipe.calibrate.tokens, recipe.data.packed)]
        budgets += [(name, stage.tokens, stage.packed or recipe.data.packed) for name, stage in recipe.stages()]
        before = itertools.takewhile(lambda budget: budget[0] != purpose, budgets)
        start = sum(math.ceil(tokens / length) for _, tokens, folder in before if folder == packed)
        return rows.select([(start + i) % len(rows) for i in range(math.ceil(num_tokens / length))])

    def held_out_rows(self, num_tokens: int) -> Dataset:
        """Packs text that no student is trained on."""
        sources = [Source(self._documents[1], 1.0, name="held-out text")]
        return packed_dataset(self.tokenizer, sources, self.recipe.data.length, num_tokens, 0, False)


def mixture_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    probes: list[dict],
    probe_share: float,
    length: int,
    num_tokens: int,
    seed: int,
    progress: bool = True,
) -> Dataset:
    """
    Packs text and the documents of probes into rows.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        documents (`list[str]`):
            Text.
        probes (`list[dict]`):
            Settings of the probes, which get equal shares.
        probe_share (`float`):
            Share of the tokens that comes from them.
        length (`int`):
            Tokens of a row.
        num_tokens (`int`):
            Least number of tokens.
        seed (`int`):
            Seed of the order of the documents and of the probes' draws.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    probe_share = probe_share if probes else 0.0
    sources = [Source(random.Random(seed).sample(documents, len(documents)), 1 - probe_share)]
    for settings in probes if probe_share else []:
        probe = probe_from_settings(settings)
        sources.append(Source(ProbeDocuments(probe, seed), probe_share / len(probes), whole=True, name=probe.name))
    return packed_dataset(tokenizer, sources, length, num_tokens, seed, progress)


class Remembered:
    """
    Stands in for the forward of a frozen teacher's body and keeps what it gave for every batch, so that a second
    student that sees the same batches costs no second teacher pass.

    Args:
        forward (`Callable`):
            The body's own forward.
    """

    def __init__(self, forward: Callable):
        self.forward, self.kept = forward, {}

    def __call__(self, **inputs):
        digest = hashlib.sha256()
        for name, value in sorted(inputs.items()):
            digest.update(name.encode() + (value.cpu().numpy().tobytes() if torch.is_tensor(value) else b""))
        key = digest.digest()
        if key not in self.kept:
            self.kept[key] = self.forward(**inputs)
        return self.kept[key]


def default_device() -> torch.device:
    """The accelerator of this machine (with several, and processes for them, this process's own), or its CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
