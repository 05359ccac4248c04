"""Lets vLLM's own loader read what `lora export --format vllm` writes, without a GPU and without installing vLLM.

    pip download --no-deps --only-binary :all: vllm==0.33.0     # a few hundred MB
    python -m benchmarks.vllm_loader vllm-0.33.0-*.whl

lora/peft_helper.py, lora_model.py, lora_weights.py and utils.py run as they are in the wheel; every other module of vLLM
is replaced by nothing. The adapters are those of tests/test_export.py: each must be accepted, and give the adapted
model's logits when vLLM's numbers are applied to the base. The spoilt ones there must be refused, with the words that
the test file says, or be accepted where it says so: that is how its rules are known to be vLLM's.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

ROOT = Path(__file__).parents[1]
OWN = ("peft_helper", "lora_model", "lora_weights", "utils")  # of vllm/lora: what runs
MOST = 16


class Nothing(ModuleType):
    """A module whose every name is something that does nothing."""

    __path__: Sequence[str] = []  # a package, for whatever lies below

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class Rest(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the four files in the wheel's copy, and nothing for the rest of vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.split(".")[0] not in ("vllm", "regex"):
            return None
        name = fullname.removeprefix("vllm.lora.")
        if name in OWN:
            file = self.folder / "vllm" / "lora" / f"{name}.py"
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        if spec.name == "regex":  # a drop-in for re, which vLLM brings
            import re

            return re
        return Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "vllm.utils.torch_utils":
            vars(module)["PIN_MEMORY"] = False


def loaded(folder: Path, base: Any) -> Any:
    """`base` with what vLLM's loader makes of the adapter in `folder`."""
    from test_export import LINEAR
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    helper.validate_legal(SimpleNamespace(max_lora_rank=MOST))
    found = LoRAModel.from_local_checkpoint(
        str(folder), set(LINEAR), helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    for path, weights in found.loras.items():
        with torch.no_grad():
            base.get_submodule(path).weight += weights.scaling * weights.lora_b @ weights.lora_a
    return base


def main() -> None:
    """Prints a line for each adapter, and fails where vLLM and the tests' rules part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import test_export as tests

    from lora.export import export_vllm

    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with zipfile.ZipFile(options.wheel) as wheel:
            for module in OWN:
                wheel.extract(f"vllm/lora/{module}.py", scratch)
        sys.meta_path.insert(0, Rest(scratch))
        print(f"{options.wheel.name}")
        for case, settings in tests.CONFIGS.items():
            base = tests.tiny_llama()
            model = tests.adapted(base, **settings)
            folder = export_vllm(model, scratch / "good" / case)
            expected, found = tests.logits(model), tests.logits(loaded(folder, base))
            off = float((found - expected).abs().max() / expected.abs().max())
            print(f"{case}: accepted, logits within {off:.1e} of the largest")
            wrong += [case] * (off > tests.ROUNDING)
        for case, (spoil, words) in tests.SPOILED.items():
            base = tests.tiny_llama()
            model = tests.adapted(base, r=4, target_modules=["q_proj", "v_proj"])
            folder = export_vllm(model, scratch / "spoilt" / case)
            spoil(folder)
            said = refusal(folder, base)
            print(f"spoilt, {case}: {said or 'accepted'}")
            wrong += [case] * (words is not None and words not in (said or ""))
    if wrong:
        raise SystemExit(f"not as tests/test_export.py says: {', '.join(wrong)}")


def refusal(folder: Path, base: Any) -> str | None:
    """What vLLM says against an adapter, or None."""
    try:
        loaded(folder, base)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    main()
