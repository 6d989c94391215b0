"""The commands as functions, each a numbered list that reads top to bottom: convert, finetune, evaluate, run, bench, doctor."""
