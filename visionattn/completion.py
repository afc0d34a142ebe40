"""Completion for shells, made of what the verbs' own `--help` says."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

from visionattn.errors import UsageError, nearest

SHELLS = ("bash", "zsh", "fish")

_OPTION = re.compile(r"(?<![\w.-])(--[a-zA-Z][\w.-]*)(?:[ =]\{([^}\s]+)\})?")


def options_of(help_text: str) -> dict[str, tuple[str, ...]]:
    """Option → the values that it takes, where the help lists them."""
    found: dict[str, tuple[str, ...]] = {}
    for option, values in _OPTION.findall(help_text):
        known = tuple(value for value in values.split(",") if value)
        found[option.rstrip(".-")] = known or found.get(option.rstrip(".-"), ())
    return dict(sorted(found.items()))


def script(shell: str, verbs: Mapping[str, str], run: Callable[[Sequence[str]], object]) -> str:
    """Write what a shell reads once to complete verbs, their options, values and files.

    Args:
        shell: bash, zsh or fish.
        verbs: verb → what it does.
        run: the command line, which is asked for the help of each verb.

    Raises:
        UsageError: it is another shell.
    """
    if shell not in SHELLS:
        raise UsageError(
            f"there is no completion for {shell!r}; there is for {', '.join(SHELLS)}.{nearest(shell, SHELLS)}"
        )
    options = {verb: options_of(_help(verb, run)) for verb in verbs}
    return _fish(verbs, options) if shell == "fish" else _bash(options, zsh=shell == "zsh")


def _help(verb: str, run: Callable[[Sequence[str]], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run([verb, "--help"])
    return out.getvalue()


def _bash(options: Mapping[str, Mapping[str, Sequence[str]]], *, zsh: bool) -> str:
    lines = ["autoload -U +X compinit && compinit", "autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    lines += [
        "_visionattn() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" words=""',
        '    if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        words="{" ".join(options)} --help --version"',
        "    else",
        '        case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in',
    ]
    for verb, known in options.items():
        lines += [f'            "{verb} {name}") words="{" ".join(some)}" ;;' for name, some in known.items() if some]
    lines += [
        "        esac",
        '        case "$current" in -*) case "${COMP_WORDS[1]}" in',
        *(f'            {verb}) words="{" ".join(known)}" ;;' for verb, known in options.items()),
        "        esac ;; esac",
        "    fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _visionattn visionattn",
    ]
    return "\n".join(lines) + "\n"


def _fish(verbs: Mapping[str, str], options: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    lines = []
    for verb, text in verbs.items():
        quoted = text.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c visionattn -n __fish_use_subcommand -f -a {verb} -d '{quoted}'")
        inside = f"-n '__fish_seen_subcommand_from {verb}'"
        for name, some in options[verb].items():
            values = f" -x -a '{' '.join(some)}'" if some else ""
            lines.append(f"complete -c visionattn {inside} -l {name[2:]}{values}")
    return "\n".join(lines) + "\n"
