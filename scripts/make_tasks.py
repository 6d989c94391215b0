"""Writes lm-evaluation-harness task files for local benchmark files, so that they run without a hub.

python scripts/make_tasks.py FOLDER OUT      FOLDER holds NAME.jsonl files:
                                             query, choices, gold  ->  multiple choice
                                             context, continuation ->  the continuation's likelihood (greedy match)
linearize eval MODEL --tasks NAME,... --tasks-dir OUT
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
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
