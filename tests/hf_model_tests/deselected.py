"""
Every test of transformers' `ModelTesterMixin` that a student does not take, and why.

The suite checks that each name is a test of the installed version. Tests that skip themselves (no GPU, no Hub kernels,
another modality) are not listed: transformers decides on those.
"""

# Of every layout.
ALWAYS = {
    "test_generation_tester_mixin_inheritance": (
        "wants GenerationTesterMixin, which the source distribution does not contain; tests/test_generation.py stands in"
    ),
}

# Of layouts with layers that keep some heads and not all.
UNEVEN_HEADS = {
    "test_attention_outputs": (
        "wants one weight tensor a layer with config.num_attention_heads heads; a student's layer has weights of its "
        "kept heads alone, see test_hidden_states_and_attentions in tests/test_generation.py"
    ),
}

# Of the layout without any attention head.
NO_ATTENTION = {
    f"test_model_rope_scaling_from_config_{number}_{kind}": (
        "wants outputs to change with the scaling of rotary angles, which recurrent heads have no use for"
    )
    for number, kind in enumerate(("linear", "dynamic", "yarn"))
}
