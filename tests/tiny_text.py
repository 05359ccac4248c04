"""A tiny chat model on disk for the tests of training and of the command line: 90 kB, loads in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import tiny_llama

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "sum", "of", "is", "the", "a", "colour", "number"]
WORDS += ["what", "say", "hello", "bye", ".", "?", "!", ":"]
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
ROLES = ["user", "assistant", "system"]


def tiny_tokenizer(chat: bool = True) -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *ROLES, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_tiny_model(directory: Path, *, chat: bool = True, **overrides: Any) -> Path:
    """A random Llama and the tokenizer above, as transformers saves them."""
    tokenizer = tiny_tokenizer(chat)
    shard = overrides.pop("max_shard_size", "5GB")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = tiny_llama(**{"vocab_size": len(tokenizer), **ids, **overrides})
    model.save_pretrained(directory, max_shard_size=shard)
    tokenizer.save_pretrained(directory)
    return directory


def rows(count: int) -> list[dict[str, str]]:
    """Prompts and completions that can be learnt: colours and numbers alternate."""
    colours, numbers = WORDS[:3], WORDS[3:7]
    return [
        {
            "prompt": f"what is {numbers[i % 4]} ?",
            "completion": f"the colour {colours[i % 3]} . {numbers[(i // 3) % 4]}",
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, examples: list[Any]) -> Path:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return path
