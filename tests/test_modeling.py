"""The student as a transformers model: equality with its teacher, caches, padding, packing, generation, configuration."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from modeling_rad_hybrid import CACHE_NAME, RadHybridConfig, RadHybridForCausalLM
from modeling_rad_hybrid.modeling_rad_hybrid import new_cache
from trainers.families import backbone_fields


ALL = [0, 1, 2, 3]
HEAD_MAPS = {
    "mixed": [[0, 1], [], [1, 2, 3]],
    "first layer without attention": [[], [2], [0]],
    "no attention at all": [[], [], []],
    "whole layers": [ALL, [], ALL],
}


@pytest.fixture(params=[(name, mixing) for name in HEAD_MAPS for mixing in ("replace", "parallel")], ids=str)
def student(request, tiny_llama):
    name, mixing = request.param
    layers = tiny_llama.config.num_hidden_layers
    return random_student(tiny_llama, (HEAD_MAPS[name] * layers)[:layers], mixing=mixing)


def random_student(teacher, kept_heads, **kwargs):
    torch.manual_seed(0)
    model = RadHybridForCausalLM(
        RadHybridConfig(**backbone_fields(teacher.config), kept_heads=kept_heads, **kwargs)
    ).eval()
    # Away from the start values, so that convolution, gate and skip all matter.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model


def prompt(model, tokens=29, batch=2):
    torch.manual_seed(1)
    return torch.randint(5, model.config.vocab_size, (batch, tokens))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_with_every_head_kept_the_student_is_the_teacher(tiny_llama):
    model = RadHybridForCausalLM(RadHybridConfig(**backbone_fields(tiny_llama.config))).eval()
    weights = {name.replace("self_attn", "mixer.attention"): t for name, t in tiny_llama.state_dict().items()}
    model.load_state_dict(weights)
    ids = prompt(model)
    assert torch.equal(model(ids).logits, tiny_llama(ids).logits)


def test_cached_forward_equals_one_pass(student):
    ids = prompt(student)
    whole = student(ids).logits
    # Both names of the cache are understood, whatever the version of transformers.
    for name in ("cache", "past_key_values"):
        cache = {name: new_cache(student.config)}
        parts = [student(ids[:, :12], **cache).logits, student(ids[:, 12:15], **cache).logits]
        parts += [student(ids[:, t : t + 1], **cache).logits for t in range(15, ids.shape[1])]
        close(torch.cat(parts, 1), whole)


def test_generation_is_the_same_with_cache_without_and_left_padded(student):
    ids = prompt(student)
    options = {"max_new_tokens": 10, "do_sample": False}
    with_cache = student.generate(ids, **options)
    assert torch.equal(with_cache, student.generate(ids, use_cache=False, **options))
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = (torch.arange(padded.shape[1]) >= 5).long().expand(2, -1)
    assert torch.equal(student.generate(padded, attention_mask=mask, **options)[:, 5:], with_cache)
    assert torch.equal(student.generate(ids, cache_implementation="static", **options), with_cache)
    assert torch.equal(
        student.generate(ids, num_beams=3, **options), student.generate(ids, num_beams=3, use_cache=False, **options)
    )


def test_right_padded_prefill_leaves_the_states_of_the_tokens_alone(student):
    ids = prompt(student, 20)
    whole = student(ids).logits
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[0, 15:] = 0
    mask[1, 17:] = 0
    cache = new_cache(student.config)
    student(ids[:, :19] * mask, attention_mask=mask, past_key_values=cache)
    following = torch.stack([ids[0, 15], ids[1, 17]])[:, None]
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    positions = torch.tensor([[15], [17]])
    logits = student(following, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    close(logits[:, 0], torch.stack([whole[0, 15], whole[1, 17]]))


def test_packed_documents_do_not_touch_each_other(student):
    ids = prompt(student, batch=1)
    positions = torch.cat([torch.arange(11), torch.arange(18)])[None]
    packed = student(ids, position_ids=positions, use_cache=False).logits
    close(packed[:, 11:], student(ids[:, 11:], use_cache=False).logits)
    changed = ids.clone()
    changed[:, :11] = prompt(student, 11, 1).flip(1)
    assert torch.equal(student(changed, position_ids=positions, use_cache=False).logits[:, 11:], packed[:, 11:])


def test_saved_student_loads_again(student, tmp_path):
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt(student)
    assert torch.equal(again(ids).logits, student(ids).logits)
    half = RadHybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16 and torch.isfinite(half(ids).logits).all()


def test_gradient_checkpointing_changes_nothing(student):
    ids = prompt(student)
    gradients = []
    for checkpointing in (False, True):
        student.train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        student(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_shared_groups_store_their_keys_once(tiny_llama):
    layers = tiny_llama.config.num_hidden_layers
    student = random_student(tiny_llama, [[0, 1, 2]] + [[]] * (layers - 1))
    cache = student(prompt(student), use_cache=True)[CACHE_NAME]
    assert cache.layers[0].keys.shape[1] == 2


BAD = [
    ({"kept_heads": [[0], [4], []]}, "0 to 3"),
    ({"kept_heads": [[-1], [], []]}, "0 to 3"),
    ({"kept_heads": [[1, 0], [], []]}, "sorted"),
    ({"kept_heads": [[1, 1], [], []]}, "distinct"),
    ({"kept_heads": [[0]]}, "3 layers"),
    ({"kept_heads": [[0], [], [], []]}, "3 layers"),
    ({"kept_heads": [["0"], [], []]}, "integers"),
    ({"kept_heads": [[True], [], []]}, "integers"),
    ({"kept_heads": [0, 1, 2]}, "integers"),
    ({"kept_heads": "all"}, "kept_heads"),
    ({"ssm_state_size": 0}, "ssm_state_size"),
    ({"ssm_state_size": 8.0}, "ssm_state_size"),
    ({"ssm_conv_kernel": 0}, "ssm_conv_kernel"),
    ({"ssm_chunk_size": -1}, "ssm_chunk_size"),
    ({"mixing": "both"}, "mixing"),
    ({"ssm_backend": "cuda"}, "ssm_backend"),
    ({"num_key_value_heads": 3}, "multiple"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 15}, "even"),
    ({"hidden_size": 0}, "hidden_size"),
]


@pytest.mark.parametrize("fields, words", BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_configurations_are_refused(fields, words):
    good = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    with pytest.raises((StrictDataclassError, ValueError, ZeroDivisionError), match=words):
        RadHybridConfig(**{**good, **fields})
