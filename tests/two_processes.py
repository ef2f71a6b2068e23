"""
Two processes on this machine load one student together, as `torchrun` would have them do, and write as JSON into its
folder what each sees: `python two_processes.py FOLDER tp_size | fsdp_size`. Run by `test_precision.py`.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
from torch import multiprocessing
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_rad_hybrid import RadHybridForCausalLM


INPUT_IDS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]]
GRADIENTS = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mixer.ssm.in_proj.weight", "model.norm.weight")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def work(rank: int, port: int, folder: str, kind: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    model = RadHybridForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{kind: 2}))
    ids = torch.tensor(INPUT_IDS)
    outputs = model.eval()(ids, labels=ids)
    outputs.loss.backward()
    seen = {
        "logits": whole(outputs.logits)[0, -1].tolist(),
        "gradients": {name: whole(model.get_parameter(name).grad).norm().item() for name in GRADIENTS},
        "local": {name: list(local(parameter).shape) for name, parameter in model.named_parameters()},
    }
    Path(folder, f"seen_by_{rank}.json").write_text(json.dumps(seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, so that both share what was imported once.
    multiprocessing.start_processes(work, args=(port, sys.argv[1], sys.argv[2]), nprocs=2, start_method="fork")
