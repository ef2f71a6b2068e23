"""
Teachers: a Hub id, a folder or a `.gguf` file in, a causal language model and its tokenizer out.

Only safetensors are read from folders and the Hub, never pickles. A GGUF file is dequantised by transformers
(https://huggingface.co/docs/transformers/gguf) and rebuilt as an ordinary model that can be saved: as loaded it
carries a `quantization_config` that `save_pretrained` refuses, a training run's name, and float32 roundings in its
config. Whether the architecture can be converted is decided in `families`, not here.

    model, tokenizer = load_teacher("HuggingFaceTB/SmolLM2-135M-Instruct")
    model, tokenizer = load_teacher("downloads/SmolLM2-135M-Instruct.Q4_1.gguf")
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainers.files import read_json


PROVENANCE_FILE = "rad_teacher.json"


def load_teacher(
    name_or_path: str | Path,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a teacher in eval mode, and its tokenizer with a padding token.

    Args:
        name_or_path (`str` or `Path`):
            Hub id, folder (in Hub format, or with one `.gguf` file in it), or `.gguf` file.
        revision (`str`, *optional*):
            Branch, tag or commit of the Hub repository.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Precision of the weights.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the folder or repository may run.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where the model is put.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the model and its tokenizer; a tokenizer without a padding
        token pads with its end-of-sequence token.

    Raises:
        `FileNotFoundError`: when there is no such file, or the folder holds no model.
        `OSError`: when the Hub does not have it, or cannot be reached.
        `ValueError`: when it is no causal language model, quantised otherwise than by GGUF, incomplete or corrupt.
    """
    name, path = str(name_or_path), _local(name_or_path)
    with _naming(name):
        if path is not None and path.suffix == ".gguf":
            model, tokenizer = _load_gguf(path, dtype)
        else:
            options = {"revision": revision, "trust_remote_code": trust_remote_code}
            config = AutoConfig.from_pretrained(name, **options)
            _check_config(config)
            model, info = AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
            _check_complete(info)
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def teacher_identity(name_or_path: str | Path) -> str:
    """
    Returns the name under which a head map or a card speaks of a teacher, never a path.

    A folder with a `rad_teacher.json` (see `read_provenance`), and a folder of the Hub's own cache, are known by their
    Hub id; any other folder or file by its own name.
    """
    path = _local(name_or_path)
    if path is None:
        return str(name_or_path)
    provenance = read_provenance(path if path.is_dir() else path.parent)
    if provenance is not None:
        return provenance["id"]
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", path.resolve().as_posix() + "/")
    return "/".join(cached.groups()) if cached else path.resolve().name


def read_provenance(folder: str | Path) -> dict | None:
    """
    Reads `rad_teacher.json`, which says where converted weights come from.

    Returns:
        `dict` or `None`: at least `id`, the Hub id; beside it, where known, `revision`, `quantization`, `source`,
        `license`. `None` when the folder has no such file.

    Raises:
        `ValueError`: when the file is not of this form.
    """
    path = Path(folder) / PROVENANCE_FILE
    if not path.is_file():
        return None
    provenance = read_json(path, max_bytes=2**16)
    if not isinstance(provenance, dict) or not isinstance(provenance.get("id"), str):
        raise ValueError(f"{path} names no teacher: it must be an object with the Hub id as a string under `id`.")
    return provenance


def _local(name_or_path: str | Path) -> Path | None:
    """The folder or `.gguf` file that is meant, `None` for a Hub id."""
    path = Path(name_or_path).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is a file, but a teacher is a Hub id, a folder or a `.gguf` file.")
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{path} holds {len(found)} GGUF files. Name the one you mean, such as {found[0]}.")
        raise FileNotFoundError(f"{path} is no teacher: the folder has neither a config.json nor a .gguf file.")
    if path.exists():
        return path
    # A Hub id has at most one slash and no suffix of a file; everything else was meant as a path.
    if path.suffix == ".gguf" or path.is_absolute() or len(path.parts) > 2 or str(name_or_path)[:1] in "~.":
        raise FileNotFoundError(f"There is no teacher at {path}. Give a Hub id, a folder or a `.gguf` file.")
    return None


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _check_gguf(path)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded, info = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, output_loading_info=True)
    _check_complete(info)
    config = type(loaded.config).from_dict(_clean(loaded.config.to_dict()))
    model = type(loaded).from_pretrained(None, config=config, state_dict=loaded.state_dict(), dtype=dtype)
    model.config.name_or_path = str(path)
    tokenizer.model_max_length = config.max_position_embeddings
    # transformers 5.17 swaps the names of these two for byte-level tokenizers.
    tokenizer.bos_token, tokenizer.eos_token = (
        None if token is None else tokenizer.convert_ids_to_tokens(token)
        for token in (config.bos_token_id, config.eos_token_id)
    )
    return model, tokenizer


def _clean(config: dict) -> dict:
    """Drops what only the GGUF loader needs; gives float32 numbers back the decimals that they were rounded from."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    return {
        key: float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value
        for key, value in config.items()
        if key not in dropped
    }


def _check_gguf(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} does not begin as a GGUF file does.")
    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is cut off or corrupt ({error}). Download it again.") from error
    if "tokenizer.ggml.tokens" not in fields:
        raise ValueError(f"{path} holds no tokenizer. Take a GGUF file of a whole model.")


def _check_config(config: PreTrainedConfig) -> None:
    values = config.to_dict()
    remote = values.get("auto_map") or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in remote:
        raise ValueError(f"its architecture, {config.model_type}, is no causal language model.")
    if "quantization_config" in values:
        method = values["quantization_config"].get("quant_method", "an unnamed method")
        raise ValueError(f"its weights are quantised ({method}). Take the unquantised model or a GGUF file of it.")


def _check_complete(info: dict) -> None:
    """Refuses a checkpoint that lacks tensors: transformers would fill them with random numbers."""
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise ValueError(
            f"the checkpoint lacks {len(lacking)} of the model's tensors or has them in other shapes, {lacking[0]} "
            "first. Download it again, or correct its config.json."
        )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Names the teacher in front of the first sentences of whatever stops it from being loaded."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:800]
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"The teacher {name} cannot be loaded: {reason}") from error
