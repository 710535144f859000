"""Families of yaml files whose members share their code and differ in equations alone.

`make test` takes one of a family through what is long; the tests of models/ and parallel/ compare
the equations of all.
"""

FAMILIES = {
    "softmax": (
        "full gated qk_norm softcap sinks sink_logit differential multi_head multi_query"
        " sliding chunked bidirectional prefix bigbird longformer latent"
    ),
    "scan": "linear gated_linear retention performer rwkv6 mamba2 delta gated_delta rwkv7",
    "convolution": "hyena short_conv",
    "rotary": "rope interpolated ntk yarn llama3",
    "added": "sinusoidal learned",
    "bias": "alibi t5 relative",
    "recurrent models": "hybrid retnet rwkv6 rwkv7 lstm",
    "experts": "moe_topk switch",
    "two streams": "encoder_decoder transformer t5",
    "sets": "deep_sets set_transformer",
}


def family(word):
    """What a yaml shares its code with; what is in no family stands for itself."""
    group, _, name = word.partition("=")
    found = [key for key, names in FAMILIES.items() if name in names.split()]
    # A mixer and a model may have the same name.
    return f"{group} {found[0]}" if found else word
