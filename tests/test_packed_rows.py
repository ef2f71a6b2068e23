"""Documents packed in a row do not touch each other: not in attention, not in the convolution, not in the recurrence."""

import pytest
import torch
from layouts import HEAD_MAPS, close, prompt, random_student

from modeling_rad_hybrid import CACHE_NAME
from modeling_rad_hybrid.packed_rows import document_index, flash_attention_lengths, positions_in_documents
from modeling_rad_hybrid.rollback_cache import RadHybridCache


# Lengths of the documents of two rows, a single token and the width of the convolution among them.
ROWS = [[11, 1, 17], [4, 20, 5]]
TOKENS = 29
STARTS = [0, 11, 12, 29, 33, 53, 58]


def signs() -> dict[str, dict]:
    """The three ways to say where documents start, and two of them at once, as collators do."""
    index = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in ROWS])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in ROWS])
    return {
        "seq_idx": {"seq_idx": index},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor(STARTS, dtype=torch.int32)},
        "position_ids": {"position_ids": positions},
        "position_ids that go on": {"seq_idx": index, "position_ids": torch.arange(TOKENS)[None]},
        "seq_idx and position_ids": {"seq_idx": index, "position_ids": positions},
    }


@pytest.mark.parametrize("sign, attention", [*((sign, "sdpa") for sign in signs()), ("seq_idx", "eager")])
def test_documents_do_not_touch_each_other(student, sign, attention):
    student.set_attn_implementation(attention)
    ids, packing = prompt(student, TOKENS), signs()[sign]
    changed = ids.clone()
    for row, (first, second, _) in enumerate(ROWS):
        changed[row, :first] = ids[row, :first].flip(0) + 1
        changed[row, first + second :] = ids[row, first + second :].flip(0) + 1
    with torch.no_grad():
        packed, other = student(ids, **packing).logits, student(changed, **packing).logits
        for row, (first, second, _) in enumerate(ROWS):
            # What stands before and behind a document does not change one bit of it.
            middle = slice(first, first + second)
            assert torch.equal(packed[row, middle], other[row, middle])
            assert not torch.equal(packed[row, :first], other[row, :first])
            start = 0
            for length in ROWS[row]:
                alone = student(ids[row : row + 1, start : start + length], use_cache=False).logits[0]
                close(packed[row, start : start + length], alone)
                start += length


def test_long_rows_stay_apart_bit_for_bit(tiny_llama):
    """Longer than a block of any attention kernel, and than several chunks of the scan."""
    student = random_student(tiny_llama, HEAD_MAPS["mixed"])
    index = (torch.arange(1100) >= 600).long()[None]
    ids, changed = prompt(student, 1100, 1), prompt(student, 1100, 1)
    changed[:, :600] = changed[:, :600].flip(1)
    with torch.no_grad():
        logits = [student(tokens, seq_idx=index, logits_to_keep=500).logits for tokens in (ids, changed)]
    assert torch.equal(*logits)


def test_gradients_stay_in_their_document(student):
    embeds = student.get_input_embeddings()(prompt(student, TOKENS)).detach().requires_grad_()
    logits = student(inputs_embeds=embeds, seq_idx=signs()["seq_idx"]["seq_idx"]).logits
    logits[0, 12:].sum().backward()
    assert embeds.grad[0, 12:].abs().sum(-1).gt(0).all()
    assert not embeds.grad[0, :12].any() and not embeds.grad[1].any()


def test_padding_beside_packed_documents(student):
    ids, index = prompt(student, TOKENS), signs()["seq_idx"]["seq_idx"]
    mask = torch.ones_like(ids)
    mask[0, 26:], mask[1, :4] = 0, 0
    packed = student(ids * mask, attention_mask=mask, seq_idx=index).logits
    close(packed[0, 12:26], student(ids[:1, 12:26]).logits[0])
    close(packed[1, 4:24], student(ids[1:, 4:24]).logits[0])


def test_packed_rows_make_no_cache_and_fill_none(student):
    ids = prompt(student, TOKENS)
    for packing in signs().values():
        assert student(ids, use_cache=True, **packing).get(CACHE_NAME) is None
    # One document in each row is no packing.
    whole = student(ids, use_cache=True, position_ids=torch.arange(TOKENS)[None])
    assert whole[CACHE_NAME].get_seq_length() == TOKENS
    cache = RadHybridCache(student.config)
    with pytest.raises(ValueError, match="packed rows cannot fill a cache"):
        student(ids, seq_idx=signs()["seq_idx"]["seq_idx"], **{CACHE_NAME: cache})


def test_every_sign_says_the_same():
    signed = signs()
    index = signed["seq_idx"]["seq_idx"]
    positions = signed["position_ids"]["position_ids"]
    starts = torch.tensor(STARTS, dtype=torch.int32)
    assert torch.equal(positions_in_documents(index), positions)
    for found in (
        document_index(2, TOKENS, position_ids=positions),
        document_index(2, TOKENS, cu_seq_lens=starts),
    ):
        assert torch.equal(positions_in_documents(found), positions)
    lengths = flash_attention_lengths(positions)
    assert torch.equal(lengths["cu_seq_lens_q"], starts) and torch.equal(lengths["cu_seq_lens_k"], starts)
    assert int(lengths["max_length_q"]) == int(lengths["max_length_k"]) == 20
    assert document_index(2, TOKENS) is None
