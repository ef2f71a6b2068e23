"""The hand-made retriever must retrieve, and exactly its known heads must do it: other tests take both for granted."""

import pytest
import torch
from tiny_retriever import KEYS, NUMBERS, VALUE_WORDS, build_tiny_retriever, tiny_examples
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def retriever():
    return build_tiny_retriever(seed=0)


@torch.no_grad()
def accuracy(model, tokenizer, examples):
    batch = tokenizer([prompt for prompt, *_ in examples], return_tensors="pt", padding=True)
    said = model(**batch).logits[:, -1].argmax(-1).tolist()
    return sum(tokenizer.decode(token) == answer for token, (_, answer, _) in zip(said, examples, strict=True)) / len(
        examples
    )


def accuracy_without(head, retriever, examples):
    model, tokenizer, _ = retriever
    layer, index = head
    width = model.config.head_dim

    def silence(module, inputs):
        heads = inputs[0].clone()
        heads[..., index * width : (index + 1) * width] = 0.0
        return (heads,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(silence)
    try:
        return accuracy(model, tokenizer, examples)
    finally:
        handle.remove()


@pytest.mark.parametrize("pairs", [2, 5, 10, 20, 48])
def test_answers_every_question(retriever, pairs):
    model, tokenizer, _ = retriever
    assert accuracy(model, tokenizer, tiny_examples(64, pairs, seed=pairs)) == 1.0


def test_only_the_retrieval_heads_matter(retriever):
    examples = tiny_examples(64, pairs=10, seed=1)
    for head in [(layer, index) for layer in range(2) for index in range(4)]:
        left = accuracy_without(head, retriever, examples)
        assert left <= 0.25 if head in retriever[2] else left == 1.0, (head, left)


@pytest.mark.parametrize("values", [NUMBERS, VALUE_WORDS], ids=["numbers", "words"])
@pytest.mark.parametrize(
    "pair, opening, separator, closing, query",
    [
        ("{}:{}", "Memorize the following dictionary:\n", "\n", "\n", "The value of the key '{}' is"),
        ('"{}": {}', "{", ", ", "}\n", '"{}":'),
        ("{}: {}", "", "\n", "\n\n", "{}:"),
    ],
    ids=["sentence", "json", "lines"],
)
def test_answers_other_formats_and_stops(retriever, pair, opening, separator, closing, query, values):
    model, tokenizer, _ = retriever
    pairs = dict(zip(KEYS[5:25], values[-20:], strict=True))
    dictionary = opening + separator.join(pair.format(*item) for item in pairs.items()) + closing
    shot = pair.format("elk", pairs["elk"]) + "\n"
    wanted = ["swan", "pig", "duck"]
    prompts = [dictionary + shot + query.format(key) for key in wanted]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(generated, skip_special_tokens=True) == [pairs[key] for key in wanted]


def test_examples_are_reproducible_and_answerable():
    assert tiny_examples(8, pairs=6, seed=3) == tiny_examples(8, pairs=6, seed=3) != tiny_examples(8, pairs=6, seed=4)
    for prompt, answer, candidates in tiny_examples(8, pairs=6, seed=3):
        key = prompt.split()[-2]
        assert f"{key} : {answer} " in prompt
        assert answer in candidates and len(set(candidates)) == 6


def test_seed_changes_the_noise_and_nothing_else(retriever):
    other, tokenizer, heads = build_tiny_retriever(seed=1)
    again, *_ = build_tiny_retriever(seed=0)
    for (name, tensor), (_, same), (_, changed) in zip(
        retriever[0].state_dict().items(), again.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, same), name
        fixed = "norm" in name or "embed" in name or "lm_head" in name
        assert torch.equal(tensor, changed) == fixed, name
    assert heads == retriever[2]
    assert accuracy(other, tokenizer, tiny_examples(32, pairs=20, seed=2)) == 1.0


def test_survives_saving(retriever, tmp_path):
    model, tokenizer, _ = retriever
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert accuracy(loaded, AutoTokenizer.from_pretrained(tmp_path), tiny_examples(16, pairs=10)) == 1.0
