"""`python -m dmdr_train …` is `dmdr-train …`, and what launchers start: `torchrun … -m dmdr_train encode …`."""

from dmdr_train.cli import main

if __name__ == "__main__":
    main()
