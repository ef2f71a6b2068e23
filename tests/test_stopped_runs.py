"""
What stops a run from the command line is said in one line, and the last checkpoint is whole: a disk that is full in the
middle of a checkpoint, data that vanished, a teacher of another vocabulary.
"""

import errno
import resource

import pytest
import torch
from test_packing import corpus, make, one_thread  # noqa: F401
from trl import SFTTrainer

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.cli import main
from trainers.conversion import convert
from trainers.distillation.checkpoints import last_checkpoint
from trainers.heads.head_map import HeadMap, TeacherShape


TRAIN = (
    "distill --model_name_or_path student --teacher_model_name_or_path teacher --stage distillation "
    "--per_device_train_batch_size 2 --bf16 false --report_to none --save_strategy steps --save_steps 2 --max_steps 4 "
    "--disable_tqdm true "
)


@pytest.fixture
def folders(corpus, tiny_llama, tiny_tokenizer):  # noqa: F811
    """Teacher, student and packed rows in the working folder."""
    head_map = HeadMap(TeacherShape.from_config(tiny_llama.config, "test/teacher"), [[], [1], [2]])
    torch.manual_seed(0)
    for name, model in (("teacher", tiny_llama), ("student", convert(tiny_llama, head_map))):
        model.save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)
    head_map.save("student/rad/head_map.json")
    make(corpus / "packed", tiny_tokenizer, tokens=3000)
    return corpus


def fails(capsys, words: str) -> str:
    """Runs a command line that must fail, and returns its one line of error."""
    capsys.readouterr()
    assert main(words.split()) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("room", [100_000, 600_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(folders, capsys, monkeypatch, room):
    """The system lets no file grow beyond `room` bytes while the second checkpoint is written."""
    write = SFTTrainer._save_checkpoint

    def write_on_a_full_disk(self, model, trial):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            write(self, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as full:
        full.setattr(SFTTrainer, "_save_checkpoint", write_on_a_full_disk)
        error = fails(capsys, TRAIN + "--packed packed --output_dir run")
    assert "run/checkpoint-4 could not be written" in error
    assert "The last good checkpoint is run/checkpoint-2." in error
    assert last_checkpoint("run") == "run/checkpoint-2" and not (folders / "run" / "checkpoint-4").exists()
    assert main((TRAIN + "--packed packed --output_dir run --resume_from_checkpoint last").split()) == 0
    assert main((TRAIN + "--packed packed --output_dir unbroken").split()) == 0
    resumed, unbroken = (RadHybridForCausalLM.from_pretrained(name).state_dict() for name in ("run", "unbroken"))
    assert all(torch.equal(weight, unbroken[name]) for name, weight in resumed.items())


def test_a_full_disk_at_the_end_names_the_folder_and_the_checkpoint(folders, capsys, monkeypatch):
    def full(self, output_dir=None, _internal_call=False):
        if not _internal_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, output_dir, _internal_call)

    save = SFTTrainer.save_model
    monkeypatch.setattr(SFTTrainer, "save_model", full)
    error = fails(capsys, TRAIN + "--packed packed --output_dir run")
    assert error.startswith("Error: run could not be written") and "No space left on device" in error
    assert "The last good checkpoint is run/checkpoint-4." in error


def test_data_that_vanished_is_named(folders, capsys):
    assert "nowhere holds no packed data" in fails(capsys, TRAIN + "--packed nowhere --output_dir run")
    assert "There is no file or folder gone.jsonl" in fails(capsys, TRAIN + "--text gone.jsonl --output_dir run")
    (folders / "packed" / "rows-00000.parquet").unlink()
    error = fails(capsys, TRAIN + "--packed packed --output_dir run")
    assert "packed/rows-00000.parquet is gone" in error and "Pack the data anew or restore the file" in error


def test_a_teacher_of_another_vocabulary_is_named_with_both_sizes(folders, capsys, tiny_llama):
    tiny_llama.resize_token_embeddings(123)
    tiny_llama.save_pretrained("teacher")
    error = fails(capsys, TRAIN + "--packed packed --output_dir run")
    assert "The student has vocab_size 99, the teacher 123." in error
