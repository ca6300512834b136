"""What the scripts share: flags that all have, the corpus, and how a result is written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from rat_jax import RATPlusConfig, load_pretrained, parse_mode
from rat_jax.axes import Params
from rat_jax.convert.tensors import read_json as read_object
from rat_jax.data import BYTES, TokenFile, Tokenizer, load_tokenizer, prepare, prepare_standard_library
from rat_jax.data.token_file import Sidecar
from rat_jax.modes import Mode
from rat_jax.paths import local_path
from rat_jax.train import Checkpoints


class _PathParser(flags.ArgumentParser):
  syntactic_help = "a file or folder of this machine"

  def __init__(self, name: str):
    super().__init__()
    self._name = name

  def parse(self, argument):
    return str(local_path(argument, f"--{self._name}"))

  def flag_type(self):
    return "path"


def define_path(name: str, help_text: str, *, required: bool = False) -> flags.FlagHolder[Any]:
  """A flag that holds a path of this machine as text, None by default; a URL is refused before anything runs."""
  return flags.DEFINE(_PathParser(name), name, None, help_text, serializer=flags.ArgumentSerializer(),
                      required=required)


SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters, data order and sampling. A command that draws nothing takes"
                            " it too.", lower_bound=0)
WORKDIR = define_path("workdir", "Folder for everything that is written, but for a command's --output. Default:"
                      " runs/<script>.")
flags.disclaim_key_flags()  # what is defined by the functions below is its script's, and in that script's --help


class _ModeParser(flags.ArgumentParser):
  syntactic_help = "a mode's text form, such as dilated:16,window=32,sinks=4"

  def parse(self, argument):
    return parse_mode(argument)

  def flag_type(self):
    return "mode"


def define_modes(default: Sequence[str], help_text: str) -> flags.FlagHolder[list[Mode]]:
  """A flag --mode that can be repeated and holds modes; a bad one is refused before anything runs."""
  return flags.DEFINE_multi(_ModeParser(), flags.ArgumentSerializer(), "mode", list(default), help_text)


def define_prefill_mode() -> flags.FlagHolder[Mode | None]:
  """A flag --prefill_mode that holds a mode."""
  return flags.DEFINE(_ModeParser(), "prefill_mode", None, "The mode of the prompt, instead of the mode's own form.",
                      serializer=flags.ArgumentSerializer())


def define_dtype(name: str = "dtype", help_text: str = "Type of matrix products and attention. Default: as the"
                 " checkpoint says.") -> flags.FlagHolder[str | None]:
  """A flag that holds a type as `RATPlusConfig` has them, or None."""
  return flags.DEFINE_enum(name, None, ["bfloat16", "float32"], help_text)


class _TokenizerParser(flags.ArgumentParser):
  syntactic_help = "bytes, a tokenizer.json, a sentencepiece .model, a folder with one of them, or hub:NAME"

  def parse(self, argument):
    try:
      return argument if isinstance(argument, Tokenizer) else load_tokenizer(argument)
    except (OSError, ImportError) as error:
      raise ValueError(str(error)) from error

  def flag_type(self):
    return "tokenizer"


def define_tokenizer() -> flags.FlagHolder[Tokenizer]:
  """A flag --tokenizer that holds a tokenizer, bytes by default."""
  return flags.DEFINE(_TokenizerParser(), "tokenizer", BYTES, "Text to tokens.", serializer=flags.ArgumentSerializer())


def run(main: Callable[[], None]) -> None:
  """Runs a script's `main()`; what a user can mend is one line, not a traceback (--verbosity=1 shows both)."""
  app.run(lambda argv: guarded(main, argv))


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
    if not out_of_memory(error):
      raise
    _exit_with(error, f"the memory of {device()} did not suffice; {_less_memory()}. {str(error).splitlines()[0]}")


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
  """What the script's flags can do about a device that is too small."""
  fixes = [fix for name, fix in _LESS_MEMORY.items() if name in flags.FLAGS]
  return ", or ".join(fixes) or "use a smaller model, or a larger device"


def refuse(names: Sequence[str], why: str) -> None:
  """Raises ValueError for flags that were given and would change nothing."""
  given = [f"--{name}" for name in names if flags.FLAGS[name].present]
  if given:
    raise ValueError(f"{', '.join(given)}: {why}")


def workdir(script: str) -> pathlib.Path:
  """The script's folder, made if it is not there."""
  folder = pathlib.Path(WORKDIR.value or f"runs/{script}")
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def load_model(folder: str) -> tuple[RATPlusConfig, Params, dict[str, Any]]:
  """(config, parameters, notes) of a folder of checkpoints, or of one that `save_pretrained` wrote.

  The notes are those of the run that trained it: {} where `experiments.convert` wrote the folder from other weights.
  Raises ValueError and FileNotFoundError for a URL, for what is not there and for what is no model of ours.
  """
  path = local_path(folder, "--checkpoint")
  if not (path / "config.json").is_file():
    if any(path.glob("*.safetensors")):
      raise FileNotFoundError(f"{path} holds weights and no config.json; give the whole folder of save_pretrained.")
    return Checkpoints(path).load_params()
  theirs = read_object(path / "config.json", "a model's configuration is an object").get("model_type")
  if theirs is not None:
    raise ValueError(f"{path} is not in our form: its config.json has model_type={theirs!r}; convert it first:"
                     f" python -m experiments.convert --from=olmo2 --source={path} --output=NEW_FOLDER")
  return *load_pretrained(path), _kept_notes(path)


def _kept_notes(folder: pathlib.Path) -> dict[str, Any]:
  """What `experiments.convert` wrote of a run beside its weights, the same into every file."""
  from safetensors import safe_open

  with safe_open(min(folder.glob("*.safetensors")), "numpy") as file:
    kept = (file.metadata() or {}).get("trained", "")
  try:
    notes = json.loads(kept)
  except json.JSONDecodeError:  # what else somebody had the card say
    return {}
  return notes if isinstance(notes, dict) else {}


def check_tokenizer(tokenizer: Tokenizer, config: RATPlusConfig, notes: dict[str, Any]) -> None:
  """Raises ValueError where a model was trained with another tokenizer, or cannot have been trained with this one."""
  trained = notes.get("tokenizer")
  if trained is None:
    tokenizer.check(config)
  elif trained != tokenizer.name:
    raise ValueError(f"the model was trained with the tokenizer {trained}, and this is {tokenizer.name};"
                     " use its own, as --tokenizer or to prepare --data.")


def check_data(data: TokenFile, config: RATPlusConfig, notes: dict[str, Any]) -> None:
  """The same of the tokenizer that data were prepared with."""
  sidecar = data.sidecar
  check_tokenizer(dataclasses.replace(BYTES, name=sidecar.tokenizer, vocab_size=sidecar.vocab_size), config, notes)


def corpus(data: str | None, folder: pathlib.Path) -> dict[str, TokenFile]:
  """{"train", "heldout"} token files.

  `data` is a folder that `experiments.prepare_data` wrote, or a text file or folder, which is prepared in `folder`;
  None is the text of the Python standard library. Raises ValueError for a URL.
  """
  if data is None:
    return prepare_standard_library(folder)
  path = local_path(data, "--data")
  if (path / "train.bin").exists():
    return {name: TokenFile(path / f"{name}.bin") for name in ("train", "heldout")}
  return prepare(path, folder)


def bits_per_byte(nats: float, sidecar: Sidecar) -> float | None:
  """The loss of a byte in bits, of that of a token in nats; None where a file's sidecar does not know the text's bytes.

  A token is so many bytes as one of the whole file is on average, tokens that end a document included.
  """
  size = sidecar.bytes
  if size is None and sidecar.tokenizer == BYTES.name:
    size = sidecar.tokens - sidecar.documents  # a token that ends a document is no byte of it
  return nats / math.log(2) * sidecar.tokens / size if size else None


def device() -> str:
  """The processor or card that the figures come from."""
  first = jax.devices()[0]
  return first.device_kind if first.platform != "cpu" else "CPU"


def out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether it says that the device's memory did not suffice."""
  return "RESOURCE_EXHAUSTED" in str(error)


def write_json(path: pathlib.Path, result: Any, indent: int | None = 2) -> None:
  """Writes it whole or not at all."""
  beside = path.with_name(path.name + ".new")
  beside.write_text(json.dumps(result, indent=indent) + "\n", encoding="utf-8")
  os.replace(beside, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object that `write_json` wrote; {} where there is nothing yet. Raises ValueError that names any other file."""
  return read_object(path, "move it away to start anew") if path.exists() else {}


_DATA_PATHS = ("source", "lm_data")  # in notes: where the data of "data_sha256" lie


def check_same_run(folder: pathlib.Path, saved: dict[str, Any], notes: dict[str, Any]) -> None:
  """Raises ValueError where a checkpoint's notes differ from what this run would write of itself.

  Data are known by their "data_sha256", wherever they lie; by their path where one of the two has no digest.
  """
  known = bool(saved.get("data_sha256") and notes.get("data_sha256"))
  for name, value in notes.items():
    if name in (_DATA_PATHS if known else ("data_sha256",)):
      continue
    if saved.get(name) != value:
      raise ValueError(f"the checkpoint in {folder} is of a run with {name}={saved.get(name)!r}, this one has"
                       f" {value!r}; use another --workdir, or the setting of that run.")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
  """A Markdown table whose columns line up in plain text too."""
  widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
  align = [str.ljust] + [str.rjust] * (len(header) - 1)
  lines = [[a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)] for row in [header, *rows]]
  rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in [lines[0], rule, *lines[1:]])
