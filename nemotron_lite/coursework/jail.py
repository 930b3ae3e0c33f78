"""The walls around a learner's process: namespaces, an own file system, limits.

    python -I jail.py SITE HOME HIDDEN... -- COMMAND...

`isolation` starts this script inside new namespaces (`unshare`: user, network, processes, IPC,
mounts). It builds a file system from a few folders that are bound into it read-only: the system's
programs and libraries, Python and its packages, and SITE, which holds what a learner's process may
import. Then it makes that the root, forgets the old one, enters another user namespace, in which
no mount can be undone, and starts COMMAND. Parts of /proc that change this machine are read-only.

If root grades, the process becomes the user NOBODY before that. To the files of this machine it
would otherwise be root, and limits on processes do not hold for root.

So in there are no home folders, no submissions, no repository, and of this package only what is in
SITE (as /course). What can be written (/tmp and HOME) lies in memory, and is gone at the end.
HIDDEN folders that lie inside a bound one, such as this package in site-packages, are covered by
empty ones.

Only the standard library is imported: torch would start threads, and a process with threads cannot
enter a user namespace.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache",
          "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime",
          "/sys/devices/system/cpu")  # fmt: skip
DEVICES = ("null", "zero", "full", "random", "urandom")
INSIDE_SITE, INSIDE_HOME = "/course", "/learner"
WRITABLE = ("tmp", "dev/shm", INSIDE_HOME[1:])
SIZE = "size=268435456"  # bytes of each folder in memory
BIND, RECURSIVE, PRIVATE, NOSUID, NODEV = 0x1000, 0x4000, 1 << 18, 2, 4
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000
DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442
AT_FDCWD, AT_RECURSIVE, READ_ONLY = -100, 0x8000, 1
LEARNER = 1000  # the user id that a learner's process sees as its own
NOBODY = 65534
DUMPABLE = 4  # PR_SET_DUMPABLE: the files in /proc/self belong to the process
MACHINE = ("sys", "sysrq-trigger", "irq", "bus", "fs", "scsi", "acpi")  # in /proc

libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: Path, kind: str | None, flags: int, options: str = "") -> None:
    """The system call mount."""
    _checked(
        libc.mount(
            source.encode(),
            str(target).encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode() or None,
        ),
        f"mount {target}",
    )


def memory_folder(target: Path, options: str = SIZE) -> None:
    """An empty folder that lies in memory."""
    target.mkdir(parents=True, exist_ok=True)
    mount("tmpfs", target, "tmpfs", NOSUID | NODEV, options)


def bind(source: Path, target: Path) -> None:
    """Show a file or folder in another place; a link is made again as a link."""
    if source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(os.readlink(source))
        return
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount(str(source), target, None, BIND | RECURSIVE)


def _set_attributes(target: Path, added: int, removed: int, how: int) -> None:
    """mount_setattr(2), of Linux 5.12."""
    attributes = (ctypes.c_uint64 * 4)(added, removed, 0, 0)
    place = str(target).encode()
    done = libc.syscall(MOUNT_SETATTR, AT_FDCWD, place, how, attributes, ctypes.c_size_t(32))
    _checked(done, f"mount_setattr {target}")


def read_only(target: Path) -> None:
    """Make a mount and all mounts below it read-only."""
    _set_attributes(target, READ_ONLY, 0, AT_RECURSIVE)


def writable(target: Path) -> None:
    """Make one mount writable again; those below it stay as they are."""
    _set_attributes(target, 0, READ_ONLY, 0)


def python_folders() -> list[Path]:
    """The folders of this Python and its packages, also of packages that lie elsewhere."""
    found = [Path(p) for p in (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)]
    found += [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    return sorted({*found, *(path.resolve() for path in found)})


def build_root(root: Path, site: Path, hidden: list[Path]) -> None:
    """Bind everything that a learner's process needs below `root`."""
    memory_folder(root, "mode=755,size=16777216")

    def inside(path: Path) -> Path:
        return root / path.relative_to("/")

    for folder in WRITABLE:  # first, because Python itself may lie below /tmp
        memory_folder(root / folder)
    bound: list[Path] = []
    for path in [*map(Path, SYSTEM), *python_folders()]:
        if path.exists() and not any(path.is_relative_to(other) for other in bound):
            bind(path, inside(path))
            bound.append(path)
    for path in hidden:
        if any(path.is_relative_to(other) for other in bound) and path.is_dir():
            memory_folder(inside(path), "size=1048576")
            for again in python_folders():  # .venv in a checkout that has been covered
                if again.is_relative_to(path) and again != path:
                    bind(again, inside(again))
    bind(site, root / INSIDE_SITE[1:])
    for name in DEVICES:
        bind(Path("/dev", name), root / "dev" / name)
    for folder in ("proc", "etc"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "etc/passwd").write_text(f"learner:x:{LEARNER}:{LEARNER}::{INSIDE_HOME}:/bin/sh\n")
    read_only(root)
    for folder in WRITABLE:
        writable(root / folder)
    mount("proc", root / "proc", "proc", NOSUID | NODEV)
    for name in MACHINE:
        part = root / "proc" / name
        if part.exists():
            mount(str(part), part, None, BIND | RECURSIVE)
            read_only(part)


def pivot(root: Path) -> None:
    """Make `root` the root of the file system, and forget the old one."""
    number = PIVOT_ROOT[os.uname().machine]
    os.chdir(root)
    _checked(libc.syscall(number, b".", b"."), "pivot_root")
    _checked(libc.umount2(b".", DETACH), "umount the old root")
    os.chdir(INSIDE_HOME)


def is_real_root() -> bool:
    """Whether this is root, and not a user who is called root in a user namespace."""
    return os.getuid() == 0 and Path("/proc/self/uid_map").read_text().split()[2] != "1"


def lock() -> None:
    """Enter a user namespace that owns none of the mounts, so that none of them can be undone."""
    if is_real_root():
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(DUMPABLE, 1, 0, 0, 0)
    user, group = os.getuid(), os.getgid()
    _checked(libc.unshare(NEW_USER | NEW_MOUNTS), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{LEARNER} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{LEARNER} {group} 1")


def main(arguments: list[str]) -> None:
    """Build the walls and start the command inside them."""
    cut = arguments.index("--")
    site, home, *hidden = map(Path, arguments[:cut])
    os.umask(0o022)  # NOBODY has to pass through the folders that are made here
    root = home / "root"
    root.mkdir()
    build_root(root, site, hidden)
    pivot(root)
    lock()
    places = dict.fromkeys(("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"), INSIDE_HOME)
    command = [part.replace("{site}", INSIDE_SITE) for part in arguments[cut + 1 :]]
    os.execve(command[0], command, {**os.environ, **places, "TMPDIR": "/tmp", "USER": "learner"})


if __name__ == "__main__":
    main(sys.argv[1:])
