"""Run each command as a function that reads as a numbered list: convert, finetune, evaluate, run, bench, doctor."""
