"""
A tiny Llama that really retrieves, its weights set by hand, for tests that need known retrieval heads in a second.

Prompts (`tiny_examples`) look like `cat : 17 , dog : 42 , owl : 5 ? dog :`, and the answer is `42`. Any text that
writes a key of `KEYS` before each value of `NUMBERS` or `VALUE_WORDS` will do: JSON with bare values, lines,
sentences; words that the tokenizer does not know become `<unk>` and disturb nothing.

The stream is [one-hot token | constant | code of the latest key | code of the answer | nothing]. Layer 0, head 0
looks back to the latest key (fast rotary bands that fade with distance, a bonus for keys), so that a value and what
follows the queried key both know their key. Layer 1, head 2 finds the value whose latest key is the same (key codes in
bands too slow to turn, a bonus for values) and copies its code for the LM head, which says `</s>` after a value.

    from tiny_retriever import build_tiny_retriever, tiny_examples
    model, tokenizer, retrieval_heads = build_tiny_retriever(seed=0)
"""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


KEYS = """cat dog owl fox hen pig cow bat ant bee elk emu cod eel ram rat hawk crow dove swan duck goat mule lamb lion
wolf bear deer hare mole seal crab clam moth wasp toad frog newt lynx puma ibis kiwi lark wren gull tuna pike carp
""".split()
NUMBERS = [str(number) for number in range(100)]
VALUE_WORDS = """red blue green gold grey pink teal rust plum lime jade ruby navy sand wine salt milk corn rice beet
kale leek pear fig date mint sage dill""".split()
VALUES = NUMBERS + VALUE_WORDS
VOCABULARY = ["<pad>", "<unk>", "</s>", *":,?.;\"'{}()", *KEYS, *VALUES]
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
KEY_TOKENS, VALUE_TOKENS = [TOKEN[word] for word in KEYS], [TOKEN[word] for word in VALUES]

HEAD_DIM, HIDDEN, CONSTANT = 64, 384, len(VOCABULARY)
KEY, ANSWER = slice(CONSTANT + 1, CONSTANT + 65), slice(CONSTANT + 65, CONSTANT + 129)
# Band i turns dimensions i and i + 32 by 10 ** (-i / 4) radians a token.
FADING, BONUS, STILL = slice(2, 10), 15, [*range(16, 32), *range(48, 64)]


def sign_codes(number: int, width: int) -> torch.Tensor:
    """Returns codes [number, width] of +1 and -1, any two orthogonal or opposite; `number` is at most `2 * width`."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < width:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    return torch.cat([hadamard, -hadamard])[:number]


@torch.no_grad()
def build_tiny_retriever(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[tuple[int, int]]]:
    """Returns the model (float32, eval mode), its tokenizer and its retrieval heads; `seed` draws the other heads."""
    sizes = {"vocab_size": CONSTANT, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM}
    ends = {"pad_token_id": TOKEN["<pad>"], "bos_token_id": None, "eos_token_id": TOKEN["</s>"]}
    rope = {"rope_type": "default", "rope_theta": 1e8}
    config = LlamaConfig(**sizes, **heads, **ends, rope_parameters=rope)
    model, generator = LlamaForCausalLM(config).float().eval(), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.003, generator=generator)
    model.model.embed_tokens.weight.copy_(torch.eye(CONSTANT, HIDDEN)).select(1, CONSTANT).fill_(1.0)

    # RMSNorm multiplies the stream by sqrt(HIDDEN) over its norm: 14 at layer 0, 11 at layer 1 and 10 at the LM head.
    query, key, value = torch.zeros(3, HEAD_DIM, HIDDEN)
    query[FADING, CONSTANT] = key[FADING, CONSTANT] = 1.0
    query[BONUS, CONSTANT] = key[BONUS, KEY_TOKENS] = 5.0
    value[:, KEY_TOKENS] = sign_codes(len(KEYS), HEAD_DIM).T / 14 / 8
    _write_head(model.model.layers[0].self_attn, 0, query, key, value, KEY)

    query, key, value = torch.zeros(3, HEAD_DIM, HIDDEN)
    query[STILL, KEY] = sign_codes(len(KEYS), len(STILL)).T @ sign_codes(len(KEYS), HEAD_DIM) / 11 / 8
    key[STILL, KEY] = query[STILL, KEY] * 8
    query[BONUS, CONSTANT] = key[BONUS, VALUE_TOKENS] = 2.0
    value[:, VALUE_TOKENS] = sign_codes(len(VALUES), HEAD_DIM).T / 11 / 8
    _write_head(model.model.layers[1].self_attn, 2, query, key, value, ANSWER)

    model.lm_head.weight.zero_()[VALUE_TOKENS, ANSWER] = sign_codes(len(VALUES), HEAD_DIM) * 0.15
    model.lm_head.weight[TOKEN["</s>"], VALUE_TOKENS] = 3.0
    words = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "padding_side": "left"}
    return model, PreTrainedTokenizerFast(tokenizer_object=words, **names), [(0, 0), (1, 2)]


def _write_head(attention: torch.nn.Module, head: int, query, key, value, slot: slice) -> None:
    mine, shared = (slice(i * HEAD_DIM, (i + 1) * HEAD_DIM) for i in (head, head // 2))
    attention.q_proj.weight[mine], attention.k_proj.weight[shared], attention.v_proj.weight[shared] = query, key, value
    attention.o_proj.weight[:, mine] = torch.eye(HIDDEN)[:, slot]


def tiny_examples(num: int, pairs: int = 5, seed: int = 0) -> list[tuple[str, str, list[str]]]:
    """Returns `num` examples (prompt, answer, the dictionary's values) of `pairs` pairs each, at most 48."""
    draw, examples = random.Random(seed), []
    for _ in range(num):
        dictionary = dict(zip(draw.sample(KEYS, pairs), draw.sample(NUMBERS, pairs), strict=True))
        wanted, text = draw.choice(list(dictionary)), " , ".join(f"{k} : {v}" for k, v in dictionary.items())
        examples.append((f"{text} ? {wanted} :", dictionary[wanted], list(dictionary.values())))
    return examples
