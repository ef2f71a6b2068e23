"""The default teacher, SmolLM2-135M-Instruct, out of a pinned Python package."""
