"""
The losses of the trainer's stages, each a sum over the positions of a batch: teacher and student run, and
`trainers.distillation.losses` and `trainers.distillation.orientation` compare what they gave.

In the stages of single layers (orientation, alignment) the teacher runs once and is listened to; each of the student's
mixers gets the teacher's input of its layer, so that neither the student's MLPs nor its head run. Sources: paper
https://huggingface.co/papers/2602.11374, section 4.3; https://huggingface.co/papers/2408.10189.

Shape letters: B batch, T tokens, D model width, L layers, N positions that a loss is taken at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modeling_rad_hybrid import CACHE_NAME, RadHybridForCausalLM, attention_masks
from trainers.conversion import converted_heads
from trainers.data.packing import TEACHER_COLUMNS
from trainers.distillation.losses import (
    agreement,
    alignment_loss,
    head_loss,
    row_seeds,
    sample_positions,
    stored_divergence,
)
from trainers.distillation.orientation import orientation_loss, recorded_attention
from trainers.distillation.placement import whole
from trainers.distillation.trl_compat import redirect_forward
from trainers.families import logits_scale


BODY_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


@contextmanager
def recorded_mixers(layers) -> Iterator[list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]]:
    """
    Records what the attention of every layer of a teacher is given and gives, while the block runs the teacher.

    Taken at the attention itself, so the last layer's output is that before the final norm.

    Args:
        layers (`torch.nn.ModuleList`):
            The teacher's decoder layers, with their attention under `self_attn`.

    Yields:
        `list`: filled layer by layer with (normalised input `[B, T, D]`, rotary cos and sin, output `[B, T, D]`).
    """
    records = []

    def record(module, args, kwargs, output):
        records.append((kwargs["hidden_states"], kwargs["position_embeddings"], output[0]))

    handles = [layer.self_attn.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _body_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: inputs[name] for name in BODY_INPUTS if name in inputs}


def _call(function, *args, **kwargs):
    return function(*args, **kwargs)


def _through(layer, function, *args, **kwargs):
    """Calls a function by way of a layer's own call: the hooks that gather FSDP's shards hang there."""
    layer.forward = function
    try:
        # Not the layer's own __call__, which may recompute later, when its forward is another one.
        return nn.Module.__call__(layer, *args, **kwargs)
    finally:
        del layer.forward


class StageLosses:
    """
    What [`~trainers.distillation.distill_trainer.RadDistillationTrainer`] asks in each of its stages.

    Each loss takes the student, the inputs of a batch and which positions count, `[B, T - 1]`, and returns the sum over
    them with further sums to log: name -> `[2]` (numerator, denominator), or `[2, L]` with one of each for every layer.
    """

    def _teacher(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.teacher_model)

    def _run_teacher(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The teacher's last hidden states `[B, T, D]`, by way of its wrapper's forward, which gathers shards."""
        teacher = self._teacher()

        def last_hidden_state() -> torch.Tensor:
            return teacher.model(**_body_inputs(inputs), use_cache=False).last_hidden_state

        return redirect_forward(self.teacher_model, teacher, last_hidden_state)

    def _student_causal_lm(self, student):
        """The student below a PEFT adapter, if there is one."""
        return student if isinstance(student, RadHybridForCausalLM) else student.get_base_model()

    def _orientation_loss(self, student, inputs, counted) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over layers of the distance between mixing and attention matrices; only B, C and a of the student run."""
        body, teacher = self._student_causal_lm(student).model, self._teacher()
        counted = nn.functional.pad(counted, (0, 1)).float()  # [B, T]
        with self.accelerator.autocast():
            with (
                torch.no_grad(),
                recorded_mixers(teacher.model.layers) as records,
                recorded_attention(teacher) as attended,
            ):
                self._run_teacher(inputs)
            # Autocast takes any type; without it a bfloat16 teacher would meet float32 weights.
            dtype = records[0][0].dtype if torch.is_autocast_enabled(self.args.device.type) else body.dtype
            masks = inputs.get("attention_mask"), inputs.get("seq_idx")
            losses, measured = [], []
            for layer, (hidden_states, _, _), attention in zip(body.layers, records, attended, strict=True):
                loss, sums = counted.new_zeros(()), counted.new_zeros(2)
                if layer.mixer.ssm is not None:
                    heads = converted_heads(body.config, layer.mixer.ssm.layer_idx)
                    arguments = layer.mixer.ssm, hidden_states.to(dtype), attention, heads, counted, *masks
                    loss, sums = _through(layer, orientation_loss, *arguments)
                losses.append(loss)
                measured.append(sums)
        return torch.stack(losses).sum(), {"relative_error": torch.stack(measured, dim=1)}  # [2, L]

    def _alignment_loss(self, student, inputs, counted) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over layers and positions of the distance between mixers; the student's MLPs and head do not run."""
        body = self._student_causal_lm(student).model
        counted = nn.functional.pad(counted, (0, 1))  # [B, T]
        with self.accelerator.autocast():
            with torch.no_grad(), recorded_mixers(self._teacher().model.layers) as records:
                self._run_teacher(inputs)
            masks = attention_masks(
                body.config,
                inputs_embeds=records[0][0],
                attention_mask=inputs.get("attention_mask"),
                position_ids=inputs.get("position_ids"),
                **{CACHE_NAME: None},
            )
            arguments = {"recurrent_mask": masks["linear_attention"], "seq_idx": inputs.get("seq_idx")}
            # Autocast takes any type; without it a bfloat16 teacher would meet float32 weights.
            dtype = records[0][0].dtype if torch.is_autocast_enabled(self.args.device.type) else body.dtype
            mixed = partial(checkpoint, use_reentrant=False) if self.args.gradient_checkpointing else _call
            losses, measured = [], []
            for layer, (hidden_states, position_embeddings, target) in zip(body.layers, records, strict=True):
                arguments["position_embeddings"] = tuple(t.to(dtype) for t in position_embeddings)
                arguments["attention_mask"] = masks.get(layer.mixer.mask_kind)
                output, _ = mixed(_through, layer, layer.mixer.forward, hidden_states.to(dtype), **arguments)
                loss, sums = alignment_loss(output, target, counted, self.args.alignment_loss_type)
                losses.append(loss)
                measured.append(sums)
        return torch.stack(losses).sum(), {"relative_error": torch.stack(measured, dim=1)}  # [2, L]

    def _distillation_loss(self, student, inputs, counted) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum over the drawn positions of the divergence from the teacher."""
        student = self._student_causal_lm(student)
        body_inputs = _body_inputs(inputs)
        seeds = row_seeds(inputs["labels"], self.args.seed + self.state.global_step)
        rows, columns, weights = sample_positions(counted, self.args.kl_positions, seeds)
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher_hidden = self._run_teacher(inputs)[rows, columns]
            hidden = student.model(**body_inputs, seq_idx=inputs.get("seq_idx"), use_cache=False).last_hidden_state
            # The heads' weights are used as they are, so a family's scaling of its logits goes into what they read.
            teacher_hidden = teacher_hidden * logits_scale(self._teacher().config)
            hidden = hidden[rows, columns] * logits_scale(student.config)  # [N, D]
            head, teacher_head = (whole(m.get_output_embeddings().weight) for m in (student, self._teacher()))
            if torch.is_autocast_enabled(self.args.device.type) and not head.requires_grad:
                # Once, for loss and measurement.
                head = head.to(torch.get_autocast_dtype(self.args.device.type))
            heads = hidden, head, teacher_hidden, teacher_head
            loss, (kd, ce) = head_loss(
                *heads,
                inputs["labels"][:, 1:][rows, columns],
                weights,
                beta=self.args.beta,
                temperature=self.args.temperature,
                kd_weight=self.args.kd_weight,
                ce_weight=self.args.ce_weight,
            )
            measured = {"agreement": agreement(*heads)}
        measured["kl" if self.args.beta == 0 else "divergence"] = torch.stack([kd, weights.sum()])
        if self.args.ce_weight:
            measured["cross_entropy"] = torch.stack([ce, weights.sum()])
        return loss, measured

    def _stored_loss(self, student, inputs, counted) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As [`_distillation_loss`], from the teacher's stored tokens."""
        student = self._student_causal_lm(student)
        seeds = row_seeds(inputs["labels"], self.args.seed + self.state.global_step)
        rows, columns, weights = sample_positions(counted, self.args.kl_positions, seeds)
        ids, log_probs = (inputs[name][rows, columns] for name in TEACHER_COLUMNS)  # [N, k]
        with self.accelerator.autocast():
            body_inputs = _body_inputs(inputs)
            hidden = student.model(**body_inputs, seq_idx=inputs.get("seq_idx"), use_cache=False).last_hidden_state
            hidden = hidden[rows, columns] * logits_scale(student.config)  # [N, D]
            head = whole(student.get_output_embeddings().weight)
            loss = self.args.kd_weight * (kd := stored_divergence(hidden, head, ids, log_probs, weights))
        return loss, {"kl": torch.stack([kd.detach(), weights.sum()])}
