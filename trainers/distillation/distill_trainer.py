"""
The trainer of a student: orientation of its mixing matrices (optional), alignment of its mixers, then distillation of
the whole, one run a stage.

    for stage in ("alignment", "distillation"):
        args = RadDistillationConfig(output_dir=f"runs/mine/{stage}", stage=stage, max_steps=100)
        trainer = RadDistillationTrainer(student, teacher, args, rows, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))
        trainer.save_model()

Data preparation, packing, schedules, resuming, logging, PEFT and pushing are TRL's and transformers'; what is ours are
the two losses, who trains at which rate, and stopping when numbers run away. Paper:
https://huggingface.co/papers/2602.11374, section 4.3.

Shape letters: B batch, T tokens, D model width, L layers.
"""

import json
import math
import re
import textwrap
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.data.packing import TEACHER_COLUMNS, DocumentCollator
from trainers.distillation.checkpoints import last_good, saving
from trainers.distillation.cpu_kernels import fast_heads
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.orientation import ORIENTED_PARTS
from trainers.distillation.placement import own_class, place_teacher, shared_frozen_tensors, whole_state_dict
from trainers.distillation.stage_losses import StageLosses
from trainers.distillation.teaching import Taught
from trainers.distillation.trl_compat import redirect_forward
from trainers.distillation.watching import DivergenceCallback, PlotCallback, ProbeCallback
from trainers.precision import resolve_dtype
from trainers.probes import KVRetrieval
from trainers.tasks import ProbeTask
from trainers.teachers import load_teacher, teacher_identity


# What conversion adds to the teacher: the only part that alignment trains.
NEW_PARTS = (".mixer.ssm.", ".mixer.adapter.")
# Stages without the student's MLPs and head, and the parts that they train.
LAYER_STAGES = {"orientation": ORIENTED_PARTS, "alignment": NEW_PARTS}
EMBEDDINGS = ("embed_tokens", "lm_head")
LAYER_ERRORS = "layer_errors.jsonl"
PROBE_QUESTIONS = 40


class NonFiniteError(ValueError):
    """Training met a number that is not finite and stopped; the message says where and what is still good."""


class RadDistillationTrainer(StageLosses, SFTTrainer):
    """
    Trains a hybrid student against its teacher, in the stage that `args.stage` names.

    Args:
        model (`str` or [`RadHybridForCausalLM`]):
            The student, or a folder or Hub id of one. Its parameters' `requires_grad` is set for the stage. Keep it in
            float32: `bf16` computes in bfloat16 from float32 weights.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher, or its Hub id, folder or `.gguf` file; by default `args.teacher_model_name_or_path`. It is
            frozen, and quickest in the type that the student computes in.
        args ([`RadDistillationConfig`], *optional*):
            Settings of this stage.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Packed rows (`trainers.data`) or anything that [`~trl.SFTTrainer`] takes.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            Data for `evaluate`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; by default the student's.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler to use instead of those that `args` asks for.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Trains an adapter instead of the stage's parameters.

    Raises:
        `ValueError`: when teacher and student cannot belong together, or nothing would train; the message names both.
    """

    # The loss is divided by the tokens of the whole accumulated batch, so transformers must not divide it again.
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "rad-hybrid"]
    _name = "Retrieval-aware distillation"
    _paper = {
        "title": "Retrieval-Aware Distillation for Transformer-SSM Hybrids",
        "id": "2602.11374",
        "citation": textwrap.dedent("""\
            @article{rad2026,
                title = {{Retrieval-Aware Distillation for Transformer-SSM Hybrids}},
                year  = 2026,
                url   = {https://huggingface.co/papers/2602.11374},
            }"""),
    }

    def __init__(
        self,
        model: str | RadHybridForCausalLM,
        teacher_model: str | PreTrainedModel | None = None,
        args: RadDistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any | None = None,
    ):
        args = RadDistillationConfig() if args is None else args
        if isinstance(model, str):
            kwargs = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
            model = RadHybridForCausalLM.from_pretrained(model, **kwargs)
        teacher = None if args.teacher_logits else self._load_teacher(teacher_model, args)
        self._check_pair(model, teacher, args)
        collator = None
        if args.isolate_documents and not args.packing and "seq_lengths" in (train_dataset.column_names or []):
            # The rows are ready; preparing them would copy them all.
            collator = DocumentCollator()
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
            # Rows without padding; where padding and end of text are one token, the other count would miss it.
            args.include_num_input_tokens_seen = "all"
        # Before the parent's constructor: the optimizer and DDP take the parameters as they find them.
        self._freeze(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if args.train_embeddings and is_deepspeed_zero3_enabled():
            raise ValueError(
                "train_embeddings needs the head's gradient, which ZeRO-3 does not give; use FSDP2 or DDP."
            )
        self.teacher_model = None
        if teacher is not None:
            self.teacher_model = place_teacher(self.accelerator, teacher.requires_grad_(False).eval())
        self.add_callback(DivergenceCallback(Path(args.output_dir) / LAYER_ERRORS))
        self.add_callback(PlotCallback())
        if args.probe_steps is not None:
            probe = KVRetrieval(format="json", pairs=20, shots=2, queries=4)
            self.add_callback(ProbeCallback(self, ProbeTask(probe, PROBE_QUESTIONS), args.probe_steps))
        # Sums since the last log: name -> [numerators, denominators], each a number or one value a layer.
        self._totals = {"train": {}, "eval": {}}

    @staticmethod
    def _load_teacher(teacher: str | PreTrainedModel | None, args: RadDistillationConfig) -> PreTrainedModel:
        kwargs = args.teacher_model_init_kwargs
        if isinstance(teacher, PreTrainedModel):
            if kwargs:
                raise ValueError(
                    f"teacher_model_init_kwargs is {kwargs}, but the teacher is loaded already. Load it with "
                    "these, or give the trainer its name."
                )
            return teacher
        name = teacher or args.teacher_model_name_or_path
        if name is None:
            raise ValueError("There is no teacher: give teacher_model or args.teacher_model_name_or_path.")
        kwargs = {"dtype": "bfloat16" if args.bf16 else "float32", **(kwargs or {})}
        kwargs["dtype"] = resolve_dtype(kwargs["dtype"])
        return load_teacher(
            name, revision=args.teacher_model_revision, trust_remote_code=args.trust_remote_code, **kwargs
        )[0]

    @staticmethod
    def _check_pair(student: PreTrainedModel, teacher: PreTrainedModel | None, args: RadDistillationConfig) -> None:
        if teacher is None:
            theirs = Taught.load(args.teacher_logits).vocab_size
            if student.config.vocab_size != theirs:
                raise ValueError(
                    f"The student has vocab_size {student.config.vocab_size}, the teacher of {args.teacher_logits} "
                    f"{theirs}. Teach with the student's own teacher."
                )
            return
        for field in ("vocab_size", "num_hidden_layers", "hidden_size"):
            ours, theirs = student.config.to_dict()[field], teacher.config.get_text_config().to_dict()[field]
            if ours != theirs:
                raise ValueError(
                    f"The student has {field} {ours}, the teacher {theirs}. A student learns from the teacher that it "
                    "was converted from; give that one, or convert this teacher."
                )

    @staticmethod
    def _freeze(student: PreTrainedModel, args: RadDistillationConfig) -> None:
        """Lets the stage's parameters train and no others."""
        for name, parameter in student.named_parameters():
            if args.stage in LAYER_STAGES:
                trains = any(part in name for part in LAYER_STAGES[args.stage])
            else:
                trains = args.train_embeddings or not any(part in name for part in EMBEDDINGS)
                trains = trains and not any(part in name for part in args.frozen_parts or [])
            parameter.requires_grad_(trains)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise ValueError(
                f"Nothing would train in the {args.stage} stage: the student has no converted head, or frozen_parts "
                f"({args.frozen_parts}) covers everything."
            )

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, DocumentCollator):
            self._signature_columns = [*self._signature_columns, "completion_mask", *TEACHER_COLUMNS]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the parent's, with the recurrent heads in groups of their own rate."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            model = self.model if model is None else model
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer_cls_and_kwargs = cls, {**kwargs, "params": self._parameter_groups(model)}
        return super().create_optimizer(model)

    def _parameter_groups(self, model) -> list[dict]:
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                new = any(part in name for part in NEW_PARTS)
                # A convolution begins as the identity and a skip as zero: neither should shrink.
                # Orientation has no gradient for the rows of `in_proj` that make z and x.
                decays = name in decayed and parameter.ndim == 2 and self.args.stage != "orientation"
                groups.setdefault((new, decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.args.mixer_learning_rate if new else self.args.learning_rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (new, decays), parameters in groups.items()
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As the parent's; `decay_ratio` becomes the number of decay steps that warmup-stable-decay asks for."""
        kwargs = dict(self.args.lr_scheduler_kwargs or {})
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            kwargs.setdefault("num_decay_steps", math.ceil(self.args.decay_ratio * num_training_steps))
            # transformers' default of 0 would waste the first step, of which a short run has few.
            kwargs.setdefault("min_lr_ratio", 0.1)
            self.args.lr_scheduler_kwargs = kwargs
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        student = self.accelerator.unwrap_model(model)
        losses = {"orientation": self._orientation_loss, "alignment": self._alignment_loss}
        stage_loss = losses.get(self.args.stage, self._distillation_loss)
        if self.args.teacher_logits:
            stage_loss = self._stored_loss
        # A position counts where the token after it counts, which is what transformers' count of items means too.
        counted = inputs["labels"][:, 1:] != -100  # [B, T - 1]
        total, measured = redirect_forward(model, student, stage_loss, student, inputs, counted)
        items = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = total / items
        self._add_to_totals(mode, measured)
        if not torch.isfinite(loss):
            self._stop(f"The {mode} loss is {loss.item()}", measured)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is that of all processes, and DDP takes the mean of their gradients.
            loss = loss * self.accelerator.num_processes
        return loss

    def train(self, *args, **kwargs):
        """As the parent's; meanwhile what student and teacher have in common is in memory once, where it is whole."""
        student = self._student_causal_lm(self.model)
        with ExitStack() as stack:
            # ZeRO-3 brings a parameter when its own module is called, which the kernels do not do.
            if not self.is_deepspeed_enabled:
                stack.enter_context(fast_heads(student))
            if self._shares_tensors():
                any_dtype = self.args.stage in LAYER_STAGES or self.args.bf16
                stack.enter_context(shared_frozen_tensors(student, self._teacher(), any_dtype))
            return super().train(*args, **kwargs)

    def _shares_tensors(self) -> bool:
        """Whether both models are whole and in this process."""
        if self.teacher_model is None or self.teacher_model is not self._teacher():
            return False
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        # Logits of a whole batch are never made, so only the loss can be asked for.
        return super().prediction_step(model, inputs, True, ignore_keys)

    def _add_to_totals(self, mode: str, measured: dict[str, torch.Tensor]) -> None:
        totals = self._totals[mode]
        for name, sums in measured.items():
            sums = sums.detach().float()
            totals[name] = totals[name] + sums if name in totals else sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, sums in self._totals[mode].items():
            numerators, denominators = self.accelerator.reduce(sums, reduction="sum")
            values = numerators / denominators.clamp(min=1e-12)
            self._metrics[mode][name].append(values.mean().item())
            if name == "relative_error":
                self._metrics[mode][f"{name}_worst_layer"].append(values.max().item())
                self._write_layer_errors(mode, values)
        self._totals[mode].clear()
        super().log(logs, start_time)

    def _write_layer_errors(self, mode: str, values: torch.Tensor) -> None:
        """Keeps every layer's error beside the checkpoints: thirty numbers in each log line would bury the rest."""
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / LAYER_ERRORS
            path.parent.mkdir(parents=True, exist_ok=True)
            line = {
                "step": self.state.global_step,
                "mode": mode,
                "relative_error": [round(v, 5) for v in values.tolist()],
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _stop(self, what: str, measured: dict[str, torch.Tensor] | None = None) -> None:
        where = f" at step {self.state.global_step + 1}"
        if measured and "relative_error" in measured:
            bad = (~measured["relative_error"].isfinite()).any(0).nonzero().flatten().tolist()
            where += f", in layer {bad[0]}" if bad else ""
        good = last_good(self.args.output_dir)
        raise NonFiniteError(f"{what}{where}. {good} Lower the learning rate or warm up longer.")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # A gradient that is not finite shows in the loss one step late; by then it must not be in a checkpoint.
        for name, parameter in self.model.named_parameters():
            # ZeRO-3 keeps a parameter's numbers beside it, in shards.
            if parameter.requires_grad and not getattr(parameter, "ds_tensor", parameter).isfinite().all():
                self._stop(f"The parameter {name} is no longer finite and was not saved,")
        # A sharded checkpoint is enough to go on from; the student that a run ends with must load anywhere.
        whole_student = self.is_fsdp_enabled and not _internal_call
        with (
            saving(output_dir or self.args.output_dir, self.args.output_dir),
            whole_state_dict(self.accelerator) if whole_student else nullcontext(),
        ):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with own_class(self.model):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        with saving(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", self.args.output_dir):
            super()._save_checkpoint(model, trial)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes TRL's card with what it cannot know: the teacher, the stage and the kept heads."""
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        # TRL writes a placeholder under a misspelt key; the licence is the teacher's and not known here.
        card.data.pop("licence", None)
        stored = self.args.teacher_logits
        teacher = Taught.load(stored).teacher if stored else self._teacher().config._name_or_path
        # A folder is named by what it holds; a card must not tell where it lay.
        teacher = teacher_identity(teacher) if teacher and Path(teacher).exists() else teacher
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", teacher)
        card.data.base_model = teacher if known else None
        config = self._student_causal_lm(self.accelerator.unwrap_model(self.model)).config
        kept = sum(len(heads) for heads in config.kept_heads)
        heads = config.num_hidden_layers * config.num_attention_heads
        origin = f"[{teacher}](https://huggingface.co/{teacher})" if known else "its teacher"
        sentence = (
            f"A student of {origin} after the {self.args.stage} stage: {kept} of {heads} attention heads are kept"
        )
        card.text = re.sub(r"This model is a fine-tuned version of.*", f"{sentence}, the others recurrent.", card.text)
        card.text = card.text.replace('model="None"', f'model="{model_name}", trust_remote_code=True')
        card.save(path)
