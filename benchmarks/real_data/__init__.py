"""Real GLUE tasks with a real encoder: what a posterior adds to a fine-tuned model, with bootstrap intervals.

    python -m benchmarks.real_data finetune --model DIR --data_dir GLUE --task cola --seed 0 --output_dir OUT
    python -m benchmarks.real_data predict --data_dir GLUE --task cola --seed 0 --output_dir OUT
    python -m benchmarks.real_data table --tasks cola,mrpc,sst2 --seeds 0,1,2 --output_dir OUT

`finetune` trains on nine tenths of the training file and keeps the last tenth (after a seeded shuffle) held out.
`predict` writes the probabilities of every method (or of some: `--methods map,temperature`) beside the checkpoint.
Whatever a method chooses, it chooses on the held-out tenth or on the nine tenths, never on the development file.
`table` compares what it finds there.
"""
