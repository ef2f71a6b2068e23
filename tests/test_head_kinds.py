"""The tiny retriever's two heads are a gather head and an aggregate head, and are labelled so."""

import pytest
from tiny_retriever import KEYS, build_tiny_retriever

from trainers.heads.head_kinds import head_kinds, landmarks, patterns
from trainers.probes import Example, KVRetrieval


@pytest.fixture(scope="module")
def retriever():
    return build_tiny_retriever(seed=0)


@pytest.mark.parametrize("form", ["json", "lines", "paper"])
def test_landmarks_are_the_asked_entry(retriever, form):
    tokenizer = retriever[1]
    probe = KVRetrieval(format=form, pairs=6, shots=2, words=tuple(KEYS))
    for example in probe.examples(5):
        marks, ids = landmarks(tokenizer, example, probe), tokenizer(example.prompt)["input_ids"]
        assert tokenizer.decode([ids[i] for i in marks.value]).strip() == example.answer.strip()
        key = tokenizer.decode([ids[i] for i in marks.key]).strip()
        assert key in KEYS and key in example.prompt.splitlines()[-1]
        assert max(marks.value) < marks.entries < len(ids)
    with pytest.raises(ValueError, match="no prompt of"):
        landmarks(tokenizer, Example("Hello", " you", (" you",)), probe)


def test_gather_and_aggregate_heads_are_told_apart(retriever):
    model, tokenizer, (gather, aggregate) = retriever
    probe = KVRetrieval(format="json", pairs=6, shots=1, words=tuple(KEYS))
    kinds = head_kinds(model, tokenizer, [gather, aggregate, (1, 0)], probe, 8, progress=False)
    assert [one.kind for one in kinds] == ["gather", "aggregate", "neither"]
    # The first layer's head also marks the asked key at the question, where it is missed without bringing the value.
    assert kinds[0].entries_drop > 0.1 and kinds[0].question_drop > 1
    assert kinds[0].gather_attention > 0.9 and kinds[1].aggregate_attention > 0.9
    assert kinds[0].aggregate_attention < 0.2 and kinds[1].gather_attention < 0.2
    assert kinds[1].question_drop > 1 and abs(kinds[1].entries_drop) < 0.1
    assert model.config._attn_implementation == "sdpa"


def test_patterns_are_distributions(retriever):
    model, tokenizer, heads = retriever
    example = KVRetrieval(format="json", pairs=4, shots=0, words=tuple(KEYS)).examples(1)[0]
    tokens, weights = patterns(model, tokenizer, example, heads)
    assert weights.shape == (2, len(tokens), len(tokens))
    assert weights.sum(-1).allclose(weights.new_ones(()))
    assert not weights.triu(1).any()
