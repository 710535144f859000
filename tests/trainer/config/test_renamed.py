"""Old names of settings are refused, and the message names the new one."""

import pytest

from trainer.config.compose import compose
from trainer.config.renamed import KEYS
from trainer.preflight.check import check_config

OLD = (
    ("mixer=sliding mixer.reach=9", "mixer.window"),
    ("mixer=sinks mixer.first=2", "mixer.sink_tokens"),
    ("mixer=longformer mixer.gaps=2", "mixer.dilation"),
    ("mixer=latent mixer.latent=8", "mixer.kv_latent"),
    ("mixer=latent mixer.turned=8", "mixer.rope_dim"),
    ("mixer=lsh mixer.rounds=2", "mixer.hashes"),
    ("mixer=lsh mixer.size=8", "mixer.chunk_size"),
    ("mixer=mamba2 mixer.taps=4", "mixer.conv_kernel"),
    ("mixer=delta mixer.reflect=true", "mixer.allow_neg_eigval"),
    ("mixer=gated_linear mixer.calm=16", "mixer.gate_logit_normalizer"),
    ("position.base=500000", "position.theta"),
    ("position=yarn position.fast=32", "position.beta_fast"),
    ("position=t5 position.reach=64", "position.max_distance"),
    ("model.tie=true", "model.tie_embeddings"),
    ("model.deviation=0.1", "model.init_std"),
    ("schedule.final=0.1", "schedule.final_ratio"),
    ("data=copy data.maximum=9", "data.max_length"),
    ("data=facts data.fewest=2", "data.min_facts"),
    ("parallel.method=heads", "parallel.method=ulysses"),
    ("parallel.method=fetch", "parallel.method=allgather"),
    *((f"{old}=2", new) for old, new in KEYS.items()),
)


@pytest.mark.parametrize(("words", "new"), OLD)
def test_an_old_name_is_refused_with_the_new_one(words, new):
    composed = compose(words.split())
    messages = list(composed.faults)
    if composed.config is not None:
        messages = check_config(composed.config, composed.given, composed.mended, composed.faults)
    assert any(new in message and "now" in message for message in messages), messages
