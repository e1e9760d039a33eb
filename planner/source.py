"""Where a MODEL argument comes from: standard input, a file, or the zoo.

Finding and reading text only; what the text means is for `planner.modelfile`. A Source is what
a plan file keeps, so that the model can be read again on another machine.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meshes.yamltree import MAX_CHARACTERS, YamlProblem, decode, read_text
from planner.errors import InputError, nearest
from planner.model import Model
from planner.pins import Annotation

STDIN = "-"
STDIN_NAME = "<stdin>"
MAX_BYTES = 4 * MAX_CHARACTERS  # UTF-8 takes up to 4 bytes a character
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_MODEL_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Source:
    """A model's text. `argument` is what the user typed, `file` what diagnostics call it."""

    argument: str
    file: str
    text: str
    overrides: tuple[str, ...] = ()

    def load(self, under: Annotation | None = None) -> Model:
        """The model, to be planned under that annotation instead of its own constraints. Raises
        ModelErrors."""
        from planner.modelfile import load_model

        return load_model(self.text, self.file, self.overrides, under)

    def with_settings(self, settings: Sequence[str]) -> Source:
        """The model with more keys set, as KEY=VALUE."""
        return replace(self, overrides=(*self.overrides, *settings))

    @property
    def folder(self) -> Path:
        """Where the model's own relative paths start."""
        return Path(self.file).parent

    def place_of(self, key: str) -> str:
        """File and line of a top-level key, the file alone where it is not found."""
        found = re.search(rf"^{key}:", self.text, re.MULTILINE)
        line = f":{self.text.count(chr(10), 0, found.start()) + 1}" if found else ""
        return f"{self.file}{line}"

    def portable(self) -> Source:
        """The source as a plan file keeps it: without folders of this machine."""
        return replace(self, argument=Path(self.argument).name, file=Path(self.file).name)

    def arguments(self) -> str:
        """The words of a command line that name this model."""
        words = [self.argument]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join(words)


def find(argument: str, overrides: Sequence[str] = (), commands: Sequence[str] = ()) -> Source:
    """The source that `argument` names; InputError with the nearest names if there is none."""
    overrides = tuple(overrides)
    if argument == STDIN:
        return Source(argument, STDIN_NAME, _standard_input(), overrides)
    path = Path(argument)
    if path.is_file():
        return Source(argument, argument, _read(path), overrides)
    from planner import zoo

    if argument in zoo.names():
        return Source(argument, f"{argument}.yaml", zoo.text(argument), overrides)
    raise _unknown(argument, commands, zoo.names())


def _unknown(argument: str, commands: Sequence[str], models: Sequence[str]) -> InputError:
    if Path(argument).is_dir():
        return InputError(f"{argument!r} is a folder", "name a model file in it")
    if argument.endswith(_MODEL_SUFFIXES) or "/" in argument:
        return InputError(f"no such file: {argument!r}", "`plan models` lists the built-in models")
    if _FUNCTION.fullmatch(argument):
        return InputError(
            f"{argument!r}: JAX functions are not supported yet", "write a model file: `plan init`"
        )
    near = [f"command {n!r}" for n in nearest(argument, commands, 2)]
    near += [f"model {n!r}" for n in nearest(argument, models)]
    hint = f"did you mean {' or '.join(near)}?" if near else "`plan models` lists the models"
    return InputError(f"{argument!r} is no command, file or built-in model", hint)


def _read(path: Path) -> str:
    """The file's text; ModelErrors for what is no text or too large, by the limits of YAML."""
    from planner.modelfile.diagnostics import ModelErrors, from_yaml

    try:
        return read_text(path)
    except YamlProblem as problem:
        raise ModelErrors([from_yaml(problem)]) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _standard_input() -> str:
    from planner.modelfile.diagnostics import ModelErrors, from_yaml

    try:
        return decode(sys.stdin.buffer.read(MAX_BYTES + 1), STDIN_NAME)
    except YamlProblem as problem:
        raise ModelErrors([from_yaml(problem)]) from None
