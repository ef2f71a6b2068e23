"""
Selection: from head scores and a budget to a head map, and the maps people compare with (paper, section 4.1).

A budget is a number of heads or a fraction of all heads, rounded to the nearest whole head and at least one.
`top_k` keeps the heads that cost most accuracy when ablated. Heads that cost the same are ordered by the drop in the
answer's log-probability, which goes on telling heads apart where the accuracy no longer moves.

    head_map = top_k(scores, heads=8)
    head_map = random_heads(scores.teacher, fraction=0.03, seed=1)
"""

import random

from trainers.head_map import HeadMap, TeacherShape
from trainers.head_scoring import HeadScores
from trainers.probes import probe_from_settings


def top_k(
    scores: HeadScores,
    teacher: TeacherShape | None = None,
    heads: int | None = None,
    fraction: float | None = None,
    fill_groups: bool = False,
) -> HeadMap:
    """
    Keeps the best-scored heads.

    Args:
        scores ([`HeadScores`]):
            Scores of every head.
        teacher ([`TeacherShape`], *optional*):
            Teacher the map is for, when it goes by another name than the scored one. Must have the same layout.
        heads (`int`, *optional*):
            Heads to keep. Exactly one of `heads` and `fraction` is given.
        fraction (`float`, *optional*):
            Part of all heads to keep, such as `0.03`.
        fill_groups (`bool`, *optional*, defaults to `False`):
            Whether to keep also the other query heads of each kept KV group whose drop in log-probability is above
            zero. They read the KV cache that is there anyway, so they cost no cache bytes; they come on top of the
            budget.

    Raises:
        `ValueError`: when the budget is missing, given twice or larger than the teacher, or the layouts differ.
    """
    teacher = teacher or scores.teacher
    if not teacher.same_layout(scores.teacher):
        raise ValueError(
            f"These scores are of {scores.teacher.id} ({scores.teacher.layout}), "
            f"not of {teacher.id} ({teacher.layout})."
        )
    count = _budget(teacher, heads, fraction)
    ranking = scores.ranking()
    kept = ranking[:count]
    if fill_groups:
        size = teacher.queries_per_group
        groups = {(layer, head // size) for layer, head in kept}
        mates = [(layer, head) for layer, head in ranking[count:] if (layer, head // size) in groups]
        kept += [(layer, head) for layer, head in mates if scores.logprob_drop[layer][head] > 0]
    return HeadMap.from_pairs(
        teacher,
        kept,
        selection=_selection("top-k", count, fraction, **({"fill_groups": True} if fill_groups else {})),
        ranking=ranking,
        probe=scores.probe,
        scores_sha256=scores.sha256,
        source=(
            f"Every head ablated by hf-rad on {scores.num_examples} examples of "
            f"{probe_from_settings(scores.probe).name}, seed {scores.seed}, which the whole teacher answers at "
            f"{scores.base_accuracy:.0%}."
        ),
    )


def random_heads(
    teacher: TeacherShape, heads: int | None = None, fraction: float | None = None, seed: int = 0
) -> HeadMap:
    """Keeps heads drawn at random: the control that shows what the choice is worth. Arguments as in [`top_k`]."""
    count = _budget(teacher, heads, fraction)
    drawn = random.Random(seed).sample(range(teacher.num_heads), count)
    return HeadMap.from_pairs(
        teacher,
        [divmod(index, teacher.num_attention_heads) for index in drawn],
        selection=_selection("random", count, fraction, seed=seed),
        source=f"Drawn at random with seed {seed}.",
    )


def no_heads(teacher: TeacherShape) -> HeadMap:
    """Keeps no head: the control that shows what recurrent heads do alone."""
    return HeadMap.from_pairs(teacher, [], selection={"method": "none", "heads": 0}, source="No head is kept.")


def every_nth_layer(teacher: TeacherShape, n: int) -> HeadMap:
    """
    Keeps all heads of every n-th layer, as layer-wise hybrids do: layers n - 1, 2n - 1, ...

    Raises:
        `ValueError`: when `n` is not from 1 to the number of layers.
    """
    if not 1 <= n <= teacher.num_hidden_layers:
        raise ValueError(f"n must be from 1 to the {teacher.num_hidden_layers} layers of {teacher.id}, not {n}.")
    layers = range(n - 1, teacher.num_hidden_layers, n)
    return HeadMap.from_pairs(
        teacher,
        [(layer, head) for layer in layers for head in range(teacher.num_attention_heads)],
        selection={"method": "every-nth-layer", "n": n, "heads": len(layers) * teacher.num_attention_heads},
        source=f"All heads of every layer whose number, counted from 1, is a multiple of {n}.",
    )


def _budget(teacher: TeacherShape, heads: int | None, fraction: float | None) -> int:
    if (heads is None) == (fraction is None):
        raise ValueError("Give exactly one budget: a number of heads (--heads 8) or a fraction (--fraction 0.03).")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}.")
        heads = max(1, int(fraction * teacher.num_heads + 0.5))
    if not 1 <= heads <= teacher.num_heads:
        raise ValueError(
            f"{teacher.id} has {teacher.num_heads} heads, so {heads} of them cannot be kept; take 1 to "
            f"{teacher.num_heads}. The map that keeps none is the control `no_heads`."
        )
    return heads


def _selection(method: str, heads: int, fraction: float | None, **more) -> dict:
    return {"method": method, "heads": heads, **({} if fraction is None else {"fraction": fraction}), **more}
