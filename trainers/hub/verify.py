"""
Checks of a folder before it is published, or of a download before its code may run: each failure is one clear error.

Everything here reads the folder as data. No code of it is imported, no pickle is opened, and sizes are limited.

    verify("runs/demo/published")
"""

import getpass
import os
import re
import socket
import tempfile
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, get_token
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from modeling_rad_hybrid import AUTO_MAP, RadHybridConfig, RadHybridForCausalLM
from trainers.files import read_json, sha256
from trainers.heads.head_map import HeadMap
from trainers.hub.code_rules import code_problems, relative_imports


REQUIRED = ("README.md", "LICENSE", "NOTICE", "config.json", "generation_config.json", "tokenizer_config.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIG_BYTES = 2**20
CARD_BYTES = 2**20
CODE_BYTES = 2**20
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
HOME = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|mnt|media|scratch|tmp)/[\w.@+-]+|[A-Za-z]:\\Users\\[\w.@+-]+")
# Names so common that they say nothing of a person, and occur as words of their own.
COMMON_NAMES = {"root", "user", "admin", "ubuntu", "debian", "home", "test", "localhost", "runner", "docker", "jovyan"}


def verify(folder: str | os.PathLike, progress: bool = False) -> None:
    """
    Checks a staged folder.

    Args:
        folder (`str` or `os.PathLike`):
            Folder to check.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar over the weights.

    Raises:
        `FileNotFoundError`: when the folder or a file that a student needs is missing.
        `ValueError`: at the first thing that is wrong; the message names the file, what is wrong and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    check_files(folder)
    config = check_config(folder)
    check_code(folder)
    check_weights(folder, config, progress)
    head_map = check_head_map(folder, config)
    check_card(folder, head_map)
    check_privacy(folder)


def check_files(folder: Path) -> None:
    """Every needed file is there; none is a link or a pickle."""
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink():
            raise ValueError(f"{name} is a link; a repository holds only plain files. Copy what it points to.")
        if file.suffix.lower() in PICKLES:
            raise ValueError(f"{name} could run code when it is loaded; publish weights as safetensors only.")
    missing = [name for name in (*REQUIRED, "rad/head_map.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; stage the student again.")


def check_config(folder: Path) -> RadHybridConfig:
    """config.json is a valid configuration of ours, and its `auto_map` names the files beside it, nobody else's."""
    content = read_json(folder / "config.json", max_bytes=CONFIG_BYTES)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != RadHybridConfig.model_type:
        raise ValueError(f"config.json has the model_type {kind!r}, not {RadHybridConfig.model_type!r}.")
    if content.get("auto_map") != AUTO_MAP:
        raise ValueError(
            f"auto_map of config.json is {content.get('auto_map')}, not {AUTO_MAP}: AutoModel would fail, or run "
            "somebody else's code."
        )
    try:
        return RadHybridConfig.from_dict(content)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"config.json does not load: {' '.join(str(error).split())}") from error


def check_code(folder: Path) -> None:
    """The Python files are exactly those that `auto_map` reaches, and keep the rules of remote code."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*.py")}
    wanted, queue = set(), [f"{reference.split('.')[0]}.py" for reference in AUTO_MAP.values()]
    while queue:
        name = queue.pop()
        if name in wanted:
            continue
        wanted.add(name)
        if not (folder / name).is_file():
            raise FileNotFoundError(f"The code file {name} is missing: the model could not be loaded.")
        source = _read_text(folder / name, CODE_BYTES)
        for problem in code_problems(source):
            raise ValueError(f"{name}, {problem}")
        queue += [f"{module}.py" for module in relative_imports(source)]
    if found != wanted:
        raise ValueError(f"{', '.join(sorted(found - wanted))} is not imported by the model; remove it.")


def check_weights(folder: Path, config: RadHybridConfig, progress: bool = False) -> None:
    """Every tensor of the model is there once, in its shape, and finite; nothing else is."""
    with torch.device("meta"):
        model = RadHybridForCausalLM(config)
    # A tied tensor is stored once, under the name that the other is tied to.
    tied = set(model.all_tied_weights_keys)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = set(wanted) - tied
    for file in tqdm(weight_files(folder), desc="Checking weights", disable=not progress, leave=False):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    _check_tensor(file.name, name, tensors, wanted)
                    missing.discard(name)
        except SafetensorError as error:
            raise ValueError(f"{file.name} is cut off or corrupt ({error}).") from error
    if missing:
        raise ValueError(f"The weights lack {len(missing)} tensors of the model, {min(missing)} first.")


def weight_files(folder: Path) -> list[Path]:
    """
    The safetensors files that transformers would load.

    Raises:
        `FileNotFoundError`: when there is none, or one that the index names is missing.
        `ValueError`: when there are others beside them, or the index reaches out of the folder.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors")}
    if index.is_file():
        content = read_json(index)
        names = set(content.get("weight_map", {}).values()) if isinstance(content, dict) else set()
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError(f"{index.name} must name files beside it, not {sorted(map(str, names))}.")
    else:
        names = {single.name}
    for name in sorted(names - found):
        raise FileNotFoundError(f"The weights lack the file {name}.")
    if found != names:
        # transformers prefers model.safetensors to shards: the stale one would be loaded without a word.
        raise ValueError(f"{', '.join(sorted(found - names))} does not belong to the weights; remove it.")
    return [folder / name for name in sorted(names)]


def check_head_map(folder: Path, config: RadHybridConfig) -> HeadMap:
    """rad/head_map.json is the map that config.json was made from, and the scores beside it are those it names."""
    head_map = HeadMap.load(folder / "rad" / "head_map.json")
    try:
        head_map.check_teacher(config, "config.json")
    except ValueError as error:
        raise ValueError(f"rad/head_map.json: {error}") from error
    if head_map.kept_heads != [list(heads) for heads in config.kept_heads]:
        raise ValueError("rad/head_map.json keeps other heads than config.json.")
    origin = config.to_dict().get("head_map")
    if origin is not None and any(head_map.to_dict().get(key) != value for key, value in origin.items()):
        raise ValueError("head_map of config.json tells of another map than rad/head_map.json.")
    scores = folder / "rad" / "scores.json"
    if scores.is_file() and head_map.scores_sha256 not in (None, sha256(scores)):
        raise ValueError("rad/scores.json is not the file that rad/head_map.json was made from: its digest differs.")
    return head_map


def check_card(folder: Path, head_map: HeadMap) -> None:
    """The card and the notice name the teacher and its licence."""
    text = _read_text(folder / "README.md", CARD_BYTES)
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"The metadata of README.md cannot be read: {' '.join(str(error).split())}") from error
    if data.base_model != head_map.teacher.id:
        raise ValueError(f"base_model of README.md is {data.base_model!r}; the teacher is {head_map.teacher.id!r}.")
    if not data.license:
        raise ValueError("README.md names no licence; a student is under its teacher's.")
    notice = _read_text(folder / "NOTICE", CARD_BYTES)
    for word in (head_map.teacher.id, str(data.license)):
        if word not in notice:
            raise ValueError(f"NOTICE does not name {word}.")


def check_privacy(folder: Path) -> None:
    """No text file names a path, a user or a machine of its maker's, or holds a token."""
    paths, words = _secrets(folder)
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix in (".safetensors", ".png"):
            continue
        name, text = file.relative_to(folder).as_posix(), file.read_text(encoding="utf-8", errors="replace")
        token = get_token()
        if TOKEN.search(text) or (token and len(token) > 8 and token in text):
            raise ValueError(f"{name} holds an access token. Revoke it, and stage the student again without it.")
        # A vocabulary may hold any word, and short paths that are common in the text it was made from.
        vocabulary = file.name in VOCABULARIES
        for path in paths:
            if path in text and not (vocabulary and path.count("/") < 3):
                raise ValueError(f"{name} names {path}, a path of this machine.")
        if vocabulary or file.name == "LICENSE" or file.suffix == ".py":
            continue
        for match in HOME.finditer(text):
            raise ValueError(f"{name} names {match[0]}, a path of some machine.")
        for word in words:
            if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text):
                raise ValueError(f"{name} names {word}, a user or host of this machine.")


def _check_tensor(file: str, name: str, tensors, wanted: dict[str, tuple[int, ...]]) -> None:
    if name not in wanted:
        raise ValueError(f"{file} holds the tensor {name}, which the model does not have.")
    stored = tensors.get_slice(name)
    shape = tuple(stored.get_shape())
    if shape != wanted[name]:
        raise ValueError(f"{name} in {file} has the shape {shape}; the configuration asks for {wanted[name]}.")
    tensor = tensors.get_tensor(name)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} in {file} is {tensor.dtype}; weights must be float32, bfloat16 or float16.")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} in {file} holds NaN or infinite values; train again from a sound checkpoint.")


def _secrets(folder: Path) -> tuple[list[str], list[str]]:
    """Paths and words that would tell where a folder was made."""
    here = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), folder.resolve().parent]
    paths = {f"{path}/" for path in map(str, here) if path != "/"}
    names = {getpass.getuser(), socket.gethostname()}
    return sorted(paths), sorted(name for name in names if len(name) > 3 and name.lower() not in COMMON_NAMES)


def _read_text(file: Path, max_bytes: int) -> str:
    if file.stat().st_size > max_bytes:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, more than the {max_bytes} allowed.")
    return file.read_text(encoding="utf-8")
