"""The code that ships with a student loads anywhere and touches nothing, and the rooms import in one direction."""

import ast
import inspect
import sys
from pathlib import Path

import pytest
from transformers import GenerationMixin
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import modeling_rad_hybrid
import trainers
from modeling_rad_hybrid import AUTO_MAP, RadHybridConfig, RadHybridForCausalLM, RadHybridModel
from trainers.hub.code_rules import code_problems, relative_imports
from trainers.hub.staging import code_files


SHIPPED = Path(modeling_rad_hybrid.__file__).parent
TRAINERS = Path(trainers.__file__).parent
# From the ground up. A module imports from its own folder only what stands before it.
MODEL_ORDER = [
    "configuration_rad_hybrid",
    "backbone",
    "ssd_kernels",
    "ssd_triton",
    "ssd_mamba",
    "ssd",
    "rollback_cache",
]
MODEL_ORDER += ["mixer_kernels", "mixer_triton", "aligned_linear", "discrete_mamba2", "masks", "packed_rows"]
MODEL_ORDER += ["generation", "modeling_rad_hybrid"]
# From the ground up. A module imports from its own floor or from those below, and never in a circle.
FLOORS = [
    {"files", "hub_upload", "precision", "trl_compat", "steps", "fresh_load", "code_rules", "completion"}
    | {"checkpoints", "orientation", "cpu_kernels"}
    | {"questions", "lookup_probes", "copy_probes", "text_probes", "asking", "continuations", "probes"}
    | {"head_map", "losses", "distill_config", "plots", "documents", "shared_work", "head_compare"},
    {"probe_rows", "head_layout", "ablation", "head_scores", "screens", "head_scoring", "selection", "memory"}
    | {"head_curves", "text_scores", "head_kinds", "families", "teachers", "tasks", "recipe"},
    {"conversion", "calibration", "student_heads", "data", "packing", "evaluation", "stage_losses"}
    | {"distill_trainer", "placement", "teaching", "watching"}
    | {"head_map_repo", "model_card", "staging", "verify", "reload", "publish", "local_hub", "inspection"},
    {"workshop", "estimates", "actions", "head_actions", "pipeline", "distill", "verbs", "head_verbs", "cli_output"},
    {"cli", "cli_options", "cli_heads"},
]


# Folders of trainers/ that hold nothing themselves.
ROOMS = {"heads", "distillation", "hub"}


def shipped_files() -> list[Path]:
    return sorted(file for file in SHIPPED.glob("*.py") if file.name != "__init__.py")


def imported_modules(file: Path, package: str) -> set[str]:
    """Modules of one of our packages that a file imports, inside functions too, by the last part of their names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == package:
            of_rooms = node.module == package or node.module.removeprefix(f"{package}.") in ROOMS
            found.update([alias.name for alias in node.names] if of_rooms else [node.module.split(".")[-1]])
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[-1] for alias in node.names if alias.name.startswith(f"{package}."))
    return found


@pytest.mark.parametrize("file", shipped_files(), ids=lambda file: file.stem)
def test_shipped_code_keeps_the_rules(file):
    source = file.read_text(encoding="utf-8")
    assert list(code_problems(source)) == []
    # transformers looks for relative imports with a regular expression, which also finds them inside docstrings.
    assert sorted(set(get_relative_imports(file))) == sorted(set(relative_imports(source)))
    required = {name for name in get_imports(file) if name not in sys.stdlib_module_names}
    assert required <= {"torch", "transformers", "huggingface_hub"}


def test_every_file_of_the_package_ships():
    assert code_files() == shipped_files()
    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert (SHIPPED / f"{module}.py").is_file() and name in vars(modeling_rad_hybrid)
    reached = {Path(file).stem for file in get_relative_import_files(SHIPPED / "modeling_rad_hybrid.py")}
    assert reached == {file.stem for file in shipped_files()} - {"modeling_rad_hybrid"}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import os", "no business with os"),
        ("def f():\n    import subprocess", "line 2: model code has no business with subprocess"),
        ("from urllib.request import urlopen", "no business with urllib.request"),
        ("try:\n    import requests\nexcept ImportError:\n    pass", "no business with requests"),
        ("import importlib", "no business with importlib"),
        ("from huggingface_hub import HfApi", "no business with huggingface_hub"),
        ("import modeling_rad_hybrid.ssd", "no business with modeling_rad_hybrid.ssd"),
        ("from trainers.files import sha256", "no business with trainers.files"),
        ("import mamba_ssm", "inside `try:`"),
        ("def f():\n    from causal_conv1d import causal_conv1d_fn", "inside `try:`"),
        ("from . import ssd", "only `from .module import name`"),
        ("from .kernels.scan import ssd", "only `from .module import name`"),
        ("from torch import hub", "must not import hub"),
        ("import torch.hub", "must not import hub"),
        ("from transformers.utils import cached_file", "must not import cached_file"),
        ("torch.hub.download_url_to_file('x', 'y')", "must not use .hub"),
        ("AutoModel.from_pretrained('x')", "must not use .from_pretrained"),
        ("torch.load('x')", "must not use .load"),
        ("open('x')", "must not call open()"),
        ("eval('1')", "must not call eval()"),
        ("().__class__.__subclasses__()", "must not use .__subclasses__"),
        ("def f(:", "line 1: not Python"),
    ],
)
def test_rules_find_what_they_forbid(source, problem):
    assert problem in " ".join(code_problems(source))


def test_rules_allow_what_a_model_needs():
    source = (
        "try:\n    from mamba_ssm import x\nexcept ImportError:\n    x = None\nfrom .ssd import ssd\nimport math\n"
        "try:\n    import triton.language as tl\nexcept ImportError:\n    tl = None\ny = tl.load(x)\n"
    )
    assert list(code_problems(source)) == []


def test_names_that_transformers_treats_apart():
    """Some names in a class or model type change what transformers does with it."""
    assert RadHybridConfig.model_type == "rad_hybrid"
    # A model type of transformers' own would silently win over the code that comes with a student.
    assert RadHybridConfig.model_type not in CONFIG_MAPPING_NAMES
    for model in (RadHybridModel, RadHybridForCausalLM):
        assert not any(
            word in model.__name__.lower() for word in ("mamba", "reformer", "minimax", "xlnet", "rwkv", "xlstm")
        )
    assert issubclass(RadHybridForCausalLM, GenerationMixin)
    assert isinstance(RadHybridForCausalLM._tied_weights_keys, dict)
    parameters = inspect.signature(RadHybridForCausalLM.forward).parameters
    assert "cache_position" not in parameters and {"logits_to_keep", "past_key_values", "kwargs"} <= set(parameters)


def test_code_does_not_ask_for_its_config_class():
    """From a local folder the Auto classes load the configuration twice, as two classes."""
    for file in shipped_files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                assert "RadHybridConfig" not in ast.unparse(node), f"{file.name}:{node.lineno}"


def test_model_files_import_downwards():
    assert {file.stem for file in shipped_files()} == set(MODEL_ORDER)
    for file in shipped_files():
        for module in relative_imports(file.read_text(encoding="utf-8")):
            assert MODEL_ORDER.index(module) < MODEL_ORDER.index(file.stem), f"{file.name} imports {module}"


def test_trainers_import_downwards():
    level = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    graph = {}
    for file in sorted(TRAINERS.rglob("*.py")):
        name = file.parent.name if file.stem == "__init__" else file.stem
        if name in ROOMS or file.parent == TRAINERS and file.stem == "__init__":
            continue
        assert name in level, f"{file.relative_to(TRAINERS.parent)} stands on no floor yet; give it one in FLOORS"
        graph[name] = imported_modules(file, "trainers")
        for module in graph[name]:
            assert level[module] <= level[name], f"{name} imports {module}, which stands above it"
    done = set()
    while ready := {name for name in set(graph) - done if graph[name] & set(graph) <= done}:
        done |= ready
    assert done == set(graph), f"these import one another in a circle: {sorted(set(graph) - done)}"


def test_cards_import_nothing_of_ours():
    for file in Path(SHIPPED.parent / "hub_cards").glob("*.py"):
        assert not imported_modules(file, "trainers") | imported_modules(file, "modeling_rad_hybrid")


def test_what_runs_in_a_fresh_process_imports_nothing_of_ours():
    file = TRAINERS / "hub" / "fresh_load.py"
    assert not imported_modules(file, "trainers") | imported_modules(file, "modeling_rad_hybrid")
