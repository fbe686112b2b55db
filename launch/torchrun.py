"""Runs torchrun for launch/torchrun.sh, with an exit code that tells a scheduler whether to start it again.

torchrun's own exit code is 1 for every failure. Here:

    75      stopped with a checkpoint, or a process or the network was lost: start it again
    1, 2    a process failed with an error that would occur again: status says `failed`
    130     Ctrl-C

With --max-restarts, torchrun itself starts the processes again after any failure. Here it does so only after
a lost process or network, not after an error, nor when the run was asked to stop.
"""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.agent.server import WorkerState
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError
from torch.distributed.launcher import api

ERRORS = {1, 2}  # exit codes of errors that would occur again
INTERRUPTED = 128 + signal.SIGINT


class Agent(api.LocalElasticAgent):
    """torchrun's agent of this node, which spends no restart where none helps, and ends no other node."""

    def run(self, *arguments: Any) -> Any:
        """Run the processes, as torchrun does; an error of the rendezvous is raised as a SignalException.

        After any other exception torch closes the rendezvous: a node that was cut off for a while would end
        the run of those that went on.
        """
        try:
            return super().run(*arguments)
        except (SignalException, RendezvousClosedError):
            raise
        except Exception as error:  # another node is late or gone, or this one was cut off
            traceback.print_exc()
            raise SignalException("the rendezvous has failed", signal.SIGTERM) from error

    def _monitor_workers(self, *arguments: Any) -> Any:
        result = super()._monitor_workers(*arguments)
        if result.state == WorkerState.FAILED and any(map(_for_good, result.failures.values())):
            self._remaining_restarts = 0
        return result


def _for_good(failure: ProcessFailure) -> bool:
    stopped = failure.error_file_data.get("stopped", False)  # by preemption.py
    return stopped or failure.exitcode in {*ERRORS, INTERRUPTED}


def main() -> int:
    """Run torchrun on this process's arguments and return the exit code."""
    api.LocalElasticAgent = Agent  # type: ignore[misc]  # torchrun has no option for it
    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        codes = {failure.exitcode for failure in error.failures.values()}
        return min(codes & ERRORS, default=75)
    except SignalException as stopped:
        return INTERRUPTED if stopped.sigval == signal.SIGINT else 75
    except RendezvousClosedError:
        print("torchrun: the run has ended on another node: its status says how", file=sys.stderr)
        return 75
    except Exception:  # from the rendezvous: another node is late or gone
        traceback.print_exc()
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
