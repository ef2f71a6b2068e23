"""
What a model is measured on: retrieval probes, reading tasks and multiple-choice sets, each with one `measure` method.

    {"probe": {"name": "kv", "format": "json", "pairs": 20}, "num_examples": 100, "trained_on": true}
    {"reading": "squad_v1.1_dev.jsonl.xz", "num_examples": 200}
    {"choices": "arc_easy.jsonl.xz", "num_examples": 200}

Probes and reading tasks generate greedily and look at the text that comes out. Reading tasks follow "Just Read Twice"
(https://huggingface.co/papers/2407.05483): context, then question, and the answer counts when the continuation
contains it after lower-casing and stripping punctuation. Multiple choice compares the log-likelihood of each choice,
divided by its characters. A task says whether its format was in the training data (`trained_on`), and every table
repeats it.
"""

import json
import lzma
import random
import string
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from trainers.continuations import continuation_log_likelihoods, generate_greedy
from trainers.probes import Example, Probe, probe_from_settings
from trainers.probes.asking import EncodedAnswer, is_correct, token_accuracy


@dataclass(frozen=True)
class ProbeTask:
    """
    A retrieval probe, scored by exact match of the greedy answer, or by the part of its tokens in their places.

    Args:
        probe ([`~trainers.probes.Probe`]):
            What is asked. With `queries` above 1 that many questions share a dictionary and its cost.
        num_examples (`int`, *optional*, defaults to `100`):
            Questions asked.
        trained_on (`bool`, *optional*, defaults to `False`):
            Whether training data held this format (other draws of it).
        per_token (`bool`, *optional*, defaults to `False`):
            Whether to count right tokens instead of right answers, as a long copy asks for.
    """

    probe: Probe
    num_examples: int = 100
    trained_on: bool = False
    per_token: bool = False

    def __post_init__(self):
        _check_count(self.num_examples)

    @property
    def name(self) -> str:
        return f"{self.probe.name}-tokens" if self.per_token else self.probe.name

    @property
    def metric(self) -> str:
        return "generated, tokens in place" if self.per_token else "generated exact match"

    def settings(self) -> dict:
        """Everything needed to make the task again with [`task_from_settings`]."""
        settings = {"probe": self.probe.settings(), "num_examples": self.num_examples, "trained_on": self.trained_on}
        return {**settings, "per_token": True} if self.per_token else settings

    def examples(self, seed: int) -> list[Example]:
        return self.probe.examples(self.num_examples, seed)

    def measure(self, model, tokenizer, batch_size: int, seed: int, progress: bool) -> float:
        """Returns the share of right answers, or of their tokens, between 0 and 1."""
        pairs = self.ask(model, tokenizer, batch_size, seed, progress)
        if self.per_token:
            return sum(token_accuracy(tokenizer, example, text) for example, text in pairs) / len(pairs)
        return sum(is_correct(text, example.answer) for example, text in pairs) / len(pairs)

    def ask(self, model, tokenizer, batch_size: int, seed: int, progress: bool) -> list[tuple[Example, str]]:
        """Returns each question with the model's greedy continuation of it."""
        examples = self.examples(seed)
        longest = max(len(EncodedAnswer.of(tokenizer, example).target) for example in examples)
        texts = generate_greedy(
            model,
            tokenizer,
            [example.prompt for example in examples],
            longest + 2,
            batch_size,
            self.probe.queries,
            progress,
            self.name,
        )
        return list(zip(examples, texts, strict=True))


@dataclass(frozen=True)
class ReadingTask:
    """
    Questions about a passage, from a JSON Lines file (plain or `.xz`) whose rows hold `context`, a `question` or an
    `attribute`, and `answers` (a list) or one `answer`.

    Args:
        path (`str`):
            The file.
        num_examples (`int`, *optional*, defaults to `100`):
            Questions asked. Rows that share a context follow each other in such files, so contexts are drawn first and
            one question of each.
        trained_on (`bool`, *optional*, defaults to `False`):
            Whether training data held texts of this format.
        max_prompt_characters (`int`, *optional*, defaults to `4000`):
            Rows with longer prompts are passed over; a prompt is never cut.
        max_new_tokens (`int`, *optional*, defaults to `48`):
            Tokens generated for each answer.
        benchmark (`dict`, *optional*):
            The public benchmark that the file holds, `{"dataset_id", "task_id"}` and, where known, `revision`: its
            result is then published as one of that benchmark too (`.eval_results/`).
    """

    path: str
    num_examples: int = 100
    trained_on: bool = False
    max_prompt_characters: int = 4000
    max_new_tokens: int = 48
    benchmark: dict | None = None
    metric = "generated, contained"

    def __post_init__(self):
        _check_count(self.num_examples)
        _check_benchmark(self.benchmark)

    @property
    def name(self) -> str:
        return "reading-" + _stem(self.path)

    def settings(self) -> dict:
        """Everything needed to make the task again with [`task_from_settings`]."""
        return _file_settings("reading", self)

    def examples(self, seed: int) -> list[tuple[str, list[str]]]:
        """Draws `num_examples` (prompt, accepted answers); the same seed gives the same ones."""
        by_context = {}
        for row in read_rows(self.path):
            question = _field(row, self.path, "question", "attribute")
            prompt = f"{_field(row, self.path, 'context')}\n\n"
            # An attribute continues the record it is asked of; a question is put as one.
            prompt += f"Question: {question}\n\nAnswer:" if "question" in row else f"{question}:"
            answers = _field(row, self.path, "answers", "answer")
            answers = answers if isinstance(answers, list) else [answers]
            if len(prompt) <= self.max_prompt_characters:
                by_context.setdefault(row["context"], []).append((prompt, answers))
        if len(by_context) < self.num_examples:
            raise ValueError(
                f"{self.path} has {len(by_context)} different contexts with prompts of at most "
                f"{self.max_prompt_characters} characters; {self.num_examples} are asked for. "
                "Lower num_examples or raise max_prompt_characters."
            )
        generator = random.Random(f"{self.name} {seed}")
        contexts = generator.sample(sorted(by_context), self.num_examples)
        return [generator.choice(by_context[context]) for context in contexts]

    def measure(self, model, tokenizer, batch_size: int, seed: int, progress: bool) -> float:
        """Returns the share of continuations that contain an accepted answer, between 0 and 1."""
        examples = self.examples(seed)
        prompts = [prompt for prompt, _ in examples]
        texts = generate_greedy(
            model, tokenizer, prompts, self.max_new_tokens, batch_size, progress=progress, description=self.name
        )
        found = [contains_answer(text, answers) for text, (_, answers) in zip(texts, examples, strict=True)]
        return sum(found) / len(found)


@dataclass(frozen=True)
class ChoiceTask:
    """
    Multiple choice by log-likelihood for each character, from a JSON Lines file (plain or `.xz`) whose rows hold
    `query` or `context` and `choices`, or `context_options` and one `continuation`; `gold` is the right one's index.

    Args:
        path (`str`):
            The file.
        num_examples (`int`, *optional*, defaults to `100`):
            Questions asked, drawn by the seed.
        trained_on (`bool`, *optional*, defaults to `False`):
            Whether training data held texts of this format.
        benchmark (`dict`, *optional*):
            The public benchmark that the file holds, `{"dataset_id", "task_id"}` and, where known, `revision`: its
            result is then published as one of that benchmark too (`.eval_results/`).
    """

    path: str
    num_examples: int = 100
    trained_on: bool = False
    benchmark: dict | None = None
    metric = "log-likelihood per character"

    def __post_init__(self):
        _check_count(self.num_examples)
        _check_benchmark(self.benchmark)

    @property
    def name(self) -> str:
        return "choices-" + _stem(self.path)

    def settings(self) -> dict:
        """Everything needed to make the task again with [`task_from_settings`]."""
        return _file_settings("choices", self)

    def chance(self, seed: int) -> float:
        """The score that guessing gets on the questions of this seed."""
        examples = self.examples(seed)
        return sum(1 / len(pairs) for pairs, _ in examples) / len(examples)

    def examples(self, seed: int) -> list[tuple[list[tuple[str, str]], int]]:
        """Draws `num_examples` of ((context, continuation) for each choice, index of the right one)."""
        rows = list(read_rows(self.path))
        if len(rows) < self.num_examples:
            raise ValueError(f"{self.path} has {len(rows)} rows; num_examples is {self.num_examples}.")
        examples = []
        for row in random.Random(f"{self.name} {seed}").sample(rows, self.num_examples):
            if "context_options" in row:
                pairs = [(context, f" {row['continuation']}") for context in row["context_options"]]
            else:
                context = _field(row, self.path, "query", "context")
                pairs = [(context, f" {choice}") for choice in _field(row, self.path, "choices")]
            examples.append((pairs, _field(row, self.path, "gold")))
        return examples

    def measure(self, model, tokenizer, batch_size: int, seed: int, progress: bool) -> float:
        """Returns the share of questions whose right choice is the likeliest, between 0 and 1."""
        examples = self.examples(seed)
        pairs = [pair for choices, _ in examples for pair in choices]
        scores = iter(continuation_log_likelihoods(model, tokenizer, pairs, batch_size))
        right = 0
        for choices, gold in examples:
            values = [next(scores) / len(continuation) for _, continuation in choices]
            right += values.index(max(values)) == gold
        return right / len(examples)


Task = ProbeTask | ReadingTask | ChoiceTask


def task_from_settings(settings: dict) -> Task:
    """
    Makes a task from what its `settings()` gave.

    Raises:
        `ValueError`: when it names none or several of `probe`, `reading` and `choices`, or an unknown field.
    """
    kinds = [kind for kind in ("probe", "reading", "choices") if kind in settings]
    if len(kinds) != 1:
        raise ValueError(f"A task has exactly one of probe, reading and choices; this one has {kinds or 'none'}.")
    rest = {key: value for key, value in settings.items() if key != kinds[0]}
    subject = settings[kinds[0]]
    try:
        if kinds[0] == "probe":
            return ProbeTask(probe_from_settings(subject), **rest)
        return (ReadingTask if kinds[0] == "reading" else ChoiceTask)(subject, **rest)
    except TypeError as error:
        raise ValueError(f"The task {kinds[0]} {subject!r} cannot be made: {error}.") from error


def read_rows(path: str | Path) -> Iterable[dict]:
    """
    Yields the rows of a JSON Lines file, plain or `.xz`.

    Raises:
        `FileNotFoundError`: when there is no such file.
        `ValueError`: when a line is not a JSON object; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"Line {number} of {path} is not a JSON object.")
            yield row


def contains_answer(text: str, answers: list[str]) -> bool:
    """Whether `text` contains one of `answers` once both are lower-cased and stripped of punctuation."""
    text = _normalise(text)
    # An answer of punctuation alone would be contained in anything.
    return any(answer in text for answer in map(_normalise, answers) if answer)


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _field(row: dict, path: str, *names: str):
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"A row of {path} has no {' or '.join(names)}; it has {', '.join(row)}.")


def _stem(path: str) -> str:
    return Path(path).name.split(".jsonl")[0]


def _check_count(num_examples: int) -> None:
    if num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; a task needs at least 1.")


def _check_benchmark(benchmark: dict | None) -> None:
    known = {"dataset_id", "task_id", "revision"}
    if benchmark is not None and not {"dataset_id", "task_id"} <= set(benchmark) <= known:
        raise ValueError(f"benchmark is {benchmark}; it needs dataset_id and task_id, and may have a revision.")


def _file_settings(kind: str, task: "ReadingTask | ChoiceTask") -> dict:
    values = asdict(task)
    benchmark = values.pop("benchmark")
    return {kind: values.pop("path"), **values, **({"benchmark": benchmark} if benchmark else {})}
