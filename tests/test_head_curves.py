"""Curves, greedy orders and divergences on text, on a model whose retrieval heads are known."""

import pytest
import torch
from tiny_retriever import KEYS, build_tiny_retriever

from trainers.heads.head_curves import answers_without, curve, greedy
from trainers.heads.head_layout import attention_layers
from trainers.heads.text_scores import layers_by_probe, layers_by_text, text_kl
from trainers.probes import KVRetrieval
from trainers.probes.probe_rows import pack


PROBE = KVRetrieval(format="json", pairs=6, shots=1, queries=3, words=tuple(KEYS))


@pytest.fixture(scope="module")
def retriever():
    model, tokenizer, heads = build_tiny_retriever(seed=0)
    every = [(layer, head) for layer in range(2) for head in range(4)]
    order = [*heads, *(pair for pair in every if pair not in heads)]
    return model, tokenizer, order, pack(tokenizer, PROBE.examples(12), 1, model.device)


def test_two_heads_suffice_and_either_is_needed(retriever):
    model, tokenizer, order, batches = retriever
    kept = curve(model, tokenizer, batches, order, [0, 1, 2, 8], "keep", progress=False)
    assert kept.accuracy[2:] == [1, 1] and max(kept.accuracy[:2]) < 0.4
    removed = curve(model, tokenizer, batches, order[::-1], [0, 6, 7], "remove", "mean", progress=False)
    assert removed.accuracy[:2] == [1, 1] and removed.accuracy[2] < 0.4
    assert removed.to_dict()["order"] == [list(pair) for pair in order[::-1][:7]]
    for counts in ([9], [-1], []):
        with pytest.raises(ValueError, match="counted from 0 to the 8"):
            curve(model, tokenizer, batches, order, counts, progress=False)
    with pytest.raises(ValueError, match="keep, remove"):
        curve(model, tokenizer, batches, order, [1], "drop", progress=False)


def test_greedy_finds_what_works_together(retriever):
    model, tokenizer, order, batches = retriever
    pool = order[::-1]
    kept = greedy(model, tokenizer, batches, pool, 2, "keep", progress=False)
    assert set(kept.order) == set(order[:2]) and kept.accuracy[1] == 1
    removed = greedy(model, tokenizer, batches, pool, 1, "remove", progress=False)
    assert removed.order[0] in order[:2] and removed.counts == [1]


def test_a_backup_head_is_seen_by_greedy_only(retriever):
    """Two heads that each do the whole work of one: neither is missed alone."""
    model, tokenizer, _ = build_tiny_retriever(seed=0)
    attention = attention_layers(model)[1].self_attn
    with torch.no_grad():
        # Head 3 shares the KV head of head 2; give it the same queries and the same way out.
        attention.q_proj.weight[192:256] = attention.q_proj.weight[128:192]
        attention.o_proj.weight[:, 192:256] = attention.o_proj.weight[:, 128:192]
    batches = pack(tokenizer, PROBE.examples(9), 1, model.device)
    alone = answers_without(model, tokenizer, batches, [[], [(1, 2)], [(1, 3)], [(1, 2), (1, 3)]], progress=False)
    assert [accuracy for accuracy, _ in alone[:3]] == [1, 1, 1] and alone[3][0] < 0.4
    removed = greedy(model, tokenizer, batches, [(1, 0), (1, 1), (1, 2), (1, 3)], 2, progress=False)
    assert set(removed.order) == {(1, 2), (1, 3)} and removed.accuracy[1] < 0.4


def test_divergence_on_text_is_that_of_plain_passes(retriever):
    model, tokenizer, order, _ = retriever
    ids = tokenizer(PROBE.documents(3, seed=2), padding=True, return_tensors="pt").input_ids[:, :24]
    table = text_kl(model, [ids[:2], ids[2:]], every=3, progress=False)
    size = model.config.head_dim

    def logits(layer=None, heads=()):
        def zero(module, args):
            changed = args[0].clone()
            for head in heads:
                changed[..., head * size : (head + 1) * size] = 0
            return (changed,)

        o_proj = attention_layers(model)[layer or 0].self_attn.o_proj
        hook = o_proj.register_forward_pre_hook(zero)
        with torch.no_grad():
            found = model(ids, use_cache=False).logits[:, 2::3].log_softmax(-1)
        hook.remove()
        return found

    whole = logits()

    def divergence(layer, heads):
        return (whole.exp() * (whole - logits(layer, heads))).sum(-1).mean().item()

    for layer, head in [(0, 0), (0, 3), (1, 2)]:
        assert table[layer][head] == pytest.approx(divergence(layer, [head]), abs=1e-5)
    layers = layers_by_text(model, [ids], every=3, progress=False)
    assert layers == pytest.approx([divergence(layer, range(4)) for layer in range(2)], abs=1e-5)


def test_layers_are_left_out_one_at_a_time(retriever):
    model, tokenizer, _, batches = retriever
    drops = layers_by_probe(model, tokenizer, batches, progress=False)
    without = [[(layer, head) for head in range(4)] for layer in range(2)]
    measured = answers_without(model, tokenizer, batches, [[], *without], progress=False)
    assert drops == pytest.approx([measured[0][1] - value for _, value in measured[1:]])
    assert min(drops) > 1
