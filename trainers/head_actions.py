"""
What each verb that scores, selects and looks at heads does, given a workshop and the files to read and write.

    workshop = Workshop(Recipe(teacher="smollm2"))
    score(workshop, Path("runs/mine"))
    select(workshop, "found", Path("runs/mine/scores.json"), Path("runs/mine/head_map.json"))
"""

import dataclasses
import random
from pathlib import Path

from trainers.data import token_batches
from trainers.files import write_json
from trainers.heads.ablation import tokens_at_once
from trainers.heads.head_curves import curve
from trainers.heads.head_kinds import head_kinds, landmarks, patterns
from trainers.heads.head_map import HeadMap
from trainers.heads.head_scores import HeadScores
from trainers.heads.head_scoring import score_heads
from trainers.heads.selection import no_heads, random_heads, top_k
from trainers.heads.shared_work import is_main_process
from trainers.heads.text_scores import layers_by_probe, layers_by_text, text_kl
from trainers.hub.head_map_repo import find_head_map
from trainers.plots import accuracy_curves, attention_pattern, score_heat_map
from trainers.precision import resolve_dtype
from trainers.probes import KVRetrieval, probe_from_settings
from trainers.probes.probe_rows import pack
from trainers.workshop import Workshop


# Rows of text that heads are ablated on at once.
TEXT_ROWS = 4
# Selections of whole layers by what is lost without one, see `measure_layers`.
LAYER_METHODS = ("leave-one-layer-out", "kl-guided")


def score(workshop: Workshop, out: Path) -> HeadScores:
    """
    Scores every head of the teacher; writes `scores.json` and the heat map `scores.png` to `out`.

    Raises:
        `ValueError`: when the teacher fails the probe.
    """
    settings = workshop.recipe.score
    scores = score_heads(
        workshop.teacher,
        workshop.tokenizer,
        probe_from_settings(settings.probe),
        settings.num_examples,
        workshop.recipe.seed,
        teacher=workshop.shape,
        dtype=resolve_dtype(settings.dtype, workshop.teacher.device),
        min_accuracy=settings.min_accuracy,
        partial_path=out / "scores.partial.jsonl",
        progress=workshop.progress,
        ablation=settings.ablation,
        answers=settings.answers,
        screen=settings.screen,
        num_survivors=settings.survivors,
    )
    if is_main_process():
        if settings.text_tokens:
            text = token_batches(workshop.held_out_rows(settings.text_tokens), TEXT_ROWS)
            scores = dataclasses.replace(scores, text_kl=text_kl(workshop.teacher, text, progress=workshop.progress))
        scores.save(out / "scores.json")
        draw(scores, None, out / "scores.png")
    return scores


def draw_curves(
    workshop: Workshop,
    scores: HeadScores,
    counts: list[int],
    ablation: str,
    out: Path,
    num_examples: int | None = None,
) -> dict:
    """
    Measures the teacher with only the best heads of `scores` kept, and with them removed, beside as many random heads
    removed; writes `curves.json` and `curves.png` to `out`.

    Args:
        workshop ([`~trainers.workshop.Workshop`]):
            Shared resources.
        scores ([`~trainers.heads.head_scores.HeadScores`]):
            Scores of the teacher. The same probe is asked, with questions of the recipe's seed.
        counts (`list[int]`):
            Numbers of heads.
        ablation (`str`):
            `"zero"` or `"mean"`: what an ablated head gives.
        out (`Path`):
            Folder to write.
        num_examples (`int`, *optional*):
            Questions; by default as many as the scores come from.

    Returns:
        `dict`: name of a curve -> its values, as in `curves.json`.
    """
    probe, seed = probe_from_settings(scores.probe), workshop.recipe.seed
    teacher, tokenizer = workshop.teacher, workshop.tokenizer
    num_examples = num_examples or scores.num_examples
    tokens = tokens_at_once(teacher, None) // len(counts)
    batches = pack(tokenizer, probe.examples(num_examples, seed), None, teacher.device, tokens=tokens)
    order = scores.ranking()
    shuffled = random.Random(seed).sample(order, len(order))
    plan = {
        "best heads kept": (order, "keep"),
        "best heads removed": (order, "remove"),
        "random heads removed": (shuffled, "remove"),
    }
    curves = {
        name: curve(teacher, tokenizer, batches, ranking, counts, mode, ablation, progress=workshop.progress)
        for name, (ranking, mode) in plan.items()
    }
    lines = {name: (one.counts, one.accuracy) for name, one in curves.items()}
    title = f"{scores.teacher.id.split('/')[-1]} without some of its heads"
    accuracy_curves(lines, out / "curves.png", title, f"heads, of {scores.teacher.num_heads}")
    content = {name: one.to_dict() for name, one in curves.items()}
    facts = {"probe": scores.probe, "num_examples": num_examples, "seed": seed}
    write_json(out / "curves.json", {**facts, "curves": content})
    return content


def draw(scores: HeadScores, head_map: HeadMap | None, path: Path) -> None:
    """Draws the heat map of `scores`, the heads of `head_map` outlined."""
    kept = None if head_map is None else head_map.kept_heads
    score_heat_map(scores.accuracy_drop, kept, path, f"Retrieval heads of {scores.teacher.id.split('/')[-1]}")


def draw_kinds(workshop: Workshop, head_map: HeadMap, num_examples: int, out: Path) -> list[dict]:
    """
    Labels the kept heads of a map and draws what each attends to on one prompt; writes `kinds.json` and one picture a
    head to `out`.

    Args:
        workshop ([`~trainers.workshop.Workshop`]):
            Shared resources.
        head_map ([`~trainers.heads.head_map.HeadMap`]):
            Map of the teacher.
        num_examples (`int`):
            Questions.
        out (`Path`):
            Folder to write.

    Returns:
        `list[dict]`: one for each head, as in `kinds.json`.
    """
    head_map.check_teacher(workshop.teacher.config, workshop.recipe.teacher)
    teacher, tokenizer, seed = workshop.teacher, workshop.tokenizer, workshop.recipe.seed
    probe = KVRetrieval(format="json", pairs=20, shots=2)
    kinds = head_kinds(teacher, tokenizer, head_map.pairs, probe, num_examples, seed, workshop.progress)
    example = KVRetrieval(format="json", pairs=8, shots=1).examples(1, seed)[0]
    marks = landmarks(tokenizer, example, KVRetrieval(format="json", pairs=8, shots=1))
    tokens, weights = patterns(teacher, tokenizer, example, head_map.pairs)
    for one, pattern in zip(kinds, weights.tolist(), strict=True):
        title = f"Layer {one.layer}, head {one.head}: {one.kind}"
        marked = {"asked key": marks.key, "its value": marks.value}
        attention_pattern(pattern, tokens, out / f"head_{one.layer}_{one.head}.png", title, marked)
    rows = [dataclasses.asdict(one) for one in kinds]
    write_json(out / "kinds.json", {"probe": probe.settings(), "num_examples": num_examples, "heads": rows})
    return rows


def measure_layers(workshop: Workshop, num_examples: int, text_tokens: int, path: Path) -> dict[str, list[float]]:
    """
    Leaves out each layer's attention in turn, for the selections of whole layers, and writes the outcome to `path`.

    Args:
        workshop ([`~trainers.workshop.Workshop`]):
            Shared resources; `recipe.score` holds the probe.
        num_examples (`int`):
            Questions.
        text_tokens (`int`):
            Tokens of held-out text.
        path (`Path`):
            JSON file to write.

    Returns:
        `dict`: for each of [`LAYER_METHODS`] one number a layer: the drop in the answers' log-probability, and the
        divergence on text, in nats.
    """
    teacher, tokenizer, recipe = workshop.teacher, workshop.tokenizer, workshop.recipe
    examples = probe_from_settings(recipe.score.probe).examples(num_examples, recipe.seed)
    tokens = tokens_at_once(teacher, None) // workshop.shape.num_hidden_layers
    batches = pack(tokenizer, examples, None, teacher.device, tokens=tokens)
    text = token_batches(workshop.held_out_rows(text_tokens), TEXT_ROWS)
    by_probe = layers_by_probe(teacher, tokenizer, batches, progress=workshop.progress)
    by_text = layers_by_text(teacher, text, progress=workshop.progress)
    layers = dict(zip(LAYER_METHODS, (by_probe, by_text), strict=True))
    write_json(path, layers)
    return layers


def select(workshop: Workshop, kind: str, scores: Path | None, head_map: Path) -> HeadMap:
    """
    Chooses the kept heads of a student and writes its head map.

    Args:
        workshop ([`~trainers.workshop.Workshop`]):
            Shared resources; `recipe.select` holds the budget.
        kind (`str`):
            `"found"`, `"none"` or `"random"` (as many as the found ones).
        scores (`Path`, *optional*):
            `scores.json`; not needed where the recipe names a ready-made head map.
        head_map (`Path`):
            File to write.
    """
    settings = workshop.recipe.select
    if settings.head_map is not None:
        chosen = find_head_map(settings.head_map, workshop.teacher_name, settings.head_map_revision)
    else:
        chosen = top_k(HeadScores.load(scores), heads=settings.heads, fraction=settings.fraction)
    if kind == "none":
        chosen = no_heads(chosen.teacher)
    elif kind == "random":
        chosen = random_heads(chosen.teacher, heads=chosen.num_kept, seed=workshop.recipe.seed)
    chosen.save(head_map)
    return chosen
