"""
A teacher's likeliest next tokens, stored beside packed rows, so that students train without the teacher in memory.

    hf-rad teach smollm2 --packed packed --out taught --top-k 32
    hf-rad distill --packed packed --teacher_logits taught ...

For each position the k likeliest tokens and their log-probabilities; all other tokens are one more event, the tail, whose
probability is what is missing to 1. A run that is cut off goes on with the next file.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from trainers.data.packing import DocumentCollator, Manifest, load_packed
from trainers.families import logits_scale
from trainers.files import atomic_path, read_json, write_json


TAUGHT = "taught.json"
TOKENS_PER_FILE = 2**18
PARQUET = {"compression": "zstd", "compression_level": 3, "use_dictionary": False}


@dataclass(frozen=True)
class Taught:
    """
    What a folder of stored teacher outputs holds.

    Args:
        teacher (`str`): name of the teacher.
        vocab_size (`int`): size of its head.
        digest (`str`): digest of the packed rows that it read.
        top_k (`int`): tokens of each position.
        files (`int`): number of files.
    """

    teacher: str
    vocab_size: int
    digest: str
    top_k: int
    files: int

    @classmethod
    def load(cls, folder: str | Path) -> "Taught":
        """
        Reads what a folder holds.

        Raises:
            `FileNotFoundError`: when it holds no teacher outputs.
        """
        path = Path(folder) / TAUGHT
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no teacher outputs: there is no {TAUGHT}. Make it with `hf-rad teach`."
            )
        return cls(**read_json(path))


def teach(
    folder: str | Path,
    packed: str | Path,
    teacher: PreTrainedModel,
    name: str,
    top_k: int = 32,
    batch_size: int = 8,
    progress: bool = True,
) -> Taught:
    """
    Writes a teacher's likeliest tokens at every position of packed rows; documents do not see each other.

    Args:
        folder (`str` or `Path`):
            Folder to write; it appears once it is whole.
        packed (`str` or `Path`):
            Folder of `hf-rad pack`.
        teacher ([`~transformers.PreTrainedModel`]):
            The teacher, in eval mode.
        name (`str`):
            Its name.
        top_k (`int`, *optional*, defaults to 32):
            Tokens of each position.
        batch_size (`int`, *optional*, defaults to 8):
            Rows read at once.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`Taught`]: what was written.

    Raises:
        `ValueError`: when the folder holds other outputs.
    """
    folder, manifest, rows = Path(folder), Manifest.load(packed), load_packed(packed)
    at_once = max(1, TOKENS_PER_FILE // manifest.length)
    count = -(-len(rows) // at_once)
    taught = Taught(name, teacher.get_output_embeddings().weight.shape[0], manifest.digest, top_k, count)
    if folder.exists():
        if Taught.load(folder) != taught:
            raise ValueError(f"{folder} holds other teacher outputs; name another folder or remove it.")
        return taught
    key = hashlib.sha256(json.dumps(asdict(taught)).encode()).hexdigest()[:8]
    partial = folder.with_name(f".{folder.name}.{key}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(rows), unit="row", desc="teaching", disable=not progress) as bar:
        for number in range(count):
            span, file = range(number * at_once, min(len(rows), (number + 1) * at_once)), _file(partial, number)
            if not file.is_file():
                with atomic_path(file) as temporary:
                    pq.write_table(_likeliest(teacher, rows.select(span), top_k, batch_size), temporary, **PARQUET)
            bar.update(len(span))
    write_json(partial / TAUGHT, asdict(taught))
    shutil.move(partial, folder)
    return taught


def _file(folder: Path, number: int) -> Path:
    return folder / f"top-{number:05d}.parquet"


@torch.no_grad()
def _likeliest(teacher: PreTrainedModel, rows: Dataset, top_k: int, batch_size: int) -> pa.Table:
    head, collate = teacher.get_output_embeddings(), DocumentCollator()
    kind = np.uint16 if head.weight.shape[0] <= 2**16 else np.uint32
    ids, log_probs = [], []
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(len(rows), start + batch_size))])
        inputs = {name: batch[name].to(teacher.device) for name in ("input_ids", "position_ids")}
        hidden = teacher.model(**inputs, use_cache=False).last_hidden_state * logits_scale(teacher.config)
        for row in hidden:
            top = [head(part).float().log_softmax(-1).topk(top_k) for part in row.split(256)]  # [256, k] each
            ids.append(torch.cat([part.indices for part in top]).cpu().numpy().astype(kind).ravel())
            log_probs.append(torch.cat([part.values for part in top]).cpu().numpy().astype(np.float16).ravel())
    columns = {"teacher_ids": np.stack(ids), "teacher_log_probs": np.stack(log_probs)}
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        for name, values in columns.items()
    }
    return pa.table(lists)


def load_taught(packed: Dataset, digest: str, folder: str | Path) -> Dataset:
    """
    Puts stored teacher outputs beside the rows that they belong to.

    Args:
        packed ([`~datasets.Dataset`]):
            The rows, as [`~trainers.data.packing.load_packed`] gives them.
        digest (`str`):
            Their manifest's digest.
        folder (`str` or `Path`):
            Folder of `hf-rad teach`.

    Returns:
        [`~datasets.Dataset`]: the rows with `teacher_ids` and `teacher_log_probs`, each `[T k]` flat.

    Raises:
        `FileNotFoundError`: when a file is missing.
        `ValueError`: when the outputs are those of other rows.
    """
    taught, folder = Taught.load(folder), Path(folder)
    if taught.digest != digest:
        raise ValueError(f"{folder} was taught on other packed rows. Run `hf-rad teach` on these.")
    files = [_file(folder, number) for number in range(taught.files)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is gone. Restore it, or run `hf-rad teach` anew.")
    return concatenate_datasets([packed, Dataset.from_parquet([str(file) for file in files])], axis=1)
