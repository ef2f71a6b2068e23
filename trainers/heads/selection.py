"""
Selection: from head scores and a budget to a head map, and the maps people compare with (paper, section 4.1).

A budget is a number of heads, a fraction of all heads (rounded to the nearest whole head, at least one), or bytes of
the student's cache. `top_k` keeps the heads that cost most accuracy when ablated. Heads that cost the same are ordered
by the drop in the answer's log-probability, which goes on telling heads apart where the accuracy no longer moves.

    head_map = top_k(scores, heads=8)
    head_map = top_groups(scores, cache=CacheBudget(30_000_000, tokens=8192))
    head_map = random_heads(scores.teacher, fraction=0.03, seed=1)
    head_map = every_nth_layer(scores.teacher, 4)

Every function gives a [`HeadMap`]; a map whose layers are kept whole is what layer-wise hybrids do.
"""

import random
from dataclasses import asdict, dataclass

from modeling_rad_hybrid import RadHybridConfig
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.heads.head_scores import HeadScores
from trainers.memory import cache_bytes
from trainers.probes import probe_from_settings


Pair = tuple[int, int]


@dataclass(frozen=True)
class CacheBudget:
    """
    A budget in bytes of the student's cache: K and V of kept heads, states and windows of recurrent ones, bfloat16 and
    batch 1, as `memory.py` counts them. Dearer heads (a KV group of their own) and cheaper ones (a group kept anyway)
    are told apart by it.

    Args:
        bytes (`int`):
            Most bytes of the cache.
        tokens (`int`, *optional*, defaults to `8192`):
            Tokens in it.
        state_size (`int`, *optional*, defaults to `8`), mixing (`str`, *optional*, defaults to `"replace"`):
            Of the student.
    """

    bytes: int
    tokens: int = 8192
    state_size: int = 8
    mixing: str = "replace"

    def cost(self, teacher: TeacherShape, pairs: list[Pair]) -> int:
        """Bytes of a student that keeps exactly `pairs`."""
        config = RadHybridConfig(
            hidden_size=teacher.num_attention_heads * teacher.head_dim,
            num_hidden_layers=teacher.num_hidden_layers,
            num_attention_heads=teacher.num_attention_heads,
            num_key_value_heads=teacher.num_key_value_heads,
            head_dim=teacher.head_dim,
            kept_heads=HeadMap.from_pairs(teacher, pairs).kept_heads,
            mixing=self.mixing,
            ssm_state_size=self.state_size,
        )
        return cache_bytes(config, self.tokens)


def top_k(
    scores: HeadScores,
    teacher: TeacherShape | None = None,
    heads: int | None = None,
    fraction: float | None = None,
    fill_groups: bool = False,
    cache: CacheBudget | None = None,
    by: str = "accuracy_drop",
) -> HeadMap:
    """
    Keeps the best-scored heads.

    Args:
        scores ([`HeadScores`]):
            Scores of every head.
        teacher ([`TeacherShape`], *optional*):
            Teacher the map is for, when it goes by another name than the scored one. Must have the same layout.
        heads (`int`, *optional*):
            Heads to keep. Exactly one of `heads`, `fraction` and `cache` is given.
        fraction (`float`, *optional*):
            Part of all heads to keep, such as `0.03`.
        fill_groups (`bool`, *optional*, defaults to `False`):
            Whether to keep also the other query heads of each kept KV group whose drop in log-probability is above
            zero. They read the KV cache that is there anyway, so they cost no cache bytes; they come on top of the
            budget.
        cache ([`CacheBudget`], *optional*):
            Most bytes of cache: the heads are taken in their order for as long as they fit.
        by (`str`, *optional*, defaults to `"accuracy_drop"`):
            Score that orders the heads, as in [`HeadScores.ranking`].

    Raises:
        `ValueError`: when the budget is missing, given twice or cannot be met, or the layouts differ.
    """
    teacher = _checked_teacher(scores, teacher)
    ranking = scores.ranking(by)
    kept = _spend(teacher, [[pair] for pair in ranking], heads, fraction, cache)
    count = len(kept)
    if fill_groups:
        groups = {_group(teacher, pair) for pair in kept}
        mates = [pair for pair in ranking[count:] if _group(teacher, pair) in groups]
        kept += [(layer, head) for layer, head in mates if _helps(scores, layer, head)]
    more = {**({"fill_groups": True} if fill_groups else {}), **({} if by == "accuracy_drop" else {"by": by})}
    return _scored_map(scores, teacher, kept, _selection("top-k", count, fraction, cache, **more), ranking)


def top_groups(
    scores: HeadScores,
    teacher: TeacherShape | None = None,
    heads: int | None = None,
    fraction: float | None = None,
    cache: CacheBudget | None = None,
) -> HeadMap:
    """
    Keeps the best KV groups, and of each all query heads that help: what a byte of cache buys most with. A group's
    score is the sum of its heads' drops in accuracy, where above zero, then of their drops in log-probability.

    Arguments and errors as in [`top_k`]. With a budget of heads the groups are taken for as long as they fit.
    """
    teacher = _checked_teacher(scores, teacher)
    groups: dict[Pair, list[Pair]] = {}
    for layer, head in scores.ranking():
        if _helps(scores, layer, head):
            groups.setdefault(_group(teacher, (layer, head)), []).append((layer, head))

    def value(pairs: list[Pair]) -> tuple[float, float]:
        return tuple(
            sum(max(table[layer][head], 0) for layer, head in pairs)
            for table in (scores.accuracy_drop, scores.logprob_drop)
        )

    best = sorted(groups.values(), key=value, reverse=True)
    kept = _spend(teacher, best, heads, fraction, cache)
    return _scored_map(scores, teacher, kept, _selection("top-groups", len(kept), fraction, cache))


def threshold(
    scores: HeadScores,
    teacher: TeacherShape | None = None,
    accuracy_drop: float | None = None,
    logprob_drop: float | None = None,
) -> HeadMap:
    """
    Keeps every head whose ablation costs at least so much.

    Args:
        scores ([`HeadScores`]):
            Scores of every head.
        teacher ([`TeacherShape`], *optional*):
            As in [`top_k`].
        accuracy_drop (`float`, *optional*), logprob_drop (`float`, *optional*):
            The least drop in accuracy, or in log-probability in nats; exactly one is given.

    Raises:
        `ValueError`: when none or both are given, or no head reaches it.
    """
    if (accuracy_drop is None) == (logprob_drop is None):
        raise ValueError("Give exactly one threshold: accuracy_drop or logprob_drop.")
    teacher = _checked_teacher(scores, teacher)
    name, least = ("accuracy_drop", accuracy_drop) if logprob_drop is None else ("logprob_drop", logprob_drop)
    table = scores.accuracy_drop if logprob_drop is None else scores.logprob_drop
    kept = [(layer, head) for layer, head in scores.ranking() if table[layer][head] >= least]
    if not kept:
        raise ValueError(f"No head of {teacher.id} has a drop of {least} or more; take a lower threshold.")
    return _scored_map(scores, teacher, kept, {"method": "threshold", "heads": len(kept), name: least})


def random_heads(
    teacher: TeacherShape,
    heads: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    cache: CacheBudget | None = None,
) -> HeadMap:
    """Keeps heads drawn at random: the control that shows what the choice is worth. Arguments as in [`top_k`]."""
    count = teacher.num_heads if cache is not None else _count(teacher, heads, fraction)
    drawn = random.Random(seed).sample(range(teacher.num_heads), count)
    pairs = [divmod(index, teacher.num_attention_heads) for index in drawn]
    kept = _spend(teacher, [[pair] for pair in pairs], heads, fraction, cache)
    return HeadMap.from_pairs(
        teacher,
        kept,
        selection=_selection("random", len(kept), fraction, cache, seed=seed),
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


def uniform_layers(
    teacher: TeacherShape,
    heads: int | None = None,
    fraction: float | None = None,
    cache: CacheBudget | None = None,
) -> HeadMap:
    """
    Keeps whole layers spread evenly over the depth, as many as the budget has room for and at least one. Arguments as
    in [`top_k`]; of a layer that a number of heads pays only in part, none is kept.
    """
    layers, size = teacher.num_hidden_layers, teacher.num_attention_heads

    def spread(number: int) -> list[Pair]:
        # The middles of `number` equal stretches of the depth.
        chosen = [(2 * i + 1) * layers // (2 * number) for i in range(number)]
        return [(layer, head) for layer in chosen for head in range(size)]

    if cache is None:
        number = max(1, _count(teacher, heads, fraction) // size)
    else:
        _only(heads, fraction, cache)
        fitting = [number for number in range(1, layers + 1) if cache.cost(teacher, spread(number)) <= cache.bytes]
        if not fitting:
            raise ValueError(_too_small(teacher, cache, spread(1)))
        number = max(fitting)
    return HeadMap.from_pairs(
        teacher,
        spread(number),
        selection=_selection("uniform-layers", number * size, fraction, cache, layers=number),
        source=f"All heads of {number} layers spread evenly over the depth.",
    )


def best_layers(
    teacher: TeacherShape,
    importance: list[float],
    method: str,
    heads: int | None = None,
    fraction: float | None = None,
    cache: CacheBudget | None = None,
) -> HeadMap:
    """
    Keeps the most important layers whole, by what `text_scores.py` measures.

    Args:
        teacher ([`TeacherShape`]):
            Teacher.
        importance (`list[float]`):
            One number for each layer, higher where the layer is needed more.
        method (`str`):
            Name of the selector, for the map's provenance.
        heads, fraction, cache:
            As in [`uniform_layers`].
    """
    if len(importance) != teacher.num_hidden_layers:
        raise ValueError(f"{len(importance)} importances do not fit {teacher.num_hidden_layers} layers.")
    size = teacher.num_attention_heads
    order = sorted(range(len(importance)), key=lambda layer: -importance[layer])
    units = [[(layer, head) for head in range(size)] for layer in order]
    if cache is None:
        heads, fraction = max(size, _count(teacher, heads, fraction) // size * size), None
    kept = _spend(teacher, units, heads, fraction, cache)
    return HeadMap.from_pairs(
        teacher,
        kept,
        selection=_selection(method, len(kept), fraction, cache, layers=len(kept) // size),
        ranking=[pair for unit in units for pair in unit],
        source=f"All heads of the {len(kept) // size} layers that matter most by {method}.",
    )


def _spend(teacher, units: list[list[Pair]], heads, fraction, cache: CacheBudget | None) -> list[Pair]:
    """Takes units of heads in their order for as long as the budget lasts."""
    _only(heads, fraction, cache)
    kept: list[Pair] = []
    count = None if cache is not None else _count(teacher, heads, fraction)
    for unit in units:
        over = cache.cost(teacher, kept + unit) > cache.bytes if count is None else len(kept) + len(unit) > count
        if over:
            break
        kept = kept + unit
    if not kept:
        if count is None:
            raise ValueError(_too_small(teacher, cache, units[0]))
        raise ValueError(
            f"The first {len(units[0])} heads can only be kept together; a budget of {count} is too small."
        )
    return kept


def _only(heads: int | None, fraction: float | None, cache: CacheBudget | None) -> None:
    if sum(value is not None for value in (heads, fraction, cache)) != 1:
        raise ValueError(
            "Give exactly one budget: a number of heads (--heads 8), a fraction (--fraction 0.03), or bytes of cache "
            "(--cache-bytes 30000000)."
        )


def _count(teacher: TeacherShape, heads: int | None, fraction: float | None) -> int:
    _only(heads, fraction, None)
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


def _too_small(teacher: TeacherShape, cache: CacheBudget, first: list[Pair]) -> str:
    return (
        f"{cache.bytes:,} bytes of cache at {cache.tokens} tokens hold no head of {teacher.id}: without any head the "
        f"states need {cache.cost(teacher, []):,}, with the first choice {cache.cost(teacher, first):,}."
    )


def _checked_teacher(scores: HeadScores, teacher: TeacherShape | None) -> TeacherShape:
    teacher = teacher or scores.teacher
    if not teacher.same_layout(scores.teacher):
        raise ValueError(
            f"These scores are of {scores.teacher.id} ({scores.teacher.layout}), "
            f"not of {teacher.id} ({teacher.layout})."
        )
    return teacher


def _scored_map(
    scores: HeadScores,
    teacher: TeacherShape,
    kept: list[Pair],
    selection: dict,
    ranking: list[Pair] | None = None,
) -> HeadMap:
    return HeadMap.from_pairs(
        teacher,
        kept,
        selection=selection,
        ranking=ranking or scores.ranking(),
        probe=scores.probe,
        scores_sha256=scores.sha256,
        source=(
            f"Every head ablated by hf-rad on {scores.num_examples} examples of "
            f"{probe_from_settings(scores.probe).name}, seed {scores.seed}, which the whole teacher answers at "
            f"{scores.base_accuracy:.0%}."
        ),
    )


def _group(teacher: TeacherShape, pair: Pair) -> Pair:
    return pair[0], pair[1] // teacher.queries_per_group


def _helps(scores: HeadScores, layer: int, head: int) -> bool:
    return scores.logprob_drop[layer][head] > 0


def _selection(method: str, heads: int, fraction: float | None, cache: CacheBudget | None = None, **more) -> dict:
    bytes_given = {} if cache is None else {"cache": asdict(cache)}
    return {
        "method": method,
        "heads": heads,
        **({} if fraction is None else {"fraction": fraction}),
        **bytes_given,
        **more,
    }
