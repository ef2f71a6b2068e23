"""Ablating a student's heads gives what zeroing their slices in whole forward passes gives, and names the right ones."""

import pytest
import torch
from tiny_retriever import KEYS, build_tiny_retriever

from modeling_rad_hybrid import RadHybridConfig
from trainers.calibration import calibrate
from trainers.conversion import convert
from trainers.heads.ablation import Ablator
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.heads.student_heads import locate_retrieval, student_slots
from trainers.probes import EncodedAnswer, KVRetrieval
from trainers.probes.probe_rows import pack


PROBE = KVRetrieval(format="json", pairs=6, shots=1, queries=3, words=tuple(KEYS))


@pytest.fixture(scope="module")
def retriever():
    return build_tiny_retriever(seed=0)


@pytest.fixture(scope="module")
def student(retriever):
    """The tiny retriever's student, which keeps the two heads that retrieve."""
    model, tokenizer, heads = retriever
    made = convert(model, HeadMap.from_pairs(TeacherShape.from_config(model.config, "tiny"), heads), state_size=4)
    ids = tokenizer(PROBE.documents(40, seed=1), padding=True, return_tensors="pt").input_ids
    calibrate(model, made, [ids], progress=False)
    return made


def naive(student, tokenizer, example, outlets, size):
    """Log-probability of an answer in a plain pass with slices of the named projections zeroed."""
    one = EncodedAnswer.of(tokenizer, example)
    ids = torch.tensor([one.context + one.target])

    def zero(slots):
        def change(module, args):
            changed = args[0].clone()
            for slot in slots:
                changed[..., slot * size : (slot + 1) * size] = 0
            return (changed,)

        return change

    hooks = [projection.register_forward_pre_hook(zero(slots)) for projection, slots in outlets]
    with torch.no_grad():
        logits = student(ids, use_cache=False).logits[0, len(one.context) - 1 : -1]
    for hook in hooks:
        hook.remove()
    return logits.log_softmax(-1)[range(len(one.target)), one.target].sum().item()


@pytest.mark.parametrize("mixing", ["replace", "parallel"])
def test_groups_equal_naive_ablation(retriever, mixing):
    model, tokenizer, _ = retriever
    shape = TeacherShape.from_config(model.config, "tiny")
    student = convert(model, HeadMap(shape, [[1, 3], [2]]), mixing=mixing, state_size=4)
    found = locate_retrieval(student, tokenizer, PROBE, 4, random_heads=3, batch_tokens=300, progress=False)
    layers, examples = student.model.layers, PROBE.examples(4)
    kept, recurrent = student_slots(student.config)
    own = {layer: len(student.config.kept_heads[layer]) for layer in range(2)}

    def mean(outlets):
        return sum(naive(student, tokenizer, example, outlets, 64) for example in examples) / len(examples)

    assert found.whole.log_prob == pytest.approx(mean([]), abs=1e-4)
    everything = [(layer.mixer.attention.o_proj, range(own[i])) for i, layer in enumerate(layers)]
    assert found.groups[0].heads == 3
    assert found.groups[0].log_prob == pytest.approx(mean(everything), abs=1e-4)
    for name, group in found.kept.items():
        layer, head = map(int, name.split("."))
        outlet = layers[layer].mixer.attention.o_proj, [student.config.kept_heads[layer].index(head)]
        assert group.log_prob == pytest.approx(mean([outlet]), abs=1e-4)
    for name, group in found.recurrent.items():
        layer, head = map(int, name.split("."))
        outlet = layers[layer].mixer.ssm.out_proj, [recurrent[layer, head] - own[layer]]
        assert group.log_prob == pytest.approx(mean([outlet]), abs=1e-4)
    assert len(found.recurrent) == 3 and set(found.kept) == {"0.1", "0.3", "1.2"}


def test_retrieval_rests_on_the_kept_heads(retriever, student):
    found = locate_retrieval(student, retriever[1], PROBE, 30, progress=False)
    assert found.whole.accuracy > 0.9
    groups = {group.name: group for group in found.groups}
    assert groups["all kept heads"].accuracy < 0.3
    assert groups["all recurrent heads of their layers"].heads == 6
    assert all(group.accuracy < 0.3 for group in found.kept.values())
    assert all(group.accuracy > 0.9 for group in found.recurrent.values())
    assert len(found.recurrent) == 6
    text = found.table("tiny").columns
    assert [cell for cell in text[0].cells if cell.startswith("kept")] == ["kept 0.0", "kept 1.2"]


def test_a_student_without_kept_heads_has_recurrent_groups_only(retriever):
    model, tokenizer, _ = retriever
    student = convert(model, HeadMap(TeacherShape.from_config(model.config, "tiny"), [[], []]), state_size=4)
    found = locate_retrieval(student, tokenizer, PROBE, 2, random_heads=2, progress=False)
    assert [group.name for group in found.groups] == ["all recurrent heads"] and not found.kept


def test_slots():
    replace = RadHybridConfig(num_hidden_layers=2, num_attention_heads=4, kept_heads=[[1, 2], []])
    assert student_slots(replace) == (
        {(0, 1): 0, (0, 2): 1},
        {(0, 0): 2, (0, 3): 3, (1, 0): 0, (1, 1): 1, (1, 2): 2, (1, 3): 3},
    )
    parallel = RadHybridConfig(num_hidden_layers=1, num_attention_heads=2, kept_heads=[[1]], mixing="parallel")
    assert student_slots(parallel) == ({(0, 1): 0}, {(0, 0): 1, (0, 1): 2})


def test_students_read_one_prompt_a_row(retriever, student):
    batch = pack(retriever[1], PROBE.examples(3), 1, student.device)[0]
    with pytest.raises(ValueError, match="share=False"):
        Ablator(student, batch)
