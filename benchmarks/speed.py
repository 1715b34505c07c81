"""Speed and memory next to the reference implementation and a dense Llama of equal operations; fills in docs/speed.md.

    python benchmarks/speed.py [--only NAME ...] [--threads N] [--repeat N] [--avx2] [--reference PYTHON] [--out FILE]
    python benchmarks/speed.py --markdown    # fill in the page from existing results, and measure nothing

The reference is open-mythos 0.5.0, which has this library's import name, so it runs in a Python environment of its own,
as does the Llama of Hugging Face transformers. Without --reference, that environment is created in runs/reference-venv
(once; this downloads torch). Packages that are missing there are left out, with a line that says so. Every side of a
workload is a process. All processes are prepared first; then they take turns of two repetitions, of which the second
counts, and only one computes at a time. A ratio is the median over turns, so that a temporary slowdown of the machine
affects both sides. With --threads 1, seconds are the process's own CPU time. Other work on the machine distorts the
results, which are written after every workload.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pages import table, write
from rich.console import Console
from rich.table import Table
from speed_cases import CASES, Case, Task

from open_mythos.diagnostics.machine import describe

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("speed_worker.py")
VENV = ROOT / "runs" / "reference-venv"
PAGE = ROOT / "docs" / "speed.md"
RESULTS = {kind: ROOT / "benchmarks" / "results" / f"{name}.json"
           for kind, name in (("AVX-512", "speed"), ("AVX2", "speed-avx2"))}  # fmt: skip
# The reference pins an older torch than its code needs; both sides get the same version.
PACKAGES = (["torch=={torch}", "transformers>=5.17,<6"], ["--no-deps", "open-mythos==0.5.0"])

# Environment variables that keep PyTorch's own kernels, MKL, oneDNN and compiled code from using more than AVX2.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "CC": "cc -mno-avx512f",
}  # fmt: skip

# Names of the sides on the page.
NAMES = {"ours": "OpenMythos", "auto": "fastest engine", "bf16": "bfloat16", "recomputed": "loops recomputed",
         "64": "64 tokens", "4000": "4,000 tokens", "llama": "Llama"}  # fmt: skip

# -- measuring


@dataclass
class Worker:
    """The process of one side.

    Attributes:
        environment: environment variables in addition to its parent's.
        built: its reply once it is ready; ``missing`` in it is the reason why it cannot do its task.
        found: a dict of measurements for each repetition.
    """

    python: Path
    task: Task
    environment: dict[str, str]
    threads: int
    built: dict[str, Any] = field(default_factory=dict)
    found: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        """Start the process and wait until it is ready; for a memory task, that is for a single repetition."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)} | self.environment
        if self.task.side == "ours":
            environment["PYTHONPATH"] = str(ROOT)
        else:
            environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [str(self.python), str(WORKER), json.dumps(asdict(self.task) | {"threads": self.threads})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            cwd=tempfile.gettempdir(),  # a folder that has neither side's package
        )  # fmt: skip
        self.built = self._reply()

    def repeat(self) -> None:
        if self.task.work == "memory" and self.found:
            self.stop()
            self.start()
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.found.append(self._reply())

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"failed": "it was killed, as for want of memory"}
        if "failed" in found:
            raise RuntimeError(f"{self.task}: {found['failed']}")
        return found


def measure(
    case: Case,
    pythons: dict[str, Path],
    threads: int,
    repeat: int,
    say: Any,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The results of one case: every repetition of each side, and median, min and max of each ratio."""
    case_sides = {name: task for name, task in case.sides.items() if not (environment and task.bf16)}  # not with AVX2
    workers = {name: Worker(pythons[task.side], task, environment or {}, threads) for name, task in case_sides.items()
               if task.side in pythons}  # fmt: skip
    started: dict[str, Worker] = {}
    try:
        for name, worker in workers.items():
            say(f"{name}: getting ready")
            started[name] = worker
            worker.start()
        ready = {name: worker for name, worker in started.items() if "missing" not in worker.built}
        for turn in range(repeat):
            say(f"turn {turn + 1} of {repeat}")
            for worker in list(ready.values())[:: 1 if turn % 2 == 0 else -1]:
                worker.repeat()
    finally:
        for worker in started.values():
            worker.stop()
    sides = {
        name: worker.built | {unit: [found[unit] for found in worker.found] for unit in worker.found[0]}
        for name, worker in ready.items()
    }
    left_out = {name: worker.built["missing"] for name, worker in started.items() if name not in ready}
    left_out |= {name: f"no interpreter for {case.sides[name].side}" for name in case_sides if name not in workers}
    ratios = [ratio(sides, *pair) for pair in case.ratios if set(pair) <= sides.keys()]
    return {"what": case.what, "bar": case.bar, "sides": sides, "ratios": ratios, "left_out": left_out,
            "date": date.today().isoformat()}  # fmt: skip


def ratio(sides: dict[str, Any], of: str, to: str) -> dict[str, Any]:
    """For every unit, the ratio of two sides, turn by turn: median, min, max."""
    units = [unit for unit, values in sides[of].items() if isinstance(values, list)]
    turns = {unit: [a / b for a, b in zip(sides[of][unit], sides[to][unit], strict=True)] for unit in units}
    return {"of": of, "to": to} | {unit: [median(x), min(x), max(x)] for unit, x in turns.items()}


# -- interpreters


def reference_python(given: Path | None, say: Any) -> Path:
    """A Python interpreter with the reference and transformers; its environment is created if none is given.

    Raises:
        RuntimeError: if the interpreter does not exist or could not be created, with pip's error message.
    """
    if given is not None:
        if not given.is_file():
            raise RuntimeError(f"--reference {given} is no file; give the path of an interpreter")
        return given.absolute()  # a worker runs in another folder
    python, done = VENV / "bin" / "python", VENV / "complete"
    if not done.is_file():
        say(f"making {VENV.relative_to(ROOT)}: downloads torch and transformers, once")
        commands = [[sys.executable, "-m", "venv", "--clear", str(VENV)]]
        commands += [[str(python), "-m", "pip", "install", "--quiet", *words] for words in PACKAGES]
        for command in commands:
            words = [word.format(torch=torch.__version__.split("+")[0]) for word in command]
            made = subprocess.run(words, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"{' '.join(words)} failed:\n{made.stderr.strip()[-2000:]}")
        done.touch()
    return python


# -- results


def rows(found: dict[str, Any]) -> Iterator[list[str]]:
    """For each ratio of a case: its sides, median, min, max, the figures of both sides, and a note."""
    for entry in found["ratios"]:
        of, to = entry["of"], entry["to"]
        for unit in (name for name, value in entry.items() if isinstance(value, list)):
            reached = " / ".join(f"{median(found['sides'][side][unit]):,.0f}" for side in (of, to))
            yield [f"{of} / {to}", *(f"{x:.2f}" for x in entry[unit]), f"{reached} {unit}", note(found, of, to)]


def note(found: dict[str, Any], of: str, to: str) -> str:
    """For ratios to Llama, the goal and the parameters; otherwise the experts used, where both sides have experts."""
    sides = [found["sides"][name] for name in (of, to)]
    if to == "llama":
        parameters = " / ".join(f"{side['parameters'] / 1e6:.1f}M" for side in sides)
        return f"goal: {found['bar']}; {parameters} parameters"
    if all("experts_used" in side for side in sides):
        return " / ".join(f"{side['experts_used']:.0f}" for side in sides) + " experts used"
    return ""


def named(sides: str) -> str:
    """Two sides by their names on the page."""
    return " / ".join(", ".join(NAMES.get(word, word) for word in side.split(", ")) for side in sides.split(" / "))


def measured() -> dict[str, dict[str, Any]]:
    """The existing results, by kind of processor."""
    return {kind: json.loads(path.read_text()) for kind, path in RESULTS.items() if path.is_file()}


def markdown(kinds: dict[str, dict[str, Any]]) -> str:
    """The conditions of each kind of processor, and a table with a line for each ratio and columns for each kind."""
    lines, columns = [], ["workload", "compared"]
    for kind in RESULTS:
        lines.append(f"- **{kind}**: {where(kinds[kind]) if kind in kinds else 'not measured.'}")
        columns += [f"{kind}: ratio, median (min – max)", f"{kind}: figures of both sides"]
    cells: dict[str, dict[tuple[str, str], list[str]]] = {}  # by workload and comparison: two per kind, and a note
    for k, kind in enumerate(RESULTS):
        for found in kinds.get(kind, {"results": {}})["results"].values():
            for sides, middle, low, high, reached, noted in rows(found):
                of_workload = cells.setdefault(found["what"], {})
                compared = named(sides), reached.split(maxsplit=3)[3]  # memory may have two units
                row = of_workload.setdefault(compared, ["not measured", ""] * len(RESULTS) + [noted])
                row[2 * k : 2 * k + 2] = f"{middle} ({low} – {high})", reached
    shown = (
        [what if i == 0 else "", sides, *row]
        for what, of_workload in cells.items()
        for i, ((sides, _), row) in enumerate(of_workload.items())
    )
    return "\n".join([*lines, "", *table([*columns, "notes"], shown)])


def where(measured: dict[str, Any]) -> str:
    """Processor, threads, version and dates of a results file, and the cases that it lacks."""
    at, days = measured["conditions"], sorted({found["date"] for found in measured["results"].values()})
    more = f" Load: {at['load']}." if "load" in at else ""
    if missing := [f"`{name}`" for name in CASES if name not in measured["results"]]:
        more += f" Not measured: {', '.join(missing)}."
    return (
        f"{at['name']}, instructions {at['instructions']}, {at['threads']} of {at['cores']} cores, "
        f"torch {at['torch']}, {' and '.join(dict.fromkeys((days[0], days[-1])))}.{more}"
    )


def show(found: dict[str, Any], console: Console) -> None:
    shown = Table("", "ratio", "min", "max", "reached", "", title=found["what"], title_justify="left")
    for row in rows(found):
        shown.add_row(*row)
    alone = found["sides"].items() if not found["ratios"] else ()
    for name, side in alone:  # without a ratio
        for unit in (name for name, value in side.items() if isinstance(value, list)):
            shown.add_row(name, "", "", "", f"{median(side[unit]):,.0f} {unit}", "")
    console.print(shown)
    for name, why in found["left_out"].items():
        console.print(f"left out: {name}: {why}", style="yellow", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=7, help="turns that every side takes")
    parser.add_argument("--avx2", action="store_true", help="run both sides without instructions wider than AVX2")
    parser.add_argument("--reference", type=Path, metavar="PYTHON", help="interpreter with open-mythos 0.5.0")
    parser.add_argument("--markdown", action="store_true", help="only fill in the page from existing results")
    parser.add_argument("--out", type=Path, help="benchmarks/results/speed.json, or speed-avx2.json")
    args = parser.parse_args()
    if args.markdown:
        write(PAGE, markdown(measured()))
        return
    out = args.out or RESULTS["AVX2" if args.avx2 else "AVX-512"]
    console, screen = Console(), Console(stderr=True)
    pythons = {"ours": Path(sys.executable)}
    with screen.status("") as status:
        try:
            theirs = reference_python(args.reference, status.update)
            pythons |= {"reference": theirs, "llama": theirs}
        except RuntimeError as error:
            screen.print(f"no reference and no Llama: {error}", style="yellow", highlight=False, markup=False)
    torch.set_num_threads(args.threads)
    conditions = describe(torch.device("cpu")) | ({"instructions": "AVX2"} if args.avx2 else {})
    kept = json.loads(out.read_text()) if out.is_file() else {}
    # A table never mixes machines or numbers of threads.
    results = kept["results"] if kept.get("conditions") == conditions else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in args.only:
        try:
            with screen.status(name) as status:
                results[name] = measure(
                    CASES[name], pythons, args.threads, args.repeat, status.update, AVX2 if args.avx2 else {}
                )
        except RuntimeError as error:
            failed = True
            screen.print(f"{name} failed: {error}", style="red", highlight=False, markup=False)
            continue
        show(results[name], console)
        ordered = {name: results[name] for name in CASES if name in results}
        out.write_text(json.dumps({"conditions": conditions, "results": ordered}, indent=1) + "\n")
    if out in RESULTS.values():
        write(PAGE, markdown(measured()))
    console.print(f"Results: {out}", soft_wrap=True, highlight=False)
    sys.exit(failed)


if __name__ == "__main__":
    main()
