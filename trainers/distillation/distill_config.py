"""Settings of a distillation run: one stage of one student, on top of TRL's `SFTConfig`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from trainers.distillation.losses import ALIGNMENT_LOSSES
from trainers.precision import fast_dtype


STAGES = ("orientation", "alignment", "distillation")


@dataclass
class RadDistillationConfig(SFTConfig):
    r"""
    Configuration of the [`RadDistillationTrainer`].

    Only the parameters of distillation are listed here; the others are those of [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`]. With [`~transformers.HfArgumentParser`] they become command-line options.

    Parameters:
        > Parameters that control the stage

        stage (`str`, *optional*, defaults to `"distillation"`):
            `"orientation"`: each recurrent head's mixing matrix is drawn to its teacher head's attention matrix.
            `"alignment"`: each layer's mixer learns to give what the teacher's attention gives for the same input.
            `"distillation"`: the whole student learns the teacher's next-token distribution.
        alignment_loss_type (`str`, *optional*, defaults to `"l2"`):
            Distance of the alignment stage: `"l2"` (norm of each position's difference, as in the paper's code),
            `"mse"` or `"relative"` (squared, over the squared norm of the teacher's output). Summed over layers.
        frozen_parts (`list[str]`, *optional*):
            Pieces of parameter names that stay frozen in the distillation stage, for example `.mixer.attention.` (the
            kept heads) or `.mlp.`.
        train_embeddings (`bool`, *optional*, defaults to `False`):
            Whether embeddings and head train in the distillation stage. Frozen they stay the teacher's own.
        isolate_documents (`bool`, *optional*, defaults to `True`):
            Whether documents that share a packed row are kept apart, in the teacher's attention as in the student's
            heads, where the rows tell their documents' lengths (column `seq_lengths`).

        > Parameters that control the teacher

        teacher_model_name_or_path (`str`, *optional*):
            Hub id, folder or `.gguf` file of the teacher, when the trainer is not given one.
        teacher_model_revision (`str`, *optional*):
            Branch, tag or commit of the teacher's Hub repo.
        teacher_logits (`str`, *optional*):
            Folder of `hf-rad teach` with the teacher's likeliest tokens: the teacher is not loaded. For the
            distillation stage with the forward KL at temperature 1.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of [`~trainers.teachers.load_teacher`]. If `dtype` is not among them, it is bfloat16
            where `bf16` is on, float32 elsewhere.

        > Parameters that control the loss of the distillation stage

        beta (`float`, *optional*, defaults to `0.0`):
            `0.0` is the forward KL divergence (the paper's), `1.0` the reverse one, between them the generalized
            Jensen-Shannon divergence. TRL's distillation trainers have other defaults (1.0 and 0.5).
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides both models' logits. The loss is not multiplied by its square.
        kd_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence.
        ce_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy of the data.
        kl_positions (`int`, *optional*):
            Take the loss at this many random positions of each sequence instead of all: an unbiased estimate that
            saves most of the heads' products. A resumed run draws the same positions.

        > Parameters that control what is seen of the run

        probe_steps (`int`, *optional*):
            Ask the student 40 questions of key-value retrieval (JSON, 20 pairs) every this many steps and log the
            accuracy. A picture of the run is drawn into the output folder in any case.

        > Parameters that control the optimisation

        mixer_learning_rate (`float`, *optional*):
            Learning rate of the recurrent heads and of the adapters beside kept heads. By default `1e-3` in the
            orientation and alignment stages, where nothing else trains, and `learning_rate` in the distillation stage.
        decay_ratio (`float`, *optional*, defaults to `0.2`):
            Share of the steps in which the rate decays, for `lr_scheduler_type="warmup_stable_decay"`. Rates start and end
            at a tenth, unless `lr_scheduler_kwargs` says otherwise.

    > [!NOTE] > These parameters have default values different from [`~trl.SFTConfig`]: > - `learning_rate`: Defaults
    to `3e-5` instead of `2e-5`. > - `lr_scheduler_type`: Defaults to `"warmup_stable_decay"` instead of `"linear"`. >
    - `warmup_steps`: Defaults to `0.1` (a share of all steps) instead of `0`. > - `max_length`: Defaults to `2048`
    instead of `1024`. > - `max_grad_norm`: Defaults to `0.0` (no clipping) before the distillation stage: a common norm
    would couple the layers. > - `gradient_checkpointing`: Defaults to `False` instead of `True`. > - `bf16`: Defaults to
    `True` only where bfloat16 products are quick, see [`~trainers.precision.fast_dtype`]. > -
    `train_sampling_strategy`: Defaults to `"sequential"` instead of `"random"`: packed rows come mixed, so that each >
    batch holds every source's share. Shuffle other data, or set `"random"`. > - `include_num_input_tokens_seen`:
    Defaults to `"non_padding"`, a count that outlives a resume.
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

    # Parameters whose default values are overridden from SFTConfig
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate of all but the recurrent heads."})
    lr_scheduler_type: str = field(default="warmup_stable_decay", metadata={"help": "Schedule of the learning rates."})
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Steps of linear warmup; below 1 a share of all steps, which protects retrieval."},
    )
    max_length: int | None = field(default=2048, metadata={"help": "Longest sequence; longer ones are cut."})
    max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Norm that gradients are clipped to. By default 1.0 in distillation, else 0 (off)."},
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    # Of the parent's `str | bool` a command line could only read the bool.
    include_num_input_tokens_seen: str | None = field(
        default=None, metadata={"help": "Which input tokens to count: all, non_padding (default) or no."}
    )
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "Order of the rows: sequential, random or group_by_length."}
    )

    # Parameters that control the stage
    stage: str = field(default="distillation", metadata={"help": "Stage of this run.", "choices": list(STAGES)})
    alignment_loss_type: str = field(
        default="l2", metadata={"help": "Distance of the alignment stage.", "choices": list(ALIGNMENT_LOSSES)}
    )
    frozen_parts: list[str] | None = field(
        default=None, metadata={"help": "Pieces of parameter names that stay frozen in the distillation stage."}
    )
    train_embeddings: bool = field(
        default=False, metadata={"help": "Whether embeddings and head train in the distillation stage."}
    )

    isolate_documents: bool = field(
        default=True, metadata={"help": "Whether documents that share a packed row are kept apart."}
    )

    # Parameters that control the teacher
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id, folder or .gguf file of the teacher."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher's Hub repo."}
    )
    teacher_logits: str | None = field(
        default=None, metadata={"help": "Folder of `hf-rad teach`, instead of a teacher."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments for loading the teacher."}
    )

    # Parameters that control the loss of the distillation stage
    beta: float = field(
        default=0.0, metadata={"help": "0 is forward KL, 1 reverse KL, between them generalized Jensen-Shannon."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides both models' logits."})
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the divergence from the teacher."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the cross-entropy of the data."})
    kl_positions: int | None = field(
        default=None, metadata={"help": "Random positions of each sequence that the loss is taken at; default all."}
    )

    # Parameters that control what is seen of the run
    probe_steps: int | None = field(
        default=None, metadata={"help": "Ask a retrieval probe every this many steps and log the accuracy."}
    )

    # Parameters that control the optimisation
    mixer_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Rate of the recurrent heads. By default the learning rate in distillation, else 1e-3."},
    )
    decay_ratio: float = field(
        default=0.2, metadata={"help": "Share of the steps in which the rate decays (warmup_stable_decay)."}
    )

    def __post_init__(self):
        self._check()
        by_layer = self.stage != "distillation"
        # Said outright, for without it transformers refuses bfloat16 where there is no accelerator.
        on_cpu = self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and fast_dtype("cpu" if on_cpu else "cuda") is torch.bfloat16
        # Pinned memory serves copies to an accelerator; without one torch warns at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and not on_cpu
        if self.include_num_input_tokens_seen is None:
            self.include_num_input_tokens_seen = "non_padding"
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if by_layer else 1.0
        if self.mixer_learning_rate is None:
            self.mixer_learning_rate = 1e-3 if by_layer else self.learning_rate
        super().__post_init__()

    def _check(self):
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}; choose one of {', '.join(STAGES)}.")
        if self.alignment_loss_type not in ALIGNMENT_LOSSES:
            raise ValueError(
                f"alignment_loss_type is {self.alignment_loss_type!r}; choose one of {', '.join(ALIGNMENT_LOSSES)}."
            )
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; it must lie between 0 (forward KL) and 1 (reverse KL).")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")
        if min(self.kd_weight, self.ce_weight) < 0 or self.kd_weight + self.ce_weight == 0:
            raise ValueError(
                f"kd_weight is {self.kd_weight} and ce_weight {self.ce_weight}; neither may be negative, nor both 0."
            )
        if self.kl_positions is not None and self.kl_positions < 1:
            raise ValueError(f"kl_positions is {self.kl_positions}; take at least 1, or leave it out to take all.")
        asked = self.stage, self.beta, self.temperature, self.ce_weight
        if self.teacher_logits and asked != ("distillation", 0.0, 1.0, 0.0):
            raise ValueError(
                f"teacher_logits is {self.teacher_logits}: stored tokens serve the distillation stage with beta 0, "
                f"temperature 1 and ce_weight 0, not stage {self.stage!r} with {asked[1]}, {asked[2]} and {asked[3]}."
            )
        if not 0 <= self.decay_ratio <= 1:
            raise ValueError(f"decay_ratio is {self.decay_ratio}; it is a share of the steps, between 0 and 1.")
