"""Turn jsonargparse's message about a wrong config into one sentence with the nearest valid name."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping

from visionattn.errors import nearest

_UNKNOWN = re.compile(
    r"(?:Option '(?P<a>[^']+)' is not accepted|does not accept option '(?P<b>[^']+)'|"
    r"unrecognized arguments: --(?P<c>[^ =]+))"
)
_NO_MEMBER = re.compile(
    r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'|No module named '(?P<missing>[^']+)'|"
    r"No (?P<face>[\w.]+) attribute (?P<lazy>\w+)"  # lazy_loader's message for a missing public name of a package
)
_WRONG_VALUE = re.compile(r"(?:Expected an? (?P<type>.+?)\. Got value: (?P<value>.*))")
_WRONG_UNION = re.compile(r"- Expected an? (?P<type>.+)\n(?:.*\n)*?\s*Given value: (?P<value>.*)")
_KEY = re.compile(r"Parser key \"(?P<key>[^\"]+)\"")
_CLASS = re.compile(r"(?:Problem with given class_path '(?P<a>[^']+)'|Got value: Namespace\(class_path='(?P<b>[^']+)')")


def explain(message: str, sections: Mapping[str, Callable[..., object]]) -> str:
    """Turn jsonargparse's message about a wrong config into one sentence.

    Args:
        message: jsonargparse's message, which may have several lines.
        sections: section of the config → its class, for the sections whose class is fixed: `{"trainer": Trainer, …}`.

    Returns:
        The sentence. If an option, class or module is wrong, the sentence also gives the nearest valid names.
    """
    place = ".".join(match["key"] for match in _KEY.finditer(message))
    classes = [match["a"] or match["b"] for match in _CLASS.finditer(message)]
    if match := _last(_UNKNOWN, message):
        name = match["a"] or match["b"] or match["c"]
        if not match["a"]:  # the option is not an argument of a class_path
            section, _, rest = name.partition(".")
            if section not in sections:
                return f"the config has no option {name}.{nearest(section, sections)}"
            return f"the config has no option {name}.{_nearest_in(rest, section, _arguments(sections[section]))}"
        owner = classes[-1] if classes else place
        return f"{place or 'the config'}: {owner} has no option {name!r}.{nearest(name, _arguments(_find(owner)))}"
    if match := _last(_NO_MEMBER, message):
        if match["missing"]:
            return f"{place}: there is no module {match['missing']}; class_path needs package.module.Class"
        module, name = match["module"] or match["face"], match["name"] or match["lazy"]
        found = _find(module)
        return f"{place}: {module} has no {name}.{nearest(name, dir(found) if found else [])}"
    if match := _last(_WRONG_VALUE, message) or _WRONG_UNION.search(message):
        kind = re.sub(r"<class '([^']+)'>", r"\1", match["type"].strip())
        kind = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", kind)
        return f"{place} must be {kind}, got {match['value'].strip()}"
    if "File does not exist" in message:
        return (
            f"there is no config {message.split(':')[-1].strip()}; "
            "the configs that come with visionattn are in configs/, e.g. configs/quickstart.yaml"
        )
    if "arguments are required" in message or "is required" in message:
        return f"{message.splitlines()[0]}; give a config that has them: --config FILE, e.g. configs/quickstart.yaml"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:4]) if message.startswith("Problems parsing config") else lines[0] + _reason(lines)


def _reason(lines: list[str]) -> str:
    """Return the innermost line of a nested message."""
    inner = [
        line.lstrip("- ")
        for line in lines[1:]
        if not line.startswith(("Given value", "Subtypes", "Errors", "Does not"))
    ]
    inner = [line for line in inner if "NoneType" not in line]
    return f" {inner[-1]}" if inner else ""


def _nearest_in(name: str, prefix: str, known: Iterable[str]) -> str:
    found = nearest(name, known)
    return re.sub(r"(?<=[ ])(?=[a-z_]+[,.])", f"{prefix}.", found) if prefix and found else found


def _arguments(found: object) -> list[str]:
    return list(inspect.signature(found).parameters) if callable(found) else []


def _find(path: str) -> object:
    """Import a module or a member of a module; return None if it does not exist."""
    module, _, name = path.rpartition(".")
    for home, member in ((path, None), (module, name)):
        try:
            loaded = importlib.import_module(home)
            return getattr(loaded, member) if member else loaded
        except (ImportError, AttributeError, ValueError):
            continue
    return None


def _last(pattern: re.Pattern[str], message: str) -> re.Match[str] | None:
    matches = list(pattern.finditer(message))
    return matches[-1] if matches else None
