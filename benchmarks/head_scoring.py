"""
Head scoring against its naive form: seconds, ratio, the difference of the scores, and what a screen finds.

    python -m benchmarks.head_scoring --num-examples 40                  SmolLM2-135M-Instruct on a GPU
    python -m benchmarks.head_scoring --num-examples 2 --layers 3 --seeds 0 --screens damped --speed-only   on a CPU

Both sides answer the same questions with the same heads ablated, in the same process. Naive is one head at a time, a
whole forward pass of whole prompts with a hook on the head's `o_proj`; of one prompt a pass, and on a GPU, which is
idle most of such a pass, also of all prompts at once (`--naive-batch`). Ratios are to the faster form. It is measured
on `--layers` layers that stand for equal stretches of the depth, and so is ours; what they took is multiplied up to all
layers by the same number for both. On a CPU the ratio is that of the processor seconds of the process, which other
processes of the machine do not change; on a GPU that of the clock. Questions share nothing (`--queries 1`) unless asked
to: with 10 questions on one dictionary ours reads what they share once. The screened scores are measured whole, for
every seed, and compared with the exact ones.
"""

import argparse
import itertools
import time

import torch
from tqdm.auto import tqdm

from trainers.evaluation import hardware, versions
from trainers.files import write_json
from trainers.heads.ablation import HeadAblation, inference, tokens_at_once
from trainers.heads.head_compare import overlap
from trainers.heads.head_layout import attention_layers
from trainers.heads.head_scores import HeadScores
from trainers.heads.head_scoring import score_heads
from trainers.heads.screens import SCREENS, screen_heads
from trainers.probes import EncodedAnswer, KVRetrieval, is_correct
from trainers.probes.probe_rows import pack
from trainers.recipe import Recipe
from trainers.workshop import Workshop, default_device


def main() -> None:
    args = parse()
    workshop = Workshop(Recipe(teacher=args.teacher))
    model, tokenizer = workshop.teacher, workshop.tokenizer
    probe = KVRetrieval(format=args.format, pairs=args.pairs, shots=2, queries=args.queries)
    print(f"{workshop.teacher_name}, {probe.name}, {args.num_examples} questions, {hardware()}, {versions()}")
    # "highest": no TF32.
    print(f"float32 products in {torch.get_float32_matmul_precision()} precision", flush=True)
    result = {"hardware": hardware(), "versions": versions(), "probe": probe.settings(), "examples": args.num_examples}
    result["exact"] = exact(model, tokenizer, probe, args)
    result["screens"] = []
    for seed in args.seeds if args.screens else []:
        result["screens"] += screened(model, tokenizer, probe, args, seed, result["exact"]["naive_s"])
        if args.out:
            write_json(args.out, result)


def exact(model, tokenizer, probe, args) -> dict:
    """Both forms of exact ablation on the same heads."""
    layers, heads = len(attention_layers(model)), model.config.num_attention_heads
    # The middles of equal stretches of the depth.
    chosen = sorted({(2 * i + 1) * layers // (2 * args.layers) for i in range(args.layers)})
    factor = layers / len(chosen)
    examples = probe.examples(args.num_examples, args.seeds[0])
    prompts = [EncodedAnswer.of(tokenizer, example) for example in examples]
    with inference(model, None):
        ours(model, tokenizer, examples, chosen[-1:])  # warms both up
        for size in args.naive_batch:
            whole = plain(model, tokenizer, examples, prompts, size)
        fixed, _ = timed(ours, model, tokenizer, examples, [])
        mine = {layer: timed(ours, model, tokenizer, examples, [layer]) for layer in tqdm(chosen, desc="ours")}
        theirs = {
            size: {layer: timed(naive, model, tokenizer, examples, prompts, layer, size) for layer in chosen}
            for size in args.naive_batch
        }
    # Reading the examples once is not done again for every layer.
    ours_s = fixed + factor * sum(max(seconds - fixed, 0.0) for seconds, _ in mine.values())
    naive_s = {size: factor * sum(seconds for seconds, _ in table.values()) for size, table in theirs.items()}
    print(
        f"whole model: accuracy {whole[0] / len(examples):.2f}; layers {chosen} of {layers}, all {heads} heads of each"
    )
    print(f"ours {ours_s:.1f} s for all {layers * heads} heads, in batches of {tokens_at_once(model, None)} tokens")
    differences = {}
    for size, table in theirs.items():
        differences[size] = accuracy, log_prob = difference(mine, table, len(examples))
        print(
            f"naive, {size} prompts a pass: {naive_s[size]:.1f} s, ratio {naive_s[size] / ours_s:.2f}; greatest "
            f"difference {accuracy:g} in accuracy, {log_prob:.1e} in log-probability ({model.dtype})",
            flush=True,
        )
    return {
        "layers": chosen,
        "ours_s": ours_s,
        "naive_s": min(naive_s.values()),
        "ratio": min(naive_s.values()) / ours_s,
        "naive": [
            {
                "prompts": size,
                "seconds": naive_s[size],
                "accuracy_difference": accuracy,
                "log_prob_difference": log_prob,
            }
            for size, (accuracy, log_prob) in differences.items()
        ],
    }


def difference(mine: dict, theirs: dict, number: int) -> tuple[float, float]:
    """Greatest difference of a head's accuracy and mean log-probability between two tables of sums."""
    pairs = [pair for layer in mine for pair in zip(mine[layer][1], theirs[layer][1], strict=True)]
    return tuple(max(abs(one[i] - two[i]) for one, two in pairs) / number for i in (0, 1))


def screened(model, tokenizer, probe, args, seed: int, naive_s: float) -> list[dict]:
    """The exact scores of all heads for one seed, and those behind each screen."""
    options = {"num_examples": args.num_examples, "seed": seed, "min_accuracy": 0.0}
    examples = probe.examples(args.num_examples, seed)
    whole, full_s = None, None
    if not args.speed_only:
        full_s, whole = timed(score_heads, model, tokenizer, probe, **options)
        print(f"seed {seed}: accuracy {whole.base_accuracy:.2f}, all heads exactly in {full_s:.1f} s", flush=True)
        print(f"  best {whole.ranking()[:8]}")
    lines = []
    for screen, survivors in itertools.product(args.screens, args.survivors):
        alone_s, _ = timed(screen_heads, model, tokenizer, examples, screen)
        chosen = {"screen": screen, "num_survivors": survivors}
        seconds, scores = timed(score_heads, model, tokenizer, probe, **options, **chosen)
        line = {"seed": seed, **chosen, "seconds": seconds, "screen_s": alone_s, "ratio_to_naive": naive_s / seconds}
        found = ""
        if whole is not None:
            line |= {"exact_s": full_s, **compared(whole, scores)}
            found = (
                f"; best 8 {'named' if line['overlap_8'] == 1 else 'NOT named'}, overlap@8 {line['overlap_8']:.2f}, "
                f"@20 {line['overlap_20']:.2f}; the screen alone @8 {line['screen_alone_8']:.2f}, @20 "
                f"{line['screen_alone_20']:.2f}, the last of the best 8 at rank {line['last_of_best_8']}"
            )
        print(
            f"  {screen:11s} {survivors} survivors: {seconds:.1f} s ({alone_s:.1f} s of it the screen), "
            f"{naive_s / seconds:.1f} times naive{found}",
            flush=True,
        )
        lines.append(line)
    return lines


def compared(whole: HeadScores, scores: HeadScores) -> dict:
    """How well screened scores, and the screen alone, name the best heads of the exact scores."""
    best, ranking = whole.ranking(), scores.ranking()
    order = sorted(best, key=lambda pair: -scores.screened[pair[0]][pair[1]])
    return {
        "overlap_8": overlap(ranking, best, 8),
        "overlap_20": overlap(ranking, best, 20),
        "screen_alone_8": overlap(order, best, 8),
        "screen_alone_20": overlap(order, best, 20),
        "last_of_best_8": max(order.index(pair) for pair in best[:8]) + 1,
    }


def ours(model, tokenizer, examples, layers: list[int]) -> list[tuple[int, float]]:
    """Sums of right answers and of log-probabilities for each head of the layers."""
    heads, sums = model.config.num_attention_heads, {}
    tokens = tokens_at_once(model, None)
    for batch in pack(tokenizer, examples, None, model.device, tokens=tokens // heads):
        ablation = HeadAblation(model, tokenizer, batch)
        step = max(1, tokens // batch.input_ids.numel())
        for layer in layers:
            for first in range(0, heads, step):
                part = list(range(first, min(first + step, heads)))
                outcome = ablation.ablate(layer, part)
                for row, head in enumerate(part):
                    right, value = sums.get((layer, head), (0, 0.0))
                    right += int(outcome.correct[row].sum())
                    sums[layer, head] = right, value + outcome.log_prob[row].sum().item()
    return [sums[key] for key in sorted(sums)]


def naive(model, tokenizer, examples, prompts, layer: int, size: int) -> list[tuple[int, float]]:
    """The same by whole forward passes of `size` prompts, one head at a time."""
    width, sums = model.config.head_dim, []
    o_proj = attention_layers(model)[layer].self_attn.o_proj
    for head in tqdm(range(model.config.num_attention_heads), desc=f"naive, layer {layer}", leave=False):

        def zero(module, args, part=slice(head * width, (head + 1) * width)):
            changed = args[0].clone()
            changed[..., part] = 0
            return (changed,)

        hook = o_proj.register_forward_pre_hook(zero)
        sums.append(plain(model, tokenizer, examples, prompts, size))
        hook.remove()
    return sums


def plain(model, tokenizer, examples, prompts: list[EncodedAnswer], size: int) -> tuple[int, float]:
    """How many answers greedy generation would give, and their summed log-probability, from plain forward passes."""
    right, total = 0, 0.0
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        longest = max(len(one.context + one.target) for one in part)
        # Causal attention never looks at padding on the right.
        ids = [one.context + one.target + [0] * (longest - len(one.context + one.target)) for one in part]
        places = [(row, len(one.context) - 1 + i) for row, one in enumerate(part) for i in range(len(one.target) + 1)]
        targets = [token for one in part for token in (*one.target, 0)]  # any will do after the answer's end
        logits = model(input_ids=torch.tensor(ids, device=model.device), use_cache=False).logits  # [size, longest, V]
        scored = logits[tuple(zip(*places, strict=True))].float()  # [S, V]
        best, at = scored.argmax(-1).tolist(), 0
        values = scored.log_softmax(-1)[range(len(targets)), targets].tolist()
        for one, example in zip(part, examples[first:], strict=False):
            answer = best[at : at + one.num_answer + 1]
            is_right = is_correct(tokenizer.decode(answer, skip_special_tokens=True), example.answer)
            right += answer[:-1] == one.target[: one.num_answer] and is_right
            total += sum(values[at : at + len(one.target)])
            at += len(one.target) + 1
    return right, total


def timed(call, *args, **options) -> tuple[float, object]:
    """Seconds of the clock on a GPU, of the processor on a CPU; and what the call gave."""
    clock = time.perf_counter if default_device().type == "cuda" else time.process_time
    synchronize()
    begun = clock()
    outcome = call(*args, **options)
    synchronize()
    return clock() - begun, outcome


def synchronize() -> None:
    if default_device().type == "cuda":
        torch.cuda.synchronize()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--num-examples", type=int, default=20, help="questions (default: 20)")
    parser.add_argument("--format", default="json", choices=("json", "lines", "paper"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--queries", type=int, default=1, help="questions on one dictionary (default: 1)")
    parser.add_argument("--layers", type=int, default=6, help="layers measured on both sides (default: 6)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--screens", nargs="*", default=list(SCREENS), help="none: leave the screens out")
    parser.add_argument("--survivors", type=int, nargs="+", default=[48], help="heads that a screen lets through")
    parser.add_argument(
        "--speed-only", action="store_true", help="time the screens without the exact table of all heads"
    )
    parser.add_argument(
        "--naive-batch",
        type=int,
        nargs="+",
        help="prompts of a naive forward pass (default: 1, and on a GPU also all of them)",
    )
    parser.add_argument("--out", help="JSON file for the numbers")
    args = parser.parse_args()
    every = [args.num_examples] if default_device().type == "cuda" else []
    args.naive_batch = args.naive_batch or [1, *every]
    return args


if __name__ == "__main__":
    main()
