"""Lets llama.cpp itself run what `lora export` and `lora merge --format gguf` write, and compares its log-probabilities.

    pip install --target DIR xllamacpp && PYTHONPATH=DIR:. python benchmarks/llama_cpp.py

xllamacpp brings llama.cpp's server as a Python module; nothing else here needs it, so it is in no requirements. The
model is the packaged one, with a random adapter of several ranks and scales. Each server is a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

MODEL, PROMPT, TOP = "smollm2-135m-instruct", "The capital of France is", 10


def main() -> None:
    """Prints, for each file, the largest difference from our own log-probabilities of the ten likeliest tokens."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            ids, base, adapted = pool.apply(prepare, (files,))
        print(f"the adapter moves them by up to {max(abs(base[i] - adapted[i]) for i in top(adapted)):.2g}")
        for name, model, adapter, expected in (
            ("the base", "base.gguf", None, base),
            ("the base with the adapter", "base.gguf", "adapter.gguf", adapted),
            ("merged, float32", "float32.gguf", None, adapted),
            ("merged, bfloat16", "bfloat16.gguf", None, adapted),
            ("merged, q8_0", "q8_0.gguf", None, adapted),
        ):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(serve, (str(files / model), str(files / adapter) if adapter else None, ids))
            print(f"{name}: {max(abs(value - expected[i]) for i, value in found.items()):.2g}", flush=True)


def top(logprobs: list[float]) -> list[int]:
    """The likeliest tokens."""
    return sorted(range(len(logprobs)), key=lambda i: -logprobs[i])[:TOP]


def prepare(files: Path) -> tuple[list[int], list[float], list[float]]:
    """Writes the files; returns the prompt, and what follows it by the base and by the adapted model."""
    import torch

    import lora
    from lora.gguf_export import export_gguf, merge_gguf

    torch.manual_seed(0)
    model, tokenizer = lora.load(MODEL)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def likely() -> list[float]:
        with torch.no_grad():
            return model(ids).logits[0, -1].log_softmax(-1).tolist()

    base = likely()
    patterns = {"rank_pattern": {"q_proj": 8, "down_proj": 4}, "alpha_pattern": {"k_proj": 64}}
    lora.inject(model, lora.LoRAConfig(r=16, lora_alpha=32, **patterns))
    lora.save_adapter(model, files / "nothing")  # B is zero
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    lora.save_adapter(model, files / "adapter")
    export_gguf(model, files / "adapter.gguf")
    adapted = likely()
    merge_gguf(MODEL, str(files / "nothing"), files / "base.gguf", dtype="float32")
    for dtype in ("float32", "bfloat16", "q8_0"):
        merge_gguf(MODEL, str(files / "adapter"), files / f"{dtype}.gguf", dtype=dtype)
    return ids[0].tolist(), base, adapted


def serve(model: str, adapter: str | None, ids: list[int]) -> dict[int, float]:
    """llama.cpp's log-probabilities of the likeliest tokens after the prompt."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx = model, 256
    if adapter:
        loaded = xllamacpp.CommonAdapterLoraInfo()
        loaded.path, loaded.scale = adapter, 1.0
        parameters.lora_adapters = [loaded]
    request: dict[str, Any] = {"prompt": ids, "max_tokens": 1, "logprobs": TOP, "temperature": 0.0}
    answer = xllamacpp.Server(parameters).handle_completions(request)
    tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {token["id"]: token["logprob"] for token in tokens}


if __name__ == "__main__":
    main()
