"""Train: `deepspeed packages/dmdr-train/run.py --config RECIPE [key=value …]`, or torchrun, or plain python."""

from dmdr_train.cli import run_main

if __name__ == "__main__":
    run_main()
