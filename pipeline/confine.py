"""A process gives up what a decoder does not need, as far as the kernel it runs on lets it.

In: limits, and which decoder. Out: what is in force, a word for each protection, or why it is not: a run
never fails for want of one. Files can be read and nothing else, no network, no other programs, no
other processes, no rights of root but to read. Landlock is asked through its three system calls and seccomp
through libseccomp, by ctypes: the bindings on PyPI are a pre-release and one without a release since 2021,
for some fifty lines.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable

from schemas.config import DecodeConfig, LimitsConfig

NOT_ENFORCED = "not enforced"
"""What a protection that is not in force begins with; the reason follows."""
MAX_OPEN_FILES = 64
UNPRIVILEGED = 65534
"""`nobody`, as user and group."""

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 1, 8, 38
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_CAPABILITY_VERSION_3 = 0x20080522

# linux/landlock.h; the numbers of the system calls are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _IOCTL_DEV = 1 << 0, 1 << 1, 1 << 15
_RIGHTS = {
    1: _EXECUTE | _WRITE_FILE | sum(1 << bit for bit in range(4, 13)),  # remove, make
    2: 1 << 13,  # link or rename into another folder
    3: 1 << 14,  # truncate
    5: _IOCTL_DEV,
}
"""Every way to change a file, by the version of Landlock that knows it."""
_TCP, _TCP_SINCE = 0b11, 4
_OUTSIDE, _OUTSIDE_SINCE = 0b11, 6
"""Abstract sockets and signals to processes that are not confined with it."""

_SECCOMP = "libseccomp.so.2"
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_ATTRIBUTE_TSYNC, _ATTRIBUTE_SSB = 4, 7
_NOT_EQUAL, _MASKED = 1, 7
_REFUSED_CALLS = (
    *("socket", "socketpair", "connect", "bind", "io_uring_setup"),
    *("execve", "execveat", "fork", "vfork", "setsid", "setpgid"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp"),
    *("move_pages", "migrate_pages", "pidfd_open", "pidfd_getfd", "pidfd_send_signal"),
    *("rt_sigqueueinfo", "rt_tgsigqueueinfo", "sched_setaffinity", "sched_setscheduler", "sched_setattr"),
    *("sched_setparam", "setpriority", "ioprio_set"),
    *("shmget", "shmat", "shmctl", "msgget", "msgsnd", "msgrcv", "msgctl", "semget", "semop", "semctl"),
    *("mq_open", "mq_unlink", "add_key", "keyctl", "request_key"),
    *("creat", "truncate", "unlink", "unlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat"),
    *("rmdir", "mknod", "mknodat", "link", "linkat", "symlink", "symlinkat", "flock"),
    *("name_to_handle_at", "open_by_handle_at"),
    *("chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "setxattrat"),
    *("removexattr", "lremovexattr", "fremovexattr", "removexattrat", "file_setattr"),
    *("mount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "pivot_root", "chroot", "unshare", "setns", "quotactl", "quotactl_fd", "acct"),
    *("bpf", "perf_event_open", "userfaultfd", "fanotify_init", "kexec_load", "kexec_file_load"),
    *("init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff", "sethostname"),
    *("setdomainname", "settimeofday", "clock_settime", "adjtimex", "clock_adjtime", "syslog"),
    *("iopl", "ioperm", "modify_ldt", "personality", "vhangup"),
)
"""No network, no programs, no other processes, no change of files, nothing shared or of the system's."""
_ABSENT_CALLS = ("clone3", "openat2")
"""What they are asked lies in memory, where a filter cannot look; libraries can do without them."""
_INT = 0xFFFFFFFF
_CLONE_THREAD = 0x10000
_WRITES = ((3, 1), (3, 2), (3, 3), (os.O_CREAT, os.O_CREAT), (os.O_TRUNC, os.O_TRUNC))
_REFUSED_ARGUMENTS: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "open": (1, _WRITES),
    "openat": (2, _WRITES),
    "clone": (0, ((_CLONE_THREAD, 0),)),
    "prctl": (0, ((_INT, _PR_SET_PDEATHSIG),)),
    # The terminal's input, flags of a file; signals to the owner of a descriptor, leases.
    "ioctl": (1, tuple((_INT, what) for what in (0x5412, 0x541C, 0x40086602, 0x401C5820))),
    "fcntl": (1, tuple((_INT, what) for what in (8, 10, 15, 1024))),
}
"""Call -> position of an argument, and what it must not be: mask, value."""
_OWN_ALONE = ("kill", "tgkill", "tkill")
"""A process may end itself: abort does."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def confine(
    *, parent: int, limits: LimitsConfig, decode: DecodeConfig, keep_root: bool, shared_bytes: int = 0
) -> dict[str, str]:
    """Give up rights for good; protection -> what holds it, or `not enforced` and why.

    The process dies when the thread that started it in `parent` does. `keep_root`: keep the uid, for files
    that only uid 0 may open. `shared_bytes`: what it has mapped for frames, which does not count against
    `limits.memory_bytes`. A CUDA driver opens its devices late and for writing, so with `decode.device =
    "cuda"` the uid is kept, /dev stays writable, memory is not limited, and there is no seccomp filter.
    """
    cuda = decode.device == "cuda"
    libc = ctypes.CDLL(None, use_errno=True)
    _limit_resources(limits, decode, shared_bytes)
    found = {"memory": f"{NOT_ENFORCED}: CUDA" if cuda else f"{limits.memory_bytes} bytes"}
    found["root"] = _attempt(lambda: _drop_root(libc, keep=cuda or keep_root))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        why = f"{NOT_ENFORCED}: {os.strerror(ctypes.get_errno())}"
        return found | {"files": why, "network": why, "programs": why}
    abi = max(0, libc.syscall(_CREATE_RULESET, None, 0, _VERSION))
    found["files"] = _attempt(lambda: _landlock(libc, abi, devices=cuda))
    locked = not found["files"].startswith(NOT_ENFORCED)
    filtered = f"{NOT_ENFORCED}: CUDA" if cuda else _attempt(_seccomp)
    found["network"] = found["programs"] = filtered
    if filtered.startswith(NOT_ENFORCED) and locked:
        found["programs"] = "Landlock"
        if abi >= _TCP_SINCE:
            found["network"] = f"Landlock: TCP alone ({filtered})"
    elif not locked and not filtered.startswith(NOT_ENFORCED):
        found["files"] = "read only (seccomp)"
    return found


def _check(result: int) -> int:
    """The result of a C function, as OSError where it is -1."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _attempt(protect: Callable[[], str]) -> str:
    try:
        return protect()
    except OSError as error:
        return f"{NOT_ENFORCED}: {error.strerror or error}"


def _limit_resources(limits: LimitsConfig, decode: DecodeConfig, shared_bytes: int) -> None:
    most = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: MAX_OPEN_FILES}
    if decode.device == "cpu":  # CUDA reserves addresses far beyond what it uses
        most[resource.RLIMIT_AS] = limits.memory_bytes + shared_bytes
    if decode.backend == "pyav" and decode.threads == 1:  # a thread counts as a process
        most[resource.RLIMIT_NPROC] = 0  # has no effect while the user is root
    for limit, value in most.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _drop_root(libc: ctypes.CDLL, *, keep: bool) -> str:
    """Become nobody, with the one right of root to read any file; with `keep` only the rights go."""
    if os.geteuid() != 0:
        return "never had"
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, for bits from 32 on
    libc.capget(header, sets)
    readers = [1 << cap for cap in (_CAP_DAC_READ_SEARCH, _CAP_DAC_OVERRIDE) if sets[1] & 1 << cap]
    right = readers[0] if readers else 0
    # Where root may not read all files (some containers), another user may read still less.
    change = bool(readers) and not keep
    try:
        if change:
            libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
            os.setgroups([])
            os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
            os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
    finally:
        _check(libc.capset(header, (ctypes.c_uint32 * 6)(right, right)))
    return f"given up (uid {UNPRIVILEGED})" if change else f"{NOT_ENFORCED}: uid 0 kept, without its rights"


def _landlock(libc: ctypes.CDLL, abi: int, *, devices: bool) -> str:
    """No file made, changed, moved or run. Threads started from here on are held too."""
    if not abi:
        raise OSError(errno.ENOSYS, "this kernel has no Landlock")
    rights = sum(bits for since, bits in _RIGHTS.items() if abi >= since)
    ruleset = _Ruleset(
        rights, _TCP if abi >= _TCP_SINCE else 0, _OUTSIDE if abi >= _OUTSIDE_SINCE and not devices else 0
    )
    # A kernel that knows fewer fields refuses the longer struct.
    size = 8 * (1 + (abi >= _TCP_SINCE) + (abi >= _OUTSIDE_SINCE))
    rules = _check(libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0))
    if devices:
        folder = os.open("/dev", os.O_PATH | os.O_CLOEXEC)
        rule = _PathRule(rights & (_WRITE_FILE | _IOCTL_DEV), folder)
        _check(libc.syscall(_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(rule), 0))
        os.close(folder)
    _check(libc.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)
    return "read only (Landlock)"


def _seccomp() -> str:
    """Refuse the calls above, in every thread; EPERM, or ENOSYS where a library then does without."""
    try:
        library = ctypes.CDLL(_SECCOMP)
    except OSError:
        raise OSError(errno.ENOENT, f"{_SECCOMP} is not installed") from None
    library.seccomp_init.restype = ctypes.c_void_p
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    library.seccomp_attr_set(rules, _ATTRIBUTE_TSYNC, ctypes.c_uint32(1))
    # Older kernels slow a filtered process down against speculation; it holds no secret worth that.
    library.seccomp_attr_set(rules, _ATTRIBUTE_SSB, ctypes.c_uint32(1))

    def refuse(name: str, *where: _Comparison, error: int = errno.EPERM) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        comparisons = (_Comparison * len(where))(*where)
        library.seccomp_rule_add_array(
            rules, ctypes.c_uint32(_ERRNO | error), number, len(where), comparisons
        )

    for name in _REFUSED_CALLS:
        refuse(name)
    for name in _ABSENT_CALLS:
        refuse(name, error=errno.ENOSYS)
    for name, (argument, values) in _REFUSED_ARGUMENTS.items():
        for mask, value in values:
            refuse(name, _Comparison(argument, _MASKED, mask, value))
    for name in _OWN_ALONE:
        refuse(name, _Comparison(0, _NOT_EQUAL, os.getpid()))
    refuse("prlimit64", _Comparison(0, _NOT_EQUAL, 0))
    refused = library.seccomp_load(rules)
    library.seccomp_release(rules)
    if refused:
        raise OSError(-refused, os.strerror(-refused))
    return "none (seccomp)"
