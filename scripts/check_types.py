"""Run mypy and hold its errors to a limit per folder that may only fall: python scripts/check_types.py

A folder that LIMITS does not name has to be free of errors. The check also fails where a limit could be lower, and
prints the new one, so that every improvement is kept.
"""

import re
import subprocess
import sys
from collections import Counter

LIMITS: dict[str, int] = {}
ERROR = re.compile(r"^linearize/(\w+)[^:]*:\d+: error: ")


def error_lines() -> list[str]:
    """Return the lines of mypy's output that report an error in the package; end the process if mypy cannot run."""
    command = [sys.executable, "-m", "mypy", "linearize", "--no-error-summary", "--no-pretty"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode not in (0, 1):
        sys.exit(process.stdout + process.stderr)
    return [line for line in process.stdout.splitlines() if ERROR.match(line)]


def folder_of(line: str) -> str:
    """Return the folder that an error line is about, or the module's name where it stands in no folder."""
    return ERROR.match(line).group(1)


def problems(counts: Counter[str], limits: dict[str, int]) -> list[str]:
    """Return one sentence for each folder whose number of errors is not its limit."""
    sentences = []
    for folder in sorted(set(counts) | set(limits)):
        count, limit = counts[folder], limits.get(folder, 0)
        if count > limit:
            sentences.append(f"{folder}: {count} type errors, where at most {limit} are allowed")
        elif count < limit:
            advice = f"set it to {count}" if count else "remove its line"
            sentences.append(f"{folder}: {count} type errors, under its limit of {limit}: {advice} in LIMITS")
    return sentences


def main() -> None:
    """Print the errors of each folder and end with exit code 1 where one differs from its limit."""
    lines = error_lines()
    counts = Counter(folder_of(line) for line in lines)
    for line in lines:
        if counts[folder_of(line)] > LIMITS.get(folder_of(line), 0):
            print(line)
    folders = "".join(f", {folder} {counts[folder]}" for folder in sorted(counts))
    print(f"types: {counts.total()} errors{folders}")
    if sentences := problems(counts, LIMITS):
        sys.exit("\n".join(sentences))


if __name__ == "__main__":
    main()
