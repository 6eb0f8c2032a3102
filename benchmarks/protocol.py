"""Processes of sides, and measurements in turn: a b c, c b a, a b c, ... with one computing at a time."""

import contextlib
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

from benchmarks.environments import PEERS, environment_for
from benchmarks.machine import matrix_ways
from benchmarks.results import Result
from benchmarks.sides import Way

ROOT = pathlib.Path(__file__).resolve().parent.parent
# TensorFlow as it runs by default on processors with AVX-512, and faster on others: for all that use it.
ONEDNN = {"TF_ENABLE_ONEDNN_OPTS": "1"}


class SideError(RuntimeError):
    """A side could not do what it was asked."""


class Process:
    """A side's program, running in its own environment.

    Args:
        way: What runs.
        python: Python of the environment.
        log: File for what the program and its libraries print.
        variables: Further environment variables.
        timeout: Seconds that one answer may take; compilers are slow.
    """

    def __init__(
        self,
        way: Way,
        python: pathlib.Path,
        log: pathlib.Path,
        variables: Mapping[str, str] | None = None,
        timeout: float = 1200.0,
    ):
        self.way, self.timeout, self.log = way, timeout, log
        self.versions: dict = {}
        environment = {**ONEDNN, **os.environ, "PYTHONPATH": str(ROOT), **(variables or {}), **way.variables}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [str(python), "-m", way.program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
                cwd=ROOT,
            )
        self._answers: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, command: str, **request) -> dict:
        """Sends a request and waits for the answer.

        Raises:
            SideError: If the side says that it cannot, or died, or takes longer than `timeout`.
        """
        try:
            self._process.stdin.write(json.dumps({"command": command, **request}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self.timeout)
        except queue.Empty:
            self.close(kill=True)
            raise SideError(f"no answer to {command!r} within {self.timeout:.0f} s") from None
        except OSError:
            line = None
        if line is None:
            raise SideError(
                f"its process ended at {command!r} with status {self._process.wait()}: {self._last_words()}"
            )
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise SideError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def close(self, kill: bool = False) -> None:
        """Ends the process."""
        if self._process.poll() is None and not kill:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._process.stdin.write('{"command": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(timeout=10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Sides:
    """The processes of a suite: starts them, keeps what failed, ends them all.

    Args:
        options: Of the run: `environments`, `device`, and `authors` where the authors' program is at hand.
    """

    def __init__(self, options):
        self.options = options
        self.failures: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="nfnet-benchmarks-")
        self.folder = pathlib.Path(self._folder.name)
        self._pythons: dict[str, pathlib.Path | RuntimeError] = {}
        self._running: list[Process] = []

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *error) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self, processes: Sequence[Process] | None = None) -> None:
        """Ends these processes, or all."""
        for process in list(self._running if processes is None else processes):
            process.close()
            if process in self._running:
                self._running.remove(process)

    def fail(self, name: str, reason: object) -> None:
        """Keeps the first reason why a side is not in the table, and says it."""
        if name not in self.failures:
            self.failures[name] = str(reason)
            print(f"not run: {name}: {reason}", file=sys.stderr, flush=True)

    def remarks(self) -> list[Result]:
        """What the reader of the table has to know: who did not run and why, versions, notes on environments."""
        found = [Result("not run", name, "", [], note=reason) for name, reason in self.failures.items()]
        if not getattr(self.options, "authors", None):
            found.append(Result("note", "the authors' program was not run: --authors names no checkout of it", "", []))
        for environment, versions in self.versions.items():
            text = ", ".join(f"{name} {version}" for name, version in versions.items())
            found.append(Result("versions", environment, "", [], note=text))
            if environment in PEERS and PEERS[environment].note:
                found.append(Result("note", PEERS[environment].note, "", []))
        return found

    def python(self, environment: str) -> pathlib.Path:
        """Path of an environment's Python; made when first asked for."""
        if environment == "ours":
            return pathlib.Path(sys.executable)
        if environment not in self._pythons:
            try:
                made = environment_for(environment, self.options.environments, self.options.device)
            except RuntimeError as error:
                made = error
            self._pythons[environment] = made
        if isinstance(self._pythons[environment], RuntimeError):
            raise SideError(str(self._pythons[environment]))
        return self._pythons[environment]

    def start(self, way: Way, kind: str, **case) -> Process | None:
        """Starts and prepares a side.

        Returns:
            The process, or `None` if it cannot run; the reason is in `failures`.
        """
        process = None
        try:
            python = self.python(way.environment)
            log = self.folder / f"{len(list(self.folder.iterdir()))}.log"
            process = Process(way, python, log, self._variables())
            self._running.append(process)
            answer = process.ask("prepare", kind=kind, device=self.options.device, **way.options, **case)
            process.versions = answer["versions"]
            if kind != "draw":
                self.versions.setdefault(way.environment, {}).update(process.versions)
            return process
        except (SideError, OSError) as error:
            if process is not None:
                self.stop([process])
            self.fail(f"{way.name} ({case.get('model', kind)})", error)
            return None

    def draw(self, model: str, size: int, classes: int, path: pathlib.Path) -> int | None:
        """Writes a network's parameters, drawn from the seed, with timm's names.

        Returns:
            Multiply-adds of one image, or `None` if that failed.
        """
        way = Way("ours, parameters", "benchmarks.sides.ours", "ours", variables={"KERAS_BACKEND": "tensorflow"})
        case = {"model": model, "size": size, "classes": classes, "path": str(path), "seed": self.options.seed}
        process = self.start(way, "draw", **case)
        if process is None:
            return None
        self.stop([process])
        return process.versions["multiply_adds"]

    def start_matrices(self, precisions: Sequence[str] = ("float32", "bfloat16")) -> list[Process]:
        """Starts what measures the machine's rate of matrix products."""
        ways = [way for way in matrix_ways(self.options.device) if way.precision in precisions]
        started = [self.start(way, "matrix", size=self.matrix_size) for way in ways]
        return [process for process in started if process is not None]

    @property
    def matrix_size(self) -> int:
        """Rows and columns of the matrices of that measurement."""
        return 1024 if self.options.quick else 4096

    def products(self, matrices: Sequence[Process], times: Mapping[str, list[float]]) -> list[Result]:
        """Turns the times of `start_matrices`' processes into results."""
        size = self.matrix_size
        return [
            Result(f"matrix product {size} x {size}", process.way.name, "s", times[process.way.name], 2.0 * size**3)
            for process in matrices
            if process.way.name in times
        ]

    def _variables(self) -> dict[str, str]:
        variables = {"TF_CPP_MIN_LOG_LEVEL": "3", "NFNET_BENCHMARK_DEVICE": self.options.device}
        # What torch.compile made once need not be compiled again in the next run: it is not measured.
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(self.options.environments.expanduser().absolute() / "inductor")
        if self.options.device == "gpu":
            # Several processes share the GPU, and float32 is float32 on all sides, not TensorFloat-32 on some.
            variables |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
            variables |= {"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        if getattr(self.options, "authors", None):
            variables["NFNET_AUTHORS"] = str(self.options.authors.expanduser().absolute())
        return variables

    def feed(self, processes: Sequence[Process], inputs: pathlib.Path) -> list[Process]:
        """Gives all the inputs, one after the other, and returns those that could run them."""
        able = []
        for process in processes:
            try:
                process.ask("feed", path=str(inputs))
                able.append(process)
            except SideError as error:
                self.fail(process.way.name, error)
        return able


def in_turn(
    processes: Sequence[Process], rounds: int, repeats: int = 1, warmup: int = 1, *, sides: Sides | None = None
) -> dict[str, list[float]]:
    """Times all sides in turn; every other round goes backwards, so that a drift of the machine meets all alike.

    Args:
        processes: Sides that were given inputs.
        rounds: Turns of each.
        repeats: Timed runs of a turn; the median of a turn's runs is its value.
        warmup: Runs before them, which are not timed: the side before had the caches.
        sides: Is told of a side that fails, which is then left out.

    Returns:
        {name of the way: one value in seconds for each round}.
    """
    times: dict[str, list[float]] = {process.way.name: [] for process in processes}
    for turn in range(rounds):
        for process in processes if turn % 2 == 0 else reversed(processes):
            name = process.way.name
            if name not in times:
                continue
            try:
                times[name].append(statistics.median(process.ask("time", repeats=repeats, warmup=warmup)["seconds"]))
            except SideError as error:
                if sides is None:
                    raise
                del times[name]
                sides.fail(name, error)
    return times
