"""Writes linearize/report/results.schema.json, the published schema of results.json, from the results' own types."""

import json
from pathlib import Path

from linearize.report.results import json_schema

target = Path(__file__).resolve().parent.parent / "linearize" / "report" / "results.schema.json"
target.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
print(target)
