"""The system calls that a worker may make, as a seccomp filter of Linux."""

import errno
import os
import sys
from functools import lru_cache

# All that a running query needs: its open pipes, memory, time, and its own limits.
_ALLOWED = [
    "read", "write", "close", "lseek", "fstat", "brk", "munmap", "mremap", "madvise", "futex", "sched_yield", "getpid", "gettid",
    "clock_gettime", "clock_nanosleep", "gettimeofday", "time", "times", "getrusage", "getrandom", "getrlimit", "setrlimit",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "exit", "exit_group",
]  # fmt: skip
_PROT_EXEC = 4


@lru_cache
def filter_program() -> bytes:
    """Return a program for the kernel that refuses every other call with EPERM.

    Empty without pyseccomp, the system's libseccomp, or Linux. A process needs no rights to install it.
    """
    if sys.platform != "linux":
        return b""
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError, AttributeError):  # all but the first: no libseccomp, or one too old
        return b""
    calls = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in _ALLOWED:
        calls.add_rule(pyseccomp.ALLOW, name)
    for name in ("mmap", "mprotect"):  # memory, but none to execute
        calls.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, _PROT_EXEC, 0))
    calls.add_rule(pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(0, pyseccomp.EQ, 0))
    with open(os.memfd_create("filter"), "rb+", buffering=0) as file:
        calls.export_bpf(file)
        file.seek(0)
        return file.read()
