"""Write lm-evaluation-harness task files for local benchmark files, so that they run without a hub.

    python scripts/make_tasks.py FOLDER OUT
    linearize eval MODEL --tasks NAME,... --tasks-dir OUT

FOLDER holds NAME.jsonl files. Rows with query, choices and gold become multiple choice; rows with context and
continuation measure the continuation's likelihood (greedy match).
"""

import argparse
import json
from pathlib import Path

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
CONTINUATION = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{continuation}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def main() -> None:
    """Write one task file for every benchmark file, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of NAME.jsonl files")
    parser.add_argument("out", type=Path, help="folder for the task files")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(arguments.folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            first = json.loads(file.readline())
        template = CHOICE if "choices" in first else CONTINUATION
        target = arguments.out / f"{path.stem}.yaml"
        target.write_text(template.format(name=path.stem, path=json.dumps(str(path.resolve()))), encoding="utf-8")
        print(target)


if __name__ == "__main__":
    main()
