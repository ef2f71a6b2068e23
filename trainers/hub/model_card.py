"""
The card of a published student: what was kept and why, how it compares with its teacher, where its limits are.

Every measured number comes from the report that `hf-rad eval` wrote (`eval.json`); one that is not in it is said to be
missing. Cache sizes follow from the configuration ([`trainers.memory`]). The words stand in
`hub_cards/model_card.md.jinja`; `hub_cards/FIELDS.md` says what each field of a card means.

    card = render_card(head_map, config, report, license="apache-2.0", model_name="SmolLM2-135M-Instruct-RAD8")
    card.save("README.md")
"""

import importlib.resources
import math
import re

from huggingface_hub import ModelCard, ModelCardData

from modeling_rad_hybrid import RadHybridConfig
from modeling_rad_hybrid.configuration_rad_hybrid import TRANSFORMERS_TESTED
from trainers.heads.head_map import HeadMap
from trainers.memory import cache_bytes


PAPER = "2602.11374"
TAGS = ["rad-hybrid", "hybrid", "mamba2", "ssm", "attention", "distillation", f"arxiv:{PAPER}"]
MEMORY_TOKENS = (2048, 8192, 32768, 131072)
# A local folder is no repo yet: its snippet loads it by its name, and publishing puts repo and tag in its place.
PINNED = re.compile(r'^repo, revision = ".*", (?:".*"|None)$', re.MULTILINE)
ABSOLUTE_PATH = re.compile(r"""(?<![^\s='"])(?:~|[A-Za-z]:)?[/\\](?:[^\s'"/\\]+[/\\])*([^\s'"/\\]*)[/\\]?""")


def render_card(
    head_map: HeadMap,
    config: RadHybridConfig,
    report: dict | None = None,
    *,
    license: str,
    model_name: str,
    repo: str = "published",
    revision: str | None = None,
    provenance: dict | None = None,
    datasets: tuple[str, ...] = (),
    language: tuple[str, ...] = ("en",),
    scores: bool = True,
) -> ModelCard:
    """
    Fills the template.

    Args:
        head_map ([`~trainers.heads.head_map.HeadMap`]):
            Map that the student was made with.
        config ([`~modeling_rad_hybrid.RadHybridConfig`]):
            The student's configuration.
        report (`dict`, *optional*):
            Content of `eval.json`, see [`~trainers.evaluation.make_report`].
        license (`str`):
            Identifier of the teacher's licence as the Hub writes it, such as `"apache-2.0"`.
        model_name (`str`):
            Title of the card.
        repo (`str`, *optional*, defaults to `"published"`):
            Hub id, or name of the folder, in the snippet that loads the student.
        revision (`str`, *optional*):
            Tag or commit in the snippet.
        provenance (`dict`, *optional*):
            Content of the teacher's `rad_teacher.json`: where its weights come from, if not from its Hub repo.
        datasets (`tuple[str, ...]`, *optional*):
            Hub ids of the training data.
        language (`tuple[str, ...]`, *optional*, defaults to `("en",)`):
            Codes of the languages.
        scores (`bool`, *optional*, defaults to `True`):
            Whether scores and heat map lie beside the card.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card, metadata included.
    """
    teacher, report = head_map.teacher, report or {}
    data = ModelCardData(
        base_model=teacher.id,
        base_model_relation="finetune",
        license=license,
        language=list(language),
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=list(datasets) or None,
        tags=TAGS,
        model_name=model_name,
    )
    with importlib.resources.as_file(importlib.resources.files("hub_cards")) as folder:
        return ModelCard.from_template(
            data,
            template_path=str(folder / "model_card.md.jinja"),
            model_name=model_name,
            teacher=teacher.id,
            teacher_revision=teacher.revision,
            kept=head_map.num_kept,
            heads=teacher.num_heads,
            kept_share=f"{head_map.num_kept / teacher.num_heads:.1%}",
            state_size=config.ssm_state_size,
            snippet=load_snippet(repo, revision),
            transformers_tested=TRANSFORMERS_TESTED,
            versions=report.get("versions", {}),
            why=why_these_heads(head_map),
            kept_rows=kept_rows(head_map),
            not_listed=not_listed(head_map),
            heat_map=scores,
            scores=scores,
            result_header=result_header(report),
            result_rows=result_rows(report),
            coverage=coverage_sentence(report),
            measurement=measurement_lines(report),
            memory_rows=memory_rows(config),
            training=training_lines(report, datasets),
            limits=limit_lines(report, provenance),
            command=without_paths(report.get("command") or ""),
            licence_name=f"`{license}`",
        )


def load_snippet(repo: str, revision: str | None) -> str:
    """Five lines that load a student, pinned to a revision (`None` for a folder) and ready to run."""
    pin = "None" if revision is None else f'"{revision}"'
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'repo, revision = "{repo}", {pin}',
            "tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)",
            "model = AutoModelForCausalLM.from_pretrained(repo, revision=revision, trust_remote_code=True)",
            'print(tokenizer.decode(model.generate(**tokenizer("My name is", return_tensors="pt"))[0]))',
        ]
    )


def pin_snippet(card: str, repo: str, revision: str | None) -> str:
    """
    Returns the text of a card with its snippet loading `repo` at `revision`.

    Raises:
        `ValueError`: when the card has no such snippet.
    """
    pin = "None" if revision is None else f'"{revision}"'
    card, count = PINNED.subn(f'repo, revision = "{repo}", {pin}', card)
    if not count:
        raise ValueError("The card has no line `repo, revision = ...`; stage the student again.")
    return card


def without_paths(text: str) -> str:
    """Returns `text` with every absolute path in it reduced to its last name: a card tells nothing of a machine."""
    return ABSOLUTE_PATH.sub(lambda match: match[1], text)


def why_these_heads(head_map: HeadMap) -> str:
    """Says in a sentence or two how the kept heads were chosen."""
    method, probe = head_map.selection.get("method"), head_map.probe
    if not head_map.num_kept:
        return "No head was kept: this model is a control, to be compared with one that keeps the heads that retrieve."
    if method == "random":
        return (
            "The kept heads were **drawn at random**: this model is a control, to be compared with one that keeps the "
            f"heads that retrieve. {head_map.source}".strip()
        )
    how = "The kept heads lead a ranking of all heads by how much retrieval the teacher loses without each."
    if probe:
        settings = ", ".join(f"{name} {value}" for name, value in probe.items() if not isinstance(value, (list, dict)))
        how += f" The probe: {settings}."
    return f"{how} {head_map.source}".strip()


def kept_rows(head_map: HeadMap) -> list[list[str]]:
    """One row for each layer that keeps heads: layer, query heads, KV heads."""
    size = head_map.teacher.queries_per_group
    return [
        [str(layer), ", ".join(map(str, kept)), ", ".join(map(str, sorted({head // size for head in kept})))]
        for layer, kept in enumerate(head_map.kept_heads)
        if kept
    ]


def not_listed(head_map: HeadMap) -> str:
    """Counts what the table of kept heads leaves out."""
    teacher, without = head_map.teacher, sum(not kept for kept in head_map.kept_heads)
    groups = teacher.num_hidden_layers * teacher.num_key_value_heads
    return (
        f"{without} of the {teacher.num_hidden_layers} layers have no attention at all. Of the teacher's {groups} "
        f"KV heads {len(head_map.kv_groups)} remain, which is what a cache pays for."
    )


def result_header(report: dict) -> list[str]:
    """Column titles of the results."""
    kept = report.get("student", {}).get("kept_heads")
    student = "this model" if kept is None else f"this model, {kept} heads"
    return ["task", "training data", "examples", "teacher", *report.get("controls", {}), student]


def result_rows(report: dict) -> list[list[str]]:
    """One row for each task, then the loss on text and the coverage; a number that is missing is said to be."""
    if not report:
        return []
    models = [report.get("teacher", {}), *report.get("controls", {}).values(), report.get("student", {})]
    tasks = dict.fromkeys(task for model in models for task in model.get("results", {}))
    rows = []
    for task in tasks:
        results = [model.get("results", {}).get(task, {}) for model in models]
        known = next(result for result in results if result)
        scores = [_number(result.get("score"), 2) for result in results]
        rows.append([f"{task} ({known.get('metric', 'metric not named')})", _source(known), _count(known), *scores])
    losses = [_number(model.get("text_loss"), 2) for model in models]
    rows.append(["loss on held-out text (nats a token, lower is better)", "held out", "", *losses])
    return rows


def coverage_sentence(report: dict) -> str:
    """Says what part of the teacher's scores the student reaches."""
    covered = report.get("coverage") or {}
    if covered.get("value") is None:
        return "Coverage (mean over tasks of the student's score divided by the teacher's): not measured."
    text = (
        f"Coverage, the mean over {len(covered.get('tasks', []))} tasks of the student's score divided by the "
        f"teacher's: **{covered['value']:.1%}**"
    )
    if covered.get("held_out") is not None:
        text += f"; over the tasks that no training data contained: **{covered['held_out']:.1%}**"
    if covered.get("retrieval") is not None and covered.get("choices") is not None:
        text += (
            f"; over retrieval alone: **{covered['retrieval']:.1%}**, over multiple choice: {covered['choices']:.1%}"
        )
    if covered.get("left_out"):
        names = ", ".join(covered["left_out"])
        guessing = ", or no better than guessing" if "choices" in covered else ""
        text += f". Left out, because the teacher itself scores below {covered.get('floor')}{guessing}: {names}"
    return text + "."


def measurement_lines(report: dict) -> list[str]:
    """How the results came about; what the report does not say is said to be unknown."""
    command, seed = without_paths(report.get("command") or ""), report.get("seed")
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    return [
        f"command: `{command}`" if command else "command: not recorded",
        f"seed: {'not recorded' if seed is None else f'{seed}, one run'}",
        f"date: {report.get('date', 'not recorded')}",
        f"hardware: {report.get('hardware', 'not recorded')}",
        f"software: {versions or 'not recorded'}",
        "answers are generated greedily and must match exactly, unless a task names another metric",
    ]


def eval_results(report: dict) -> list[dict]:
    """
    Entries of `.eval_results/*.yaml`, by which the Hub puts a model on a benchmark's own page
    (https://huggingface.co/docs/hub/eval-results).

    Only tasks that name a public benchmark have one: `benchmark` in the result, `{"dataset_id", "task_id"}` and, where
    known, `revision`. Probes of our own have no data set on the Hub; the card's table is theirs.
    """
    entries = []
    for result in report.get("student", {}).get("results", {}).values():
        benchmark = result.get("benchmark")
        if not benchmark or result.get("score") is None:
            continue
        dataset = {"id": benchmark["dataset_id"], "task_id": benchmark["task_id"]}
        if benchmark.get("revision"):
            dataset["revision"] = benchmark["revision"]
        entry = {"dataset": dataset, "value": result["score"]}
        if report.get("date"):
            entry["date"] = report["date"]
        notes = f"{result.get('metric', 'metric not named')}, {_count(result)} examples, hf-rad"
        entries.append({**entry, "notes": notes})
    return entries


def memory_rows(config: RadHybridConfig) -> list[list[str]]:
    """Cache of teacher and student at lengths that the model can take."""
    lengths = [tokens for tokens in MEMORY_TOKENS if tokens <= config.max_position_embeddings]
    teacher = RadHybridConfig(**{**config.to_dict(), "kept_heads": None, "mixing": "replace"})
    rows = []
    for tokens in lengths or [config.max_position_embeddings]:
        before, after = cache_bytes(teacher, tokens), cache_bytes(config, tokens)
        rows.append([f"{tokens:,}", f"{before / 1e6:.2f} MB", f"{after / 1e6:.2f} MB", f"{after / before:.1%}"])
    return rows


def training_lines(report: dict, datasets: tuple[str, ...]) -> list[str]:
    """What the student saw after its closed-form start."""
    tokens = report.get("student", {}).get("tokens_trained")
    trained = [
        task for task, result in report.get("student", {}).get("results", {}).items() if result.get("trained_on")
    ]
    return [
        "tokens trained on: " + ("not recorded" if tokens is None else f"{tokens:,}"),
        "data sets on the Hub: " + (", ".join(datasets) or "none named"),
        "tasks whose format was in the training data: "
        + (", ".join(trained) or ("none" if report else "not recorded")),
    ]


def limit_lines(report: dict, provenance: dict | None) -> list[str]:
    """What this model cannot do, as far as the report and its making tell."""
    teacher, student = report.get("teacher", {}), report.get("student", {})
    lines = []
    if not report:
        lines.append("Nothing is known about its quality: it was published without an evaluation.")
    before, after = teacher.get("text_loss"), student.get("text_loss")
    if before is not None and after is not None and after > before:
        lines.append(
            f"On held-out text its perplexity is {math.exp(after - before):.2f} times the teacher's "
            f"({math.exp(after):.1f} against {math.exp(before):.1f})."
        )
    weak = [
        f"{task} ({result['score']:.2f} of {teacher['results'][task]['score']:.2f})"
        for task, result in student.get("results", {}).items()
        if result.get("score") is not None
        and teacher.get("results", {}).get(task, {}).get("score")
        and result["score"] < 0.8 * teacher["results"][task]["score"]
    ]
    if weak:
        lines.append(f"It reaches less than 80 % of the teacher's score on: {', '.join(weak)}.")
    if report and all(result.get("trained_on") for result in student.get("results", {}).values()):
        lines.append("No task above was held out: each had its format in the training data.")
    if provenance and provenance.get("quantization"):
        lines.append(
            f"The teacher's weights were taken from a quantised file, {provenance['quantization']}: "
            f"{provenance.get('source', 'its source is not recorded')}."
        )
    return [
        *lines,
        "It keeps the teacher's knowledge, biases and safety behaviour only as far as the tables above show.",
        "GGUF and ONNX export are not supported.",
    ]


def _number(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _count(result: dict) -> str:
    return "not recorded" if result.get("examples") is None else str(result["examples"])


def _source(result: dict) -> str:
    if result.get("trained_on") is None:
        return "not recorded"
    return "trained on" if result["trained_on"] else "held out"
