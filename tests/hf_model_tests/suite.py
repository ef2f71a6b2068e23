"""
Transformers' own model tests (`ModelTesterMixin`) on students of four layouts. Run by `make test-hf`.

The file's name keeps it out of `make test`: it downloads a source distribution, see [`fetch`].
"""

import importlib
import sys
import types
import unittest

import torch
from deselected import ALWAYS, NO_ATTENTION, UNEVEN_HEADS
from fetch import fetch, missing_modules
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from modeling_rad_hybrid import RadHybridConfig, RadHybridForCausalLM, RadHybridModel


PACKAGE = "transformers_model_tests"


def load_tests_of_transformers() -> types.ModuleType:
    """Imports the fetched file as part of a package in which the modules that it misses are empty classes."""
    source = fetch()
    package = sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
    package.__path__ = [str(source.parent)]
    for name, classes in missing_modules(source).items():
        path = PACKAGE
        for part in name.split("."):
            path = f"{path}.{part}"
            sys.modules.setdefault(path, types.ModuleType(path)).__path__ = []
        for class_name in classes:
            setattr(sys.modules[path], class_name, type(class_name, (), {}))
    return importlib.import_module(f"{PACKAGE}.{source.stem}")


common = load_tests_of_transformers()
# By these names transformers' tests know which classes want labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rad_hybrid"] = RadHybridForCausalLM.__name__
MODEL_MAPPING_NAMES["rad_hybrid"] = RadHybridModel.__name__


class StudentTester:
    """What the mixin asks of a model's tester: a tiny configuration and inputs for it."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, pad_token_id = 99, 32, 2, 4, 0

    def __init__(self, options: dict):
        self.options = options

    def get_config(self) -> RadHybridConfig:
        return RadHybridConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=self.pad_token_id,
            bos_token_id=1,
            eos_token_id=2,
            ssm_chunk_size=4,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[RadHybridConfig, dict]:
        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(3, self.vocab_size, shape, device=torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class StudentTests:
    """A layout's tests; subclasses give its part of the configuration."""

    all_model_classes = (RadHybridModel, RadHybridForCausalLM)
    options: dict = {}

    def setUp(self):
        self.model_tester = StudentTester(self.options)


def without(tests: dict[str, str]) -> dict:
    """Class attributes that skip tests, each with its reason; names must be tests of the mixin."""
    for name in tests:
        if name not in dir(common.ModelTesterMixin):
            raise ValueError(f"{name} is no test of ModelTesterMixin any more; take it out of deselected.py.")
    return {name: unittest.skip(reason)(lambda self: None) for name, reason in tests.items()}


def suite(name: str, deselected: dict[str, str], has_attentions: bool = True, **options) -> type:
    """A test class of that name, so that pytest finds it."""
    bases = (StudentTests, common.ModelTesterMixin, unittest.TestCase)
    attributes = {"options": options, "has_attentions": has_attentions, "__module__": __name__}
    return type(name, bases, {**attributes, **without(deselected)})


MixedTest = suite("MixedTest", ALWAYS | UNEVEN_HEADS, kept_heads=[[0, 3], [1]])
# Weights large enough that the kept heads, which take on the recurrent heads' scale, are heard at all.
ParallelTest = suite(
    "ParallelTest", ALWAYS | UNEVEN_HEADS, kept_heads=[[2], [0, 1]], mixing="parallel", initializer_range=0.2
)
RecurrentTest = suite("RecurrentTest", ALWAYS | NO_ATTENTION, has_attentions=False, kept_heads=[[], []])
EveryHeadTest = suite("EveryHeadTest", ALWAYS)
