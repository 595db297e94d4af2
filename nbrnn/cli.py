"""The command line.

    nbrnn train [TEXT...]        train a language model; without TEXT, on the Python language reference
    nbrnn generate MODEL         let a model write
    nbrnn evaluate MODEL TEXT    perplexity and bits per character of a text
    nbrnn bench                  the speed of this machine, against other engines where there are any
    nbrnn info                   versions, vector instructions, threads, the cache of compiled code
    nbrnn cells                  the recurrent cells: gates, states, parameters, source
    nbrnn warmup [CELL...]       compile now, so that later runs start at once

Exit codes: 0 done, 1 the training failed (a loss that is not finite, no memory), 2 wrong arguments, files or data,
130 interrupted with Ctrl-C. With 1 and 2 one line on stderr says what is wrong.
Nothing heavy is imported before a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from nbrnn.layers.module import Module
    from nbrnn.text.language_model import LanguageModel, Score
    from nbrnn.text.run import Run
    from nbrnn.training.optimizers import Optimizer

FAILED, USAGE, INTERRUPTED = 1, 2, 130
WIDTH = 80
TEMPERATURE = 0.6
DEFAULT_OUT = "model.safetensors"
# What `nbrnn train` does when it is told nothing: about two minutes on two cores.
DEFAULTS = {
    "cell": "lstm",
    "hidden": 256,
    "layers": 1,
    "embedding": 0,
    "dropout": 0.4,
    "dtype": "float32",
    "level": "char",
    "validation": 0.1,
    "steps": 64,
    "batch": 32,
    "epochs": 16,
    "optimizer": "adam",
    "lr": None,
    "schedule": "cosine",
    "clip": 1.0,
    "seed": 0,
}


# The names of `nbrnn.text.language_model.CELLS`, which is not imported only to read the command line
CELLS = (
    "lstm",
    "gru",
    "rnn",
    "peephole",
    "coupled",
    "layernorm",
    "jordan",
    "ctrnn",
    "indrnn",
    "mingru",
    "ligru",
    "sru",
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviations: they break when an option is added."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after ``nbrnn``; by default those of the process.
    """
    options = _parser().parse_args(arguments)
    # A screen that lacks a character of the text is no reason to stop.
    sys.stdout.reconfigure(errors="replace")
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has seen enough (``| head``); Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ArithmeticError, MemoryError) as error:
        return _complain(options.command, str(error), FAILED)
    except OSError as error:
        return _complain(
            options.command, f"{error.filename}: {error.strerror}" if error.filename else str(error), USAGE
        )
    except ValueError as error:
        return _complain(options.command, str(error), USAGE)


def _complain(command: str, message: str, code: int) -> int:
    print(f"nbrnn {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


# ------------------------------------------------------------------ arguments


def _number(kind: type, least: float, below: float = float("inf"), above: bool = False) -> Callable[[str], Any]:
    """An argument type: a number from `least` on, or above it, and below `below`."""
    words = f"{'above' if above else 'at least'} {least:g}" + (f", below {below:g}" if below < float("inf") else "")

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (value > least or (value == least and not above)) or not value < below:
            sort = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {sort} {words}, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nbrnn", description="Recurrent networks on CPUs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    bench = commands.add_parser("bench", help="the speed of this machine, against other engines where there are any")
    bench.add_argument("--threads", type=_number(int, 1), metavar="N", help="threads (default: all)")
    bench.set_defaults(run=_bench)
    info = commands.add_parser("info", help="versions, vector instructions, threads, cache")
    info.set_defaults(run=_info)
    cells = commands.add_parser("cells", help="the recurrent cells: gates, states, parameters, source")
    cells.add_argument("--markdown", action="store_true", help="as a Markdown table, with the sources")
    cells.set_defaults(run=_cells)
    warmup = commands.add_parser("warmup", help="compile now, so that later runs start at once")
    warmup.add_argument("cells", nargs="*", metavar="CELL", help="of `nbrnn cells` (default: the usual ones)")
    warmup.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="(default: float32)")
    warmup.set_defaults(run=_warmup)
    return parser


def _add_train(commands: Any) -> None:
    # Options that are not given are not there, so that a resumed training can refuse those that are.
    train = commands.add_parser(
        "train",
        help="train a language model",
        description="Train a language model on text files, or on the Python language reference if there are none. "
        "Ctrl-C saves and ends; --resume goes on from there, and from the last complete epoch after a power failure.",
        argument_default=argparse.SUPPRESS,
    )

    def add(group: Any, flag: str, words: str, **options: Any) -> None:
        if DEFAULTS.get(flag) is not None:
            words += f" (default: {DEFAULTS[flag]})"
        group.add_argument(f"--{flag}", help=words, **options)

    positive, above_zero, share = _number(int, 1), _number(float, 0, above=True), _number(float, 0, below=1)
    train.add_argument("texts", nargs="*", metavar="TEXT", default=[], help="text files in UTF-8")
    group = train.add_argument_group("network")
    add(group, "cell", f"recurrent cell: {', '.join(CELLS)}", choices=CELLS, metavar="NAME")
    add(group, "hidden", "hidden units of a layer", type=positive, metavar="N")
    add(group, "layers", "recurrent layers", type=positive, metavar="N")
    add(group, "embedding", "size of an embedding before them, 0 for none", type=_number(int, 0), metavar="N")
    add(group, "dropout", "share of values dropped in training", type=share, metavar="P")
    add(group, "dtype", "precision", choices=["float32", "float64"])
    group = train.add_argument_group("training")
    add(group, "level", "tokens are characters or words", choices=["char", "word"])
    add(group, "validation", "share of the text, its end, that is held out", type=share, metavar="P")
    add(group, "steps", "time steps of a batch", type=positive, metavar="T")
    add(group, "batch", "rows of a batch", type=positive, metavar="B")
    add(group, "epochs", "how often to read the text", type=positive, metavar="N")
    add(group, "optimizer", "optimizer", choices=["adam", "adamw", "rmsprop", "adagrad", "sgd"])
    add(group, "lr", "learning rate", type=above_zero, metavar="X")
    add(group, "schedule", "course of the learning rate", choices=["cosine", "constant"])
    add(group, "clip", "largest norm of the gradients, 0 for no limit", type=_number(float, 0), metavar="X")
    add(group, "seed", "where all randomness comes from", type=_number(int, 0), metavar="N")
    add(group, "threads", "threads to use (default: all cores)", type=positive, metavar="N")
    group = train.add_argument_group("files")
    add(group, "out", f"where to save the model (default: {DEFAULT_OUT})", metavar="PATH")
    add(group, "resume", "go on with a training that was interrupted, as it was", metavar="MODEL")
    train.set_defaults(run=_train)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="let a model write")
    generate.add_argument("model", metavar="MODEL", help="a file that nbrnn train has saved")
    generate.add_argument("--prompt", default="", help="what the text begins with (default: a new line)")
    generate.add_argument(
        "--length", type=_number(int, 1), default=500, metavar="N", help="tokens to add (default: 500)"
    )
    generate.add_argument(
        "--temperature",
        type=_number(float, 0, above=True),
        default=TEMPERATURE,
        metavar="X",
        help=f"below 1 more predictable, above 1 more varied (default: {TEMPERATURE})",
    )
    generate.add_argument("--top-k", type=_number(int, 1), metavar="N", help="draw from the N most likely tokens only")
    generate.add_argument(
        "--top-p",
        type=_number(float, 0, above=True),
        metavar="P",
        help="draw from the most likely tokens that together have the probability P",
    )
    generate.add_argument("--seed", type=_number(int, 0), metavar="N", help="the same text every time")
    generate.add_argument("--greedy", action="store_true", help="always take the most likely token")
    generate.set_defaults(run=_generate)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="perplexity and bits per character of a text")
    evaluate.add_argument("model", metavar="MODEL", help="a file that nbrnn train has saved")
    evaluate.add_argument("texts", nargs="+", metavar="TEXT", help="text files in UTF-8")
    evaluate.set_defaults(run=_evaluate)


# ------------------------------------------------------------------ commands


def _train(options: argparse.Namespace) -> int:
    import nbrnn
    from nbrnn.text.run import Run
    from nbrnn.training.callbacks import ProgressBar

    given = vars(options)
    if "threads" in given:
        nbrnn.set_num_threads(options.threads)
    out = _checked_out(given.get("out", given.get("resume", DEFAULT_OUT)), options.texts)
    if "resume" in given:
        fixed = [f"--{name}" for name in DEFAULTS if name in given]
        if fixed:
            raise ValueError(f"{', '.join(fixed)}: a resumed training keeps its settings")
        run = Run.resume(options.resume, options.texts)
    else:
        run = Run.new({name: given.get(name, default) for name, default in DEFAULTS.items()}, options.texts)
    _introduce(run)
    history = run.fit(out, [ProgressBar()])
    done, epochs = run.trainer.epoch, run.settings["epochs"]
    if history.interrupted and done < epochs:
        print(f"Interrupted in epoch {done + 1} of {epochs}, and saved as it is. Go on with")
        print(f"  nbrnn train --resume {shlex.quote(out)}")
        return INTERRUPTED
    _conclude(run, out)
    return 0


def _checked_out(out: str, texts: Sequence[str]) -> str:
    """`out`, if a file can be written there: better to know before a long training than after it."""
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"--out: expected a file, got the folder {out}")
    if any(path.exists() and Path(text).exists() and path.samefile(text) for text in texts):
        raise ValueError(f"--out: expected a file of its own, got the text {out}")
    try:
        tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise ValueError(f"--out: cannot write to {out} ({error.strerror})") from None
    return out


def _introduce(run: Run) -> None:
    """Say what is going to be trained on what."""
    from nbrnn.kernels.jit import get_num_threads

    model, corpus, settings = run.model, run.corpus, run.settings
    layers = f"{settings['layers']} layers" if settings["layers"] > 1 else "1 layer"
    rows = {
        "text": f"{corpus.name}, {len(corpus.text) + len(corpus.held_out):,} characters",
        "held out": f"the last {len(corpus.held_out):,} characters",
        "vocabulary": f"{len(model.vocabulary):,} {_token(model)}s",
        "network": f"{settings['cell'].upper()}, {layers} of {settings['hidden']} units, "
        f"{model.network.params.flat.size:,} parameters",
        "computing": f"{settings['dtype']} on {get_num_threads()} thread(s)",
    }
    for name, value in rows.items():
        print(f"{name:<12}{value}")
    if run.trainer.steps:
        print(f"resuming in epoch {run.trainer.epoch + 1} of {settings['epochs']}, after {run.trainer.steps:,} steps")
    print(flush=True)


def _conclude(run: Run, out: str) -> None:
    """Compare the model with the baselines, let it write, and say what to do next."""
    from nbrnn.text import Trigram, Unigram

    model, corpus = run.model, run.corpus
    if corpus.held_out:
        score, size = model.score(corpus.held_out), len(model.vocabulary)
        text, held_out = model.vocabulary.encode(corpus.text), model.vocabulary.encode(corpus.held_out)
        token = _token(model)
        rows = {
            f"{token} frequencies": Unigram(text, size).perplexity(held_out),
            f"{token} trigrams": Trigram(text, size).perplexity(held_out),
            f"this {run.settings['cell'].upper()}": score.perplexity,
        }
        print(f"\n{'on the text held out':<24}{'perplexity':>12}{'bits per character':>22}")
        for name, perplexity in rows.items():
            bits = math.log2(perplexity) * score.tokens / score.characters
            print(f"{name:<24}{perplexity:>12.2f}{bits:>22.3f}")
        _note_unknown(model, score)
    sample = model.generate("", 400 if model.vocabulary.level == "char" else 100, temperature=TEMPERATURE, seed=0)
    print(f"\n{' a sample ':-^{WIDTH}}\n{_wrapped(sample.strip())}\n{'-' * WIDTH}\n")
    print(f"saved to {out} ({Path(out).stat().st_size / 1e6:.1f} MB); more text:")
    print(f"  nbrnn generate {shlex.quote(out)} --prompt {shlex.quote(corpus.text.split()[0] + ' ')}")


def _note_unknown(model: LanguageModel, score: Score) -> None:
    if score.unknown:
        token = _token(model)
        print(f"({score.unknown / score.tokens:.1%} of the {token}s are unknown; they all count as one {token})")


def _wrapped(text: str) -> str:
    """The text with its lines broken where they are wider than the screen."""
    options = {"replace_whitespace": False, "drop_whitespace": False}
    return "\n".join("\n".join(textwrap.wrap(line, WIDTH, **options)) for line in text.split("\n"))


def _token(model: LanguageModel) -> str:
    return "character" if model.vocabulary.level == "char" else "word"


def _generate(options: argparse.Namespace) -> int:
    from nbrnn.text import LanguageModel

    model = LanguageModel.load(options.model)
    text = model.generate(
        options.prompt,
        options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        greedy=options.greedy,
        seed=options.seed,
    )
    print(options.prompt + text)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from nbrnn.text import LanguageModel, read_texts

    model = LanguageModel.load(options.model)
    text = read_texts(options.texts)
    score = model.score(text)
    print(f"{'text':<22}{len(text):,} characters")
    print(f"{'perplexity':<22}{score.perplexity:.3f} per {_token(model)}")
    print(f"{'bits per character':<22}{score.bits_per_character:.3f}")
    _note_unknown(model, score)
    return 0


def _info(options: argparse.Namespace) -> int:
    import platform

    import llvmlite
    import numba
    import numpy
    import scipy
    from numba.core.dispatcher import Dispatcher

    import nbrnn.text
    from nbrnn.kernels import jit, schedule, simd

    # Numba keeps a function's code in a folder that belongs to the file of its source.
    modules = [module for name, module in sys.modules.items() if name.startswith("nbrnn.")]
    entries = [getattr(value, "entry", value) for module in modules for value in vars(module).values()]
    kept = os.path.commonpath({entry.stats.cache_path for entry in entries if isinstance(entry, Dispatcher)})
    files = [file.stat().st_size for file in Path(kept).rglob("*.nb[ci]")]
    rows = {
        "nbrnn": nbrnn.__version__,
        "Python": platform.python_version(),
        "NumPy": numpy.__version__,
        "SciPy": scipy.__version__,
        "Numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "vectors": f"{simd.instruction_set()}, {simd.VECTOR_BYTES} bytes",
        "second cache": f"{schedule.second_cache() / 2**20:g} MB",
        "threads": f"{jit.get_num_threads()} ({jit.threading_layer()})",
        "compiled code": f"{sum(files) / 1e6:.1f} MB in {len(files)} files",
        "kept in": kept,
    }
    for name, value in rows.items():
        print(f"{name:<15}{value}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from contextlib import ExitStack

    from nbrnn import __version__, get_num_threads
    from nbrnn.bench.processes import Engine, installed
    from nbrnn.bench.report import report

    threads = options.threads or get_num_threads()
    if threads > get_num_threads():
        raise ValueError(f"--threads: expected 1 to {get_num_threads()}, got {threads}")
    print(f"nbrnn {__version__}; this takes less than a minute, or one more where nothing is compiled yet", flush=True)
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(name)) for name in ("nbrnn", *installed())]
        for line in report(engines, threads):
            print(line, flush=True)
    return 0


def _cells(options: argparse.Namespace) -> int:
    import nbrnn  # noqa: F401  (registers its cells)
    from nbrnn.cells.cell import CELLS, parameters, source

    names = sorted(CELLS)
    if options.markdown:
        print("| cell | gates | states | parameters | equations and source |\n| --- | --- | --- | --- | --- |")
        for cell in map(CELLS.get, names):
            gates, states = ", ".join(cell.gates), ", ".join(cell.states)
            print(f"| `{cell.name}` | {gates} | {states} | {parameters(cell)} | {' '.join(source(cell))} |")
        return 0
    for cell in map(CELLS.get, names):
        print(f"{cell.name:<23}{', '.join(cell.gates):<12}{', '.join(cell.states):<6}{parameters(cell)}")
        print(textwrap.indent(textwrap.fill(source(cell)[0], WIDTH - 4), "    "))
    return 0


def _warmup(options: argparse.Namespace) -> int:
    import nbrnn
    from nbrnn.cells.cell import CELLS
    from nbrnn.training.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop

    dtype = {"dtype": options.dtype}
    others = [SGD(0.1, 0.9), SGD(0.1, 0.9, nesterov=True), Adam(), AdamW(), RMSprop(), Adagrad()]
    began = time.perf_counter()
    for name in options.cells or ("lstm", "gru", "elman_tanh", "elman_relu"):
        if name not in CELLS:
            raise ValueError(f"CELL: expected one of {', '.join(sorted(CELLS))}, got {name!r}")
        cell = CELLS[name]
        # Two layers, because the first takes tokens and the second numbers.
        layer = nbrnn.Recurrent(cell, 2, 4, 2, given=dict.fromkeys(cell.given, 1.0), **dtype)
        _warm(cell.name, nbrnn.Sequential(layer, nbrnn.Linear(4, 2, **dtype)), [SGD(0.1)])
    linear, embedding = nbrnn.Linear(4, 2, **dtype), nbrnn.Embedding(2, 4, **dtype)
    dropouts = [nbrnn.Dropout(0.5, **dtype) for _ in range(2)]
    network = nbrnn.Sequential(embedding, dropouts[0], nbrnn.LSTM(4, 4, **dtype), dropouts[1], linear)
    _warm("other layers", network, [SGD(0.1)])
    _warm("optimizers", network, others)
    print(f"{'done':<20}{time.perf_counter() - began:6.1f} s")
    return 0


def _warm(name: str, network: Module, optimizers: Sequence[Optimizer]) -> None:
    """Let a network of 2 tokens train and score, and say how long it took."""
    import numpy as np

    from nbrnn.training.losses import CrossEntropy
    from nbrnn.training.trainer import Trainer

    start = time.perf_counter()
    print(f"{name:<20}", end="", flush=True)
    tokens = np.zeros((3, 2), np.int32)
    # The second call finds a state, and weights that it has seen before.
    _, state = network(tokens)
    network(tokens, state)
    for optimizer in optimizers:
        trainer = Trainer(network, CrossEntropy(), optimizer, clip_norm=1.0)
        _, state = trainer.step(tokens, tokens)
        trainer.step(tokens, tokens, state)
    print(f"{time.perf_counter() - start:6.1f} s", flush=True)
