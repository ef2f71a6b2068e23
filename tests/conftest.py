"""
The environment of every test, set before anything imports huggingface_hub (which reads it once, at import): a Hub
server of our own on a free local port, an empty cache, no telemetry, two threads. Nothing here reaches the network.
"""

import atexit
import os
import shutil
import tempfile

from hub_server import HubServer


HUB = HubServer().start()
atexit.register(HUB.stop)
HF_HOME = tempfile.mkdtemp(prefix="hf-rad-tests-")
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)

HUB_ENVIRONMENT = {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HF_HOME,
    "HF_TOKEN": HUB.token("alice"),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
}
if shutil.which("nvidia-smi") is None:
    # Where triton is installed our kernels run in its interpreter, on the CPU.
    HUB_ENVIRONMENT["TRITON_INTERPRET"] = "1"
for inherited in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_ASSETS_CACHE"):
    os.environ.pop(inherited, None)
os.environ.update(HUB_ENVIRONMENT)

import pytest  # noqa: E402
import torch  # noqa: E402
from layouts import HEAD_MAPS, LAYOUTS, random_student  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402


torch.set_num_threads(2)

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>"]
WORDS = (
    "the a of and to in is was it on that his he her she they we you me who what where when key value called told "
    "house river stone garden winter summer paper letter horse bread salt iron glass cloth music night morning door "
    "road field forest island mountain sea wind rain snow fire lamp chair table clock mirror basket bottle hammer "
    "needle wheel boat bridge tower coal brass silver copper acorn cherry lemon onion pepper"
).split()
VOCABULARY = [*SPECIAL, *"0123456789", *":,.?{}\"'", *WORDS]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def hub() -> HubServer:
    """The Hub server that the whole test run talks to. Its users are alice (our token), bob, and the org acme."""
    return HUB


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of 99 tokens, single digits and punctuation among them."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """An untrained Llama: 3 layers, 4 query heads of size 16 on 2 KV heads, float32, always the same weights."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(params=LAYOUTS, ids=lambda layout: "-".join(layout).replace(" ", "_"))
def student(request, tiny_llama):
    """A tiny student of random weights, in every layout of kept heads and both mixings."""
    name, mixing = request.param
    return random_student(tiny_llama, HEAD_MAPS[name], mixing=mixing)
