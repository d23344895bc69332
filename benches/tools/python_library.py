#!/usr/bin/env python3
"""Writes src/catalog/traces/walk/library.txt: what the modules of Python's own library import when they are imported.

A line for each module: its name, and those that its top level imports, as far as they are files of the library and are there after the import. To be
run with the CPython whose library is meant: python3 benches/tools/python_library.py >src/catalog/traces/walk/library.txt
"""

import ast
import importlib.util
import os
import subprocess
import sys
import sysconfig

LIBRARY = sysconfig.get_paths()["stdlib"]
# Part of the interpreter, and read from nowhere: FROZEN in src/catalog/traces/walk/python.rs.
FROZEN = {
    "_collections_abc", "_sitebuiltins", "abc", "codecs", "genericpath", "importlib", "importlib._bootstrap",
    "importlib._bootstrap_external", "importlib.machinery", "importlib.util", "io", "ntpath", "os", "posixpath", "runpy", "site", "stat",
}
# What no service imports to start, and what has to be looked into anyway.
LEFT_OUT = (
    "test", "idlelib", "lib2to3", "tkinter", "turtle", "ensurepip", "distutils", "pydoc", "venv", "antigravity", "this", "__phello__",
    "__hello__", "ctypes.macholib", "msilib", "wsgiref", "xml", "xmlrpc", "curses", "sqlite3", "dbm", "encodings",
)
FOLDERS_LEFT_OUT = ("__pycache__", "site-packages", "test", "tests", "lib-dynload")


def modules():
    """Names of modules, with their files, and whether they are packages."""
    for root, _, files in sorted(os.walk(LIBRARY)):
        parts = [part for part in os.path.relpath(root, LIBRARY).split("/") if part != "."]
        if any(part in FOLDERS_LEFT_OUT or part.startswith("config-") for part in parts):
            continue
        for file in files:
            stem, extension = os.path.splitext(file)
            name = ".".join(parts if stem == "__init__" else [*parts, stem])
            left_out = any(name == out or name.startswith(out + ".") for out in LEFT_OUT)
            if extension == ".py" and name and not left_out and "__main__" not in name:
                yield name, os.path.join(root, file), stem == "__init__"


def loaded_by(name):
    """All modules that are there after an import."""
    program = f"import sys, {name}; print(' '.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False)
    return set(ran.stdout.splitlines()[-1].split()) if ran.returncode == 0 and ran.stdout else None


def imports(body):
    """Imports outside of functions: levels, modules, and names in them."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        for field in ("body", "orelse", "handlers", "finalbody"):
            inner = getattr(node, field, None)
            yield from imports(inner if isinstance(inner, list) else [])


def is_file(name):
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return bool(spec and spec.origin and spec.origin.startswith(LIBRARY))


def main():
    for module, path, is_package in sorted(modules()):
        loaded = loaded_by(module)
        if loaded is None:
            continue
        with open(path, "rb") as source:
            tree = ast.parse(source.read())
        found = []
        for level, name, names in imports(tree.body):
            if level:
                parts = module.split(".")[: None if is_package else -1]
                name = ".".join([*parts[: len(parts) - level + 1], *([name] if name else [])])
            for full in [name, *(f"{name}.{part}" for part in names)]:
                parts = full.split(".")
                for end in range(1, len(parts) + 1):
                    part = ".".join(parts[:end])
                    is_new = part in loaded and part not in FROZEN and part not in found
                    if is_new and part != module and not module.startswith(part + ".") and is_file(part):
                        found.append(part)
        if found:
            print(f"{module}: {' '.join(found)}")


main()
