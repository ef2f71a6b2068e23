"""Every kind of probe: a rule that reads the prompt solves it, a shuffled key leaves chance, documents go on alike."""

import random
import re

import pytest
from test_probes import character_tokenizer
from tiny_retriever import KEYS, build_tiny_retriever

from benchmarks import teacher_probes
from trainers.actions import suite
from trainers.probes import (
    PROBES,
    Copying,
    Example,
    KVRetrieval,
    LetterChoice,
    MeanOf,
    MultiQueryRecall,
    Needle,
    NGramLookup,
    PhoneBook,
    VariableTracking,
    generated_accuracy,
    probe_from_settings,
    ranked_accuracy,
    token_accuracy,
)
from trainers.tasks import ProbeTask, task_from_settings


ALL = [
    KVRetrieval(format="json", values="uuids", pairs=10, queries=4),
    KVRetrieval(format="lines", pairs=200, shots=1),
    KVRetrieval(format="lines", pairs=200, shots=0, values="words"),
    MultiQueryRecall(pairs=12, shots=3, queries=5),
    MultiQueryRecall(pairs=30, values="words"),
    Copying(),
    Copying(length=40, values="letters", copies=1, shots=2),
    Copying(length=6, values="numbers", copies=3),
    NGramLookup(),
    NGramLookup(values="letters", length=24, n=2, copies=1, shots=2, queries=3),
    NGramLookup(values="numbers", length=30, n=2, repeats=True),
    NGramLookup(format="prefix"),
    NGramLookup(format="prefix", copies=1, shots=2, n=1, length=8),
    NGramLookup(format="prefix", length=30, n=3, values="letters", repeats=True),
    Needle(),
    Needle(length=60, depth=0.5),
    Needle(length=120, needles=5, shots=2, queries=3),
    LetterChoice(),
    LetterChoice(options=26, shots=0),
    VariableTracking(),
    VariableTracking(chains=6, hops=3, shots=0, queries=4),
    VariableTracking(chains=2, hops=1, shots=1),
]


def last_value(prompt: str) -> str:
    """The value that follows the key of the last line where that key first stands."""
    key = re.search(r"([\w -]+)['\"]?(?::| is)$", prompt.splitlines()[-1])[1].strip()
    return " " + re.search(rf"(?<![\w-]){key}\"?: ?([\w-]+)", prompt)[1]


def next_in_stream(prompt: str) -> str:
    words = prompt.split()
    return " " + words[words.index(words[-1]) + 1]


def rest_of_string(prompt: str) -> str:
    *_, string, first = prompt.split("\n\n")
    return string.removeprefix(first)


def after_the_gram(prompt: str) -> str:
    *paragraphs, gram = prompt.split("\n\n")
    # Before the n-gram its string; or the only string, with answered n-grams between.
    string = paragraphs[-1] if gram in paragraphs else paragraphs[0]
    found = re.findall(rf"(?<!\S){gram} (\S+)", string)
    assert len(found) == 1
    return f" {found[0]}"


def hidden_number(prompt: str) -> str:
    question = prompt.splitlines()[-1]
    return re.search(rf"{question}( \d+)\.", prompt)[1]


def letter_of_the_word(prompt: str) -> str:
    question, *options, _ = prompt.split("\n\n")[-1].splitlines()
    word = question.removesuffix("?").split()[-1]
    return next(f" {option[0]}" for option in options if option[3:] == word)


def follow_the_hops(prompt: str) -> str:
    values = dict(re.findall(r"^(\w+) = (\w+)$", prompt, flags=re.MULTILINE))
    value = prompt.split()[-2]
    while not value.isdigit():
        value = values[value]
    return f" {value}"


ORACLES = {
    "kv": last_value,
    "phone_book": last_value,
    "mqar": next_in_stream,
    "copy": rest_of_string,
    "ngram": after_the_gram,
    "needle": hidden_number,
    "choice": letter_of_the_word,
    "variables": follow_the_hops,
}


def name(probe):
    return f"{probe.name}x{probe.queries}"


def test_no_kind_goes_without_an_oracle():
    assert set(ORACLES) == set(PROBES) - {"mean"}
    assert {probe.kind for probe in ALL} | {"phone_book", "mean"} == set(PROBES)
    assert len({probe.name for probe in ALL}) == len(ALL)


@pytest.mark.parametrize("probe", ALL, ids=name)
def test_an_oracle_solves_every_example(probe):
    examples = probe.examples(40, seed=1)
    assert len(examples) == 40
    for example in examples:
        assert ORACLES[probe.kind](example.prompt) == example.answer
        assert example.answer in example.candidates and not example.prompt.endswith(" ")
        assert len(set(example.candidates)) == len(example.candidates)
        # What follows the answer must not go on with its last word.
        assert example.end and not example.end[0].isalnum()


@pytest.mark.parametrize("probe", ALL, ids=name)
def test_a_shuffled_key_leaves_chance(probe):
    generator, examples = random.Random(0), probe.examples(300, seed=2)
    said = [ORACLES[probe.kind](example.prompt) for example in examples]
    if len(examples[0].candidates) == 1:
        # Free answers: the key of the next question, which is about another string.
        assert not any(answer == other.answer for answer, other in zip(said, examples[1:], strict=False))
        return
    keys = [generator.choice(example.candidates) for example in examples]
    hits = sum(answer == key for answer, key in zip(said, keys, strict=True)) / len(examples)
    chance = sum(1 / len(example.candidates) for example in examples) / len(examples)
    assert abs(hits - chance) < 4 * (chance / len(examples)) ** 0.5


@pytest.mark.parametrize("probe", ALL, ids=name)
def test_the_seed_and_the_settings_say_everything(probe):
    examples = probe.examples(12, seed=3)
    assert examples == probe.examples(12, seed=3) == probe_from_settings(probe.settings()).examples(12, seed=3)
    assert examples[:5] == probe.examples(5, seed=3)
    assert examples != probe.examples(12, seed=4)
    task = ProbeTask(probe, num_examples=12, per_token=True)
    assert task_from_settings(task.settings()) == task and task.name == f"{probe.name}-tokens"
    assert "per_token" not in ProbeTask(probe).settings()
    group = examples[: probe.queries]
    assert len({example.prompt for example in group}) == probe.queries


@pytest.mark.parametrize("probe", ALL, ids=name)
def test_documents_continue_as_the_prompts_do(probe):
    examples = probe.examples(20, seed=1)
    for document in probe.documents(20, seed=1):
        text = document.rstrip()
        # A copy goes on after its first item, every other answer is the last word.
        cut = text.index(" ", text.rindex("\n\n")) if probe.kind == "copy" else text.rindex(" ")
        text = text.removesuffix(".")
        assert ORACLES[probe.kind](text[:cut]) == text[cut:]
        assert not any(document.startswith(example.prompt) for example in examples)


@pytest.mark.parametrize("values", ["words", "letters", "numbers"])
def test_only_the_whole_ngram_tells_where_it_is(values):
    """Where items repeat, the last item of an n-gram alone would often be answered wrongly."""
    examples = NGramLookup(values=values, repeats=True, length=40, n=2).examples(100, seed=0)
    ambiguous = 0
    for example in examples:
        *_, string, gram = example.prompt.split("\n\n")
        followers = set(re.findall(rf"(?<!\S){gram.split()[-1]} (?=(\S+))", string))
        ambiguous += len(followers) > 1
    assert ambiguous > 50


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "copy", "length": 1}, "length >= 2"),
        ({"name": "copy", "values": "colours"}, "words, letters, numbers"),
        ({"name": "copy", "pairs": 3}, "length, values, copies, shots"),
        ({"name": "ngram", "format": "infix"}, "suffix, prefix"),
        ({"name": "ngram", "values": "letters", "length": 27}, "there are 26"),
        ({"name": "ngram", "length": 3}, "no 3-gram"),
        ({"name": "ngram", "length": 10, "n": 1, "repeats": True}, "larger n"),
        ({"name": "ngram", "length": 8, "shots": 5}, "room for"),
        ({"name": "ngram", "format": "prefix", "queries": 2}, "room for"),
        ({"name": "ngram", "copies": 0}, "at least 1"),
        ({"name": "mqar", "format": "json"}, "stream"),
        ({"name": "needle", "shots": 1}, "more than the 1 needles"),
        ({"name": "needle", "length": 0}, "length >= 1"),
        ({"name": "needle", "depth": 1.5}, "from 0 to 1"),
        ({"name": "needle", "needles": 2, "depth": 0.5}, "single needle"),
        ({"name": "choice", "options": 27}, "2 to 26"),
        ({"name": "variables", "chains": 2}, "more than the 2 chains"),
        ({"name": "variables", "hops": 0}, "hops >= 1"),
        ({"name": "variables", "chains": 101}, "fewer chains"),
        ({"name": "mean", "probes": [{"name": "kv"}]}, "two different probes"),
        ({"name": "mean", "probes": [{"name": "kv"}, {"name": "kv", "queries": 2}]}, "two different probes"),
        ({"name": "mean", "probes": [{"name": "kv"}, {"name": "maze"}]}, "no probe named 'maze'"),
        ({"name": "kv", "values": "uuids", "pairs": 2}, "more keys than the 2 pairs"),
    ],
)
def test_impossible_settings_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        probe_from_settings(settings)


def test_a_model_that_retrieves_answers_a_stream():
    model, tokenizer, _ = build_tiny_retriever(seed=0)
    examples = MultiQueryRecall(pairs=8, shots=2, queries=4, words=tuple(KEYS)).examples(8, seed=0)
    assert all(generated_accuracy(model, tokenizer, examples, progress=False))
    assert all(ranked_accuracy(model, tokenizer, examples, progress=False)[0])
    task = ProbeTask(MultiQueryRecall(pairs=8, words=tuple(KEYS)), num_examples=6, per_token=True)
    assert task.measure(model, tokenizer, batch_size=4, seed=0, progress=False) == 1.0
    copying = ProbeTask(Copying(length=6), num_examples=4, per_token=True)
    assert copying.measure(model, tokenizer, batch_size=4, seed=0, progress=False) < 1.0


def test_a_question_without_other_candidates_is_not_ranked():
    model, tokenizer, _ = build_tiny_retriever(seed=0)
    with pytest.raises(ValueError, match="one candidate"):
        ranked_accuracy(model, tokenizer, Copying(length=4).examples(1), progress=False)


@pytest.mark.parametrize(
    ("continuation", "share"),
    [(" ab cd\n", 1.0), ("ab cd", 1.0), (" ab ce", 5 / 6), (" ab", 3 / 6), (" xb cd", 5 / 6), ("", 0.0)],
)
def test_tokens_count_in_their_places(continuation, share):
    example = Example("ab\n", " ab cd", (" ab cd",))
    assert token_accuracy(character_tokenizer(), example, continuation) == pytest.approx(share)


def test_a_needle_lies_where_it_is_said_to_lie(tmp_path):
    text = " ".join(f"Word{i} goes on and on here." for i in range(200))
    (tmp_path / "story.txt").write_text(text, encoding="utf-8")
    for depth in (0, 0.3, 1):
        probe = Needle(length=200, depth=depth, text=str(tmp_path / "story.txt"))
        assert probe.name == f"needle-200-1x0-at-{depth:g}-story"
        for example in probe.examples(10, seed=1):
            haystack = example.prompt.split("\n\n")[0]
            before, needle, after = re.split(r"(The secret number of \w+ is \d{4}\.)", haystack)
            # The text is whole around it, and no sentence is cut but at both ends.
            assert f"{before}{after[1:]}".strip() in text or f"{before}{after}".strip() in text
            assert not before or not after or before.rstrip().endswith(".")
            assert abs(len(before.split()) / 200 - depth) < 0.03
    assert len({example.prompt.split()[0] for example in probe.examples(10, seed=1)}) > 1
    short = Needle(length=3000, text=str(tmp_path / "story.txt")).examples(1)[0]
    assert 3000 < len(short.prompt.split()) < 3020
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        Needle(text=str(tmp_path / "missing.jsonl")).examples(1)


def test_a_chain_must_be_followed():
    """No line of the text gives the value of the variable asked for: look-up alone leads to a word."""
    for example in VariableTracking(chains=5, hops=2).examples(50, seed=0):
        variable = example.prompt.split()[-2]
        lines = dict(line.split(" = ") for line in example.prompt.splitlines() if " = " in line)
        assert not lines[variable].isdigit() and lines[lines[variable]] == example.answer.strip()
        # Every variable stands before it is used.
        order = list(lines)
        assert all(value.isdigit() or order.index(value) < order.index(name) for name, value in lines.items())


def test_a_mean_asks_all_its_probes_alike():
    probes = KVRetrieval(pairs=5), Copying(length=4), PhoneBook(pairs=4)
    mean = MeanOf(probes)
    assert mean == probe_from_settings(mean.settings()) == MeanOf([probe.settings() for probe in probes])
    examples = mean.examples(12, seed=3)
    assert examples == [example for probe in probes for example in probe.examples(4, seed=3)]
    assert mean.parts(examples) == {probe.name: probe.examples(4, seed=3) for probe in probes}
    with pytest.raises(ValueError, match="multiple of 3"):
        mean.examples(10)
    one, other, third = (probe.documents(2, seed=1) for probe in probes)
    assert mean.documents(4, seed=1) == [one[0], other[0], third[0], one[1]]
    assert mean.formats() == {("kv", "json", "numbers"), ("copy", None, "words"), ("phone_book", None, "None")}
    assert all(f"for {probe.name}: {probe.easier}" in mean.easier for probe in probes)


def test_a_format_that_was_trained_on_is_marked_in_any_size():
    tasks = [{"probe": {"name": "ngram", "format": name, "length": 30}} for name in ("suffix", "prefix")]
    tasks.append({"probe": MeanOf([KVRetrieval(), NGramLookup()]).settings()})
    assert [task.trained_on for task in suite(tasks, [{"name": "ngram", "length": 12}])] == [True, False, True]
    assert not any(task.trained_on for task in suite(tasks, []))


def test_a_mean_is_measured_as_the_mean():
    model, tokenizer, _ = build_tiny_retriever(seed=0)
    solved, failed = KVRetrieval(format="lines", pairs=6, words=tuple(KEYS)), LetterChoice(shots=0)
    task = ProbeTask(MeanOf([solved, failed]), num_examples=12)
    assert task.measure(model, tokenizer, batch_size=5, seed=0, progress=False) == 0.5


def test_the_benchmark_prints_a_row_for_each_probe(tmp_path, monkeypatch, capsys):
    model, tokenizer, _ = build_tiny_retriever(seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    probes = ["{name: kv, format: lines, pairs: 4, words: [cat, dog, owl, fox]}", "{name: copy, length: 3}"]
    arguments = ["--teacher", str(tmp_path), "--examples", "4", "--ranked"]
    for probe in probes:
        arguments += ["--probe", probe]
    monkeypatch.setattr("sys.argv", ["teacher_probes", *arguments])
    teacher_probes.main()
    *_, first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| `kv-lines-4x2-numbers` \| \d+ \| 1.00 \| 1.00 \| 1.00 \| 0.25 \|", first)
    assert re.fullmatch(r"\| `copy-words-3-2x0` \| \d+ \| 0.00 \| 0.\d\d \| - \| - \|", second)
