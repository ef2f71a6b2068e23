"""
Rules of code that ships with a student (remote code), checked on the source without running it.

Files lie flat in one folder and import one another as `from .module import name`: transformers finds what to download
by that form alone. They import a few packages and no other, optional kernels inside `try:` only, and touch neither
network nor file system. This is a check of our own code and against accidents, no sandbox: whoever loads a student
runs its code, which is why the snippets pin a revision.

    problems = list(code_problems(Path("modeling_rad_hybrid.py").read_text()))
"""

import ast
from collections.abc import Iterator


PACKAGES = {"__future__", "collections", "dataclasses", "functools", "math", "typing", "torch", "transformers"}
# Strict dataclasses, the base of a configuration, live there; what reaches the network does too.
MODULES = {"huggingface_hub.dataclasses"}
OPTIONAL_PACKAGES = {"mamba_ssm", "causal_conv1d", "flash_attn", "triton"}
# Ways to the network and the file system that lead through the packages above.
NAMES = {"hub", "load", "save", "from_file", "from_pretrained", "save_pretrained", "push_to_hub", "cached_file"}
NAMES |= {"hf_hub_download", "snapshot_download", "load_state_dict", "load_state_dict_from_url", "cpp_extension"}
# Ways from an object back to the interpreter.
NAMES |= {"__globals__", "__builtins__", "__subclasses__", "__code__", "__loader__", "__import__"}
CALLS = {"open", "exec", "eval", "compile", "__import__", "input", "globals", "locals", "vars", "breakpoint"}


def relative_imports(source: str) -> list[str]:
    """Modules that a source file imports from its own folder."""
    nodes = ast.walk(ast.parse(source))
    return [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level and node.module]


def code_problems(source: str) -> Iterator[str]:
    """
    Yields what a source file does that remote code must not, each as `line N: ...`.

    Args:
        source (`str`):
            Content of a Python file.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield f"line {error.lineno}: not Python ({error.msg})."
        return
    guarded = {id(child) for node in ast.walk(tree) if isinstance(node, ast.Try) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or not node.module or "." in node.module:
                yield f"line {node.lineno}: only `from .module import name` of the same folder is shipped to the Hub."
        elif isinstance(node, ast.ImportFrom):
            yield from _import_problems(node, node.module, id(node) in guarded)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from _import_problems(node, alias.name, id(node) in guarded)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield f"line {node.lineno}: model code must not call {node.func.id}()."
        elif isinstance(node, ast.Attribute) and node.attr in NAMES and not _reads_gpu_memory(node):
            yield f"line {node.lineno}: model code must not use .{node.attr}."


def _reads_gpu_memory(node: ast.Attribute) -> bool:
    """Whether this is Triton's `tl.load`, which has nothing to do with `torch.load`."""
    return node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "tl"


def _import_problems(node: ast.Import | ast.ImportFrom, module: str, guarded: bool) -> Iterator[str]:
    package = module.split(".")[0]
    if package in OPTIONAL_PACKAGES:
        if not guarded:
            yield f"line {node.lineno}: the optional package {package} must be imported inside `try:`."
    elif package not in PACKAGES and module not in MODULES:
        yield f"line {node.lineno}: model code has no business with {module}."
    for name in [*module.split("."), *(alias.name for alias in node.names)]:
        if name in NAMES:
            yield f"line {node.lineno}: model code must not import {name}."
