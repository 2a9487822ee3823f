"""One run on one GPU, at most 8 minutes: is everything right on CUDA, and what does it cost? bash benchmarks/gpu.sh

Every check has a name, a limit of seconds and, where it cannot run, a reason; each result is written at once, and the
checks run in a process of their own, which is started again after one that crashed or hung. `results.json` and
`results.md` hold all of them; the exit status is 1 if one failed. `--tiny --device cpu` runs each of them at tiny size
without a GPU.
"""
