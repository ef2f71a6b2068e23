"""
Packed data on disk: a mixture tokenised once, as a folder of Parquet files and a manifest.

    folder/rows-00000.parquet ...   input_ids, seq_lengths (tokens of each document), completion_mask (what counts)
    folder/manifest.json            length, rows, tokenizer, sources, seed, digest of the rows, digest of each file

The same sources and seed give the same bytes. Training reads rows without tokenising anything, a resumed run skips to
its row at once, and `datasets.load_dataset` or the Hub take the folder as it is.

    hf-rad pack smollm2 --out packed --length 1024 --tokens 50_000_000 --source corpus.jsonl.zst 0.8 --probe json 0.2
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trainers.data import Row, Source, mixed_rows
from trainers.files import read_json, sha256, write_json


MANIFEST = "manifest.json"
FORMAT_VERSION = 1
# What `trainers.distillation.teaching` stores of a teacher, beside the rows.
TEACHER_COLUMNS = ("teacher_ids", "teacher_log_probs")
TOKENS_PER_FILE = 2**23
# The strongest level takes about as long as the tokenising; one page a file lets it see all of it.
PARQUET = {"compression": "zstd", "compression_level": 19, "use_dictionary": False, "data_page_size": 2**28}


@dataclass(frozen=True)
class Manifest:
    """
    What a packed folder holds.

    Args:
        length (`int`):
            Tokens of a row.
        rows (`int`):
            Number of rows.
        seed (`int`):
            Seed of the mixture.
        vocabulary (`str`):
            Digest of the tokenizer's vocabulary, as [`vocabulary_digest`] gives it.
        tokenizer (`str`):
            Name of the teacher whose tokenizer it is.
        sources (`list[dict]`):
            Settings of each source.
        given (`list[dict]`):
            `tokens` and `documents` that each source gave.
        digest (`str`):
            Digest of all rows, whatever the files' format.
        masked (`bool`):
            Whether there are tokens that do not count in a loss.
        files (`list[dict]`):
            `name`, `bytes` and `sha256` of each file.
        format_version (`int`, *optional*, defaults to 1):
            Version of this layout.
    """

    length: int
    rows: int
    seed: int
    vocabulary: str
    tokenizer: str
    sources: list[dict]
    given: list[dict]
    digest: str
    masked: bool
    files: list[dict]
    format_version: int = FORMAT_VERSION

    @property
    def probes(self) -> list[dict]:
        """Settings of the probes among the sources."""
        return [source["probe"] for source in self.sources if "probe" in source]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """
        Reads the manifest of a folder.

        Raises:
            `FileNotFoundError`: when the folder holds no packed data.
            `ValueError`: when a newer version wrote it.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no packed data: there is no {MANIFEST} in it. Make it with `hf-rad pack`."
            )
        values = read_json(path)
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {values.get('format_version')}, this hf-rad reads {FORMAT_VERSION}. "
                "Update hf-rad or pack anew."
            )
        return cls(**values)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a tokenizer's tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def pack(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    settings: list[dict],
    length: int,
    num_tokens: int,
    seed: int = 0,
    teacher: str = "",
    progress: bool = True,
) -> Manifest:
    """
    Packs a mixture into a folder, which appears once it is whole.

    Args:
        folder (`str` or `Path`):
            Folder to write. Where it holds the same mixture already, nothing is done.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        sources (`list[Source]`):
            The mixture.
        settings (`list[dict]`):
            The sources as plain values, for the manifest.
        length (`int`):
            Tokens of a row.
        num_tokens (`int`):
            Least number of tokens; the last row is completed.
        seed (`int`, *optional*, defaults to 0):
            Decides the windows of long documents.
        teacher (`str`, *optional*):
            Name of the teacher, for the manifest.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`Manifest`]: what was written.

    Raises:
        `ValueError`: when the folder holds something else, or the sources cannot be mixed.
    """
    folder = Path(folder)
    wanted = {"length": length, "seed": seed, "vocabulary": vocabulary_digest(tokenizer), "sources": settings}
    wanted["rows"] = -(-num_tokens // length)
    if folder.exists() and any(folder.iterdir()):
        there = asdict(Manifest.load(folder)) if (folder / MANIFEST).is_file() else {}
        if {key: there.get(key) for key in wanted} != wanted:
            raise ValueError(f"{folder} exists and holds something else; name another folder or remove it.")
        return Manifest(**there)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tally: list[dict] = []
        rows = mixed_rows(tokenizer, sources, length, num_tokens, seed, progress, tally)
        written = _write_files(partial, rows, length, len(tokenizer))
        manifest = Manifest(**wanted, tokenizer=teacher, given=tally, **written)
        write_json(partial / MANIFEST, asdict(manifest))
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_files(folder: Path, rows: Iterable[Row], length: int, vocabulary: int) -> dict:
    """Writes rows file by file; returns `digest`, `masked` and `files` of the manifest."""
    kind = np.uint16 if vocabulary <= 2**16 else np.uint32
    digest, masked, files, block = hashlib.sha256(), False, [], []

    def flush():
        tokens = np.array([row.tokens for row in block], dtype=kind)
        counted = np.array([row.counted for row in block])
        columns = {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), length),
            "seq_lengths": pa.array([row.lengths for row in block], type=pa.list_(pa.int32())),
            "completion_mask": pa.FixedSizeListArray.from_arrays(pa.array(counted.ravel()), length),
        }
        file = folder / f"rows-{len(files):05d}.parquet"
        pq.write_table(pa.table(columns), file, **PARQUET)
        files.append({"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)})
        block.clear()

    for row in rows:
        digest.update(np.array(row.tokens, dtype="<u4").tobytes() + np.array(row.lengths, dtype="<u4").tobytes())
        digest.update(np.packbits(row.counted).tobytes())
        masked = masked or not all(row.counted)
        block.append(row)
        if len(block) * length >= TOKENS_PER_FILE:
            flush()
    if block:
        flush()
    return {"digest": digest.hexdigest(), "masked": masked, "files": files}


def load_packed(folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
    """
    Opens a packed folder as a map-style data set; rows are read from disk when they are asked for.

    Args:
        folder (`str` or `Path`):
            The folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer that training will use; its vocabulary is compared with that of the rows.

    Returns:
        [`~datasets.Dataset`]: columns `input_ids`, `seq_lengths` and, where not every token counts, `completion_mask`.

    Raises:
        `FileNotFoundError`: when the manifest or a file is missing.
        `ValueError`: when a file was cut short, or the rows are of another vocabulary.
    """
    folder, manifest = Path(folder), Manifest.load(folder)
    for file in manifest.files:
        path = folder / file["name"]
        if not path.is_file():
            raise FileNotFoundError(f"{path} is gone, which {MANIFEST} lists. Pack the data anew or restore the file.")
        if path.stat().st_size != file["bytes"]:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but {file['bytes']} were written. Copy it again or pack "
                "the data anew."
            )
    if tokenizer is not None and vocabulary_digest(tokenizer) != manifest.vocabulary:
        raise ValueError(
            f"The rows of {folder} were packed with the tokenizer of {manifest.tokenizer or 'another teacher'}, whose "
            "vocabulary is not this teacher's. Pack the data with `hf-rad pack` and this teacher."
        )
    columns = ["input_ids", "seq_lengths", *(["completion_mask"] if manifest.masked else [])]
    return Dataset.from_parquet([str(folder / file["name"]) for file in manifest.files], columns=columns)


@dataclass
class DocumentCollator:
    """
    Makes batches of packed rows in which documents are kept apart, by attention and by recurrence.

    `position_ids` start anew with every document, from which transformers' masks tell documents, and `seq_idx` numbers
    them for the recurrent heads. A document's first token is no target: nothing before it could foretell it.
    """

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`list[dict]`):
                Rows of one length, with `input_ids`, `seq_lengths`, and `completion_mask` or `labels` where not every
                token counts.

        Returns:
            `dict`: `input_ids`, `labels`, `position_ids` and `seq_idx`, each `[B, T]`; with stored teacher outputs
            also these, `[B, T, k]`.
        """
        input_ids = torch.tensor([row["input_ids"] for row in rows])  # [B, T]
        lengths = [torch.tensor(row["seq_lengths"]) for row in rows]
        position_ids = torch.stack([torch.cat([torch.arange(n) for n in row.tolist()]) for row in lengths])
        seq_idx = torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in lengths])
        labels = torch.tensor([row.get("labels", row["input_ids"]) for row in rows])
        if "completion_mask" in rows[0]:
            counted = torch.tensor([row["completion_mask"] for row in rows])
            labels = labels.masked_fill(~counted, -100)
        batch = {
            "input_ids": input_ids,
            "labels": labels.masked_fill(position_ids == 0, -100),
            "position_ids": position_ids,
            "seq_idx": seq_idx.to(torch.int32),
        }
        for name in TEACHER_COLUMNS:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows]).unflatten(1, (input_ids.shape[1], -1))
        return batch
