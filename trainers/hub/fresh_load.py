"""
What a stranger does with a published student, run by [`trainers.hub.reload`] in a process of its own: load it through the
Auto classes, look at logits, generate.

This file is run alone, isolated (`python -I`), and imports nothing of ours: our packages are blocked, so that the code
which comes with the student must be enough. It reads its job as JSON from standard input.
"""

import importlib.abc
import json
import sys


class Blocker(importlib.abc.MetaPathFinder):
    """Refuses to import some packages, as if they were not installed."""

    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
        return None


def main() -> None:
    job = json.load(sys.stdin)
    sys.meta_path.insert(0, Blocker(job["blocked"]))
    for name in job["blocked"]:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise RuntimeError(f"{name} can be imported in a process that must do without it.")

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"revision": job["revision"], "trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(job["source"], **where)
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype=torch.float32, **where).eval()
    prompt = tokenizer(job["prompt"], return_tensors="pt")
    with torch.no_grad():
        logits = model(torch.tensor(job["input_ids"])).logits  # [B, T, V]
        output = model.generate(**prompt, max_new_tokens=job["max_new_tokens"], do_sample=False)
    save_file({"logits": logits.contiguous()}, job["logits"])
    text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with open(job["result"], "w", encoding="utf-8") as file:
        json.dump({"text": text, "module": type(model).__module__}, file)


if __name__ == "__main__":
    main()
