"""
Students that were published stay loadable: their configuration, tensor names, shapes and logits are golden.

A change that fails here would break every student on the Hub. Teach the code to read the old form; then
`python tests/test_versions.py` writes a further golden file, under the next version, for the new one.
"""

import inspect
import json
import logging
import runpy
import zlib
from pathlib import Path

import pytest
import torch
import transformers

from modeling_rad_hybrid import AUTO_MAP, RadHybridConfig, RadHybridForCausalLM
from trainers.files import read_json


GOLDEN = Path(__file__).parent / "golden"
INPUT_IDS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]]
# Odd sizes, every kind of layer, and shared KV heads.
CONFIG = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "kept_heads": [[], [4], [0, 1, 5], [0, 1, 2, 3, 4, 5]],
    "ssm_state_size": 4,
    "ssm_chunk_size": 4,
}


def fill(model: RadHybridForCausalLM) -> None:
    """Gives every tensor values that depend on its name and place alone, on any machine."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            place = torch.arange(tensor.numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 9973
            noise = (torch.sin(place * 12.9898) * 43758.5453).frac()
            tensor.copy_((noise * 0.5).view(tensor.shape))


def measure(config: RadHybridConfig) -> dict:
    """What an old student must keep."""
    model = RadHybridForCausalLM(config).eval()
    fill(model)
    with torch.no_grad():
        logits = model(torch.tensor(INPUT_IDS)).logits
        generated = model.generate(torch.tensor(INPUT_IDS), max_new_tokens=6, do_sample=False)
    return {
        "tensors": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "logits": [round(value, 5) for value in logits[0, -1, :16].tolist()],
        "generated": generated[0, len(INPUT_IDS[0]) :].tolist(),
    }


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("student_v*.json")), ids=lambda file: file.stem)
def test_old_students_still_load(file):
    for case in read_json(file):
        config = RadHybridConfig.from_dict(case["config"])
        assert {key: value for key, value in config.to_dict().items() if key in CONFIG} == CONFIG
        assert case["config"]["auto_map"] == AUTO_MAP
        found = measure(config)
        assert found["tensors"] == case["tensors"] and found["generated"] == case["generated"]
        torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(case["logits"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("version", "warned"),
    [("5.16.3", True), ("5.17.0", False), ("5.24.1", False), ("5.25.0.dev0", True), ("6.0", True)],
)
def test_a_student_says_which_transformers_it_was_tested_with(version, warned, monkeypatch):
    """The sentence comes when its code is loaded, before that of the model may fail."""
    said = []
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [Handler(said)])
    runpy.run_path(inspect.getfile(RadHybridConfig), run_name="transformers.published_student")
    assert [f"5.17 to 5.24; this is {version}." in line for line in said] == [True] * warned


class Handler(logging.Handler):
    """Collects what is logged."""

    def __init__(self, said: list[str]):
        super().__init__()
        self.said = said

    def emit(self, record):
        self.said.append(record.getMessage())


def test_there_is_a_golden_student():
    assert {case["config"]["mixing"] for case in read_json(GOLDEN / "student_v1.json")} == {"replace", "parallel"}


def write() -> None:
    cases = []
    for mixing in ("replace", "parallel"):
        config = RadHybridConfig(**CONFIG, mixing=mixing)
        config.auto_map = dict(AUTO_MAP)
        saved = json.loads(config.to_json_string())
        cases.append({"config": saved, **measure(config)})
    version = len(list(GOLDEN.glob("student_v*.json"))) + 1
    text = "[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n"
    (GOLDEN / f"student_v{version}.json").write_text(text)


if __name__ == "__main__":
    write()
