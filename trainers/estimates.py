"""
What a recipe's stages will cost, from shapes alone: nothing is loaded, the student is built on the meta device.

Memory counts weights, gradients, Adam's two moments and the hidden states that are kept; time is that of the matrix
products at the rate measured here: a run takes longer, unless the machine was busy while that was measured.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from modeling_rad_hybrid import RadHybridConfig, RadHybridForCausalLM
from trainers.data.packing import Manifest
from trainers.distillation.orientation import ORIENTED_PARTS
from trainers.documents import check_source
from trainers.families import backbone_fields
from trainers.heads.head_map import HeadMap
from trainers.precision import fast_dtype
from trainers.recipe import ROOT, Recipe, StageSettings
from trainers.workshop import resolve_teacher


NEW_PARTS = (".mixer.ssm.", ".mixer.adapter.")
EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Estimate:
    """
    One stage.

    Args:
        stage (`str`): its name.
        tokens (`int`): tokens of all steps.
        steps (`int`): optimizer steps.
        trained (`int`): parameters that train.
        bytes (`int`): memory of one process.
        flops (`float`): floating-point operations of the matrix products.
        seconds (`float`): time of these at the measured rate.
    """

    stage: str
    tokens: int
    steps: int
    trained: int
    bytes: int
    flops: float
    seconds: float


def check_data(recipe: Recipe) -> None:
    """
    Looks whether every file and folder that a recipe reads is there. Hub data sets are not asked for.

    Raises:
        `FileNotFoundError`: for one that is missing.
        `ValueError`: for one of another kind, or packed rows of another length than the recipe's.
    """
    data = recipe.data
    lengths = [(data.packed, data.length)]
    lengths += [(s.packed, s.length or data.length) for _, s in recipe.stages() if s.packed and s.tokens]
    for packed, length in lengths:
        if packed and Manifest.load(packed).length != length:
            raise ValueError(
                f"The rows of {packed} have {Manifest.load(packed).length} tokens, the recipe asks {length}."
            )
    for source in (data.text, data.held_out_text, *(source.get("text") for source in data.sources)):
        if source is not None:
            check_source(source)


def student_shapes(recipe: Recipe, teacher: PreTrainedConfig) -> RadHybridForCausalLM:
    """The student that a recipe makes, on the meta device; before scoring its kept heads are the first ones."""
    layers, heads = teacher.num_hidden_layers, teacher.num_attention_heads
    if recipe.select.head_map is not None:
        kept = HeadMap.load(recipe.select.head_map).kept_heads
    else:
        count = recipe.select.heads or round((recipe.select.fraction or 0) * layers * heads)
        kept = [list(range(count // layers + (layer < count % layers))) for layer in range(layers)]
    convert = recipe.convert
    config = RadHybridConfig(
        **backbone_fields(teacher), kept_heads=kept, mixing=convert.mixing, ssm_state_size=convert.state_size
    )
    with torch.device("meta"):
        return RadHybridForCausalLM(config)


def estimate_stages(recipe: Recipe, teacher: str | Path, rate: float, dtype: torch.dtype) -> list[Estimate]:
    """
    Estimates every stage that a recipe asks for.

    Args:
        recipe ([`~trainers.recipe.Recipe`]):
            The run.
        teacher (`str` or `Path`):
            Folder or Hub id of the teacher; only its configuration is read.
        rate (`float`):
            Floating-point operations a second, as [`product_rate`] measures them.
        dtype (`torch.dtype`):
            Type of the teacher and of the products.

    Returns:
        `list[Estimate]`: one for each stage.
    """
    config = AutoConfig.from_pretrained(teacher, revision=recipe.teacher_revision).get_text_config()
    student = student_shapes(recipe, config)
    return [
        _estimate(recipe, name, settings, student, rate, dtype)
        for name, settings in recipe.stages()
        if settings.tokens
    ]


def _estimate(recipe, name: str, settings: StageSettings, student, rate: float, dtype: torch.dtype) -> Estimate:
    config, aligning = student.config, name in ("orientation", "alignment")
    sizes = {parameter: p.numel() for parameter, p in student.named_parameters()}
    total = sum(sizes.values())
    parts = ORIENTED_PARTS if name == "orientation" else NEW_PARTS
    new = sum(n for parameter, n in sizes.items() if any(part in parameter for part in parts))
    embeddings = sum(n for parameter, n in sizes.items() if any(part in parameter for part in EMBEDDINGS))
    body = total - embeddings
    trained = new if aligning else body
    steps = math.ceil(settings.tokens / settings.batch_tokens)
    tokens = steps * settings.batch_tokens
    length = settings.length or recipe.data.length
    rows = settings.arguments.get("per_device_train_batch_size", math.gcd(settings.batch_tokens // length, 8))
    # The teacher has about the student's body; scores and values of attention come on top of its parameters.
    attention = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2
    head = config.vocab_size * config.hidden_size
    share = 0 if aligning else min(1.0, (settings.arguments.get("kl_positions") or length) / length)
    per_token = 2 * body + attention + (4 * new if aligning else 6 * trained) + share * 6 * head
    kept_states = rows * length * config.hidden_size * (config.num_hidden_layers + 1) * dtype.itemsize
    # In alignment the student's own MLPs and norms lie in the teacher's memory.
    weights = total * dtype.itemsize + 4 * (new + embeddings if aligning else total)
    recomputed = settings.arguments.get("gradient_checkpointing", False)
    memory = weights + 12 * trained + (2 if aligning or recomputed else 12) * kept_states
    flops = per_token * tokens
    return Estimate(name, tokens, steps, trained, memory, flops, flops / rate)


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.5) -> float:
    """Floating-point operations a second of square matrix products on this machine, now."""
    a = torch.randn(size, size).to(device, dtype)
    (a @ a)[0, 0].item()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        (a @ a)[0, 0].item()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def recipe_estimates(recipe: Recipe, device: torch.device) -> list[Estimate]:
    """
    [`estimate_stages`] at the rate of `device` in the type that is quickest there. The shapes of the teachers in
    `recipes/` come with them, so that a dry run asks no Hub.

    Raises:
        `OSError`: when the configuration of another teacher cannot be reached.
    """
    shipped = ROOT / "recipes" / "shapes" / recipe.teacher.replace("/", "--")
    teacher = shipped if shipped.is_dir() else resolve_teacher(recipe.teacher)
    dtype = fast_dtype(device)
    return estimate_stages(recipe, teacher, product_rate(device, dtype), dtype)
