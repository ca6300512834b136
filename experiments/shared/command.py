"""How every command begins and ends: its flags become one frozen settings object, and what fails ends in words.

A command is a module with `Settings`, a frozen dataclass with a field for every flag; `define_flags()`, which defines
them; and `main(settings)`. Importing it defines no flag. A module that several commands share has the first two for the
flags that come with it: the commands' `Settings` inherit from its own, and their `define_flags` call its own.
"""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from absl import app, flags, logging

from experiments.shared import device
from rat_jax import PerLayer, parse_mode
from rat_jax.data import BYTES, Tokenizer, load_tokenizer
from rat_jax.modes import Mode
from rat_jax.paths import local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The flags that every command has. Here and in commands a field is named as its flag, whose help says what it is.

  Attributes:
    given: the names of the flags that were given, rather than left at their defaults.
  """

  workdir: pathlib.Path
  seed: int = 0
  given: frozenset[str] = frozenset()

  def refuse(self, names: Sequence[str], why: str) -> None:
    """Raises ValueError for flags that were given and would change nothing."""
    given = [f"--{name}" for name in names if name in self.given]
    if given:
      raise ValueError(f"{', '.join(given)}: {why}")


AnySettings = TypeVar("AnySettings", bound=Settings)


def define_common_flags(script: str) -> None:
  """--workdir and --seed."""
  define_path("workdir", "Folder for everything that is written, but for a command's --output.", f"runs/{script}")
  flags.DEFINE_integer("seed", 0, "Seed of parameters, data order and sampling. A command that draws nothing takes it"
                       " too.", lower_bound=0)


class _PathParser(flags.ArgumentParser):
  syntactic_help = "a file or folder of this machine"

  def __init__(self, name: str):
    super().__init__()
    self._name = name

  def parse(self, argument):
    return local_path(argument, f"--{self._name}")

  def flag_type(self):
    return "path"


class _ModeParser(flags.ArgumentParser):
  syntactic_help = "a mode's text form, such as dilated:16,window=32,sinks=4"

  def parse(self, argument):
    return parse_mode(argument)

  def flag_type(self):
    return "mode"


class _TokenizerParser(flags.ArgumentParser):
  syntactic_help = "bytes, a tokenizer.json, a sentencepiece .model, a folder with one of them, or hub:NAME"

  def parse(self, argument):
    try:
      return argument if isinstance(argument, Tokenizer) else load_tokenizer(argument)
    except (OSError, ImportError) as error:
      raise ValueError(str(error)) from error

  def flag_type(self):
    return "tokenizer"


def define_path(name: str, help_text: str, default: str | None = None, *, required: bool = False) -> None:
  """A flag that holds a path of this machine; a URL is refused before anything runs."""
  flags.DEFINE(_PathParser(name), name, default, help_text, serializer=flags.ArgumentSerializer(), required=required)


def define_modes(default: Sequence[str], help_text: str) -> None:
  """A flag --mode that can be repeated and holds modes; a bad one is refused before anything runs."""
  flags.DEFINE_multi(_ModeParser(), flags.ArgumentSerializer(), "mode", list(default), help_text)


def check_trained(modes: Sequence[Mode], documents_apart: bool = False) -> None:
  """Raises ValueError for a --mode that no sequence can be trained under: one has no prompt, and may be packed."""
  for mode in modes:
    for one in mode.modes if isinstance(mode, PerLayer) else (mode,):
      if one.after_prompt:
        raise ValueError(f"--mode={mode}: {one.after_prompt}, and what is trained on has no prompt; train under another"
                         " mode.")
      if documents_apart and one.chooses:
        raise ValueError(f"--documents_apart with --mode={mode}, whose choice would span documents; leave one of them"
                         " out.")


def define_prefill_mode() -> None:
  """A flag --prefill_mode that holds a mode."""
  flags.DEFINE(_ModeParser(), "prefill_mode", None, "The mode of the prompt, instead of the mode's own form.",
               serializer=flags.ArgumentSerializer())


def define_dtype(name: str = "dtype", help_text: str = "Type of matrix products and attention. Default: as the"
                 " checkpoint says.") -> None:
  """A flag that holds a type as `RATPlusConfig` has them, or None."""
  flags.DEFINE_enum(name, None, ["bfloat16", "float32"], help_text)


def define_resume() -> None:
  """A flag --resume, for `output.resumes`."""
  flags.DEFINE_enum("resume", "auto", ["auto", "never", "must"], "A checkpoint in --workdir: auto goes on from it where"
                    " there is one, must fails where there is none, never where there is one.")


def define_tokenizer() -> None:
  """A flag --tokenizer that holds a tokenizer, bytes by default."""
  flags.DEFINE(_TokenizerParser(), "tokenizer", BYTES, "Text to tokens. Where a released model is read that has a"
               " tokenizer, the default is that.", serializer=flags.ArgumentSerializer())


flags.disclaim_key_flags()  # a flag that is defined by these functions belongs to the module that called them


def run(main: Callable[[AnySettings], None], kind: type[AnySettings], define_flags: Callable[[], None]) -> None:
  """Runs a command on the flags of the command line; what a user can mend is one line (--verbosity=1: a traceback)."""
  define_flags()
  app.run(lambda argv: guarded(lambda: main(settings_of(kind)), argv), flags_parser=parsed)


def settings_of(kind: type[AnySettings]) -> AnySettings:
  """The settings that the flags say."""
  names = [field.name for field in dataclasses.fields(kind) if field.name != "given"]
  values: dict[str, Any] = {name: flags.FLAGS[name.rstrip("_")].value for name in names}
  values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
  return kind(**values, given=frozenset(name for name in names if flags.FLAGS[name.rstrip("_")].present))


def parsed(argv: Sequence[str]) -> list[str]:
  """What is left of the arguments when flags are taken out. Prints --help, and what is wrong with a flag, and ends."""
  if {"--help", "-help", "-h", "-?", "--helpshort"} & set(argv):
    print(help_of(argv[0]))
    sys.exit(0)
  try:
    left: list[str] = flags.FLAGS(argv)
  except flags.Error as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  return left


def help_of(script: str) -> str:
  """The command's own text, then its flags by the module that defines them, those of the command first."""
  of_module = flags.FLAGS.flags_by_module_dict()
  shared = sorted(name for name in of_module if name.startswith("experiments.") and name != script)
  lines = [sys.modules["__main__"].__doc__ or ""]
  for name in [script, *shared]:
    lines += ["Flags of this command:" if name == script else f"Flags of {name}:"]
    lines += [_help_of_flag(flag) for flag in sorted(of_module[name], key=lambda flag: flag.name)]
  return "\n".join([*lines, "--helpfull lists those of the libraries too."])


def _help_of_flag(flag: flags.Flag) -> str:
  default = flag.default if isinstance(flag.default, (list, tuple)) else [flag.default]
  said = ", ".join(map(str, default))
  about = (flag.help or "").partition(";\n")[0]  # the rest says that it can be repeated
  text = f"--{'[no]' * flag.boolean}{flag.name}: {about}{f' [{said}]' if said not in ('None', '') else ''}"
  return textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="      ")


def guarded(main: Callable[[], None], argv: Sequence[str]) -> None:
  """`main()`; a failure that a user can mend ends in words. `argv` is the script, and arguments that are no flags."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that cleans up, as half-written folders need
  if not logging.level_debug():
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file that it writes
  try:
    if len(argv) > 1:
      raise ValueError(f"unexpected argument {argv[1]!r}; every setting is a flag, {_as_flag(argv[1])}.")
    main()
  except (ValueError, OSError, FloatingPointError, ImportError) as error:
    _exit_with(error, str(error))
  except jax.errors.JaxRuntimeError as error:
    if not device.out_of_memory(error):
      raise
    _exit_with(error, f"the memory of {device.name()} did not suffice; {_less_memory()}."
                      f" {str(error).splitlines()[0]}")


def _exit_with(error: Exception, message: str) -> None:
  if logging.level_debug():
    raise error
  print(f"error: {message}", file=sys.stderr)
  sys.exit(1)


def _as_flag(argument: str) -> str:
  """How the argument would be written."""
  name = argument.lstrip("-").partition("=")[0]
  return f"so write --{argument.lstrip('-')}" if name in flags.FLAGS else "such as --seed=1 (--help lists them)"


# What takes less of a device's memory and changes least comes first.
_LESS_MEMORY = {"accumulation": "raise --accumulation", "batch_size": "lower --batch_size",
                "stages": "give fewer rows in --stages", "workers": "lower --workers", "length": "lower --length"}


def _less_memory() -> str:
  """What the command's flags can do about a device that is too small."""
  fixes = [fix for name, fix in _LESS_MEMORY.items() if name in flags.FLAGS]
  return ", or ".join(fixes) or "use a smaller model, or a larger device"
