"""Check or set the version, which all packages share.

python tools/version.py check          # exit code 1 if the versions differ
python tools/version.py set 0.2.0      # write a new version everywhere
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION = r"\d+\.\d+\.\d+(?:[a-z]+\d+)?"
PATTERNS = {
    "packages/*/pyproject.toml": (rf'^version = "({VERSION})"', rf'"dmdr-[a-z]+==({VERSION})"'),
    "packages/*/src/*/__init__.py": (rf'^__version__ = "({VERSION})"',),
    "CITATION.cff": (rf"^version: ({VERSION})",),
}


def places() -> list[tuple[Path, re.Match[str]]]:
    """Return every place that states the version."""
    found = []
    for glob, patterns in PATTERNS.items():
        for path in sorted(ROOT.glob(glob)):
            text = path.read_text(encoding="utf-8")
            matches = [m for p in patterns for m in re.finditer(p, text, re.MULTILINE)]
            if not matches:
                sys.exit(f"{path.relative_to(ROOT)} states no version")
            found += [(path, match) for match in matches]
    return found


def check() -> None:
    versions = {match[1] for _, match in places()}
    if len(versions) > 1:
        for path, match in places():
            print(f"{match[1]}  {path.relative_to(ROOT)}: {match[0]}")
        sys.exit("the versions differ; write one with tools/version.py set")
    print(f"version {versions.pop()} in {len(places())} places")


def set_version(version: str) -> None:
    if not re.fullmatch(VERSION, version):
        sys.exit(f"{version!r} is not a version such as 1.2.3")
    for path in {path for path, _ in places()}:
        text = path.read_text(encoding="utf-8")
        spans = sorted((m.span(1) for p, m in places() if p == path), reverse=True)
        for start, end in spans:
            text = text[:start] + version + text[end:]
        path.write_text(text, encoding="utf-8")
    check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check")
    commands.add_parser("set").add_argument("version")
    options = parser.parse_args()
    check() if options.command == "check" else set_version(options.version)


if __name__ == "__main__":
    main()
