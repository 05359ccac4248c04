"""Times `lora.set_adapter` beside PEFT's on a model of 30 layers with 210 adapted ones: what decision 9 rests on.

    OMP_NUM_THREADS=1 python benchmarks/switching.py [--adapters 2 20 100] [--rounds 200]

The width does not matter to a switch, so the model is narrow. Each round switches once here and once in PEFT, so that
what else the machine does falls on both alike. Beyond the first number PEFT is left out: adding to it takes minutes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
from transformers import LlamaConfig, LlamaForCausalLM

import lora


def main() -> None:
    """Prints one line for each number of adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 20, 100])
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=30, vocab_size=128)).eval()
    for position, count in enumerate(given.adapters):
        switches = {"lora": ours(copy.deepcopy(base), count)}
        if not position:
            switches["peft"] = theirs(copy.deepcopy(base), count)
        times: dict[str, list[float]] = {name: [] for name in switches}
        for number in range(given.rounds):
            for name, switch in switches.items():
                start = time.perf_counter()
                switch(f"a{number % count}")
                times[name].append(1e6 * (time.perf_counter() - start))
        cells = [f"{name} {statistics.median(t):,.0f} µs (at least {min(t):,.0f})" for name, t in times.items()]
        print(f"{count} adapters: {', '.join(cells)}", flush=True)


def ours(model: Any, count: int) -> Callable[[str], Any]:
    """How to switch between `count` adapters here."""
    for number in range(count):
        (lora.add_adapter if number else lora.inject)(model, lora.LoRAConfig(r=8), f"a{number}")
    return lambda name: lora.set_adapter(model, name)


def theirs(model: Any, count: int) -> Callable[[str], Any]:
    """How to switch between `count` adapters in PEFT."""
    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, "a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", config)
    return model.set_adapter


if __name__ == "__main__":
    main()
