"""
Head scoring against its naive form: seconds, ratio, the difference of the scores, and what a screen finds.

    python -m benchmarks.head_scoring                                    SmolLM2-135M-Instruct, on the GPU where there is one
    python -m benchmarks.head_scoring --num-examples 4 --seeds 0         a rehearsal

Both sides answer the same questions with the same heads ablated, in the same process. Naive is one head at a time and
one prompt at a time, a whole forward pass of the whole prompt with a hook on the head's `o_proj`. It is measured on
`--layers` layers that stand for equal stretches of the depth, and so is ours; what they took is multiplied up to all
layers by the same number for both. On a CPU the ratio is that of the processor seconds of the process, which other
processes of the machine do not change; on a GPU that of the clock. Questions share nothing (`--queries 1`) unless asked to: with 10 questions on one
dictionary ours reads what they share once. The screened scores are measured whole, for every seed, and compared with
the exact ones.
"""

import argparse
import time

import torch
from tqdm.auto import tqdm

from trainers.ablation import HeadAblation, attention_layers, inference, tokens_at_once
from trainers.evaluation import hardware, versions
from trainers.files import write_json
from trainers.head_compare import overlap
from trainers.head_scoring import score_heads
from trainers.probe_rows import pack
from trainers.probes import EncodedAnswer, KVRetrieval, is_correct
from trainers.recipe import Recipe
from trainers.screens import SCREENS
from trainers.workshop import Workshop, default_device


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    workshop = Workshop(Recipe(teacher=args.teacher))
    model, tokenizer = workshop.teacher, workshop.tokenizer
    probe = KVRetrieval(format=args.format, pairs=args.pairs, shots=2, queries=args.queries)
    print(f"{workshop.teacher_name}, {probe.name}, {args.num_examples} questions, {hardware()}, {versions()}")
    result = {"hardware": hardware(), "versions": versions(), "probe": probe.settings(), "examples": args.num_examples}
    result["exact"] = exact(model, tokenizer, probe, args)
    result["screens"] = [
        line
        for seed in args.seeds
        if args.screens
        for line in screened(model, tokenizer, probe, args, seed, result["exact"]["naive_s"])
    ]
    if args.out:
        write_json(args.out, result)


def exact(model, tokenizer, probe, args) -> dict:
    """Both forms of exact ablation on the same heads."""
    layers, heads = len(attention_layers(model)), model.config.num_attention_heads
    # The middles of equal stretches of the depth.
    chosen = sorted({(2 * i + 1) * layers // (2 * args.layers) for i in range(args.layers)})
    factor = layers / len(chosen)
    examples = probe.examples(args.num_examples, args.seeds[0])
    with inference(model, None):
        ours(model, tokenizer, examples[:2], chosen[-1:])  # warms both up
        naive(model, tokenizer, examples[:2], chosen[-1:], heads)
        base = [plain(model, tokenizer, example) for example in examples]
        seconds = {}
        for layer in chosen:
            seconds[layer] = [timed(ours, model, tokenizer, examples, [layer])]
            seconds[layer].append(timed(naive, model, tokenizer, examples, [layer], heads))
        fixed, _ = timed(ours, model, tokenizer, examples, [])
    worst_accuracy = worst_log_prob = 0.0
    for (_, mine), (_, theirs) in seconds.values():
        for (right, value), (naive_right, naive_value) in zip(mine, theirs, strict=True):
            worst_accuracy = max(worst_accuracy, abs(right - naive_right) / len(examples))
            worst_log_prob = max(worst_log_prob, abs(value - naive_value) / len(examples))
    # Reading the examples once is not done again for every layer.
    ours_s = fixed + factor * sum(max(pair[0][0] - fixed, 0.0) for pair in seconds.values())
    naive_s = factor * sum(pair[1][0] for pair in seconds.values())
    print(
        f"whole model: accuracy {sum(right for right, _ in base) / len(base):.2f}; layers {chosen} of {layers}, all "
        f"{heads} heads of each\n"
        f"naive {naive_s:.1f} s, ours {ours_s:.1f} s for all {layers * heads} heads: ratio {naive_s / ours_s:.2f}; "
        f"greatest difference {worst_accuracy:g} in accuracy, {worst_log_prob:.1e} in log-probability ({model.dtype})"
    )
    return {
        "layers": chosen,
        "naive_s": naive_s,
        "ours_s": ours_s,
        "ratio": naive_s / ours_s,
        "by_layer_s": {str(layer): [pair[0][0], pair[1][0]] for layer, pair in seconds.items()},
        "accuracy_difference": worst_accuracy,
        "log_prob_difference": worst_log_prob,
    }


def screened(model, tokenizer, probe, args, seed: int, naive_s: float) -> list[dict]:
    """The exact scores of all heads for one seed, and those behind each screen."""
    options = {"num_examples": args.num_examples, "seed": seed, "min_accuracy": 0.0}
    if args.speed_only:
        for screen in args.screens:
            options |= {"screen": screen, "num_survivors": args.survivors}
            seconds, _ = timed(score_heads, model, tokenizer, probe, **options)
            print(f"  {screen:12s} {args.survivors} survivors: {seconds:.1f} s, {naive_s / seconds:.1f} times naive")
        return []
    full_s, whole = timed(score_heads, model, tokenizer, probe, **options)
    best = whole.ranking()
    print(f"seed {seed}: accuracy {whole.base_accuracy:.2f}, all heads exactly in {full_s:.1f} s, best {best[:8]}")
    lines = []
    for screen in args.screens:
        chosen = {"screen": screen, "num_survivors": args.survivors}
        seconds, scores = timed(score_heads, model, tokenizer, probe, **options, **chosen)
        table = scores.screened
        order = sorted(best, key=lambda pair: -table[pair[0]][pair[1]])
        line = {
            "seed": seed,
            "screen": screen,
            "survivors": args.survivors,
            "seconds": seconds,
            "exact_s": full_s,
            "ratio_to_naive": naive_s / seconds,
            "ratio_to_exact": full_s / seconds,
            "same_top_8": scores.ranking()[:8] == best[:8],
            "overlap_8": overlap(scores.ranking(), best, 8),
            "overlap_20": overlap(scores.ranking(), best, 20),
            "screen_alone_8": overlap(order, best, 8),
            "screen_alone_20": overlap(order, best, 20),
            "last_of_top_8": max(order.index(pair) for pair in best[:8]) + 1,
        }
        lines.append(line)
        print(
            f"  {screen:12s} {args.survivors} survivors: {seconds:.1f} s, {naive_s / seconds:.1f} times naive; exact top "
            f"8 {'named' if line['same_top_8'] else 'NOT named'}, overlap@8 {line['overlap_8']:.2f}, @20 "
            f"{line['overlap_20']:.2f}; the screen alone: @8 {line['screen_alone_8']:.2f}, @20 "
            f"{line['screen_alone_20']:.2f}, last of the top 8 at rank {line['last_of_top_8']}"
        )
    return lines


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


def naive(model, tokenizer, examples, layers: list[int], heads: int) -> list[tuple[int, float]]:
    """The same by whole forward passes, one head and one prompt at a time."""
    size, sums = model.config.head_dim, []
    for layer in layers:
        o_proj = attention_layers(model)[layer].self_attn.o_proj
        for head in tqdm(range(heads), desc=f"naive, layer {layer}", leave=False):

            def zero(module, args, part=slice(head * size, (head + 1) * size)):
                changed = args[0].clone()
                changed[..., part] = 0
                return (changed,)

            hook = o_proj.register_forward_pre_hook(zero)
            answers = [plain(model, tokenizer, example) for example in examples]
            hook.remove()
            sums.append((sum(right for right, _ in answers), sum(value for _, value in answers)))
    return sums


def plain(model, tokenizer, example) -> tuple[bool, float]:
    """Whether greedy generation would give the answer, and its log-probability, from one plain forward pass."""
    one = EncodedAnswer.of(tokenizer, example)
    ids = torch.tensor([one.context + one.target], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(one.context) - 1 :].float()
    best = logits.argmax(-1).tolist()[: one.num_answer + 1]
    value = logits[:-1].log_softmax(-1)[range(len(one.target)), one.target].double().sum().item()
    text = tokenizer.decode(best, skip_special_tokens=True)
    return best[:-1] == one.target[: one.num_answer] and is_correct(text, example.answer), value


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
    parser.add_argument("--survivors", type=int, default=48, help="heads that a screen lets through (default: 48)")
    parser.add_argument("--speed-only", action="store_true", help="time the screens without the exact table of all heads")
    parser.add_argument("--out", help="JSON file for the numbers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
