"""The command line: lora train | plan | generate | merge | export | quantize | explain | bench.

Each command imports what it needs when it runs, so that `lora --help` answers at once. A user's error is one line on
stderr and exit code 2; --debug shows where it came from. Ctrl-C exits with 130, SIGTERM with 143.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lora.errors import LoRAError, did_you_mean
from lora.train.config import (
    BACKENDS,
    CHECKPOINTING,
    GROUPS,
    HINTS,
    QUANTIZATIONS,
    TrainConfig,
    from_sources,
    parse_flag,
)

COMMANDS = {
    "train": "fine-tune a model on your data",
    "plan": "predict the memory and time of training a model, before there is a GPU or a download",
    "generate": "let a model, with or without an adapter, answer prompts",
    "merge": "write a model with an adapter merged into its weights",
    "export": "write an adapter for a server: vLLM, or llama.cpp",
    "quantize": "write a model with its weights in 4 bits (NF4)",
    "explain": "show what is adapted, which implementation runs it, and what memory it takes",
    "bench": "measure this machine against PEFT and others: outputs first, then time, then memory",
}
DTYPES = ("float32", "bfloat16", "float16")
BLOCK_DTYPES = ("q8_0",)  # of a GGUF file only
NAMES = ("modules", "parameters", "pattern", "changed")  # in options that take names
OUT_OF_MEMORY = {  # what helps, by command
    "train": "out of memory: lower --batch-size (and raise --grad-accumulation) or --max-length, or use "
    "--checkpointing recompute or --quantization nf4.",
    "generate": "out of memory: use --quantization nf4, fewer prompts at a time, or fewer --max-new-tokens.",
    "explain": "out of memory: use --quantization nf4.",
}
EXAMPLES = """\
examples:
  lora plan meta-llama/Llama-3.1-8B --seq 2048 --batch 4 --rank 16 --quantization nf4 --gpu rtx4090
  lora train --model smollm2-135m-instruct --data my.jsonl --output out/my
  lora generate --model smollm2-135m-instruct --adapter out/my/adapter "What is LoRA?"
  lora merge --model smollm2-135m-instruct --adapter out/my/adapter --output out/merged
"""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors in the house's form, and a hint for a misspelt flag."""

    def error(self, message: str) -> NoReturn:
        raise LoRAError(f"{message}. `{self.prog} --help` lists what there is.")

    def refuse(self, unknown: str) -> NoReturn:
        """Raises LoRAError for an argument that is none of this command's."""
        if not unknown.startswith("-"):
            raise LoRAError(f"{unknown!r} stands apart from the words before it: put them all together, or in quotes.")
        hint = did_you_mean(unknown.split("=")[0], self._option_string_actions)
        raise LoRAError(f"there is no option {unknown!r}.{hint} `{self.prog} --help` lists what there is.")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Wide columns, and the default after each option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, _terminal_width()))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = getattr(action, "shown_default", None)
        return text if shown is None else f"{text} [{shown}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 after a user's error, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _main(words)


def _main(words: list[str]) -> int:
    debug = "--debug" in words
    try:
        options, unknown = parser().parse_known_args([word for word in words if word != "--debug"])
        if unknown:
            options.parser.refuse(unknown[0])
        options.command(options)
    except SystemExit as error:  # argparse's --help and --version
        return int(error.code or 0)
    except KeyboardInterrupt as error:
        print(f"lora: {error or 'interrupted'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    except BrokenPipeError:  # `lora generate | head`: nobody is left to read
        sys.stdout = None
        return 0
    except (LoRAError, OSError, RuntimeError) as error:
        out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if debug or (isinstance(error, RuntimeError) and not out_of_memory):
            raise
        if _another_says_it():
            return 2
        advice = OUT_OF_MEMORY.get(_command_in(words), "out of memory.")
        print(f"lora: error: {advice if out_of_memory else _one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _another_says_it() -> bool:
    """Of processes that a launcher has started alike, and that have not met yet, the first speaks for all."""
    world = sys.modules.get("lora.train.world")
    met = world is not None and world.World.joined
    return os.environ.get("RANK", "0") != "0" and not met


def _command_in(words: Sequence[str]) -> str:
    """The command among the words, past --debug."""
    return next((word for word in words if word in COMMANDS), "")


def parser() -> Parser:
    """Every command with its options."""
    top = Parser(
        prog="lora",
        formatter_class=Formatter,
        description="LoRA and QLoRA fine-tuning, written twice: to be read, and to be fast.",
        epilog=EXAMPLES,
    )
    top.add_argument("--version", action=Version, nargs=0, help="print the versions in use")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.set_defaults(command=lambda _: top.print_help(), parser=top)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    adders: dict[str, Callable[[Parser], None]] = {
        "train": add_train,
        "plan": add_plan,
        "generate": add_generate,
        "merge": add_merge,
        "export": add_export,
        "quantize": add_quantize,
        "explain": add_explain,
        "bench": add_bench,
    }
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=_capitalised(text), formatter_class=Formatter, allow_abbrev=False
        )
        adders[name](command)
        command.set_defaults(parser=command)
    return top


class Version(argparse.Action):
    """--version: ours, and those of the packages that decide what happens."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        import lora

        print(f"lora {lora.__version__}")
        for package in ("torch", "triton", "transformers", "trl", "peft"):
            try:
                print(f"{package} {version(package)}")
            except PackageNotFoundError:
                print(f"{package} is not installed")
        parser.exit()


# ---- train -----------------------------------------------------------------------------------------------------


def add_train(command: Parser) -> None:
    """One option for each field of TrainConfig, in its groups."""
    command.usage = "lora train --model MODEL --data DATA [--config FILE.yaml] [options]"
    command.epilog = textwrap.dedent(
        """\
        what --data takes:
          .jsonl with {"prompt": ..., "completion": ...}, {"messages": [{"role": ..., "content": ...}, ...]} or
          {"text": ...} on each line; .json, .parquet or .csv with the same columns; .txt; a directory of those or one
          that datasets saved; or a hub id

        Every option is a key of the YAML file too, with _ for -. Options on the command line win.
        """
    )
    command.add_argument("--config", metavar="FILE", help="YAML file with any of the options below")
    groups = {name: command.add_argument_group(name, text) for name, text in GROUPS.items()}
    for f in dataclasses.fields(TrainConfig):
        _add_field(groups[f.metadata["group"]], f)
    command.set_defaults(command=train)


def _add_field(group: argparse._ArgumentGroup, f: dataclasses.Field[Any]) -> None:
    """One option for one field; it is absent from the result unless it is given."""
    flag = "--" + f.name.replace("_", "-")
    common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS}
    if HINTS[f.name] is bool:
        action = group.add_argument(flag, action=argparse.BooleanOptionalAction, help=f.metadata["help"], **common)
    else:
        choices = f.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else _metavar(f.name)
        action = group.add_argument(flag, metavar=metavar, help=f.metadata["help"], **common)
        if f.name == "sample_prompts":
            action.nargs = "+"
    default = f.default if f.default is not dataclasses.MISSING else None
    words = ("no", "yes") if HINTS[f.name] is bool else ("false", "true")
    shown = words[default] if isinstance(default, bool) else f"{default:g}" if isinstance(default, float) else default
    action.shown_default = shown if shown not in ("", ()) else None  # type: ignore[attr-defined]


def _metavar(name: str) -> str:
    hint = HINTS[name]
    plain = {int: "N", float: "X", str: name.rsplit("_", 1)[-1].upper()}
    return plain.get(hint, "NAMES" if any(part in name for part in NAMES) else "VALUE")


def train(options: argparse.Namespace) -> None:
    """lora train: the config of the YAML file with the flags on top, run."""
    given = {name: value for name, value in vars(options).items() if name in HINTS}
    flags = {name: parse_flag(name, value) if isinstance(value, str) else value for name, value in given.items()}
    config = from_sources(options.config, flags)
    config = config.replace(backend=chosen_backend(config.backend))
    from lora.train.job import run

    run(config)


def chosen_backend(named: str | None) -> str:
    """--backend, else LORA_BACKEND, else auto; checked here, before anything is loaded."""
    name, source = (named, "--backend") if named else (os.environ.get("LORA_BACKEND") or "auto", "LORA_BACKEND")
    if name not in BACKENDS:
        raise LoRAError(
            f"{source} is {name!r}, expected one of {', '.join(map(repr, BACKENDS))}.{did_you_mean(name, BACKENDS)}"
        )
    return name


# ---- plan ------------------------------------------------------------------------------------------------------


def add_plan(command: Parser) -> None:
    """The options of lora plan."""
    command.add_argument("model", metavar="MODEL", help="hub id, directory, GGUF file, or a packaged model's name")
    _number(command, "--seq", "N", TrainConfig.max_length, "tokens of a sequence", int)
    _number(command, "--batch", "N", TrainConfig.batch_size, "sequences in one forward pass", int)
    _number(command, "--rank", "N", TrainConfig.r, "rank of the update", int)
    _number(command, "--grad-accumulation", "N", TrainConfig.grad_accumulation, "forward passes in one step", int)
    command.add_argument("--target-parameters", metavar="NAMES", help="a mixture's, as for lora train")
    _choice(command, "--quantization", QUANTIZATIONS, "none", "nf4: the frozen weights in 4 bits")
    command.add_argument(
        "--gpu",
        metavar="NAME",
        help="h100, h200, a100-80gb, a100-40gb, l40s, l4, a10, rtxa6000, rtx4090, rtx3090; its memory, like 24GiB; "
        "or cpu [this machine's]",
    )
    _choice(command, "--checkpointing", CHECKPOINTING, "auto", "one mode for all blocks; auto: what fits, per block")
    _choice(command, "--dtype", ("auto", "float32", "bfloat16"), "auto", "of the frozen weights, as for lora train")
    command.add_argument("--reserve", metavar="SIZE", help="memory that tensors cannot have [1GiB, and 2%% of a GPU]")
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    command.add_argument("--backend", metavar="{" + ",".join(BACKENDS) + "}", help="which implementation is meant")
    command.set_defaults(command=plan)


def plan(options: argparse.Namespace) -> None:
    """lora plan: see `lora.forecast`. Whether it fits is in what is printed, not in the exit code."""
    import json

    with _set_up(options):
        from lora.forecast import forecast

        same = ("seq", "batch", "rank", "quantization", "gpu", "checkpointing", "grad_accumulation", "dtype", "reserve")
        settings = {name: getattr(options, name) for name in same}
        names = options.target_parameters and parse_flag("target_parameters", options.target_parameters)
        found = forecast(options.model, target_parameters=names, **settings)
    print(json.dumps(found.as_dict(), indent=2) if options.json else found)


# ---- generate --------------------------------------------------------------------------------------------------


def add_generate(command: Parser) -> None:
    """The options of lora generate."""
    add_model(command, adapter="optional")
    command.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to answer; without one: --file, or stdin")
    command.add_argument("--file", metavar="FILE", help="a prompt on each line")
    command.add_argument("--system", metavar="TEXT", help="system message before each prompt")
    _number(command, "--max-new-tokens", "N", 256, "longest answer, in tokens", int)
    _number(command, "--temperature", "X", 0.0, "0: the likeliest token each time; above 0: drawn", float)
    _number(command, "--seed", "N", 0, "of what is drawn", int)
    command.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write prompts as the chat template does",
    )
    command.set_defaults(command=generate)


def generate(options: argparse.Namespace) -> None:
    """lora generate: one answer as it grows, or several in a batch."""
    if options.max_new_tokens < 1:
        raise LoRAError(f"--max-new-tokens is {options.max_new_tokens}, expected an integer >= 1.")
    if not 0 <= options.temperature <= 100:
        raise LoRAError(f"--temperature is {options.temperature}, expected a number in [0, 100].")
    if options.system is not None and not options.chat_template:
        raise LoRAError("--system needs the chat template: leave out --no-chat-template, or --system.")
    prompts = read_prompts(options)
    from lora.train.sampling import answer

    with _set_up(options):
        model, tokenizer = load_with_adapter(options)
        import torch

        torch.manual_seed(options.seed)
        if options.system is not None:
            turns = [{"role": "system", "content": options.system}]
            prompts = [[*turns, {"role": "user", "content": prompt}] for prompt in prompts]
        settings = {
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "chat": options.chat_template,
        }
        if len(prompts) == 1:  # word by word
            answer(model, tokenizer, prompts, on_text=lambda text: print(text, end="", flush=True), **settings)
            print()
            return
        for prompt, text in zip(prompts, answer(model, tokenizer, prompts, **settings), strict=True):
            print(f"> {prompt if isinstance(prompt, str) else prompt[-1]['content']}\n{text}\n")


def read_prompts(options: argparse.Namespace) -> list[Any]:
    """From the arguments, a file, or standard input."""
    if options.prompts and options.file:
        raise LoRAError("prompts are given both as arguments and with --file: choose one.")
    if options.prompts:
        prompts = options.prompts
    elif options.file:
        try:
            prompts = [line for line in Path(options.file).read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise LoRAError(f"{options.file} is not UTF-8 text: give a text file with a prompt on each line.") from None
    elif sys.stdin is None or sys.stdin.isatty():
        raise LoRAError('no prompt: lora generate --model MODEL "your prompt", or --file, or a pipe to standard input.')
    else:
        prompts = [sys.stdin.read().strip()]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise LoRAError("a prompt is empty: give some text.")
    return list(prompts)


# ---- merge, export, quantize, explain --------------------------------------------------------------------------


def add_merge(command: Parser) -> None:
    """The options of lora merge."""
    add_model(command, adapter="required")
    _add_output(command)
    _choice(
        command, "--format", ("safetensors", "gguf"), "safetensors", "gguf: one file for llama.cpp, named by --output"
    )
    command.add_argument(
        "--dtype",
        choices=(*DTYPES, *BLOCK_DTYPES),
        help="of the merged weights; q8_0 with --format gguf only [the base's if 16 bits, else bfloat16]",
    )
    command.set_defaults(command=merge)


def merge(options: argparse.Namespace) -> None:
    """lora merge: see `lora.directories.merge_directory` and `lora.gguf_export.merge_gguf`."""
    with _set_up(options):
        if options.format == "gguf":
            _need_gguf()
            from lora.gguf_export import merge_gguf as run
        else:
            from lora.directories import merge_directory as run

            if options.dtype in BLOCK_DTYPES:
                raise LoRAError(f"--dtype {options.dtype} needs --format gguf: safetensors has no such type.")
        report = run(options.model, options.adapter, options.output, dtype=options.dtype, overwrite=options.overwrite)
    print(report)


def add_export(command: Parser) -> None:
    """The options of lora export."""
    add_model(command, adapter="required")
    _add_output(command)
    command.add_argument("--format", required=True, choices=("vllm", "gguf"), help="gguf: --output is a file")
    command.add_argument("--dtype", choices=("float32", "float16"), help="of a GGUF adapter [float32]")
    command.set_defaults(command=export)


def export(options: argparse.Namespace) -> None:
    """lora export: see `lora.export.export_adapter`."""
    from lora.export import export_adapter

    with _set_up(options):
        if options.format == "gguf":
            _need_gguf()
        report = export_adapter(
            options.model,
            options.adapter,
            options.output,
            format=options.format,
            dtype=options.dtype,
            overwrite=options.overwrite,
        )
    print(report)


def _need_gguf() -> None:
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise LoRAError("--format gguf needs the package gguf. Run: pip install gguf")


def add_quantize(command: Parser) -> None:
    """The options of lora quantize."""
    add_model(command)
    _add_output(command)
    command.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="4.127 bits a weight, not 4.5"
    )
    command.add_argument("--dtype", choices=DTYPES, help="that the weights are decoded to [bfloat16]")
    command.set_defaults(command=quantize)


def quantize(options: argparse.Namespace) -> None:
    """lora quantize: see `lora.directories.quantize_directory`."""
    from lora.directories import quantize_directory

    with _set_up(options):
        report = quantize_directory(
            options.model,
            options.output,
            dtype=options.dtype,
            double_quant=options.double_quant,
            overwrite=options.overwrite,
        )
    print(report)


def add_explain(command: Parser) -> None:
    """The options of lora explain."""
    add_model(command, adapter="optional")
    command.set_defaults(command=explain)


def explain(options: argparse.Namespace) -> None:
    """lora explain: which implementation runs each adapted module, and the memory by category."""
    from lora import dispatch
    from lora.directories import memory_table

    with _set_up(options):
        model, _ = load_with_adapter(options)
        if options.adapter:
            print(dispatch.explain(model), end="\n\n")
        print(memory_table(model))


# ---- bench -----------------------------------------------------------------------------------------------------


def add_bench(command: Parser) -> None:
    """The options of lora bench."""
    command.add_argument("--rows", metavar="NAMES", help="step, memory, linear, nf4, generate, inject, growth [all]")
    _number(command, "--rounds", "N", 5, "how often everything is timed, in turn", int)
    command.add_argument("--dry-run", action="store_true", help="tiny shapes, in seconds: does it all run?")
    command.add_argument(
        "--output", metavar="DIR", type=Path, help="for figures and page [the checkout's docs/benchmarks]"
    )
    command.set_defaults(command=bench)


def bench(options: argparse.Namespace) -> None:
    """lora bench: see `benchmarks/cpu`, beside this package in a checkout; exit code 1 after a disagreement."""
    import importlib
    from importlib.util import find_spec

    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "cpu" / "__main__.py").is_file():
        raise LoRAError(
            "lora bench needs a checkout: the benchmarks are not part of the installed package. In a clone of the "
            "repository run `pip install -e '.[train,dev]'`, then `lora bench`."
        )
    missing = [name for name in ("transformers", "peft", "matplotlib") if find_spec(name) is None]
    if missing:
        raise LoRAError(f"lora bench needs {', '.join(missing)}. In the checkout run: pip install -e '.[train,dev]'")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    module = importlib.import_module("benchmarks.cpu.__main__")
    raise SystemExit(module.bench(options.rows, options.rounds, options.dry_run, options.output))


# ---- shared ----------------------------------------------------------------------------------------------------


def add_model(command: Parser, adapter: str | None = None) -> None:
    """--model, --adapter where there is one, and --backend."""
    command.add_argument(
        "--model", required=True, metavar="MODEL", help="hub id, directory, GGUF file, or a packaged model's name"
    )
    if adapter:
        needed = adapter == "required"
        command.add_argument("--adapter", required=needed, metavar="DIR", help="adapter directory, ours or PEFT's")
    if adapter != "required":
        command.add_argument("--backend", metavar="{" + ",".join(BACKENDS) + "}", help="which implementation runs")
    command.set_defaults(quantization="none", backend=None)
    if adapter == "optional":
        _choice(command, "--quantization", ("none", "nf4"), "none", "nf4: quantise the model while loading it")


def _add_output(command: Parser) -> None:
    command.add_argument("--output", required=True, metavar="DIR", help="directory (or GGUF file) to write")
    command.add_argument("--overwrite", action="store_true", help="replace it if it is there")


def _number(command: Parser, flag: str, metavar: str, default: Any, text: str, kind: type) -> None:
    action = command.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)
    action.shown_default = default  # type: ignore[attr-defined]


def _choice(command: Parser, flag: str, choices: Sequence[str], default: str, text: str) -> None:
    action = command.add_argument(flag, choices=choices, default=default, help=text)
    action.shown_default = default  # type: ignore[attr-defined]


def load_with_adapter(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, on the GPU if there is one, with its adapter, ready to generate."""
    import torch

    import lora
    from lora.meter import meter

    device = "cuda:0" if torch.cuda.is_available() else None
    quantization = None if options.quantization == "none" else options.quantization
    with meter("loading the model"):
        model, tokenizer = lora.load(options.model, quantization=quantization, device=device)
        if options.adapter:
            lora.load_adapter(model, options.adapter)
            lora.for_inference(model)
    return model, tokenizer


def _set_up(options: argparse.Namespace) -> Any:
    """The backend, and silence from other packages, for the time of a command."""
    from contextlib import ExitStack
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise LoRAError("this needs the package transformers. Run: pip install 'lora-twin[train]'")
    from lora.dispatch import use_backend
    from lora.train.quiet import quiet

    stack = ExitStack()
    stack.enter_context(use_backend(chosen_backend(options.backend)))
    stack.enter_context(quiet())
    return stack


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"lora: note: {' '.join(str(message).split())}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


if __name__ == "__main__":
    sys.exit(main())
