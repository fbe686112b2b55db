"""Runs torchrun for launch/torchrun.sh, with an exit code that tells a scheduler whether to start it again.

torchrun's own exit code is 1 for every failure. Here:

    75      stopped with a checkpoint, or a process or the network was lost: start it again
    1, 2    a process failed with an error that would occur again: status says `failed`
    130     Ctrl-C
"""

from __future__ import annotations

import signal
import sys
import traceback

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Run torchrun on this process's arguments and return the exit code."""
    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        codes = {failure.exitcode for failure in error.failures.values()}
        return min(codes & {1, 2}, default=75)
    except SignalException as stopped:
        return 130 if stopped.sigval == signal.SIGINT else 75
    except Exception:  # from the rendezvous: another node is late or gone
        traceback.print_exc()
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
