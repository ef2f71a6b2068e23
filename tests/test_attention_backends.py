"""
Kept heads through transformers' attention interface: every back end by its own name.

FlashAttention does not run on a CPU. Its kernel is replaced here, at the place where transformers would call it, by a
few lines that do what its arguments say; with right arguments the logits are those of eager attention.
"""

import pytest
import torch
from layouts import close, prompt
from transformers.integrations import flash_attention
from transformers.utils import is_torch_flex_attn_available


def test_sdpa_and_eager_agree(student):
    ids = prompt(student)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    logits = []
    for name in ("eager", "sdpa"):
        student.set_attn_implementation(name)
        out = student(ids, attention_mask=mask, output_attentions=name == "eager")
        logits.append(out.logits[mask.bool()])
    close(*logits)


def flash_by_hand(query, key, value, attention_mask, query_length, is_causal, softmax_scale, **kwargs):
    """FlashAttention in words: `[B, T, H, P]`, padding by a 2D mask, documents by cumulative lengths, grouped heads."""
    assert is_causal and query_length == query.shape[1] and query.shape[2] % key.shape[2] == 0
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    place = torch.arange(keys)
    allowed = place[None, :] <= torch.arange(queries)[:, None] + keys - queries  # [queries, keys]
    allowed = allowed.expand(batch, -1, -1)
    if attention_mask is not None:
        assert attention_mask.shape == (batch, keys)
        allowed = allowed & attention_mask.bool()[:, None]
    if (starts := kwargs.get("cu_seq_lens_q")) is not None:
        assert torch.equal(starts, kwargs["cu_seq_lens_k"])
        assert int(kwargs["max_length_q"]) == int(kwargs["max_length_k"]) == int(starts.diff().max())
        assert starts[-1] == batch * keys
        document = (torch.arange(batch * keys)[:, None] >= starts[None, 1:]).sum(-1).view(batch, keys)
        allowed = allowed & (document[:, :, None] == document[:, None, :])
    key, value = (t.repeat_interleave(query.shape[2] // key.shape[2], dim=2) for t in (key, value))
    scores = torch.einsum("bqhp,bkhp->bhqk", query, key) * softmax_scale
    # A padded query sees nothing; its output is not looked at.
    weights = scores.masked_fill(~allowed[:, None], -1e9).softmax(-1)
    return torch.einsum("bhqk,bkhp->bqhp", weights, value)


def test_flash_attention_gets_the_right_arguments(student, monkeypatch):
    calls = []

    def kernel(query, key, value, attention_mask, **kwargs):
        calls.append({"query": query.shape, "key": key.shape, **kwargs})
        return flash_by_hand(query, key, value, attention_mask, **kwargs)

    ids = prompt(student)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    packing = {"seq_idx": (torch.arange(29) >= torch.tensor([[11], [20]])).long()}
    student.set_attn_implementation("eager")
    with torch.no_grad():
        expected = [student(ids, attention_mask=mask).logits, student(ids, **packing).logits]
        text = student.generate(ids, attention_mask=mask, max_new_tokens=5)
        monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
        kept = [heads for heads in student.config.kept_heads if heads]
        for name in ("flash_attention_4", "flash_attention_3", "flash_attention_2"):
            # Past the check that the kernel is installed, which it cannot be here.
            student.config._attn_implementation = name
            calls.clear()
            close(student(ids, **packing).logits, expected[1])
            assert [call["attn_implementation"] for call in calls] == [name] * len(kept)
        for heads, call in zip(kept, calls, strict=True):
            groups = {head // 2 for head in heads}
            fullest = max(sum(head // 2 == group for head in heads) for group in groups)
            # K and V of a group go in once, whatever heads are kept of it.
            assert call["query"] == (2, 29, len(groups) * fullest, 16) and call["key"] == (2, 29, len(groups), 16)
            assert call["dropout"] == 0.0 and call["softmax_scale"] == 16**-0.5
        close(student(ids, attention_mask=mask).logits[mask.bool()], expected[0][mask.bool()])
        assert torch.equal(student.generate(ids, attention_mask=mask, max_new_tokens=5), text)


@pytest.mark.skipif(not is_torch_flex_attn_available(), reason="this PyTorch has no flex attention")
def test_flex_attention(student):
    ids = prompt(student)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    packing = {"seq_idx": (torch.arange(29) >= torch.tensor([[11], [20]])).long()}
    # The masks and the scores are what is tested here; compiling them to C++ takes a minute.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = [student(ids, attention_mask=mask).logits, student(ids, **packing).logits]
        student.set_attn_implementation("flex_attention")
        found = [student(ids, attention_mask=mask).logits, student(ids, **packing).logits]
    close(found[0][mask.bool()], expected[0][mask.bool()])
    close(found[1], expected[1])
