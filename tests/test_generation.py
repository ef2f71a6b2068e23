"""
Generation with a student: every way of it gives the logits of one uncached pass and leaves the states of one prefill.

All of it in each layout of kept heads and in both mixings (the `student` of conftest.py).
"""

import pytest
import torch
from layouts import HEAD_MAPS, close, prompt, random_student, same_states, states
from transformers import DynamicCache, StaticCache

from modeling_rad_hybrid import CACHE_NAME
from modeling_rad_hybrid.rollback_cache import RadHybridCache


NEW = 7
WATCH = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW}


def one_prefill(model, ids) -> RadHybridCache:
    """A cache that was filled with `ids` at once."""
    cache = RadHybridCache(model.config)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    return cache


def generate(model, ids, check_states=True, **options):
    """Generates, and compares logits and states with one uncached pass over the text that came out."""
    out = model.generate(ids, **WATCH, **options)
    tokens = out.sequences.shape[1] - 1
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False).logits
    close(torch.stack(out.logits, 1), whole[:, tokens - len(out.logits) : tokens])
    if check_states:
        same_states(out[CACHE_NAME], one_prefill(model, out.sequences[:, :-1]), tokens)
    return out


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "chunked prefill into a static cache": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "prompt shorter than the convolution": {"tokens": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_each_way_of_generating(student, mode):
    options = {"do_sample": False, "tokens": 13, **MODES[mode]}
    ids = prompt(student, options.pop("tokens"))
    out = generate(student, ids, **options)
    if not options["do_sample"]:
        without = student.generate(ids, use_cache=False, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(out.sequences, without)


def test_beam_search(student):
    ids = prompt(student, 9)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": NEW, "output_scores": True}
    found = [
        student.generate(ids, return_dict_in_generate=True, **options, **more)
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    for other in found[1:]:
        assert torch.equal(found[0].sequences, other.sequences)
        close(found[0].sequences_scores, other.sequences_scores)


LENGTHS = [11, 7, 3]


def padded(ids, side):
    """Rows of these lengths, padded on a side, and their mask."""
    place = torch.arange(LENGTHS[0])[None].expand(3, -1)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (place >= LENGTHS[0] - lengths if side == "left" else place < lengths).long()
    rows = torch.full_like(ids, 1)
    for row, length in enumerate(LENGTHS):
        rows[row, mask[row].bool()] = ids[row, :length]
    return rows, mask


def test_padding_on_either_side_changes_nothing(student):
    ids = prompt(student, LENGTHS[0], batch=3)
    alone = [student.generate(ids[row : row + 1, :length], **WATCH) for row, length in enumerate(LENGTHS)]
    for side in ("left", "right"):
        rows, mask = padded(ids, side)
        for cache in (None, "static"):
            out = student.generate(rows, attention_mask=mask, cache_implementation=cache, **WATCH)
            for row, one in enumerate(alone):
                assert torch.equal(out.sequences[row, LENGTHS[0] :], one.sequences[0, LENGTHS[row] :])
                close(torch.stack(out.logits, 1)[row], torch.stack(one.logits, 1)[0])
            same_recurrence(student, out[CACHE_NAME], [one[CACHE_NAME] for one in alone])
    beams = []
    for rows, mask in (padded(ids, "left"), padded(ids, "right")):
        beams.append(student.generate(rows, attention_mask=mask, num_beams=2, max_new_tokens=NEW)[:, LENGTHS[0] :])
    assert torch.equal(*beams)


def same_recurrence(student, cache, alone):
    """Asserts that each row's window and state are those of the row without padding."""
    for index, layer in enumerate(student.model.layers):
        if layer.mixer.ssm is not None:
            for row, one in enumerate(alone):
                close(cache.layers[index].conv_states[0][row], one.layers[index].conv_states[0][0])
                close(cache.layers[index].recurrent_states[0][row], one.layers[index].recurrent_states[0][0])


def test_right_padded_prefill_leaves_the_states_of_the_tokens_alone(student):
    """Transformers' issue #48256: its own hybrids let padding decay the state and push tokens out of the window."""
    ids = prompt(student, LENGTHS[0] + 1, batch=3)
    rows, mask = padded(ids[:, :-1], "right")
    cache = RadHybridCache(student.config)
    student(rows, attention_mask=mask, **{CACHE_NAME: cache})
    same_recurrence(student, cache, [one_prefill(student, ids[r : r + 1, :n]) for r, n in enumerate(LENGTHS)])
    # And the tokens after it are right: the next one of each row, at its own position.
    following = torch.stack([ids[row, length] for row, length in enumerate(LENGTHS)])[:, None]
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    positions = torch.tensor(LENGTHS)[:, None]
    logits = student(following, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache}).logits
    whole = student(ids, use_cache=False).logits
    close(logits[:, 0], torch.stack([whole[row, length] for row, length in enumerate(LENGTHS)]))


def test_forward_goes_on_from_a_cache_by_one_and_by_several_tokens(student):
    ids = prompt(student)
    whole = student(ids, use_cache=False).logits
    # Both names of the cache are understood, whatever the version of transformers, and transformers' own caches too.
    caches = [
        {"cache": RadHybridCache(student.config)},
        {"past_key_values": RadHybridCache(student.config)},
        {CACHE_NAME: DynamicCache(config=student.config)},
        {CACHE_NAME: StaticCache(config=student.config, max_cache_len=40)},
    ]
    for cache in caches:
        parts = [student(ids[:, :12], **cache).logits, student(ids[:, 12:15], **cache).logits]
        parts += [student(ids[:, t : t + 1], **cache).logits for t in range(15, ids.shape[1])]
        close(torch.cat(parts, 1), whole)
        same_states(next(iter(cache.values())), one_prefill(student, ids), ids.shape[1])


@pytest.mark.parametrize("turn", [1, 5])
def test_generate_goes_on_from_a_cache(student, turn):
    first = generate(student, prompt(student, 8))
    ids = torch.cat([first.sequences, prompt(student, turn)], 1)
    # Random text holds the token of padding, from which `generate` would guess a mask.
    mask = torch.ones_like(ids)
    second = generate(student, ids, attention_mask=mask, **{CACHE_NAME: first[CACHE_NAME]})
    assert torch.equal(second.sequences, student.generate(ids, attention_mask=mask, max_new_tokens=NEW))


def test_a_forward_of_its_own_makes_the_cache_that_goes_on(student):
    ids = prompt(student, 9)
    cache = student(ids[:, :6])[CACHE_NAME]
    assert torch.equal(
        generate(student, ids, **{CACHE_NAME: cache}).sequences, student.generate(ids, max_new_tokens=NEW)
    )


def test_a_cache_can_be_emptied_and_used_again(student):
    ids = prompt(student, 9)
    cache = one_prefill(student, ids.flip(1))
    cache.reset()
    if all(layer_type != "full_attention" for layer_type in student.config.layer_types):
        assert not any(layer.has_previous_state[0] for layer in cache.layers)
    student(ids, **{CACHE_NAME: cache})
    same_states(cache, one_prefill(student, ids), 9)


def test_states_after_a_rollback(student):
    """Transformers' issue #49036: its own layers crop keys and window, and leave the recurrent state as it was."""
    ids = prompt(student, 24)
    cache = one_prefill(student, ids[:, :12])
    cache.activate_past_recording()

    def feed(start, end):
        return student(ids[:, start:end], **{CACHE_NAME: cache}).logits

    with torch.no_grad():
        # Several tokens at once, of which three stay.
        feed(12, 17)
        cache.crop(-2)
        same_states(cache, one_prefill(student, ids[:, :15]), 15)
        # One by one and several, taken back to the middle of the first, and to nothing new at all.
        feed(15, 18), feed(18, 19), feed(19, 20)
        cache.crop(-4)
        same_states(cache, one_prefill(student, ids[:, :16]), 16)
        feed(16, 19)
        cache.crop(-3)
        same_states(cache, one_prefill(student, ids[:, :16]), 16)
        # All accepted; what was accepted before the last crop cannot be taken back any more.
        feed(16, 18)
        cache.crop(0)
        assert cache.get_seq_length() == 18
        if any(layer.mixer.ssm is not None for layer in student.model.layers):
            with pytest.raises(RuntimeError, match="0 tokens were recorded"):
                cache.crop(-1)
            cache = one_prefill(student, ids[:, :18])
        close(feed(18, 24), student(ids, use_cache=False).logits[:, 18:])


@pytest.mark.parametrize("window", [6, 40])
def test_states_after_a_rollback_in_a_sliding_window(tiny_llama, window):
    test_states_after_a_rollback(random_student(tiny_llama, HEAD_MAPS["mixed"], sliding_window=window))


def test_a_whole_prompt_can_be_taken_back(student):
    ids = prompt(student, 9)
    cache = RadHybridCache(student.config)
    cache.activate_past_recording()
    student(ids.flip(1), **{CACHE_NAME: cache})
    cache.crop(-9)
    assert cache.get_seq_length() == 0
    student(ids, **{CACHE_NAME: cache})
    same_states(cache, one_prefill(student, ids), 9)


def test_right_padding_can_be_taken_back(student):
    """Columns are taken back: of the rows' padding and of their tokens alike."""
    ids = prompt(student, LENGTHS[0], batch=3)
    rows, mask = padded(ids, "right")
    cache = one_prefill(student, rows[:, :2])
    cache.activate_past_recording()
    student(rows[:, 2:], attention_mask=mask, **{CACHE_NAME: cache})
    cache.crop(-2)
    shorter = [min(length, LENGTHS[0] - 2) for length in LENGTHS]
    same_recurrence(student, cache, [one_prefill(student, ids[r : r + 1, :n]) for r, n in enumerate(shorter)])


def test_assisted_decoding_is_greedy_decoding(student, tiny_llama):
    ids = prompt(student, 13, batch=1)
    greedy = student.generate(ids, do_sample=False, max_new_tokens=NEW)
    # Another model's drafts are refused, a near copy's accepted in part, its own all; the prompt's own words too.
    near = random_student(tiny_llama, student.config.kept_heads, mixing=student.config.mixing)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    other = random_student(tiny_llama, HEAD_MAPS["mixed"], seed=1)
    for helper in (other, near, student):
        helper.generation_config.num_assistant_tokens = 4
        helper.generation_config.assistant_confidence_threshold = 0.0
        out = generate(student, ids, do_sample=False, assistant_model=helper)
        assert torch.equal(out.sequences, greedy)
    repeated = torch.cat([ids, greedy[:, -4:], ids[:, :3], greedy[:, -4:-2]], 1)
    options = {"attention_mask": torch.ones_like(repeated), "do_sample": False}
    out = generate(student, repeated, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(out.sequences, student.generate(repeated, max_new_tokens=NEW, **options))
    # A student drafts for its teacher.
    drafted = tiny_llama.generate(ids, do_sample=False, max_new_tokens=NEW, assistant_model=student)
    assert torch.equal(drafted, tiny_llama.generate(ids, do_sample=False, max_new_tokens=NEW))


def test_what_cannot_be_right_is_refused(tiny_llama):
    student = random_student(tiny_llama, HEAD_MAPS["mixed"])
    ids = prompt(student, LENGTHS[0], batch=3)
    rows, mask = padded(ids, "right")
    for options in ({"use_cache": False}, {"prefill_chunk_size": 4}):
        with pytest.raises(ValueError, match="padding_side"):
            student.generate(rows, attention_mask=mask, **options)
    with pytest.raises(ValueError, match="padding_side"):
        student.generate(rows[1:2], attention_mask=mask[1:2], prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="DynamicCache cannot do"):
        student.generate(ids[:1], prompt_lookup_num_tokens=3, **{CACHE_NAME: DynamicCache(config=student.config)})
    student = random_student(tiny_llama, HEAD_MAPS["no attention at all"])
    with pytest.raises(ValueError, match="DynamicCache cannot count"):
        student.generate(ids, **{CACHE_NAME: DynamicCache(config=student.config)})


def test_inputs_embeds(student):
    ids = prompt(student, 9)
    embeds = student.get_input_embeddings()(ids)
    close(student(inputs_embeds=embeds).logits, student(ids).logits)
    out = student.generate(inputs_embeds=embeds, **WATCH)
    assert torch.equal(out.sequences, student.generate(ids, max_new_tokens=NEW)[:, 9:])
    full = torch.cat([ids, out.sequences], 1)
    same_states(out[CACHE_NAME], one_prefill(student, full[:, :-1]), full.shape[1] - 1)
    with pytest.raises(ValueError, match="exactly one"):
        student(ids, inputs_embeds=embeds)


def test_hidden_states_and_attentions(student):
    student.set_attn_implementation("eager")
    ids = prompt(student, 9)
    out = student(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == student.config.num_hidden_layers + 1
    close(student.lm_head(out.hidden_states[-1]), out.logits)
    kept = [len(heads) for heads in student.config.kept_heads if heads]
    # One tensor for each layer that has attention, of its kept heads.
    assert [weights.shape for weights in out.attentions] == [(2, heads, 9, 9) for heads in kept]
    for weights in out.attentions:
        close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    step = student.generate(ids, output_hidden_states=True, output_attentions=bool(kept), **WATCH)
    whole = student(step.sequences, output_hidden_states=True, output_attentions=True)
    last = step.sequences.shape[1] - 2
    for states_of_step, states_of_all in zip(step.hidden_states[-1], whole.hidden_states, strict=True):
        close(states_of_step[:, 0], states_of_all[:, last])
    for at_step, at_once in zip(step.attentions[-1] if kept else (), whole.attentions, strict=True):
        close(at_step[:, :, 0], at_once[:, :, last, : last + 1])


def test_logits_to_keep(student):
    ids = prompt(student, 9)
    whole = student(ids).logits
    close(student(ids, logits_to_keep=3).logits, whole[:, -3:])
    close(student(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])
    rows = torch.tensor([[2], [7]])
    close(student(ids, logits_to_keep=rows).logits, torch.stack([whole[0, 2:3], whole[1, 7:8]]))


def test_the_static_decode_step_compiles_to_one_graph(student):
    ids = prompt(student, 12)
    attends = any(student.config.kept_heads)
    cache = StaticCache(config=student.config, max_cache_len=24) if attends else RadHybridCache(student.config)
    torch.compiler.reset()  # graphs of other students count against dynamo's limit
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    with torch.no_grad():
        student(ids[:, :9], **{CACHE_NAME: cache})
        steps = [
            compiled(ids[:, t : t + 1], position_ids=torch.tensor([[t]]), **{CACHE_NAME: cache}).logits
            for t in range(9, 12)
        ]
        close(torch.cat(steps, 1), student(ids, use_cache=False).logits[:, 9:])
    same_states(cache, one_prefill(student, ids), 12)


def test_keys_of_a_shared_group_are_stored_once(tiny_llama):
    student = random_student(tiny_llama, [[0, 1, 2], [], []])
    cache = one_prefill(student, prompt(student))
    assert cache.layers[0].keys.shape[1] == 2
    # 2 KV groups of 29 tokens in 2 rows, keys and values, and no more than that.
    assert sum(tensor.numel() for tensor in states(cache, 29)[2:4]) == 2 * 2 * 2 * 29 * 16
