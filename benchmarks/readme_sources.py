"""Links to the results files, with the machine where it is another one, and whether a run was quick."""

from collections.abc import Iterator, Mapping
from typing import Any

Files = Mapping[str, dict[str, Any]]  # contents of the results files by name
MAIN = "segmenting"  # whose machine is described; others say where theirs is another one
_MACHINE = ("processor", "cores", "instruction_set")


def source(files: Files, name: str) -> str:
    """A link to the file, with what is particular about its run: quick, or on another machine."""
    path = f"benchmarks/results/{name}.json"
    main = files[MAIN]["environment"]
    said = [
        f"{part}: {text}" if part else text
        for part, environment in _environments(files[name])
        if (text := _particular(environment, main))
    ]
    return f"[{path}]({path})" + (f" ({'; '.join(said)})" if said else "")


def _environments(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The description of the machine; of each part, where parts were measured by themselves."""
    if "processor" in results:
        yield "", results
    elif "environment" in results:
        yield "", results["environment"]
    else:
        for name, part in results.items():
            if isinstance(part, dict) and "environment" in part:
                yield name, part["environment"]


def _particular(environment: dict[str, Any], main: dict[str, Any]) -> str:
    said = ["a quick run"] if environment.get("quick") else []
    if any(environment[key] != main[key] for key in _MACHINE):
        cores, instructions = environment["cores"], environment["instruction_set"].upper()
        said.append(f"on {cores} cores of another machine, {environment['processor']}, {instructions}")
    return " ".join(said)
