"""
The life of a student: float32 where bfloat16 would lose the memory, loading in every way that transformers has, training
with checkpointing and adapters, and two processes that share one model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_rad_hybrid import AUTO_MAP, CACHE_NAME, RadHybridConfig, RadHybridForCausalLM
from modeling_rad_hybrid.discrete_mamba2 import DiscreteMamba2
from trainers.conversion import OPEN_GATE
from trainers.hub.staging import code_files


KEPT_HEADS = [[0], [], [0, 1, 2, 3]]
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are only slowed down by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["replace", "parallel"])
def student(request):
    return make_student(mixing=request.param)


def make_student(**changes):
    torch.manual_seed(0)
    config = RadHybridConfig(
        **{
            "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "kept_heads": KEPT_HEADS, "initializer_range": 0.2,
            **changes,
        }
    )  # fmt: skip
    config.auto_map = dict(AUTO_MAP)
    model = RadHybridForCausalLM(config).eval()
    # Away from the start values, so that convolution and skip matter.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def prompt(tokens=29, batch=2):
    return torch.randint(5, 100, (batch, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_long_memory_survives_bfloat16_weights():
    """A state that forgets a thousandth each token: in bfloat16 the decay would be 1, and the sum stop growing at 256."""
    tokens = 1500
    ssm = DiscreteMamba2(make_student().config, layer_idx=0, num_heads=1).to(torch.bfloat16)
    for parameter in ssm.parameters():
        parameter.zero_()
    ssm.conv1d.weight[..., -1] = 1.0
    z, xBC, A_log = ssm.in_proj.bias.split(ssm.sections)
    z.fill_(OPEN_GATE), xBC.fill_(0.0), A_log.fill_(-6.9)
    xBC[: ssm.sections[0]] = 1.0
    xBC[ssm.sections[0] :: ssm.state_size] = 1.0  # first of B, first of C
    forgotten = torch.nn.functional.softplus(A_log.double())
    expected = ((1 - (-forgotten * torch.arange(1, tokens + 1)).exp()) / (1 - (-forgotten).exp()))[None, :, None]
    features = ssm.features(torch.zeros(1, tokens, 32, dtype=torch.bfloat16))
    # One rounding of the output to bfloat16, and one of the gate.
    torch.testing.assert_close(features.double(), expected.expand_as(features), rtol=1.5e-2, atol=0)


@torch.no_grad()
def test_states_are_float32_and_the_rest_bfloat16(student, tmp_path):
    student.save_pretrained(tmp_path)
    half, ids = RadHybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), prompt()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    cache = half(ids, use_cache=True)[CACHE_NAME]
    half(ids[:, :1], **{CACHE_NAME: cache})
    layers = [
        layer for layer, kind in zip(cache.layers, half.config.layer_types, strict=True) if kind != "full_attention"
    ]
    assert {layer.recurrent_states[0].dtype for layer in layers} == {torch.float32}
    assert {layer.conv_states[0].dtype for layer in layers} == {torch.bfloat16}
    assert cache.layers[2].keys.dtype == torch.bfloat16
    logits, exact = half(ids).logits, student(ids).logits
    assert logits.dtype == torch.bfloat16 and (logits - exact).abs().mean() < 0.05 * exact.std()


@torch.no_grad()
def test_what_a_checkpoint_lacks_starts_as_the_identity(student, tmp_path):
    """Models are made without memory and filled: whatever the file does not have must be made then."""
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in RadHybridForCausalLM(student.config).parameters())
    student.save_pretrained(tmp_path)
    kept = {name: t for name, t in load_file(tmp_path / FILE).items() if not name.endswith(("conv1d.weight", "D"))}
    save_file(kept, tmp_path / FILE, metadata={"format": "pt"})
    loaded = RadHybridForCausalLM.from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        if name.endswith("ssm.D"):
            assert not parameter.any()
        elif name.endswith("conv1d.weight"):
            assert not parameter[..., :-1].any() and (parameter[..., -1] == 1).all()
        else:
            assert torch.equal(parameter, student.get_parameter(name)), name


@torch.no_grad()
@pytest.mark.parametrize(
    "where",
    [
        {"device_map": {"": "cpu"}},
        {
            "device_map": {
                "model.embed_tokens": "cpu",
                "model.rotary_emb": "cpu",
                "model.norm": "cpu",
                "lm_head": "cpu",
            }
        },
    ],
    ids=["one device", "layers on disk"],
)
def test_sharded_weights_load_with_a_device_map(student, where, tmp_path):
    student.save_pretrained(tmp_path / "student", max_shard_size="20KB")
    assert len(list((tmp_path / "student").glob("model-*.safetensors"))) > 2
    device_map = dict(where["device_map"])
    if "" not in device_map:
        device_map |= {f"model.layers.{layer}": "disk" for layer in range(3)}
    loaded = RadHybridForCausalLM.from_pretrained(
        tmp_path / "student", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    ids = prompt()
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **options), student.generate(ids, **options))


def test_checkpointing_changes_neither_gradients_nor_states(student):
    ids, gradients = prompt(), []
    for checkpointing in (False, True):
        student.train().zero_grad()
        if checkpointing:
            student.gradient_checkpointing_enable()
        # A cache that the second pass over a layer writes again would change the gradients.
        student(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(student.named_parameters()).keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]


def test_adapters_on_every_part_train_save_load_and_merge(student, tmp_path):
    student.save_pretrained(tmp_path / "base")
    ids = prompt()
    adapted = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=2))
    before = adapted(ids).logits.detach()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_B" in name and p.any()}
    assert all(any(f".{target}." in name for name in moved) for target in TARGETS)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    base = RadHybridForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        logits = adapted(ids).logits
        assert not torch.allclose(logits, before)
        assert torch.equal(loaded(ids).logits, logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = RadHybridForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(ids).logits, merged(ids).logits)


def test_a_student_loaded_by_its_own_code_ships_that_code_again(tmp_path):
    student, names = make_student(), sorted(file.name for file in code_files())
    student.save_pretrained(tmp_path / "first")
    assert sorted(file.name for file in (tmp_path / "first").glob("*.py")) == names
    # As where our package is not installed: here the Auto classes would take the installed one.
    shipped_config = get_class_from_dynamic_module(AUTO_MAP["AutoConfig"], tmp_path / "first")
    config = shipped_config.from_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", config=config, trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.")
    loaded.save_pretrained(tmp_path / "second")
    for name in names:
        assert (tmp_path / "second" / name).read_text() == (tmp_path / "first" / name).read_text()
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP


@pytest.mark.parametrize(("kind", "tied"), [("tp_size", False), ("fsdp_size", True)])
def test_two_processes_share_a_student(kind, tied, tmp_path):
    """By transformers' own plans. Tensor parallel: MLP and head are split, mixers are whole on each."""
    student = make_student(tie_word_embeddings=tied)
    student.save_pretrained(tmp_path)
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, two_processes.__file__, str(tmp_path), kind],
        env={
            **os.environ,
            "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    seen = [json.loads(file.read_text()) for file in tmp_path.glob("seen_by_*.json")]
    ids = torch.tensor(two_processes.INPUT_IDS)
    outputs = student(ids, labels=ids)
    outputs.loss.backward()
    assert len(seen) == 2
    for one in seen:
        torch.testing.assert_close(torch.tensor(one["logits"]), outputs.logits[0, -1], atol=1e-4, rtol=1e-4)
        for name, norm in one["gradients"].items():
            assert norm == pytest.approx(student.get_parameter(name).grad.norm().item(), rel=1e-3), name
    for name, parameter in student.named_parameters():
        if "embed_tokens" in name and kind == "tp_size":
            continue  # Whole on each in transformers 5.17, split in 5.24.
        parts = sum(torch.Size(one["local"][name]).numel() for one in seen)
        split = kind == "fsdp_size" or "norm" not in name and ".mixer." not in name
        assert parts == parameter.numel() * (1 if split else 2), name


def test_the_layer_is_the_unit_that_is_not_split(student):
    assert {type(layer).__name__ for layer in student.model.layers} == set(RadHybridForCausalLM._no_split_modules)
