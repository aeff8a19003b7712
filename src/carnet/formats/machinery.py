"""Which names of a pickle can only be code: the part of an allow-list for training arguments that still refuses.

An unknown class of a training program becomes an inert record and does no harm. A name out of one of these modules has no
business among arguments: whoever wrote it wants something to run, so the file is refused, loudly, instead of being read around.
"""

# modules whose names do something, with all that is below them
MODULES = frozenset({
    "_ctypes", "_frozen_importlib", "_functools", "_operator", "_pickle", "_posixsubprocess", "_socket", "_thread",
    "antigravity", "ast", "asyncio", "atexit", "bdb", "builtins", "bz2", "cPickle", "cProfile", "cffi", "cloudpickle",
    "code", "codecs", "codeop", "commands", "concurrent", "copy_reg", "copyreg", "ctypes", "curses", "dbm", "dill",
    "dis", "distutils", "doctest", "ensurepip", "fcntl", "fileinput", "ftplib", "functools", "gc", "getpass", "glob", "grp",
    "gzip", "http", "idlelib", "imaplib", "imp", "importlib", "inspect", "itertools", "joblib", "lib2to3", "linecache",
    "logging", "lzma", "marshal", "mmap", "multiprocessing", "nntplib", "nt", "ntpath", "operator", "os", "pdb", "pickle",
    "pip", "pkgutil", "platform", "popen2", "poplib", "posix", "posixpath", "profile", "pty", "pwd", "pydoc", "pytest",
    "readline", "requests", "resource", "rlcompleter", "runpy", "sched", "select", "selectors", "setuptools", "shelve",
    "shlex", "shutil", "site", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys", "sysconfig",
    "tarfile", "telnetlib", "tempfile", "threading", "timeit", "tkinter", "turtle", "types", "unittest",
    "urllib", "venv", "weakref", "webbrowser", "xmlrpc", "zipfile", "zipimport"
})  # fmt: skip

# the same, inside packages that also hold data
SUBMODULES = (
    "torch.hub", "torch.jit", "torch.serialization", "torch.utils", "torch.package", "torch.fx", "torch._dynamo",
    "torch._inductor", "torch.distributed.rpc", "torch.multiprocessing", "torch.testing", "numpy.testing", "numpy.f2py",
    "numpy.distutils", "numpy.lib", "numpy.ctypeslib",
)  # fmt: skip

# functions in modules that also hold data
FUNCTIONS = frozenset({
    ("torch", "load"), ("torch", "save"), ("torch", "compile"), ("io", "open"), ("io", "FileIO"), ("io", "open_code"),
    ("_io", "open"), ("_io", "FileIO"), ("_io", "open_code"), ("numpy", "load"), ("numpy", "fromfile"), ("numpy", "memmap"),
    ("signal", "signal"), ("signal", "raise_signal"), ("signal", "pthread_kill"), ("signal", "alarm"),
})  # fmt: skip

# builtins that are named beside an argument (`type=int`) and not made
TYPES = frozenset({
    "int", "float", "str", "bool", "bytes", "object", "complex", "slice", "range", "type", "NoneType", "Ellipsis",
})  # fmt: skip


def is_machinery(module: str, name: str) -> bool:
    """Say whether a global can only be code.

    >>> is_machinery("os", "system"), is_machinery("builtins", "int"), is_machinery("megatron.core.enums", "ModelType")
    (True, False, False)
    """
    if module == "builtins" and name in TYPES:
        return False
    below = any(module == part or module.startswith(part + ".") for part in SUBMODULES)
    return below or module.partition(".")[0] in MODULES or (module, name) in FUNCTIONS
