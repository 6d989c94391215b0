"""Write linearize/report/results.schema.json, the published schema of results.json, from the types of the results.

python scripts/make_schema.py
"""

import argparse
import json
from pathlib import Path

from linearize.report.results import json_schema

TARGET = Path(__file__).resolve().parent.parent / "linearize" / "report" / "results.schema.json"


def main() -> None:
    """Write the schema and print its path."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    TARGET.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
