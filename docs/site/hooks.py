"""What the docs site has that is no file in docs/: pages of the notebooks, the command line, two files at the root.

It also makes links work in both places. On disk a page links to files of the repository; in the site those that are
pages become links to pages, and the others stay as the paths they are, because there is no address to send readers to
(`repo_url` in mkdocs.yml, once there is one, makes links of them too).
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
AT_THE_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
COMMANDS_PAGE = "api/cli.md"
FENCES = re.compile(r"^(?P<fence>`{3,}|~{3,}).*?^(?P=fence)\s*$|(?<=\n\n)(?:(?: {4}|\t)[^\n]*\n)+", re.M | re.S)
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
NAMED_PAGE = re.compile(r"(?<![\[`])`(?P<path>(?:docs/[\w./-]+|CONTRIBUTING|CHANGELOG)\.md)`(?!\])")
MATHS = re.compile(r'<(span|div) class="arithmatex">\s*(.*?)\s*</\1>', re.S)
NOT_KNOWN = {  # to latex2mathml -> what it knows instead
    r"\\arg(?![a-z])": r"\\operatorname{arg}",
    r"\{aligned\}": "{align*}",
    r"\\mathbb\s*\{?E\}?": "𝔼",  # as a letter, because browsers ignore what MathML says of its style
}


# ---- the pages that are made


def on_config(config: Any) -> Any:
    """The empty lists of the navigation, filled with what there is."""
    folder = Path(config.docs_dir)
    fill(
        config.nav,
        {
            "Tutorials": [page_of(path) for path in notebooks()],
            "Decisions": [f"decisions/{path.name}" for path in folder.glob("decisions/*.md")],
            "Benchmarks": [f"benchmarks/{path.name}" for path in folder.glob("benchmarks/*.md")],
        },
    )
    return config


def fill(nav: list[Any], found: dict[str, list[str]]) -> None:
    """Each empty list named in `found` gets its pages, an index first."""
    for entry in nav:
        for title, value in entry.items() if isinstance(entry, dict) else ():
            if value == [] and title in found:
                entry[title] = sorted(found[title], key=lambda page: (not page.endswith("README.md"), page))
            elif isinstance(value, list):
                fill(value, found)


def on_files(files: Files, config: Any) -> Files:
    """The made pages and pictures, beside those of docs/."""
    for name, page in AT_THE_ROOT.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in notebooks():
        pictures: dict[str, bytes] = {}
        text = markdown_of(path, pictures)
        files.append(File.generated(config, page_of(path), content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    files.append(File.generated(config, COMMANDS_PAGE, content=commands()))
    return files


def notebooks() -> list[Path]:
    """Every notebook, in order."""
    return sorted((ROOT / "tutorials").glob("*.ipynb"))


def page_of(notebook: Path) -> str:
    """The page that is made of a notebook."""
    return f"tutorials/{notebook.stem}.md"


def markdown_of(path: Path, pictures: dict[str, bytes]) -> str:
    """A notebook with its outputs as Markdown; its pictures are added to `pictures`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [text_of(cell) if cell["cell_type"] == "markdown" else "" for cell in cells]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            parts[number] = f"```python\n{''.join(cell['source'])}\n```"
            for output in cell["outputs"]:
                parts[number] += "\n\n" + output_of(output, path.stem, pictures)
    note = f"*This page is `tutorials/{path.name}`, with what it printed: run it yourself, and change it.*"
    return "\n\n".join([parts[0], note, *parts[1:]]) + "\n"


def text_of(cell: dict[str, Any]) -> str:
    """A cell of text; what is inside <details> is Markdown too."""
    return "".join(cell["source"]).replace("<details>", '<details markdown="1">')


def output_of(output: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> str:
    """What a cell printed or drew."""
    if output["output_type"] == "stream":
        return f"```{{.text .output}}\n{''.join(output['text']).rstrip()}\n```"
    picture = output.get("data", {}).get("image/png")
    if picture is None:
        raise ValueError(f"an output of {stem} is neither text nor a picture: {sorted(output)}")
    name = f"{stem}_{len(pictures) + 1}.png"
    pictures[name] = base64.b64decode("".join(picture))
    return f"![what the cell above draws]({name})"


def commands() -> str:
    """Every command and option, as the parser itself knows them."""
    from lora.cli import parser

    top = parser()
    (choice,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    parts = [
        "# Command line",
        "`lora COMMAND --help` prints the same. A wrong input is one line on stderr and exit code 2; `--debug` before "
        "or after the command shows where it came from. Ctrl-C exits with 130, SIGTERM with 143.",
        "| command | |\n|---|---|\n"
        + "\n".join(f"| [`lora {each.dest}`](#lora-{each.dest}) | {each.help} |" for each in choice._choices_actions),
    ]
    for name, command in choice.choices.items():
        parts += [f"## lora {name}", str(command.description)]
        parts += [f"```text\n{command.epilog.strip()}\n```"] if command.epilog else []
        for group in command._action_groups:
            rows = [option_row(action) for action in group._group_actions if action.dest != "help"]
            if rows:
                title = "" if group.title in ("options", "positional arguments") else f"**{group.title}**: "
                parts.append(title + (group.description or ("" if title else "Options:")))
                parts.append("\n".join(["| option | | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def option_row(action: argparse.Action) -> str:
    """One option as a row of a table."""
    flags = action.option_strings or [str(action.metavar)]
    if isinstance(action, argparse.BooleanOptionalAction):
        flags = [flags[0], "--no-" + flags[0].removeprefix("--")]
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    takes_value = action.option_strings and action.nargs != 0 and value
    code = ", ".join(f"`{flag}`" for flag in flags) + (f" `{value}`" if takes_value else "")
    text = (action.help or "").replace("%%", "%").replace("|", "\\|")
    found = re.fullmatch(r"(.*?)\s*\[([^\]]*)\]", text)
    text, default = (found[1], found[2]) if found else (text, getattr(action, "shown_default", None))
    needed = " (required)" if action.required and action.option_strings else ""
    return f"| {code} | {text}{needed} | {'' if default is None else f'`{default}`'} |"


# ---- links


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links of the repository as links of the site."""
    source = source_of(page.file.src_uri)
    pages = {source_of(file.src_uri) for file in files if not file.src_uri.endswith(".py")}

    def link(match: re.Match[str]) -> str:
        text, (path, _, anchor) = match["text"], match["target"].partition("#")
        if not path or ":" in path:
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if wanted in pages:
            target = posixpath.relpath(site_path(wanted), posixpath.dirname(page.file.src_uri) or ".")
            return f"[{text}]({target}{'#' + anchor if anchor else ''})"
        if (ROOT / wanted).exists() and not wanted.startswith(".."):
            if config.repo_url:
                return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{wanted})"
            return text if wanted.rpartition("/")[2] in text else f"{text} (`{wanted}`)"
        return match[0]  # leads nowhere: the build says so

    def named(match: re.Match[str]) -> str:
        if match["path"] == source or match["path"] not in pages:
            return match[0]
        target = posixpath.relpath(site_path(match["path"]), posixpath.dirname(page.file.src_uri) or ".")
        return f"[{match[0]}]({target})"

    linked = outside_fences(markdown, lambda text: LINK.sub(link, text))
    return outside_fences(linked, lambda text: NAMED_PAGE.sub(named, text))


def source_of(src_uri: str) -> str:
    """The repository's file that a page of the site comes from."""
    for name, page in AT_THE_ROOT.items():
        if src_uri == page and page != "index.md":
            return name
    if src_uri.startswith("tutorials/") and src_uri.endswith(".md"):
        return src_uri.removesuffix(".md") + ".ipynb"
    return f"docs/{src_uri}"


def site_path(path: str) -> str:
    """The page of the site that is made of a file of the repository."""
    if path in AT_THE_ROOT:
        return AT_THE_ROOT[path]
    if path.startswith("tutorials/"):
        return path.removesuffix(".ipynb") + ".md"
    return path.removeprefix("docs/")


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """`change` applied to what is outside fenced and indented code."""
    return "".join(pieces(text, FENCES, change))


def pieces(text: str, kept: re.Pattern[str], change: Callable[[str], str]) -> Iterator[str]:
    """The text in pieces, those that match `kept` as they are, the others changed."""
    start = 0
    for match in kept.finditer(text):
        yield change(text[start : match.start()])
        yield match[0]
        start = match.end()
    yield change(text[start:])


# ---- equations


def on_page_content(content: str, page: Page, config: Any, files: Files) -> str:
    """LaTeX as MathML, which browsers show without a script."""
    return MATHS.sub(lambda match: mathml(html.unescape(match[2]), page.file.src_uri), content)


def mathml(text: str, where: str) -> str:
    r"""`\(...\)` or `\[...\]` as MathML. Raises: ValueError where it holds what is not known."""
    inline = text.startswith(r"\(")
    latex = text[2:-2].strip()
    for unknown, known in NOT_KNOWN.items():
        latex = re.sub(unknown, known, latex)
    made = latex2mathml.converter.convert(latex, display="inline" if inline else "block")
    if re.search(r"\\[a-zA-Z]|&(?![#\w]+;)", made):
        raise ValueError(f"an equation of {where} has something that is not known: {latex}")
    made = made.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # both sides of a norm alike
    return made if inline else f'<div class="equation">{made}</div>'
