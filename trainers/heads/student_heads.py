"""
Where a student's retrieval sits: its attention and recurrent heads ablated, one at a time and in groups (paper, section
5.5 and Table 6, https://huggingface.co/papers/2602.11374: the burden should rest on the kept heads).

    found = locate_retrieval(student, tokenizer, KVRetrieval(format="json", queries=4), num_examples=100)
    for group in found.groups:
        print(group.name, group.heads, group.accuracy)

Accuracy is the exact match of greedy generation, teacher-forced, as in `head_scoring.py`; every prompt is read whole.
Runs on whatever device the student is on.
"""

import random
from dataclasses import asdict, dataclass

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from modeling_rad_hybrid import RadHybridConfig, RadHybridForCausalLM
from trainers.heads.ablation import Heads, tokens_at_once
from trainers.heads.head_curves import answers_without
from trainers.probes import Probe
from trainers.probes.probe_rows import pack


@dataclass(frozen=True)
class HeadGroup:
    """
    A student without some of its heads.

    Args:
        name (`str`):
            What is ablated.
        heads (`int`):
            Number of heads ablated.
        accuracy (`float`), log_prob (`float`):
            Part of the questions answered, and mean log-probability of an answer in nats.
    """

    name: str
    heads: int
    accuracy: float
    log_prob: float


@dataclass(frozen=True)
class StudentRetrieval:
    """
    What [`locate_retrieval`] found.

    Args:
        probe (`dict`), num_examples (`int`), seed (`int`):
            What was asked.
        whole ([`HeadGroup`]):
            The student as it is.
        groups (`list[HeadGroup]`):
            Groups of heads, ablated together.
        kept (`dict[str, HeadGroup]`), recurrent (`dict[str, HeadGroup]`):
            Each kept head, and each of some recurrent heads drawn at random, ablated alone, by "layer.head".
    """

    probe: dict
    num_examples: int
    seed: int
    whole: HeadGroup
    groups: list[HeadGroup]
    kept: dict[str, HeadGroup]
    recurrent: dict[str, HeadGroup]

    def to_dict(self) -> dict:
        """Returns plain values for a JSON file."""
        return asdict(self)

    def table(self, title: str = "") -> Table:
        """Renders the groups, the range over single recurrent heads, and each kept head."""
        table = Table("ablated", title=title or None, title_justify="left")
        for column in ("heads", "accuracy", "log-probability"):
            table.add_column(column, justify="right")
        for group in (self.whole, *self.groups):
            table.add_row(group.name, str(group.heads), f"{group.accuracy:.3f}", f"{group.log_prob:.2f}")
        table.add_section()
        if self.recurrent:
            accuracies = [group.accuracy for group in self.recurrent.values()]
            mean = sum(accuracies) / len(accuracies)
            log_prob = sum(group.log_prob for group in self.recurrent.values()) / len(accuracies)
            label = f"one recurrent head, mean of {len(accuracies)} (lowest {min(accuracies):.3f})"
            table.add_row(label, "1", f"{mean:.3f}", f"{log_prob:.2f}")
        for group in self.kept.values():
            table.add_row(group.name, "1", f"{group.accuracy:.3f}", f"{group.log_prob:.2f}")
        return table


def student_slots(config: RadHybridConfig) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """
    Where a student's heads stand among the slots of `ablation.py`.

    Args:
        config ([`RadHybridConfig`]):
            Configuration of the student.

    Returns:
        `tuple[dict, dict]`: (layer, head) -> slot in the layer, of its kept heads and of its recurrent ones. With
        `parallel` mixing a head that is kept has a recurrent one beside it and stands in both.
    """
    kept, recurrent = {}, {}
    for layer, heads in enumerate(config.kept_heads):
        others = [
            head for head in range(config.num_attention_heads) if config.mixing == "parallel" or head not in heads
        ]
        kept |= {(layer, head): slot for slot, head in enumerate(heads)}
        recurrent |= {(layer, head): len(heads) + slot for slot, head in enumerate(others)}
    return kept, recurrent


def locate_retrieval(
    student: RadHybridForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    num_examples: int = 100,
    seed: int = 0,
    random_heads: int = 20,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> StudentRetrieval:
    """
    Measures a student's retrieval without groups of its heads and without single ones.

    Args:
        student ([`RadHybridForCausalLM`]):
            The student, on any device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        probe ([`~trainers.probes.Probe`]):
            What is asked.
        num_examples (`int`, *optional*, defaults to `100`):
            Questions.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions and of the random heads.
        random_heads (`int`, *optional*, defaults to `20`):
            Recurrent heads to ablate alone, drawn at random; at most all of them.
        batch_tokens (`int`, *optional*):
            Tokens of one forward call, copies for several ablations included; by default as many as suit the device.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`StudentRetrieval`]: the groups are all kept heads, all recurrent heads of the layers with a kept head, as many
        random recurrent heads as there are kept ones, and all recurrent heads.
    """
    kept, recurrent = student_slots(student.config)
    generator = random.Random(f"recurrent heads {seed}")
    alone = generator.sample(sorted(recurrent), min(random_heads, len(recurrent)))
    layers = {layer for layer, _ in kept}
    groups = {
        "all kept heads": _slots(kept, kept),
        "all recurrent heads of their layers": _slots(recurrent, (head for head in recurrent if head[0] in layers)),
        "as many random recurrent heads": _slots(
            recurrent, generator.sample(sorted(recurrent), min(len(kept), len(recurrent)))
        ),
        "all recurrent heads": _slots(recurrent, recurrent),
    }
    groups = {name: heads for name, heads in groups.items() if heads}
    singles = {f"kept {layer}.{head}": _slots(kept, [(layer, head)]) for layer, head in kept}
    others = {f"recurrent {layer}.{head}": _slots(recurrent, [(layer, head)]) for layer, head in sorted(alone)}
    ablations = {"nothing": [], **groups, **singles, **others}
    measured = _measure(student, tokenizer, probe.examples(num_examples, seed), ablations, batch_tokens, progress)
    return StudentRetrieval(
        probe.settings(),
        num_examples,
        seed,
        measured["nothing"],
        [measured[name] for name in groups],
        {name.split()[1]: measured[name] for name in singles},
        {name.split()[1]: measured[name] for name in others},
    )


def _slots(table: dict[tuple[int, int], int], heads) -> Heads:
    return [(layer, table[layer, head]) for layer, head in heads]


def _measure(
    student, tokenizer, examples, ablations: dict[str, Heads], batch_tokens, progress
) -> dict[str, HeadGroup]:
    """Accuracy and log-probability under each named ablation."""
    tokens = tokens_at_once(student, batch_tokens)
    batches = pack(tokenizer, examples, None, student.device, share=False, tokens=tokens)
    heads = list(ablations.values())
    measured = answers_without(student, tokenizer, batches, heads, "zero", batch_tokens, progress)
    return {
        name: HeadGroup(name, len(heads), *values)
        for (name, heads), values in zip(ablations.items(), measured, strict=True)
    }
