"""Run a command that ends when the process that started it ends, however that one ends.

    python tether.py PARENT_PID SIGNAL USER COMMAND [ARGUMENT ...]

The kernel sends SIGNAL to the command when the parent is gone, also after a SIGKILL of the parent.
It forgets that wish when the user changes, so the change to USER (empty: none) comes first. The command
replaces this process and so keeps its pid. Elsewhere than on Linux there is no such wish, only the user.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1


def main(parent_pid: str, signal_number: str, user: str, *command: str) -> None:
    if user:
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(signal_number)) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have gone before the kernel knew our wish.
    if os.getppid() != int(parent_pid):
        sys.exit("the process that started this one is gone")
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main(*sys.argv[1:])
