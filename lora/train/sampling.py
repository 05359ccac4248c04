"""Answers of a model to prompts, in batches padded on the left: what `lora generate` and the samples of a run use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

from lora.errors import LoRAError
from lora.meter import meter

Messages = list[dict[str, str]]


def render(tokenizer: Any, prompt: str | Messages, chat: bool) -> str:
    """The text the model is to continue: the prompt as the user's turn of the chat template, or as it is.

    Raises: LoRAError for a conversation where the tokenizer has no chat template.
    """
    if isinstance(prompt, str) and not chat:
        return prompt
    if not tokenizer.chat_template:
        raise LoRAError(
            "the tokenizer has no chat template, which conversations need: give text, or use --no-chat-template."
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    chat: bool = True,
    batch_size: int = 16,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """The model's answer to each prompt.

    Args:
        temperature: 0 takes the likeliest token each time; above, one is drawn.
        chat: write text prompts as the chat template does, where the tokenizer has one.
        on_text: is given the text as it grows; one prompt only.
    """
    chat = chat and bool(tokenizer.chat_template)
    texts = [render(tokenizer, prompt, chat) for prompt in prompts]
    templated = [chat or not isinstance(prompt, str) for prompt in prompts]  # these bring their special tokens
    answers = [""] * len(prompts)
    with generating(model), meter("answering", len(prompts), "prompts") if on_text is None else nullcontext() as done:
        for brings in (True, False):
            chosen = [i for i, each in enumerate(templated) if each is brings]
            for start in range(0, len(chosen), batch_size):
                places = chosen[start : start + batch_size]
                batch = encode(tokenizer, [texts[i] for i in places], special=not brings).to(model.device)
                new = _generate(model, tokenizer, batch, max_new_tokens, temperature, on_text)
                for i, text in zip(places, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    answers[i] = text.strip()
                if done is not None:
                    done(len(places))
    return answers


def encode(tokenizer: Any, texts: Sequence[str], special: bool) -> Any:
    """Token numbers and mask of a batch, padded on the left; a chat template brings its own special tokens."""
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    try:
        tokenizer.padding_side = "left"
        tokenizer.pad_token = pad or tokenizer.eos_token
        return tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=special)
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad


@contextmanager
def generating(model: Any) -> Iterator[None]:
    """Without dropout, checkpointing or gradients within the block; the model's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _generate(
    model: Any,
    tokenizer: Any,
    batch: Any,
    max_new_tokens: int,
    temperature: float,
    on_text: Callable[[str], None] | None,
) -> Any:
    """The new tokens of each row, [rows, at most max_new_tokens]."""
    transformers: Any = import_module("transformers")
    ends = model.generation_config.eos_token_id
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,  # the model's own distribution, not the library's top 50 of it
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )
    streamer = None if on_text is None else _streamer(tokenizer, on_text)
    rows = model.generate(**batch, generation_config=settings, streamer=streamer)
    return rows[:, batch["input_ids"].shape[1] :]


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Hands on whole words instead of printing them."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
