"""What setup.cfg asks for against what is installed, and the versions that the suite runs with."""

import configparser
import importlib
import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from train.diagnosis.findings import Finding, Level, one_line
from train.diagnosis.surroundings import ROOT, in_clone

NAME = "skipstone"
FEATURES = {
    "dedup": "leaving out duplicates in data.prepare",
    "float8": "--parallel.float8",
    "html": "HTML as input of data.prepare",
    "lm_eval": "inference.lm_harness",
    "quantize": "--quantize",
    "s3": "s3:// URLs",
    "serve": "inference.serve",
    "test": "the tests",
    "trackio": "metrics in Trackio",
}
_CLOSELY_TIED = ("torch", "torchtitan")
"""Packages whose newer versions have broken things before."""
_MODULES = {"pyyaml": "yaml", "flask-cors": "flask_cors", "pytest-timeout": "pytest_timeout"}
"""Modules that are not named as their packages are."""
_TOOLS = ("ruff", "mypy")
"""Packages that are commands."""


def requirements() -> dict[str, list[Requirement]]:
    """Return what each extra requires, and under "" what is required in any case.

    Those of the setup.cfg beside our packages, else of the installed package.

    Raises:
        ImportError: Neither is there.
    """
    if in_clone():
        setup = configparser.RawConfigParser()
        setup.read(ROOT / "setup.cfg")
        lists = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
        return {
            extra: [Requirement(line) for line in text.split("\n") if line.strip()]
            for extra, text in lists.items()
        }
    data = importlib.metadata.metadata(NAME)
    lines = [Requirement(line) for line in data.get_all("Requires-Dist") or []]
    extras = {extra.replace("-", "_"): extra for extra in data.get_all("Provides-Extra") or []}
    found = {"": [line for line in lines if line.marker is None]}
    for name, extra in extras.items():
        found[name] = [each for each in lines if f'"{extra}"' in str(each.marker)]
    return found


def tested_versions() -> dict[str, str]:
    """Return the version of each package that the suite runs with; empty where it is not known."""
    path = ROOT / "launch" / "constraints.txt"
    lines = path.read_text().split() if path.is_file() else []
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines)}


def normal(name: str) -> str:
    """Return a package's name as it may be compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def check_packages() -> Iterator[Finding]:
    """Check the versions of what is required, that it works, and the same of the extras."""
    yield from check_versions()
    yield from check_imports()
    yield from check_features()


def check_versions() -> Iterator[Finding]:
    """Compare versions; nothing is imported."""
    wanted, tested = requirements(), tested_versions()
    newer, details, bad = [], {}, 0
    for each in wanted[""]:
        version, pin = installed(each), tested.get(normal(each.name), "")
        details[each.name] = {"installed": version, "range": str(each.specifier), "tested": pin}
        if fault := _fault(each, version):
            bad += 1
            yield Finding("packages", Level.PROBLEM, fault, pip([each]))
        elif pin and Version(Version(str(version)).public) > Version(pin):
            newer.append(f"{each.name} {version}")
            if each.name in _CLOSELY_TIED:
                yield Finding(
                    "packages",
                    Level.WARNING,
                    f"{each.name}: {version} is newer than the tested {pin}",
                    f"pip install {each.name}=={pin}, where something fails",
                )
    for extra, lines in wanted.items():
        if extra:
            for each in lines:
                details[each.name] = {
                    "installed": installed(each),
                    "range": str(each.specifier),
                    "tested": tested.get(normal(each.name), ""),
                }
    count = f"{len(wanted['']) - bad} of {len(wanted[''])} in range"
    found = f"{count}; newer than tested: {', '.join(newer)}" if newer else count
    yield Finding("packages", Level.OK, found, details=dict(details))


def check_imports() -> Iterator[Finding]:
    """Import what is required: a package may be there and still not work."""
    names = [each.name for each in requirements()[""] if installed(each)]
    bad = 0
    for name in names:
        if fault := _import_fault(name):
            bad += 1
            yield Finding(
                "imports", Level.PROBLEM, fault, f"pip install --force-reinstall --no-deps {name}"
            )
    if not bad:
        yield Finding("imports", Level.OK, f"all {len(names)} required packages can be imported")


def check_features() -> Iterator[Finding]:
    """Check what each extra requires, and that it can be imported."""
    there = []
    for extra, lines in requirements().items():
        if not extra or (extra == "test" and not in_clone()):
            continue
        purpose = FEATURES.get(extra, "an option")
        versions = {each.name: installed(each) for each in lines}
        missing = [each.name for each in lines if not versions[each.name]]
        if missing:
            found = f"{', '.join(missing)} not installed, needed for {purpose}"
            yield Finding("features", Level.OPTIONAL, f"{extra}: {found}", _extra(extra))
            continue
        faults = [_fault(each, versions[each.name]) for each in lines]
        if extra != "test":
            faults += [_import_fault(each.name) for each in lines]
        if any(faults):
            found = f"{extra}: {next(filter(None, faults))}, needed for {purpose}"
            yield Finding("features", Level.WARNING, found, _extra(extra))
        else:
            there.append(extra)
    if there:
        yield Finding("features", Level.OK, ", ".join(there))


def installed(requirement: Requirement) -> str | None:
    """Return the version that is installed, None where there is none."""
    try:
        return importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(lines: list[Requirement]) -> str:
    """Return the command that installs packages in their ranges."""
    pins = " -c launch/constraints.txt" if in_clone() else ""
    return f"pip install{pins} " + " ".join(f"'{each.name}{each.specifier}'" for each in lines)


def _extra(extra: str) -> str:
    if in_clone():
        return f"pip install -c launch/constraints.txt -e .[{extra}]"
    return f"pip install '{NAME}[{extra}]'"


def _fault(requirement: Requirement, version: str | None) -> str:
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, must be {requirement.specifier}"
    return ""


def _import_fault(name: str) -> str:
    """Return why a package cannot be imported, empty where it can be."""
    try:
        importlib.import_module(_MODULES.get(normal(name), name.replace("-", "_").lower()))
    except Exception as error:  # whatever its own code raises
        return f"{name} cannot be imported, {type(error).__name__}: {one_line(error, 120)}"
    return ""
