"""Stored teacher outputs: with every token stored the loss is the teacher's own, with few it is below; nothing is loaded."""

import pytest
import torch
from test_packing import corpus, make, one_thread  # noqa: F401

from trainers.cli import main
from trainers.conversion import convert
from trainers.data.packing import load_packed
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import RadDistillationTrainer
from trainers.distillation.losses import divergence, stored_divergence
from trainers.distillation.teaching import Taught, load_taught, teach
from trainers.heads.head_map import HeadMap, TeacherShape


SETTINGS = [{"text": "text.jsonl.zst", "weight": 1.0}]


def make_student(teacher):
    torch.manual_seed(0)
    return convert(teacher, HeadMap(TeacherShape.from_config(teacher.config, "test/teacher"), [[], [1], [0, 2]]))


def make_trainer(student, teacher, tokenizer, folder, rows, **settings):
    defaults = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = RadDistillationConfig(str(folder), max_steps=2, per_device_train_batch_size=2, **defaults, **settings)
    return RadDistillationTrainer(student, teacher, args, rows, processing_class=tokenizer)


@pytest.mark.parametrize("k", [3, 40])
def test_the_stored_divergence_is_that_of_k_tokens_and_their_tail(k):
    generator = torch.Generator().manual_seed(0)
    hidden, head, theirs = (torch.randn(*size, generator=generator) for size in ((300, 8), (40, 8), (300, 40)))
    hidden.requires_grad_()
    weights = torch.rand(300, generator=generator)
    top = theirs.log_softmax(-1).topk(k)
    loss = stored_divergence(hidden, head, top.indices, top.values, weights)
    ours = (hidden @ head.T).log_softmax(-1)
    p, q = top.values.exp(), ours.gather(1, top.indices).exp()
    if k < 40:
        p, q = (torch.cat([t, 1 - t.sum(-1, keepdim=True)], dim=1) for t in (p, q))
    expected = ((p * (p.log() - q.log())).sum(-1) * weights).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    grads = [torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    whole = (divergence(hidden @ head.T, theirs) * weights).sum()
    assert loss <= whole * 1.001 and (k < 40 or loss >= whole * 0.999)


def test_a_student_learns_from_stored_tokens_without_the_teacher(corpus, tiny_llama, tiny_tokenizer):  # noqa: F811
    manifest = make(corpus / "packed", tiny_tokenizer, settings=SETTINGS, length=64, tokens=1000)
    taught = teach("taught", "packed", tiny_llama, "acme/teacher", top_k=99, batch_size=3, progress=False)
    assert taught == Taught.load("taught") == Taught("acme/teacher", 99, manifest.digest, 99, 1)
    rows = load_taught(load_packed("packed"), manifest.digest, "taught")
    stored = make_trainer(make_student(tiny_llama), None, tiny_tokenizer, "a", rows, teacher_logits="taught")
    live = make_trainer(make_student(tiny_llama), tiny_llama, tiny_tokenizer, "b", load_packed("packed"))
    assert stored.teacher_model is None
    losses = [t.compute_loss(t.model, t.data_collator([t.train_dataset[i] for i in (0, 1)])) for t in (stored, live)]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-3)
    before = {name: p.detach().clone() for name, p in stored.model.named_parameters()}
    stored.train()
    assert any(not torch.equal(p, before[name]) for name, p in stored.model.named_parameters())
    stored.create_model_card("mine")


def test_teaching_goes_on_where_it_stopped_and_belongs_to_its_rows(corpus, tiny_llama, tiny_tokenizer, monkeypatch):  # noqa: F811
    manifest = make(corpus / "packed", tiny_tokenizer, settings=SETTINGS, length=64, tokens=1000)
    monkeypatch.setattr("trainers.distillation.teaching.TOKENS_PER_FILE", 64 * 6)
    forward, calls = tiny_llama.model.forward, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return forward(*args, **kwargs)

    tiny_llama.model.forward = failing
    with pytest.raises(OSError, match="No space left"):
        teach("taught", "packed", tiny_llama, "acme/teacher", 4, 3, False)
    with pytest.raises(FileNotFoundError, match="Make it with `hf-rad teach`"):
        Taught.load("taught")
    assert teach("taught", "packed", tiny_llama, "acme/teacher", 4, 3, False).files == 3
    # The first file was there already: two batches of it are not computed again.
    assert len(calls) == 3 + 4
    rows = load_taught(load_packed("packed"), manifest.digest, "taught")
    assert len(rows) == manifest.rows and len(rows[0]["teacher_ids"]) == 64 * 4
    with pytest.raises(ValueError, match="taught on other packed rows"):
        load_taught(load_packed("packed"), "0" * 64, "taught")
    (corpus / "taught" / "top-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="top-00001.parquet is gone"):
        load_taught(load_packed("packed"), manifest.digest, "taught")
    with pytest.raises(ValueError, match="beta 0, temperature 1"):
        RadDistillationConfig(".", teacher_logits="taught", beta=1.0)


def test_teach_and_distill_from_the_command_line(corpus, tiny_llama, tiny_tokenizer):  # noqa: F811
    make(corpus / "packed", tiny_tokenizer, settings=SETTINGS, length=64, tokens=1000)
    tiny_llama.save_pretrained("teacher")
    student = make_student(tiny_llama)
    student.save_pretrained("student")
    for folder in ("teacher", "student"):
        tiny_tokenizer.save_pretrained(folder)
    HeadMap(TeacherShape.from_config(tiny_llama.config, "test/teacher"), student.config.kept_heads).save(
        "student/rad/head_map.json"
    )
    assert main("teach teacher --packed packed --out taught --top-k 8 -q".split()) == 0
    words = (
        "distill --model_name_or_path student --packed packed --teacher_logits taught --max_steps 2 --output_dir run"
    )
    assert main([*words.split(), "--per_device_train_batch_size", "2", "--report_to", "none"]) == 0
    assert (corpus / "run" / "rad" / "training.json").is_file()
