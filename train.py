"""`python train.py [options]` is `duorl train [options]`; see --help."""

from duorl.cli import train_main

if __name__ == "__main__":
    train_main()
