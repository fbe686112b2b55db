"""Entry point of `python -m indistill`, `torchrun -m indistill` and `accelerate launch -m indistill`."""

from indistill.commands.cli import main

if __name__ == "__main__":
    main()
