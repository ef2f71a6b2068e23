"""
The real teacher, SmolLM2-135M-Instruct, and its student: the text of one, and generation with the other.

    make teacher && python -m pytest -m smollm2
"""

import json
import lzma
from itertools import islice
from pathlib import Path

import pytest
import test_generation as table
import torch

from examples.smollm2.fetch import PROVENANCE, is_complete, teacher_folder
from trainers.conversion import convert
from trainers.heads.head_map import HeadMap, TeacherShape, shipped_head_map
from trainers.teachers import load_teacher


pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(not is_complete(teacher_folder()), reason="run `make teacher` first"),
]
TEXT = Path(__file__).parent.parent / "examples" / "text" / "held_out.jsonl.xz"


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(teacher_folder())


@pytest.fixture(scope="module")
def student(teacher):
    """The student of the shipped head map, as it comes out of the conversion."""
    student = convert(teacher[0], shipped_head_map(PROVENANCE["id"]))
    student.generation_config.eos_token_id = None
    return student


def prompts() -> list[str]:
    """The beginnings of fifty paragraphs."""
    with lzma.open(TEXT, "rt", encoding="utf-8") as rows:
        paragraphs = (text for row in rows for text in json.loads(row)["text"].split("\n\n") if len(text) > 200)
        return list(islice(paragraphs, 50))


def test_with_every_head_kept_the_text_is_the_teachers_token_for_token(teacher):
    model, tokenizer = teacher
    shape = TeacherShape.from_config(model.config, PROVENANCE["id"])
    heads = list(range(model.config.num_attention_heads))
    student = convert(model, HeadMap(shape, [heads] * model.config.num_hidden_layers))
    # Of different lengths, in one batch.
    beginnings = [text[: 40 + 2 * row] for row, text in enumerate(prompts())]
    rows = tokenizer(beginnings, return_tensors="pt", padding=True, padding_side="left")
    assert len(rows["input_ids"]) == 50
    texts = [each.generate(**rows, max_new_tokens=32, do_sample=False) for each in (model, student)]
    assert torch.equal(*texts)
    assert len({tuple(text) for text in texts[0].tolist()}) == 50


ONE_BY_ONE = [
    table.test_beam_search,
    table.test_padding_on_either_side_changes_nothing,
    table.test_right_padded_prefill_leaves_the_states_of_the_tokens_alone,
    table.test_forward_goes_on_from_a_cache_by_one_and_by_several_tokens,
    table.test_a_cache_can_be_emptied_and_used_again,
    table.test_states_after_a_rollback,
    table.test_inputs_embeds,
    table.test_logits_to_keep,
    table.test_hidden_states_and_attentions,
    table.test_the_static_decode_step_compiles_to_one_graph,
]


@pytest.mark.parametrize("check", ONE_BY_ONE, ids=lambda check: check.__name__)
def test_the_generation_table(student, check):
    check(student)


@pytest.mark.parametrize("mode", table.MODES)
def test_each_way_of_generating(student, mode):
    table.test_each_way_of_generating(student, mode)


def test_assisted_decoding(student):
    ids = table.prompt(student, 13, batch=1)
    ids = torch.cat([ids, ids[:, :5]], 1)
    greedy = student.generate(ids, do_sample=False, max_new_tokens=table.NEW)
    for helper in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": student}):
        assert torch.equal(table.generate(student, ids, do_sample=False, **helper).sequences, greedy)
