"""`python -m duorl` is `duorl`; `torchrun -m duorl train` starts it as several ranks."""

from duorl.cli import main

if __name__ == "__main__":
    main()
