"""A tokenizer with a chat template, and conversations, for tests."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.chat_template import CHATML

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNMARKED = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
WORDS = "You are kind. What is 2 + 2? It is 4. And then? Fünf, of course! user assistant system"


def saved_tokenizer(folder, template=UNMARKED, **settings):
    """A byte-level BPE in a folder, as transformers saves one; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(SPECIAL), initial_alphabet=alphabet
    )
    backend.train_from_iterator([WORDS] * 9, trainer)
    backend.add_tokens([AddedToken("<think>", special=False)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | settings
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat(*turns, system=None):
    """Messages of a conversation; the user and the assistant take turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(turns):
        messages.append({"role": ("user", "assistant")[number % 2], "content": content})
    return messages


CHATS = [
    chat("What is 2 + 2?", "It is 4.", system="You are kind."),
    chat("And then?", "F\u00fcnf, of course!", "Why?", "It is.", "Oh", "Yes"),
    chat("Say {{ 7 * 7 }} <b>&</b>", "  {% raw %} ", "..."),
]
