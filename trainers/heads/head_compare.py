"""
Two head maps side by side: which heads both keep, and how alike their rankings are.

    compare(HeadMap.load("a.json"), HeadMap.load("b.json"))["overlap"]["8"]
"""

from trainers.heads.head_map import HeadMap


# Numbers of best heads whose overlap is worth telling, as far as both rankings go.
COUNTS = (1, 2, 4, 5, 8, 10, 16, 20, 32, 40)

Pair = tuple[int, int]


def overlap(first: list[Pair], second: list[Pair], count: int) -> float:
    """
    Part of the best `count` heads that two rankings share.

    Raises:
        `ValueError`: when one of them has fewer.
    """
    if not 1 <= count <= min(len(first), len(second)):
        raise ValueError(f"Rankings of {len(first)} and {len(second)} heads have no {count} best ones to compare.")
    return len(set(first[:count]) & set(second[:count])) / count


def spearman(first: list[Pair], second: list[Pair]) -> float | None:
    """
    Rank correlation of two rankings over the heads that both contain: 1 for the same order, -1 for the reverse, `None`
    with fewer than two such heads.
    """
    shared = set(first) & set(second)
    if len(shared) < 2:
        return None
    orders = [
        {pair: rank for rank, pair in enumerate(pair for pair in ranking if pair in shared)}
        for ranking in (first, second)
    ]
    n = len(shared)
    squares = sum((orders[0][pair] - orders[1][pair]) ** 2 for pair in shared)
    return 1 - 6 * squares / (n * (n * n - 1))


def compare(first: HeadMap, second: HeadMap) -> dict:
    """
    Compares two head maps of teachers with the same layout.

    Args:
        first ([`~trainers.heads.head_map.HeadMap`]), second ([`~trainers.heads.head_map.HeadMap`]):
            The maps. One without a ranking is compared by its kept heads alone.

    Returns:
        `dict`: `both`, `only_first`, `only_second` (lists of [layer, head] that are kept), `kv_groups_both` (number of
        KV groups that both read), `overlap` (number of best heads -> part that both rankings share), `spearman` (over
        the heads that both rank, or `None`) and `ranked_by_both`.

    Raises:
        `ValueError`: when the layouts differ.
    """
    if not first.teacher.same_layout(second.teacher):
        raise ValueError(
            f"These head maps cannot be compared: {first.teacher.id} has {first.teacher.layout}, {second.teacher.id} "
            f"has {second.teacher.layout}."
        )
    kept = set(first.pairs), set(second.pairs)
    most = min(len(first.ranking), len(second.ranking))
    return {
        "both": [list(pair) for pair in sorted(kept[0] & kept[1])],
        "only_first": [list(pair) for pair in sorted(kept[0] - kept[1])],
        "only_second": [list(pair) for pair in sorted(kept[1] - kept[0])],
        "kv_groups_both": len(first.kv_groups & second.kv_groups),
        "overlap": {str(count): overlap(first.ranking, second.ranking, count) for count in COUNTS if count <= most},
        "spearman": spearman(first.ranking, second.ranking),
        "ranked_by_both": len(set(first.ranking) & set(second.ranking)),
    }
