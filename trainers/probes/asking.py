"""
Ways to score a model on the questions of a probe: greedy generation and the ranking of candidates.

A numeric answer can be the beginning of another one (7 of 71), which would then win by being shorter: every example
names the text that follows its answer (`end`), and both are scored together.

    examples = KVRetrieval(format="json", pairs=20, shots=2).examples(100, seed=0)
    accuracy = sum(generated_accuracy(model, tokenizer, examples)) / len(examples)
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_rad_hybrid import CACHE_NAME
from trainers.probes.questions import Example


def is_correct(continuation: str, answer: str) -> bool:
    """
    Whether a model's continuation gives the answer: it starts with it, spaces before either aside, and no further
    letter or digit makes another word or number of it.
    """
    continuation, answer = continuation.lstrip(), answer.strip()
    rest = continuation[len(answer) :]
    return continuation.startswith(answer) and not rest[:1].isalnum()


def token_accuracy(tokenizer: PreTrainedTokenizerBase, example: Example, continuation: str) -> float:
    """
    Part of the answer's tokens that a continuation gives in their places, between 0 and 1: how far a long copy is
    right, of which one wrong token spoils the whole (see [`is_correct`]).
    """
    if not continuation.strip():
        return 0.0
    right = EncodedAnswer.of(tokenizer, example)
    # The space before an answer is no part of what was asked.
    said = example.answer[: len(example.answer) - len(example.answer.lstrip())] + continuation.lstrip()
    given = token_ids(tokenizer, example.prompt + said)[len(right.context) :]
    answer = right.target[: right.num_answer]
    return sum(one == other for one, other in zip(answer, given, strict=False)) / len(answer)


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


def check_candidates(examples: list[Example]) -> None:
    """
    Raises:
        `ValueError`: for a question without other candidates than its answer, which would be right whatever is said.
    """
    if any(len(example.candidates) < 2 for example in examples):
        raise ValueError(
            "A question with one candidate cannot be ranked: any model would be right. Generate the answer instead, "
            "or take a probe that has candidates (a copy and a single needle have none)."
        )


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

    Raises:
        `ValueError`: for a question without other candidates than its answer, which would be right whatever is said.
    """
    check_candidates(examples)
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
