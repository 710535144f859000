"""Secrets are hidden by key, by place and by shape, wherever a config or a command is shown, and
nothing else is."""

import json

import pytest

from trainer.logs.redact import redacted, secret_key, without_secrets, word_without_secrets
from trainer.sweep.jobs import Job, own

SECRET = "S3cr3tV4lue"


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "data.hf_token",
        "secret_key",
        "AWS_SECRET_ACCESS_KEY",
        "aws_access_key_id",
        "Authorization",
        "WANDB_API_KEY",
        "apiKey",
        "api-key",
        "clientSecret",
        "password",
        "db_passwd",
        "private_key",
        "storage.account_key",
        "AZURE_STORAGE_KEY",
        "X-Api-Key",
        "refresh_token",
        "credentials",
        "SSH_PRIVATE_KEY",
    ],
)
def test_a_key_that_names_a_secret_hides_its_value(key):
    assert without_secrets({"a": [{key: SECRET}]}) == {"a": [{key: "***"}]}
    assert word_without_secrets(f"++{key}={SECRET}") == f"++{key}=***"
    assert SECRET not in redacted(f"export {key}={SECRET} && run")
    assert SECRET not in redacted(json.dumps({key: SECRET}))


@pytest.mark.parametrize(
    "key",
    [
        "batch_tokens",
        "tokenizer",
        "tokens",
        "eos_token",
        "key",
        "sort_key",
        "monkey",
        "kv_heads",
        "keys",
        "max_new_tokens",
        "tokens_per_second",
        "path",
        "keyboard",
        "passes",
        "compass",
    ],
)
def test_what_is_no_secret_is_shown(key):
    assert not secret_key(key)
    assert (
        without_secrets({key: "value"}) == {key: "value"}
        and word_without_secrets(f"{key}=8") == f"{key}=8"
    )


@pytest.mark.parametrize(
    "text",
    [
        f"export HF_TOKEN={SECRET}",
        f"export WANDB_API_KEY='{SECRET}'; module load cuda",
        f'MY_PASSWORD="{SECRET} with more" python x.py',
        f"wandb login {SECRET}",
        f"huggingface-cli login --token {SECRET}",
        f"--token={SECRET}",
        f"curl -H 'Authorization: Bearer {SECRET}' https://x",
        f"curl -H 'Authorization: {SECRET}' https://x",
        f"curl -H 'X-Api-Key: {SECRET}' https://x",
        f"curl -u me:{SECRET} https://x",
        f"https://me:{SECRET}@host/x",
        f"https://host/data.jsonl?token={SECRET}",
        f"https://host/data.jsonl?size=3&access_token={SECRET}&x=1",
        f"https://host/x?X-Amz-Signature={SECRET}",
        f"https://blob/x?sv=2020&sig={SECRET}",
        f"s3://bucket/x?key={SECRET}",
        "hf_AbCdEfGhIjKlMnOpQrStUv",
        "use AKIAIOSFODNN7EXAMPLE now",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nAAAA\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_inside_of_values_are_hidden(text):
    for shown in (
        redacted(text),
        str(without_secrets({"setup": [text]})),
        word_without_secrets(f"launch.setup=[{text}]"),
    ):
        assert SECRET not in shown and "***" in shown
        assert not any(sign in shown for sign in ("hf_AbCd", "AKIAIO", "ghp_abc", "MIIE"))


@pytest.mark.parametrize(
    "text",
    [
        "module load cuda/12.4",
        "--constraint=a100",
        "--qos=low",
        "--mail-user me@example.org",
        "export OMP_NUM_THREADS=4",
        "https://host/data.jsonl?size=3&page=4",
        "data.tokenizer=bytes",
        "/data/*.jsonl",
        "model=full seed=1",
        "d41d8cd98f00",
        "batch_tokens=8192 context_length=2048",
        "optim.betas=[0.9,0.95]",
        "models.architectures.decoder.Decoder",
        "step 3: loss 2.5",
    ],
)
def test_ordinary_values_stay_as_they_are(text):
    assert redacted(text) == text and without_secrets({"x": text}) == {"x": text}


def test_an_option_and_its_secret_may_be_two_words():
    assert without_secrets(["--password", SECRET, "--size", "3"]) == [
        "--password",
        "***",
        "--size",
        "3",
    ]
    assert without_secrets({"a": [{"api_key": "k"}], "token": None}) == {
        "a": [{"api_key": "***"}],
        "token": None,
    }


def test_the_names_of_a_sweeps_jobs_hold_no_secret(tmp_path):
    jobs = [Job(n, (f"data.hf_token={SECRET}{n}", f"seed={n}"), tmp_path) for n in range(2)]
    assert own(jobs) == {0: ["data.hf_token=***", "seed=0"], 1: ["data.hf_token=***", "seed=1"]}
