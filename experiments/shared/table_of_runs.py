"""Every run behind the tables: what it shows, its commands, what it takes. `python -m experiments.runs` runs them.

A command is what stands after `python -m`. Those of one run are run in their order; a command that was stopped goes on
from its own checkpoints or finished cells.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Run:
  """One entry.

  Attributes:
    claim: what its numbers show.
    commands: what stands after `python -m`; {reference} is a checkout of the RAT+ authors' code (--reference).
    seconds: what it took, measured from an empty folder on `device`; None: not measured as a whole.
    cells_of: the folder of a table whose finished cells the run's own table begins with, and that of its own.
  """

  name: str
  claim: str
  commands: tuple[str, ...]
  seconds: int | None = None
  device: str = "NVIDIA H200"
  cells_of: tuple[str, str] | None = None


_NIAH, _TABLES, _GPU = "runs/niah", "runs/tables", "runs/gpu"


def _pair(root: str) -> str:
  return f"--checkpoint={root}/ratplus --checkpoint={root}/attention"


_PAIR = _pair(_NIAH)
_SHORT = "--seeds=3 --warmup=100 --save_every=500"
_SPARE = "--seeds=5 --stragglers=2"  # three of five: without a memory some seeds never learn to match a key
_EXTRA = "--skip=first --skip=random --skip=oracle"


def _train(arm: str, folder: str, options: str = "", root: str = _NIAH) -> str:
  return f"experiments.sft_niah --arm={arm} --workdir={root}/{folder} {options}".strip()


def _table(name: str, options: str, rows: tuple[str, ...] = ()) -> str:
  only = "".join(f' "--only={row}"' for row in rows)
  return f"experiments.eval_niah --workdir={_TABLES}/{name} {options}{only}"


def _main(seeds: int, root: str, table: str) -> tuple[str, ...]:
  """Both arms, some of attention's seeds to spare, and the table."""
  return (_train("ratplus", "ratplus", f"--seeds={seeds}", root),
          _train("attention", "attention", f"--seeds={2 * seeds + 2} --stragglers={seeds + 2}", root),
          _table(table, _pair(root)))


def _begun_with_main(name: str) -> tuple[str, str]:
  return f"{_TABLES}/main", f"{_TABLES}/{name}"


def adapted_name(arm: str, mode: str) -> str:
  """What an arm is called that was trained on under a mode."""
  return f"{arm}-{mode.translate(str.maketrans(':,=', '___'))}"


_ADAPTED = tuple((arm, mode, adapted_name(arm, mode)) for arm in ("ratplus", "attention")
                 for mode in ("dilated:16,window=32", "dilated:16", "dilated:8", "dilated:32"))
_OF_TEXT = ("text", "text-attention", "text-memory", "text-memory-dense")
_TEXT = "--lm_data=runs/data --lm_rows=16"
_FROM_TEXT = f"--init={_NIAH}/text --stages=1024x32 {_SHORT} {_TEXT}"
_LONG = " ".join([f"--checkpoint={_NIAH}/ratplus-4096 --checkpoint={_NIAH}/attention-4096",
                  "--table=paper --count=128 --length=4096 --batch_size=8"])
SHARES = ("1/4", "1/8", "1/16", "1/32")  # of the keys, in the tables of needles

NEEDLES = (
    Run("needles", "Sparse methods lose far less on a backbone with the memory than on one without.",
        _main(5, _NIAH, "main")),
    Run("needles-three", "The same with three seeds, in less than half an hour.",
        _main(3, "runs/niah-three", "three"), 1516),
    Run("controls", "It takes both, the memory and its sparse updates.",
        (_train("sparse_branch", "sparse_branch", _SPARE), _train("ratplus_dense", "ratplus_dense"),
         _train("ratplus_mixed", "ratplus_mixed"),
         _table("controls", f"{_EXTRA} {_PAIR} --checkpoint={_NIAH}/sparse_branch --checkpoint={_NIAH}/ratplus_dense"
                            f" --checkpoint={_NIAH}/ratplus_mixed")), cells_of=_begun_with_main("controls")),
    Run("answer", "Prompts that end at the answer, as in the paper, for every mode.",
        (_table("answer", f"{_PAIR} --prompt_end=answer"),), cells_of=_begun_with_main("answer")),
    Run("adapted", "A thousand updates under one dilated mode.",
        (*(_train(arm, name, f"--init={_NIAH}/{arm} --mode={mode} --stages=1024x32 --steps=1000 {_SHORT}")
           for arm, mode, name in _ADAPTED),
         _table("adapted", " ".join([_PAIR, *(f"--checkpoint={_NIAH}/{name}" for *_, name in _ADAPTED), "--nomatch"]),
                ("dense", "dilated:8 e", "dilated:16 e", "dilated:32 e", "dilated:16,w")))),
    Run("long", "The paper's length and budgets, T=4096, from the parameters of T=1024.",
        (_train("ratplus", "ratplus-4096", f"--init={_NIAH}/ratplus --stages=4096x32 --steps=2000 {_SHORT}"),
         _train("attention", "attention-4096", f"--init={_NIAH}/attention --stages=4096x32 --steps=4000 {_SHORT}"),
         _table("long", _LONG), _table("long-answer", f"{_LONG} --prompt_end=answer", ("dense", "Quest")))),
    Run("hypotheses", "Why: queries choose better, and what is kept carries more.",
        (f"experiments.hypotheses {_PAIR} --workdir=runs/hypotheses",)),
    Run("spaced", "With at most half a needle in a window of 16, then of 32, dilation alone finds them.",
        tuple(_table(f"spaced-{spacing}", f"{_PAIR} --spacing={spacing}",
                     ("dense", "dilated:8 e", "dilated:16 e", "dilated:32 e")) for spacing in (32, 64))),
    Run("near", "Keys a symbol away from the asked one are not mistaken for it.",
        (_table("near", f"{_PAIR} --near_miss=0.5",
                ("dense", "Quest 16, 1/8", "Quest 16, 1/16", "MoBA 16 decode, 1/16", "SnapKV aware, 1/16")),)),
    Run("topk", "The best single keys, which bound what blocks can reach.",
        (_table("topk", f"{_PAIR} {_EXTRA}",
                ("dense", *(f"{name}, {share}" for share in SHARES for name in ("TopK", "Quest 16")))),)),
    Run("retrofit", "A memory that is added to a trained attention model helps it within a quarter of its updates.",
        ("experiments.prepare_data --workdir=runs/data", _train("attention", "text", f"{_TEXT} {_SPARE}"),
         _train("attention", "text-attention", f"{_FROM_TEXT} --steps=4000"),
         _train("ratplus", "text-memory", f"{_FROM_TEXT} --steps=2000 --memory_rate=10"),
         _train("ratplus", "text-memory-dense", f"{_FROM_TEXT} --steps=4000 --memory_rate=10 --mode=dense"),
         _table("retrofit", " ".join(f"--checkpoint={_NIAH}/{arm}" for arm in _OF_TEXT),
                ("dense", *(f"{mode}, {share}" for mode in (
                    "Quest 16", "MoBA 16 decode", "MoBA 16 prompt", "SnapKV aware") for share in ("1/8", "1/16")))),
         *(f"experiments.eval_lm --checkpoint={_NIAH}/{arm}/seed-{seed} --data=runs/data --mode=dense"
           f" --workdir={_TABLES}/retrofit-lm/{arm}-{seed}" for arm in _OF_TEXT for seed in range(3)))),
)


def _ops(name: str, options: str = "") -> str:
  return f"experiments.bench_ops --workdir={_GPU}/{name} {options}".strip()


def _model(name: str, options: str) -> str:
  return f"experiments.bench_model --workdir={_GPU}/{name} --dtype=bfloat16 {options}"


_LARGE = "--preset=ratplus-1b --mode=dilated:64"
_AUTHORS = '"--torch_reference={reference}"'
_MODES = " ".join(f"--mode={mode}" for mode in (
    "dense", "dilated:16", "dilated:64", "quest:0.0625", "quest:0.0625,block=16", "moba:0.0625",
    "dilated_topk:64,0.0625", "snapkv:0.0625"))
_FOUR = "--layers=4 --width=2048 --heads=16 --batch_size=64"

SPEED = (
    Run("gpu-tests", "Every kernel gives what float64 gives.",
        ("pytest tests/kernels/test_suite.py tests/kernels/test_gpu.py",)),
    Run("ops", "Memory, dilated prefill and decoding against their floors and against dense attention.",
        (_ops("ops"),)),
    Run("gradients", "The same with gradients.", (_ops("gradients", "--gradient"),)),
    Run("authors-ops", "Scan and prefill are faster than the RAT+ authors' code; at D=16 a decode step is slower.",
        (_ops("ops", _AUTHORS), _ops("gradients", f"--gradient {_AUTHORS}"))),
    Run("crossovers", "From which length on an implementation is the fastest, of values and of gradients.",
        (_ops("crossovers", "--crossovers"), _ops("crossovers", "--crossovers --gradient"))),
    Run("lengths", "The time of a prompt grows with its length over D.",
        (_ops("lengths", '--op=prefill "--implementation=mosaic_gpu, cudnn" --implementation=mosaic_gpu --rounds=3'
                         " --dilation=16 --dilation=64 --length=4096 --length=16384 --length=65536 --length=131072"
                         " --length=262144 --length=524288"),)),
    Run("short", "Where rows are short, dense attention is faster.",
        (_ops("short", "--op=prefill --dilation=16 --dilation=64 --batch_size=32 --length=128 --length=512"
                       ' --length=2048 --implementation=xla "--implementation=mosaic_gpu, cudnn_masked"'
                       ' "--implementation=mosaic_gpu, cudnn" --implementation=mosaic_gpu'),)),
    Run("decode", "Tokens per second of 1.4 billion parameters against batch and context.",
        (_model("decode", f"{_LARGE} --context=16384 --batch_size=1 --batch_size=32 --batch_size=256"
                          " --batch_size=1024"),
         _model("decode-context", f"{_LARGE} --context=4096 --context=16384 --context=65536 --batch_size=16"))),
    Run("prompt", "The prompt of 1.4 billion parameters.",
        (_model("prompt", "--preset=ratplus-1b --part=prefill --mode=dilated:16 --mode=dilated:64 --batch_size=4"
                          " --context=4096 --context=16384 --context=65536"),)),
    Run("modes", "A decode step of every mode, plain heads and grouped ones.",
        (_model("modes", f"{_FOUR} {_MODES}"), _model("modes-grouped", f"{_FOUR} {_MODES} --kv_heads=2"))),
    Run("train", "A step of active recurrence learning with 1.4 billion parameters, and two dense updates.",
        (_model("train", f"{_LARGE} --part=train --context=4096 --batch_size=8 --rounds=3 --unroll"),)),
    Run("pretrain", "Some hundred steps of it on real text.",
        (f"experiments.prepare_data --workdir={_GPU}/data",
         f"experiments.pretrain --preset=ratplus-1b --dtype=bfloat16 --data={_GPU}/data --length=4096 --batch_size=8"
         f" --steps=200 --learning_rate=3e-4 --unroll --save_every=0 --log_every=10 --workdir={_GPU}/pretrain")),
    Run("seven", "Models of seven billion parameters, written and loaded as files, under four modes.",
        tuple(_model(preset, f"--preset={preset} --through_files --part=prefill --part=decode --mode=dense"
                             " --mode=dilated:64 --mode=quest:0.0625,block=64 --mode=snapkv:0.0625")
              for preset in ("olmo2-7b", "ratplus-7b"))),
    Run("authors", "The model of 1.4 billion parameters beside the authors' own.",
        (_model("authors-decode", f"{_LARGE} {_AUTHORS} --context=16384 --batch_size=32 --batch_size=1024"),
         _model("authors-train", f"{_LARGE} {_AUTHORS} --part=train --context=4096 --batch_size=8 --rounds=3"
                                 " --unroll"))),
)

WITHOUT_DEVICES = (
    Run("scaling", "Training of 7 billion parameters with the paper's batch fits 256 chips, of 16 GiB too.",
        ("experiments.aot_compile --table --workdir=runs/scaling",)),
    Run("roofline", "What the kernels for TPUs should take, counted from their programs.",
        ("experiments.roofline --workdir=runs/roofline",
         "experiments.aot_compile --kernels --workdir=runs/tpu_memory")),
)

RUNS = {run.name: run for run in (*NEEDLES, *SPEED, *WITHOUT_DEVICES)}
