"""
Packed folders: the same seed gives the same bytes, rows come back as they went in, and documents in a row stay apart in
teacher and student, in both stages.
"""

import copy
import json
import shutil

import pyarrow
import pytest
import torch
from datasets import Dataset, load_dataset

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.cli import main
from trainers.conversion import convert
from trainers.data import Source, chat_tokens, mixed_rows, packed_dataset, source_from_settings
from trainers.data.packing import DocumentCollator, Manifest, load_packed, pack
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import RadDistillationTrainer
from trainers.documents import DocumentStream, is_held_out, text_documents
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.recipe import Recipe
from trainers.workshop import Workshop


CHAT = [
    {"role": "user", "content": "what is the key ?"},
    {"role": "assistant", "content": "the key is 7"},
    {"role": "user", "content": "and the door ?"},
    {"role": "assistant", "content": "stone"},
]
SETTINGS = [
    {"text": "text.jsonl.zst", "weight": 3.0},
    {"probe": {"name": "kv", "pairs": 4, "shots": 1}, "weight": 1.0},
]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are only slowed down by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A zstd file of short documents in the working folder."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"river {i} stone " + "house " * (i % 30)}) for i in range(300)]
    with pyarrow.CompressedOutputStream("text.jsonl.zst", "zstd") as file:
        file.write("\n".join(lines).encode())
    return tmp_path


def make(folder, tokenizer, seed=0, settings=SETTINGS, tokens=2000, length=192):
    sources = [source_from_settings(source, seed) for source in settings]
    return pack(folder, tokenizer, sources, settings, length, tokens, seed, "acme/teacher", progress=False)


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_seed_gives_the_same_bytes_and_rows_come_back_as_they_were(corpus, tiny_tokenizer):
    first, again, other = (make(corpus / name, tiny_tokenizer, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert bytes_of(corpus / "a") == bytes_of(corpus / "b")
    assert first == again == Manifest.load(corpus / "a") and other.digest != first.digest
    assert sum(given["tokens"] for given in first.given) == first.tokens == 11 * 192
    assert first.given[1]["tokens"] / first.tokens == pytest.approx(0.25, abs=0.1)
    rows = load_packed(corpus / "a", tiny_tokenizer)
    expected = list(mixed_rows(tiny_tokenizer, [source_from_settings(s) for s in SETTINGS], 192, 2000, 0, False))
    assert rows["input_ids"][:] == [row.tokens for row in expected]
    assert rows["seq_lengths"][:] == [row.lengths for row in expected]
    assert rows.features["input_ids"].feature.dtype == "uint16" and "completion_mask" not in rows.column_names
    # Any tool that knows Parquet reads the folder.
    assert load_dataset("parquet", data_files="a/*.parquet", split="train")["input_ids"][:] == rows["input_ids"][:]


def test_documents_held_out_are_never_packed(corpus, tiny_tokenizer):
    held = [document for document in text_documents("text.jsonl.zst") if is_held_out(document)]
    seen = list(DocumentStream("text.jsonl.zst"))
    assert held and not set(held) & set(seen) and len(held) + len(seen) == 300
    stream = DocumentStream("text.jsonl.zst", seed=3)
    first, second = list(stream), list(stream)
    assert first != second and sorted(first) == sorted(second) == sorted(seen)
    assert first == list(DocumentStream("text.jsonl.zst", seed=3))


def test_a_long_text_is_used_whole_in_pieces(tmp_path):
    text = " ".join(f"word{i}" for i in range(500)) + "x" * 300
    (tmp_path / "book.txt").write_text(text)
    pieces = list(DocumentStream(str(tmp_path / "book.txt"), most_characters=100))
    assert max(map(len, pieces)) <= 100 and len(pieces) > 20
    assert sorted(" ".join(pieces).split()) != text.split() and len("".join(pieces)) == len(
        text.replace(" ", "")
    ) + sum(piece.count(" ") for piece in pieces)


def test_a_packed_folder_is_whole_or_not_there(corpus, tiny_tokenizer, monkeypatch):
    settings = [{"text": "text.jsonl.zst", "weight": 1.0}, {"text": "gone.jsonl", "weight": 1.0}]
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        make(corpus / "a", tiny_tokenizer, settings=settings)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trainers.data.packing.pq.write_table", full)
        with pytest.raises(OSError, match="No space left"):
            make(corpus / "a", tiny_tokenizer)
    assert [path.name for path in corpus.iterdir()] == ["text.jsonl.zst"]
    manifest = make(corpus / "a", tiny_tokenizer)
    # The same again is there already; something else is not overwritten.
    assert make(corpus / "a", tiny_tokenizer) == manifest
    with pytest.raises(ValueError, match="exists and holds something else"):
        make(corpus / "a", tiny_tokenizer, seed=1)


def test_what_is_wrong_with_a_packed_folder_is_said(corpus, tiny_tokenizer):
    make(corpus / "a", tiny_tokenizer)
    file = corpus / "a" / "rows-00000.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=f"has {len(content) - 10} bytes, but {len(content)} were written"):
        load_packed(corpus / "a")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="rows-00000.parquet is gone"):
        load_packed(corpus / "a")
    with pytest.raises(FileNotFoundError, match="Make it with `hf-rad pack`"):
        load_packed(corpus / "b")
    file.write_bytes(content)
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["unheard"])
    with pytest.raises(ValueError, match="tokenizer of acme/teacher, whose vocabulary is not"):
        load_packed(corpus / "a", other)


def test_of_a_conversation_the_assistants_tokens_count(corpus, tiny_tokenizer):
    tokens, counted = chat_tokens(tiny_tokenizer, CHAT)
    words = tiny_tokenizer.convert_ids_to_tokens([t for t, c in zip(tokens, counted, strict=True) if c])
    assert words == ["the", "key", "is", "7", "</s>", "stone", "</s>"]
    (corpus / "chat.jsonl").write_text("\n".join(json.dumps({"messages": CHAT}) for _ in range(50)))
    settings = [{"text": "chat.jsonl", "weight": 1.0, "field": "messages"}, {"text": "text.jsonl.zst", "weight": 1.0}]
    assert make(corpus / "a", tiny_tokenizer, settings=settings).masked
    batch = DocumentCollator()([load_packed(corpus / "a")[i] for i in range(3)])
    starts = batch["position_ids"] == 0
    uncounted = batch["labels"] == -100
    assert (uncounted & starts).sum() == starts.sum() < uncounted.sum()
    marks = tiny_tokenizer.convert_tokens_to_ids(["what", "user"])
    assert all((batch["labels"] != mark).all() and (batch["input_ids"] == mark).any() for mark in marks)
    unlike = tiny_tokenizer.chat_template.replace("message['content']", "message['content'] ~ messages|length")
    tiny_tokenizer.chat_template = unlike
    with pytest.raises(ValueError, match="renders earlier messages differently"):
        chat_tokens(tiny_tokenizer, CHAT)


def make_trainer(teacher, tokenizer, folder, rows, stage, **settings) -> RadDistillationTrainer:
    torch.manual_seed(0)
    shape = TeacherShape.from_config(teacher.config, "test/teacher")
    student = convert(teacher, HeadMap(shape, [[], [1], [0, 1, 2, 3]]))
    defaults = {
        "per_device_train_batch_size": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 2,
    }
    args = RadDistillationConfig(str(folder), stage=stage, logging_steps=1, save_strategy="no", **defaults, **settings)
    return RadDistillationTrainer(student, teacher, args, rows, processing_class=tokenizer)


@pytest.mark.parametrize("stage", ["alignment", "distillation"])
def test_documents_of_a_row_do_not_see_each_other(tiny_llama, tiny_tokenizer, tmp_path, stage):
    documents = [torch.randint(4, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 9, 10)]
    together = Dataset.from_dict({"input_ids": [sum(documents, [])], "seq_lengths": [[5, 9, 10]]})
    trainer = make_trainer(tiny_llama, tiny_tokenizer, tmp_path, together, stage)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert isinstance(trainer.data_collator, DocumentCollator) and "attention_mask" not in batch
    total = trainer.compute_loss(trainer.model, dict(batch)) * (5 + 9 + 10 - 3)
    apart = 0.0
    for document in documents:
        row = {"input_ids": torch.tensor([document]), "labels": torch.tensor([document])}
        apart = apart + trainer.compute_loss(trainer.model, row) * (len(document) - 1)
    torch.testing.assert_close(total, apart, rtol=1e-5, atol=1e-5)
    # Without isolation the rest of the row would be seen, and the loss another one.
    joined = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    assert (trainer.compute_loss(trainer.model, joined) * (5 + 9 + 10 - 3) - total).abs() > 1e-3


def test_training_reads_a_packed_folder(corpus, tiny_llama, tiny_tokenizer):
    make(corpus / "a", tiny_tokenizer)
    rows = load_packed(corpus / "a", tiny_tokenizer)
    trainer = make_trainer(tiny_llama, tiny_tokenizer, corpus / "run", rows, "alignment")
    trainer.train()
    assert trainer.state.num_input_tokens_seen == 2 * 2 * 192


def test_pack_and_distill_from_the_command_line(corpus, tiny_llama, tiny_tokenizer):
    tiny_llama.save_pretrained("teacher")
    tiny_tokenizer.save_pretrained("teacher")
    words = "pack teacher --out packed --length 192 --tokens 2000 --source text.jsonl.zst 3 --probe json 1 -q"
    assert main(words.split()) == 0
    manifest = Manifest.load("packed")
    assert [source["weight"] for source in manifest.sources] == [3.0, 1.0] and manifest.tokenizer == "teacher"
    torch.manual_seed(0)
    head_map = HeadMap(TeacherShape.from_config(tiny_llama.config, "test/teacher"), [[], [1], [2]])
    convert(tiny_llama, head_map).save_pretrained("student")
    tiny_tokenizer.save_pretrained("student")
    head_map.save("student/rad/head_map.json")
    words = (
        "distill --model_name_or_path student --teacher_model_name_or_path teacher --packed packed --stage alignment"
    )
    words += " --max_steps 2 --per_device_train_batch_size 2 --bf16 false --report_to none --output_dir run"
    assert main(words.split()) == 0
    training = json.loads((corpus / "run" / "rad" / "training.json").read_text())
    assert training["stages"][-1]["tokens"] == 2 * 2 * 192
    assert training["stages"][-1]["probes"] == [{"name": "kv", "format": "json"}]
    assert RadHybridForCausalLM.from_pretrained("run").config.kept_heads == [[], [1], [2]]


def test_the_steps_of_a_recipe_read_on_where_the_one_before_ended(corpus, tiny_llama, tiny_tokenizer):
    tiny_llama.save_pretrained("teacher")
    tiny_tokenizer.save_pretrained("teacher")
    manifest = make(corpus / "packed", tiny_tokenizer)
    recipe = {
        "teacher": "teacher",
        "data": {"packed": "packed", "length": 192},
        "calibrate": {"tokens": 2 * 192},
        "align": {"tokens": 3 * 192},
        "distill": {"tokens": 8 * 192},
    }
    workshop = Workshop(Recipe.from_dict(recipe), progress=False)
    rows = load_packed("packed")["input_ids"][:]
    assert workshop.rows(2 * 192, "calibration")["input_ids"][:] == rows[:2]
    assert workshop.rows(3 * 192, "alignment")["input_ids"][:] == rows[2:5]
    assert workshop.rows(8 * 192, "distillation")["input_ids"][:] == [*rows[5:11], *rows[:2]]
    assert workshop.trained_probes == manifest.probes
    make(corpus / "longer", tiny_tokenizer, length=400)
    recipe["long"] = {"tokens": 800, "length": 400, "packed": "longer"}
    recipe = Recipe.from_dict(recipe)
    rows = load_packed("longer")["input_ids"][:2]
    assert Workshop(recipe, progress=False).rows(800, "long", recipe.long)["input_ids"][:] == rows
    recipe = {**recipe.to_dict(), "long": {}}
    recipe["data"]["length"] = 100
    with pytest.raises(ValueError, match="rows of packed have 192 tokens. Write length: 192"):
        Workshop(Recipe.from_dict(recipe), progress=False).rows(100, "alignment")
    shutil.rmtree("packed")
    with pytest.raises(FileNotFoundError, match="packed holds no packed data"):
        Workshop(Recipe.from_dict(recipe), progress=False).rows(100, "alignment")


def test_sources_that_cannot_be_are_named():
    for settings in ({"weight": 1.0}, {"text": "a", "probe": {"name": "kv"}}, {"text": "a", "wait": 1.0}):
        with pytest.raises(ValueError, match="exactly one of `text` and `probe`"):
            source_from_settings(settings)
    for data, message in [
        ({"sources": [{"text": "a"}], "text": "b"}, "data.sources excludes"),
        ({"packed": "a", "probes": [{"name": "kv"}]}, "data.packed excludes"),
    ]:
        with pytest.raises(ValueError, match=message):
            Recipe.from_dict({"teacher": "t", "data": data})


def test_packed_rows_in_memory_tell_their_documents_too(tiny_tokenizer):
    rows = packed_dataset(tiny_tokenizer, [Source(["house river", "stone"] * 9, 1.0)], 8, 16, progress=False)
    assert rows["seq_lengths"][:] == [[3, 2, 3], [2, 3, 2, 1]]
