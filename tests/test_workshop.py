"""What the students of one run share."""

import torch

from trainers.recipe import Recipe
from trainers.workshop import Workshop


def test_the_second_student_hears_what_the_teacher_told_the_first(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    workshop = Workshop(Recipe(teacher=str(tmp_path), students=["found", "none"]), progress=False)
    ids = torch.arange(24).view(2, 12)
    runs = []
    body = type(workshop.teacher.model.layers[0])
    forward = body.forward
    monkeypatch.setattr(body, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs))
    for _ in range(2):
        with workshop.stage_teacher("distillation", ids.numel()) as teacher, torch.no_grad():
            # The trainer reads the head beside the body.
            assert teacher.get_output_embeddings() is teacher.lm_head
            hidden = teacher.model(input_ids=ids, use_cache=False).last_hidden_state
    assert len(runs) == tiny_llama.config.num_hidden_layers
    assert torch.equal(hidden, teacher.model(input_ids=ids, use_cache=False).last_hidden_state)
    assert len(runs) == 2 * tiny_llama.config.num_hidden_layers
