"""Scores must be those of ablating one head at a time over whole forward passes, and must name the right heads."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_retriever import KEYS, build_tiny_retriever
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trainers.files import sha256
from trainers.heads.ablation import HeadAblation, inference
from trainers.heads.head_layout import attention_layers
from trainers.heads.head_scores import HeadScores
from trainers.heads.head_scoring import ProbeFailedError, score_heads
from trainers.heads.screens import SCREENS, screen_heads
from trainers.heads.shared_work import SharedWork
from trainers.probes import Copying, EncodedAnswer, KVRetrieval, MeanOf, generated_accuracy, is_correct
from trainers.probes.probe_rows import pack


PROBE = KVRetrieval(format="json", pairs=6, shots=1, queries=3, words=tuple(KEYS))


@pytest.fixture(scope="module")
def retriever():
    return build_tiny_retriever(seed=0)


@pytest.fixture(scope="module")
def random_models(retriever):
    """Untrained models of several families, with query heads that share KV heads."""
    sizes = {
        "vocab_size": len(retriever[1]),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "eos_token_id": retriever[1].eos_token_id,
    }
    torch.manual_seed(0)
    return [
        LlamaForCausalLM(LlamaConfig(**sizes)),
        MistralForCausalLM(MistralConfig(**sizes, sliding_window=16)),
        Qwen3ForCausalLM(Qwen3Config(**sizes)),
        Qwen2ForCausalLM(Qwen2Config(**sizes, use_sliding_window=True, sliding_window=16, max_window_layers=1)),
        GraniteForCausalLM(GraniteConfig(**sizes, residual_multiplier=0.5, logits_scaling=3.0)),
        Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0)),
    ]


def naive(model, tokenizer, example, layer=None, head=None, value=0):
    """Answer and log-probability of one example alone, in a plain pass; a head that is named gives `value`."""
    one = EncodedAnswer.of(tokenizer, example)
    ids = torch.tensor([one.context + one.target])
    size = model.config.head_dim

    def zero(module, args):
        changed = args[0].clone()
        changed[..., head * size : (head + 1) * size] = value
        return (changed,)

    hook = None if head is None else attention_layers(model)[layer].self_attn.o_proj.register_forward_pre_hook(zero)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(one.context) - 1 :]
    if hook is not None:
        hook.remove()
    log_probs = logits[:-1].log_softmax(-1)[range(len(one.target)), one.target]
    best = logits.argmax(-1).tolist()[: one.num_answer + 1]
    text = tokenizer.decode(best, skip_special_tokens=True)
    return best[:-1] == one.target[: one.num_answer] and is_correct(text, example.answer), log_probs.sum().item()


@pytest.mark.parametrize(
    ("family", "rows", "batch_tokens", "queries"),
    [
        (family, *shape)
        for family in range(5)
        for shape in [(1, 10_000, 3), (2, 1, 4), (3, 10_000, 1)][: 3 if family in (0, 2) else 1]
    ],
)
def test_scores_equal_naive_ablation(random_models, retriever, family, rows, batch_tokens, queries):
    model, tokenizer = random_models[family], retriever[1]
    probe = KVRetrieval(format="lines", pairs=5, shots=1, queries=queries, words=tuple(KEYS))
    scores = score_heads(
        model, tokenizer, probe, 7, 3, min_accuracy=0, rows=rows, batch_tokens=batch_tokens, progress=False
    )
    examples = probe.examples(7, 3)
    base = [naive(model, tokenizer, example) for example in examples]
    assert scores.base_logprob == pytest.approx(sum(value for _, value in base) / 7, abs=1e-4)
    for layer in range(3):
        for head in range(6):
            ablated = [naive(model, tokenizer, example, layer, head) for example in examples]
            drop = sum(one[1] - other[1] for one, other in zip(base, ablated, strict=True)) / 7
            assert scores.logprob_drop[layer][head] == pytest.approx(drop, abs=1e-4)
            accuracy = sum(one[0] - other[0] for one, other in zip(base, ablated, strict=True)) / 7
            assert scores.accuracy_drop[layer][head] == pytest.approx(accuracy, abs=1e-6)


def test_scores_of_a_retriever_equal_naive_ablation(retriever):
    """As above, where answers are right without the ablation and wrong with it."""
    model, tokenizer, _ = retriever
    scores = score_heads(model, tokenizer, PROBE, 9, 1, progress=False)
    assert scores.base_accuracy == 1
    for layer in range(2):
        for head in range(4):
            right = [naive(model, tokenizer, example, layer, head)[0] for example in PROBE.examples(9, 1)]
            assert scores.accuracy_drop[layer][head] == pytest.approx(1 - sum(right) / 9, abs=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_finds_the_heads_that_retrieve(retriever, dtype):
    model, tokenizer, heads = retriever
    scores = score_heads(model, tokenizer, PROBE, 30, dtype=dtype, progress=False)
    assert set(scores.ranking()[: len(heads)]) == set(heads)
    assert len(scores.ranking()) == 8
    for layer, head in heads:
        assert scores.accuracy_drop[layer][head] > 0.5
    others = [scores.accuracy_drop[layer][head] for layer, head in scores.ranking()[len(heads) :]]
    assert max(others) < 0.1


def test_accuracy_is_that_of_generation(retriever):
    model, tokenizer, _ = retriever
    probe = KVRetrieval(format="lines", pairs=20, shots=2, queries=5, words=tuple(KEYS))
    with inference(model, None):
        batches = pack(tokenizer, probe.examples(20, 5), 2, model.device)
        found = [
            right for batch in batches for right in HeadAblation(model, tokenizer, batch).base.correct[0].tolist()
        ]
    assert found == generated_accuracy(model, tokenizer, probe.examples(20, 5), progress=False)


def test_batches_are_of_like_size(retriever):
    """Four dictionaries where three would fit: two and two."""
    model, tokenizer, _ = retriever
    examples = PROBE.examples(4 * PROBE.queries)
    longest = max(batch.input_ids.shape[1] for batch in pack(tokenizer, examples, 1, model.device))
    batches = pack(tokenizer, examples, None, model.device, tokens=int(3.5 * longest))
    assert [len(batch.input_ids) for batch in batches] == [2, 2]
    assert [example for batch in batches for example in batch.examples] == examples


def test_hooks_are_removed_and_mode_is_kept(retriever):
    model, tokenizer, _ = retriever
    o_proj = attention_layers(model)[1].self_attn.o_proj
    mlp = attention_layers(model)[1].mlp.register_forward_hook(_fail_when_batched)
    model.train()
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            score_heads(model, tokenizer, PROBE, 3, progress=False)
        assert model.training
    finally:
        mlp.remove()
        model.eval()
    assert not o_proj._forward_pre_hooks
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in attention_layers(model))


def _fail_when_batched(module, args, output):
    if output.shape[0] > 1:
        raise RuntimeError("on purpose")


def test_a_teacher_that_fails_gets_no_scores(random_models, retriever):
    with pytest.raises(ProbeFailedError, match="more shots.*fewer pairs") as caught:
        score_heads(random_models[0], retriever[1], PROBE, 6, progress=False)
    assert caught.value.accuracy < 0.6


def test_every_probe_of_a_mean_must_be_solved(retriever):
    easy = KVRetrieval(format="json", pairs=4, shots=1, words=tuple(KEYS))
    both = MeanOf((easy, KVRetrieval(format="json", pairs=6, shots=1, words=tuple(KEYS))))
    assert score_heads(*retriever[:2], both, 8, progress=False).base_accuracy == 1
    hard = MeanOf((easy, KVRetrieval(format="json", pairs=4, shots=0, values=("zebra", "yak", "bison", "gnu"))))
    with pytest.raises(ProbeFailedError, match="0% of kv-json-4x0-custom"):
        score_heads(*retriever[:2], hard, 8, min_accuracy=0.4, progress=False)


def test_a_teacher_that_does_more_after_its_head_is_noticed(random_models, retriever):
    """Gemma 2 caps its logits, which the LM head alone does not."""
    with pytest.raises(ValueError, match="cannot be scored"):
        score_heads(random_models[5], retriever[1], PROBE, 6, min_accuracy=0, progress=False)


def test_other_architectures_are_refused(retriever):
    model, tokenizer, _ = retriever
    with pytest.raises(ValueError, match="Llama-like"):
        attention_layers(torch.nn.Module.__new__(_NotLlama))


class _NotLlama:
    class base_model:
        layers = [torch.nn.Linear(2, 2)]
        norm = torch.nn.Identity()


CHILD = """
import sys, time
from tiny_retriever import KEYS, build_tiny_retriever
from trainers.heads.head_scoring import score_heads
from trainers.probes import KVRetrieval
from trainers.heads.shared_work import SharedWork, is_main_process
path, out, wait = sys.argv[1:]
done = SharedWork.done
SharedWork.done = lambda work, unit: (done(work, unit), time.sleep(float(wait)))
probe = KVRetrieval(format="json", pairs=6, shots=1, queries=3, words=tuple(KEYS))
scores = score_heads(*build_tiny_retriever(seed=0)[:2], probe, 60, rows=1, partial_path=path, progress=False)
if is_main_process():
    scores.save(out)
"""


def start(path, out, wait, **environment):
    folder = Path(__file__).parent
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(path), str(out), str(wait)]
    return subprocess.Popen(command, env={**os.environ, **environment})


def num_lines(path):
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def test_a_killed_run_goes_on_in_two_processes(retriever, tmp_path):
    """Killed at a random moment, then shared by two processes: the file is that of an unbroken run in one."""
    path, out = tmp_path / "scores.partial.jsonl", tmp_path / "scores.json"
    whole = score_heads(*retriever[:2], PROBE, 60, rows=1, progress=False)
    process = start(path, out, 0.05)
    while num_lines(path) < random.randint(1, 25):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = num_lines(path)
    assert 1 <= kept < 40 and not out.exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [start(path, out, 0, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)]
    assert [process.wait(timeout=250) for process in ranks] == [0, 0]
    assert out.read_text() == whole.text
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]


def test_an_interrupted_run_does_nothing_twice(retriever, tmp_path, monkeypatch):
    model, tokenizer, _ = retriever
    path, calls = tmp_path / "scores.partial.jsonl", []
    whole = score_heads(model, tokenizer, PROBE, 9, rows=1, progress=False)
    without = HeadAblation.without

    def count(ablation, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return without(ablation, *args)

    monkeypatch.setattr(HeadAblation, "without", count)
    with pytest.raises(KeyboardInterrupt):
        score_heads(model, tokenizer, PROBE, 9, rows=1, partial_path=path, progress=False)
    # A kill may cut the last line in two, too.
    path.write_text(path.read_text()[:-10])
    again = score_heads(model, tokenizer, PROBE, 9, rows=1, partial_path=path, progress=False)
    assert len(calls) - 4 == 6 - 2  # 3 dictionaries x 2 layers, of which three were done and one line was cut
    assert again.text == whole.text
    assert not path.exists()


def test_partial_files_of_other_runs_are_refused_and_cut_lines_dropped(tmp_path):
    path = tmp_path / "work.jsonl"
    work = SharedWork(path, {"seed": 0})
    work.done({"unit": 1})
    work.done({"unit": 2})
    path.write_text(path.read_text()[:-5])
    again = SharedWork(path, {"seed": 0})
    assert again.gather() == [{"unit": 1}] and again.date == work.date
    again.done({"unit": 2})
    assert SharedWork(path, {"seed": 0}).gather() == [{"unit": 1}, {"unit": 2}]
    with pytest.raises(ValueError, match="another run.*seed"):
        SharedWork(path, {"seed": 1})
    again.remove()
    assert not list(tmp_path.iterdir())


def test_work_is_shared_by_cost(monkeypatch):
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        parts.append(SharedWork(None, {}).mine(list(range(20)), cost=lambda item: item))
    assert sorted(sum(parts, [])) == list(range(20))
    assert max(map(sum, parts)) - min(map(sum, parts)) <= 2
    assert all(part == sorted(part) for part in parts)


def test_mean_ablation_equals_a_plain_pass(random_models, retriever):
    model, tokenizer = random_models[0], retriever[1]
    probe = KVRetrieval(format="lines", pairs=5, shots=1, queries=4, words=tuple(KEYS))
    scores = score_heads(model, tokenizer, probe, 8, ablation="mean", rows=2, min_accuracy=0, progress=False)
    assert scores.ablation == "mean"
    rows, inputs = pack(tokenizer, probe.examples(8), 1, model.device), {}
    for layer in range(3):
        hook = attention_layers(model)[layer].self_attn.o_proj.register_forward_pre_hook(
            lambda module, args, layer=layer: inputs.setdefault(layer, []).append(args[0][0])
        )
        for batch in rows:
            HeadAblation(model, tokenizer, batch, keep_inputs=False)
        hook.remove()
    for layer, head in [(0, 5), (1, 0), (2, 3)]:
        part = slice(8 * head, 8 * head + 8)
        mean = torch.cat(inputs[layer])[:, part].mean(0)
        values = [naive(model, tokenizer, one, layer, head, mean)[1] for one in probe.examples(8)]
        assert scores.logprob_drop[layer][head] == pytest.approx(scores.base_logprob - sum(values) / 8, abs=1e-4)


def test_candidates_are_ranked_by_their_first_token(random_models, retriever):
    model, tokenizer = random_models[0], retriever[1]
    probe = KVRetrieval(format="json", pairs=4, shots=0, queries=2, words=tuple(KEYS))
    scores = score_heads(model, tokenizer, probe, 6, answers="candidates", min_accuracy=0, progress=False)
    right, total = 0, 0.0
    for example in probe.examples(6):
        one = EncodedAnswer.of(tokenizer, example)
        tokens = tokenizer.convert_tokens_to_ids([candidate.strip() for candidate in example.candidates])
        with torch.no_grad():
            logits = model(torch.tensor([one.context]), use_cache=False).logits[0, -1, tokens]
        index = example.candidates.index(example.answer)
        right += logits.argmax().item() == index
        total += logits.log_softmax(-1)[index].item()
    assert scores.base_accuracy == pytest.approx(right / 6, abs=1e-6)
    assert scores.base_logprob == pytest.approx(total / 6, abs=1e-5)
    assert scores.answers == "candidates"
    same = KVRetrieval(format="lines", pairs=3, shots=0, values=("1 2", "1 3", "4"), words=tuple(KEYS))
    with pytest.raises(ValueError, match="told apart by their first token"):
        score_heads(model, tokenizer, same, 6, answers="candidates", min_accuracy=0, progress=False)
    with pytest.raises(ValueError, match="one candidate"):
        score_heads(model, tokenizer, Copying(length=3), 6, answers="candidates", min_accuracy=0, progress=False)


def test_offloading_changes_nothing(random_models, retriever):
    options = {"min_accuracy": 0, "progress": False, "rows": 2}
    plain = score_heads(random_models[2], retriever[1], PROBE, 6, **options)
    assert score_heads(random_models[2], retriever[1], PROBE, 6, offload=True, **options).text == plain.text


@pytest.mark.parametrize("screen", list(SCREENS))
def test_survivors_of_a_screen_are_ablated_exactly(retriever, tmp_path, screen):
    model, tokenizer, heads = retriever
    whole = score_heads(model, tokenizer, PROBE, 12, progress=False)
    scores = score_heads(model, tokenizer, PROBE, 12, screen=screen, num_survivors=3, progress=False)
    assert set(heads) <= set(scores.ranking()[:3]) and scores.num_ablated == 3
    assert len(set(scores.ranking())) == 8
    for layer, head in scores.ranking()[:3]:
        assert scores.accuracy_drop[layer][head] == whole.accuracy_drop[layer][head]
        assert scores.logprob_drop[layer][head] == whole.logprob_drop[layer][head]
    assert all(scores.accuracy_drop[layer][head] is None for layer, head in scores.ranking()[3:])
    scores.save(tmp_path / "scores.json")
    assert HeadScores.load(tmp_path / "scores.json") == scores
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_screen_is_the_gradient_of_the_gates(random_models, retriever):
    """The first order of a small change: gates of 1 and of 0.99."""
    model, tokenizer = random_models[0], retriever[1]
    (batch,) = pack(tokenizer, PROBE.examples(3), 1, model.device)
    table = screen_heads(model, tokenizer, batch.examples, "attribution", progress=False)

    def log_prob():
        with inference(model, None):
            return HeadAblation(model, tokenizer, batch, keep_inputs=False).base.log_prob.sum().item() / 3

    base = log_prob()
    for layer, head in [(0, 0), (1, 4), (2, 5)]:
        weight = attention_layers(model)[layer].self_attn.o_proj.weight.data[:, 8 * head : 8 * head + 8]
        weight *= 0.99
        slope = (base - log_prob()) / 0.01
        weight /= 0.99
        assert table[layer][head] == pytest.approx(abs(slope), rel=0.1, abs=2e-3)


def test_scores_are_saved_as_they_are(retriever, tmp_path):
    model, tokenizer, _ = retriever
    scores = score_heads(model, tokenizer, PROBE, 3, progress=False)
    path = tmp_path / "scores.json"
    scores.save(path)
    assert HeadScores.load(path) == scores
    assert scores.sha256 == sha256(path)
    content = json.loads(path.read_text())
    assert content["schema_version"] == 1 and content["dtype"] == "float32"
    content["accuracy_drop"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="accuracy_drop"):
        HeadScores.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not hold head scores"):
        HeadScores.load(path)
