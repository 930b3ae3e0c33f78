"""What a learner's process may not do, asked of Linux before any code of the learner runs.

None of this needs a right or a namespace, so it holds in containers, too:

- **Resource limits** (setrlimit): memory of each process, size of a file, open files, processes,
  no core dumps. They cannot be raised again.
- **A filter of system calls** (seccomp): no sockets, so no network; no memory that these limits do
  not count (memfd, System V segments, anonymous shared maps); no namespaces and mounts of its own,
  in which memory could be taken as a file system; and no rarely used interfaces of the kernel.
- **A filter of files** (Landlock, Linux 5.13): what is not listed can be neither read nor written,
  and, from Linux 6.12 on, no process outside gets a signal. This is for systems without namespaces;
  inside `jail` the file system is the process's own.

Each function says whether its limit holds. Where one is not there, the others still are.

RLIMIT_DATA counts private memory, and RLIMIT_AS all address space. The second is set to what the
process has after its imports plus the limit, because libraries reserve addresses that they do not
use.

Sources: seccomp(2), landlock(7), setrlimit(2). Left out: processor time; the grading process stops
what takes too long.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

GIB = 2**30
FILE_BYTES = 256 * 2**20  # of one file that a learner's process writes
OPEN_FILES = 256
PROCESSES = 128  # and threads, of one submission
NO_NEW_PRIVILEGES = 38  # of prctl(2)

# System calls that are refused: x86_64 and aarch64.
REFUSED = {
    "socket": (41, 198), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "io_uring_setup": (425, 425), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "personality": (135, 92),
}  # fmt: skip
MMAP, CLONE, CLONE3, SECCOMP = (9, 222), (56, 220), (435, 435), (317, 277)
SET_FILTER, ALL_THREADS = 1, 1
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32 = 0x40000000  # bit of x86_64's second set of numbers
SHARED_ANONYMOUS = 0x1 | 0x20  # MAP_SHARED, MAP_ANONYMOUS
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW…
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # instructions of classic BPF
NUMBER, ARCHITECTURE, FIRST_ARGUMENT, FOURTH_ARGUMENT = 0, 4, 16, 40  # in struct seccomp_data
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, READ_FILE, READ_FOLDER = 1, 4, 8
WRITE_FILE = 2
SCOPES = 3  # abstract sockets and signals, from version 6 on
SEEN = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/filesystems")
OPENED = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def limit_files_and_processes() -> bool:
    """Limit files, open files and processes; whether the number of processes is limited.

    Linux counts the processes of a user, from 5.14 on those of the user's namespace. Here a fork
    under a limit of one tells whether the limit holds at all: it does not for root.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_FSIZE, FILE_BYTES)
    _lower(resource.RLIMIT_NOFILE, OPEN_FILES)
    if not _is_linux():
        return False
    _lower(resource.RLIMIT_MSGQUEUE, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    refused = not _can_fork()
    most = PROCESSES if _own_count() else PROCESSES + _threads_of_this_user()
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, hard))
    if not _can_fork():  # before Linux 5.14 the user's other processes count, which are not seen
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
        return False
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    return refused


def limit_memory(gib: float | int) -> bool:
    """Limit the memory of this process and of each child; False if the system cannot.

    Called after the imports, whose addresses do not count.
    """
    if not _is_linux() or not gib:
        return False
    amount = int(gib * GIB)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if _sees_itself() else 0
    _lower(resource.RLIMIT_DATA, amount)
    if pages:
        _lower(resource.RLIMIT_AS, amount + pages * resource.getpagesize())
    return True


def refuse_system_calls() -> bool:
    """Refuse the system calls that the docstring of this module names; False if that failed."""
    if not _is_linux() or platform.machine() not in ARCHITECTURES:
        return False
    column, architecture = ARCHITECTURES[platform.machine()]
    code = _filter(column, architecture)
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(kept))
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return bool(libc.syscall(SECCOMP[column], SET_FILTER, ALL_THREADS, program) == 0)


def _filter(column: int, architecture: int) -> bytes:
    """The filter as a program of classic BPF: instructions of 8 bytes, jumps only forwards."""

    def one(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, value)

    refuse = one(RETURN, REFUSE | errno.EPERM)
    lines = [
        one(LOAD, ARCHITECTURE),
        one(EQUAL, architecture, yes=1),
        one(RETURN, KILL),  # a call in another way, such as int 0x80, has other numbers
        one(LOAD, NUMBER),
        one(AT_LEAST, X32, no=1),
        refuse,
    ]
    for numbers in REFUSED.values():
        lines += [one(EQUAL, numbers[column], no=1), refuse]
    # clone3 hides its flags in memory. "Not known" makes the C library use clone.
    lines += [one(EQUAL, CLONE3[column], no=1), one(RETURN, REFUSE | errno.ENOSYS)]
    lines += [
        one(EQUAL, CLONE[column], no=4),
        one(LOAD, FIRST_ARGUMENT),
        one(AND, NEW_NAMESPACES),
        one(EQUAL, 0, yes=1),
        refuse,
        one(LOAD, NUMBER),
        one(EQUAL, MMAP[column], no=4),
        one(LOAD, FOURTH_ARGUMENT),
        one(AND, SHARED_ANONYMOUS),
        one(EQUAL, SHARED_ANONYMOUS, no=1),
        refuse,
        one(RETURN, ALLOW),
    ]
    return b"".join(lines)


def limit_paths(readable: Iterable[str], writable: Sequence[str]) -> bool:
    """Allow only these files and folders, and what is below them; False if Linux cannot."""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1) if _is_linux() else -1
    if version < 1:
        return False
    # Rights are numbered: 13 in version 1; later ones: to move, to truncate, to ask a device.
    everything = (1 << (13 + (version > 1) + (version > 2) + (version > 4))) - 1
    attributes = struct.pack("QQQ", everything, 0, SCOPES if version >= 6 else 0)
    size = ctypes.c_size_t(24 if version >= 6 else 8)
    rules = libc.syscall(CREATE_RULESET, attributes, size, 0)
    if rules < 0:
        return False
    try:
        look = EXECUTE | READ_FILE | READ_FOLDER
        for path in (*readable, *SEEN):
            _allow(rules, path, look)
        for path in OPENED:
            _allow(rules, path, READ_FILE | WRITE_FILE)
        for path in writable:
            _allow(rules, path, everything)
        if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
            return False
        return bool(libc.syscall(RESTRICT_SELF, rules, 0) == 0)
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    with suppress(OSError):
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not os.path.isdir(path):
                rights &= EXECUTE | READ_FILE | WRITE_FILE
            rule = struct.pack("=Qi", rights, handle)
            if libc.syscall(ADD_RULE, rules, 1, rule, 0):
                raise OSError(ctypes.get_errno(), f"Landlock refuses {path}")
        finally:
            os.close(handle)


def _is_linux() -> bool:
    return sys.platform == "linux"


def _sees_itself() -> bool:
    return os.access("/proc/self/statm", os.R_OK)


def _lower(what: int, amount: int) -> None:
    """Set a limit, if it is lower than the one that holds."""
    _, hard = resource.getrlimit(what)
    if hard == resource.RLIM_INFINITY or amount < hard:
        resource.setrlimit(what, (amount, amount))
    else:
        resource.setrlimit(what, (hard, hard))


def _can_fork() -> bool:
    try:
        child = os.fork()
    except OSError:
        return False
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return True


def _own_count() -> bool:
    """Whether this process's user namespace is not the first one; then it counts for itself."""
    with suppress(OSError):
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    return False


def _threads_of_this_user() -> int:
    user, found = os.getuid(), 0
    for name in os.listdir("/proc"):
        with suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                found += len(os.listdir(f"/proc/{name}/task"))
    return found
