"""Posteriors of LoRA adapters side by side: an encoder on CoLA and MRPC, a language model on questions.

    python -m benchmarks.adapters --encoder MINILM --decoder SMOLLM2 --data_dir DATA --output_dir OUT --page page.md
    python -m benchmarks.adapters --tasks cola --seeds 0 --methods map,temperature --data_dir DATA --output_dir OUT

DATA holds `glue/CoLA`, `glue/MRPC`, `trec` and `choice`. Rows are run, kept and resumed as those of
`benchmarks.leaderboard`: a row whose record exists is not run again. The plain adapter of a task and a seed is the
folder `TASK-SEED-lora` of OUT, which PEFT wrote; methods that need no training of their own share it, and those that
do start from the same fresh adapter and take as many steps.
"""
