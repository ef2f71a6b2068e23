"""
Examples of a probe as rows of tokens, with the positions whose predictions decide about their answers.

Prompts that begin alike can share their beginning: each becomes a branch of one row, sees the shared prefix and itself
through a 4-D attention mask, and keeps its own position ids. Only models whose token mixers all obey such a mask can
read them so; a model with recurrent heads reads one prompt a row.

Shapes: B packed rows, T their tokens, E examples, S scored positions (those whose logits count).
"""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from trainers.probes import EncodedAnswer, Example, common_prefix


# Two prompts share a row when at least this part of the first one's tokens begins both.
SHARED_PART = 0.5


@dataclass(frozen=True)
class PackedExamples:
    """
    Examples as packed rows of tokens.

    Args:
        input_ids, position_ids (`torch.Tensor`):
            [B, T]; rows are padded on the right.
        visible (`torch.Tensor` or `None`):
            Boolean [B, 1, T, T]: which key positions (last axis) a query position sees; `None` where no row is shared,
            so that plain causal reading is right.
        row, column, target (`torch.Tensor`):
            [S]: where each scored position stands and the token it should predict, -1 where any will do.
        spans (`list[tuple[int, int]]`):
            For each example its scored positions, first and one past the last.
        encoded (`list[EncodedAnswer]`), examples (`list[Example]`):
            The examples in tokens, and as they were asked.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor | None
    row: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor
    spans: list[tuple[int, int]]
    encoded: list[EncodedAnswer]
    examples: list[Example]

    @property
    def real(self) -> torch.Tensor:
        """[B, T]: where a token stands, and not padding."""
        # Only the first token of a row has position 0; padding has it too.
        return (self.position_ids > 0) | (torch.arange(self.position_ids.shape[1], device=self.row.device) == 0)


def pack(
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    rows: int | None,
    device: torch.device,
    share: bool = True,
    tokens: int = 0,
) -> list[PackedExamples]:
    """
    Packs examples into batches of rows; consecutive examples with a common beginning share a row.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        examples (`list[Example]`):
            Questions.
        rows (`int` or `None`):
            Rows of a batch (its examples are several times as many when they share beginnings); `None` for as many as
            `tokens` hold.
        device (`torch.device`):
            Where the tensors go.
        share (`bool`, *optional*, defaults to `True`):
            Whether examples may share a row at all.
        tokens (`int`, *optional*, defaults to `0`):
            Most tokens of a batch where `rows` is `None`; one row is always taken.
    """
    groups: list[list[tuple[EncodedAnswer, Example]]] = []
    for example in examples:
        encoded = EncodedAnswer.of(tokenizer, example)
        first = groups[-1][0][0].context if groups else []
        if share and groups and common_prefix(first, encoded.context) >= SHARED_PART * len(first):
            groups[-1].append((encoded, example))
        else:
            groups.append([(encoded, example)])
    if rows is None:
        most = max(1, tokens // max(map(_row_length, groups)))
        # No small batch is left at the end.
        rows = math.ceil(len(groups) / math.ceil(len(groups) / most))
    return [_pack_rows(groups[first : first + rows], device) for first in range(0, len(groups), rows)]


def _row_length(group: list[tuple[EncodedAnswer, Example]]) -> int:
    """Tokens of a row, give or take an answer."""
    first = group[0][0].context
    branches = sum(len(one.context) - common_prefix(first, one.context) + len(one.target) for one, _ in group)
    return len(first) + branches


def _pack_rows(groups: list[list[tuple[EncodedAnswer, Example]]], device: torch.device) -> PackedExamples:
    ids, positions, branches, scored, spans, encoded, examples = [], [], [], [], [], [], []
    for row, group in enumerate(groups):
        contexts = [one.context for one, _ in group]
        # A branch keeps at least its last context token, the one that predicts the first token of the answer.
        shared = min(min(common_prefix(contexts[0], context), len(context) - 1) for context in contexts)
        row_ids, row_positions, row_branches = contexts[0][:shared], list(range(shared)), [0] * shared
        for branch, (one, example) in enumerate(group, start=1):
            # The position after the answer's last token says whether the answer goes on.
            fed = one.context[shared:] + one.target[: max(one.num_answer, len(one.target) - 1)]
            first_scored = len(row_ids) + len(one.context) - shared - 1
            last_scored = len(row_ids) + len(fed)
            spans.append((len(scored), len(scored) + last_scored - first_scored))
            targets = one.target + [-1] * (last_scored - first_scored - len(one.target))
            scored += [(row, first_scored + i, target) for i, target in enumerate(targets)]
            row_ids = row_ids + fed
            row_positions = row_positions + list(range(shared, shared + len(fed)))
            row_branches = row_branches + [branch] * len(fed)
            encoded.append(one)
            examples.append(example)
        ids.append(row_ids)
        positions.append(row_positions)
        branches.append(row_branches)
    longest = max(map(len, ids))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    visible = None
    if any(len(group) > 1 for group in groups):
        branch = padded(branches, -1)  # [B, T]; 0 is the shared prefix, -1 padding
        same = branch[:, :, None] == branch[:, None, :]
        prefix = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
        visible = ((same | prefix) & causal)[:, None]
    row, column, target = torch.tensor(scored, device=device).unbind(-1)
    return PackedExamples(padded(ids, 0), padded(positions, 0), visible, row, column, target, spans, encoded, examples)
