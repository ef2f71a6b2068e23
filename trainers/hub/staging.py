"""
Staging: a student becomes a folder that is a Hub repository, complete and with nothing of this machine in it.

    README.md  LICENSE  NOTICE                    card, licence of the code, licence of the weights
    config.json  *.py                             configuration with `auto_map`, and the code that it names
    model*.safetensors  generation_config.json    weights as the student was saved
    tokenizer files, chat template
    rad/head_map.json  rad/scores.json  rad/heads.png  rad/eval.json
    .eval_results/hf-rad.yaml                     results on public benchmarks, if there are any

config.json also says where the kept heads come from (`head_map`), so that whoever fine-tunes the student and saves it
carries that on; a folder saved by such a run can be staged again.

The folder is built under a temporary name and moved into place when it is whole.

    stage("runs/demo/distillation", "runs/demo/published", report="runs/demo/eval.json", teacher="smollm2-folder")
"""

import copy
import importlib.metadata
import os
import re
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_rad_hybrid
from modeling_rad_hybrid import AUTO_MAP, RadHybridConfig, RadHybridForCausalLM
from trainers.files import read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.heads.head_scores import HeadScores
from trainers.hub.model_card import eval_results, render_card, without_paths
from trainers.plots import score_heat_map
from trainers.teachers import read_provenance


WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
# Written by transformers about where a tokenizer was loaded from; of no use elsewhere.
TOKENIZER_LEFTOVERS = ("name_or_path", "is_local", "local_files_only")
NOTICE = """\
{model_name}

Weights (*.safetensors), tokenizer and generation settings derive from
{teacher}{revision} (https://huggingface.co/{teacher})
and are under its licence: {license}.{built_with}

The Python files are part of hf-rad and under the Apache License 2.0, see LICENSE.
Method: https://huggingface.co/papers/2602.11374
"""


def stage(
    student: str | os.PathLike | RadHybridForCausalLM,
    out_dir: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: dict | str | os.PathLike | None = None,
    head_map: HeadMap | str | os.PathLike | None = None,
    scores: HeadScores | str | os.PathLike | None = None,
    teacher: str | os.PathLike | None = None,
    license: str | None = None,
    datasets: tuple[str, ...] = (),
    language: tuple[str, ...] = ("en",),
    model_name: str | None = None,
) -> Path:
    """
    Writes the folder that is to be published.

    Args:
        student (`str`, `os.PathLike` or [`~modeling_rad_hybrid.RadHybridForCausalLM`]):
            Folder of a student, or the model itself.
        out_dir (`str` or `os.PathLike`):
            Folder to write. One that is there and was staged before is replaced.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; by default that of the student's folder.
        report (`dict`, `str` or `os.PathLike`, *optional*):
            `eval.json` or its content. Without it the card says that nothing was measured.
        head_map ([`~trainers.heads.head_map.HeadMap`], `str` or `os.PathLike`, *optional*):
            Head map; by default `rad/head_map.json` of the student's folder, else what its config.json says of it.
        scores ([`~trainers.heads.head_scoring.HeadScores`], `str` or `os.PathLike`, *optional*):
            Scores behind the map; by default `rad/scores.json` of the student's folder, if it is there.
        teacher (`str` or `os.PathLike`, *optional*):
            Folder, file or Hub id beside which the teacher's licence is looked up; by default the id in the head map.
        license (`str`, *optional*):
            Identifier of the teacher's licence; by default as the teacher's folder or repository says.
        datasets (`tuple[str, ...]`, *optional*):
            Hub ids of the training data, for the card.
        language (`tuple[str, ...]`, *optional*, defaults to `("en",)`):
            Codes of the languages, for the card.
        model_name (`str`, *optional*):
            Title of the card; by default the teacher's name, `-RAD` and the number of kept heads.

    Returns:
        `Path`: the folder.

    Raises:
        `FileNotFoundError`: when the student's folder has no weights, tokenizer or head map.
        `ValueError`: when the map is not the student's, the licence is unknown, or `out_dir` is some other folder.
    """
    out_dir = Path(out_dir)
    _check_target(out_dir, student)
    folder = None if isinstance(student, RadHybridForCausalLM) else _student_folder(student)
    head_map = _load_head_map(head_map, folder)
    scores = _load_scores(scores, folder)
    report = read_json(report) if isinstance(report, (str, os.PathLike)) else report
    provenance = _provenance(teacher)
    license = license or find_license(teacher or head_map.teacher.id, provenance)
    model_name = model_name or f"{head_map.teacher.id.split('/')[-1]}-RAD{head_map.num_kept}"

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as work:
        work = Path(work) / out_dir.name
        work.mkdir()
        config = _write_model(student, folder, work, head_map)
        _write_tokenizer(tokenizer, folder, work)
        for file in code_files():
            shutil.copyfile(file, work / file.name)
        _write_rad(work / "rad", head_map, scores, report)
        card = render_card(
            head_map,
            config,
            report,
            license=license,
            model_name=model_name,
            repo=out_dir.name,
            provenance=provenance,
            datasets=tuple(datasets),
            language=tuple(language),
            scores=scores is not None,
        )
        (work / "README.md").write_text(str(card), encoding="utf-8")
        _write_licence(work, head_map, license, model_name)
        _replace(work, out_dir)
    return out_dir


def code_files() -> list[Path]:
    """The code that ships with a student: the modules that `auto_map` names, and all that they import."""
    package = Path(modeling_rad_hybrid.__file__).parent
    modules = {reference.split(".")[0] for reference in AUTO_MAP.values()}
    named = [package / f"{module}.py" for module in sorted(modules)]
    imported = {Path(file) for module in named for file in get_relative_import_files(module)}
    return sorted({*named, *imported})


def find_license(teacher: str | os.PathLike, provenance: dict | None = None) -> str:
    """
    Looks up a teacher's licence: in its `rad_teacher.json`, in its folder's card, in its card on the Hub.

    Raises:
        `ValueError`: when none of them names one.
    """
    if provenance and provenance.get("license"):
        return provenance["license"]
    card, reason = Path(teacher) / "README.md", "its card names none"
    try:
        if card.is_file() or not Path(teacher).exists():
            data = ModelCard.load(card if card.is_file() else str(teacher)).data
            # Many licences of their own are called `other` and have their name in a field beside it.
            name = data.to_dict().get("license_name") if data.license == "other" else data.license
            if name:
                return name
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"its card cannot be read ({type(error).__name__})"
    raise ValueError(
        f"The licence of the teacher {Path(teacher).name} is unknown: {reason}. A student is published under its "
        "teacher's licence; name it, as in `license='apache-2.0'`."
    )


def _student_folder(student: str | os.PathLike) -> Path:
    folder = Path(student)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no student: it has no config.json.")
    if not any(WEIGHTS.fullmatch(file.name) for file in folder.iterdir()):
        raise FileNotFoundError(f"{folder} has no model.safetensors; only safetensors are published.")
    return folder


def _check_target(out_dir: Path, student: object) -> None:
    if out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / "NOTICE").is_file()):
        raise ValueError(f"{out_dir} exists and was not staged by this tool; name another folder or remove it.")
    if isinstance(student, (str, os.PathLike)) and Path(student).resolve() == out_dir.resolve():
        raise ValueError(f"A student cannot be staged into its own folder, {out_dir}; name another one.")


def _load_head_map(head_map: object, folder: Path | None) -> HeadMap:
    if isinstance(head_map, HeadMap):
        return head_map
    if head_map is None and folder is None:
        raise ValueError("A model that is not a folder has no head map of its own; pass `head_map`.")
    if head_map is None and not (folder / "rad" / "head_map.json").is_file():
        config = RadHybridConfig.from_pretrained(folder).to_dict()
        if "head_map" in config:
            return HeadMap.from_dict({**config["head_map"], "kept_heads": config["kept_heads"]})
    return HeadMap.load(folder / "rad" / "head_map.json" if head_map is None else head_map)


def _load_scores(scores: object, folder: Path | None) -> HeadScores | None:
    if scores is None and folder is not None and (folder / "rad" / "scores.json").is_file():
        scores = folder / "rad" / "scores.json"
    return HeadScores.load(scores) if isinstance(scores, (str, os.PathLike)) else scores


def _provenance(teacher: str | os.PathLike | None) -> dict | None:
    if teacher is None or not Path(teacher).exists():
        return None
    return read_provenance(teacher if Path(teacher).is_dir() else Path(teacher).parent)


def _check_map(head_map: HeadMap, config: RadHybridConfig) -> None:
    head_map.check_teacher(config, "the student")
    if head_map.kept_heads != [list(heads) for heads in config.kept_heads]:
        raise ValueError(
            f"The head map keeps {head_map.kept_heads}, but the student was made with {config.kept_heads}. Stage it "
            "with the map it was converted with."
        )


def _write_model(student: object, folder: Path | None, work: Path, head_map: HeadMap) -> RadHybridConfig:
    if folder is None:
        _check_map(head_map, student.config)
        student.save_pretrained(work)
        config = copy.deepcopy(student.config)
    else:
        for file in folder.iterdir():
            if WEIGHTS.fullmatch(file.name):
                shutil.copyfile(file, work / file.name)
        config = RadHybridConfig.from_pretrained(folder)
        _check_map(head_map, config)
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder).save_pretrained(work)
        else:
            GenerationConfig.from_model_config(config).save_pretrained(work)
    # Saving a causal language model alone would leave AutoModel out.
    config.auto_map = dict(AUTO_MAP)
    config.architectures = ["RadHybridForCausalLM"]
    # The kept heads stand in the configuration already; a ranking of all heads would only make it long.
    provenance, left_out = head_map.to_dict().items(), ("kept_heads", "ranking", "created_with")
    config.head_map = {key: value for key, value in provenance if key not in left_out}
    config.save_pretrained(work)
    return config


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path | None, work: Path) -> None:
    if tokenizer is None:
        if folder is None or not (folder / "tokenizer_config.json").is_file():
            raise FileNotFoundError(f"{folder or 'The model'} comes without a tokenizer; pass `tokenizer`.")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.save_pretrained(work)
    path = work / "tokenizer_config.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key not in TOKENIZER_LEFTOVERS})


def _write_rad(rad: Path, head_map: HeadMap, scores: HeadScores | None, report: dict | None) -> None:
    rad.mkdir()
    head_map.save(rad / "head_map.json")
    if scores is not None:
        scores.save(rad / "scores.json")
        title = f"What retrieval loses without each head of {head_map.teacher.id.split('/')[-1]}"
        score_heat_map(scores.accuracy_drop, head_map.kept_heads, rad / "heads.png", title)
    if report is not None:
        write_json(rad / "eval.json", {**report, "command": without_paths(report.get("command") or "")})
        entries = eval_results(report)
        if entries:
            path = rad.parent / ".eval_results" / "hf-rad.yaml"
            path.parent.mkdir()
            path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")


def _write_licence(work: Path, head_map: HeadMap, license: str, model_name: str) -> None:
    shutil.copyfile(_apache_licence(), work / "LICENSE")
    teacher = head_map.teacher
    notice = NOTICE.format(
        model_name=model_name,
        teacher=teacher.id,
        revision=f" at revision {teacher.revision}" if teacher.revision else "",
        license=license,
        # Meta's licences ask for these words wherever a derived model is distributed.
        built_with=" Built with Llama." if license.startswith("llama") else "",
    )
    (work / "NOTICE").write_text(notice, encoding="utf-8")


def _apache_licence() -> Path:
    checkout = Path(modeling_rad_hybrid.__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "LICENSE"
    files = importlib.metadata.files("hf-rad") or []
    return next(Path(file.locate()) for file in files if file.name == "LICENSE")


def _replace(work: Path, out_dir: Path) -> None:
    if out_dir.is_dir():
        # Both renames stay in one folder; what was there is deleted with the temporary folder around it.
        os.replace(out_dir, work.with_name("previous"))
    os.replace(work, out_dir)
