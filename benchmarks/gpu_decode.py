"""
Decoding: a student with the published heads against its teacher, both with random weights, in the same forms.

The teacher is the student's own code with every head kept, which is the teacher bit for bit (tests/test_modeling.py);
so both run the same layers, attention back end and cache. Caches are static, of exactly the context's length, filled
with random numbers; no mask is needed then, and SDPA may take its flash kernel. Forms: `eager` calls the model,
`compiled` calls it through `torch.compile`, `graph` replays a CUDA graph of the compiled step with its greedy choice.

Floor of a step: weights, plus for each sequence the KV cache read once and the state read and written once.
"""

import time

import torch
from transformers import StaticCache
from transformers.cache_utils import LinearAttentionLayer, StaticLayer

from benchmarks.gpu_tools import CUDA, DEVICE, copy_bandwidth, first_line, relative_error, synchronize
from modeling_rad_hybrid import CACHE_NAME, RadHybridConfig, RadHybridForCausalLM
from trainers.memory import kv_bytes_per_token, state_bytes


# Tokens that a cache is filled short of its length: the steps that can be taken before it starts anew.
STEPS = 16


def make_model(fields: dict, kept_heads: list | None, dtype=torch.bfloat16) -> RadHybridForCausalLM:
    """A model with random weights on the device; `None` keeps every head, which makes it the teacher."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = RadHybridConfig(**fields, kept_heads=kept_heads)
        config._attn_implementation = "sdpa"
        model = RadHybridForCausalLM(config).to(dtype).eval()
    return model.requires_grad_(False)


def step_bytes(model, batch: int, context: int) -> int:
    """Bytes that one step must move."""
    names = {"model.embed_tokens.weight"} if not model.config.tie_word_embeddings else set()
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in names)
    return weights + batch * (context * kv_bytes_per_token(model.config) + 2 * state_bytes(model.config))


def filled_cache(model, batch: int, context: int) -> StaticCache:
    """A static cache as after `context - STEPS` tokens, with random contents."""
    cache = StaticCache(config=model.config, max_cache_len=context)
    ids = torch.zeros(batch, 2, dtype=torch.long, device=DEVICE)
    masks = {"full_attention": None, "linear_attention": None}
    with torch.no_grad():
        model.model(ids, attention_mask=masks, use_cache=True, **{CACHE_NAME: cache})
    generator = torch.Generator(DEVICE).manual_seed(1)
    # Fresh tensors: those of the cache are marked as one address for life, which would compile anew for each cache.
    for layer, kind in zip(cache.layers, model.config.layer_types, strict=True):
        if kind != "linear_attention":
            layer.keys = torch.empty_like(layer.keys).normal_(generator=generator)
            layer.values = torch.empty_like(layer.values).normal_(generator=generator)
            layer.cumulative_length = torch.full_like(layer.cumulative_length, context - STEPS)
        if kind != "full_attention":
            layer.conv_states[0] = torch.empty_like(layer.conv_states[0]).normal_(generator=generator)
            layer.recurrent_states[0] = torch.empty_like(layer.recurrent_states[0]).normal_(generator=generator)
    return cache


def tensors(layer) -> list[torch.Tensor]:
    """What a cache layer holds."""
    attention = [layer.keys, layer.values] if isinstance(layer, StaticLayer) else []
    recurrent = [layer.conv_states[0], layer.recurrent_states[0]] if isinstance(layer, LinearAttentionLayer) else []
    return attention + recurrent


def rewind(cache, kinds: list[str], context: int) -> None:
    for layer, kind in zip(cache.layers, kinds, strict=True):
        if kind != "linear_attention":
            layer.cumulative_length.fill_(context - STEPS)


def one_step(model, ids, positions, cache):
    """Logits `[B, V]` of one token a sequence."""
    masks = {"full_attention": None, "linear_attention": None}
    output = model(ids, attention_mask=masks, position_ids=positions, use_cache=True, **{CACHE_NAME: cache})
    return output.logits[:, -1]


class Decoder:
    """One model at one batch and context, and its step in every form."""

    def __init__(self, model, compiled, batch: int, context: int):
        self.model, self.compiled, self.context = model, compiled, context
        self.cache = filled_cache(model, batch, context)
        self.ids = torch.arange(batch, device=DEVICE)[:, None] + 5
        self.positions = torch.full((1, 1), context - STEPS, device=DEVICE)

    def restart(self) -> None:
        rewind(self.cache, self.model.config.layer_types, self.context)
        self.positions.fill_(self.context - STEPS)

    def step(self, function) -> torch.Tensor:
        logits = function(self.model, self.ids, self.positions, self.cache)
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        self.positions.add_(1)
        return logits

    def capture(self, function):
        """A CUDA graph of one step, and the logits that each replay writes."""
        self.restart()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step(function)
        torch.cuda.current_stream().wait_stream(stream)
        self.restart()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step(function)
        return graph, logits

    def seconds(self, take, rounds: int = 3) -> float:
        """Best mean seconds of a step over some rounds of STEPS steps."""
        best = float("inf")
        for number in range(rounds + 1):
            self.restart()
            synchronize()
            start = time.perf_counter()
            for _ in range(STEPS):
                take()
            synchronize()
            if number:
                best = min(best, (time.perf_counter() - start) / STEPS)
        return best


@torch.no_grad()
def check(report, fields, kept, compiled) -> bool:
    """Eight steps from one cache in every form against PyTorch alone, in float32 and bfloat16."""
    add = report.table(
        "Decode: logits and states after 8 steps against PyTorch in eager form", ["dtype", "form", "logits", "state"]
    )
    good = True
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model({**fields, "num_hidden_layers": 5}, kept[:5], dtype)
        mixers = [layer.mixer.ssm for layer in model.model.layers]
        found = {}
        for form in ("torch", "eager", "compiled", "graph") if CUDA else ("torch", "eager", "compiled"):
            for mixer in mixers:
                mixer.backend = "torch" if form == "torch" else "auto"
            decoder = Decoder(model, compiled, 2, 64)
            if form == "graph":
                # The steps before the capture write to the cache.
                untouched = [[t.clone() for t in tensors(layer)] for layer in decoder.cache.layers]
                graph, logits = decoder.capture(compiled)
                for layer, before in zip(decoder.cache.layers, untouched, strict=True):
                    for tensor, content in zip(tensors(layer), before, strict=True):
                        tensor.copy_(content)
                decoder.restart()
            steps = []
            for number in range(8):
                # The same tokens for all: a choice may flip on a rounding.
                decoder.ids.copy_(torch.arange(2, device=DEVICE)[:, None] + 7 * number + 5)
                if form == "graph":
                    graph.replay()
                else:
                    logits = decoder.step(compiled if form == "compiled" else one_step)
                steps.append(logits.clone())
            states = torch.cat([layer.recurrent_states[0].flatten() for layer in decoder.cache.layers])
            found[form] = torch.stack(steps), states
            if form != "torch":
                pair = [relative_error(a, b.double()) for a, b in zip(found[form], found["torch"], strict=True)]
                add(str(dtype)[6:], form, *pair)
                good = good and max(pair) < (1e-3 if dtype == torch.float32 else 5e-2)
    return good


@torch.no_grad()
def run(report, options) -> None:
    """Correctness first, then tokens a second of both models in every form."""
    compiled = torch.compile(one_step, dynamic=True, fullgraph=True)
    if not check(report, options.fields, options.kept, compiled):
        print("The forms disagree: no timing.", flush=True)
        return
    torch._dynamo.reset()
    bandwidth = copy_bandwidth()
    print(f"\nCopy bandwidth: {bandwidth / 1e12:.2f} TB/s", flush=True)
    columns = [
        "batch",
        "context",
        "model",
        "form",
        "ms",
        "tokens/s",
        "GB a step",
        "of bandwidth",
        "ratio",
        "of bytes' ratio",
    ]
    add = report.table("Decode: student and teacher", columns)
    models = {"teacher": make_model(options.fields, None), "student": make_model(options.fields, options.kept)}
    steps = {name: torch.compile(one_step, dynamic=True, fullgraph=True) for name in models}
    for batch, context in options.decode_cases:
        times, moved = {}, {name: step_bytes(model, batch, context) for name, model in models.items()}
        for name, model in models.items():
            if CUDA and moved[name] > 0.85 * torch.cuda.get_device_properties(0).total_memory:
                add(batch, context, name, "does not fit", None, None, moved[name] / 1e9, None, None, None)
                continue
            try:
                times[name] = time_forms(model, steps[name], batch, context, options.forms)
            except torch.OutOfMemoryError:
                add(batch, context, name, "out of memory", None, None, moved[name] / 1e9, None, None, None)
            except Exception as error:
                print(f"batch {batch}, context {context}, {name}: {first_line(error)}", flush=True)
            torch.cuda.empty_cache()
        for form in options.forms:
            for name in times:
                seconds = times[name].get(form)
                if seconds is None:
                    continue
                ratio = share = None
                if name == "student" and form in times.get("teacher", {}):
                    ratio = times["teacher"][form] / seconds
                    share = ratio / (moved["teacher"] / moved["student"])
                used = moved[name] / seconds / bandwidth
                add(batch, context, name, form, seconds * 1e3, batch / seconds, moved[name] / 1e9, used, ratio, share)
    if CUDA:
        profile(models, steps, options)


def time_forms(model, compiled, batch: int, context: int, forms) -> dict[str, float]:
    decoder = Decoder(model, compiled, batch, context)
    times = {}
    if "eager" in forms:
        times["eager"] = decoder.seconds(lambda: decoder.step(one_step), rounds=1)
    if "compiled" in forms:
        times["compiled"] = decoder.seconds(lambda: decoder.step(compiled))
    if CUDA and "graph" in forms:
        graph, _ = decoder.capture(compiled)
        times["graph"] = decoder.seconds(graph.replay, rounds=5)
    return times


def profile(models, steps, options) -> None:
    """The kernels of one step, by their share of its time."""
    batch, context = options.profile_case
    columns = ["model", "kernel", "calls", "us a step", "share"]
    add = options.report.table(f"Decode: kernels of one step at batch {batch}, context {context}", columns)
    for name, model in models.items():
        decoder = Decoder(model, steps[name], batch, context)
        graph, _ = decoder.capture(steps[name])
        decoder.restart()
        graph.replay()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            for _ in range(4):
                graph.replay()
            synchronize()
        events = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
        total = sum(event.self_device_time_total for event in events)
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[:14]:
            add(
                name,
                event.key[:70],
                event.count // 4,
                event.self_device_time_total / 4,
                event.self_device_time_total / total,
            )
        del decoder, graph
        torch.cuda.empty_cache()
