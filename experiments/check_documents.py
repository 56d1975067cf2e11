"""Checks what documents say can be done: commands, flags, files and links.

    python -m experiments.check_documents

Reads the four documents, the reports and the notebooks. A command
`python -m experiments.NAME` has to be a module that runs, its flags have to be that
module's. A path below one of the project's folders has to exist, and so does what a
link or picture points to, with the heading after a #. Prints each thing that does not
hold as file:line, and fails.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator

from experiments.cli.command import command

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "disagg_jax/README.md",
    "experiments/README.md",
    "experiments/RESULTS.md",
    "experiments/reports/*.md",
    "experiments/reports/*.txt",
    "experiments/notebooks/*.py",
)
_FOLDERS = "disagg_jax|models|sharding|experiments|tests"

_COMMAND = re.compile(r"python -m (experiments(?:\.\w+)+)((?: +[^\s`|]+)*)")
_FLAG = re.compile(r"--(?:no)?([a-zA-Z]\w*)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_PATH = re.compile(rf"`((?:{_FOLDERS})/[\w./-]*)`")
_TABLE = "| `python -m experiments.` |"
_COLAB = "https://colab.research.google.com/github/disagg-jax/disagg-jax/blob/main/"
_SHARED = "experiments.cli."  # modules that define flags for commands
_ABSL = ("help", "helpfull", "helpshort", "flagfile")  # flags that every command has


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Something that a document says and that is not so."""

    path: pathlib.Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def check(root: pathlib.Path, path: pathlib.Path) -> Iterator[Mistake]:
    """What does not hold in one document.

    Args:
      root: of the checkout, where commands run.
      path: of the document.
    """
    text = _tables_spelt_out(_joined(path.read_text()))
    found = [
        (match.start(), what)
        for match in _COMMAND.finditer(text)
        for what in _wrong_command(root, *match.groups())
    ]
    for match in _PATH.finditer(text):
        if not (root / match[1]).exists():
            what = f"expected a file or folder of the project, got '{match[1]}'"
            found.append((match.start(), what))
    for match in _LINK.finditer(text):
        target = _target(root, path, match[1])
        if target is not None and not _leads_to(target, match[1]):
            what = f"expected a link to something that exists, got '{match[1]}'"
            found.append((match.start(), what))
    for at, what in found:
        yield Mistake(path.relative_to(root), text.count("\n", 0, at) + 1, what)


def _joined(text: str) -> str:
    """Commands on one line each; a line that was joined is left empty."""
    lines = text.split("\n")
    for i in range(len(lines) - 1, 0, -1):
        if lines[i - 1].endswith("\\"):
            more = lines[i].lstrip("# ")
            lines[i - 1], lines[i] = f"{lines[i - 1][:-1].rstrip()} {more}", ""
    return "\n".join(lines)


def _tables_spelt_out(text: str) -> str:
    """The rows of tables headed `python -m experiments.` as whole commands."""
    lines, inside = text.split("\n"), False
    for i, line in enumerate(lines):
        inside = line.startswith("|") and (inside or line.startswith(_TABLE))
        if inside and not line.startswith(_TABLE):
            lines[i] = line.replace("| `", "| `python -m experiments.", 1)
    return "\n".join(lines)


def _wrong_command(root: pathlib.Path, module: str, arguments: str) -> Iterator[str]:
    source = root / f"{module.replace('.', '/')}.py"
    if not source.exists():
        yield f"expected a module of experiments, got '{module}'"
        return
    flags, runs = _read(root, source)
    if not runs:
        yield f"expected a module that can be run, got '{module}'"
    for word in arguments.split():
        flag = _FLAG.match(word)
        if word.startswith("-") and flag is None:
            yield f"{module}: expected flags like --name=value, got '{word}'"
        elif flag and not {flag[1], f"no{flag[1]}"} & {*flags, *_ABSL}:
            yield f"{module}: expected a flag of {sorted(flags)}, got '{word}'"


@functools.cache
def _read(root: pathlib.Path, source: pathlib.Path) -> tuple[frozenset[str], bool]:
    """The flags of a command, those of `experiments.cli` included, and if it runs."""
    tree = ast.parse(source.read_text())
    flags = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="FLAGS" | "own")),
                args=[ast.Constant(value=str(name)), *_],
            ):
                flags.add(name)
            case ast.ImportFrom(module=str(module)) if module.startswith(_SHARED):
                flags |= _read(root, root / f"{module.replace('.', '/')}.py")[0]
    runs = any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        for node in tree.body
    )
    return frozenset(flags), runs


def _target(root: pathlib.Path, path: pathlib.Path, link: str) -> pathlib.Path | None:
    """The file of the project that a link is to; None if it is to something else."""
    if link.startswith(_COLAB):
        return root / link.removeprefix(_COLAB)
    if "://" in link:
        return None
    file = link.partition("#")[0]
    return path.parent / file if file else path


def _leads_to(target: pathlib.Path, link: str) -> bool:
    """Return whether a file is there and, in Markdown, the heading that is named."""
    heading = link.partition("#")[2]
    if not (target.exists() and heading and target.suffix == ".md"):
        return target.exists()
    return heading in map(_anchor, _HEADING.findall(target.read_text()))


def _anchor(heading: str) -> str:
    """Return how GitHub names a heading in a link."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def documents(root: pathlib.Path) -> list[pathlib.Path]:
    """All that is checked.

    Raises:
      ValueError: if a kind of document is missing altogether.
    """
    found: list[pathlib.Path] = []
    for pattern in DOCUMENTS:
        matches = sorted(root.glob(pattern))
        if not matches:
            raise ValueError(f"expected documents like {pattern}, got none")
        found += matches
    return found


def problems(root: pathlib.Path, paths: Iterable[pathlib.Path]) -> list[Mistake]:
    """What does not hold in any of the documents."""
    return [problem for path in paths for problem in check(root, path)]


@command()
def main() -> None:
    paths = documents(ROOT)
    found = problems(ROOT, paths)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(paths)} documents, {len(found)} problems")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
