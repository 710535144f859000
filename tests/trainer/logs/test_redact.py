"""Nothing that is shown of a config or a command holds a secret."""

from trainer.logs.redact import without_secrets, word_without_secrets


def test_secrets_in_settings_and_addresses_are_hidden() -> None:
    assert word_without_secrets("data.hf_token=abc") == "data.hf_token=***"
    assert word_without_secrets("++server.password=a=b") == "++server.password=***"
    assert word_without_secrets("data.path=https://me:abc@host/x") == "data.path=https://***@host/x"
    assert word_without_secrets("data.tokenizer=bytes") == "data.tokenizer=bytes"
    assert word_without_secrets("batch_tokens=8") == "batch_tokens=8"
    assert without_secrets({"a": [{"api_key": "k"}], "token": None}) == {"a": [{"api_key": "***"}], "token": None}
