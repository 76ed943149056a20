"""What is told of a run besides `metrics.jsonl`: tensorboard, wandb, mlflow and trackio, each through one small protocol.

`config` is `trackers:` of a recipe, `protocol` what an adapter is and what it is told, `following` holds the adapters of a run
and keeps a fault of theirs away from it. A file each for the adapters; their libraries are loaded only when a recipe names them.
"""
