"""Probes: an oracle that reads the prompt solves them, a shuffled key leaves chance, a real retriever is scored."""

import random
import re

import pytest
import torch
from tiny_retriever import KEYS, VALUE_WORDS, build_tiny_retriever
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainers.probes import (
    EncodedAnswer,
    Example,
    KVRetrieval,
    PhoneBook,
    common_words,
    generated_accuracy,
    is_correct,
    probe_from_settings,
    ranked_accuracy,
    token_ids,
)


PROBES = [
    KVRetrieval(format=name, values=values, pairs=20, shots=shots, queries=queries)
    for name in ("paper", "json", "lines")
    for values in ("numbers", "words")
    for shots, queries in ((0, 1), (2, 5))
] + [PhoneBook(), PhoneBook(pairs=8, shots=0, queries=8)]
IDS = [f"{probe.name}x{probe.queries}" for probe in PROBES]


def oracle(prompt: str) -> str:
    """Answers by rule: the value that follows the key of the last line where that key first stands."""
    key = re.search(r"([\w ]+)['\"]?(?::| is)$", prompt.splitlines()[-1])[1].strip()
    return " " + re.search(rf"\b{key}\"?: ?([\w-]+)", prompt)[1]


@pytest.fixture(scope="module")
def retriever():
    return build_tiny_retriever(seed=0)


@pytest.mark.parametrize("probe", PROBES, ids=IDS)
def test_an_oracle_solves_every_example(probe):
    examples = probe.examples(50, seed=1)
    assert len(examples) == 50
    assert all(oracle(example.prompt) == example.answer for example in examples)


@pytest.mark.parametrize("probe", PROBES, ids=IDS)
def test_a_shuffled_key_leaves_chance(probe):
    generator = random.Random(0)
    examples = probe.examples(600, seed=2)
    hits = sum(oracle(example.prompt) == generator.choice(example.candidates) for example in examples) / 600
    chance = 1 / probe.pairs
    assert abs(hits - chance) < 4 * (chance / 600) ** 0.5


@pytest.mark.parametrize("probe", PROBES, ids=IDS)
def test_examples_are_what_they_say(probe):
    examples = probe.examples(20, seed=3)
    assert examples == probe.examples(20, seed=3) == probe_from_settings(probe.settings()).examples(20, seed=3)
    assert examples[:7] == probe.examples(7, seed=3)
    assert examples != probe.examples(20, seed=4)
    for example in examples:
        assert not example.prompt.endswith(" ")
        assert len(set(example.candidates)) == probe.pairs and example.answer in example.candidates
        # The question is not among the shots: the key stands in the dictionary and in the last line only.
        key = example.prompt.splitlines()[-1].removesuffix(":").removesuffix(" is").split("key ")[-1].strip("\"'")
        assert len(re.findall(rf"\b{key}\b", example.prompt)) == 2
    prompts = [example.prompt for example in examples[: probe.queries]]
    assert len({prompt.splitlines()[0] for prompt in prompts}) == 1 and len(set(prompts)) == probe.queries


@pytest.mark.parametrize("probe", PROBES, ids=IDS)
def test_documents_continue_as_the_prompts_do(probe):
    """A document answered up to some query is a prompt of the probe: the oracle gives its next words."""
    for document in probe.documents(10, seed=1, queries=4):
        lines = document.splitlines(keepends=True)
        for last in range(len(lines) - 4, len(lines)):
            answer = re.search(r" [\w-]+\n$", lines[last])[0].rstrip()
            assert oracle("".join(lines[:last]) + lines[last].rstrip()[: -len(answer)]) == answer
    texts = {example.prompt.splitlines()[1] for example in probe.examples(50, seed=1)}
    assert not any(document.splitlines()[1] in texts for document in probe.documents(50, seed=1))


def test_words_are_common_and_clean():
    words = common_words()
    assert len(words) == len(set(words)) and 1500 < len(words) <= 2000
    assert all(re.fullmatch(r"[a-z]{3,8}", word) for word in words)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "yaml"}, "paper, json, lines"),
        ({"values": "colours"}, "numbers, words, uuids"),
        ({"pairs": 0}, "pairs >= 1"),
        ({"pairs": 3, "shots": 3}, "more keys than the 3 pairs"),
        ({"pairs": 1001}, "1000"),
        ({"words": ("one", "two"), "pairs": 3, "shots": 0}, "more words"),
        ({"values": ("1", "1"), "pairs": 2, "shots": 0}, "fewer pairs"),
    ],
)
def test_impossible_settings_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        KVRetrieval(**settings)
    with pytest.raises(ValueError, match=reason):
        probe_from_settings({"name": "kv", **settings})


def test_unknown_probes_and_settings_are_refused():
    with pytest.raises(ValueError, match="kv, phone_book"):
        probe_from_settings({"name": "maze"})
    with pytest.raises(ValueError, match="pairs"):
        probe_from_settings({"name": "phone_book", "format": "json"})


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (" 7\n", " 7", True),
        ("7", " 7", True),
        (" 71", " 7", False),
        (" 7a", " 7", False),
        (" 7, and", " 7", True),
        ("", " 7", False),
        (" tables", " table", False),
        (" the table", " table", False),
        (" 555-0142.", " 555-0142", True),
    ],
)
def test_only_the_whole_answer_counts(text, answer, right):
    assert is_correct(text, answer) is right


@pytest.mark.parametrize("values", ["numbers", tuple(VALUE_WORDS)])
@pytest.mark.parametrize("name", ["json", "lines", "paper"])
def test_a_model_that_retrieves_is_right(retriever, name, values):
    model, tokenizer, _ = retriever
    probe = KVRetrieval(format=name, pairs=10, shots=1, queries=2, words=tuple(KEYS), values=values)
    examples = probe.examples(12, seed=0)
    assert all(generated_accuracy(model, tokenizer, examples, batch_size=5, progress=False))
    correct, log_probs = ranked_accuracy(model, tokenizer, examples, batch_size=4, progress=False)
    assert all(correct)
    for example, log_prob in zip(examples, log_probs, strict=True):
        assert log_prob == pytest.approx(plain_log_prob(model, tokenizer, example), abs=1e-4)


def test_wrong_answers_are_wrong(retriever):
    """The same questions with another right answer: the model that retrieves fails every one."""
    model, tokenizer, _ = retriever
    examples = [
        Example(one.prompt, one.candidates[one.candidates.index(one.answer) - 1], one.candidates)
        for one in KVRetrieval(format="lines", pairs=6, words=tuple(KEYS)).examples(8, seed=0)
    ]
    model.train()
    assert not any(generated_accuracy(model, tokenizer, examples, progress=False))
    assert not any(ranked_accuracy(model, tokenizer, examples, progress=False)[0])
    assert model.training
    model.eval()


@torch.no_grad()
def plain_log_prob(model, tokenizer, example):
    one = EncodedAnswer.of(tokenizer, example)
    ids = torch.tensor([one.context + one.target])
    log_probs = model(ids).logits[0, len(one.context) - 1 : -1].log_softmax(-1)
    return log_probs[range(len(one.target)), one.target].sum().item()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Every character a token, but `: 7` and the pair `71` are single ones: borders fall inside tokens."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(set('{}":, \n0123456789abcdefghijklmnopqrstuvwxyz')))}
    vocabulary |= {": ": len(vocabulary), ": 7": len(vocabulary) + 1, "71": len(vocabulary) + 2, "</s>": 99}
    merges = [(":", " "), (": ", "7"), ("7", "1")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("answer", [" 7", " 71", " 42"])
def test_borders_inside_tokens(answer):
    tokenizer = character_tokenizer()
    example = Example('{"a": 7, "b": 71, "c": 42}\n"b":', answer, (" 7", " 71", " 42"))
    one = EncodedAnswer.of(tokenizer, example)
    text = example.prompt + answer
    assert one.context + one.target == token_ids(tokenizer, text + "\n")
    assert tokenizer.decode(one.context + one.target[: one.num_answer]).replace(" ", "") == text.replace(" ", "")
    assert tokenizer.decode(one.target[one.num_answer :]) == "\n"


def test_a_prefix_does_not_win_by_being_shorter(retriever):
    """Of 4 and 42 the longer ranks first only because the end is scored along: alone, 4 can never lose to 42."""
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    example = Example('{"a": 4, "b": 42}\n"b":', " 42", (" 4", " 42"))
    # A model that has learnt the text by heart, imperfectly: the end after 42 is sure, the end after 4 is not.
    ids = torch.tensor([token_ids(tokenizer, example.prompt + example.answer + example.end)])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    correct, log_probs = ranked_accuracy(model, tokenizer, [example], progress=False)
    assert correct == [True]
    without_end = Example(example.prompt, example.answer, example.candidates, end="")
    assert ranked_accuracy(model, tokenizer, [without_end], progress=False)[0] == [False]
