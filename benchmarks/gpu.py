"""
The recurrent heads and the whole student on one GPU: correctness first, then time and memory.

    python -m benchmarks.gpu                                   # everything, on the GPU
    python -m benchmarks.gpu --sections scan decode --quick    # some sections, fewer cases
    python -m benchmarks.gpu --tiny                            # a rehearsal on the CPU with tiny sizes

Sections: `check` (the default back end, in seconds) and `scan` (gpu_scan.py), `decode` (gpu_decode.py), `project`,
`prefill` and `train` (gpu_models.py). Tables go to the screen as they come and to one JSON file; a section that fails
says so and the next one starts. Nothing that fails its correctness check is timed. The packages to compare with
(mamba-ssm, flash-linear-attention) are optional.
"""

import argparse
import datetime
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers

from benchmarks import gpu_decode, gpu_models, gpu_scan
from benchmarks.gpu_tools import CUDA, DEVICE, Report
from trainers.heads.head_map import shipped_head_map


SECTIONS = {
    "check": gpu_scan.check,
    "scan": gpu_scan.run,
    "project": gpu_models.project,
    "decode": gpu_decode.run,
    "prefill": gpu_models.prefill,
    "train": gpu_models.train,
}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
TINY_KEPT = [[1], [], [0, 3], [], []]


def cases(options: argparse.Namespace) -> None:
    """Sizes of every section, added to the options."""
    options.fields, options.kept = LLAMA_1B, shipped_head_map("meta-llama/Llama-3.2-1B-Instruct").kept_heads
    smollm2 = shipped_head_map("HuggingFaceTB/SmolLM2-135M-Instruct").kept_heads
    options.dtypes = [{"bfloat16": torch.bfloat16, "float32": torch.float32}[name] for name in options.dtypes]
    options.scan_cases = [("1B", state, tokens) for state in (8, 4, 16, 64) for tokens in (2048, 8192, 32768)]
    options.scan_cases += [("SmolLM2", 8, tokens) for tokens in (2048, 8192, 32768)]
    options.tokens_at_once = 32768
    options.decode_cases = [(batch, context) for batch in (32, 128, 1) for context in (8192, 2048, 32768)]
    options.profile_case = (32, 8192)
    options.projections = [("1B", 2048, 31 * 145), ("SmolLM2", 576, 9 * 145)]
    options.projection_rows = [32, 128, 4096, 16384]
    options.prompts = [8192, 32768, 131072]
    options.training = {"SmolLM2": (SMOLLM2, smollm2, 8, 2048), "1B": (LLAMA_1B, options.kept, 2, 2048)}
    if options.quick:
        options.scan_cases = [("1B", 8, 2048), ("1B", 8, 8192), ("1B", 64, 2048)]
        options.decode_cases = [(32, 8192), (128, 8192)]
        options.prompts = [8192, 32768]
    if options.scan:
        split = [case.split(":") for case in options.scan]
        options.scan_cases = [(shape, int(state), int(tokens)) for shape, state, tokens in split]
    if options.decode:
        options.decode_cases = [tuple(map(int, case.split(":"))) for case in options.decode]
    if options.tiny:
        options.fields, options.kept, options.shapes = TINY, TINY_KEPT, ["tiny"]
        options.states = [8]
        options.scan_cases, options.tokens_at_once = [("tiny", 8, 96)], 96
        options.decode_cases, options.prompts = [(1, 64), (4, 64)], [64]
        options.projections, options.projection_rows = [("tiny", 16, 37)], [8]
        options.training = {"tiny": (TINY, TINY_KEPT, 2, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 2)[1])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="the cases that the goals are about")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can rehearse")
    parser.add_argument("--shapes", nargs="+", choices=gpu_scan.SHAPES, default=["1B", "SmolLM2"], help="of the check")
    parser.add_argument("--states", nargs="+", type=int, default=[8, 64], help="state sizes N of the check")
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--scan", nargs="+", metavar="SHAPE:N:TOKENS", help="cases of the scan")
    parser.add_argument("--decode", nargs="+", metavar="BATCH:CONTEXT", help="cases of decoding")
    parser.add_argument("--backends", nargs="+", choices=gpu_scan.BACKENDS, default=list(gpu_scan.BACKENDS))
    forms = ["eager", "compiled", "graph"]
    parser.add_argument("--forms", nargs="+", choices=forms, default=forms)
    parser.add_argument("--training_backend", default="auto", help="ssm_backend of the training that is not naive")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if not CUDA and not options.tiny:
        sys.exit("There is no GPU here; --tiny rehearses on the CPU.")
    cases(options)
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"command": " ".join(sys.argv[1:]), "device": name, "date": datetime.date.today().isoformat()}
    options.report = Report(options.output, {**about, "versions": versions})
    print(f"{name}, {', '.join(f'{key} {value}' for key, value in versions.items())}, {about['date']}", flush=True)
    torch.manual_seed(0)
    failed = []
    for section in options.sections:
        start = time.perf_counter()
        try:
            SECTIONS[section](options.report, options)
        except Exception:
            failed.append(section)
            print(f"\nThe section {section} failed:\n{traceback.format_exc()}", flush=True)
        if CUDA:
            torch.cuda.empty_cache()
        print(f"\n{section}: {time.perf_counter() - start:.0f} s on {DEVICE}", flush=True)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
