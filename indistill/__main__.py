"""`python -m indistill`, and therefore `torchrun -m indistill` and `accelerate launch -m indistill`."""

from indistill.commands.cli import main

if __name__ == "__main__":
    main()
