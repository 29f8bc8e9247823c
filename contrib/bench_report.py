"""What the benchmark says: the verdict on each row, a table, JSON, the machine."""

import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench_fio import GiB
from bench_measures import Sample
from bench_processes import Failed, run
from bench_rows import Row


@dataclass
class Result:
    """The samples of one row, a list per column, and why a column has no more."""

    row: Row
    samples: list[list[Sample]]
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """Return what the goal is about: a ratio of medians, or a median."""
        judged = range(len(self.row.judged))
        if not all(self.samples[i] and i not in self.reasons for i in judged):
            return None
        medians = [median(self.samples[index]) for index in judged]
        if not self.row.is_ratio:
            return medians[0]
        return medians[0] / medians[1] if medians[1] else None

    @property
    def is_reached(self) -> bool:
        return self.value is not None and self.row.is_reached(self.value)


def median(samples: Iterable[Sample]) -> float:
    return statistics.median(sample.value for sample in samples)


# --- The table ------------------------------------------------------------------


def table(results: list[Result]) -> str:
    head = ("row", "unit", "ours", "peer", "ratio", "goal", "")
    lines = [head, *(cells(result) for result in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    ) + "".join(f"\n{note}" for result in results for note in notes(result))


def cells(result: Result) -> tuple[str, ...]:
    row = result.row
    columns = [cell(result, index) for index in range(len(row.columns))]
    if len(columns) == 1:
        columns.append("")
    ratio = f"{result.value:.2f}" if row.is_ratio and result.value is not None else ""
    sign = ">=" if row.is_ratio else "<="
    goal = f"{sign} {row.goal:g}"
    mark = "reached" if result.is_reached else "MISSED"
    return (row.title, row.unit, *columns, ratio, goal, mark)


def cell(result: Result, index: int) -> str:
    if index in result.reasons:
        return "no"
    values = [sample.value for sample in result.samples[index]]
    if not values:
        return "-"
    numbers = (statistics.median(values), min(values), max(values))
    middle, least, most = (number(value, result.row.unit) for value in numbers)
    return f"{middle} ({least}-{most})"


def number(value: float, unit: str) -> str:
    if unit == "IOPS":
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def notes(result: Result) -> list[str]:
    """Return what does not fit into the table: reasons, and details of a median."""
    row = result.row
    lines = [
        f"{row.name}: {row.columns[index]}: no ({reason})"
        for index, reason in result.reasons.items()
    ]
    for column, samples in zip(row.columns, result.samples, strict=True):
        details = {name for sample in samples for name in sample.details}
        if details:
            words = (
                f"{name} {statistics.median(s.details[name] for s in samples):.1f}"
                for name in sorted(details)
            )
            lines.append(f"{row.name}: {column}: medians: {', '.join(words)}")
    return lines


# --- JSON -----------------------------------------------------------------------


def as_json(results: list[Result], machine: dict[str, str]) -> dict[str, object]:
    return {"machine": machine, "rows": [result_as_json(r) for r in results]}


def result_as_json(result: Result) -> dict[str, object]:
    row = result.row
    return {
        "name": row.name,
        "title": row.title,
        "unit": row.unit,
        "goal": row.goal,
        "kind": "ratio at least" if row.is_ratio else "value at most",
        "value": result.value,
        "reached": result.is_reached,
        "columns": [
            {
                "side": column.side,
                "name": str(column),
                "snapshots": column.snapshots,
                "median": median(samples) if samples else None,
                "samples": [sample.value for sample in samples],
                "details": [sample.details for sample in samples if sample.details],
                "reason": result.reasons.get(index),
            }
            for index, (column, samples) in enumerate(
                zip(row.columns, result.samples, strict=True)
            )
        ],
    }


# --- The machine ----------------------------------------------------------------


def machine_facts(
    fleecefs: Path, peer: str, directories: dict[str, Path]
) -> dict[str, str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / GiB:.1f} GiB",
        "load": f"{os.getloadavg()[0]:.2f}",
        "kernel": platform.release(),
        "python": version(str(python_of(fleecefs))),
        "fleecefs": version(str(fleecefs)),
        "peer": version(peer),
        "fio": version("fio"),
        **{name: filesystem(path) for name, path in directories.items()},
    }


def python_of(script: Path) -> Path:
    """Return the interpreter that a script installed by pip runs with."""
    python = script.parent / "python"
    return python if python.exists() else Path("python3")


def version(binary: str) -> str:
    try:
        return run(binary, "--version").strip().splitlines()[0]
    except (Failed, IndexError) as e:
        return f"unknown ({e})"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def filesystem(path: Path) -> str:
    """Return the type of the file system that a directory is on."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            mount, _, rest = line.partition(" - ")
            if mount.split()[2] == wanted:
                return rest.split()[0]
    return "unknown"
