"""Former names of settings; each is refused with its present name."""

from collections.abc import Iterable

KEYS = {
    "parallel.heads": "parallel.ulysses",
    "optim.clip": "optim.max_grad_norm",
    "optim.spike": "optim.skip_above",
    "evaluation.maps": "evaluation.attention_maps",
    "evaluation.generate": "evaluation.sample_tokens",
    "engine.zero": "engine.zero_stage",
    "engine.replicas": "engine.replicate",
    "launch.endpoint": "launch.rdzv_endpoint",
}
# One old word stands for several new ones where classes used it for different things; the class at
# hand decides, by the settings that it has.
SETTINGS = {
    "reach": ("window", "max_distance"),
    "gaps": ("dilation",),
    "first": ("sink_tokens",),
    "latent": ("kv_latent",),
    "query_latent": ("q_latent",),
    "content": ("nope_dim",),
    "turned": ("rope_dim",),
    "value": ("value_dim",),
    "taps": ("conv_kernel",),
    "reflect": ("allow_neg_eigval",),
    "calm": ("gate_logit_normalizer",),
    "rounds": ("hashes",),
    "size": ("chunk_size",),
    "base": ("theta",),
    "fast": ("beta_fast",),
    "slow": ("beta_slow",),
    "magnitude": ("attention_factor",),
    "both": ("bidirectional",),
    "tie": ("tie_embeddings",),
    "deviation": ("init_std",),
    "final": ("final_ratio",),
    "minimum": ("min_length", "min_items"),
    "maximum": ("max_length", "max_items"),
    "fewest": ("min_repeats", "min_facts", "min_pairs"),
    "most": ("max_repeats", "max_facts"),
    "near": ("min_distance",),
    "far": ("max_distance",),
}
VALUES = {"parallel.method": {"heads": "ulysses", "fetch": "allgather"}}


def new_key(key: str, known: Iterable[str]) -> str | None:
    """Returns the key that replaced `key`; None where it is not a former one.

    Args:
        key: as it was written, such as "mixer.reach".
        known: keys that are settings at that place now.
    """
    if key in KEYS:
        return KEYS[key]
    group, _, word = key.rpartition(".")
    candidates = [f"{group}.{name}" for name in SETTINGS.get(word, ())]
    present = set(known)
    return next((candidate for candidate in candidates if candidate in present), None)


def new_value(key: str, value: object) -> str | None:
    """Returns the value that replaced a former value of this key; None where none did."""
    return VALUES.get(key, {}).get(str(value))
