"""The demo: teach a small chat model to describe Python functions the way the standard library does.

    data      (signature -> first docstring sentence), collected with `inspect` from the interpreter's own standard
              library, in a fresh process; whole packages are held out, so that the model is measured on modules it
              never saw
    training  `lora.train.run`, which is what `lora train` calls
    checks    the adapter, loaded again in a fresh process, gives the same logits; so does PEFT with it; so does the
              model with the adapter merged into its weights

Run it with `make demo`, or `python examples/docstrings.py --help`. All it writes is under out/demo.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import random
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # also where the package is not installed
    sys.path.insert(0, str(ROOT))

MODEL = "smollm2-135m-instruct"
INSTRUCTIONS = {
    "def": "Describe the Python function in one imperative sentence.",
    "class": "Describe the Python class in one sentence.",
}
HELD_OUT_SHARE = 0.1  # of the pairs, in whole packages
MEASURED = 80  # held-out pairs that the loss is measured on
ANSWERED = 24  # of them, how many the model answers before and after
SHOWN = 6  # of those, how many the report shows
ANSWER_TOKENS = 40
PAPER = 120  # columns where there is no terminal
SETTINGS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lr": 1e-3,
    "scheduler": "cosine",
    "warmup": 0.1,
    "batch_size": 8,
    "max_length": 160,
    "max_steps": 48,
    "eval_every": 24,
    "save_every": 0,
    "seed": 0,
}

# ---- the data --------------------------------------------------------------------------------------------------

NOT_IMPORTED = {  # importing them prints, opens a browser or a window, or needs a display
    *("__main__", "antigravity", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"),
    *("ensurepip", "encodings", "pydoc_data", "venv"),  # nothing to learn from
    "distutils",  # setuptools, where it is installed, puts its own in the place of Python 3.11's
}
SAME_PACKAGE = dict.fromkeys(("genericpath", "nt", "ntpath", "posix", "posixpath"), "os")  # os is made of them
LONGEST_SIGNATURE, SENTENCE_WORDS = 120, (3, 25)
NOISE = re.compile(
    r">>>|->|::|^\W|^(deprecated|alias|see|initialize self|same as|internal)\b|\w\(.*\) *$", re.IGNORECASE
)


@dataclass(frozen=True)
class Pair:
    """One example: `def json.dumps(obj, ...)`, or a class, and what its docstring says first."""

    package: str  # json
    signature: str  # def json.dumps(obj, *, skipkeys=False, ...)
    sentence: str

    def row(self) -> dict[str, Any]:
        """As a conversation, the form of the training data."""
        return {"messages": [*question(self.signature), {"role": "assistant", "content": self.sentence}]}


def question(signature: str) -> list[dict[str, str]]:
    """What the model is asked."""
    kind = signature.partition(" ")[0]
    return [{"role": "system", "content": INSTRUCTIONS[kind]}, {"role": "user", "content": signature}]


def collect(packages: Iterable[str] | None = None) -> list[Pair]:
    """The pairs of the standard library, or of some of its packages, in the order of their names.

    No sentence comes twice, and no two names of one function. They come from a fresh process that has imported the
    standard library alone, so that nothing the caller has imported can add to them or take from them: some libraries
    put functions of their own into the standard library's modules.
    """
    chosen = [] if packages is None else ["--packages", *packages]
    command = [sys.executable, "-I", str(Path(__file__).resolve()), "--collect", *chosen]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"collecting the pairs in a fresh process failed:\n{finished.stderr.strip()}")
    return [Pair(*fields) for fields in json.loads(finished.stdout.splitlines()[-1])]


def collect_here(packages: Iterable[str] | None = None) -> list[Pair]:
    """`collect` in this process, whatever it has imported."""
    names = sorted(sys.stdlib_module_names if packages is None else packages)
    pairs: list[Pair] = []
    sentences: set[str] = set()
    seen: dict[int, Any] = {}  # what was looked at, kept alive so that its id stays its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules and attributes say so
        for module_name in (m for name in names if not name.startswith("_") for m in modules_of(name)):
            for name, thing in members(sys.modules[module_name]):
                pair = pair_of(f"{module_name}.{name}", thing)
                if pair is not None and id(thing) not in seen and pair.sentence not in sentences:
                    pairs.append(pair)
                    sentences.add(pair.sentence)
                seen[id(thing)] = thing
    return pairs


def modules_of(name: str) -> Iterator[str]:
    """A module and, if it is a package, all in it, imported; those that this platform lacks are left out."""
    top = name.partition(".")[0]
    if top in NOT_IMPORTED or not imported(name):
        return
    yield name
    inside = sorted(child.name for child in pkgutil.iter_modules(getattr(sys.modules[name], "__path__", [])))
    for child in inside:
        if not child.startswith(("_", "test")):
            yield from modules_of(f"{name}.{child}")


def imported(name: str) -> bool:
    """Imports a module of the standard library in silence; False where that cannot be done here."""
    silence = io.StringIO()
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            spec = importlib.util.find_spec(name)
            if spec is None or not is_standard(spec.origin):
                return False
            importlib.import_module(name)
    except (Exception, SystemExit):  # a module of another platform may raise anything
        return False
    return True


def is_standard(origin: str | None) -> bool:
    """Whether a module's file is the interpreter's own, and not one of the same name elsewhere on the path."""
    homes = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    return origin in (None, "built-in", "frozen") or any(
        origin.startswith(home) and "site-packages" not in origin for home in homes
    )


def members(module: Any) -> Iterator[tuple[str, Any]]:
    """The public functions, classes and methods that a module defines, by qualified name."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        if inspect.isclass(value) and value.__module__ == module.__name__:
            yield name, value
            for attribute, method in sorted(vars(value).items()):
                function = getattr(method, "__func__", method)  # of class and static methods
                if not attribute.startswith("_") and inspect.isroutine(function):
                    yield f"{name}.{attribute}", function
        elif inspect.isroutine(value):
            yield name, value


def pair_of(name: str, thing: Any) -> Pair | None:
    """The pair of one function or class; None where it has no plain signature or no plain first sentence."""
    sentence = first_sentence(getattr(thing, "__doc__", None))
    try:
        arguments = str(inspect.signature(thing))
    except (ValueError, TypeError):  # much that is written in C has none
        return None
    arguments = re.sub(r"<[^<>]*>", "...", arguments.partition(" -> ")[0])  # no addresses: the same in every run
    signature = f"{'class' if inspect.isclass(thing) else 'def'} {name}{arguments}"
    if sentence is None or len(signature) > LONGEST_SIGNATURE or "<" in signature:
        return None
    package = name.partition(".")[0]
    return Pair(SAME_PACKAGE.get(package, package), signature, sentence)


def first_sentence(docstring: Any) -> str | None:
    """The first sentence, on one line; None for what is no sentence: an example, a signature, a fragment."""
    if not isinstance(docstring, str):
        return None
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    found = re.match(r"(.+?[.])(?=\s|$)", paragraph)
    sentence = found[1] if found else f"{paragraph}."
    low, high = SENTENCE_WORDS
    if not low <= len(sentence.split()) <= high or NOISE.search(sentence) or not sentence[0].isupper():
        return None
    return sentence if sentence.isascii() else None


def split(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """(to train on, held out), by package: no package is on both sides. Both are shuffled."""
    generator = random.Random(seed)
    packages = sorted({pair.package for pair in pairs})
    generator.shuffle(packages)
    held: set[str] = set()
    for package in packages[:-1]:
        if sum(pair.package in held for pair in pairs) >= HELD_OUT_SHARE * len(pairs):
            break
        held.add(package)
    train = [pair for pair in pairs if pair.package not in held]
    held_out = [pair for pair in pairs if pair.package in held]
    generator.shuffle(train)
    generator.shuffle(held_out)
    return train, held_out


def write_pairs(pairs: Iterable[Pair], path: Path) -> Path:
    """One conversation on each line."""
    path.write_text("".join(json.dumps(pair.row()) + "\n" for pair in pairs), encoding="utf-8")
    return path


# ---- the quality figure ----------------------------------------------------------------------------------------

VERBS = """
Abort Accept Acquire Activate Add Adjust Advance Allocate Allow Append Apply Ask Assert Assign Attach Begin
Bind Block Break Build Bypass Calculate Call Cancel Capture Change Check Choose Clean Clear Close Collapse
Collect Combine Commit Compare Compile Complete Compress Compute Concatenate Configure Connect Construct
Consume Convert Copy Count Create Deactivate Deallocate Debug Declare Decode Decompress Decorate Decrease
Decrement Decrypt Define Delegate Delete Deliver Deserialize Destroy Detach Detect Determine Disable
Disassemble Discard Disconnect Dispatch Display Divide Do Download Draw Drop Dump Emit Empty Enable Encode
Encrypt End Ensure Enter Enumerate Erase Escape Establish Estimate Evaluate Examine Exchange Execute Exit
Expand Expect Explain Export Extend Extract Fail Feed Fetch Fill Filter Find Finish Fix Flatten Flush Fold
Follow Force Format Forward Free Generate Get Give Go Group Guess Handle Hash Hide Identify Ignore Implement
Import Include Increase Increment Indent Indicate Initialize Initiate Insert Inspect Install Interpret
Interrupt Invalidate Invoke Issue Iterate Join Keep Kill Launch Leave Limit List Listen Load Locate Lock Log
Login Look Lookup Make Manage Map Mark Match Measure Merge Modify Monitor Mount Move Multiply Normalize Notify
Obtain Open Override Overwrite Pack Parse Partition Pass Pause Peek Perform Pick Poll Pop Position Post
Prepare Prepend Preserve Prevent Print Process Produce Prompt Protect Provide Push Put Query Quit Quote Raise
Randomize Read Rebuild Receive Reconstruct Record Redirect Reduce Refresh Register Reject Release Reload
Remove Rename Render Reopen Repeat Replace Report Represent Request Require Reserve Reset Resize Resolve
Respond Restart Restore Resume Retrieve Return Reverse Revert Rewind Rotate Round Run Save Scan Schedule
Search Seek Select Send Separate Serialize Serve Set Setup Shift Show Shuffle Shut Shutdown Signal Simplify
Skip Sleep Sort Specify Split Start Stop Store Strip Submit Subscribe Substitute Subtract Suspend Swap Switch
Synchronize Take Tell Terminate Test Toggle Tokenize Trace Track Transfer Transform Translate Transmit
Traverse Treat Trigger Trim Truncate Try Turn Uncompress Undo Unescape Uninstall Unload Unlock Unmark Unpack
Unquote Unregister Unsubscribe Unwrap Update Upgrade Upload Use Validate Verify Visit Wait Wake Walk Warn
Watch Wrap Write Yield Zip
"""


def is_one_imperative_sentence(answer: str) -> bool:
    """The quality figure: one line, one sentence that ends in a full stop, first word a verb in its base form.

    A sentence ends at . ! or ? before a space, or at the end. "Returns the name." and "This function returns the
    name." do not count; nor does an answer that is cut off.
    """
    words = answer.split()
    return bool(
        words
        and "\n" not in answer.strip()
        and answer.strip().endswith(".")
        and not re.search(r"[.!?]\s", answer.strip())
        and words[0] in VERBS.split()
    )


# ---- the checks ------------------------------------------------------------------------------------------------


def logits_of(model: Any, tokenizer: Any) -> Any:
    """The logits of one fixed question, [tokens, vocab]."""
    import torch

    from lora.train.sampling import encode, render

    text = render(tokenizer, question("def json.dumps(obj, *, indent=None)"), chat=bool(tokenizer.chat_template))
    batch = encode(tokenizer, [text], special=False).to(model.device)
    with torch.no_grad():
        return model(**batch).logits[0].float().cpu()


def difference(found: Any, expected: Any) -> float:
    """The largest difference between two tensors of logits."""
    return float((found - expected).abs().max())


def check_in_fresh_process(output: Path, model: str) -> dict[str, Any]:
    """What a process that knows only the files finds: see `check`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--check", "--output", str(output), "--model", model]
    finished = subprocess.run(command, capture_output=True, text=True)  # LORA_BACKEND goes along
    if finished.returncode:
        raise RuntimeError(f"the check in a fresh process failed:\n{finished.stderr.strip()}")
    found: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return found


def check(output: Path, name: str) -> dict[str, Any]:
    """Loads what is on the disk in every way there is, and compares logits with those of the trained model."""
    import torch
    from safetensors.torch import load_file

    import lora
    from lora.cli import chosen_backend
    from lora.train.quiet import quiet

    expected = load_file(output / "logits.safetensors")["logits"]
    found: dict[str, Any] = {}
    with quiet(), lora.use_backend(chosen_backend(None)):
        model, tokenizer = lora.load(name, dtype=torch.float32)
        found["base"] = difference(logits_of(model, tokenizer), expected)
        lora.for_inference(lora.load_adapter(model, output / "adapter"))
        found["adapter"] = difference(logits_of(model, tokenizer), expected)
        if importlib.util.find_spec("peft") is not None:
            from peft import PeftModel

            wrapped = PeftModel.from_pretrained(lora.load(name, dtype=torch.float32)[0], str(output / "adapter"))
            found["peft"] = difference(logits_of(wrapped.eval(), tokenizer), expected)
        merged, tokenizer = lora.load(output / "merged")
        found["merged"] = difference(logits_of(merged, tokenizer), expected)
    return found


# ---- the run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """Everything the report says."""

    model: str
    backend: str
    packages: int
    packages_held_out: int
    pairs_train: int
    pairs_held_out: int
    pairs_measured: int
    pairs_seen: int  # in training
    tokens_seen: int
    tokens_learnt: int
    tokens_per_second: float
    trainable: int
    parameters: int
    loss_before: float
    loss_after: float
    quality_before: float
    quality_after: float
    quality_of_the_data: float
    answers: int
    logits_largest: float
    merged_difference: float  # in float32, in the process that trained
    checks: dict[str, Any]
    peak_memory: int
    seconds: float


class Demo:
    """The stages of the demo."""

    def __init__(self, options: argparse.Namespace) -> None:
        from rich.console import Console

        self.options, self.output = options, Path(options.output)
        self.console, self.started = Console(), time.monotonic()
        if not self.console.is_terminal:  # a file: wide enough for the tables
            self.console = Console(width=PAPER)
        self.logits: Any = None
        self.merged_difference = 0.0

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{text}", align="left")

    def run(self) -> Figures:
        """All of it; safe to repeat."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.heading("1  Data: what the standard library says about itself")
        train, held_out, measured = self.data()
        self.heading("2  Training")
        result = self.train()
        self.heading("3  The same prompts, before and after")
        self.show(result, measured)
        self.heading("4  What is on the disk does what the trained model did")
        checks = self.check()
        figures = self.figures(train, held_out, measured, result, checks)
        self.heading("5  In numbers")
        self.report(figures, result, measured)
        return figures

    def data(self) -> tuple[list[Pair], list[Pair], list[Pair]]:
        pairs = collect(self.options.packages)
        train, held_out = split(pairs)
        functions = [pair for pair in held_out if pair.signature.startswith("def ")]
        measured = functions[: self.options.measured]  # the figure of part 5 is about functions
        write_pairs(train, self.output / "train.jsonl")
        write_pairs(measured, self.output / "held_out.jsonl")
        packages = sorted({pair.package for pair in held_out})
        example = train[0]
        self.say(f"{len(pairs):,} functions, methods and classes with a signature and a first sentence, for instance")
        self.say(f"  {example.signature}\n  -> {example.sentence}")
        self.say(f"{len(train):,} of them are for training; held out are {len(held_out):,}, all there are in")
        self.say(f"  {', '.join(packages)}")
        return train, held_out, measured

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def train(self) -> Any:
        from lora.cli import chosen_backend
        from lora.train import TrainConfig, run

        config = TrainConfig(
            model=self.options.model,
            backend=chosen_backend(None),  # LORA_BACKEND, else auto
            data=str(self.output / "train.jsonl"),
            eval_data=str(self.output / "held_out.jsonl"),
            output=str(self.output),
            overwrite=True,
            dtype="float32",
            samples=self.options.answers,
            sample_tokens=ANSWER_TOKENS,
            **{**SETTINGS, "max_steps": self.options.steps},
        )
        return run(config, self.console, on_finished=self.keep_logits)

    def keep_logits(self, model: Any, tokenizer: Any) -> None:
        """The trained model's logits, and how far merging the adapter moves them."""
        import lora

        self.logits = logits_of(model, tokenizer)
        self.merged_difference = difference(logits_of(lora.merge_and_eject(model), tokenizer), self.logits)

    def show(self, result: Any, measured: Sequence[Pair]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_lines=True, expand=True)
        for title, ratio in (("held-out function", 4), ("before", 4), ("after", 3), ("its docstring", 3)):
            table.add_column(title, ratio=ratio, overflow="fold")
        for pair, sample in list(zip(measured, result.samples, strict=False))[:SHOWN]:
            cells = (pair.signature.removeprefix("def "), sample.before, sample.after, pair.sentence)
            table.add_row(*(Text(" ".join(cell.split())) for cell in cells))
        self.console.print(table)

    def check(self) -> dict[str, Any]:
        from safetensors.torch import save_file

        from lora.directories import merge_directory
        from lora.train.quiet import quiet

        save_file({"logits": self.logits}, self.output / "logits.safetensors")
        with quiet():
            merge_directory(self.options.model, str(self.output / "adapter"), self.output / "merged", overwrite=True)
        found = check_in_fresh_process(self.output, self.options.model)
        (self.output / "logits.safetensors").unlink()
        largest = float(self.logits.abs().max())
        self.say(f"largest difference of a logit from the trained model's (they reach {largest:.1f}):")
        for label, value in self.check_lines(found):
            self.say(f"  {label:<58}{value}")
        return found

    def check_lines(self, found: dict[str, Any]) -> list[tuple[str, str]]:
        peft = f"{found['peft']:.2g}" if "peft" in found else "peft is not installed: not checked"
        same = "0: bit for bit the same" if found["adapter"] == 0 else f"{found['adapter']:.2g}"
        return [
            ("without the adapter", f"{found['base']:.2g}"),
            ("adapter/ loaded in a fresh process", same),
            ("adapter/ loaded by PEFT", peft),
            ("adapter merged into the weights, float32", f"{self.merged_difference:.2g}"),
            ("merged/ loaded in a fresh process, bfloat16", f"{found['merged']:.2g}"),
        ]

    def figures(
        self, train: list[Pair], held_out: list[Pair], measured: list[Pair], result: Any, checks: dict[str, Any]
    ) -> Figures:
        def share(texts: Sequence[str]) -> float:
            return sum(map(is_one_imperative_sentence, texts)) / max(len(texts), 1)

        answered = len(result.samples)
        return Figures(
            model=self.options.model,
            backend=result.backend,
            packages=len({pair.package for pair in (*train, *held_out)}),
            packages_held_out=len({pair.package for pair in held_out}),
            pairs_train=len(train),
            pairs_held_out=len(held_out),
            pairs_measured=len(measured),
            pairs_seen=min(result.steps * SETTINGS["batch_size"], len(train)),
            tokens_seen=result.tokens,
            tokens_learnt=result.tokens_learnt,
            tokens_per_second=result.tokens_per_second,
            trainable=result.trainable,
            parameters=result.parameters,
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            quality_before=share([sample.before for sample in result.samples]),
            quality_after=share([sample.after for sample in result.samples]),
            quality_of_the_data=share([pair.sentence for pair in measured[:answered]]),
            answers=answered,
            logits_largest=float(self.logits.abs().max()),
            merged_difference=self.merged_difference,
            checks=checks,
            peak_memory=result.peak_memory,
            seconds=round(time.monotonic() - self.started, 1),
        )

    def report(self, figures: Figures, result: Any, measured: Sequence[Pair]) -> None:
        rows = summary(figures)
        for label, value in rows:
            self.say(f"{label:<44}{value}")
        self.say(f"\nAll of it is in {self.output}: report.md, loss.png, samples.md, adapter/, merged/")
        (self.output / "report.json").write_text(json.dumps(asdict(figures), indent=1), encoding="utf-8")
        text = markdown(rows, self.check_lines(figures.checks), result, measured)
        (self.output / "report.md").write_text(text, encoding="utf-8")


def summary(figures: Figures) -> list[tuple[str, str]]:
    """The last table: label and value."""
    share = figures.trainable / figures.parameters
    return [
        ("held-out loss, nats a token", f"{figures.loss_before:.3f} -> {figures.loss_after:.3f}"),
        (
            "answers that are one imperative sentence",
            f"{figures.quality_before:.0%} -> {figures.quality_after:.0%} of {figures.answers} "
            f"(the docstrings themselves: {figures.quality_of_the_data:.0%})",
        ),
        ("parameters that trained", f"{figures.trainable:,} of {figures.parameters:,} ({share:.1%})"),
        (
            "pairs seen in training",
            f"{figures.pairs_seen:,} of {figures.pairs_train:,} ({figures.tokens_seen:,} tokens)",
        ),
        ("speed", f"{figures.tokens_per_second:,.0f} tokens/s ({figures.backend} backend)"),
        ("most memory in use", f"{figures.peak_memory / 1e9:.1f} GB"),
        ("time for everything", f"{figures.seconds:.0f} s"),
    ]


def markdown(
    rows: Sequence[tuple[str, str]], checks: Sequence[tuple[str, str]], result: Any, measured: Sequence[Pair]
) -> str:
    """report.md."""
    lines = ["# What the demo did", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {value} |" for label, value in rows]
    lines += ["", "![the losses](loss.png)", "", "## The same prompts, before and after", ""]
    for pair, sample in list(zip(measured, result.samples, strict=False))[:SHOWN]:
        lines += [f"    {pair.signature}", ""]
        parts = (("before", sample.before), ("after", sample.after), ("docstring", pair.sentence))
        lines += [f"- {label}: {' '.join(text.split())}" for label, text in parts] + [""]
    lines += ["## Largest difference of a logit from the trained model's", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {label} | {value} |" for label, value in checks)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo, or with --check or --collect the part of it that a fresh process does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=MODEL, help="what to fine-tune [%(default)s]")
    parser.add_argument("--output", default="out/demo", help="where to write [%(default)s]")
    parser.add_argument("--steps", type=int, default=SETTINGS["max_steps"], help="optimizer steps [%(default)s]")
    parser.add_argument("--measured", type=int, default=MEASURED, help="held-out pairs to measure [%(default)s]")
    parser.add_argument("--answers", type=int, default=ANSWERED, help="of them, to answer [%(default)s]")
    parser.add_argument("--packages", nargs="+", help="collect from these packages only")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--collect", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.collect:  # before anything outside the standard library is imported
        pairs = collect_here(options.packages)
        print(json.dumps([[pair.package, pair.signature, pair.sentence] for pair in pairs]))
        return 0

    from lora.errors import LoRAError

    try:
        if options.check:
            print(json.dumps(check(Path(options.output), options.model)))
        else:
            Demo(options).run()
    except LoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(error or "interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
