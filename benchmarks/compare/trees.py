"""A commit as a folder of its own: exported sources and, once its worker has run, its own build of the extension."""

from __future__ import annotations

import io
import os
import site
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class NoCommit(Exception):
    """A name that git does not know, or no repository."""


@dataclass(frozen=True)
class Tree:
    """An exported commit."""

    commit: str
    folder: Path

    @property
    def sources(self) -> Path:
        return self.folder / "tree"

    def environment(self, backend: str, threads: int) -> dict[str, str]:
        """Of a process started with `-S` that imports this tree and builds its extension into the same folder.

        Installed packages come by path and not through `site`, whose .pth files would bring in an editable install of
        this library and with it that one's extension.
        """
        users = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
        path = [str(self.sources), *site.getsitepackages(), *users]
        env = dict(os.environ)
        env |= {"PYTHONPATH": os.pathsep.join(path), "SPO_CACHE_DIR": str(self.folder / "cache")}
        # asking what is available builds whatever is missing, wanted or not
        env["SPO_DISABLE_JIT"] = "1" if backend in ("torch", "triton") else "0"
        if threads:
            env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
        return env


def export(name: str, side: str, folder: Path) -> Tree:
    """The commit's files below `folder`; a folder that an earlier call made is taken as it is.

    Raises:
        NoCommit: git cannot say what `name` is.
    """
    try:
        commit = git("rev-parse", "--verify", f"{name}^{{commit}}").decode().strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCommit(f"{side.upper()} = {name!r} is no commit of {ROOT}") from error
    tree = Tree(commit, folder / f"{side}-{commit[:12]}")
    if not tree.sources.exists():
        unfinished = tree.folder / "unfinished"
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit))) as archive:
            archive.extractall(unfinished, filter="data")
        unfinished.rename(tree.sources)
    return tree


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout
