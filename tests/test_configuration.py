"""The configuration: what it derives, and that whatever cannot work is refused when it is made, by one clear error."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from modeling_rad_hybrid import RadHybridConfig


GOOD = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
BAD = [
    ({"kept_heads": [[0], [4], []]}, r"kept_heads\[1\].*0 to 3"),
    ({"kept_heads": [[-1], [], []]}, r"kept_heads\[0\].*0 to 3"),
    ({"kept_heads": [[1, 0], [], []]}, "sorted"),
    ({"kept_heads": [[1, 1], [], []]}, "distinct"),
    ({"kept_heads": [[0]]}, "1 lists for 3 layers"),
    ({"kept_heads": [[0], [], [], []]}, "4 lists for 3 layers"),
    ({"kept_heads": [["0"], [], []]}, "integers"),
    ({"kept_heads": [[True], [], []]}, "integers"),
    ({"kept_heads": [[0.0], [], []]}, "integers"),
    ({"kept_heads": [0, 1, 2]}, "integers"),
    ({"kept_heads": "all"}, "kept_heads"),
    ({"kept_heads": {"0": [1]}}, "kept_heads"),
    ({"ssm_state_size": 0}, "ssm_state_size is 0"),
    ({"ssm_state_size": 8.0}, "ssm_state_size"),
    ({"ssm_conv_kernel": 0}, "ssm_conv_kernel is 0"),
    ({"ssm_chunk_size": -1}, "ssm_chunk_size is -1"),
    ({"mixing": "both"}, "mixing is 'both'.*replace, parallel"),
    ({"ssm_backend": "cuda"}, "ssm_backend is 'cuda'.*auto"),
    ({"num_key_value_heads": 3}, "multiple"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": -4}, "num_attention_heads is -4"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers"),
    ({"hidden_size": 0}, "hidden_size is 0"),
    ({"intermediate_size": 0}, "intermediate_size is 0"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"head_dim": 15}, "head_dim.*even"),
    ({"head_dim": 0}, "head_dim"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}}, "3 of the 16"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.5}}, "24 of the 16"),
    ({"hidden_act": "silly"}, "hidden_act is 'silly'"),
    ({"qk_norm": "layer"}, "qk_norm is 'layer'.*head, full"),
    ({"norm_position": "middle"}, "norm_position is 'middle'.*pre, post"),
    ({"no_rope_layers": [1, 0]}, "each of the 3 layers"),
    ({"no_rope_layers": [1, 0, 2]}, "each of the 3 layers"),
    ({"sliding_window": 0}, "sliding_window is 0"),
    ({"sliding_layers": [1]}, "no sliding_window"),
    ({"sliding_window": 8, "sliding_layers": [3]}, "layers 0 to 2"),
    ({"attention_multiplier": 0}, "attention_multiplier is 0"),
    ({"logits_scaling": 0.0}, "logits_scaling is 0"),
    ({"residual_multiplier": float("nan")}, "residual_multiplier is nan"),
    ({"embedding_multiplier": float("inf")}, "embedding_multiplier is inf"),
]


@pytest.mark.parametrize("fields, words", BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_configurations_are_refused(fields, words):
    with pytest.raises((StrictDataclassError, ValueError), match=words):
        RadHybridConfig(**{**GOOD, **fields})


def test_each_field_can_be_bad_in_the_table_by_itself_only():
    assert RadHybridConfig(**GOOD).kept_heads == [[0, 1, 2, 3]] * 3


def test_types_of_layers_follow_from_heads_and_windows():
    kept = {"kept_heads": [[], [1], [0, 1, 2, 3]]}
    types = {
        (): ["linear_attention", "hybrid", "full_attention"],
        ("sliding_window",): ["linear_attention", "hybrid_sliding", "sliding_attention"],
        ("sliding_window", "sliding_layers"): ["linear_attention", "hybrid", "sliding_attention"],
    }
    fields = {"sliding_window": 8, "sliding_layers": [0, 2]}
    for names, expected in types.items():
        chosen = {name: fields[name] for name in names}
        # A stale list is not believed.
        assert RadHybridConfig(**GOOD, **kept, **chosen, layer_types=["hybrid"] * 3).layer_types == expected
    parallel = RadHybridConfig(**GOOD, **kept, mixing="parallel")
    assert parallel.layer_types == ["linear_attention", "hybrid", "hybrid"]
