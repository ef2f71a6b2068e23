"""
Where the teacher lies: sharded like the student under FSDP2 and ZeRO-3, otherwise whole on each process's device, there
sharing with the student the tensors that both have in common and neither changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed

from trainers.distillation.trl_compat import gathered


# Parts of a teacher's layer that the student takes over under the same names.
SHARED_PARTS = ("embed_tokens.", "norm.", "layernorm.", ".mlp.", "lm_head.")


def place_teacher(accelerator: Accelerator, teacher: PreTrainedModel) -> nn.Module:
    """
    Puts a frozen teacher where the accelerator's way of training wants it.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        teacher ([`~transformers.PreTrainedModel`]):
            Frozen, in eval mode.

    Returns:
        `torch.nn.Module`: the teacher, wrapped where its forward must go through a wrapper.
    """
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        return prepare_deepspeed(teacher, accelerator)
    if kind == "FSDP" and accelerator.is_fsdp2:
        plugin = accelerator.state.fsdp_plugin
        # accelerate lets the first model decide for good which layers are units, and would not find them in the other.
        kept = plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = list(teacher._no_split_modules)
        try:
            return fsdp2_prepare_model(accelerator, teacher)
        finally:
            plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy = kept
    # Not accelerate's prepare_model: it would patch the caller's teacher for good, and a frozen model needs no DDP.
    return teacher.to(accelerator.device)


@contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Lets a save inside the block write FSDP's shards as one ordinary model, whatever checkpoints are made of."""
    plugin = accelerator.state.fsdp_plugin
    kept = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kept.name)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """
    Gives a model that FSDP2 shards its own class back while the block saves it: `save_pretrained` takes along the code
    of the class, which would be torch's, and names it in the configuration.
    """
    kind = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = kind.__bases__[1]  # FSDP2 makes a class of (FSDPModule, the model's own)
    try:
        yield
    finally:
        model.__class__ = kind


def whole(weight: torch.Tensor) -> torch.Tensor:
    """
    A weight that may be sharded, as one tensor. From FSDP2's shards the gradient finds its way back; what ZeRO-3 keeps
    empty outside its module's forward comes as a copy without gradient, which a frozen head does not miss.
    """
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if hasattr(weight, "ds_id"):
        with gathered(weight):
            return weight.detach().clone()
    return weight


@contextmanager
def shared_frozen_tensors(student: nn.Module, teacher: nn.Module, any_dtype: bool) -> Iterator[int]:
    """
    Lets frozen parameters of the student lie in the teacher's memory while the block runs, where both are the same
    numbers; afterwards the student has its own again, for whoever trains it next must not write into the teacher.

    Args:
        student (`torch.nn.Module`):
            The student, on the teacher's device.
        teacher (`torch.nn.Module`):
            Frozen.
        any_dtype (`bool`):
            Whether a float32 parameter may become the teacher's bfloat16 one that holds the same numbers. Embeddings
            never do: their type is that of the residual stream.

    Yields:
        `int`: bytes that the student does not hold meanwhile.
    """
    theirs = {name: p for name, p in teacher.named_parameters() if any(part in name for part in SHARED_PARTS)}
    dtypes, saved = {}, 0
    for name, ours in student.named_parameters():
        other = theirs.get(name)
        if other is None or ours.requires_grad or other.shape != ours.shape or other.device != ours.device:
            continue
        lossless = any_dtype and "embed" not in name and "head" not in name
        if (other.dtype == ours.dtype or lossless) and torch.equal(other.detach().to(ours.dtype), ours):
            dtypes[name] = ours.dtype
            saved += ours.numel() * ours.element_size()
            ours.data = other.data
    try:
        yield saved
    finally:
        for name, ours in student.named_parameters():
            if name in dtypes:
                ours.data = ours.data.to(dtypes[name], copy=True)
