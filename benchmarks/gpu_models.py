"""
Whole models: time to the first token and its memory, and training steps of both stages against a naive form. And the
product that both share, the recurrent heads' input projection, whose width is odd in most layers.

The naive form is the same mathematics as a first draft would write it: the scan in eager PyTorch, all logits of both
models in float32 for the divergence. Ours takes the default back end of the scan and the trainer's own losses
(`trainers.distillation.losses`), which never hold the logits of a whole batch.
"""

import torch
from torch import nn
from torch.nn.functional import kl_div

from benchmarks.gpu_decode import make_model
from benchmarks.gpu_tools import CUDA, DEVICE, milliseconds, peak_bytes, relative_error
from modeling_rad_hybrid import CACHE_NAME
from modeling_rad_hybrid.aligned_linear import AlignedLinear
from modeling_rad_hybrid.rollback_cache import RadHybridCache
from trainers.memory import cache_bytes


def project(report, options) -> None:
    """The input projection of a layer, forward and backward, by its weight as it is and by one filled up."""
    columns = ["shape", "width", "rows", "form", "error", "fwd ms", "fwd+bwd ms", "speed fwd", "speed fwd+bwd"]
    add = report.table(
        "Input projection of odd width, bfloat16 (error against float64, outputs and gradients)", columns
    )
    for shape, inputs, width in options.projections:
        layer = AlignedLinear(inputs, width, device=DEVICE, dtype=torch.bfloat16)
        for rows in options.projection_rows:
            hidden = torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)

            def both(form, hidden=hidden, weight=weight, layer=layer):
                output = form(hidden)
                return [output, *torch.autograd.grad(output, [hidden, *layer.parameters()], weight)]

            leaves = [t.detach().double().requires_grad_() for t in (hidden, *layer.parameters())]
            exact = nn.functional.linear(*leaves)
            exact = [exact, *torch.autograd.grad(exact, leaves, weight.double())]
            base = None
            for name, form in (("plain", super(AlignedLinear, layer).forward), ("filled", layer.aligned)):
                error = max(relative_error(one, other) for one, other in zip(both(form), exact, strict=True))
                if error > 1e-2:
                    raise RuntimeError(f"The projection {name} is wrong by {error:.1e}.")
                with torch.no_grad():
                    forward = milliseconds(lambda form=form, hidden=hidden: form(hidden))
                times = forward, milliseconds(lambda form=form: both(form))
                base = base or times
                speeds = (then / now for then, now in zip(base, times, strict=True))
                add(shape, width, rows, name, error, *times, *speeds)


@torch.no_grad()
def prefill(report, options) -> None:
    """Milliseconds from a prompt to its first token, and the memory on top of the weights."""
    columns = ["tokens", "model", "ms", "ktokens/s", "peak GB", "cache GB", "ratio"]
    add = report.table("Prefill: time to the first token, batch 1, bfloat16, SDPA", columns)
    models = {"teacher": make_model(options.fields, None), "student": make_model(options.fields, options.kept)}
    for tokens in options.prompts:
        ids = torch.randint(0, models["teacher"].config.vocab_size, (1, tokens), device=DEVICE)
        times = {}
        for name, model in models.items():

            def first_token(model=model, ids=ids):
                cache = RadHybridCache(model.config)
                output = model(ids, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
                return output.logits.argmax(-1)

            try:
                times[name] = milliseconds(first_token, budget=1.0, most=8)
                peak = peak_bytes(first_token) / 1e9
            except torch.OutOfMemoryError:
                add(tokens, name, "out of memory", None, None, None, None)
                continue
            ratio = times["teacher"] / times[name] if name == "student" and "teacher" in times else None
            held = cache_bytes(model.config, tokens) / 1e9
            add(tokens, name, times[name], tokens / times[name], peak, held, ratio)


def train(report, options) -> None:
    """Training steps (forward, backward, AdamW) of both stages."""
    columns = ["shape", "stage", "tokens a step", "form", "ms", "ktokens/s", "peak GB", "loss", "ratio"]
    add = report.table("Training: bfloat16 autocast over float32 weights, teacher in bfloat16", columns)
    for shape, (fields, kept, batch, tokens) in options.training.items():
        teacher = make_model(fields, None)
        student = make_model(fields, kept, torch.float32).train()
        ids = torch.randint(0, fields["vocab_size"], (batch, tokens), device=DEVICE)
        for stage, losses in (("alignment", (align, align)), ("distillation", (distil_naively, distil))):
            base = None
            for form, loss in zip(("naive", "ours"), losses, strict=True):
                for layer in student.model.layers:
                    if layer.mixer.ssm is not None:
                        layer.mixer.ssm.backend = "torch" if form == "naive" else options.training_backend
                trained = [p for name, p in student.named_parameters() if stage == "distillation" or ".ssm." in name]
                student.requires_grad_(False)
                for parameter in trained:
                    parameter.requires_grad_()
                optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=CUDA)

                def step(loss=loss, optimizer=optimizer, student=student, teacher=teacher, ids=ids):
                    with torch.autocast(DEVICE.type, torch.bfloat16):
                        value = loss(student, teacher, ids)
                    value.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    return value

                try:
                    first = step().item()
                    once = milliseconds(step, budget=1.0, most=8)
                    peak = peak_bytes(step) / 1e9
                except torch.OutOfMemoryError:
                    optimizer.zero_grad()
                    add(shape, stage, batch * tokens, form, "out of memory", None, None, None, None)
                    continue
                base = once if form == "naive" else base
                ratio = base / once if form == "ours" and base else None
                add(shape, stage, batch * tokens, form, once, batch * tokens / once, peak, first, ratio)
                del optimizer
        del teacher, student
        if CUDA:
            torch.cuda.empty_cache()


def align(student, teacher, ids):
    """Mean over positions of the distance between each layer's mixers, given the teacher's input of the layer."""
    records = []

    def record(module, args, kwargs, output):
        records.append((args[0], kwargs["position_embeddings"], output[0]))

    handles = [layer.mixer.register_forward_hook(record, with_kwargs=True) for layer in teacher.model.layers]
    with torch.no_grad():
        teacher.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    total = 0.0
    for layer, (hidden, embeddings, target) in zip(student.model.layers, records, strict=True):
        if layer.mixer.ssm is not None:
            output, _ = layer.mixer(hidden, embeddings)
            total = total + (output.float() - target.float()).square().sum(-1).clamp(min=1e-12).sqrt().mean()
    return total


def distil_naively(student, teacher, ids):
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits.float().log_softmax(-1)
    logits = student(ids, use_cache=False).logits.float().log_softmax(-1)
    return kl_div(logits, target, reduction="none", log_target=True).sum(-1).mean()


def distil(student, teacher, ids):
    from trainers.distillation.losses import head_loss

    with torch.no_grad():
        target = teacher.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    hidden = student.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    weights = torch.ones(len(hidden), device=DEVICE)
    heads = hidden, student.lm_head.weight, target, teacher.lm_head.weight
    loss, _ = head_loss(*heads, nn.functional.pad(ids[:, 1:], (0, 1)).flatten(), weights)
    return loss / len(hidden)
