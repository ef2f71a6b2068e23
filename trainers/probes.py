"""
Retrieval probes: synthetic questions whose answer stands in the prompt, and the two ways to score a model on them.

A probe ablates nothing itself; it asks. Key-value retrieval in the published form (paper, section 4.1, and the code of
the Gather-and-Aggregate paper, https://huggingface.co/papers/2504.18574):

    Memorize the following dictionary:
    lamp:12
    river:7
    The value of the key 'lamp' is

and as one JSON object or as plain lines, which small teachers answer far better. `shots` queries are answered already
in the prompt, over the same dictionary. `PhoneBook` asks the same of another text, kept out of all training data.

A numeric answer can be the beginning of another one (7 of 71), which would then win by being shorter: every example
names the text that follows its answer (`end`), and both are scored together.

The words of keys and values come from `words.txt` (source and licence in its header).

    probe = KVRetrieval(format="json", pairs=20, shots=2)
    examples = probe.examples(100, seed=0)
    accuracy = sum(generated_accuracy(model, tokenizer, examples)) / len(examples)
"""

import contextlib
import copy
import functools
import importlib.resources
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rad_hybrid import CACHE_NAME


KV_FORMATS = ("paper", "json", "lines")
KV_VALUES = ("numbers", "words")
# Queries answered in one training document: many answer tokens for each dictionary read.
DOCUMENT_QUERIES = 8
FIRST_NAMES = (
    "Ada Alice Anna Ben Carl Clara Daniel Diana Edgar Ella Emma Felix Grace Hannah Helen Henry Hugo Ida Irene Ivan "
    "Jack James Jane Julia Karl Kate Laura Leo Lucy Maria Mark Martin Mary Max Nina Nora Oliver Oscar Paul Peter Rita "
    "Robert Rosa Ruth Samuel Sara Simon Sofia Thomas Tina Victor Walter"
).split()
SURNAMES = (
    "Adams Allen Baker Bell Bennett Brooks Brown Carter Clark Collins Cook Cooper Cox Davis Edwards Ellis Evans "
    "Fisher Foster Gray Green Hall Harris Hill Howard Hughes Jenkins Kelly King Lewis Marshall Mason Miller "
    "Mitchell Morgan Morris Murphy Palmer Parker Perry Price Reed Ross Russell Scott Shaw Simmons Stewart "
    "Sullivan Turner Walker Ward Watson Webb Wells West White Wood Young"
).split()


@dataclass(frozen=True)
class Example:
    """
    One question.

    Args:
        prompt (`str`):
            Text up to the answer, without a space at its end.
        answer (`str`):
            The right answer, with the space that precedes it in the text, if any.
        candidates (`tuple[str, ...]`):
            Every answer that could be meant (the values in the prompt), the right one among them.
        end (`str`):
            Text that follows the answer, so that an answer which begins another one cannot win by being shorter.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...]
    end: str = "\n"


@functools.cache
def common_words() -> tuple[str, ...]:
    """The words of `words.txt`, in alphabetical order."""
    text = importlib.resources.files("trainers").joinpath("words.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


@dataclass(frozen=True)
class _Lookup:
    """What every look-up probe shares: `_table` draws the entries, `_head` writes them, `_query` asks for one."""

    pairs: int = 20
    shots: int = 2
    queries: int = 1

    def __post_init__(self):
        if self.pairs < 1 or self.shots < 0 or self.queries < 1:
            raise ValueError(
                f"A probe needs pairs >= 1, shots >= 0, queries >= 1, not {self.pairs}, {self.shots}, {self.queries}."
            )
        if self.shots + self.queries > self.pairs:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries ask for more keys than the {self.pairs} pairs have. "
                "Take more pairs or fewer shots: a query that was answered before needs no retrieval."
            )

    def examples(self, n: int, seed: int = 0) -> list[Example]:
        """
        Draws `n` questions.

        Args:
            n (`int`):
                Number of examples. Each group of `queries` consecutive ones shares a dictionary and its shots.
            seed (`int`, *optional*, defaults to `0`):
                The same seed and settings give the same examples on any machine.
        """
        generator = random.Random(f"{self.name} {seed}")
        examples = []
        while len(examples) < n:
            keys, values = self._table(generator)
            asked = generator.sample(range(self.pairs), self.shots + self.queries)
            head = self._head(keys, values)
            for i in asked[: self.shots]:
                question, answer, end = self._query(keys[i], values[i])
                head += question + answer + end
            for i in asked[self.shots :]:
                question, answer, end = self._query(keys[i], values[i])
                candidates = tuple(self._query(key, value)[1] for key, value in zip(keys, values, strict=True))
                examples.append(Example(head + question, answer, candidates, end))
        return examples[:n]

    def documents(self, n: int, seed: int = 0, queries: int = DOCUMENT_QUERIES) -> list[str]:
        """
        Draws `n` training texts: a dictionary followed by answered queries, all of different keys.

        Args:
            n (`int`):
                Number of documents.
            seed (`int`, *optional*, defaults to `0`):
                Documents never share a draw with the examples of the same seed.
            queries (`int`, *optional*, defaults to `8`):
                Answered queries of a document, shots included; at most one for each pair is written.
        """
        generator = random.Random(f"{self.name} documents {seed}")
        documents = []
        for _ in range(n):
            keys, values = self._table(generator)
            asked = generator.sample(range(self.pairs), min(queries, self.pairs))
            answered = ("".join(self._query(keys[i], values[i])) for i in asked)
            documents.append(self._head(keys, values) + "".join(answered))
        return documents


@dataclass(frozen=True)
class KVRetrieval(_Lookup):
    """
    Key-value retrieval: a dictionary of `pairs` entries and a question for one of them.

    Args:
        pairs (`int`, *optional*, defaults to `20`):
            Entries of the dictionary.
        shots (`int`, *optional*, defaults to `2`):
            Queries answered in the prompt, of other keys of the same dictionary.
        queries (`int`, *optional*, defaults to `1`):
            Examples that share one dictionary and its shots. The scorer runs what they share once.
        format (`str`, *optional*, defaults to `"json"`):
            `"paper"`, `"json"` or `"lines"`.
        values (`str` or `tuple[str, ...]`, *optional*, defaults to `"numbers"`):
            `"numbers"` (0 to 99, as published), `"words"`, or the values to draw from.
        words (`tuple[str, ...]`, *optional*):
            Keys (and word values) to draw from instead of `words.txt`.

    Raises:
        `ValueError`: for settings that cannot make a dictionary of different keys and values.
    """

    format: str = "json"
    values: str | tuple[str, ...] = "numbers"
    words: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.format not in KV_FORMATS:
            raise ValueError(f"There is no probe format {self.format!r}; take one of {', '.join(KV_FORMATS)}.")
        if isinstance(self.values, str) and self.values not in KV_VALUES:
            raise ValueError(f"values must be one of {', '.join(KV_VALUES)} or a list of values, not {self.values!r}.")
        # Settings read from JSON hold lists; a frozen probe holds tuples.
        if not isinstance(self.values, str):
            object.__setattr__(self, "values", tuple(self.values))
        if self.words is not None:
            object.__setattr__(self, "words", tuple(self.words))
        available = len(set(self._keys)), len(set(self._values))
        needed = self.pairs * (2 if self.values == "words" else 1), self.pairs
        if available[0] < needed[0] or available[1] < needed[1]:
            raise ValueError(
                f"{self.pairs} pairs need {needed[0]} different words and {needed[1]} different values, but there are "
                f"{available[0]} and {available[1]}. Take fewer pairs, or pass more words or values."
            )

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `kv-json-20x2-numbers`."""
        values = self.values if isinstance(self.values, str) else "custom"
        return f"kv-{self.format}-{self.pairs}x{self.shots}-{values}"

    def settings(self) -> dict:
        """Everything needed to make the probe again with [`probe_from_settings`]."""
        settings = {"name": "kv", **asdict(self)}
        if self.words is None:
            del settings["words"]
        # Tuples become the lists that JSON would make of them, so that settings compare equal after a file.
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @property
    def _keys(self) -> tuple[str, ...]:
        return common_words() if self.words is None else self.words

    @property
    def _values(self) -> tuple[str, ...]:
        if self.values == "numbers":
            return tuple(str(number) for number in range(100))
        return self._keys if self.values == "words" else self.values

    def _table(self, generator: random.Random) -> tuple[list[str], list[str]]:
        if self.values == "words":
            drawn = generator.sample(self._keys, 2 * self.pairs)
            return drawn[: self.pairs], drawn[self.pairs :]
        return generator.sample(self._keys, self.pairs), generator.sample(self._values, self.pairs)

    def _head(self, keys: list[str], values: list[str]) -> str:
        pairs = zip(keys, values, strict=True)
        if self.format == "json":
            return "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}\n"
        if self.format == "lines":
            return "".join(f"{key}: {value}\n" for key, value in pairs) + "\n"
        return "Memorize the following dictionary:\n" + "".join(f"{key}:{value}\n" for key, value in pairs)

    def _query(self, key: str, value: str) -> tuple[str, str, str]:
        question = {"json": f'"{key}":', "lines": f"{key}:", "paper": f"The value of the key '{key}' is"}[self.format]
        return question, f" {value}", "\n"


@dataclass(frozen=True)
class PhoneBook(_Lookup):
    """
    A phone book, in the manner of "Repeat After Me" (https://huggingface.co/papers/2402.01032): names and numbers that
    no training data of this project contains, so that a student's score on it is not a trained one.

    Args:
        pairs (`int`, *optional*, defaults to `20`):
            Entries of the book.
        shots (`int`, *optional*, defaults to `2`):
            Numbers already looked up in the prompt.
        queries (`int`, *optional*, defaults to `1`):
            Examples that share one book and its shots.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.pairs > len(FIRST_NAMES) * len(SURNAMES):
            raise ValueError(f"A phone book has at most {len(FIRST_NAMES) * len(SURNAMES)} entries, not {self.pairs}.")

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `phone-book-20x2`."""
        return f"phone-book-{self.pairs}x{self.shots}"

    def settings(self) -> dict:
        """Everything needed to make the probe again with [`probe_from_settings`]."""
        return {"name": "phone_book", **asdict(self)}

    def _table(self, generator: random.Random) -> tuple[list[str], list[str]]:
        people = generator.sample(range(len(FIRST_NAMES) * len(SURNAMES)), self.pairs)
        names = [f"{FIRST_NAMES[i % len(FIRST_NAMES)]} {SURNAMES[i // len(FIRST_NAMES)]}" for i in people]
        return names, [f"555-{number:04d}" for number in generator.sample(range(10_000), self.pairs)]

    def _head(self, keys: list[str], values: list[str]) -> str:
        entries = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
        return f"Phone book\n{entries}\nNumbers looked up\n"

    def _query(self, key: str, value: str) -> tuple[str, str, str]:
        return f"{key}:", f" {value}", "\n"


Probe = KVRetrieval | PhoneBook
PROBES = {"kv": KVRetrieval, "phone_book": PhoneBook}


def probe_from_settings(settings: dict) -> Probe:
    """
    Makes a probe from what its `settings()` gave.

    Raises:
        `ValueError`: when the name or a field is unknown; the message lists the known ones.
    """
    settings = dict(settings)
    name = settings.pop("name", None)
    if name not in PROBES:
        raise ValueError(f"There is no probe named {name!r}; take one of {', '.join(PROBES)}.")
    try:
        return PROBES[name](**settings)
    except TypeError as error:
        known = ", ".join(item.name for item in fields(PROBES[name]))
        raise ValueError(f"The probe {name} cannot take these settings: {error}. It knows {known}.") from error


def is_correct(continuation: str, answer: str) -> bool:
    """
    Whether a model's continuation gives the answer: it starts with it, spaces before either aside, and no further
    letter or digit makes another word or number of it.
    """
    continuation, answer = continuation.lstrip(), answer.strip()
    rest = continuation[len(answer) :]
    return continuation.startswith(answer) and not rest[:1].isalnum()


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on: with the tokenizer's first special token, if it adds one, but no last one."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


@dataclass(frozen=True)
class EncodedAnswer:
    """
    An answer in its place, in tokens. Prompt and answer are tokenised together, since a tokenizer may join the
    characters on both sides of a border: what belongs to the prompt alone is `context`.

    Args:
        context (`list[int]`):
            Token ids up to the first one that depends on the answer.
        target (`list[int]`):
            Token ids of answer and end.
        num_answer (`int`):
            Leading tokens of `target` that do not depend on the end.
    """

    context: list[int]
    target: list[int]
    num_answer: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, example: Example, answer: str | None = None) -> "EncodedAnswer":
        """Encodes `example` with its own answer, or with another candidate."""
        answer = example.answer if answer is None else answer
        whole = token_ids(tokenizer, example.prompt + answer + example.end)
        start = common_prefix(token_ids(tokenizer, example.prompt), whole)
        stop = common_prefix(token_ids(tokenizer, example.prompt + answer), whole)
        return cls(whole[:start], whole[start:], max(stop - start, 0))


def common_prefix(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


@torch.no_grad()
def generated_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int = 16,
    progress: bool = True,
) -> list[bool]:
    """
    Asks each question by greedy generation and compares the text (see [`is_correct`]).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, teacher or student. Left in the mode (training or not) it came in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        examples (`list[Example]`):
            Questions.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions generated at once; prompts of like length go together, padded on the left.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[bool]`: for each example whether it was answered correctly.
    """
    prompts = [token_ids(tokenizer, example.prompt) for example in examples]
    longest = max((len(EncodedAnswer.of(tokenizer, example).target) for example in examples), default=0)
    config = GenerationConfig(
        max_new_tokens=longest + 2,
        do_sample=False,
        pad_token_id=_pad_id(tokenizer),
        eos_token_id=model.generation_config.eos_token_id,
    )
    correct = [False] * len(examples)
    with _evaluating(model), tqdm(total=len(examples), desc="asking", unit="prompt", disable=not progress) as bar:
        for batch in _by_length(prompts, batch_size):
            input_ids, attention_mask = left_padded([prompts[i] for i in batch], _pad_id(tokenizer), model.device)
            out = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=config)
            texts = tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                correct[i] = is_correct(text, examples[i].answer)
            bar.update(len(batch))
    return correct


@torch.no_grad()
def ranked_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[list[bool], list[float]]:
    """
    Ranks the candidates of each question by the summed log-probability of candidate and end, as the published probe
    does (which leaves the end out, so that a shorter number wins).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, teacher or student.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        examples (`list[Example]`):
            Questions.
        batch_size (`int`, *optional*, defaults to `64`):
            Candidates scored at once, on copies of their prompts' caches.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `tuple[list[bool], list[float]]`: for each example whether the right candidate came first, and the right
        answer's log-probability in nats.
    """
    correct, log_probs = [], []
    with _evaluating(model):
        for example in tqdm(examples, desc="ranking", unit="prompt", disable=not progress):
            scores = _candidate_log_probs(model, tokenizer, example, batch_size)
            right = example.candidates.index(example.answer)
            correct.append(scores.argmax().item() == right)
            log_probs.append(scores[right].item())
    return correct, log_probs


def left_padded(sequences: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Stacks sequences of unlike length, padded on the left: token ids and attention mask, both [B, T]."""
    longest = max(map(len, sequences))
    ids = [[pad_id] * (longest - len(sequence)) + sequence for sequence in sequences]
    mask = [[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _candidate_log_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example, batch_size: int
) -> torch.Tensor:
    """Log-probability of every candidate with its end, in float32: [candidates]. The prompt is read once."""
    encoded = [EncodedAnswer.of(tokenizer, example, answer) for answer in example.candidates]
    start = min(len(one.context) for one in encoded)
    targets = [one.context[start:] + one.target for one in encoded]
    context = torch.tensor([encoded[0].context[:start]], device=model.device)
    prompt = model(input_ids=context, use_cache=True, logits_to_keep=1)
    scores = []
    for first in range(0, len(targets), batch_size):
        rows = targets[first : first + batch_size]
        # reorder_cache is the one way to multiply a batch that recurrent layers' caches know too.
        cache = copy.deepcopy(prompt[CACHE_NAME])
        cache.reorder_cache(torch.zeros(len(rows), dtype=torch.long, device=model.device))
        longest = max(map(len, rows))
        # Padding stands after the tokens that count, so no mask is needed.
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows], device=model.device)
        logits = prompt.logits.expand(len(rows), -1, -1)  # [rows, 1, vocabulary]
        if longest > 1:
            positions = torch.arange(start, start + longest - 1, device=model.device).expand(len(rows), -1)
            out = model(input_ids=ids[:, :-1], position_ids=positions, use_cache=True, **{CACHE_NAME: cache})
            logits = torch.cat([logits, out.logits], dim=1)  # [rows, longest, vocabulary]
        log_probs = logits.float().log_softmax(-1).gather(-1, ids[:, :, None])[:, :, 0]  # [rows, longest]
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        inside = torch.arange(longest, device=model.device) < lengths[:, None]
        scores.append((log_probs * inside).sum(-1))
    return torch.cat(scores)


def _by_length(sequences: list[list[int]], batch_size: int) -> list[list[int]]:
    """Indices of the sequences in batches of like length, longest first, so that what is too large fails at once."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    # What stands under the mask is never read, so a tokenizer without a padding token needs none.
    return next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), 0)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
