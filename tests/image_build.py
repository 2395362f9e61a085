"""Builds the image of the Dockerfile without a container engine: a directory for each stage, and chroot.

As root, in mount namespaces of its own. The files of this machine's Debian packages stand in for the base image; what
the build downloads comes the way this machine is told to get it, of which nothing stays.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import dockerfile
from docker.utils.build import exclude_paths

from tests.compose import ROOT

# How this machine reaches package indexes; the files are mounted while a command runs.
_NETWORK = re.compile(r"(PIP|UV)_\w*(INDEX|CERT|TIMEOUT)\w*|SSL_CERT_\w+|\w+_proxy", re.IGNORECASE)
_NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs")

# What the base image has besides the packages that every Debian has; and what it has not.
PACKAGES = ("apt", "ca-certificates", "netbase", "passwd", "python3", "python3-pip", "tzdata")
_LEFT_OUT = ("/usr/share/doc/", "/usr/share/locale/", "/usr/share/man/")

_UNSHARE = ["unshare", "--mount", "--propagation", "private"]


@dataclass(frozen=True)
class Image:
    """A stage of the Dockerfile, and what a container of it is started with."""

    root: Path
    environment: Mapping[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin", "HOME": "/root"}
    )
    directory: str = "/"
    user: str = "0:0"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()

    def path(self, path: str) -> Path:
        """Where a path of a container is."""
        return self.root.joinpath(*PurePosixPath(self.directory, path).parts[1:])

    def container(self, *command: str) -> list[str]:
        """The program that runs a command as `docker run --read-only --tmpfs /tmp --network none` does."""
        mounts = ['mount -o remount,bind,ro "$ROOT"', 'mount -t tmpfs tmpfs "$ROOT"/tmp', "ip link set lo up"]
        inside = [*self.entrypoint, *(command or self.command)]
        return [*_UNSHARE, "--net", "--pid", "--fork", "--kill-child", *self._chroot(mounts, inside, {})]

    def run(self, command: str, caches: list[str]) -> None:
        """Execute a RUN instruction, with uv's cache of this machine at the caches' places."""
        uv = [str(Path(sys.executable).with_name("uv")), "cache", "dir"]
        files = {path: path for path in _NETWORK_FILES if Path(path).exists()}
        for cache in caches:
            self.path(cache).mkdir(parents=True, exist_ok=True)
            files[cache] = subprocess.run(uv, check=True, capture_output=True, text=True).stdout.strip()
        mounts = [f'mount --rbind {shlex.quote(source)} "$ROOT"{target}' for target, source in files.items()]
        network = {name: value for name, value in os.environ.items() if _NETWORK.fullmatch(name)}
        argv = [*_UNSHARE, *self._chroot(mounts, ["/bin/sh", "-c", command], network)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def _chroot(self, mounts: list[str], command: list[str], more: Mapping[str, str]) -> list[str]:
        script = [f"ROOT={shlex.quote(str(self.root))}", 'mount --bind "$ROOT" "$ROOT"', *mounts]
        script += ['mount -t proc proc "$ROOT"/proc', 'mount --rbind /dev "$ROOT"/dev']
        env = [f"{name}={value}" for name, value in {**self.environment, **more}.items()]
        inside = ["env", "-i", f"--chdir={self.directory}", *env, *command]
        script.append(f'exec chroot --userspec={self.user} --groups="" "$ROOT" {shlex.join(inside)}')
        return ["sh", "-euc", "\n".join(script)]


class Build:
    """The stages of the Dockerfile, each built once, when it is needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._images: dict[str, Image] = {}
        self._stages: dict[str, tuple[str, list[dockerfile.Command]]] = {}
        for instruction in dockerfile.parse_file(str(ROOT / "Dockerfile")):
            if instruction.cmd == "FROM":
                parent, _, name = instruction.value
                self._stages[name] = (parent, [])
            else:
                self._stages[name][1].append(instruction)

    def image(self, name: str) -> Image:
        """A stage, after all its instructions; what is none is the base image."""
        if name not in self._images:
            root = self._directory / PurePosixPath(name).name.replace(":", "-")
            if name in self._stages:
                parent, instructions = self._stages[name]
                below = self.image(parent)
                # Links: no instruction changes a file in its place.
                subprocess.run(["cp", "--archive", "--link", below.root, root], check=True)
                image = replace(below, root=root)
                for instruction in instructions:
                    image = self._execute(image, instruction)
            else:
                image = Image(_base(root))
            self._images[name] = image
        return self._images[name]

    def _execute(self, image: Image, instruction: dockerfile.Command) -> Image:
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in instruction.flags)
        match instruction.cmd, instruction.value:
            case "RUN", (command,):
                image.run(command, re.findall(r"^type=cache,target=([\w./]+)$", flags.get("mount", "")))
            case "COPY", (*sources, target):
                self._copy(image, flags, sources, target)
            case "ENV", pairs:
                # What an instruction sets counts from the next one on.
                given = {
                    name: re.sub(r"\$(\w+)", lambda match: image.environment[match[1]], value)
                    for name, value in zip(pairs[::2], pairs[1::2], strict=True)
                }
                return replace(image, environment={**image.environment, **given})
            case "WORKDIR", (path,):
                image.path(path).mkdir(parents=True, exist_ok=True)
                return replace(image, directory=str(PurePosixPath(image.directory, path)))
            case "USER", (user,):
                return replace(image, user=user)
            case "ENTRYPOINT", value if instruction.json:
                return replace(image, entrypoint=value)
            case "CMD", value if instruction.json:
                return replace(image, command=value)
            case "HEALTHCHECK", ("CMD", *value) if instruction.json:
                return replace(image, health=tuple(value))
            case _:
                raise NotImplementedError(instruction.original)
        return image

    def _copy(self, image: Image, flags: Mapping[str, str], sources: list[str], target: str) -> None:
        origin = self.image(flags["from"]).root if "from" in flags else self._context
        for source in sources:
            found, to = origin / source.lstrip("/"), image.path(target)
            if target.endswith("/") and found.is_file():
                to = to / found.name
            to.parent.mkdir(parents=True, exist_ok=True)
            # Of a directory, what is in it.
            how = ["--archive", "--no-target-directory", *(["--link"] if "from" in flags else [])]
            subprocess.run(["cp", *how, found, to], check=True)
            if "chmod" in flags:
                subprocess.run(["chmod", "-R", flags["chmod"], to], check=True)

    @cached_property
    def _context(self) -> Path:
        """What an engine would be sent of the checkout: all that .dockerignore lets through."""
        context = self._directory / "context"
        lines = (line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines())
        for path in exclude_paths(str(ROOT), [line for line in lines if line and not line.startswith("#")]):
            to = context / path
            if (ROOT / path).is_dir():
                to.mkdir(parents=True, exist_ok=True)
            else:
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, to, follow_symlinks=False)
        return context


def _base(root: Path) -> Path:
    """A minimal Debian with Python, named `python`, and its pip: what an image `python:…-slim-bookworm` is."""
    root.mkdir()
    files = "\n".join(sorted(_files_of_packages()))
    copy = f"tar --create --no-recursion --files-from=- | tar --extract --directory={shlex.quote(str(root))}"
    subprocess.run(["sh", "-euc", copy], cwd="/", input=files, text=True, check=True, timeout=120)
    # What the packages' own scripts would make, and what makes it a base image.
    for name in ("passwd", "group"):
        shutil.copy(root / "usr/share/base-passwd" / f"{name}.master", root / "etc" / name)
    for name in ("hosts", "resolv.conf"):
        (root / "etc" / name).touch()
    for name in ("etc/ssl/certs", "usr/local/bin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    for mark in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        mark.unlink()
    return root


def _files_of_packages() -> set[str]:
    """The paths of all files and directories of the base image's packages, relative to the root."""
    shown = _lines("dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status} ${Essential}\n")
    essential = {package: yes == "yes" for package, status, yes in map(str.split, shown) if status == "installed"}
    first = [*PACKAGES, *(package for package in essential if essential[package])]
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    depends = _lines("apt-cache", "depends", "--recurse", *(f"--no-{kind}" for kind in kinds), *first)
    listed = _lines("dpkg", "--listfiles", *(essential.keys() & depends))
    there = (Path(line) for line in listed if os.path.lexists(line) and not line.startswith(_LEFT_OUT))
    # Packages name files by /bin, which is a link to /usr/bin.
    return {str(path.parent.resolve() / path.name).lstrip("/") for path in there} - {""}


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
