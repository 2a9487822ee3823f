"""Every posterior side by side: real tasks, several seeds, early-stopped and over-fitted checkpoints, one table.

    python -m benchmarks.leaderboard --model MINILM --data_dir DATA --output_dir OUT --page page.md --html page.html
    python -m benchmarks.leaderboard --tasks cola,trec --seeds 0 --methods map,holdout --data_dir DATA --output_dir OUT

DATA holds `glue/CoLA`, `glue/MRPC`, `glue/SST-2`, `trec` and `clinc`. A row is a task, a seed, a kind of checkpoint
and a method; one whose record exists is not run again, so that a board is filled in as many sittings as one likes, and
a method that is added later costs its own rows alone. Checkpoints are folders of OUT (`cola-0`, `cola-0-overfit`); with
`--model` those that are missing are trained first. Each row runs in a process of its own, on one core: `--processes N`
runs N at a time. Predictions and records lie in the checkpoint's folder, in `predictions/METHOD.npz` and `.json`.

Whatever a method chooses, it chooses on the training rows or on the held-out tenth of them; the tables are of the
development (or test) files.
"""
